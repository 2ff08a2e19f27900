package pods

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/hypernetes/hypernetes/mountinfo"
	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// TestOneMachinePerPod looks at a Pod of three containers from outside: one shim, one
// VM, nothing of the host shared, no layer mounted. It is not parallel, so that the
// new processes are this Pod's.
func TestOneMachinePerPod(t *testing.T) {
	c := testcluster.Up(t)
	n := c.Namespace(t)
	before := c.Processes(t)
	n.Apply("testdata/trio.yaml")
	n.Ready("trio")
	var shims, vms, others []testcluster.Process
	n.Until("three containers have one shim, one VM and no other process", time.Minute, func() bool {
		shims, vms, others = newProcesses(before, c.Processes(t))
		t.Logf("new processes: %d shims, %d VMs, others: %v", len(shims), len(vms), others)
		return len(shims) == 1 && len(vms) == 1 && len(others) == 0
	})
	vm := vms[0]
	want(t, "the VM's parent", vm.Parent, shims[0].PID)
	want(t, "restarts", n.Pod("trio").Container("web").RestartCount, 0)

	t.Run("containers share the Pod's volumes and loopback", func(t *testing.T) { sharedInPod(t, n.For(t)) })
	t.Run("a layer of several containers is one disk", func(t *testing.T) {
		// The scratch disk, busybox's layer, and testbox's on top of it.
		disks := n.For(t).Shell("trio/web", "ls /sys/block | grep -c '^sd'")
		want(t, "disks of three containers of two images", disks, "3")
	})
	t.Run("no host directory is shared with the guest", func(t *testing.T) { nothingShared(t, n.For(t), vm) })
	t.Run("the host mounts no image layer", func(t *testing.T) { noLayerMounted(t, n) })
	t.Run("the VM's process is confined", func(t *testing.T) { confined(t, vm) })
	t.Run("the guest has a kernel of its own", func(t *testing.T) { ownKernel(t, n.For(t)) })
}

func newProcesses(before, after []testcluster.Process) (shims, vms, others []testcluster.Process) {
	known := map[int]bool{}
	for _, p := range before {
		known[p.PID] = true
	}
	for _, p := range after {
		switch {
		case known[p.PID]:
		case p.Is("containerd-shim-hyper-v2"):
			shims = append(shims, p)
		case p.Is("qemu-system-x86_64"):
			vms = append(vms, p)
		default:
			others = append(others, p)
		}
	}
	return shims, vms, others
}

func sharedInPod(t *testing.T, n *testcluster.Namespace) {
	for _, volume := range []string{"/shared", "/memory"} {
		n.Shell("trio/one", "echo from one > "+volume+"/file")
		want(t, "file in "+volume, n.Exec("trio/two", "cat", volume+"/file"), "from one")
	}
	want(t, "server of a neighbour container", n.Exec("trio/one", "wget", "-qO-", "http://127.0.0.1:8080/hostname"), "trio")
	want(t, "processes named testbox that another container sees", n.Shell("trio/one", "ps | grep -c '[t]estbox' || true"), "0")
}

// sharingDevice matches everything in QEMU that exports a directory or host memory.
var sharingDevice = regexp.MustCompile(`9p|virtfs|fsdev|virtiofs|vhost-user|ivshmem|usb-mtp|vvfat|smb=|tftp=`)

func nothingShared(t *testing.T, n *testcluster.Namespace, vm testcluster.Process) {
	if m := sharingDevice.FindString(vm.Command); m != "" {
		t.Errorf("the VM's command line has %q: %s", m, vm.Command)
	}
	for _, p := range n.Processes(t) {
		if strings.Contains(p.Command, "virtiofsd") {
			t.Errorf("a virtiofsd is running: %s", p.Command)
		}
	}
	for _, file := range testcluster.OpenFiles(t, vm.PID) {
		if st, err := os.Stat(file); err == nil && st.IsDir() && file != "/" {
			t.Errorf("the VM's process holds directory %s", file)
		}
	}
	for line := range strings.Lines(n.Exec("trio/web", "cat", "/proc/mounts")) {
		f := strings.Fields(line)
		if len(f) > 2 && regexp.MustCompile(`9p|virtiofs|fuse|nfs|cifs`).MatchString(f[2]) {
			t.Errorf("the guest has a shared mount: %s", line)
		}
	}
	drivers := n.Shell("trio/web", "for d in /sys/bus/virtio/devices/*; do basename $(readlink $d/driver); done | sort -u")
	for _, driver := range strings.Fields(drivers) {
		switch driver {
		case "virtio_scsi", "virtio_net", "virtio_rng", "virtio_console", "virtio_balloon", "virtio_mem", "virtio_blk":
		default:
			t.Errorf("the guest has an unexpected virtio device: %s", driver)
		}
	}
	t.Logf("virtio drivers in the guest: %s", strings.Join(strings.Fields(drivers), " "))
}

func noLayerMounted(t *testing.T, n *testcluster.Namespace) {
	namespaces := map[string][]mountinfo.Mount{"node": n.NodeMounts(t), "host": n.HostMounts(t)}
	for where, mounts := range namespaces {
		for _, m := range mounts {
			if m.Type == "erofs" || strings.Contains(m.Source+m.Options, "snapshotter") {
				t.Errorf("the %s mounts a layer: %+v", where, m)
			}
		}
	}
	layers, err := filepath.Glob(n.NodeRoot(t) + "/var/lib/containerd/io.containerd.snapshotter.v1.erofs/snapshots/*/layer.erofs")
	if err != nil || len(layers) == 0 {
		t.Errorf("there are no EROFS layers at all: %v", err)
	}
}

func confined(t *testing.T, vm testcluster.Process) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", vm.PID))
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{`CapEff:\s+0000000000000000`, `NoNewPrivs:\s+1`, `Seccomp:\s+2`, `Uid:\s+[1-9]\d+\s`} {
		if !regexp.MustCompile(line).Match(status) {
			t.Errorf("status of the VM's process lacks %q:\n%s", line, status)
		}
	}
	for _, ns := range []string{"mnt", "net"} {
		own, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", vm.PID, ns))
		if err != nil {
			t.Fatal(err)
		}
		host, _ := os.Readlink("/proc/self/ns/" + ns)
		if own == host {
			t.Errorf("the VM's process is in the machine's %s namespace", ns)
		}
	}
	root, err := os.ReadDir(fmt.Sprintf("/proc/%d/root", vm.PID))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range root {
		if e.Name() == "var" || e.Name() == "root" || e.Name() == "home" {
			t.Errorf("the VM's process sees the machine's /%s", e.Name())
		}
	}
}

func ownKernel(t *testing.T, n *testcluster.Namespace) {
	host, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		t.Fatal(err)
	}
	guest := n.Exec("trio/web", "uname", "-r")
	if guest == strings.TrimSpace(string(host)) {
		t.Errorf("guest and host have the same kernel %s", guest)
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		t.Fatal(err)
	}
	if n.Exec("trio/web", "cat", "/proc/sys/kernel/random/boot_id") == strings.TrimSpace(string(boot)) {
		t.Error("guest and host have the same boot id")
	}
	t.Logf("kernel of the guest %s, of the host %s", guest, strings.TrimSpace(string(host)))
}
