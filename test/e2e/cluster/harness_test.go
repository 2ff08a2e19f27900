package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/test/artifacts"
	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// node is a node of this test's own.
type node struct {
	t    *testing.T
	out  string
	name string
	port string
	// hostPort and nodePort are where the Pod's hostPort and NodePort are published.
	hostPort, nodePort string
	// class is the RuntimeClass of the test's Pod.
	class string
}

// newNode skips the test if the built programs are missing, and makes sure that
// nothing of the node is left when the test ends.
func newNode(t *testing.T, name, port string) *node {
	t.Helper()
	out := artifacts.Dir()
	if os.Getuid() != 0 {
		t.Skip("a node needs root")
	}
	for _, need := range []string{"bin/h8s", "bin/kubernetes", "bin/containerd", "bin/containerd-shim-runc-v2", "cni/ptp", "images/pause.tar", "images/busybox.tar"} {
		if _, err := os.Stat(filepath.Join(out, need)); err != nil {
			t.Skipf("%s is missing (run `make build`)", filepath.Join(out, need))
		}
	}
	n := &node{t: t, out: out, name: name, port: port, hostPort: freePort(t), nodePort: freePort(t), class: "runc"}
	t.Cleanup(func() {
		if t.Failed() {
			for _, c := range []string{"h8s", "containerd", "kubelet"} {
				text, _ := n.try("logs", c, "--tail", "15")
				t.Logf("log of %s:\n%s", c, text)
			}
		}
		if text, err := n.try("reset", "--yes"); err != nil {
			t.Errorf("reset: %v\n%s", err, text)
		}
	})
	return n
}

// freePort is a port nobody listened on a moment ago.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return fmt.Sprint(l.Addr().(*net.TCPAddr).Port)
}

func (n *node) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(n.out, "bin", "h8s"), args...)
	cmd.Env = append(os.Environ(), "H8S_OUT="+n.out, "KUBECONFIG="+filepath.Join(os.TempDir(), "h8s-e2e-"+n.name))
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

func (n *node) try(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 6*time.Minute)
	defer cancel()
	b, err := n.command(ctx, append(args, "--name", n.name)...).CombinedOutput()
	return string(b), err
}

func (n *node) h8s(args ...string) string {
	n.t.Helper()
	text, err := n.try(args...)
	if err != nil {
		n.t.Fatalf("h8s %s: %v\n%s", strings.Join(args, " "), err, text)
	}
	return text
}

// up starts the node; the virtual machine runtime is not needed here.
func (n *node) up(args ...string) string {
	n.t.Helper()
	return n.h8s(append([]string{"up", "--api-port", n.port, "--ignore-preflight"}, args...)...)
}

func (n *node) kubectl(stdin string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := n.command(ctx, append([]string{"kubectl", "--name", n.name}, args...)...)
	cmd.Stdin = strings.NewReader(stdin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, stderr.String())
	}
	return stdout.String(), nil
}

func (n *node) must(stdin string, args ...string) string {
	n.t.Helper()
	out, err := n.kubectl(stdin, args...)
	if err != nil {
		n.t.Fatal(err)
	}
	return out
}

// nodeStatus is the part of `h8s status -o json` tests look at.
type nodeStatus struct {
	Phase      string
	PID        int
	Components []struct {
		Name, State string
		PID         int
		Restarts    int
		Adopted     bool
	}
}

func (n *node) status() nodeStatus {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	// A node that is not running is told by the exit code too, which is not asked here.
	b, _ := n.command(ctx, "status", "--name", n.name, "-o", "json").Output()
	var st nodeStatus
	if err := json.Unmarshal(b, &st); err != nil {
		n.t.Fatalf("status: %v: %q", err, b)
	}
	return st
}

func (n *node) pids() map[string]int {
	n.t.Helper()
	pids := map[string]int{}
	for _, c := range n.status().Components {
		pids[c.Name] = c.PID
	}
	return pids
}

// eventually polls until f returns nil.
func eventually(t *testing.T, within time.Duration, f func() error) {
	t.Helper()
	deadline, tick := time.NewTimer(within), time.NewTicker(200*time.Millisecond)
	defer deadline.Stop()
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("after %s: %v", within, err)
		}
	}
}

// inventory is what a node could leave on the machine.
func (n *node) inventory() []string {
	n.t.Helper()
	var inv []string
	add := func(kind, what string) { inv = append(inv, kind+" "+what) }
	links, err := net.Interfaces()
	if err != nil {
		n.t.Fatal(err)
	}
	for _, l := range links {
		add("link", l.Name)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		n.t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if target := strings.Fields(line)[4]; !testcluster.Foreign(target) {
			add("mount", target)
		}
	}
	n.processes(add)
	n.paths(add)
	slices.Sort(inv)
	return inv
}

// processes adds those that belong to the node by cgroup, command line or open
// directory.
func (n *node) processes(add func(kind, what string)) {
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		n.t.Fatal(err)
	}
	for _, p := range procs {
		cgroup, err := os.ReadFile(p + "/cgroup")
		if err != nil {
			continue
		}
		cmdline, err := os.ReadFile(p + "/cmdline")
		if err != nil || len(cmdline) == 0 {
			continue // a zombie: dead, and its parent's to collect
		}
		text := strings.ReplaceAll(string(cmdline), "\x00", " ")
		if strings.Contains(string(cgroup), "/h8s/"+n.name) || strings.Contains(text, "/h8s/"+n.name+"/") || strings.Contains(text, "--name "+n.name+" ") {
			add("process", filepath.Base(p)+" "+text)
		}
	}
}

func (n *node) paths(add func(kind, what string)) {
	for _, dir := range []string{"/var/lib/h8s/" + n.name, "/run/h8s/" + n.name} {
		if _, err := os.Lstat(dir); err == nil {
			add("directory", dir)
		}
	}
	groups, _ := filepath.Glob("/sys/fs/cgroup/*/h8s/" + n.name)
	v2, _ := filepath.Glob("/sys/fs/cgroup/h8s/" + n.name)
	for _, g := range append(groups, v2...) {
		add("cgroup", g)
	}
	loops, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, l := range loops {
		add("loop", l)
	}
	for _, root := range []string{"/var/lib/kubelet", "/var/lib/cni/networks/h8s", "/etc/cni", "/etc/h8s", "/opt/cni", "/var/log/pods", "/var/log/containers", "/run/h8s-shim"} {
		_ = filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
			if err == nil {
				add("file", path)
			}
			return nil
		})
	}
}

// added lists what is in after but not in before.
func added(before, after []string) []string {
	var out []string
	for _, e := range after {
		if !slices.Contains(before, e) {
			out = append(out, e)
		}
	}
	return out
}

func alive(pid int) bool { return !errors.Is(unix.Kill(pid, 0), unix.ESRCH) }
