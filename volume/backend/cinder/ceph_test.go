package cinder

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hypernetes/hypernetes/test/ceph"
	"github.com/hypernetes/hypernetes/volume/backend"
	"github.com/hypernetes/hypernetes/volume/record"
)

// writer is a client that has an image open, as a node's storage daemon has.
type writer struct {
	t   *testing.T
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func open(t *testing.T, c *ceph.Cluster, r record.RBD) *writer {
	t.Helper()
	w := &writer{t: t, cmd: exec.Command("qemu-io", "-f", "raw", "-t", "none", fmt.Sprintf("rbd:%s/%s:id=%s:conf=%s", r.Pool, r.Image, r.User, c.Conf()))}
	var err error
	if w.in, err = w.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := w.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	w.cmd.Stderr = w.cmd.Stdout
	w.out = bufio.NewReader(out)
	if err := w.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = w.cmd.Process.Kill()
		_ = w.cmd.Wait()
	})
	return w
}

// write says whether it succeeded.
func (w *writer) write(pattern byte) bool {
	w.t.Helper()
	fmt.Fprintf(w.in, "write -P %d 0 4k\n", pattern)
	for {
		line, err := w.out.ReadString('\n')
		switch {
		case err != nil:
			w.t.Logf("the writer ended: %v", err)
			return false
		case strings.Contains(line, "wrote 4096/4096"):
			return true
		case strings.Contains(line, "failed"):
			w.t.Log(strings.TrimSpace(line))
			return false
		}
	}
}

// TestCeph fences with a real Ceph: who did not let go writes no more, not even after it
// was cut off for so long that Ceph had forgotten it.
func TestCeph(t *testing.T) {
	if testing.Short() {
		t.Skip("skipped: -short: it waits half a minute for Ceph to forget a client")
	}
	if _, err := exec.LookPath("qemu-io"); err != nil {
		t.Skipf("skipped: %v: install the Debian packages qemu-utils and qemu-block-extra", err)
	}
	c := ceph.Start(t)
	keyring := filepath.Join(t.TempDir(), "keyring")
	if err := os.WriteFile(keyring, []byte("[client.cinder]\n\tkey = "+c.Key()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	f := &Ceph{Conf: c.Conf(), Keyring: keyring, User: "cinder"}
	w := fake(t, func(o *Options) {
		o.Keys, o.Fence, o.Poll = map[string]string{"cinder": c.Key()}, f, 200*time.Millisecond
	})
	host, port, err := net.SplitHostPort(c.Monitor)
	w.must(err)
	w.fake.Extra = map[string]any{"hosts": []any{host}, "ports": []any{port}}
	attach := func(v backend.Volume, node string) record.RBD {
		t.Helper()
		got, err := w.Attach(t.Context(), backend.Attach{Volume: v.ID, Node: node})
		w.must(err)
		if string(got.Secrets[record.SecretKey]) != c.Key() {
			t.Fatal("the connection has another key")
		}
		return *got.Source.RBD
	}
	volume := func(name string) backend.Volume {
		t.Helper()
		v := w.create(backend.Create{Name: name})
		c.RBD("create", "--size", "16", "volumes/volume-"+v.ID)
		return v
	}

	present, cut, idle := volume("present"), volume("cut"), volume("idle")
	image, lost := attach(present, "node-1"), attach(cut, "node-1")
	attach(idle, "node-1")
	one, two := open(t, c, image), open(t, c, lost)
	if !one.write(1) || !two.write(1) {
		t.Fatal("nobody can write")
	}
	for _, v := range []backend.Volume{present, cut, idle} {
		p := Pair{v.ID, "node-1"}
		w.nodes.wanted[p], w.nodes.use[p] = true, InUse
	}
	w.must(w.Sweep(t.Context()))
	w.must(two.cmd.Process.Signal(syscall.SIGSTOP))
	stopped := time.Now()

	w.must(w.Detach(t.Context(), present.ID, "node-1"))
	if one.write(2) {
		t.Error("a node that was shut out writes")
	}
	attach(present, "node-2")
	if !open(t, c, image).write(3) {
		t.Error("the node after it cannot write")
	}

	// Nothing of this one was ever seen.
	if err := w.Detach(t.Context(), idle.ID, "node-1"); err == nil || !strings.Contains(err.Error(), "out-of-service") {
		t.Errorf("a node that may write lost its volume: %v", err)
	}

	for len(c.Watchers(lost.Image)) > 0 {
		if time.Since(stopped) > 3*time.Minute {
			t.Fatal("Ceph does not forget a client")
		}
		time.Sleep(time.Second)
	}
	t.Logf("Ceph forgot a client that was cut off after %v", time.Since(stopped).Round(time.Second))
	w.must(w.Detach(t.Context(), cut.ID, "node-1"))
	attach(cut, "node-2")
	if !open(t, c, lost).write(3) {
		t.Error("the node after it cannot write")
	}
	w.must(two.cmd.Process.Signal(syscall.SIGCONT))
	if two.write(2) {
		t.Error("a node that came back writes")
	}
	if out := c.RBD("export", "volumes/"+lost.Image, "-"); out[:2] != "\x03\x03" {
		t.Errorf("the image has %q", out[:2])
	}
	if past, err := f.Remembered(t.Context(), lost, "no-such-attachment"); err != nil || len(past) != 0 {
		t.Errorf("%v %v", past, err)
	}
	if err := f.Forget(t.Context(), lost, "no-such-attachment"); err != nil {
		t.Error(err)
	}
	if all, err := f.Clients(t.Context(), record.RBD{Pool: "volumes", Image: "nothing"}); err != nil || len(all) != 0 {
		t.Errorf("clients of no image: %v %v", all, err)
	}
}
