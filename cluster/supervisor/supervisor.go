// Package supervisor owns the life of a node's component processes: ordered and
// concurrent start, readiness, respawn with back-off, adoption of processes that
// outlived an earlier supervisor, and stop in reverse order. It must not know what
// the components are for.
//
// Life of a component:
//
//	pending --deps ready--> starting --Ready()--> ready --Stop--> stopped
//	                          ^  |                  |
//	                          |  exit               exit
//	                          |  v                  |
//	                          backoff <-------------'   250 ms doubling to 30 s,
//	                                                    back to 250 ms after 60 s up
//
// A component that was ready is asked again now and then; one that no longer answers is
// unready until it does, and is not restarted: only its end is.
//
// The context of Start cancels waiting for readiness only; Stop stops components.
package supervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/hypernetes/hypernetes/cluster/node"
	"github.com/hypernetes/hypernetes/proc"
)

const (
	backoffMin   = 250 * time.Millisecond
	backoffMax   = 30 * time.Second
	healthyAfter = 60 * time.Second
	readyPoll    = 50 * time.Millisecond
	// failedRestarts in failedWindow mark a component as failing in the status; it is
	// still respawned, since the cause may be outside it and may pass.
	failedRestarts = 5
	failedWindow   = 2 * time.Minute
	// watchEvery is how often a component that was ready is asked again, and
	// unreadyAfter how many times in a row it must not answer to be unready.
	watchEvery   = 10 * time.Second
	watchTimeout = 5 * time.Second
	unreadyAfter = 3
)

// Spec is one component.
type Spec struct {
	Name string
	Path string   // executable
	Args []string // Args[0] is the name it is called by
	Env  []string
	// After names the components that must be ready before this one starts.
	After []string
	// Gate, if set, is closed when what else it needs is there; it starts no sooner.
	Gate <-chan struct{}
	// Ready returns nil once the component serves; it is polled and must not block
	// longer than a second.
	Ready func(ctx context.Context) error
	// StopTimeout is the time between SIGTERM and SIGKILL.
	StopTimeout time.Duration
	// Launcher starts it instead of the supervisor's launcher, if set.
	Launcher Launcher
	// Inputs are the configuration files it reads, path to content; a process started
	// with others is not adopted.
	Inputs map[string]string
}

// Launcher starts a process where components live.
type Launcher interface {
	Start(cmd *exec.Cmd, component string) error
	// Strays returns the component's processes with these arguments, which an earlier
	// supervisor started and did not live to record.
	Strays(component string, args []string) []proc.ID
}

// Files tells the supervisor where a component's log and pid record are.
type Files struct {
	Log    func(component string) string
	Record func(component string) string
}

// State of a component.
type State string

// States of a component; failing is backoff after many restarts in a short time.
const (
	Pending  State = "pending"
	Starting State = "starting"
	Ready    State = "ready"
	Unready  State = "unready"
	Backoff  State = "backoff"
	Failing  State = "failing"
	Stopped  State = "stopped"
)

// Status is what is known about a component.
type Status struct {
	Name     string    `json:"name"`
	State    State     `json:"state"`
	PID      int       `json:"pid,omitempty"`
	Restarts int       `json:"restarts"`
	Adopted  bool      `json:"adopted,omitempty"`
	Since    time.Time `json:"since"`
	// ReadySeconds is the time from start to ready of the latest start.
	ReadySeconds float64 `json:"readySeconds,omitempty"`
	LastError    string  `json:"lastError,omitempty"`
	Log          string  `json:"log"`
}

// Supervisor keeps components running.
type Supervisor struct {
	launcher   Launcher
	files      Files
	components []*component
	watchEvery time.Duration
	// failing gets the first component that is failing before it was ever ready.
	failing chan *component
	// OnReady is called once per component when it is ready for the first time.
	OnReady func(name string, took time.Duration, adopted bool)
}

// New prepares components without starting any. It fails with
// errdefs.ErrInvalidArgument when After names an unknown or later component.
func New(launcher Launcher, files Files, specs []Spec) (*Supervisor, error) {
	s := &Supervisor{launcher: launcher, files: files, watchEvery: watchEvery, failing: make(chan *component, 1)}
	for _, spec := range specs {
		c := &component{spec: spec, sup: s, firstReady: make(chan struct{})}
		c.set(Pending, nil)
		for _, dep := range spec.After {
			i := slices.IndexFunc(s.components, func(o *component) bool { return o.spec.Name == dep })
			if i < 0 {
				return nil, fmt.Errorf("component %s: after %q, which is not listed before it: %w", spec.Name, dep, errdefs.ErrInvalidArgument)
			}
			c.deps = append(c.deps, s.components[i])
			s.components[i].dependents = append(s.components[i].dependents, c)
		}
		s.components = append(s.components, c)
	}
	return s, nil
}

