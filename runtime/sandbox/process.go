package sandbox

import (
	"context"
	"fmt"
	"net"
	"sync"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
	"github.com/hypernetes/hypernetes/runtime/stdio"
)

// Status of a process.
type Status int

// The states of a process, in order.
const (
	StatusCreated Status = iota
	StatusRunning
	StatusPaused
	StatusStopped
)

// Exit tells how a process ended.
type Exit struct {
	PID    uint32
	Status uint32
	At     time.Time
}

// State is a process as containerd asks for it.
type State struct {
	Status Status
	Bundle string
	Stdio  stdio.Config
	Exit   Exit // PID always, the rest once it has stopped
}

// process is a container's first process (exec "") or one started in it later.
type process struct {
	c    *Container
	exec string
	pid  uint32
	cfg  stdio.Config
	spec []byte // of an exec
	// errand is set for an exec that does not run in the guest.
	errand *errand
	io     *stdio.IO

	// op is held while the process is created, started and finished, so that events
	// leave in the order start, exit.
	op sync.Mutex
	// deleteAsked is when the guest was first asked to remove it.
	deleteAsked time.Time

	mu      sync.Mutex
	status  Status
	known   bool // the guest has heard of it
	ending  bool // the guest has told of its end
	overdue *time.Timer
	exit    Exit
	stopped chan struct{}
}

func newProcess(c *Container, exec string, pid uint32, cfg stdio.Config) *process {
	return &process{c: c, exec: exec, pid: pid, cfg: cfg, stopped: make(chan struct{})}
}

func (p *process) State() State {
	p.mu.Lock()
	defer p.mu.Unlock()
	st := State{Status: p.status, Bundle: p.c.bundle, Stdio: p.cfg, Exit: p.exit}
	st.Exit.PID = p.pid
	if st.Status == StatusRunning && p.c.isPaused() {
		st.Status = StatusPaused
	}
	return st
}

func (p *process) inGuest() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.known
}

func (p *process) setKnown() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.known = true
}

// openIO joins the standard streams; the guest takes them when it hears of the process.
func (p *process) openIO(ctx context.Context) error {
	io, err := stdio.Open(ctx, p.cfg, p.c.s.opt.Namespace, p.c.id, func(ctx context.Context, fd uint32) (net.Conn, error) {
		return p.c.s.agent.Stdio(ctx, p.c.id, p.exec, fd)
	})
	if err != nil {
		return err
	}
	p.io = io
	return nil
}

// drainLimit bounds waiting for output after a process's end: children may hold it open.
const drainLimit = 10 * time.Second

// finish ends a process whose end the guest has told.
func (p *process) finish(status uint32, at time.Time) {
	p.op.Lock()
	defer p.op.Unlock()
	ctx, cancel := context.WithTimeout(p.c.s.ctx, drainLimit)
	p.io.Drain(ctx)
	cancel()
	if p.exec == "" {
		p.c.readBack()
	}
	p.setExit(status, at)
}

// setExit records the end and tells of it, once.
func (p *process) setExit(status uint32, at time.Time) {
	p.mu.Lock()
	if p.status == StatusStopped {
		p.mu.Unlock()
		return
	}
	p.status = StatusStopped
	if p.overdue != nil {
		p.overdue.Stop()
	}
	p.exit = Exit{PID: p.pid, Status: status, At: at}
	p.mu.Unlock()
	id := p.exec
	if id == "" {
		id = p.c.id
	}
	p.c.s.opt.Publisher.Publish("/tasks/exit", &eventsapi.TaskExit{
		ContainerID: p.c.id, ID: id, Pid: p.pid, ExitStatus: status, ExitedAt: timestamppb.New(at),
	})
	close(p.stopped)
}

func deleteEvent(container, exec string, e Exit) *eventsapi.TaskDelete {
	id := exec
	if id == "" {
		id = container
	}
	return &eventsapi.TaskDelete{ContainerID: container, ID: id, Pid: e.PID, ExitStatus: e.Status, ExitedAt: timestamppb.New(e.At)}
}

// State tells how a process is, from memory.
func (c *Container) State(exec string) (State, error) {
	p, err := c.process(exec)
	if err != nil {
		return State{}, err
	}
	return p.State(), nil
}

// Start runs a created process and returns its reported pid.
func (c *Container) Start(ctx context.Context, exec string) (uint32, error) {
	p, err := c.process(exec)
	if err != nil {
		return 0, err
	}
	a, err := c.s.client(ctx)
	if err != nil {
		return 0, err
	}
	p.op.Lock()
	defer p.op.Unlock()
	if st := p.State(); st.Status != StatusCreated {
		return 0, fmt.Errorf("process %q of container %s has been started: %w", exec, c.id, errdefs.ErrFailedPrecondition)
	}
	if p.errand != nil {
		if err := p.begin(ctx); err != nil {
			return 0, err
		}
		p.running()
		return p.pid, nil
	}
	if exec != "" {
		if err := c.prepareExec(ctx, p); err != nil {
			return 0, err
		}
	}
	if err := a.Start(ctx, c.id, exec); err != nil {
		if exec != "" {
			p.io.Close()
		}
		return 0, fmt.Errorf("start process %q: %w", exec, err)
	}
	p.running()
	return p.pid, nil
}

