// Package container runs the sandbox's OCI containers through crun.
//
// It owns their life from Create to Delete, their processes and what is reported
// about them. It must not know the transport or how volumes and disks are made.
package container

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
	"github.com/hypernetes/hypernetes/guest/hyperstart/cgroup"
	"github.com/hypernetes/hypernetes/guest/hyperstart/crun"
	"github.com/hypernetes/hypernetes/guest/hyperstart/events"
	"github.com/hypernetes/hypernetes/guest/hyperstart/sandbox"
	"github.com/hypernetes/hypernetes/guest/hyperstart/stdio"
	"github.com/hypernetes/hypernetes/guest/hyperstart/storage"
)

// Limits of a sandbox; the shim is trusted, its users' wishes need a bound.
const (
	maxContainers = 1024
	maxExecs      = 1024
)

var validID = regexp.MustCompile(`^[a-zA-Z0-9_-][a-zA-Z0-9._-]{0,127}$`)

// Volumes makes the volumes containers bring and finds their disks.
type Volumes interface {
	Ensure(ctx context.Context, volumes ...*hyperstart.Volume) error
	// Device waits for the disk with that serial and returns its device node.
	Device(ctx context.Context, serial string) (string, error)
	// Restrictions are the options every mount of a volume must have.
	Restrictions(name string) []string
}

// Config is what a Manager works with.
type Config struct {
	// Dir holds bundles, Cgroups is the cgroup2 mount, CgroupParent the containers'
	// parent below it ("/pod").
	Dir, Cgroups, CgroupParent string
	// Own is the prefix of guest paths the shim may use as mount sources.
	Own     string
	Runtime *crun.Runtime
	Sandbox *sandbox.Sandbox
	Volumes Volumes
	Layers  *storage.Layers
	Streams *stdio.Registry
	Events  *events.Log
	OOM     *cgroup.Watcher
	// Seccomp and Swap say what the kernel has.
	Seccomp, Swap bool
}

// Manager runs containers. Its methods may be called concurrently.
type Manager struct {
	cfg Config

	mu         sync.Mutex
	containers map[string]*Container
	closed     bool
	monitors   sync.WaitGroup
}

// New returns a manager without containers.
func New(cfg Config) *Manager {
	return &Manager{cfg: cfg, containers: map[string]*Container{}}
}

// Get returns a created container.
func (m *Manager) Get(id string) (*Container, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := m.containers[id]
	if c == nil {
		return nil, fmt.Errorf("container %.80q: %w", id, errdefs.ErrNotFound)
	}
	return c, nil
}

func (m *Manager) reserve(id string) (*Container, error) {
	if !validID.MatchString(id) {
		return nil, fmt.Errorf("container id %.80q: must match %s: %w", id, validID, errdefs.ErrInvalidArgument)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.closed:
		return nil, fmt.Errorf("sandbox is shutting down: %w", errdefs.ErrFailedPrecondition)
	case m.containers[id] != nil:
		return nil, fmt.Errorf("container %s: %w", id, errdefs.ErrAlreadyExists)
	case len(m.containers) >= maxContainers:
		return nil, fmt.Errorf("more than %d containers: %w", maxContainers, errdefs.ErrResourceExhausted)
	}
	c := &Container{
		m: m, id: id, bundle: filepath.Join(m.cfg.Dir, id), procs: map[string]*process{},
		group: cgroup.Group(filepath.Join(m.cfg.Cgroups, m.cfg.CgroupParent, id)),
	}
	c.op.Lock() // until it is made nobody else works on it
	m.containers[id] = c
	return c, nil
}

func (m *Manager) forget(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.containers, id)
}

// Create makes a container up to the point before its program runs.
func (m *Manager) Create(ctx context.Context, in *hyperstart.CreateRequest) (uint32, error) {
	c, err := m.reserve(in.ContainerId)
	if err != nil {
		return 0, err
	}
	defer c.op.Unlock()
	made := false
	defer func() {
		if !made { // also after a panic, which the server turns into an answer
			m.forget(c.id)
		}
	}()
	pid, err := c.create(ctx, in)
	if err != nil {
		return 0, errors.Join(err, c.remove(context.WithoutCancel(ctx)))
	}
	made = true
	return pid, nil
}

// Delete removes a stopped process, and with exec "" its container.
func (m *Manager) Delete(ctx context.Context, id, exec string) (Status, error) {
	c, err := m.Get(id)
	if err != nil {
		return Status{}, err
	}
	if exec != "" {
		return c.deleteExec(exec)
	}
	st, err := c.delete(ctx)
	if err == nil {
		m.forget(id)
	}
	return st, err
}

// Shutdown ends every container: SIGTERM, SIGKILL once ctx ends, then removal. No
// new container can be made afterwards.
func (m *Manager) Shutdown(ctx context.Context) error {
	m.mu.Lock()
	m.closed = true
	all := make([]*Container, 0, len(m.containers))
	for _, c := range m.containers {
		all = append(all, c)
	}
	m.mu.Unlock()
	if ctx.Err() == nil {
		for _, c := range all {
			_ = c.Signal("", uint32(unix.SIGTERM), false)
		}
	}
	var errs []error
	for _, c := range all {
		if p := c.process(""); p != nil {
			select {
			case <-p.done:
			case <-ctx.Done():
			}
		}
		if err := c.group.Signal(unix.SIGKILL); err != nil {
			errs = append(errs, err)
		}
	}
	for _, c := range all {
		if p := c.process(""); p != nil {
			<-p.done
		}
		if _, err := m.Delete(context.WithoutCancel(ctx), c.id, ""); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Wait returns when every monitor of a process has ended.
func (m *Manager) Wait() { m.monitors.Wait() }

func writeConfig(bundle string, config []byte) error {
	if err := os.WriteFile(filepath.Join(bundle, "config.json"), config, 0o600); err != nil {
		return fmt.Errorf("write bundle: %w", err)
	}
	return nil
}