// Start starts every component after those it depends on and returns when all have
// been ready once, ctx ends, or a component that was never ready keeps failing: then
// its last words say more than the end of patience would. Components stay supervised
// in any case.
func (s *Supervisor) Start(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	for _, c := range s.components {
		c.run(context.WithoutCancel(ctx))
	}
	for _, c := range s.components {
		select {
		case <-c.firstReady:
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %w", c.spec.Name, errors.Join(ctx.Err(), c.lastErr()))
		case bad := <-s.failing:
			return fmt.Errorf("%s keeps failing: %w", bad.spec.Name, bad.lastErr())
		}
	}
	return nil
}

// WaitReady waits until one component has been ready once.
func (s *Supervisor) WaitReady(ctx context.Context, name string) error {
	for _, c := range s.components {
		if c.spec.Name != name {
			continue
		}
		select {
		case <-c.firstReady:
			return nil
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %w", name, errors.Join(ctx.Err(), c.lastErr()))
		}
	}
	return fmt.Errorf("component %q: %w", name, errdefs.ErrNotFound)
}

// Stop stops every component after those that depend on it and waits for the end of
// all of them. It may be called more than once. Only names are stopped if given.
func (s *Supervisor) Stop(names ...string) {
	var wg sync.WaitGroup
	for _, c := range s.components {
		if len(names) > 0 && !slices.Contains(names, c.spec.Name) {
			continue
		}
		wg.Go(func() {
			for _, d := range c.dependents {
				if len(names) == 0 {
					d.stop()
				}
			}
			c.stop()
		})
	}
	wg.Wait()
}

// Status returns the state of every component in start order.
func (s *Supervisor) Status() []Status {
	out := make([]Status, 0, len(s.components))
	for _, c := range s.components {
		c.mu.Lock()
		st := c.status
		c.mu.Unlock()
		out = append(out, st)
	}
	return out
}

type component struct {
	spec       Spec
	sup        *Supervisor
	deps       []*component
	dependents []*component

	mu         sync.Mutex
	status     Status
	starts     []time.Time
	cancel     context.CancelFunc
	done       chan struct{}
	firstReady chan struct{} // closed by the component's goroutine
	readyOnce  sync.Once
}

func (c *component) set(state State, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.status.Name, c.status.State, c.status.Since = c.spec.Name, state, time.Now()
	c.status.Log = c.sup.files.Log(c.spec.Name)
	if err != nil {
		c.status.LastError = err.Error()
	}
	if state == Ready {
		c.status.LastError = ""
	}
}

func (c *component) lastErr() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.status.LastError == "" {
		return nil
	}
	return errors.New(c.status.LastError)
}

func (c *component) run(ctx context.Context) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.done != nil {
		return
	}
	ctx, c.cancel = context.WithCancel(ctx)
	c.done = make(chan struct{})
	go func() {
		defer close(c.done)
		c.loop(ctx)
	}()
}

func (c *component) stop() {
	c.mu.Lock()
	cancel, done := c.cancel, c.done
	c.mu.Unlock()
	if done == nil {
		return
	}
	cancel()
	<-done
}

// loop is the component's owner: it starts, watches and ends its processes.
func (c *component) loop(ctx context.Context) {
	defer c.set(Stopped, nil)
	for _, d := range c.deps {
		select {
		case <-d.firstReady:
		case <-ctx.Done():
			return
		}
	}
	if c.spec.Gate != nil {
		select {
		case <-c.spec.Gate:
		case <-ctx.Done():
			return
		}
	}
	ctx = log.WithLogger(ctx, log.G(ctx).WithField("component", c.spec.Name))
	delay := backoffMin
	for ctx.Err() == nil {
		began := time.Now()
		err := c.once(ctx)
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > healthyAfter {
			delay = backoffMin
		}
		log.G(ctx).WithError(err).WithField("after", delay).Warn("component ended; respawning")
		c.set(c.backoffState(), err)
		c.tellFailing()
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return
		}
		delay = min(2*delay, backoffMax)
		c.mu.Lock()
		c.status.Restarts++
		c.mu.Unlock()
	}
}

