package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/hypernetes/hypernetes/runtime/vmm"
	"github.com/hypernetes/hypernetes/runtime/vmm/qemu/qmp"
)

// endGrace bounds how long the connections of a QEMU that is gone may take to end.
const endGrace = 2 * time.Second

// maxDiskErrors is how many a VM has in the log.
const maxDiskErrors = 16

// VMM starts QEMUs. It is stateless and may be used concurrently.
type VMM struct{ host Host }

// New returns a VMM for what Probe found.
func New(h Host) *VMM { return &VMM{host: h} }

var _ vmm.VMM = (*VMM)(nil)

// Start implements vmm.VMM. An empty Accelerator is the host's; Binary, if set, must be
// the one that was probed.
func (v *VMM) Start(ctx context.Context, cfg vmm.Config) (vmm.VM, error) {
	if cfg.Accelerator == "" || cfg.Accelerator == "auto" {
		cfg.Accelerator = v.host.Accelerator
	}
	if err := validate(cfg); err != nil {
		return nil, err
	}
	if err := v.check(cfg); err != nil {
		return nil, fmt.Errorf("vm %s: %w", cfg.ID, err)
	}
	p, err := spawn(cfg, v.host)
	if err != nil {
		return nil, fmt.Errorf("vm %s: %w", cfg.ID, err)
	}
	m := newVM(cfg, p)
	if err := m.open(ctx); err != nil {
		_ = m.Kill()
		<-m.done
		return nil, fmt.Errorf("vm %s: start: %w%s", cfg.ID, err, because(m.stderr.String()))
	}
	return m, nil
}

// check finds missing files before QEMU is started, to name the remedy.
func (v *VMM) check(cfg vmm.Config) error {
	if cfg.Binary != "" {
		path, key, err := identify(cfg.Binary)
		if err != nil {
			return err
		}
		if key != v.host.Key {
			return fmt.Errorf("qemu %s: %w: not what was probed (%s); restart the runtime", path, errdefs.ErrFailedPrecondition, v.host.Binary)
		}
	}
	for what, path := range map[string]string{"kernel": cfg.Kernel, "initrd": cfg.Initrd} {
		if st, err := os.Stat(path); err != nil || !st.Mode().IsRegular() {
			return fmt.Errorf("%s %q: %w: run `make guest`, or set %s in hyper.toml", what, path, errdefs.ErrNotFound, what)
		}
	}
	return nil
}

func because(stderr string) string {
	if l := lastLine(stderr); l != "" {
		return ": " + l
	}
	return ""
}

// plugged is a disk the VM has.
type plugged struct {
	lun, fdset int
	// stays is a persistent disk's description.
	stays *vmm.Disk
	// node is the NBD node that has replaced the first one, round how often that was tried.
	node  string
	round int
}

// VM is a running QEMU. It implements vmm.VM.
type VM struct {
	id      string
	process *process
	console tail
	stderr  tail
	drained []chan struct{}
	done    chan struct{}
	exit    vmm.Exit // valid once done is closed

	// plugging serialises changes of disks.
	plugging  chan struct{}
	disks     map[string]plugged
	nextFDSet int

	mu     sync.Mutex
	qmp    *qmp.Client
	ending ending
	// diskErrors counts what has been heard of them, faults those of persistent disks by
	// their nodes.
	diskErrors int
	faults     map[string]int
	unplugs    map[string]chan struct{} // device id to what DEVICE_DELETED closes
}

func newVM(cfg vmm.Config, p *process) *VM {
	m := &VM{
		id: cfg.ID, process: p, done: make(chan struct{}), plugging: make(chan struct{}, 1),
		disks: map[string]plugged{}, nextFDSet: len(cfg.Disks) + 1, unplugs: map[string]chan struct{}{}, faults: map[string]int{},
	}
	for i, d := range cfg.Disks {
		p := plugged{lun: i, fdset: i + 1}
		if d.Persistent {
			p.stays = &d
			m.faults[nodeName(d.Serial)] = 0
		}
		m.disks[d.Serial] = p
	}
	m.drained = []chan struct{}{drain(p.console, &m.console, cfg.Console), drain(p.Stderr, &m.stderr, nil)}
	go m.reap()
	return m
}

