// Package proc owns naming a process, waiting for its end and signalling it, whoever
// started it. It must not know what processes do.
package proc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// ID names a process for as long as the host runs: pids are used again, a pid with the
// time it started is not.
type ID struct {
	PID int `json:"pid"`
	// Start is field 22 of /proc/<pid>/stat, in clock ticks since boot.
	Start uint64 `json:"start"`
}

// Find returns the process with that pid as it is now.
//
// Errors: errdefs.ErrNotFound.
func Find(pid int) (ID, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ID{}, fmt.Errorf("process %d: %w", pid, errdefs.ErrNotFound)
	}
	// The name in parentheses may hold anything; field 22 is the 20th after it.
	text := string(b)
	f := strings.Fields(text[strings.LastIndexByte(text, ')')+1:])
	if len(f) < 20 || f[0] == "Z" || f[0] == "X" {
		return ID{}, fmt.Errorf("process %d has ended: %w", pid, errdefs.ErrNotFound)
	}
	start, err := strconv.ParseUint(f[19], 10, 64)
	if err != nil {
		return ID{}, fmt.Errorf("process %d: start time %q: %w", pid, f[19], errdefs.ErrInternal)
	}
	return ID{PID: pid, Start: start}, nil
}

// Alive tells whether the process still runs.
func (p ID) Alive() bool {
	if p.PID <= 0 {
		return false
	}
	now, err := Find(p.PID)
	return err == nil && now == p
}

// open returns a descriptor of the process, which what it names cannot change under; the
// error is unix.ESRCH if it has ended.
func (p ID) open() (int, error) {
	fd, err := unix.PidfdOpen(p.PID, 0)
	if p.Alive() {
		return fd, err
	}
	if err == nil {
		_ = unix.Close(fd)
	}
	return -1, unix.ESRCH
}

// Signal sends sig to the process, never to another that got its pid. The error is
// unix.ESRCH if it has ended.
func (p ID) Signal(sig unix.Signal) error {
	fd, err := p.open()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.PidfdSendSignal(fd, sig, nil, 0)
}

// Kill kills the process, if it runs, and waits at most limit for its end.
//
// Errors: errdefs.ErrAborted if it does not end.
func (p ID) Kill(ctx context.Context, limit time.Duration) error {
	return p.end(ctx, unix.SIGKILL, limit)
}

// AwaitEnd waits at most limit for the end of the process.
//
// Errors: errdefs.ErrAborted if it does not end.
func (p ID) AwaitEnd(ctx context.Context, limit time.Duration) error {
	return p.end(ctx, 0, limit)
}

func (p ID) end(ctx context.Context, signal unix.Signal, limit time.Duration) error {
	fd, err := p.open()
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("process %d: %w", p.PID, err)
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, signal, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", p.PID, err)
	}
	if d, ok := ctx.Deadline(); ok {
		limit = min(limit, time.Until(d))
	}
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for until := time.Now().Add(limit); ; { // a signal may interrupt the wait
		left := max(0, time.Until(until))
		n, err := unix.Poll(fds, int(left/time.Millisecond))
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fmt.Errorf("wait for process %d: %w", p.PID, err)
		case n == 0:
			return fmt.Errorf("process %d does not end: %w", p.PID, errdefs.ErrAborted)
		default:
			return nil
		}
	}
}

// Wait blocks until the process has ended or stop is readable or closed at its far end;
// it reports whether the process has ended.
func (p ID) Wait(stop *os.File) (bool, error) {
	fd, err := p.open()
	if errors.Is(err, unix.ESRCH) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	defer unix.Close(fd)
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(stop.Fd()), Events: unix.POLLIN}}
	for {
		_, err := unix.Poll(fds, -1)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return false, err
		}
		return fds[0].Revents != 0, nil
	}
}
