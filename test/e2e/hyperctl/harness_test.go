package hyperctl

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hypernetes/hypernetes/test/artifacts"
)

// patience bounds one command. VMs boot under TCG on a machine with other work.
const patience = 2 * time.Minute

// node is the runtime node under test.
type node struct {
	t         *testing.T
	out, name string
}

// newNode skips the test if it cannot run here. The node it names does not exist yet, and
// when the test ends it is reset and the machine is searched for what is left of it.
func newNode(t *testing.T) *node {
	t.Helper()
	n := &node{t: t, out: artifacts.Dir(), name: "e2e-hyper"}
	if v := os.Getenv("H8S_E2E_NODE"); v != "" {
		n.name = v + "-hyper"
	}
	reason := ""
	if os.Getuid() != 0 {
		reason = "this process is not root"
	}
	for _, f := range []string{"bin/h8s", "bin/hyperctl", "bin/containerd-shim-hyper-v2", "share/vmlinux", "images/debian.tar", "images/testbox.tar"} {
		if _, err := os.Stat(filepath.Join(n.out, f)); err != nil {
			reason = err.Error() + " (run `make build`)"
		}
	}
	if reason != "" && (os.Getenv("CI") != "" || os.Getenv("H8S_E2E") == "required") {
		t.Fatalf("end-to-end tests are required but %s", reason)
	}
	if reason != "" {
		t.Skip(reason)
	}
	n.reset()
	t.Cleanup(func() {
		if t.Failed() {
			n.dump()
		}
		n.reset()
		n.nothingLeft()
	})
	return n
}

func (n *node) reset() {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if text, err := n.command(ctx, "h8s", "reset", "--yes", "--name", n.name).CombinedOutput(); err != nil {
		n.t.Errorf("h8s reset: %v\n%s", err, text)
	}
}

func (n *node) command(ctx context.Context, program string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(n.out, "bin", program), args...)
	cmd.Env = append(os.Environ(), "H8S_OUT="+n.out, "HYPERCTL_NODE="+n.name)
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// call runs hyperctl and returns its exit code and output.
func (n *node) call(stdin io.Reader, args ...string) (code int, stdout, stderr string) {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := n.command(ctx, "hyperctl", args...)
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		n.t.Fatalf("hyperctl %s: %v", strings.Join(args, " "), err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

// want runs hyperctl, checks its exit code and that its output has a part, and returns
// standard output without the final newline.
func (n *node) want(t *testing.T, code int, part string, args ...string) string {
	t.Helper()
	got, out, errs := n.call(nil, args...)
	if got != code || !strings.Contains(out+errs, part) {
		t.Errorf("hyperctl %s: code %d, %q %q; want code %d and %q", strings.Join(args, " "), got, out, errs, code, part)
	}
	return strings.TrimSpace(out)
}

// until repeats a probe of what no command can wait for.
func until(t *testing.T, what string, probe func() bool) {
	t.Helper()
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for !probe() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// dump prints what explains a failure.
func (n *node) dump() {
	for _, log := range []string{"h8s.log", "containerd.log"} {
		b, err := os.ReadFile(filepath.Join("/var/lib/h8s", n.name, "log", log))
		n.t.Logf("%s (%v):\n%s", log, err, b[max(0, len(b)-6000):])
	}
}

// nothingLeft looks for everything a node has.
func (n *node) nothingLeft() {
	n.t.Helper()
	var left []string
	trees, _ := filepath.Glob("/sys/fs/cgroup/*/h8s/" + n.name)
	for _, path := range append(trees, "/sys/fs/cgroup/h8s/"+n.name, "/var/lib/h8s/"+n.name, "/run/h8s/"+n.name) {
		if _, err := os.Lstat(path); err == nil {
			left = append(left, path)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		n.t.Error(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, "/h8s/"+n.name+"/") {
			left = append(left, "mount "+strings.TrimSpace(line))
		}
	}
	files, _ := filepath.Glob("/proc/[0-9]*/cgroup")
	for _, file := range files {
		if b, err := os.ReadFile(file); err == nil && strings.Contains(string(b), "/h8s/"+n.name+"/") {
			cmdline, _ := os.ReadFile(filepath.Join(filepath.Dir(file), "cmdline"))
			if len(cmdline) == 0 {
				continue // ended, and not yet waited for by the machine's init
			}
			left = append(left, fmt.Sprintf("process %s: %s", filepath.Base(filepath.Dir(file)), bytes.ReplaceAll(cmdline, []byte{0}, []byte{' '})))
		}
	}
	if len(left) > 0 {
		n.t.Errorf("left behind by node %s:\n  %s", n.name, strings.Join(left, "\n  "))
	}
}
