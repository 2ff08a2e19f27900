// Package uevent waits for something the kernel announces when devices come and go.
//
// It owns the kobject netlink socket. It must not know which device is waited for.
package uevent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Wait calls found until it says true or fails, first at once and then after every
// event of the kernel, until ctx ends. The subscription is made before the first
// call, so nothing that happens between is missed.
func Wait(ctx context.Context, found func() (bool, error)) error {
	if ok, err := found(); ok || err != nil {
		return err
	}
	sock, err := subscribe()
	if err != nil {
		return err
	}
	defer sock.Close()
	stop := context.AfterFunc(ctx, func() { _ = sock.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	buf := make([]byte, 8<<10)
	for {
		if ok, err := found(); ok || err != nil {
			return err
		}
		_, err := sock.Read(buf)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		// ENOBUFS says events were lost: looking again is the cure.
		if err != nil && !isOverrun(err) {
			return fmt.Errorf("read kernel events: %w", err)
		}
	}
}

func subscribe() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return nil, fmt.Errorf("open kernel event socket: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("subscribe to kernel events: %w", err)
	}
	return os.NewFile(uintptr(fd), "uevent"), nil
}

func isOverrun(err error) bool { return errors.Is(err, unix.ENOBUFS) }
