package nic

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// nsGetNSType is ioctl NS_GET_NSTYPE (linux/nsfs.h).
const nsGetNSType = 0xb703

// openNS opens the namespace and refuses the caller's own: a Pod that shares it is
// configured with path "", and mirroring the node's links would cut the node off.
func openNS(path string) (netns.NsHandle, error) {
	ns, err := netns.GetFromPath(path)
	if errors.Is(err, unix.ENOENT) {
		return -1, fmt.Errorf("network namespace %s: %w", path, errdefs.ErrNotFound)
	}
	if err != nil {
		return -1, fmt.Errorf("open network namespace %s: %w", path, err)
	}
	kind, err := unix.IoctlRetInt(int(ns), nsGetNSType)
	if err != nil || kind != unix.CLONE_NEWNET {
		_ = ns.Close()
		return -1, fmt.Errorf("%s is not a network namespace: %w", path, errdefs.ErrInvalidArgument)
	}
	own, err := netns.Get()
	if err != nil {
		_ = ns.Close()
		return -1, fmt.Errorf("open own network namespace: %w", err)
	}
	defer own.Close()
	if own.Equal(ns) {
		_ = ns.Close()
		return -1, fmt.Errorf("network namespace %s is this process's own: %w", path, errdefs.ErrInvalidArgument)
	}
	return ns, nil
}

// inNS runs fn on a thread inside ns and brings the thread back. Should that fail, the
// thread ends with its goroutine instead of serving others from the wrong namespace.
// (Ending it always would be simpler, but the process's first thread cannot end: it
// would stay in ns, keep it alive and be what /proc/<pid>/ns/net shows.)
func inNS(ns netns.NsHandle, fn func() error) error {
	done := make(chan error, 1)
	go func() { done <- onThread(ns, fn) }()
	return <-done
}

func onThread(ns netns.NsHandle, fn func() error) error {
	runtime.LockOSThread()
	own, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("open own network namespace: %w", err)
	}
	defer own.Close()
	if err := netns.Set(ns); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter network namespace: %w", err)
	}
	err = fn()
	if back := netns.Set(own); back != nil {
		return errors.Join(err, fmt.Errorf("leave network namespace: %w", back))
	}
	runtime.UnlockOSThread()
	return err
}

// openTap makes the tap name in the calling thread's namespace and opens its queue.
// The device is not persistent: it goes with the last descriptor.
func openTap(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun (is module tun loaded?): %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("tap name %q: %w", name, err)
	}
	// VNET_HDR lets checksums and segmentation stay undone between the guest and the
	// far end of the veth, which is most of the path's throughput.
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("make tap %s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}