// tellFailing tells Start about a component that will not become ready.
func (c *component) tellFailing() {
	c.mu.Lock()
	failing := c.status.State == Failing
	c.mu.Unlock()
	select {
	case <-c.firstReady:
		return
	default:
	}
	if failing {
		select {
		case c.sup.failing <- c:
		default: // Start needs only one
		}
	}
}

func (c *component) backoffState() State {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	c.starts = append(slices.DeleteFunc(c.starts, func(t time.Time) bool { return now.Sub(t) > failedWindow }), now)
	if len(c.starts) >= failedRestarts {
		return Failing
	}
	return Backoff
}

// once runs one process of the component, an adopted or a new one, to its end.
func (c *component) once(ctx context.Context) error {
	began := time.Now()
	p, adopted, err := c.process(ctx)
	if err != nil {
		return err
	}
	c.mu.Lock()
	c.status.PID, c.status.Adopted = p.PID, adopted
	c.mu.Unlock()
	c.set(Starting, nil)

	exited := make(chan error, 1)
	stopR, stopW, err := os.Pipe()
	if err != nil {
		return err
	}
	defer stopR.Close()
	go func() {
		_, err := p.Wait(stopR)
		exited <- err
	}()
	defer func() {
		_ = stopW.Close()
		c.mu.Lock()
		c.status.PID = 0
		c.mu.Unlock()
	}()

	readyCtx, endPolling := context.WithCancel(ctx)
	var polling sync.WaitGroup
	polling.Go(func() { c.awaitReady(readyCtx, began) })
	defer polling.Wait()
	defer endPolling()

	select {
	case err := <-exited:
		return errors.Join(c.ended(p.PID), err)
	case <-ctx.Done():
		c.terminate(p, exited)
		_ = os.Remove(c.sup.files.Record(c.spec.Name))
		return ctx.Err()
	}
}

// ended explains the end of the process as well as the log allows.
func (c *component) ended(pid int) error {
	return fmt.Errorf("process %d ended; last words: %s", pid, wordsOf(c.sup.files.Log(c.spec.Name)))
}

func (c *component) awaitReady(ctx context.Context, began time.Time) {
	tick := time.NewTicker(readyPoll)
	defer tick.Stop()
	for {
		probe, cancel := context.WithTimeout(ctx, time.Second)
		err := c.spec.Ready(probe)
		cancel()
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			break
		}
		c.mu.Lock()
		c.status.LastError = err.Error()
		c.mu.Unlock()
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
	took := time.Since(began)
	c.set(Ready, nil)
	c.mu.Lock()
	c.status.ReadySeconds = took.Seconds()
	adopted := c.status.Adopted
	c.mu.Unlock()
	c.readyOnce.Do(func() {
		if c.sup.OnReady != nil {
			c.sup.OnReady(c.spec.Name, took, adopted)
		}
		close(c.firstReady)
	})
	c.watch(ctx)
}

// watch keeps the state of a running component true, and its log bounded, until ctx ends.
func (c *component) watch(ctx context.Context) {
	tick := time.NewTicker(c.sup.watchEvery)
	defer tick.Stop()
	for failures := 0; ; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := node.TrimLog(c.sup.files.Log(c.spec.Name)); err != nil {
			log.G(ctx).WithError(err).Warn("component's log grows on: it could not be moved aside")
		}
		probe, cancel := context.WithTimeout(ctx, watchTimeout)
		err := c.spec.Ready(probe)
		cancel()
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			if failures >= unreadyAfter {
				c.set(Ready, nil)
			}
			failures = 0
		default:
			if failures++; failures == unreadyAfter {
				log.G(ctx).WithError(err).Warn("component runs but does not answer")
				c.set(Unready, err)
			}
		}
	}
}

// terminate asks the process to end and insists after StopTimeout.
func (c *component) terminate(p proc.ID, exited <-chan error) {
	timeout := c.spec.StopTimeout
	if timeout == 0 {
		timeout = 10 * time.Second
	}
	_ = p.Signal(syscall.SIGTERM)
	select {
	case <-exited:
		return
	case <-time.After(timeout):
	}
	_ = p.Signal(syscall.SIGKILL)
	<-exited
}