// running notes that a process has been started, and tells.
func (p *process) running() {
	p.mu.Lock()
	if p.status == StatusCreated { // or the VM has ended meanwhile
		p.status = StatusRunning
	}
	p.mu.Unlock()
	if p.exec == "" {
		p.c.s.opt.Publisher.Publish("/tasks/start", &eventsapi.TaskStart{ContainerID: p.c.id, Pid: p.pid})
	} else {
		p.c.s.opt.Publisher.Publish("/tasks/exec-started", &eventsapi.TaskExecStarted{ContainerID: p.c.id, ExecID: p.exec, Pid: p.pid})
	}
}

func (c *Container) prepareExec(ctx context.Context, p *process) error {
	if err := p.openIO(ctx); err != nil {
		return err
	}
	in, out, errw := p.cfg.Wants()
	err := c.s.agent.Exec(ctx, &hyperstart.ExecRequest{
		ContainerId: c.id, ExecId: p.exec, Process: p.spec, Terminal: p.cfg.Terminal, Stdin: in, Stdout: out, Stderr: errw,
	})
	if err != nil {
		p.io.Close()
		return fmt.Errorf("prepare process %q: %w", p.exec, err)
	}
	p.setKnown()
	p.spec = nil
	return nil
}

// maxProcess bounds the description of an exec, in bytes.
const maxProcess = 1 << 20

// Exec adds a process (OCI process as JSON) to a running container; Start runs it.
func (c *Container) Exec(exec string, process []byte, cfg stdio.Config) error {
	if exec == "" || len(exec) > 128 {
		return fmt.Errorf("exec id %.200q: must be 1 to 128 characters: %w", exec, errdefs.ErrInvalidArgument)
	}
	if len(process) > maxProcess {
		return fmt.Errorf("process of %d bytes is over the limit of %d: %w", len(process), maxProcess, errdefs.ErrInvalidArgument)
	}
	if st, err := c.State(""); err != nil || st.Status != StatusRunning {
		return fmt.Errorf("container %s is not running: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	p := newProcess(c, exec, c.s.nextPID(), cfg)
	if p.errand = intercept(process); p.errand == nil {
		p.spec = process
	}
	c.mu.Lock()
	if c.procs[exec] != nil {
		c.mu.Unlock()
		return fmt.Errorf("process %q of container %s: %w", exec, c.id, errdefs.ErrAlreadyExists)
	}
	c.procs[exec] = p
	c.mu.Unlock()
	c.s.opt.Publisher.Publish("/tasks/exec-added", &eventsapi.TaskExecAdded{ContainerID: c.id, ExecID: exec})
	return nil
}

// Kill sends a signal to a process, or to all of the container.
//
// Errors: errdefs.ErrNotFound for a process that has stopped, as containerd expects.
func (c *Container) Kill(ctx context.Context, exec string, signal uint32, all bool) error {
	p, err := c.process(exec)
	if err != nil {
		return err
	}
	st := p.State()
	switch {
	case st.Status == StatusStopped:
		return fmt.Errorf("process %q of container %s has stopped: %w", exec, c.id, errdefs.ErrNotFound)
	case st.Status == StatusCreated && exec != "":
		return fmt.Errorf("process %q of container %s has not been started: %w", exec, c.id, errdefs.ErrFailedPrecondition)
	}
	if p.errand != nil {
		p.errand.kill(signal)
		return nil
	}
	a, err := c.s.client(ctx)
	if err != nil {
		return err
	}
	if signal == uint32(unix.SIGKILL) {
		p.mustEnd()
	}
	ctx, cancel := context.WithTimeout(ctx, guestTimeout)
	defer cancel()
	return a.Signal(ctx, c.id, exec, signal, all)
}

// Resize sets a terminal's size in characters.
func (c *Container) Resize(ctx context.Context, exec string, width, height uint32) error {
	p, err := c.process(exec)
	if err != nil {
		return err
	}
	if !p.cfg.Terminal {
		return fmt.Errorf("process %q of container %s has no terminal: %w", exec, c.id, errdefs.ErrFailedPrecondition)
	}
	if p.errand != nil {
		return nil
	}
	a, err := c.s.client(ctx)
	if err != nil {
		return err
	}
	return a.Resize(ctx, c.id, exec, width, height)
}

// CloseStdin ends a process's standard input.
func (c *Container) CloseStdin(exec string) error {
	p, err := c.process(exec)
	if err != nil {
		return err
	}
	p.op.Lock() // the streams are being opened
	defer p.op.Unlock()
	p.io.CloseStdin()
	return nil
}

// Wait blocks until a process has ended.
func (c *Container) Wait(ctx context.Context, exec string) (Exit, error) {
	p, err := c.process(exec)
	if err != nil {
		return Exit{}, err
	}
	select {
	case <-p.stopped:
		return p.State().Exit, nil
	case <-ctx.Done():
		return Exit{}, ctx.Err()
	}
}

// Processes lists the container's first process, always, and what else has been started
// in it and runs: pid by exec id.
func (c *Container) Processes() map[string]uint32 {
	out := map[string]uint32{}
	for _, p := range c.all() {
		if st := p.State(); p.exec == "" || st.Status == StatusRunning || st.Status == StatusPaused {
			out[p.exec] = p.pid
		}
	}
	return out
}
