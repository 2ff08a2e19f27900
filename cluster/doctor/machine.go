package doctor

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/cluster/cgroup"
	"github.com/hypernetes/hypernetes/cluster/component"
	"github.com/hypernetes/hypernetes/cluster/gateway"
	"github.com/hypernetes/hypernetes/cluster/layout"
	"github.com/hypernetes/hypernetes/cluster/settings"
)

// Input is what the checks depend on.
type Input struct {
	Artifacts layout.Artifacts
	Settings  settings.Node
	// Running says that the node runs, so that its ports are rightly taken.
	Running bool
	// Quick leaves out checks that take more than a moment and cannot fail a start.
	Quick bool
	// Dial reaches the node's network; nil if there is none to be reached.
	Dial Dial
}

const (
	needMemory = 2 << 30
	needDisk   = 4 << 30
	lowDisk    = 10 << 30
)

// Machine returns the checks of this machine.
func Machine(in Input) []Check {
	checks := []Check{
		{"root", root},
		{"memory", memory},
		{"disk", disk(in.Settings.Name)},
		{"cgroups", cgroups},
		{"inotify", inotify(in)},
		{"qemu", qemuVersion},
		{"mkfs.erofs", tool("mkfs.erofs", "erofs-utils", "turns image layers into files a virtual machine attaches")},
		{"nft", tool("nft", "nftables", "kube-proxy and hostPorts write their rules with it")},
		{"conntrack", optionalTool("conntrack", "kube-proxy cannot drop stale UDP flows of Services without it")},
		{"overlay", fileSystem("overlay")},
		{"erofs", optionalFileSystem("erofs", "only Pods of RuntimeClass runc need the machine to mount EROFS")},
		{"tun", device("/dev/net/tun", "H8S_TUN", "virtual machines reach the network through a tap device", "modprobe tun")},
		{"loop", optionalDevice("/dev/loop-control", "volumes with volumeMode: Block cannot be given to Pods", "modprobe loop")},
		{"components", components(in)},
		{"guest", guest(in.Artifacts)},
		{"ports", ports(in)},
	}
	if !in.Settings.RuntimeOnly {
		checks = append(checks, Check{"network", network})
	}
	if !in.Quick {
		checks = append(checks, Check{"kvm", kvm})
	}
	if in.Settings.OpenStack != nil {
		checks = append(checks, Check{"storage", storageDaemon})
		checks = append(checks, Check{"openstack", cloud(*in.Settings.OpenStack, in.Dial)})
	}
	if in.Settings.Egress {
		checks = append(checks, Check{"slirp4netns", tool("slirp4netns", "slirp4netns", "--egress needs it")})
	} else if !in.Settings.HostNetwork {
		checks = append(checks, Check{"egress", func(context.Context) Result {
			return pass("Pods are not connected to the outside; h8s up --egress does that. Image pulls work either way.")
		}})
	}
	return checks
}

func root(context.Context) Result {
	if runtime.GOOS != "linux" {
		return fail("H8S_LINUX", "Linux is needed", "run h8s on Linux")
	}
	if os.Geteuid() != 0 {
		return fail("H8S_NOT_ROOT", "not root", "run as root, for example with sudo")
	}
	return pass("root on Linux")
}

func memory(context.Context) Result {
	total, available, err := meminfo()
	if err != nil {
		return warn("H8S_MEMORY", err.Error(), "mount /proc")
	}
	reason := fmt.Sprintf("%.1f GiB available of %.1f", float64(available)/(1<<30), float64(total)/(1<<30))
	if available < needMemory {
		return fail("H8S_MEMORY", reason, "2 GiB are needed for the control plane and a few Pods; end other programs")
	}
	return pass(reason)
}

func meminfo() (total, available uint64, err error) {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, 0, err
	}
	sc := bufio.NewScanner(bytes.NewReader(b))
	for sc.Scan() {
		f := strings.Fields(sc.Text())
		if len(f) < 2 {
			continue
		}
		kib, err := strconv.ParseUint(f[1], 10, 64)
		if err != nil {
			continue
		}
		switch f[0] {
		case "MemTotal:":
			total = kib << 10
		case "MemAvailable:":
			available = kib << 10
		}
	}
	return total, available, sc.Err()
}

// disk checks where the node's state is, which may be a file system of its own.
func disk(node string) func(context.Context) Result {
	return func(context.Context) Result { return freeSpace(filepath.Join(layout.StateRoot, node)) }
}

func freeSpace(dir string) Result {
	for {
		if _, err := os.Stat(dir); err == nil {
			break
		}
		dir = filepath.Dir(dir)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return warn("H8S_DISK", err.Error(), "check "+dir)
	}
	free := st.Bavail * uint64(st.Bsize)
	reason := fmt.Sprintf("%.1f GiB free in %s", float64(free)/(1<<30), dir)
	switch {
	case free < needDisk:
		return fail("H8S_DISK_FULL", reason, "4 GiB are needed for images and Pods; free some")
	case free < lowDisk:
		return warn("H8S_DISK_LOW", reason, "10 GiB are comfortable")
	}
	return pass(reason)
}

