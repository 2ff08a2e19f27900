package sandbox

import (
	"context"
	"fmt"
	"io"
	"sync"
	"time"

	stats "github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/hypernetes/hypernetes/guest/channel"
	"github.com/hypernetes/hypernetes/runtime/agent"
	"github.com/hypernetes/hypernetes/runtime/nic"
	"github.com/hypernetes/hypernetes/runtime/podspec"
	"github.com/hypernetes/hypernetes/runtime/record"
	"github.com/hypernetes/hypernetes/runtime/vmm"
	"github.com/hypernetes/hypernetes/runtime/volume"
)

// phase is where a sandbox is in its life; it only grows.
type phase int

const (
	phaseNew      phase = iota // nothing has been made
	phaseCreated               // Create has begun; the VM may be booting
	phaseReady                 // Start has succeeded
	phaseStopping              // the VM is going
	phaseStopped               // everything has been given back
)

// Sandbox is one Pod. New makes it; its methods may be called concurrently.
type Sandbox struct {
	opt Options
	// ctx ends with Close; goroutines of the sandbox live in it and wg.
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	// making is held while Create takes resources, so that Stop sees all or none.
	making sync.Mutex

	mu                  sync.Mutex
	phase               phase
	createdAt, exitedAt time.Time
	reason              string
	containers          map[string]*Container
	lastPID             uint32
	measureAfter        time.Time

	// Set by Create, before the VM runs, and not changed after.
	pod    podspec.Pod
	netns  string
	record record.Record
	group  groupHandle
	vm     vmm.VM
	vmPID  int
	accel  string
	attach *nic.Attachment
	uid    func()
	// volumes are the Pod's persistent ones; storage serves those that are no files.
	volumes    volume.Attached
	storage    Storage
	storageUID func()
	growing    sync.Mutex
	throttling sync.Mutex
	// turn ends this VM's turn to boot.
	turn   func()
	layers *layers

	// booted is closed when the guest is configured or bootErr says why not.
	booted  chan struct{}
	bootErr error
	host    *channel.Host
	agent   *agent.Client
	watcher *volume.Watcher
	forward io.Closer
	// stopped is closed when the sandbox is.
	stopped chan struct{}
	release sync.Once
	console *tail
}

// New returns a sandbox that is nothing but a name.
func New(opt Options) *Sandbox {
	ctx, cancel := context.WithCancel(log.WithLogger(context.Background(), log.L.WithField("sandbox", opt.ID)))
	return &Sandbox{
		opt: opt, ctx: ctx, cancel: cancel, containers: map[string]*Container{},
		lastPID: pidBase, booted: make(chan struct{}), stopped: make(chan struct{}), console: &tail{},
	}
}

// ID is the sandbox's name.
func (s *Sandbox) ID() string { return s.opt.ID }

// pidBase is the greatest pid a Linux kernel gives (2^22): reported pids are above it,
// so that no tool takes one for a process of the host.
const pidBase = 1 << 22

// nextPID numbers the Pod's processes.
func (s *Sandbox) nextPID() uint32 {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lastPID++
	return s.lastPID
}

// Create takes the host resources and starts the VM; it does not wait for the guest.
//
// Errors: errdefs.ErrAlreadyExists the second time, else by what was refused.
func (s *Sandbox) Create(ctx context.Context, options *anypb.Any, netns string) error {
	s.making.Lock()
	defer s.making.Unlock()
	s.mu.Lock()
	if s.phase != phaseNew {
		s.mu.Unlock()
		return fmt.Errorf("sandbox %s: %w", s.opt.ID, errdefs.ErrAlreadyExists)
	}
	s.phase, s.createdAt = phaseCreated, time.Now()
	s.mu.Unlock()
	if err := s.create(ctx, options, netns); err != nil {
		s.bootErr = err
		close(s.booted)
		s.end("creation failed")
		return err
	}
	s.wg.Add(2)
	go s.boot()
	go s.supervise()
	return nil
}

