package container

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
	"github.com/hypernetes/hypernetes/guest/hyperstart/crun"
	"github.com/hypernetes/hypernetes/guest/hyperstart/reaper"
	"github.com/hypernetes/hypernetes/guest/hyperstart/spec"
	"github.com/hypernetes/hypernetes/guest/hyperstart/stdio"
)

// drainLimit is how long an exit waits for the process's output to be in the streams.
// A child that keeps the pipe open must not delay it for ever.
const drainLimit = 250 * time.Millisecond

// Status is how a process ended.
type Status = reaper.Status

// process is a container's init or an exec.
type process struct {
	id      string
	streams *stdio.IO
	// config and terminal are an exec's until it is started.
	config   []byte
	terminal bool

	// pid is 0 until the process exists.
	pid int
	// done is closed when status is valid.
	done   chan struct{}
	status Status

	mu    sync.Mutex
	pidfd int
}

func (c *Container) process(id string) *process {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.procs[id]
}

func (c *Container) takeProcesses() []*process {
	c.mu.Lock()
	defer c.mu.Unlock()
	var all []*process
	for _, p := range c.procs {
		all = append(all, p)
	}
	c.procs = map[string]*process{}
	return all
}

// adopt makes crun's process the init of the container.
func (c *Container) adopt(cp *crun.Process, streams *stdio.IO) *process {
	p := &process{streams: streams, done: make(chan struct{}), pidfd: -1}
	c.mu.Lock()
	c.procs[""] = p
	c.mu.Unlock()
	c.run(p, cp)
	return p
}

// run connects and monitors a process that exists now.
func (c *Container) run(p *process, cp *crun.Process) {
	c.mu.Lock()
	p.pid = cp.PID
	c.mu.Unlock()
	p.mu.Lock()
	p.pidfd = cp.PidFD
	p.mu.Unlock()
	p.streams.Started(cp.Console)
	c.m.monitors.Add(1)
	go func() {
		defer c.m.monitors.Done()
		c.exit(p, <-cp.Done)
	}()
}

// exit reports the end of a process: first that memory ran out, then that it ended.
func (c *Container) exit(p *process, st Status) {
	p.mu.Lock()
	if p.pidfd >= 0 {
		_ = unix.Close(p.pidfd)
		p.pidfd = -1
	}
	p.mu.Unlock()
	c.checkOOM()
	if p.id == "" && c.sharesPIDs {
		// In an own namespace the kernel does it.
		_ = c.group.Signal(unix.SIGKILL)
	}
	p.streams.Exited(drainLimit)
	p.status = st
	close(p.done)
	c.m.cfg.Events.Exit(st.At, &hyperstart.Exit{
		ContainerId: c.id, ExecId: p.id, Pid: uint32(p.pid), Status: st.Code,
	})
}

func (p *process) exited() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// result is the status of a process that has exited.
func (p *process) result() Status {
	<-p.done
	return p.status
}

func (p *process) signal(sig unix.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pidfd < 0 {
		return fmt.Errorf("process has finished or not begun: %w", errdefs.ErrNotFound)
	}
	err := unix.PidfdSendSignal(p.pidfd, sig, nil, 0)
	if err == unix.ESRCH {
		return fmt.Errorf("process has finished: %w", errdefs.ErrNotFound)
	}
	if err != nil {
		return fmt.Errorf("send signal %d: %w", sig, err)
	}
	return nil
}

// Exec prepares a process; StartExec runs it.
func (c *Container) Exec(in *hyperstart.ExecRequest) error {
	if !validID.MatchString(in.ExecId) {
		return fmt.Errorf("exec id %.80q: must match %s: %w", in.ExecId, validID, errdefs.ErrInvalidArgument)
	}
	config, err := spec.Process(in.Process, in.Terminal)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.procs[in.ExecId] != nil:
		return fmt.Errorf("exec %s of container %s: %w", in.ExecId, c.id, errdefs.ErrAlreadyExists)
	case len(c.procs) >= maxExecs:
		return fmt.Errorf("container %s has more than %d processes: %w", c.id, maxExecs, errdefs.ErrResourceExhausted)
	case c.procs[""] == nil || c.procs[""].exited():
		return fmt.Errorf("container %s does not run: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	streams, err := stdio.Open(c.m.cfg.Streams, stdio.Config{
		Container: c.id, Exec: in.ExecId, Terminal: in.Terminal,
		Stdin: in.Stdin, Stdout: in.Stdout, Stderr: in.Stderr,
	})
	if err != nil {
		return err
	}
	c.procs[in.ExecId] = &process{
		id: in.ExecId, streams: streams, config: config, terminal: in.Terminal, done: make(chan struct{}), pidfd: -1,
	}
	return nil
}

// StartExec runs a prepared process.
func (c *Container) StartExec(ctx context.Context, id string) (uint32, error) {
	c.mu.Lock()
	p := c.procs[id]
	if p == nil {
		c.mu.Unlock()
		return 0, fmt.Errorf("exec %.80q of container %s: %w", id, c.id, errdefs.ErrNotFound)
	}
	config := p.config
	p.config = nil // it starts once
	c.mu.Unlock()
	if config == nil {
		return 0, fmt.Errorf("exec %s has been started: %w", id, errdefs.ErrFailedPrecondition)
	}
	cp, err := c.m.cfg.Runtime.Exec(ctx, c.id, config, p.streams.Child(), p.terminal)
	if err != nil {
		c.mu.Lock()
		delete(c.procs, id)
		c.mu.Unlock()
		p.streams.Close()
		return 0, classify(err)
	}
	c.run(p, cp)
	return uint32(cp.PID), nil
}

func (c *Container) deleteExec(id string) (Status, error) {
	c.mu.Lock()
	p := c.procs[id]
	if p == nil {
		c.mu.Unlock()
		return Status{}, fmt.Errorf("exec %.80q of container %s: %w", id, c.id, errdefs.ErrNotFound)
	}
	if !p.exited() && p.config == nil {
		c.mu.Unlock()
		return Status{}, fmt.Errorf("exec %s of container %s runs: %w", id, c.id, errdefs.ErrFailedPrecondition)
	}
	delete(c.procs, id)
	c.mu.Unlock()
	p.streams.Close()
	if !p.exited() {
		return Status{At: time.Now()}, nil // prepared and never started
	}
	return p.status, nil
}

// Resize sets a process's terminal size.
func (c *Container) Resize(exec string, width, height uint32) error {
	p := c.process(exec)
	if p == nil {
		return fmt.Errorf("process %.80q of container %s: %w", exec, c.id, errdefs.ErrNotFound)
	}
	return p.streams.Resize(width, height)
}

// CloseStdin ends a process's standard input.
func (c *Container) CloseStdin(exec string) error {
	p := c.process(exec)
	if p == nil {
		return fmt.Errorf("process %.80q of container %s: %w", exec, c.id, errdefs.ErrNotFound)
	}
	p.streams.CloseStdin()
	return nil
}

// classify gives crun's errors a class: what it says about the program is the
// caller's mistake.
func classify(err error) error {
	var e *crun.Error
	if !errors.As(err, &e) {
		return err
	}
	switch {
	case strings.Contains(e.Message, "executable file"), strings.Contains(e.Message, "does not exist"):
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	return err
}
