package node

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// Identity names a process for longer than its pid is in use.
type Identity struct {
	PID int `json:"pid"`
	// StartTime is field 22 of /proc/PID/stat, clock ticks since boot.
	StartTime uint64 `json:"startTime"`
}

// Identify reads the identity of a living process.
func Identify(pid int) (Identity, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return Identity{}, err
	}
	// The command name may hold spaces and parentheses; fields count from its end.
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return Identity{}, fmt.Errorf("/proc/%d/stat: unexpected form", pid)
	}
	fields := bytes.Fields(b[i+1:])
	if len(fields) < 20 {
		return Identity{}, fmt.Errorf("/proc/%d/stat: too short", pid)
	}
	if state := fields[0][0]; state == 'Z' || state == 'X' {
		return Identity{}, fmt.Errorf("process %d is dead: %w", pid, os.ErrProcessDone)
	}
	start, err := strconv.ParseUint(string(fields[19]), 10, 64)
	if err != nil {
		return Identity{}, fmt.Errorf("/proc/%d/stat: %w", pid, err)
	}
	return Identity{pid, start}, nil
}

// Alive reports whether the very process is still running.
func (i Identity) Alive() bool {
	if i.PID <= 0 {
		return false
	}
	now, err := Identify(i.PID)
	return err == nil && now == i
}

// Signal sends sig to the very process, never to another that got its pid.
func (i Identity) Signal(sig unix.Signal) error {
	fd, err := unix.PidfdOpen(i.PID, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if !i.Alive() {
		return unix.ESRCH
	}
	return unix.PidfdSendSignal(fd, sig, nil, 0)
}

// Wait blocks until the process has ended or stop is readable or closed at its far
// end; it reports whether the process has ended. It works for processes that are
// not children.
func (i Identity) Wait(stop *os.File) (bool, error) {
	fd, err := unix.PidfdOpen(i.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	defer unix.Close(fd)
	if !i.Alive() {
		return true, nil
	}
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