// open waits until QEMU takes commands.
func (m *VM) open(ctx context.Context) error {
	c, err := qmp.Open(ctx, m.process.qmp, m.event)
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.qmp = c
	return nil
}

// event runs in the QMP client's goroutine.
func (m *VM) event(e qmp.Event) {
	var d struct {
		Reason string `json:"reason"`
		Device string `json:"device"`
		Node   string `json:"node-name"`
	}
	if e.Data != nil && json.Unmarshal(e.Data, &d) != nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	switch e.Name {
	case "GUEST_PANICKED":
		m.ending.panicked = true
	case "SHUTDOWN":
		m.ending.shutdown = d.Reason
	case "DEVICE_DELETED":
		if ch, ok := m.unplugs[d.Device]; ok {
			close(ch)
			delete(m.unplugs, d.Device)
		}
	case "BLOCK_IO_ERROR":
		if n, ok := m.faults[d.Node]; ok {
			m.faults[d.Node] = n + 1
		}
		// As many as the guest likes: it may try a broken disk for ever.
		if m.diskErrors++; m.diskErrors > maxDiskErrors {
			return
		}
		log.L.WithField("vm", m.id).WithField("event", string(e.Data)).Warn("vm disk error")
	}
}

// reap waits for the process, then for what it still had to say, and publishes the exit.
func (m *VM) reap() {
	err := <-m.process.Exited
	at := time.Now()
	grace, cancel := context.WithTimeout(context.Background(), endGrace)
	defer cancel()
	m.mu.Lock()
	client := m.qmp
	m.mu.Unlock()
	if client != nil {
		await(grace, client.Done())
	}
	for _, d := range m.drained {
		await(grace, d)
	}
	m.process.close()
	m.mu.Lock()
	m.ending.wait, m.ending.console, m.ending.stderr = err, m.console.String(), m.stderr.String()
	m.exit = classify(m.ending)
	m.exit.At = at
	m.mu.Unlock()
	close(m.done)
}

func await(ctx context.Context, ch <-chan struct{}) {
	select {
	case <-ch:
	case <-ctx.Done():
	}
}

// PID implements vmm.VM.
func (m *VM) PID() int { return m.process.Pid }

// Channel implements vmm.VM; the connection also has deadlines (net.Conn).
func (m *VM) Channel() io.ReadWriteCloser { return m.process.channel }

// Done implements vmm.VM.
func (m *VM) Done() <-chan struct{} { return m.done }

// Exit implements vmm.VM. Before Done is closed it is the zero value.
func (m *VM) Exit() vmm.Exit {
	select {
	case <-m.done:
		return m.exit
	default:
		return vmm.Exit{}
	}
}

// ConsoleTail returns the last 8 KiB of the guest's console. It is the guest's text.
func (m *VM) ConsoleTail() string { return m.console.String() }

// Kill implements vmm.VM.
func (m *VM) Kill() error {
	m.mu.Lock()
	m.ending.killed = true
	m.mu.Unlock()
	if err := m.process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("vm %s: kill: %w", m.id, err)
	}
	return nil
}

// Faults implements vmm.VM.
func (m *VM) Faults(serial string) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.faults[nodeName(serial)]
}

// Pause implements vmm.VM.
func (m *VM) Pause(ctx context.Context) error {
	_, err := m.qmp.Execute(ctx, "stop", nil)
	return m.named(err)
}

// Resume implements vmm.VM.
func (m *VM) Resume(ctx context.Context) error {
	_, err := m.qmp.Execute(ctx, "cont", nil)
	return m.named(err)
}

func (m *VM) named(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("vm %s: %w", m.id, err)
}
