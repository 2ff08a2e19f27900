// Package boot turns the initramfs the kernel starts into a system containers can run
// in: root, mounts, console, limits, cgroups and kernel modules.
//
// It owns what happens before the first message of the shim and the very last step,
// power-off. It must not know containers or the protocol.
package boot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

type mount struct {
	source, target, kind, data string
	flags                      uintptr
}

const safe = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

// Fixed mounts of the guest. /run and /tmp are bounded by the kernel's default of
// half the memory.
var mounts = []mount{
	{"proc", "/proc", "proc", "", safe},
	{"sysfs", "/sys", "sysfs", "", safe},
	{"devtmpfs", "/dev", "devtmpfs", "mode=0755", unix.MS_NOSUID},
	{"devpts", "/dev/pts", "devpts", "gid=5,mode=0620,ptmxmode=0666", unix.MS_NOSUID | unix.MS_NOEXEC},
	{"tmpfs", "/run", "tmpfs", "mode=0755", unix.MS_NOSUID | unix.MS_NODEV},
	{"tmpfs", "/tmp", "tmpfs", "mode=1777", unix.MS_NOSUID | unix.MS_NODEV},
	{"cgroup2", "/sys/fs/cgroup", "cgroup2", "", safe},
}

// Root puts a bind mount of the initramfs over itself. The kernel's own root cannot
// be pivoted away from (it has no parent mount), a mount on top of it can: so crun's
// pivot_root works as on any host and containers need no weaker chroot. It costs no
// memory, unlike copying to a tmpfs.
func Root() error {
	const staging = "/.root"
	if err := os.MkdirAll(staging, 0o700); err != nil {
		return fmt.Errorf("switch root: %w", err)
	}
	if err := unix.Mount("/", staging, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("switch root: bind: %w", err)
	}
	if err := unix.Chdir(staging); err != nil {
		return fmt.Errorf("switch root: chdir: %w", err)
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("switch root: move: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("switch root: chroot: %w", err)
	}
	return unix.Chdir("/")
}

// Mounts makes the fixed mounts and the guest's directories.
func Mounts() error {
	for _, m := range mounts {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return fmt.Errorf("make mount point %s: %w", m.target, err)
		}
		if err := unix.Mount(m.source, m.target, m.kind, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.kind, m.target, err)
		}
	}
	links := map[string]string{
		"/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0", "/dev/stdout": "/proc/self/fd/1",
		"/dev/stderr": "/proc/self/fd/2",
	}
	for name, target := range links {
		if err := os.Symlink(target, name); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("link %s: %w", name, err)
		}
	}
	return nil
}

// Console makes /dev/console standard input, output and error; the kernel could not
// if the initramfs carries no device node.
func Console() {
	fd, err := unix.Open("/dev/console", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return // no console on this machine: what the kernel gave has to do
	}
	for std := range 3 {
		_ = unix.Dup3(fd, std, 0)
	}
	_ = unix.Close(fd)
}

// Cmdline returns the value of key=value on the kernel command line.
func Cmdline(cmdline, key string) (string, bool) {
	for _, f := range strings.Fields(cmdline) {
		if k, v, ok := strings.Cut(f, "="); ok && k == key {
			return v, true
		}
	}
	return "", false
}

// Limits sets PID 1's resource limits, which every process inherits unless its spec
// says otherwise, and the kernel settings a Pod VM wants. Absent settings are skipped:
// a small kernel has fewer.
func Limits() error {
	limits := map[int]unix.Rlimit{
		unix.RLIMIT_NOFILE: {Cur: 1 << 20, Max: 1 << 20},
		unix.RLIMIT_NPROC:  {Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY},
		unix.RLIMIT_CORE:   {Cur: 0, Max: unix.RLIM_INFINITY},
	}
	for which, l := range limits {
		if err := unix.Setrlimit(which, &l); err != nil {
			return fmt.Errorf("set resource limit %d: %w", which, err)
		}
	}
	settings := map[string]string{
		// A dead VM is the shim's to notice at once, not the guest's to linger in.
		"kernel/panic": "-1", "kernel/panic_on_oops": "1",
		"kernel/pid_max": "4194304", "fs/file-max": "1048576",
		"fs/inotify/max_user_instances": "8192", "fs/inotify/max_user_watches": "524288",
		"vm/max_map_count": "262144", "vm/overcommit_memory": "1",
		// The kubelet's own expectations of a node (protectKernelDefaults).
		"kernel/keys/root_maxkeys": "1000000", "kernel/keys/root_maxbytes": "25000000",
		"net/core/somaxconn": "4096", "kernel/core_pattern": "core",
	}
	for name, value := range settings {
		err := os.WriteFile("/proc/sys/"+name, []byte(value), 0)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	return nil
}

// Cgroups enables every controller the kernel has for the cgroups below root and
// below root/pod, where the containers are, and moves the agent into a leaf.
func Cgroups(root string) error {
	for _, d := range []string{"pod", "hyperstart"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			return fmt.Errorf("make cgroup %s: %w", d, err)
		}
	}
	if err := os.WriteFile(filepath.Join(root, "hyperstart/cgroup.procs"), []byte("1"), 0); err != nil {
		return fmt.Errorf("enter agent's cgroup: %w", err)
	}
	for _, d := range []string{root, filepath.Join(root, "pod")} {
		have, err := os.ReadFile(filepath.Join(d, "cgroup.controllers"))
		if err != nil {
			return fmt.Errorf("read cgroup controllers: %w", err)
		}
		for _, c := range strings.Fields(string(have)) {
			// One by one: a controller that refuses must not take the others with it.
			if err := os.WriteFile(filepath.Join(d, "cgroup.subtree_control"), []byte("+"+c), 0); err != nil &&
				(c == "memory" || c == "cpu" || c == "pids") {
				return fmt.Errorf("enable cgroup controller %s: %w", c, err)
			}
		}
	}
	return nil
}

// PowerOff ends the VM. Where the machine has no ACPI a restart does: the VMM runs
// with -no-reboot.
func PowerOff() error {
	unix.Sync()
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
		return unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	}
	return nil
}

// Uptime is the time since the kernel booted, in milliseconds.
func Uptime() uint32 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return 0
	}
	return uint32(ts.Nano() / 1e6)
}
