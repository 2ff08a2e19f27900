package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/cluster/cgroup"
	"github.com/hypernetes/hypernetes/cluster/component"
	"github.com/hypernetes/hypernetes/cluster/gateway"
	"github.com/hypernetes/hypernetes/cluster/join"
	"github.com/hypernetes/hypernetes/cluster/layout"
	"github.com/hypernetes/hypernetes/cluster/node"
	"github.com/hypernetes/hypernetes/cluster/settings"
	"github.com/hypernetes/hypernetes/cluster/status"
	"github.com/hypernetes/hypernetes/cluster/supervisor"
)

// readyTimeout bounds a start. A loaded machine without hardware acceleration needs
// a fraction of it; beyond, something is wrong and the status says what.
const readyTimeout = 5 * time.Minute

// proxyPort is the port inside the node where image pulls find the way out.
const proxyPort = 3128

// Daemon is the process behind `h8s up` and `h8s server`.
type Daemon struct {
	input   component.Input
	cgroups *cgroup.Host
	gateway *gateway.Gateway
	lock    *os.File
	// token is what an agent joins with; it is kept in memory only.
	token string

	mu      sync.Mutex
	node    *node.Node
	sup     *supervisor.Supervisor
	phase   status.Phase
	began   time.Time
	ready   time.Duration
	steps   []status.Event
	problem string
	down    sync.Once
	last    status.Event
	ended   chan struct{} // closed when the node was stopped on request

	stopAsked context.Context // ends a start in progress
	askStop   context.CancelFunc
	started   chan struct{} // closed when start has returned
}

// errStopped ends a start in progress when the node is to be stopped.
var errStopped = errors.New("stopped on request while it was starting")

// NewDaemon locks the node's name and returns its daemon; errdefs.ErrAlreadyExists
// means that another one runs. An agent that has not joined yet needs a token.
func NewDaemon(a layout.Artifacts, l layout.Node, s settings.Node, token string) (*Daemon, error) {
	if err := s.Validate(); err != nil {
		return nil, err
	}
	cg, err := cgroup.Open()
	if err != nil {
		return nil, err
	}
	for _, dir := range []string{l.State, l.StatePath("log"), l.Run} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
	}
	lock, err := lockNode(l)
	if err != nil {
		return nil, err
	}
	in := newInput(a, l, s, cg)
	d := &Daemon{
		token: token,
		input: in, cgroups: cg, lock: lock, phase: status.Starting, began: time.Now(),
		ended: make(chan struct{}), started: make(chan struct{}),
	}
	d.stopAsked, d.askStop = context.WithCancel(context.Background())
	return d, nil
}

// newInput is what the components of a node depend on. It must come out the same for
// the same node, or its components are not adopted.
func newInput(a layout.Artifacts, l layout.Node, s settings.Node, cg *cgroup.Host) component.Input {
	in := component.Input{Artifacts: a, Node: l, Settings: s, CgroupV1: !cg.Unified(), Path: component.SearchPath(a)}
	if !s.HostNetwork {
		in.Proxy = fmt.Sprintf("http://127.0.0.1:%d", proxyPort)
	}
	return in
}

