package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	stats "github.com/containerd/cgroups/v3/cgroup2/stats"
	eventsapi "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
	"github.com/hypernetes/hypernetes/runtime/disk"
	"github.com/hypernetes/hypernetes/runtime/ocispec"
	"github.com/hypernetes/hypernetes/runtime/stdio"
	"github.com/hypernetes/hypernetes/runtime/volume"
)

// Container is one OCI container of the Pod.
type Container struct {
	s      *Sandbox
	id     string
	bundle string

	serials []string
	pod     volume.Pod
	plan    *volume.Plan

	// init is the first process.
	init *process

	// deleting serialises Delete.
	deleting sync.Mutex

	mu      sync.Mutex
	procs   map[string]*process
	paused  bool
	lastOOM time.Time
}

// CreateRequest is containerd's, without what a VM does not use.
type CreateRequest struct {
	ID, Bundle string
	RootFS     []*types.Mount
	Stdio      stdio.Config
}

// lookup returns a container or nil.
func (s *Sandbox) lookup(id string) *Container {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.containers[id]
}

// Container returns a container.
//
// Errors: errdefs.ErrNotFound.
func (s *Sandbox) Container(id string) (*Container, error) {
	if c := s.lookup(id); c != nil {
		return c, nil
	}
	return nil, fmt.Errorf("container %s: %w", id, errdefs.ErrNotFound)
}

// CreateContainer makes a container in the guest; Start runs it.
func (s *Sandbox) CreateContainer(ctx context.Context, r CreateRequest) (pid uint32, err error) {
	a, err := s.client(ctx)
	if err != nil {
		return 0, err
	}
	c := &Container{s: s, id: r.ID, bundle: r.Bundle, procs: map[string]*process{}}
	c.pod = volume.Pod{KubeletRoot: s.opt.Config.KubeletRoot, UID: s.pod.UID}
	p := newProcess(c, "", s.nextPID(), r.Stdio)
	c.init, c.procs[""] = p, p
	// Known before the guest hears of it: an exit must find it.
	p.op.Lock()
	defer p.op.Unlock()
	s.mu.Lock()
	if s.containers[r.ID] != nil || r.ID == s.opt.ID {
		s.mu.Unlock()
		return 0, fmt.Errorf("container %s: %w", r.ID, errdefs.ErrAlreadyExists)
	}
	s.containers[r.ID] = c
	s.mu.Unlock()
	request, err := c.prepare(ctx, r)
	if err == nil {
		err = c.make(ctx, a, request, p)
	}
	if err != nil {
		c.undo(p)
		return 0, err
	}
	s.opt.Publisher.Publish("/tasks/create", &eventsapi.TaskCreate{
		ContainerID: c.id, Bundle: c.bundle, Rootfs: r.RootFS, Pid: p.pid,
		IO: &eventsapi.TaskIO{Stdin: r.Stdio.Stdin, Stdout: r.Stdio.Stdout, Stderr: r.Stdio.Stderr, Terminal: r.Stdio.Terminal},
	})
	return p.pid, nil
}

// prepare decides what the guest is asked for; it touches neither guest nor VM.
func (c *Container) prepare(ctx context.Context, r CreateRequest) (*hyperstart.CreateRequest, error) {
	spec, err := readSpec(c.bundle)
	if err != nil {
		return nil, err
	}
	if ocispec.IsSandbox(spec) {
		return nil, fmt.Errorf("container %s is a pause container, a VM needs none; remedy: sandboxer = 'shim' for this runtime in containerd's configuration: %w", c.id, errdefs.ErrInvalidArgument)
	}
	root, err := disk.ParseRootFS(r.RootFS)
	if err != nil {
		return nil, fmt.Errorf("root file system: %w", err)
	}
	attached, err := c.s.placeholders()
	if err != nil {
		return nil, err
	}
	c.pod.Resolvers = []volume.Resolver{attached}
	if c.plan, err = c.pod.Plan(ctx, spec.Mounts); err != nil {
		return nil, err
	}
	guest, pidns, err := ocispec.Guest(spec, c.id, c.plan.Mounts)
	if err != nil {
		return nil, err
	}
	devices, err := attached.Devices(spec)
	if err != nil {
		return nil, err
	}
	in, out, errw := r.Stdio.Wants()
	q := &hyperstart.CreateRequest{
		ContainerId: c.id, Spec: guest, Rootfs: &hyperstart.RootFS{}, Terminal: r.Stdio.Terminal,
		Stdin: in, Stdout: out, Stderr: errw, BlockDevices: devices,
	}
	if err := c.joinPIDs(pidns, q); err != nil {
		return nil, err
	}
	// Layer paths travel in the request until they are serials.
	q.Rootfs.LayerSerials = root.Layers
	return q, nil
}

