// Package port finds and opens the byte channel to the shim: a virtio-serial port
// found by name, or vsock when the kernel command line says so.
//
// It owns the character device's odd behaviour (end of file means the host's end is
// closed now, not for ever). It must not know what the bytes mean.
package port

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/guest/hyperstart/uevent"
)

// Opener gives one connection after the other; a connection is used up before the
// next is asked for.
type Opener interface {
	// Open waits until the host's end is open.
	Open(ctx context.Context) (io.ReadWriteCloser, error)
}

// Serial waits for the virtio-serial port of that name and opens it.
func Serial(ctx context.Context, name string) (Opener, error) {
	var dev string
	err := uevent.Wait(ctx, func() (bool, error) {
		names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
		if err != nil {
			return false, err
		}
		for _, n := range names {
			b, err := os.ReadFile(n)
			if err == nil && strings.TrimSpace(string(b)) == name {
				dev = "/dev/" + filepath.Base(filepath.Dir(n))
				_, err := os.Stat(dev)
				return err == nil, nil
			}
		}
		return false, nil
	})
	if err != nil {
		return nil, fmt.Errorf("find virtio-serial port %s: %w", name, err)
	}
	// Non-blocking, so that reads wait in the runtime's poller and not in a thread.
	f, err := os.OpenFile(dev, os.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open virtio-serial port: %w", err)
	}
	return &serial{f: f}, nil
}

// serial keeps the device open over all connections: closing it would throw away
// what the host has already sent.
type serial struct{ f *os.File }

func (s *serial) Open(ctx context.Context) (io.ReadWriteCloser, error) {
	if err := s.f.SetDeadline(time.Time{}); err != nil {
		return nil, fmt.Errorf("open channel: %w", err)
	}
	if err := s.await(ctx); err != nil {
		return nil, fmt.Errorf("wait for the host: %w", err)
	}
	return &session{f: s.f}, nil
}

// await returns when the host's end is open. While it is closed the device reports a
// hang-up; opening wakes pollers with "writable", so this waits for writability and
// looks again.
func (s *serial) await(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { _ = s.f.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	raw, err := s.f.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Write(func(fd uintptr) bool {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN | unix.POLLOUT}}
		n, err := unix.Poll(fds, 0)
		return err == nil && n > 0 && fds[0].Revents&unix.POLLHUP == 0
	})
}

// session is one connection over the device. Close unblocks whoever reads or writes
// and waits for them, and leaves the device open.
type session struct {
	f      *os.File
	users  sync.WaitGroup
	mu     sync.Mutex
	closed bool
}

func (s *session) enter() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.users.Add(1)
	return true
}

func (s *session) Read(p []byte) (int, error) {
	if !s.enter() {
		return 0, os.ErrClosed
	}
	defer s.users.Done()
	return s.f.Read(p)
}

func (s *session) Write(p []byte) (int, error) {
	if !s.enter() {
		return 0, os.ErrClosed
	}
	defer s.users.Done()
	return s.f.Write(p)
}

func (s *session) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	s.mu.Unlock()
	err := s.f.SetDeadline(time.Unix(1, 0))
	s.users.Wait()
	return err
}

// Vsock connects to the host's port.
type Vsock uint32

// Open dials the host; where nobody listens yet it waits and tries again, as vsock
// has no event that would tell.
func (v Vsock) Open(ctx context.Context) (io.ReadWriteCloser, error) {
	for {
		f, err := v.dial()
		if err == nil {
			return f, nil
		}
		retry := time.NewTimer(100 * time.Millisecond)
		select {
		case <-retry.C:
		case <-ctx.Done():
			retry.Stop()
			return nil, err
		}
	}
}

func (v Vsock) dial() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open vsock: %w", err)
	}
	err = unix.Connect(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_HOST, Port: uint32(v)})
	if err == nil {
		err = unix.SetNonblock(fd, true)
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("connect to host's vsock port %d: %w", uint32(v), err)
	}
	return os.NewFile(uintptr(fd), "vsock"), nil
}
