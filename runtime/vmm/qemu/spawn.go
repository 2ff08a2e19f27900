package qemu

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/runtime/launch"
	"github.com/hypernetes/hypernetes/runtime/vmm"
)

// Paths inside QEMU's private root.
const (
	firmwareDir = "/firmware"
	kernelPath  = "/kernel"
	initrdPath  = "/initrd"
	// nullDevice: QEMU tries image locks on it first and silently goes without if it is
	// not there.
	nullDevice = "/dev/null"
)

// MaybeLaunch makes the process a confined QEMU if it was started for that, and then
// never returns. Every program using this package calls it first.
func MaybeLaunch() { launch.Maybe() }

// process is a starting or running QEMU and our ends of its connections.
type process struct {
	*launch.Process
	qmp, channel, console *net.UnixConn
}

// close gives up our ends of the connections.
func (p *process) close() {
	for _, c := range []*net.UnixConn{p.qmp, p.channel, p.console} {
		if c != nil {
			_ = c.Close()
		}
	}
	if p.Process != nil {
		_ = p.Stderr.Close()
	}
}

// spawn starts the launcher for c. Descriptors given to it are closed here again.
func spawn(c vmm.Config, h Host) (_ *process, err error) {
	p := &process{}
	var theirs []*os.File // in the order of their descriptors, from launch.FirstFD on
	defer func() {
		for _, f := range theirs {
			_ = f.Close()
		}
		if err != nil {
			p.close()
		}
	}()
	for _, end := range []**net.UnixConn{&p.qmp, &p.channel, &p.console} {
		f, err := socketPair(end)
		if err != nil {
			return nil, err
		}
		theirs = append(theirs, f)
	}
	fds := inherited{qmp: launch.FirstFD, channel: launch.FirstFD + 1, console: launch.FirstFD + 2}
	inherit := func(f *os.File) (int, error) {
		dup, err := duplicate(f)
		if err != nil {
			return 0, err
		}
		theirs = append(theirs, dup)
		return launch.FirstFD + len(theirs) - 1, nil
	}
	images, err := inheritDevices(c, h, &fds, inherit)
	if err != nil {
		return nil, err
	}
	args, err := arguments(c, h, fds, images)
	if err != nil {
		return nil, err
	}
	o := launch.Order{Binary: h.Binary, Args: args, UID: c.UID, GID: c.GID, Cgroups: c.Cgroups, Binds: view(c, h), KVM: c.Accelerator == "kvm"}
	if p.Process, err = launch.Start(o, theirs); err != nil {
		return nil, fmt.Errorf("vmm: %w", err)
	}
	return p, nil
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
func view(c vmm.Config, h Host) []launch.Bind {
	binds := []launch.Bind{{From: nullDevice, To: nullDevice}, {From: h.Binary, To: h.Binary}, {From: c.Kernel, To: kernelPath}, {From: c.Initrd, To: initrdPath}}
	for _, f := range h.Files {
		binds = append(binds, launch.Bind{From: f, To: f})
	}
	for _, f := range h.Firmware {
		binds = append(binds, launch.Bind{From: f, To: filepath.Join(firmwareDir, filepath.Base(f))})
	}
	return binds
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
	if err := raw.Control(func(u uintptr) { fd, dupErr = unix.FcntlInt(u, unix.F_DUPFD_CLOEXEC, launch.FirstFD) }); err != nil {
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