func lockNode(l layout.Node) (*os.File, error) {
	f, err := os.OpenFile(l.RunPath("lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("node %s has a daemon already: %w", l.Name, errdefs.ErrAlreadyExists)
	}
	// Whoever held it before removed it, perhaps after it was opened here: a lock on a
	// file without a name keeps nobody out.
	mine, err1 := f.Stat()
	named, err2 := os.Stat(l.RunPath("lock"))
	if err1 == nil && err2 == nil && os.SameFile(mine, named) {
		return f, nil
	}
	_ = f.Close()
	return nil, fmt.Errorf("node %s was being stopped just now, try again: %w", l.Name, errdefs.ErrAlreadyExists)
}

// Run brings the node up, reporting progress, and serves until it is stopped on
// request or ctx ends. The end of ctx stops the components and keeps the Pods, so
// that a service manager may restart h8s under running workloads.
func (d *Daemon) Run(ctx context.Context, report func(status.Event)) error {
	defer d.lock.Close()
	farewell := func() {}
	log.G(ctx).WithField("node", d.input.Node.Name).Info("starting")
	serveCtx, endServe := context.WithCancel(context.WithoutCancel(ctx))
	served := make(chan struct{})
	go func() {
		defer close(served)
		if err := status.Serve(serveCtx, d.input.Node.StatusSocket(), status.Handler{Status: d.Status, Down: d.Down}); err != nil {
			log.G(ctx).WithError(err).Error("the status socket is not served: h8s status and h8s down cannot reach this daemon")
		}
	}()
	defer func() {
		endServe()
		<-served
		_ = os.Remove(d.input.Node.StatusSocket())
		_ = os.Remove(d.input.Node.RunPath("lock"))
		removeIfEmpty(d.input.Node.Run, layout.RunRoot)
		farewell()
	}()

	startCtx, cancelStart := context.WithTimeout(ctx, readyTimeout)
	defer cancelStart()
	stopWaiting := context.AfterFunc(d.stopAsked, cancelStart)
	err := d.start(startCtx, func(e status.Event) {
		d.mu.Lock()
		if e.Kind == status.Step || e.Kind == status.Warn {
			d.steps = append(d.steps, e)
		}
		d.mu.Unlock()
		report(e)
	})
	if !stopWaiting() {
		err = errStopped
	}
	close(d.started)
	if err != nil {
		last, stays := d.startFailed(ctx, err)
		if stays {
			report(last)
			return d.serve(ctx)
		}
		// Whoever reads it may rely on nothing being left.
		farewell = func() { report(last) }
		return err
	}
	d.set(status.Running, nil)
	d.mu.Lock()
	d.ready = time.Since(d.began)
	d.mu.Unlock()
	report(status.Event{Kind: status.Done, Seconds: time.Since(d.began).Seconds()})
	renewCtx, endRenewal := context.WithCancel(ctx)
	var renewing sync.WaitGroup
	renewing.Go(func() { d.renew(renewCtx) })
	defer renewing.Wait()
	defer endRenewal()
	return d.serve(ctx)
}

// startFailed settles a failed start and returns the event that tells of it. What
// runs by then stays for inspection when a component is to blame, and goes when no
// component was started yet.
func (d *Daemon) startFailed(ctx context.Context, err error) (last status.Event, stays bool) {
	log.G(ctx).WithError(err).Error("start failed")
	if !errors.Is(err, errStopped) {
		d.set(status.Failed, err)
	}
	d.mu.Lock()
	stays = d.sup != nil
	d.mu.Unlock()
	if !stays {
		d.Down(ctx, false, func(status.Event) {})
	}
	return status.Event{Kind: status.Fail, Message: err.Error(), Reason: ReasonOf(err)}, stays
}

func (d *Daemon) serve(ctx context.Context) error {
	select {
	case <-d.ended:
	case <-ctx.Done():
		d.Down(context.WithoutCancel(ctx), true, func(status.Event) {})
	}
	log.G(ctx).Info("stopped")
	return nil
}

func (d *Daemon) set(p status.Phase, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.phase = p
	if err != nil {
		d.problem = err.Error()
	}
}

// start is the order of things: gateway, certificates, namespaces, components.
func (d *Daemon) start(ctx context.Context, report func(status.Event)) error {
	in := d.input
	step := func(name string, f func() (string, error)) error {
		report(status.Event{Kind: status.Begin, Name: name})
		t := time.Now()
		message, err := f()
		if err != nil {
			return err
		}
		report(status.Event{Kind: status.Step, Name: name, Seconds: time.Since(t).Seconds(), Message: message})
		return nil
	}
	d.gateway = gateway.New(ctx)
	ports, err := d.listen()
	if err != nil {
		return err
	}
	if in.Settings.Egress {
		if in.Slirp, err = exec.LookPath("slirp4netns"); err != nil {
			ports.close()
			return fmt.Errorf("egress: %w (apt-get install slirp4netns)", err)
		}
	}
	steps := []struct {
		name string
		do   func() (string, error)
	}{
		{"certificates", func() (string, error) { return "", prepare(in, component.All(in)) }},
		{"node", func() (string, error) { return "", d.openNode(ctx) }},
	}
	if in.Settings.IsAgent() {
		// What is half made must be known for what it is, and reaching the server may need
		// the node's network.
		if err := in.Settings.Save(in.Node.StatePath("node.json")); err != nil {
			return err
		}
		steps[0], steps[1] = steps[1], steps[0]
		steps = slices.Insert(steps, 1, struct {
			name string
			do   func() (string, error)
		}{"cluster", func() (string, error) { return d.join(ctx) }})
	}
	for _, s := range steps {
		if err := step(s.name, s.do); err != nil {
			ports.close()
			return err
		}
	}
	if err := d.openGateway(ports); err != nil {
		return err
	}
	if err := in.Settings.Save(in.Node.StatePath("node.json")); err != nil {
		return err
	}
	in.AnchorPID = d.node.AnchorPID()
	d.sweep(ctx)
	return d.startComponents(ctx, component.All(in), report)
}

// openNode finds the node's namespaces or makes them, and moves this process into
// the node's cgroup, so that whatever belongs to a node can be found there.
func (d *Daemon) openNode(ctx context.Context) error {
	in := d.input
	n, err := node.Open(in.Node, in.Settings, d.cgroups)
	if err != nil {
		if err := sweep(ctx, d.cgroups, in.Node); err != nil {
			return err
		}
		if n, err = node.Create(ctx, in.Node, in.Settings, d.cgroups, resolvers(in.Settings)); err != nil {
			return err
		}
	}
	if in.Settings.Of != "" {
		if err := attach(n, in.Settings.Of, d.cgroups); err != nil {
			return err
		}
	}
	group := n.Cgroup("h8s")
	if err := d.cgroups.Create(group); err != nil {
		return err
	}
	if err := d.cgroups.Attach(group, os.Getpid()); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.node = n
	return nil
}

// attach connects the node to the network of the one called first.
func attach(n *node.Node, first string, cg *cgroup.Host) error {
	l, err := layout.NewNode(first)
	if err != nil {
		return err
	}
	s, err := settings.Load(l.StatePath("node.json"))
	if err != nil {
		return err
	}
	to, err := node.Open(l, s, cg)
	if err != nil {
		return fmt.Errorf("node %s is attached to node %s, which is not running; start that first: h8s up --name %s: %w: %w", n.Layout.Name, first, first, err, errdefs.ErrUnavailable)
	}
	return n.Attach(to)
}

// resolvers are the name servers the node itself can reach.
func resolvers(s settings.Node) []string {
	if s.Egress {
		return []string{settings.EgressResolver}
	}
	return nil
}

// ports are the host listeners, opened before anything else so that a taken port is
// found out at once.
type ports struct {
	listeners []net.Listener
	targets   []string
}

func (p ports) close() {
	for _, l := range p.listeners {
		_ = l.Close()
	}
}

func (d *Daemon) listen() (ports, error) {
	s := d.input.Settings
	if s.HostNetwork {
		return ports{}, nil
	}
	var p ports
	add := func(host int, target string) error {
		l, err := gateway.ListenLoopback(host)
		if err != nil {
			return err
		}
		p.listeners, p.targets = append(p.listeners, l), append(p.targets, target)
		return nil
	}
	var err error
	if !s.RuntimeOnly && !s.IsAgent() {
		err = add(s.APIPort, fmt.Sprintf("127.0.0.1:%d", settings.APIPort))
	}
	for _, pub := range s.Publish {
		err = errors.Join(err, add(pub.Host, fmt.Sprintf("%s:%d", s.NodeIP, pub.Node)))
	}
	if err != nil {
		p.close()
	}
	return p, err
}

func (d *Daemon) openGateway(p ports) error {
	for i, l := range p.listeners {
		d.gateway.Forward(l, d.node.Dial, p.targets[i])
	}
	if d.input.Proxy == "" {
		return nil
	}
	l, err := d.node.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", proxyPort))
	if err != nil {
		return fmt.Errorf("proxy for image pulls: %w", err)
	}
	d.gateway.Proxy(l)
	return nil
}

// Status describes the node now.
func (d *Daemon) Status() status.Node {
	d.mu.Lock()
	defer d.mu.Unlock()
	st := status.Node{
		Name: d.input.Node.Name, Phase: d.phase, PID: os.Getpid(), Started: d.began, ReadyAfter: d.ready.Seconds(),
		Settings: d.input.Settings, Steps: slices.Clone(d.steps), Error: d.problem, Components: []supervisor.Status{},
	}
	if s := d.input.Settings; s.IsAgent() {
		st.Server = s.Server
	} else if !s.RuntimeOnly {
		st.Server, st.Kubeconfig = fmt.Sprintf("https://127.0.0.1:%d", d.input.Settings.APIPort), d.input.Node.Kubeconfig()
	}
	if d.node != nil {
		st.AnchorPID = d.node.AnchorPID()
	}
	if d.sup != nil {
		st.Components = d.sup.Status()
	}
	if st.Phase == status.Running {
		for _, c := range st.Components {
			if c.State != supervisor.Ready {
				st.Phase = status.Degraded
			}
		}
	}
	return st
}

// Absent describes a node without a daemon, from what is left of it.
func Absent(l layout.Node) status.Node {
	st := status.Node{Name: l.Name, Phase: status.Absent, Components: []supervisor.Status{}}
	st.Settings, _ = settings.Load(l.StatePath("node.json")) // none is told by its empty name
	cg, err := cgroup.Open()
	if err != nil {
		return st
	}
	if n, err := node.Open(l, st.Settings, cg); err == nil {
		st.Phase, st.AnchorPID = status.Headless, n.AnchorPID()
	}
	return st
}

// ReasonOf returns the stable reason of an error, for package cli's advice.
func ReasonOf(err error) string {
	var port *gateway.PortInUseError
	switch {
	case errors.As(err, &port):
		return "H8S_PORT_IN_USE"
	case errdefs.IsAlreadyExists(err):
		return "H8S_BUSY"
	case errors.Is(err, join.ErrServer), errors.Is(err, join.ErrPin), errors.Is(err, join.ErrToken), errors.Is(err, join.ErrName):
		return "H8S_JOIN"
	case errdefs.IsInvalidArgument(err):
		return "H8S_USAGE"
	case errors.Is(err, errStopped):
		return "H8S_NOT_RUNNING"
	case errors.Is(err, unix.ENOSPC) || strings.Contains(err.Error(), unix.ENOSPC.Error()): // also in a component's last words
		return "H8S_DISK_FULL"
	case errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES):
		return "H8S_PERMISSION"
	case errors.Is(err, context.DeadlineExceeded):
		return "H8S_START_TIMEOUT"
	}
	return "H8S_START_FAILED"
}
