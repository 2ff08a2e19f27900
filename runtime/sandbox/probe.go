package sandbox

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	probe "github.com/hypernetes/hypernetes/api/probe/v1"
	"github.com/hypernetes/hypernetes/runtime/prober"
	"github.com/hypernetes/hypernetes/runtime/stdio"
)

// An exec of probe.Program is not the guest's business: what runs is a question to the
// node daemon, which looks like a process in everything else.

// errand is what an intercepted exec does instead of running in the guest.
type errand struct {
	argument string

	mu     sync.Mutex
	cancel context.CancelFunc // nil until it is under way
	signal uint32             // that ended it
}

// intercept returns the errand of an exec that is one.
func intercept(process []byte) *errand {
	var p struct {
		Args []string `json:"args"`
	}
	// What cannot be read is for the guest to refuse.
	if json.Unmarshal(process, &p) != nil || len(p.Args) == 0 || p.Args[0] != probe.Program {
		return nil
	}
	e := &errand{}
	if len(p.Args) == 2 {
		e.argument = p.Args[1]
	}
	return e
}

// begin asks the node daemon. If it is not there, the exec fails to start: so the kubelet
// forgets the probe, as it would if it had not been running itself, and restarts nothing
// because of it. op is held.
func (p *process) begin(ctx context.Context) error {
	c := p.c
	if n := len(p.errand.argument); n == 0 || n > probe.MaxArgument {
		return fmt.Errorf("%s: must have one argument of at most %d bytes: %w", probe.Program, probe.MaxArgument, errdefs.ErrInvalidArgument)
	}
	if st := c.init.State(); st.Status != StatusRunning && st.Status != StatusPaused {
		return fmt.Errorf("container %s is not running: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	conn, err := c.s.opt.Prober.Dial(ctx)
	if err != nil {
		return err
	}
	ends, err := p.openLocal(ctx)
	if err != nil {
		_ = conn.Close()
		return err
	}
	ctx, cancel := context.WithCancel(c.s.ctx)
	p.errand.mu.Lock()
	p.errand.cancel = cancel
	p.errand.mu.Unlock()
	c.s.wg.Add(2)
	go func() {
		defer c.s.wg.Done()
		defer cancel()
		p.carryOut(ctx, conn, ends)
	}()
	go func() { // it goes with its container, as a process would; ends with the errand
		defer c.s.wg.Done()
		select {
		case <-c.init.stopped:
			p.errand.kill(uint32(unix.SIGKILL))
		case <-p.stopped:
			cancel() // the VM has ended
		case <-ctx.Done():
		}
	}()
	return nil
}

// openLocal joins the standard streams to pipes whose other ends it returns, nil for
// streams that are not wanted.
func (p *process) openLocal(ctx context.Context) (ends [3]net.Conn, err error) {
	p.io, err = stdio.Open(ctx, p.cfg, p.c.s.opt.Namespace, p.c.id, func(_ context.Context, fd uint32) (net.Conn, error) {
		near, far := net.Pipe()
		ends[fd] = far
		return near, nil
	})
	return ends, err
}

// carryOut asks, writes the answer and ends the process.
func (p *process) carryOut(ctx context.Context, conn net.Conn, ends [3]net.Conn) {
	if stdin := ends[0]; stdin != nil {
		p.c.s.wg.Add(1)
		go func() { // ends when stdin is closed, below
			defer p.c.s.wg.Done()
			_, _ = io.Copy(io.Discard, stdin)
		}()
	}
	pod := p.c.s.pod
	code, output := prober.Ask(ctx, conn, &probe.ProbeRequest{
		PodNamespace: pod.Namespace, PodName: pod.Name, PodUid: pod.UID, Probe: p.errand.argument,
	})
	if stdout := ends[1]; stdout != nil {
		stop := context.AfterFunc(ctx, func() { _ = stdout.SetWriteDeadline(time.Unix(1, 0)) })
		if p.errand.killedBy() == 0 {
			_, _ = io.WriteString(stdout, output)
		}
		stop()
	}
	for _, e := range ends {
		if e != nil {
			_ = e.Close()
		}
	}
	if signal := p.errand.killedBy(); signal != 0 {
		code = 128 + signal
	}
	if p.ends() {
		p.finish(code, time.Now())
	}
}

// kill does what a signal does to a program that has no handlers.
func (e *errand) kill(signal uint32) {
	switch unix.Signal(signal) {
	case 0, unix.SIGCHLD, unix.SIGCONT, unix.SIGURG, unix.SIGWINCH, unix.SIGSTOP, unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU:
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.signal == 0 {
		e.signal = signal
	}
	if e.cancel != nil {
		e.cancel()
	}
}

func (e *errand) killedBy() uint32 {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.signal
}
