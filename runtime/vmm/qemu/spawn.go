package qemu

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/runtime/vmm"
)

// process is a starting or running QEMU and our ends of its connections.
type process struct {
	cmd                   *exec.Cmd
	qmp, channel, console *net.UnixConn
	stderr                *os.File
	// exited delivers the result of waiting, once.
	exited chan error
}

// close gives up our ends of the connections.
func (p *process) close() {
	for _, c := range []*net.UnixConn{p.qmp, p.channel, p.console} {
		if c != nil {
			_ = c.Close()
		}
	}
	if p.stderr != nil {
		_ = p.stderr.Close()
	}
}

// spawn starts the launcher for c. Descriptors given to it are closed here again.
func spawn(c vmm.Config, h Host) (_ *process, err error) {
	p := &process{exited: make(chan error, 1)}
	var theirs []*os.File // in the order of their descriptors, from launchFD on
	defer func() {
		for _, f := range theirs {
			_ = f.Close()
		}
		if err != nil {
			p.close()
		}
	}()
	orders, err := memfile("order")
	if err != nil {
		return nil, err
	}
	theirs = append(theirs, orders)
	for _, end := range []**net.UnixConn{&p.qmp, &p.channel, &p.console} {
		f, err := socketPair(end)
		if err != nil {
			return nil, err
		}
		theirs = append(theirs, f)
	}
	fds := inherited{qmp: launchFD + 1, channel: launchFD + 2, console: launchFD + 3}
	inherit := func(f *os.File) (int, error) {
		dup, err := duplicate(f)
		if err != nil {
			return 0, err
		}
		theirs = append(theirs, dup)
		return launchFD + len(theirs) - 1, nil
	}
	images, err := inheritDevices(c, h, &fds, inherit)
	if err != nil {
		return nil, err
	}
	args, err := arguments(c, h, fds, images)
	if err != nil {
		return nil, err
	}
	o := order{Parent: os.Getpid(), Binary: h.Binary, Args: args, UID: c.UID, GID: c.GID, Cgroups: c.Cgroups, Binds: view(c, h), KVM: c.Accelerator == "kvm"}
	if err := json.NewEncoder(orders).Encode(o); err != nil {
		return nil, fmt.Errorf("order: %w", err)
	}
	if _, err := orders.Seek(0, 0); err != nil {
		return nil, fmt.Errorf("order: %w", err)
	}
	return p, p.start(theirs)
}

func inheritDevices(c vmm.Config, h Host, fds *inherited, inherit func(*os.File) (int, error)) (images []backing, err error) {
	for _, n := range c.NICs {
		fd, err := inherit(n.Tap)
		if err != nil {
			return nil, fmt.Errorf("tap of %s: %w", n.MAC, err)
		}
		fds.taps = append(fds.taps, fd)
		if !h.VhostNet || c.Accelerator != "kvm" {
			continue // vhost's kernel thread gains nothing beside an emulated CPU
		}
		if fd, err = inheritVhost(inherit); err != nil {
			return nil, err
		}
		fds.vhost = append(fds.vhost, fd)
	}
	for _, d := range c.Disks {
		i, f := backing{}, d.File
		if d.NBD != nil {
			f = d.NBD.Conn
		} else if i, err = backingOf(d, h); err != nil {
			return nil, err
		}
		fd, err := inherit(f)
		if err != nil {
			return nil, fmt.Errorf("disk %s: %w", d.Serial, err)
		}
		images, fds.disks = append(images, i), append(fds.disks, fd)
	}
	for _, f := range c.Hold {
		if _, err := inherit(f); err != nil {
			return nil, fmt.Errorf("%s: %w", f.Name(), err)
		}
	}
	return images, nil
}

// inheritVhost opens a vhost-net instance, which the confined QEMU could not.
func inheritVhost(inherit func(*os.File) (int, error)) (int, error) {
	f, err := os.OpenFile("/dev/vhost-net", os.O_RDWR, 0)
	if err != nil {
		return 0, fmt.Errorf("open vhost-net: %w", err)
	}
	defer f.Close()
	return inherit(f)
}

