package container

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
	"github.com/hypernetes/hypernetes/guest/hyperstart/cgroup"
	"github.com/hypernetes/hypernetes/guest/hyperstart/sandbox"
	"github.com/hypernetes/hypernetes/guest/hyperstart/spec"
	"github.com/hypernetes/hypernetes/guest/hyperstart/stdio"
	"github.com/hypernetes/hypernetes/guest/hyperstart/storage"
)

// Container is one OCI container.
type Container struct {
	m      *Manager
	id     string
	bundle string
	group  cgroup.Group
	// sharesPIDs: its init is not PID 1 of its namespace, so its death kills nobody.
	sharesPIDs bool

	// op serialises create, start and delete.
	op      sync.Mutex
	rootfs  *storage.Overlay
	space   *storage.Space
	started bool

	mu    sync.Mutex // guards what follows
	procs map[string]*process
	ooms  uint64
}

func (c *Container) create(ctx context.Context, in *hyperstart.CreateRequest) (uint32, error) {
	if err := c.m.cfg.Volumes.Ensure(ctx, in.Volumes...); err != nil {
		return 0, err
	}
	devices, err := c.devices(ctx, in.BlockDevices)
	if err != nil {
		return 0, err
	}
	pidns, err := c.pidNamespace(in)
	if err != nil {
		return 0, err
	}
	if err := c.makeRootFS(ctx, in.GetRootfs().GetLayerSerials()); err != nil {
		return 0, err
	}
	files := c.m.cfg.Sandbox.Files()
	config, sysctls, err := spec.Fit(in.Spec, spec.Guest{
		ID: c.id, CgroupParent: c.m.cfg.CgroupParent, Terminal: in.Terminal, PIDNamespace: pidns,
		Shm: files.Shm, ResolvConf: files.ResolvConf, Hostname: files.Hostname, Hosts: files.Hosts,
		Own: c.m.cfg.Own, Seccomp: c.m.cfg.Seccomp, Swap: c.m.cfg.Swap, Devices: devices,
	})
	if err != nil {
		return 0, err
	}
	if err := sandbox.WriteSysctls("/proc/sys", sysctls); err != nil {
		return 0, err
	}
	config, sources, err := pin(config, filepath.Join(c.m.cfg.Own, "volumes"), filepath.Join(c.m.cfg.Own, "pins", c.id), c.m.cfg.Volumes.Restrictions)
	if err != nil {
		return 0, err
	}
	defer func() { // crun has mounted them when it returns
		if err := sources.Close(); err != nil {
			log.G(ctx).WithError(err).WithField("container", c.id).Warn("pinned volumes stay")
		}
	}()
	if err := writeConfig(c.bundle, config); err != nil {
		return 0, err
	}
	streams, err := stdio.Open(c.m.cfg.Streams, stdio.Config{
		Container: c.id, Terminal: in.Terminal, Stdin: in.Stdin, Stdout: in.Stdout, Stderr: in.Stderr,
	})
	if err != nil {
		return 0, err
	}
	cp, err := c.m.cfg.Runtime.Create(ctx, c.id, c.bundle, streams.Child(), in.Terminal)
	if err != nil {
		streams.Close()
		return 0, classify(err)
	}
	p := c.adopt(cp, streams)
	// Only a convenience for OOM kills of children: an exit looks at the count itself.
	_ = c.m.cfg.OOM.Watch(c.group, c.checkOOM)
	return uint32(p.pid), nil
}

// devices finds the raw disks a container gets.
func (c *Container) devices(ctx context.Context, in []*hyperstart.BlockDevice) ([]spec.Device, error) {
	var out []spec.Device
	for _, d := range in {
		node, err := c.m.cfg.Volumes.Device(ctx, d.Serial)
		if err != nil {
			return nil, fmt.Errorf("device %s: %w", d.Path, err)
		}
		var st unix.Stat_t
		if err := unix.Stat(node, &st); err != nil {
			return nil, fmt.Errorf("device %s: stat %s: %w", d.Path, node, err)
		}
		out = append(out, spec.Device{
			Path: d.Path, Major: int64(unix.Major(st.Rdev)), Minor: int64(unix.Minor(st.Rdev)), ReadOnly: d.ReadOnly,
		})
	}
	return out, nil
}

func (c *Container) pidNamespace(in *hyperstart.CreateRequest) (string, error) {
	switch {
	case in.PidNamespaceOf != "":
		other, err := c.m.Get(in.PidNamespaceOf)
		if err != nil {
			return "", fmt.Errorf("join PID namespace: %w", err)
		}
		p := other.process("")
		if p == nil || p.exited() {
			return "", fmt.Errorf("join PID namespace of container %s: it does not run: %w", in.PidNamespaceOf, errdefs.ErrFailedPrecondition)
		}
		c.sharesPIDs = true
		return fmt.Sprintf("/proc/%d/ns/pid", p.pid), nil
	case in.SandboxPidNamespace:
		c.sharesPIDs = true
		return c.m.cfg.Sandbox.PIDNamespace()
	}
	return "", nil
}