// What a node's processes have together, counted; most of it is the control plane's.
const (
	needInotify        = 22
	needInotifyRuntime = 6
)

// inotify checks how many instances root may still have: without one, kubelet or containerd
// ends with "too many open files", which says nothing of the cause.
func inotify(in Input) func(context.Context) Result {
	need := needInotify
	if in.Settings.RuntimeOnly {
		need = needInotifyRuntime
	}
	return func(context.Context) Result {
		const name = "fs.inotify.max_user_instances"
		b, err := os.ReadFile("/proc/sys/fs/inotify/max_user_instances")
		if err != nil {
			return pass("no inotify limit to read")
		}
		limit, err := strconv.Atoi(strings.TrimSpace(string(b)))
		if err != nil {
			return warn("H8S_INOTIFY", fmt.Sprintf("%s: %q is not a number", name, b), "check /proc/sys/fs/inotify")
		}
		used := instances("/proc")
		reason := fmt.Sprintf("%d of %d instances in use", used, limit)
		remedy := fmt.Sprintf("sysctl -w %s=8192; a node takes about %d", name, need)
		switch free := limit - used; {
		case in.Running || free >= 2*need:
			return pass(reason)
		case free < need:
			return fail("H8S_INOTIFY", reason, remedy)
		default:
			return warn("H8S_INOTIFY", reason, remedy)
		}
	}
}

// instances counts root's inotify instances: descriptors of the same instance in several
// processes count more than once, which is rare.
func instances(proc string) int {
	n := 0
	processes, _ := filepath.Glob(filepath.Join(proc, "[0-9]*"))
	for _, p := range processes {
		var st unix.Stat_t
		if unix.Stat(p, &st) != nil || st.Uid != 0 {
			continue
		}
		descriptors, err := os.ReadDir(filepath.Join(p, "fd"))
		if err != nil {
			continue // it ended
		}
		for _, d := range descriptors {
			if to, err := os.Readlink(filepath.Join(p, "fd", d.Name())); err == nil && to == "anon_inode:inotify" {
				n++
			}
		}
	}
	return n
}

func cgroups(context.Context) Result {
	h, err := cgroup.Open()
	if err != nil {
		return fail("H8S_CGROUP", err.Error(), "mount cgroup2 on /sys/fs/cgroup")
	}
	if !h.Unified() {
		return warn("H8S_CGROUP_V1", "the machine uses cgroup version 1, which Kubernetes drops no earlier than 1.38 and containerd in 2029",
			"boot with systemd.unified_cgroup_hierarchy=1; Pods have version 2 inside either way")
	}
	return pass("version 2")
}

const qemuBinary = "qemu-system-x86_64"

func qemuVersion(ctx context.Context) Result {
	const remedy = "apt-get install qemu-system-x86"
	path, err := exec.LookPath(qemuBinary)
	if err != nil {
		return fail("H8S_QEMU", "no "+qemuBinary+" on PATH", remedy)
	}
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return fail("H8S_QEMU", fmt.Sprintf("%s --version: %v", path, err), remedy)
	}
	line, _, _ := strings.Cut(string(out), "\n")
	major, ok := qemuMajor(line)
	if !ok {
		return warn("H8S_QEMU", "cannot read the version from "+strconv.Quote(line), "version 7.2 or later is needed")
	}
	if major < 7 {
		return fail("H8S_QEMU", line, "version 7.2 or later is needed")
	}
	return pass(line)
}

// qemuMajor reads 7 from "QEMU emulator version 7.2.19 (Debian ...)".
func qemuMajor(line string) (int, bool) {
	_, rest, ok := strings.Cut(line, "version ")
	if !ok {
		return 0, false
	}
	number, _, _ := strings.Cut(rest, ".")
	major, err := strconv.Atoi(number)
	return major, err == nil
}

func tool(name, pkg, why string) func(context.Context) Result {
	return func(context.Context) Result {
		path, err := exec.LookPath(name)
		if err != nil {
			return fail("H8S_TOOL_MISSING", "no "+name+" on PATH: "+why, "apt-get install "+pkg)
		}
		return pass(path)
	}
}

func optionalTool(name, why string) func(context.Context) Result {
	return func(context.Context) Result {
		path, err := exec.LookPath(name)
		if err != nil {
			return warn("H8S_TOOL_MISSING", "no "+name+" on PATH: "+why, "apt-get install "+name)
		}
		return pass(path)
	}
}

