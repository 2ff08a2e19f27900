// Package netns runs code in a network namespace that is not the calling process's.
//
// It owns the discipline this takes in Go: a thread that entered a namespace is locked,
// brought back before it is used for anything else, and thrown away if that fails. It
// must not know what is done there.
package netns

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"

	"github.com/containerd/errdefs"
	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	vnetns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// NS is an open network namespace. Its methods may be called concurrently.
type NS struct {
	path string
	file *os.File
}

// Create makes a new, empty namespace and binds it to path, whose directory is made if
// need be. It fails with errdefs.ErrAlreadyExists if a namespace is bound there.
func Create(path string) (*NS, error) {
	if n, err := Open(path); err == nil {
		_ = n.Close()
		return nil, fmt.Errorf("network namespace %s: %w", path, errdefs.ErrAlreadyExists)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE, 0o444) // also what a killed Create left
	if err != nil {
		return nil, err
	}
	_ = f.Close()
	err = onOwnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("new network namespace: %w", err)
		}
		return unix.Mount(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()), path, "", unix.MS_BIND, "")
	})
	if err != nil {
		_ = os.Remove(path)
		return nil, fmt.Errorf("network namespace %s: %w", path, err)
	}
	return Open(path)
}

// Open opens the namespace bound to path; it fails with errdefs.ErrNotFound if there is none.
func Open(path string) (*NS, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("network namespace %s: %w", path, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil || st.Type != unix.NSFS_MAGIC {
		_ = f.Close()
		return nil, fmt.Errorf("%s is no network namespace: %w", path, errdefs.ErrNotFound)
	}
	return &NS{path: path, file: f}, nil
}

// Current opens the calling process's namespace.
func Current() (*NS, error) { return Open(fmt.Sprintf("/proc/%d/ns/net", os.Getpid())) }

// Remove unbinds the namespace at path; it goes once nothing holds it. It succeeds if
// there is none.
func Remove(path string) error {
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unbind network namespace %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Path is what it was opened by.
func (n *NS) Path() string { return n.path }

// FD is its descriptor, valid until Close.
func (n *NS) FD() int { return int(n.file.Fd()) }

// Close lets go of it. It lives on while it is bound or used.
func (n *NS) Close() error { return n.file.Close() }

// Do calls f on a thread that is in the namespace. f must not start goroutines that are
// to be there as well.
func (n *NS) Do(f func() error) error {
	return onOwnThread(func() error {
		if err := unix.Setns(n.FD(), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace %s: %w", n.path, err)
		}
		return f()
	})
}

// onOwnThread calls f on a thread that is thrown away afterwards: goroutines that end
// while locked take their thread with them, and with it the namespace it is in. The
// process's first thread cannot be thrown away, and its namespace is what others take for
// the process's: it is kept out of this.
func onOwnThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == os.Getpid() {
			done <- onOwnThread(f) // on another one, as this is held
			runtime.UnlockOSThread()
			return
		}
		done <- f()
	}()
	return <-done
}

// Netlink opens route netlink in the namespace; the caller closes it.
func (n *NS) Netlink() (*netlink.Handle, error) {
	return netlink.NewHandleAt(vnetns.NsHandle(n.FD()), unix.NETLINK_ROUTE)
}

// NFTables opens nf_tables in the namespace.
func (n *NS) NFTables(opts ...nftables.ConnOption) (*nftables.Conn, error) {
	return nftables.New(append([]nftables.ConnOption{nftables.WithNetNSFd(n.FD())}, opts...)...)
}

// DialContext connects from the namespace. Names are not resolved: address is IP:port.
func (n *NS) DialContext(ctx context.Context, network, address string) (c net.Conn, err error) {
	err = n.Do(func() error {
		c, err = (&net.Dialer{FallbackDelay: -1}).DialContext(ctx, network, address)
		return err
	})
	return c, err
}

// Listen listens in the namespace.
func (n *NS) Listen(ctx context.Context, network, address string) (l net.Listener, err error) {
	err = n.Do(func() error { l, err = (&net.ListenConfig{}).Listen(ctx, network, address); return err })
	return l, err
}

// ListenPacket listens in the namespace.
func (n *NS) ListenPacket(ctx context.Context, network, address string) (c net.PacketConn, err error) {
	err = n.Do(func() error { c, err = (&net.ListenConfig{}).ListenPacket(ctx, network, address); return err })
	return c, err
}
