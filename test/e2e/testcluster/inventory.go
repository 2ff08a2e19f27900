package testcluster

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hypernetes/hypernetes/mountinfo"
)

// Inventory is everything on the machine and in the node that a Pod could leave
// behind, by kind. Entries have no pids or indexes, so that two inventories compare;
// equal ones are counted.
type Inventory map[string]map[string]int

// nodeTrees are the node's directories in which a Pod leaves files while it lives;
// each is listed down to depth levels.
var nodeTrees = []struct {
	path  string
	depth int
}{
	{"/run", 9},
	{"/dev/shm", 2},
	{"/var/lib/cni", 4},
	{"/var/lib/kubelet/pods", 1},
	{"/var/lib/kubelet/pod-resources", 1},
	{"/var/lib/kubelet/plugins", 5},
	{"/var/lib/h8s-volumes", 3},
	{"/var/log/pods", 1},
	{"/var/log/containers", 1},
	{"/var/lib/containerd/io.containerd.grpc.v1.cri", 3},
	{"/var/lib/containerd/io.containerd.sandbox.controller.v1.shim", 2},
	{"/var/lib/containerd/io.containerd.runtime.v2.task", 2},
	{"/var/lib/containerd/io.containerd.snapshotter.v1.erofs", 3},
	{"/var/lib/containerd/io.containerd.mount-manager.v1.bolt", 3},
	{"/var/lib/containerd/tmpmounts", 2},
}

// hostTrees are where runtimes of the machine itself keep state; the node must
// not put anything there.
var hostTrees = []string{"/run", "/var/lib/kubelet", "/var/lib/cni", "/var/lib/containerd", "/var/log/pods", "/etc/cni", "/opt/cni"}

// Inventory takes stock of the machine and the node.
func (c *Cluster) Inventory(t testing.TB) Inventory {
	t.Helper()
	inv := Inventory{}
	for _, p := range c.Processes(t) {
		inv.add("process", p.Command)
	}
	node := c.AnchorPID(t)
	inv.mounts(t, "mount of the machine", "self")
	inv.mounts(t, "mount of the node", fmt.Sprint(node))
	inv.links(t, "link of the machine", fmt.Sprint(os.Getpid()))
	inv.links(t, "link of the node", fmt.Sprint(node))
	inv.namespaces(c.Processes(t))
	inv.loops()
	inv.cgroups(c.Node)
	root := c.NodeRoot(t)
	for _, tree := range nodeTrees {
		inv.files("file of the node", root, tree.path, tree.depth)
	}
	for _, tree := range hostTrees {
		inv.files("file of the machine", "", tree, 3)
	}
	inv.temporary()
	return inv
}

func (inv Inventory) add(kind, entry string) {
	if inv[kind] == nil {
		inv[kind] = map[string]int{}
	}
	inv[kind][entry]++
}

// Counts says in one line how much of each kind there is.
func (inv Inventory) Counts() string {
	var out []string
	for kind, entries := range inv {
		total := 0
		for _, n := range entries {
			total += n
		}
		out = append(out, fmt.Sprintf("%s: %d", kind, total))
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}

// Added lists what is in inv but not in before.
func (inv Inventory) Added(before Inventory) []string {
	var out []string
	for kind, entries := range inv {
		for entry, n := range entries {
			if extra := n - before[kind][entry]; extra > 0 {
				out = append(out, fmt.Sprintf("%s (%d more): %s", kind, extra, entry))
			}
		}
	}
	slices.Sort(out)
	return out
}

// NothingLeft waits until the machine has nothing that it had not before, and fails
// the test with a list if it still has after the given time.
func (c *Cluster) NothingLeft(t testing.TB, before Inventory, within time.Duration) {
	t.Helper()
	deadline := time.NewTimer(within)
	defer deadline.Stop()
	tick := time.NewTicker(2 * time.Second)
	defer tick.Stop()
	for {
		after := c.Inventory(t)
		left := after.Added(before)
		if len(left) == 0 {
			t.Logf("nothing left behind; before: %s; after: %s", before.Counts(), after.Counts())
			return
		}
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("left behind after %s:\n  %s", within, strings.Join(left, "\n  "))
		}
	}
}