func readSpec(bundle string) (*specs.Spec, error) {
	f, err := os.Open(filepath.Join(bundle, "config.json"))
	if err != nil {
		return nil, fmt.Errorf("runtime spec: %w: %w", err, errdefs.ErrNotFound)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("runtime spec: %w", err)
	}
	b := make([]byte, min(st.Size(), ocispec.MaxSpec+1))
	n, err := f.ReadAt(b, 0)
	if n < len(b) {
		return nil, fmt.Errorf("runtime spec: %w", err)
	}
	return ocispec.Parse(b)
}

// joinPIDs translates a reported pid to the container whose processes are to be seen.
func (c *Container) joinPIDs(ns ocispec.PIDNamespace, q *hyperstart.CreateRequest) error {
	switch {
	case ns.Sandbox || ns.PID != 0 && int(ns.PID) == c.s.vmPID:
		q.SandboxPidNamespace = c.s.pod.SharePIDNamespace
		return nil
	case ns.PID == 0:
		return nil
	}
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	for _, other := range c.s.containers {
		if other != c && other.init.pid == ns.PID {
			q.PidNamespaceOf = other.id
			return nil
		}
	}
	return fmt.Errorf("runtime spec: linux.namespaces: process %d is of no container of this pod: %w", ns.PID, errdefs.ErrInvalidArgument)
}

// agentClient is what a container asks of the guest.
type agentClient interface {
	PutFiles(ctx context.Context, puts []*hyperstart.PutFilesRequest) error
	Create(ctx context.Context, r *hyperstart.CreateRequest) error
}

// make plugs the layers, brings the volumes and creates the container.
func (c *Container) make(ctx context.Context, a agentClient, q *hyperstart.CreateRequest, p *process) error {
	var err error
	if c.serials, err = c.s.layers.add(ctx, q.Rootfs.LayerSerials); err != nil {
		return err
	}
	q.Rootfs.LayerSerials = c.serials
	volumes, puts := c.plan.Requests()
	q.Volumes = volumes
	if err := a.PutFiles(ctx, puts); err != nil {
		return err
	}
	if err := p.openIO(ctx); err != nil {
		return err
	}
	p.setKnown()
	if err := a.Create(ctx, q); err != nil {
		return fmt.Errorf("create container in the guest: %w", err)
	}
	c.s.watcher.Add(c.plan)
	return nil
}

// undo takes back a creation that failed.
func (c *Container) undo(p *process) {
	p.io.Close()
	ctx, cancel := context.WithTimeout(c.s.ctx, guestTimeout)
	defer cancel()
	if p.inGuest() && c.s.agent.Delete(ctx, c.id, "") != nil {
		// Usually it has undone its part, and knows nothing of the container.
		log.G(c.s.ctx).WithField("container", c.id).Debug("nothing to remove in the guest")
	}
	if len(c.serials) > 0 {
		c.s.layers.remove(ctx, c.serials)
	}
	c.s.mu.Lock()
	delete(c.s.containers, c.id)
	c.s.mu.Unlock()
}

// guestTimeout bounds calls of the guest that no caller's deadline bounds.
const guestTimeout = 30 * time.Second

// process returns a process.
//
// Errors: errdefs.ErrNotFound.
func (c *Container) process(exec string) (*process, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if p := c.procs[exec]; p != nil {
		return p, nil
	}
	return nil, fmt.Errorf("process %q of container %s: %w", exec, c.id, errdefs.ErrNotFound)
}

func (c *Container) all() []*process {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make([]*process, 0, len(c.procs))
	for _, p := range c.procs {
		out = append(out, p)
	}
	return out
}

// exitAll ends every process, as the VM has.
func (c *Container) exitAll(status uint32, at time.Time) {
	for _, p := range c.all() {
		p.setExit(status, at)
	}
}

// guestExit believes a guest that a process it was given has ended, and no more.
func (c *Container) guestExit(e *hyperstart.Exit, at time.Time) {
	p, err := c.process(e.ExecId)
	if err != nil || p.errand != nil || !p.ends() {
		return
	}
	if now := time.Now(); at.After(now) || at.Before(c.s.Condition().CreatedAt) {
		at = now // a guest's clock may be anything
	}
	c.s.wg.Add(1)
	go func() {
		defer c.s.wg.Done()
		p.finish(min(e.Status, 255), at)
	}()
}

func (c *Container) oom() {
	if !c.oomIsNews(time.Now()) {
		return
	}
	c.s.opt.Publisher.Publish("/tasks/oom", &eventsapi.TaskOOM{ContainerID: c.id})
}

// readBack copies termination messages out of the guest before anybody hears of the
// container's end.
func (c *Container) readBack() {
	if c.plan == nil {
		return
	}
	for _, d := range c.plan.Decisions {
		if d.ReadBack == "" || d.Volume == nil {
			continue
		}
		ctx, cancel := context.WithTimeout(c.s.ctx, guestTimeout)
		data, err := c.s.agent.ReadFile(ctx, d.Volume.Name, "", volume.TerminationLimit)
		cancel()
		if err == nil && len(data) > 0 {
			err = c.pod.WriteBack(d.ReadBack, data)
		}
		if err != nil && !errdefs.IsUnavailable(err) {
			log.G(c.s.ctx).WithError(err).WithField("container", c.id).Warn("termination message is lost")
		}
	}
}

