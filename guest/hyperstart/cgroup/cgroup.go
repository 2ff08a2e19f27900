// Package cgroup reads and controls one container's cgroup v2 directory.
//
// It owns the file formats. It must not know containers beyond a directory name.
package cgroup

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Group is a cgroup directory.
type Group string

// Pids lists the processes of the group and of groups below it.
func (g Group) Pids() ([]int, error) {
	var pids []int
	err := filepath.WalkDir(string(g), func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.Name() != "cgroup.procs" {
			return ignoreGone(err)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return ignoreGone(err)
		}
		for _, f := range strings.Fields(string(b)) {
			if pid, err := strconv.Atoi(f); err == nil {
				pids = append(pids, pid)
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	return pids, nil
}

func ignoreGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	return err
}

// Signal sends sig to every process of the group; SIGKILL is one atomic step.
func (g Group) Signal(sig unix.Signal) error {
	if sig == unix.SIGKILL {
		err := os.WriteFile(filepath.Join(string(g), "cgroup.kill"), []byte("1"), 0)
		if err == nil || errors.Is(err, fs.ErrNotExist) && !g.exists() {
			return nil
		}
	}
	pids, err := g.Pids()
	if err != nil {
		return err
	}
	for _, pid := range pids {
		if err := unix.Kill(pid, sig); err != nil && err != unix.ESRCH {
			return fmt.Errorf("signal process %d: %w", pid, err)
		}
	}
	return nil
}

func (g Group) exists() bool {
	_, err := os.Stat(string(g))
	return err == nil
}

// Freeze stops or continues every process of the group and waits until it is so.
func (g Group) Freeze(ctx context.Context, frozen bool) error {
	want := "0"
	if frozen {
		want = "1"
	}
	events, err := os.Open(filepath.Join(string(g), "cgroup.events"))
	if err != nil {
		return fmt.Errorf("freeze: %w", err)
	}
	defer events.Close()
	if err := os.WriteFile(filepath.Join(string(g), "cgroup.freeze"), []byte(want), 0); err != nil {
		return fmt.Errorf("freeze: %w", err)
	}
	buf := make([]byte, 4096)
	for {
		n, err := events.ReadAt(buf, 0)
		if n == 0 {
			return fmt.Errorf("freeze: read events: %w", err)
		}
		if strconv.FormatUint(keyed(buf[:n])["frozen"], 10) == want {
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		// The kernel raises POLLPRI when the file changes; the timeout is for ctx.
		if _, err := unix.Poll([]unix.PollFd{{Fd: int32(events.Fd()), Events: unix.POLLPRI}}, 200); err != nil && err != unix.EINTR {
			return fmt.Errorf("freeze: wait: %w", err)
		}
	}
}

// OOMKills counts the processes of the group the kernel killed for memory.
func (g Group) OOMKills() uint64 { return g.keyed("memory.events")["oom_kill"] }

func (g Group) keyed(file string) map[string]uint64 {
	b, err := os.ReadFile(filepath.Join(string(g), file))
	if err != nil {
		return nil
	}
	return keyed(b)
}

// keyed parses "key value" lines.
func keyed(b []byte) map[string]uint64 {
	out := map[string]uint64{}
	for s := bufio.NewScanner(bytes.NewReader(b)); s.Scan(); {
		k, v, ok := strings.Cut(s.Text(), " ")
		if !ok {
			continue
		}
		if n, err := strconv.ParseUint(v, 10, 64); err == nil {
			out[k] = n
		}
	}
	return out
}

// number reads a single value; "max" is the largest.
func (g Group) number(file string) uint64 {
	b, err := os.ReadFile(filepath.Join(string(g), file))
	if err != nil {
		return 0
	}
	return number(string(b))
}

func number(s string) uint64 {
	s = strings.TrimSpace(s)
	if s == "max" {
		return ^uint64(0)
	}
	n, _ := strconv.ParseUint(s, 10, 64)
	return n
}