func storageDaemon(context.Context) Result {
	path, err := exec.LookPath("qemu-storage-daemon")
	if err != nil {
		return warn("H8S_TOOL_MISSING", "no qemu-storage-daemon on PATH: volumes of Cinder's RBD and iSCSI back ends cannot be attached", "apt-get install qemu-system-common")
	}
	return pass(path)
}

func knows(name string) bool {
	b, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 0 && f[len(f)-1] == name {
			return true
		}
	}
	// Not loaded yet, but loadable: the mount will load it.
	return exec.Command("modprobe", "--dry-run", "--quiet", name).Run() == nil
}

func fileSystem(name string) func(context.Context) Result {
	return func(context.Context) Result {
		if !knows(name) {
			return fail("H8S_KERNEL", "the kernel has no "+name+" file system", "use a kernel with it, as Debian's is")
		}
		return pass("in the kernel")
	}
}

func optionalFileSystem(name, why string) func(context.Context) Result {
	return func(context.Context) Result {
		if !knows(name) {
			return warn("H8S_KERNEL", "the kernel has no "+name+" file system: "+why, "use a kernel with it")
		}
		return pass("in the kernel")
	}
}

func device(path, code, why, remedy string) func(context.Context) Result {
	return func(context.Context) Result {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if errors.Is(err, fs.ErrNotExist) {
			return fail(code, path+" is missing: "+why, remedy)
		}
		if err != nil {
			return fail(code, err.Error()+": "+why, remedy)
		}
		_ = f.Close()
		return pass(path)
	}
}

func optionalDevice(path, why, remedy string) func(context.Context) Result {
	return func(context.Context) Result {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return warn("H8S_KERNEL", err.Error()+": "+why, remedy)
		}
		_ = f.Close()
		return pass(path)
	}
}

func components(in Input) func(context.Context) Result {
	return func(context.Context) Result {
		a := in.Artifacts
		need := []string{a.Bin("kubernetes"), a.Bin("containerd"), a.Bin("containerd-shim-hyper-v2"), a.CNIDir() + "/ptp", a.CNIDir() + "/host-local", a.CNIDir() + "/portmap"}
		if !in.Settings.RuntimeOnly {
			need = append(need, a.Bin(component.Controller), a.Bin(component.Kubestack), a.Bin("h8s-csi"), a.CNIDir()+"/hypernetes")
			if !in.Settings.IsAgent() {
				for _, name := range component.Sidecars(in.Settings.OpenStack != nil) {
					need = append(need, a.Bin(name))
				}
			}
		}
		var missing []string
		for _, path := range need {
			if st, err := os.Stat(path); err != nil || st.Mode()&0o111 == 0 {
				missing = append(missing, path)
			}
		}
		if len(missing) > 0 {
			return fail("H8S_COMPONENTS", "missing: "+strings.Join(missing, " "), "make build, or set H8S_OUT to a built tree")
		}
		return pass("below " + a.Root)
	}
}

func guest(a layout.Artifacts) func(context.Context) Result {
	return func(context.Context) Result {
		var missing []string
		for _, name := range []string{"vmlinux", "initramfs.img", "scratch.ext4"} {
			if _, err := os.Stat(a.Share(name)); err != nil {
				missing = append(missing, a.Share(name))
			}
		}
		if len(missing) > 0 {
			return fail("H8S_GUEST", "missing: "+strings.Join(missing, " "), "make guest")
		}
		return pass("kernel, initramfs and scratch disk present")
	}
}

// needed lists the TCP ports of the machine a node takes.
func needed(s settings.Node) []int {
	var want []int
	if s.HostNetwork {
		want = append(want, settings.HostRegistryPort)
		if !s.RuntimeOnly { // kubelet, kube-proxy
			want = append(want, 10248, 10250, 10249, 10256, settings.KubestackHealthPort, settings.CSINodePort)
		}
		if !s.RuntimeOnly && !s.IsAgent() { // etcd, controller-manager, scheduler
			want = append(want, settings.APIPort, 2379, 2380, 10257, 10259, component.MetricsPort, settings.WebhookPort, settings.ControllerHealthPort, settings.CSIControllerPort)
		}
		return want
	}
	if !s.RuntimeOnly && !s.IsAgent() {
		want = append(want, s.APIPort)
	}
	for _, p := range s.Publish {
		want = append(want, p.Host)
	}
	return want
}

func ports(in Input) func(context.Context) Result {
	return func(context.Context) Result {
		if in.Running {
			return pass("in use by the node")
		}
		remedy := "choose another with --api-port or --publish, or end that program"
		if in.Settings.HostNetwork {
			remedy = "a node on the machine's own network cannot do with another; end that program"
		}
		want := needed(in.Settings)
		for _, port := range want {
			l, err := gateway.ListenLoopback(port)
			if err != nil {
				return fail("H8S_PORT_IN_USE", err.Error(), remedy)
			}
			_ = l.Close()
		}
		return pass(fmt.Sprintf("free: %v", want))
	}
}
