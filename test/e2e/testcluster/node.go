package testcluster

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Process is a process of the node: one in the node's cgroups.
type Process struct {
	PID, Parent int
	// Command is the command line, arguments separated by spaces.
	Command string
	// Cgroup is the path below the node's cgroup.
	Cgroup string
}

// Is reports whether the process runs the named program.
func (p Process) Is(program string) bool {
	argv0, _, _ := strings.Cut(p.Command, " ")
	return filepath.Base(argv0) == program
}

// Processes lists the node's processes, zombies left out.
func (c *Cluster) Processes(t testing.TB) []Process {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	var out []Process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if p, ok := c.process(pid); ok {
			out = append(out, p)
		}
	}
	return out
}

// process describes a process if it is one of the node's and still alive.
func (c *Cluster) process(pid int) (Process, bool) {
	dir := fmt.Sprintf("/proc/%d/", pid)
	groups, err := os.ReadFile(dir + "cgroup")
	if err != nil {
		return Process{}, false
	}
	group, ok := belowCgroup(string(groups), "/h8s/"+c.Node)
	if !ok {
		return Process{}, false
	}
	cmdline, err := os.ReadFile(dir + "cmdline")
	if err != nil || len(cmdline) == 0 {
		return Process{}, false
	}
	stat, err := os.ReadFile(dir + "stat")
	if err != nil {
		return Process{}, false
	}
	// The parent is the second field after the name, which ends at the last ')'.
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	parent, err := strconv.Atoi(string(fields[1]))
	if err != nil {
		return Process{}, false
	}
	return Process{
		PID: pid, Parent: parent, Cgroup: group,
		Command: strings.TrimSpace(string(bytes.ReplaceAll(cmdline, []byte{0}, []byte{' '}))),
	}, true
}

// belowCgroup returns the longest path below prefix among the lines of a cgroup file.
func belowCgroup(file, prefix string) (string, bool) {
	var found bool
	var longest string
	for line := range strings.Lines(file) {
		_, path, _ := strings.Cut(strings.TrimSpace(line), "/")
		rest, ok := strings.CutPrefix("/"+path, prefix)
		if !ok || (rest != "" && rest[0] != '/') {
			continue
		}
		found = true
		if len(rest) > len(longest) {
			longest = rest
		}
	}
	return longest, found
}

// AnchorPID is the process that holds the node's namespaces.
func (c *Cluster) AnchorPID(t testing.TB) int {
	t.Helper()
	pid, err := c.anchor()
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

func (c *Cluster) anchor() (int, error) {
	record := filepath.Join("/run/h8s", c.Node, "components", "anchor.json")
	b, err := os.ReadFile(record)
	if err != nil {
		return 0, err
	}
	var anchor struct{ PID int }
	if err := json.Unmarshal(b, &anchor); err != nil || anchor.PID <= 0 {
		return 0, fmt.Errorf("%s: %q: %w", record, b, err)
	}
	return anchor.PID, nil
}

// DialInNode connects from inside the node's network; it is a net.Dialer's
// DialContext.
func (c *Cluster) DialInNode(ctx context.Context, network, address string) (net.Conn, error) {
	pid, err := c.anchor()
	if err != nil {
		return nil, err
	}
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	type result struct {
		conn net.Conn
		err  error
	}
	done := make(chan result, 1)
	dial := func() result {
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return result{err: err}
		}
		conn, err := (&net.Dialer{}).DialContext(ctx, network, address)
		return result{conn, err}
	}
	go onThrowawayThread(func() { done <- dial() })
	r := <-done
	return r.conn, r.err
}

// onThrowawayThread runs f, which changes its thread, on one that ends with the calling
// goroutine. The first thread cannot end, and /proc/self shows its namespaces.
func onThrowawayThread(f func()) {
	runtime.LockOSThread()
	if unix.Gettid() != unix.Getpid() {
		f()
		return
	}
	// While this goroutine keeps the first thread, another cannot get it.
	spare := make(chan struct{})
	go func() {
		defer close(spare)
		onThrowawayThread(f)
	}()
	<-spare
	runtime.UnlockOSThread()
}

// NodeRoot is the root directory of the node as seen from here.
func (c *Cluster) NodeRoot(t testing.TB) string {
	t.Helper()
	return fmt.Sprintf("/proc/%d/root", c.AnchorPID(t))
}

// OpenFiles lists what a process's descriptors refer to.
func OpenFiles(t testing.TB, pid int) []string {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		if target, err := os.Readlink(filepath.Join(dir, e.Name())); err == nil {
			out = append(out, target)
		}
	}
	return out
}
