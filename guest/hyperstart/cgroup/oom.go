package cgroup

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Watcher calls back when memory.events of a group changes; one descriptor serves all
// groups. It may be used concurrently.
type Watcher struct {
	f  *os.File
	mu sync.Mutex
	// calls by inotify watch descriptor.
	calls map[int32]func()
}

// NewWatcher opens the watcher; Run makes it work.
func NewWatcher() (*Watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("watch cgroups: %w", err)
	}
	return &Watcher{f: os.NewFile(uintptr(fd), "inotify"), calls: map[int32]func(){}}, nil
}

// Watch has call run, one at a time, after the group's memory.events changed. The
// watch ends with the group.
func (w *Watcher) Watch(g Group, call func()) error {
	raw, err := w.f.SyscallConn()
	if err != nil {
		return fmt.Errorf("watch cgroup: %w", err)
	}
	var werr error
	err = raw.Control(func(fd uintptr) {
		w.mu.Lock()
		defer w.mu.Unlock()
		var wd int
		if wd, werr = unix.InotifyAddWatch(int(fd), filepath.Join(string(g), "memory.events"), unix.IN_MODIFY); werr == nil {
			w.calls[int32(wd)] = call
		}
	})
	if err == nil {
		err = werr
	}
	if err != nil {
		return fmt.Errorf("watch cgroup: %w", err)
	}
	return nil
}

// Run delivers changes until ctx ends, then closes the watcher.
func (w *Watcher) Run(ctx context.Context) {
	stop := context.AfterFunc(ctx, func() { _ = w.f.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	defer w.f.Close()
	buf := make([]byte, 4096)
	for {
		n, err := w.f.Read(buf)
		if err != nil {
			return
		}
		for _, ev := range parseInotify(buf[:n]) {
			w.mu.Lock()
			call := w.calls[ev.wd]
			if ev.mask&unix.IN_IGNORED != 0 {
				delete(w.calls, ev.wd)
			}
			w.mu.Unlock()
			if call != nil && ev.mask&unix.IN_MODIFY != 0 {
				call()
			}
		}
	}
}

type inotifyEvent struct {
	wd   int32
	mask uint32
}

func parseInotify(b []byte) []inotifyEvent {
	var out []inotifyEvent
	for len(b) >= unix.SizeofInotifyEvent {
		var head struct {
			WD                int32
			Mask, Cookie, Len uint32
		}
		if binary.Read(bytes.NewReader(b), binary.NativeEndian, &head) != nil {
			break
		}
		out = append(out, inotifyEvent{head.WD, head.Mask})
		b = b[min(len(b), unix.SizeofInotifyEvent+int(head.Len)):]
	}
	return out
}
