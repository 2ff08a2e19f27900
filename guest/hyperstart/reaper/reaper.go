// Package reaper owns every wait(2) of PID 1: processes hyperstart starts itself,
// processes crun leaves behind for it to adopt, and orphans nobody asked for.
//
// There is one owner because a second caller of wait would steal exit statuses. It
// must not know what the processes are. os/exec must not be used beside it.
package reaper

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// maxStrays bounds the exits one window remembers; a fork bomb in a container must
// not fill PID 1's memory.
const maxStrays = 8192

// Status is how a process ended.
type Status struct {
	// Code is the exit status, 0-255; killed by signal n it is 128+n.
	Code uint32
	At   time.Time
}

// Reaper collects dead children. Make one per process with New and keep Run running.
// Its methods may be called concurrently.
type Reaper struct {
	// gate makes "fork and register" one step as seen by the collector, so that a
	// child that dies at once still finds its waiter.
	gate    sync.Mutex
	waiters map[int]chan Status
	windows map[*Window]struct{}
	sigs    chan os.Signal
}

// New returns a reaper that already receives SIGCHLD.
func New() *Reaper {
	r := &Reaper{
		waiters: map[int]chan Status{},
		windows: map[*Window]struct{}{},
		sigs:    make(chan os.Signal, 1),
	}
	signal.Notify(r.sigs, unix.SIGCHLD)
	return r
}

// Run collects dead children until ctx ends.
func (r *Reaper) Run(ctx context.Context) {
	defer signal.Stop(r.sigs)
	for {
		for r.collect() {
		}
		select {
		case <-r.sigs:
		case <-ctx.Done():
			return
		}
	}
}

// collect reaps one child and reports whether there may be more.
func (r *Reaper) collect() bool {
	r.gate.Lock()
	defer r.gate.Unlock()
	var ws unix.WaitStatus
	pid, err := unix.Wait4(-1, &ws, unix.WNOHANG, nil)
	if err == unix.EINTR {
		return true
	}
	if err != nil || pid <= 0 {
		return false
	}
	st := Status{Code: code(ws), At: time.Now()}
	if c, ok := r.waiters[pid]; ok {
		delete(r.waiters, pid)
		c <- st
		return true
	}
	for w := range r.windows {
		if len(w.strays) < maxStrays {
			w.strays[pid] = st
		}
	}
	return true
}

func code(ws unix.WaitStatus) uint32 {
	if ws.Signaled() {
		return 128 + uint32(ws.Signal())
	}
	return uint32(ws.ExitStatus())
}

// Start starts a program and returns its pid and the channel its status comes on.
func (r *Reaper) Start(path string, argv []string, attr *syscall.ProcAttr) (int, <-chan Status, error) {
	r.gate.Lock()
	defer r.gate.Unlock()
	pid, err := syscall.ForkExec(path, argv, attr)
	if err != nil {
		return 0, nil, fmt.Errorf("start %s: %w", path, err)
	}
	return pid, r.register(pid), nil
}

func (r *Reaper) register(pid int) <-chan Status {
	c := make(chan Status, 1)
	r.waiters[pid] = c
	return c
}

// Window remembers the exits of children nobody waits for while it is open: crun
// leaves a process to PID 1 that may be dead before its pid has been read from the
// pid file. Exits from before the window opened are not in it, so a reused pid
// cannot be mistaken for its predecessor.
type Window struct {
	r      *Reaper
	strays map[int]Status
}

// Window opens a window; the caller closes it.
func (r *Reaper) Window() *Window {
	w := &Window{r: r, strays: map[int]Status{}}
	r.gate.Lock()
	defer r.gate.Unlock()
	r.windows[w] = struct{}{}
	return w
}

// Adopt returns the channel on which the status of pid comes, at once if it is dead.
func (w *Window) Adopt(pid int) <-chan Status {
	w.r.gate.Lock()
	defer w.r.gate.Unlock()
	if st, ok := w.strays[pid]; ok {
		c := make(chan Status, 1)
		c <- st
		return c
	}
	return w.r.register(pid)
}

// Close ends the window.
func (w *Window) Close() {
	w.r.gate.Lock()
	defer w.r.gate.Unlock()
	delete(w.r.windows, w)
}