// view lists all QEMU sees of the host's files.
func view(c vmm.Config, h Host) []bind {
	binds := []bind{{From: nullDevice, To: nullDevice}, {From: h.Binary, To: h.Binary}, {From: c.Kernel, To: kernelPath}, {From: c.Initrd, To: initrdPath}}
	for _, f := range h.Files {
		binds = append(binds, bind{From: f, To: f})
	}
	for _, f := range h.Firmware {
		binds = append(binds, bind{From: f, To: filepath.Join(firmwareDir, filepath.Base(f))})
	}
	return binds
}

// start runs the launcher and waits for its end from a thread that lives as long: the
// kernel sends the parent death signal when the thread that forked ends, and Go ends
// threads at will.
func (p *process) start(theirs []*os.File) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	p.stderr = r
	p.cmd = &exec.Cmd{
		Path: "/proc/self/exe", Args: []string{launchName}, Env: []string{"GOMAXPROCS=1", "GOGC=off"}, Dir: "/",
		Stdout: w, Stderr: w, ExtraFiles: theirs,
		SysProcAttr: &syscall.SysProcAttr{
			Pdeathsig: syscall.SIGKILL, Setsid: true,
			Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
		},
	}
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := p.cmd.Start()
		started <- err
		if err == nil {
			p.exited <- p.cmd.Wait()
		}
	}()
	err = <-started
	_ = w.Close()
	if errors.Is(err, syscall.EPERM) {
		return fmt.Errorf("start vmm in its own namespaces: %w: this needs root", err)
	}
	if err != nil {
		return fmt.Errorf("start vmm: %w", err)
	}
	return nil
}

func memfile(name string) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd: %w", err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// socketPair connects *ours with the file returned.
func socketPair(ours **net.UnixConn) (*os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socketpair: %w", err)
	}
	theirs := os.NewFile(uintptr(fds[1]), "vmm")
	f := os.NewFile(uintptr(fds[0]), "shim")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		_ = theirs.Close()
		return nil, fmt.Errorf("socketpair: %w", err)
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		return nil, errors.Join(fmt.Errorf("socketpair is a %T: %w", c, errdefs.ErrInternal), c.Close(), theirs.Close())
	}
	*ours = u
	return theirs, nil
}

// duplicate does not use File.Fd, which makes a pollable file (a tap) blocking.
func duplicate(f *os.File) (*os.File, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd, dupErr := -1, error(nil)
	if err := raw.Control(func(u uintptr) { fd, dupErr = unix.FcntlInt(u, unix.F_DUPFD_CLOEXEC, launchFD) }); err != nil {
		return nil, err
	}
	if dupErr != nil {
		return nil, dupErr
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// backingOf tells how QEMU opens a disk's file: it has a driver for regular files and one
// for devices, and each refuses the other.
func backingOf(d vmm.Disk, h Host) (backing, error) {
	i := backing{asynchronous: d.Persistent && h.IOUring}
	st, err := d.File.Stat()
	switch {
	case err != nil:
		return i, fmt.Errorf("disk %s: %w", d.Serial, err)
	case st.Mode().IsRegular():
		i.driver = "file"
	case st.Mode()&(os.ModeDevice|os.ModeCharDevice) == os.ModeDevice:
		i.driver = "host_device"
	default:
		return i, fmt.Errorf("disk %s: %s is a %s: %w: a raw image or a block device is needed", d.Serial, d.File.Name(), st.Mode().Type(), errdefs.ErrInvalidArgument)
	}
	raw, err := d.File.SyscallConn()
	if err != nil {
		return i, fmt.Errorf("disk %s: %w", d.Serial, err)
	}
	flags := 0
	cerr := raw.Control(func(fd uintptr) { flags, err = unix.FcntlInt(fd, unix.F_GETFL, 0) })
	if err = errors.Join(cerr, err); err != nil {
		return i, fmt.Errorf("disk %s: %w", d.Serial, err)
	}
	i.direct = flags&unix.O_DIRECT != 0
	return i, nil
}