// Start waits until the guest is configured.
//
// Errors: errdefs.ErrFailedPrecondition before Create and after Stop.
func (s *Sandbox) Start(ctx context.Context) (pid uint32, createdAt time.Time, err error) {
	if err := s.awaitBoot(ctx); err != nil {
		return 0, time.Time{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch s.phase {
	case phaseCreated:
		s.phase = phaseReady
	case phaseReady:
	default:
		return 0, time.Time{}, fmt.Errorf("sandbox %s has been stopped (%s): %w", s.opt.ID, s.reason, errdefs.ErrFailedPrecondition)
	}
	return uint32(s.vmPID), s.createdAt, nil
}

// awaitBoot waits for the guest's agent to be usable.
func (s *Sandbox) awaitBoot(ctx context.Context) error {
	s.mu.Lock()
	created := s.phase != phaseNew
	s.mu.Unlock()
	if !created {
		return fmt.Errorf("sandbox %s has not been created: %w", s.opt.ID, errdefs.ErrFailedPrecondition)
	}
	select {
	case <-s.booted:
		return s.bootErr
	case <-ctx.Done():
		return fmt.Errorf("guest is not up yet: %w", ctx.Err())
	}
}

// client returns the agent of a running sandbox.
func (s *Sandbox) client(ctx context.Context) (*agent.Client, error) {
	if err := s.awaitBoot(ctx); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.phase >= phaseStopping {
		return nil, fmt.Errorf("sandbox %s is not running (%s): %w", s.opt.ID, s.reason, errdefs.ErrFailedPrecondition)
	}
	return s.agent, nil
}

// Condition is how the sandbox is, from memory.
type Condition struct {
	PID                 uint32
	Ready               bool
	Created             bool
	CreatedAt, ExitedAt time.Time
	// Reason is why it is not ready, for people.
	Reason string
}

// Condition tells how the sandbox is.
func (s *Sandbox) Condition() Condition {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := Condition{
		Created: s.phase != phaseNew, Ready: s.phase == phaseReady,
		CreatedAt: s.createdAt, ExitedAt: s.exitedAt, Reason: s.reason,
	}
	if s.phase == phaseCreated || s.phase == phaseReady {
		st.PID = uint32(s.vmPID)
	}
	return st
}

// Wait blocks until the sandbox has stopped.
//
// Errors: errdefs.ErrFailedPrecondition before Create.
func (s *Sandbox) Wait(ctx context.Context) (time.Time, error) {
	if !s.Condition().Created {
		return time.Time{}, fmt.Errorf("sandbox %s has not been created: %w", s.opt.ID, errdefs.ErrFailedPrecondition)
	}
	select {
	case <-s.stopped:
		return s.Condition().ExitedAt, nil
	case <-ctx.Done():
		return time.Time{}, ctx.Err()
	}
}

// Ping asks the guest whether it is there.
func (s *Sandbox) Ping(ctx context.Context) error {
	a, err := s.client(ctx)
	if err != nil {
		return err
	}
	_, late := s.opt.Config.Heartbeat(s.accel)
	return a.Ping(ctx, late)
}

// Metrics measures the VMM and shim on the host: what the Pod costs.
//
// Errors: errdefs.ErrFailedPrecondition if it does not run.
func (s *Sandbox) Metrics() (*stats.Metrics, error) {
	if st := s.Condition(); st.PID == 0 {
		return nil, fmt.Errorf("sandbox %s does not run: %w", s.opt.ID, errdefs.ErrFailedPrecondition)
	}
	return s.group.metrics(s.vmPID), nil
}

// Stop ends the VM: gently as long as grace (0: a default), then at once. It is
// idempotent and returns when everything has been given back.
func (s *Sandbox) Stop(ctx context.Context, grace time.Duration) error {
	s.making.Lock()
	defer s.making.Unlock()
	s.mu.Lock()
	was := s.phase
	if was < phaseStopping {
		s.reason = "stopped"
		s.phase = phaseStopping
	}
	s.mu.Unlock()
	if was == phaseNew {
		s.bootErr = fmt.Errorf("sandbox %s was stopped before it was created: %w", s.opt.ID, errdefs.ErrFailedPrecondition)
		close(s.booted)
		s.end("stopped")
		return nil
	}
	if was < phaseStopping {
		s.shutdown(ctx, grace)
	}
	select {
	case <-s.stopped:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("sandbox %s is still stopping: %w", s.opt.ID, ctx.Err())
	}
}

const (
	// defaultGrace is what containers that still run get; CRI has stopped them before.
	defaultGrace = 2 * time.Second
	// powerOff is how long the guest may take to unmount and power off after that, and
	// unmount how much longer to write back what volumes have not got yet.
	powerOff = 10 * time.Second
	unmount  = 30 * time.Second
)

func (s *Sandbox) shutdown(ctx context.Context, grace time.Duration) {
	if grace <= 0 {
		grace = defaultGrace
	}
	limit := grace + powerOff
	if len(s.volumes) > 0 {
		limit += unmount
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	select {
	case <-s.booted:
	default:
		// A guest that is still booting has nothing to lose.
		_ = s.vm.Kill()
		return
	}
	if s.agent == nil || s.agent.Shutdown(ctx, grace) != nil {
		_ = s.vm.Kill()
		return
	}
	select {
	case <-s.vm.Done():
	case <-ctx.Done():
		_ = s.vm.Kill()
	}
}

// Close stops the sandbox and waits for its goroutines.
func (s *Sandbox) Close(ctx context.Context) error {
	err := s.Stop(ctx, 0)
	if err != nil && s.vm != nil {
		_ = s.vm.Kill()
	}
	s.cancel()
	s.wg.Wait()
	return err
}