// Delete removes a stopped process; exec "" is the container.
func (c *Container) Delete(ctx context.Context, exec string) (Exit, error) {
	c.deleting.Lock()
	defer c.deleting.Unlock()
	p, err := c.process(exec)
	if err != nil {
		return Exit{}, err
	}
	st := p.State()
	if st.Status == StatusRunning || st.Status == StatusPaused {
		return Exit{}, fmt.Errorf("process %q of container %s runs: %w", exec, c.id, errdefs.ErrFailedPrecondition)
	}
	// A Start under way would join streams that nobody closes.
	if st.Status == StatusStopped {
		p.op.Lock()
	} else if !p.op.TryLock() {
		return Exit{}, fmt.Errorf("process %q of container %s is being started: %w", exec, c.id, errdefs.ErrFailedPrecondition)
	}
	defer p.op.Unlock()
	if st = p.State(); st.Status == StatusRunning {
		return Exit{}, fmt.Errorf("process %q of container %s runs: %w", exec, c.id, errdefs.ErrFailedPrecondition)
	}
	if err := c.deleteInGuest(ctx, p); err != nil {
		return Exit{}, err
	}
	if st.Status == StatusCreated {
		p.setExit(killedStatus, time.Now())
		st = p.State()
	}
	p.io.Close()
	if exec == "" {
		c.remove(ctx)
	} else {
		c.mu.Lock()
		delete(c.procs, exec)
		c.mu.Unlock()
	}
	c.s.opt.Publisher.Publish("/tasks/delete", deleteEvent(c.id, exec, st.Exit))
	return st.Exit, nil
}

// deleteInGuest tolerates a guest that is gone or knows nothing of the process.
func (c *Container) deleteInGuest(ctx context.Context, p *process) error {
	if p.exec != "" && !p.inGuest() {
		return nil
	}
	a, err := c.s.client(ctx)
	if err != nil {
		if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
			return err
		}
		return nil
	}
	limit, overdue := guestTimeout, p.deleteOverdue()
	if overdue {
		limit = lastTry // the caller shall still hear of the success
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err = a.Delete(ctx, c.id, p.exec)
	if err == nil || errdefs.IsNotFound(err) || errdefs.IsUnavailable(err) {
		return nil
	}
	if overdue {
		log.G(c.s.ctx).WithError(err).WithField("container", c.id).Warn("guest does not remove a process, it is forgotten")
		return nil
	}
	return fmt.Errorf("delete in the guest: %w", err)
}

func (c *Container) remove(ctx context.Context) {
	for _, p := range c.all() {
		p.io.Close()
	}
	c.s.mu.Lock()
	delete(c.s.containers, c.id)
	gone := c.s.phase >= phaseStopping
	c.s.mu.Unlock()
	if !gone {
		c.s.layers.remove(context.WithoutCancel(ctx), c.serials)
	}
}

// Stats measures the container in the guest.
func (c *Container) Stats(ctx context.Context) (*stats.Metrics, error) {
	a, err := c.s.client(ctx)
	if err != nil {
		return nil, err
	}
	if err := c.s.measurable(time.Now()); err != nil {
		return nil, err
	}
	out, err := a.Stats(ctx, c.id)
	if err != nil {
		if errors.Is(err, context.DeadlineExceeded) {
			c.s.pauseMeasuring(time.Now())
		}
		return nil, err
	}
	m, err := metrics(out.Cgroup2Metrics, c.s.pod.MemoryBytes)
	if err != nil {
		return nil, fmt.Errorf("guest's metrics of container %s: %w", c.id, err)
	}
	return m, nil
}

// Update changes the container's resources: OCI LinuxResources as JSON.
func (c *Container) Update(ctx context.Context, resources []byte) error {
	a, err := c.s.client(ctx)
	if err != nil {
		return err
	}
	return a.Update(ctx, c.id, resources)
}

// Pause stops the container's processes, Resume lets them go on.
func (c *Container) Pause(ctx context.Context) error { return c.freeze(ctx, true) }

// Resume is Pause's inverse.
func (c *Container) Resume(ctx context.Context) error { return c.freeze(ctx, false) }

func (c *Container) freeze(ctx context.Context, frozen bool) error {
	a, err := c.s.client(ctx)
	if err != nil {
		return err
	}
	call, topic := a.Resume, "/tasks/resumed"
	var event proto.Message = &eventsapi.TaskResumed{ContainerID: c.id}
	if frozen {
		call, topic = a.Pause, "/tasks/paused"
		event = &eventsapi.TaskPaused{ContainerID: c.id}
	}
	if err := call(ctx, c.id); err != nil {
		return err
	}
	c.mu.Lock()
	c.paused = frozen
	c.mu.Unlock()
	c.s.opt.Publisher.Publish(topic, event)
	return nil
}

func (c *Container) isPaused() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.paused
}