func (c *Container) makeRootFS(ctx context.Context, serials []string) error {
	scratch, err := c.m.cfg.Sandbox.Scratch()
	if err != nil {
		return err
	}
	rootfs := filepath.Join(c.bundle, "rootfs")
	if err := os.MkdirAll(rootfs, 0o755); err != nil {
		return fmt.Errorf("make bundle: %w", err)
	}
	if c.space, err = scratch.Make(filepath.Join("containers", c.id), 0o711, 0); err != nil {
		return err
	}
	c.rootfs, err = c.m.cfg.Layers.Mount(ctx, serials, c.space.Path, rootfs)
	return err
}

// Start lets the program run.
func (c *Container) Start(ctx context.Context) (uint32, error) {
	c.op.Lock()
	defer c.op.Unlock()
	p := c.process("")
	switch {
	case p == nil:
		return 0, fmt.Errorf("container %s: %w", c.id, errdefs.ErrNotFound)
	case c.started:
		return 0, fmt.Errorf("container %s has been started: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	if err := c.m.cfg.Runtime.Start(ctx, c.id); err != nil {
		return 0, classify(err)
	}
	c.started = true
	return uint32(p.pid), nil
}

func (c *Container) delete(ctx context.Context) (Status, error) {
	c.op.Lock()
	defer c.op.Unlock()
	p := c.process("")
	if p == nil {
		return Status{}, fmt.Errorf("container %s: %w", c.id, errdefs.ErrNotFound)
	}
	if c.started && !p.exited() {
		return Status{}, fmt.Errorf("container %s runs: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	// What it left running in a shared PID namespace, and a program never started.
	if err := c.group.Signal(unix.SIGKILL); err != nil {
		return Status{}, err
	}
	select {
	case <-p.done:
	case <-ctx.Done():
		return Status{}, ctx.Err()
	}
	st := p.result()
	if err := c.remove(context.WithoutCancel(ctx)); err != nil {
		return Status{}, err
	}
	return st, nil
}

// remove takes away whatever has been made of the container.
func (c *Container) remove(ctx context.Context) error {
	errs := []error{c.m.cfg.Runtime.Delete(ctx, c.id)}
	for _, p := range c.takeProcesses() {
		if p.pid > 0 {
			<-p.done
		}
		p.streams.Close()
	}
	if c.rootfs != nil {
		errs = append(errs, c.rootfs.Unmount())
	} else if c.space != nil {
		errs = append(errs, os.RemoveAll(c.space.Path))
	}
	c.m.cfg.Streams.Forget(c.id, "")
	return errors.Join(append(errs, os.RemoveAll(c.bundle))...)
}

// Signal sends a signal to one process, or to every process of the container.
func (c *Container) Signal(exec string, sig uint32, all bool) error {
	if sig > 64 {
		return fmt.Errorf("signal %d: must be 0 to 64: %w", sig, errdefs.ErrInvalidArgument)
	}
	p := c.process(exec)
	if p == nil {
		return fmt.Errorf("process %q of container %s: %w", exec, c.id, errdefs.ErrNotFound)
	}
	if all {
		return c.group.Signal(unix.Signal(sig))
	}
	return p.signal(unix.Signal(sig))
}

// Pids lists the container's processes.
func (c *Container) Pids() ([]*hyperstart.PidInfo, error) {
	pids, err := c.group.Pids()
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	execs := map[int]string{}
	for id, p := range c.procs {
		execs[p.pid] = id
	}
	out := make([]*hyperstart.PidInfo, len(pids))
	for i, pid := range pids {
		out[i] = &hyperstart.PidInfo{Pid: uint32(pid), ExecId: execs[pid]}
	}
	return out, nil
}

// Stats measures the container.
func (c *Container) Stats() (*hyperstart.StatsResponse, error) {
	metrics, err := proto.Marshal(c.group.Metrics())
	if err != nil {
		return nil, fmt.Errorf("marshal metrics: %w", err)
	}
	out := &hyperstart.StatsResponse{Cgroup2Metrics: metrics}
	c.op.Lock()
	space := c.space
	c.op.Unlock()
	if space != nil {
		u, err := space.Usage()
		if err != nil {
			return nil, err
		}
		out.WritableBytes, out.WritableInodes = u.Bytes, u.Inodes
	}
	return out, nil
}

// Update changes the container's resources (OCI LinuxResources as JSON).
func (c *Container) Update(ctx context.Context, resources []byte) error {
	fit, err := spec.Resources(resources, c.m.cfg.Swap)
	if err != nil {
		return err
	}
	return classify(c.m.cfg.Runtime.Update(ctx, c.id, fit))
}

// Freeze pauses or resumes the container.
func (c *Container) Freeze(ctx context.Context, frozen bool) error {
	return c.group.Freeze(ctx, frozen)
}

// checkOOM reports memory kills since it last looked.
func (c *Container) checkOOM() {
	n := c.group.OOMKills()
	c.mu.Lock()
	defer c.mu.Unlock()
	if n > c.ooms {
		c.ooms = n
		c.m.cfg.Events.OOM(c.id)
	}
}
