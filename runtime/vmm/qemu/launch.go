package qemu

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// launchName is argv[0] of the process that becomes QEMU.
const launchName = "h8s-vmm-launch"

// launchFD is where it reads its order; descriptors for QEMU follow.
const launchFD = 3

// Paths inside QEMU's private root.
const (
	firmwareDir = "/firmware"
	kernelPath  = "/kernel"
	initrdPath  = "/initrd"
	// nullDevice: QEMU tries image locks on it first and silently goes without if it is
	// not there.
	nullDevice = "/dev/null"
)

// order tells the launcher what to become. It comes from the parent, a trusted process.
type order struct {
	Parent   int
	Binary   string
	Args     []string
	UID, GID int
	Cgroups  []string
	Binds    []bind
	// KVM gives QEMU a /dev/kvm of its own: the host's may be for a group only.
	KVM bool
}

// bind makes a host file visible, read-only, in QEMU's root.
type bind struct{ From, To string }

// MaybeLaunch makes the process a confined QEMU if it was started for that, and then
// never returns. Every program using this package calls it first.
func MaybeLaunch() {
	if len(os.Args) == 0 || os.Args[0] != launchName {
		return
	}
	// Everything below is for one thread, which becomes QEMU's main thread.
	runtime.LockOSThread()
	err := launch()
	fmt.Fprintf(os.Stderr, "%s: %v\n", launchName, err)
	os.Exit(125)
}

func launch() error {
	f := os.NewFile(launchFD, "order")
	b, err := io.ReadAll(io.LimitReader(f, 1<<20))
	if err != nil {
		return fmt.Errorf("read order: %w", err)
	}
	_ = f.Close()
	var o order
	if err := json.Unmarshal(b, &o); err != nil {
		return fmt.Errorf("order: %w", err)
	}
	if err := enterCgroups(o.Cgroups); err != nil {
		return err
	}
	if err := privateRoot(o); err != nil {
		return err
	}
	if err := dropPrivileges(o.UID, o.GID); err != nil {
		return err
	}
	// Changing the user has cleared it; a parent that died meanwhile sends nothing.
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return fmt.Errorf("parent death signal: %w", err)
	}
	if os.Getppid() != o.Parent {
		return fmt.Errorf("process %d, which wanted the vm, is gone", o.Parent)
	}
	err = syscall.Exec(o.Binary, append([]string{o.Binary}, o.Args...), []string{"LANG=C", "MALLOC_ARENA_MAX=1"})
	return fmt.Errorf("execute %s: %w", o.Binary, err)
}

func enterCgroups(paths []string) error {
	for _, p := range paths {
		// "0" is the writer, all its threads.
		if err := os.WriteFile(filepath.Join(p, "cgroup.procs"), []byte("0"), 0); err != nil {
			return fmt.Errorf("enter cgroup: %w", err)
		}
	}
	return nil
}

// privateRoot replaces the process's root by an empty, read-only tmpfs with binds.
// The mount namespace is its own already (clone).
func privateRoot(o order) error {
	binds := o.Binds
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	// Opened before the new root is mounted over whatever they may be below.
	sources := make([]int, len(binds))
	for i, b := range binds {
		fd, err := unix.Open(b.From, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open %s: %w", b.From, err)
		}
		sources[i] = fd
	}
	const root = "/proc" // exists everywhere, and nothing needs it any more
	if err := unix.Mount("h8s-vmm", root, "tmpfs", unix.MS_NOSUID, "size=1m,nr_inodes=1k,mode=0755"); err != nil {
		return fmt.Errorf("mount private root: %w", err)
	}
	if err := unix.Chdir(root); err != nil {
		return fmt.Errorf("enter private root: %w", err)
	}
	for i, b := range binds {
		if err := bindFile(sources[i], b); err != nil {
			return fmt.Errorf("bind %s: %w", b.From, err)
		}
		_ = unix.Close(sources[i])
	}
	if o.KVM {
		if err := makeKVM(o.UID, o.GID); err != nil {
			return fmt.Errorf("make /dev/kvm: %w", err)
		}
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave old root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return fmt.Errorf("enter private root: %w", err)
	}
	ro := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID}
	if err := unix.MountSetattr(unix.AT_FDCWD, "/", unix.AT_RECURSIVE, &ro); err != nil {
		return fmt.Errorf("make root read-only: %w", err)
	}
	return nil
}

func makeKVM(uid, gid int) error {
	const major, minor = 10, 232 // Documentation/admin-guide/devices.txt
	if err := os.MkdirAll("dev", 0o755); err != nil {
		return err
	}
	if err := unix.Mknod("dev/kvm", unix.S_IFCHR|0o600, int(unix.Mkdev(major, minor))); err != nil {
		return err
	}
	return os.Chown("dev/kvm", uid, gid)
}

func bindFile(source int, b bind) error {
	to := "." + b.To
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o444)
	if err != nil {
		return err
	}
	_ = f.Close()
	tree, err := unix.OpenTree(source, "", unix.AT_EMPTY_PATH|unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fmt.Errorf("open_tree: %w", err)
	}
	defer unix.Close(tree)
	return unix.MoveMount(tree, "", unix.AT_FDCWD, to, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

func dropPrivileges(uid, gid int) error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no_new_privs: %w", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("core limit: %w", err)
	}
	if uid != 0 || gid != 0 {
		if err := syscall.Setgroups(nil); err != nil {
			return fmt.Errorf("drop groups: %w", err)
		}
	}
	if gid != 0 {
		if err := syscall.Setresgid(gid, gid, gid); err != nil {
			return fmt.Errorf("become group %d: %w", gid, err)
		}
	}
	if uid != 0 {
		if err := syscall.Setresuid(uid, uid, uid); err != nil {
			return fmt.Errorf("become user %d: %w", uid, err)
		}
	}
	return nil
}
