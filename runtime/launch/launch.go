// Package launch starts a program of the host confined: as a user of its own, in
// namespaces and a read-only root of its own that has only the files it needs, in the
// Pod's control groups, without a way to more privileges, and ending with its parent.
//
// It owns the order of these steps. It must not know what the program is for. A program
// that uses this package calls Maybe first in main (and in TestMain): it starts its own
// executable, which confines itself and then becomes the other program.
package launch

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// name is argv[0] of the process that becomes the program.
const name = "h8s-vmm-launch"

const (
	// orderFD is where it reads its order.
	orderFD = 3
	// FirstFD is the number of the first descriptor the program inherits.
	FirstFD = orderFD + 1
)

// Order tells what to become.
type Order struct {
	Binary string
	Args   []string
	// Env is beside what every program gets.
	Env      []string
	UID, GID int
	// Cgroups are directories of control groups to enter.
	Cgroups []string
	Binds   []Bind
	// Files are made in the root.
	Files map[string][]byte
	// KVM gives the program a /dev/kvm of its own: the host's may be for a group only.
	KVM bool
	// Network leaves the program in the parent's network namespace.
	Network bool
	// Filter refuses system calls the program has no use for, forking first. It is for
	// programs without a filter of their own.
	Filter bool
}

// wire is an Order on its way to the child.
type wire struct {
	Order
	Parent int
}

// Bind makes a host file visible in the program's root.
type Bind struct {
	From, To string
	// Writable lets the program write it; else it is read-only.
	Writable bool
}

// Process is a program that was started.
type Process struct {
	// Process is its process, Stderr what it prints.
	*os.Process
	Stderr *os.File
	// Exited delivers the result of waiting, once.
	Exited <-chan error
}

// Start starts the program; files are what it inherits, from FirstFD on, and stay the
// caller's. It waits for the program's end from a thread that lives as long: the kernel
// sends the parent death signal when the thread that forked ends, and Go ends threads at
// will.
func Start(o Order, files []*os.File) (*Process, error) {
	orders, err := memfile("order")
	if err != nil {
		return nil, err
	}
	defer orders.Close()
	if err := json.NewEncoder(orders).Encode(wire{Order: o, Parent: os.Getpid()}); err != nil {
		return nil, fmt.Errorf("order: %w", err)
	}
	if _, err := orders.Seek(0, 0); err != nil {
		return nil, fmt.Errorf("order: %w", err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer w.Close()
	namespaces := unix.CLONE_NEWNS | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS
	if !o.Network {
		namespaces |= unix.CLONE_NEWNET
	}
	cmd := &exec.Cmd{
		Path: "/proc/self/exe", Args: []string{name}, Env: []string{"GOMAXPROCS=1", "GOGC=off"}, Dir: "/",
		Stdout: w, Stderr: w, ExtraFiles: append([]*os.File{orders}, files...),
		SysProcAttr: &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setsid: true, Cloneflags: uintptr(namespaces)},
	}
	exited, started := make(chan error, 1), make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			exited <- cmd.Wait()
		}
	}()
	if err = <-started; err != nil {
		_ = r.Close()
		if errors.Is(err, syscall.EPERM) {
			return nil, fmt.Errorf("start in its own namespaces: %w: this needs root", err)
		}
		return nil, fmt.Errorf("start: %w", err)
	}
	return &Process{Process: cmd.Process, Stderr: r, Exited: exited}, nil
}

func memfile(name string) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd: %w", err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// Maybe makes the process a confined program if it was started for that, and then never
// returns.
func Maybe() {
	if len(os.Args) == 0 || os.Args[0] != name {
		return
	}
	// Everything below is for one thread, which becomes the program's main thread.
	runtime.LockOSThread()
	err := launch()
	fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
	os.Exit(125)
}

func launch() error {
	f := os.NewFile(orderFD, "order")
	b, err := io.ReadAll(io.LimitReader(f, 1<<20))
	if err != nil {
		return fmt.Errorf("read order: %w", err)
	}
	_ = f.Close()
	var o wire
	if err := json.Unmarshal(b, &o); err != nil {
		return fmt.Errorf("order: %w", err)
	}
	if err := enterCgroups(o.Cgroups); err != nil {
		return err
	}
	if err := privateRoot(o.Order); err != nil {
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
		return fmt.Errorf("process %d, which wanted the program, is gone", o.Parent)
	}
	if o.Filter {
		if err := filter(); err != nil {
			return err
		}
	}
	err = syscall.Exec(o.Binary, append([]string{o.Binary}, o.Args...), append([]string{"LANG=C", "MALLOC_ARENA_MAX=1"}, o.Env...))
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
func privateRoot(o Order) error {
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
	for path, content := range o.Files {
		if err := makeFile(path, content); err != nil {
			return fmt.Errorf("make %s: %w", path, err)
		}
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
	rw := unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}
	for _, b := range binds {
		if !b.Writable {
			continue
		}
		if err := unix.MountSetattr(unix.AT_FDCWD, b.To, 0, &rw); err != nil {
			return fmt.Errorf("make %s writable: %w", b.To, err)
		}
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

func makeFile(path string, content []byte) error {
	if err := os.MkdirAll(filepath.Dir("."+path), 0o755); err != nil {
		return err
	}
	return os.WriteFile("."+path, content, 0o444)
}

func bindFile(source int, b Bind) error {
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