func (inv Inventory) mounts(t testing.TB, kind, pid string) {
	t.Helper()
	for _, m := range mountsOf(t, pid) {
		if Foreign(m.Target) {
			continue
		}
		inv.add(kind, m.Type+" on "+m.Target)
	}
}

// Foreign tells a mount of tests that may run beside a cluster: namespaces pinned by the
// rig of package network/edge/edgetest.
func Foreign(target string) bool {
	return strings.HasPrefix(target, filepath.Join(os.TempDir(), "edgetest-"))
}

func mountsOf(t testing.TB, pid string) []mountinfo.Mount {
	t.Helper()
	mounts, err := mountinfo.Read(pid)
	if err != nil {
		t.Fatal(err)
	}
	return mounts
}

// NodeMounts lists the mounts of the node's mount namespace.
func (c *Cluster) NodeMounts(t testing.TB) []mountinfo.Mount {
	t.Helper()
	return mountsOf(t, fmt.Sprint(c.AnchorPID(t)))
}

// HostMounts lists the mounts of the machine.
func (c *Cluster) HostMounts(t testing.TB) []mountinfo.Mount {
	t.Helper()
	return mountsOf(t, "self")
}

// links lists network links; indexes are left out.
func (inv Inventory) links(t testing.TB, kind, pid string) {
	t.Helper()
	out, err := exec.Command("nsenter", "--net=/proc/"+pid+"/ns/net", "ip", "-o", "link").Output()
	if err != nil {
		t.Fatalf("ip link in the network namespace of %s: %v", pid, err)
	}
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		if len(f) > 1 {
			name, _, _ := strings.Cut(strings.TrimSuffix(f[1], ":"), "@")
			inv.add(kind, name)
		}
	}
}

// namespaces counts the distinct network namespaces that processes of the node are
// in; those pinned by files are among the node's mounts.
func (inv Inventory) namespaces(processes []Process) {
	seen := map[string]bool{}
	for _, p := range processes {
		if ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", p.PID)); err == nil && !seen[ns] {
			seen[ns] = true
			inv.add("network namespace in use", "by the node")
		}
	}
}

func (inv Inventory) loops() {
	devices, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, d := range devices {
		if b, err := os.ReadFile(d); err == nil {
			inv.add("loop device", strings.TrimSpace(string(b)))
		}
	}
}

// qosGroup matches the kubelet's groups of Pods of one class. In hierarchies it does not
// use itself they come with the first Pod and stay.
var qosGroup = regexp.MustCompile(`/kubepods(/besteffort|/burstable)?$`)

func (inv Inventory) cgroups(node string) {
	trees, _ := filepath.Glob("/sys/fs/cgroup/*/h8s/" + node)
	for _, tree := range append(trees, "/sys/fs/cgroup/h8s/"+node) {
		_ = filepath.WalkDir(tree, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() && !qosGroup.MatchString(path) {
				inv.add("cgroup", path)
			}
			return nil
		})
	}
}

// temporary lists what our programs might forget in /tmp, which the node shares with
// every other program of the machine.
func (inv Inventory) temporary() {
	for _, pattern := range []string{"*h8s*", "*hyper*", "*qemu*", "*containerd*", "*crun*", "*cni*"} {
		paths, _ := filepath.Glob("/tmp/" + pattern)
		for _, path := range paths {
			inv.add("temporary file", path)
		}
	}
}

// files lists a tree, links not followed.
func (inv Inventory) files(kind, root, tree string, depth int) {
	top := filepath.Join(root, tree)
	_ = filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == top {
			return nil
		}
		if root == "" && path == "/run/h8s" {
			return fs.SkipDir // this node's are its files; others may come and go
		}
		rel, _ := filepath.Rel(top, path)
		inv.add(kind, filepath.Join(tree, rel))
		if d.IsDir() && strings.Count(rel, "/")+1 >= depth {
			return fs.SkipDir
		}
		return nil
	})
}
