package supervisor

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"syscall"

	"github.com/containerd/log"

	"github.com/hypernetes/hypernetes/cluster/node"
	"github.com/hypernetes/hypernetes/proc"
)

// record remembers a process across supervisors.
type record struct {
	proc.ID
	// Spec is the hash of what was started; a process of another spec is replaced.
	Spec string `json:"spec"`
}

// process adopts the recorded process if it is alive and still what the spec asks
// for, else ends it and starts a new one.
func (c *component) process(ctx context.Context) (proc.ID, bool, error) {
	path := c.sup.files.Record(c.spec.Name)
	want := c.spec.hash()
	if old, err := readRecord(path); err == nil && old.Alive() {
		if old.Spec == want {
			log.G(ctx).WithField("pid", old.PID).Info("adopted")
			return old.ID, true, nil
		}
		log.G(ctx).WithField("pid", old.PID).Info("replacing a process with other settings")
		c.end(old.ID)
	}
	for _, stray := range c.launcher().Strays(c.spec.Name, c.spec.Args) {
		log.G(ctx).WithField("pid", stray.PID).Info("ending a process nobody recorded")
		c.end(stray)
	}
	id, err := c.start()
	if err != nil {
		return proc.ID{}, false, fmt.Errorf("start %s: %w", c.spec.Path, err)
	}
	return id, false, node.WriteRecord(path, record{id, want})
}

func (c *component) end(id proc.ID) {
	r, w, err := os.Pipe()
	if err != nil {
		return
	}
	defer r.Close()
	defer w.Close()
	exited := make(chan error, 1)
	go func() {
		_, err := id.Wait(r)
		exited <- err
	}()
	c.terminate(id, exited)
}

func (c *component) launcher() Launcher {
	if c.spec.Launcher != nil {
		return c.spec.Launcher
	}
	return c.sup.launcher
}

func (c *component) start() (proc.ID, error) {
	logFile, err := node.OpenLog(c.sup.files.Log(c.spec.Name))
	if err != nil {
		return proc.ID{}, err
	}
	defer logFile.Close()
	cmd := &exec.Cmd{Path: c.spec.Path, Args: c.spec.Args, Env: c.spec.Env, Dir: "/"}
	// The file itself, not a pipe through us: the component must be able to write
	// when its supervisor is gone.
	cmd.Stdout, cmd.Stderr = logFile, logFile
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := c.launcher().Start(cmd, c.spec.Name); err != nil {
		return proc.ID{}, err
	}
	id, err := proc.Find(cmd.Process.Pid)
	// Reap it whenever it ends; its end is noticed through its pidfd like that of an
	// adopted process, so that there is one way for both.
	go func() { _ = cmd.Wait() }()
	if err != nil {
		return proc.ID{}, fmt.Errorf("ended at once; last words: %s", wordsOf(c.sup.files.Log(c.spec.Name)))
	}
	return id, nil
}

// hash identifies the spec and the very executable it would start.
func (s Spec) hash() string {
	h := sha256.New()
	st, err := os.Stat(s.Path)
	if err == nil {
		fmt.Fprintf(h, "%d %d\n", st.Size(), st.ModTime().UnixNano())
	}
	fmt.Fprintf(h, "%q %q %q\n", s.Path, s.Args, s.Env)
	for _, path := range slices.Sorted(maps.Keys(s.Inputs)) {
		fmt.Fprintf(h, "%q %q\n", path, s.Inputs[path])
	}
	return hex.EncodeToString(h.Sum(nil))
}

func readRecord(path string) (record, error) {
	var r record
	b, err := os.ReadFile(path)
	if err != nil {
		return r, err
	}
	return r, json.Unmarshal(b, &r)
}
