package kubestack

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/announcer"
	"github.com/hypernetes/hypernetes/network/edge"
)

const (
	// coalesce is how long changes of a Network are gathered before they are applied, at
	// least; after a sync they are gathered for idleFactor times what it took, up to the bound.
	coalesce    = 20 * time.Millisecond
	idleFactor  = 1
	maxCoalesce = 2 * time.Second
	// resync repairs what others changed behind our back.
	resync  = 30 * time.Second
	workers = 4
)

// Parts are what the daemon drives.
type Parts struct {
	// API reads and writes the API server itself, not a cache.
	API    client.WithWatch
	Edges  Edges
	Plane  Plane
	Routes Routes
	Prober Prober
	// Wirer connects uplinks of Networks that others carry; the node's if nil.
	Wirer Wirer
	// Patience with those; the usual if zero.
	Patience Patience
}

// Routes are those of the node to the Pods of other nodes.
type Routes interface {
	Sync(ctx context.Context, want []Route) error
}

// Daemon is the node daemon.
type Daemon struct {
	opts    Options
	api     client.WithWatch
	edges   Edges
	plane   Plane
	routes  Routes
	prober  Prober
	wirer   Wirer
	patient Patience
	records *records
	events  *events

	ctx     context.Context // the daemon's life
	later   sync.WaitGroup  // what calls left to be done
	cluster *cluster
	queue   workqueue.TypedRateLimitingInterface[types.NamespacedName]
	calls   keyed
	hosted  atomic.Bool // the node's own namespace is as it should be
	lost    atomic.Bool // Ports may be claimed by nobody

	host sync.Mutex // one sync of the node at a time
	// strays keeps edges from being removed while they are made: whoever makes one has said
	// before that its Network is present.
	strays sync.RWMutex

	mu       sync.Mutex // guards what follows
	networks map[types.NamespacedName]*network
	ports    map[types.NamespacedName]*v1alpha1.Port // claims the watches may not have seen yet, by key
	figures  map[types.NamespacedName][2]int
	next     map[types.NamespacedName]time.Time // when it may be synced again for an event
}

// New makes a daemon and reads what a former one left.
func New(opts Options, p Parts) (*Daemon, error) {
	d := &Daemon{
		opts: opts, api: p.API, edges: p.Edges, plane: p.Plane, routes: p.Routes, prober: p.Prober, events: &events{api: p.API, node: opts.Node},
		networks: map[types.NamespacedName]*network{}, ports: map[types.NamespacedName]*v1alpha1.Port{},
		figures: map[types.NamespacedName][2]int{}, next: map[types.NamespacedName]time.Time{},
	}
	if d.wirer = p.Wirer; d.wirer == nil {
		d.wirer = wirer{run: run}
	}
	d.patient = Patience{Made: cmp.Or(p.Patience.Made, madeTimeout), Wired: cmp.Or(p.Patience.Wired, wiredTimeout)}
	records, unreadable, err := openRecords(filepath.Join(opts.RunDir, "attachments"))
	if err != nil {
		return nil, err
	}
	if unreadable != nil {
		log.L.WithError(unreadable).Warn("attachments that cannot be read are left to garbage collection")
	}
	d.records = records
	return d, nil
}

// Run watches and applies until the context ends. The sockets are served beside it (Serve).
func (d *Daemon) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	d.ctx = ctx
	d.queue = workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[types.NamespacedName](coalesce, resync))
	d.cluster = watchCluster(ctx, d.api, d.enqueue, d.enqueueAll)
	var wg sync.WaitGroup
	for range workers {
		wg.Go(d.work)
	}
	wg.Go(func() {
		t := time.NewTicker(resync)
		defer t.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-t.C:
				d.enqueueAll()
				d.reclaim(ctx)
			}
		}
	})
	wg.Go(func() { d.begin(ctx) })
	err := d.serve(ctx)
	cancel()
	d.queue.ShutDown()
	wg.Wait()
	d.later.Wait()
	d.cluster.group.stop()
	d.mu.Lock()
	all := d.networks
	d.networks = map[types.NamespacedName]*network{}
	d.mu.Unlock()
	for _, n := range all {
		n.leave()
	}
	return err
}

// begin does what has to be done once: clean up after a node that was down, and adopt.
func (d *Daemon) begin(ctx context.Context) {
	if !poll(ctx, d.cluster.group.hasSynced) {
		return
	}
	d.sweep(ctx)
	d.lost.Store(true)
	d.reclaim(ctx)
	d.lost.Store(true) // once more: the API server may be late with what a former process asked
	d.enqueueAll()
	poll(ctx, d.hosted.Load)
	d.enqueueAll()
}

// poll waits for informers, which have no channel to wait for.
func poll(ctx context.Context, f func() bool) bool {
	t := time.NewTicker(5 * time.Millisecond)
	defer t.Stop()
	for !f() {
		select {
		case <-ctx.Done():
			return false
		case <-t.C:
		}
	}
	return true
}

// Ready says what is missing before Pods can be added.
func (d *Daemon) Ready() error {
	switch {
	case !d.cluster.group.hasSynced():
		return fmt.Errorf("the API server's objects are not known yet: %w", errdefs.ErrUnavailable)
	case !d.hosted.Load():
		return fmt.Errorf("the node's own namespace is not set up yet: %w", errdefs.ErrUnavailable)
	}
	return nil
}

// nodeKey is the work queue's key for what concerns the node itself.
var nodeKey = types.NamespacedName{}

// enqueue asks for a sync. While Pods come and go there are more events than there can be
// syncs: one that took long is not begun again at once, so that a Network takes half a
// processor at most. Calls do not wait for that (network.flush).
func (d *Daemon) enqueue(key types.NamespacedName) {
	d.mu.Lock()
	wait := time.Until(d.next[key])
	d.mu.Unlock()
	d.queue.AddAfter(key, max(coalesce, wait))
}

// synced remembers how long a sync took.
func (d *Daemon) synced(key types.NamespacedName, took time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if key != nodeKey && d.networks[key] == nil {
		delete(d.next, key)
		return
	}
	d.next[key] = time.Now().Add(min(idleFactor*took, maxCoalesce))
}

// enqueueAll also decides anew which Networks are present.
func (d *Daemon) enqueueAll() { d.enqueue(nodeKey) }

func (d *Daemon) work() {
	for {
		key, over := d.queue.Get()
		if over {
			return
		}
		var err error
		start := time.Now()
		if key == nodeKey {
			err = d.syncNode(d.ctx)
		} else {
			err = d.syncNetwork(d.ctx, key)
		}
		d.synced(key, time.Since(start))
		switch {
		case err == nil:
			d.queue.Forget(key)
		case d.ctx.Err() != nil:
		default:
			log.G(d.ctx).WithError(err).WithField("network", key.String()).Warn("sync")
			d.queue.AddRateLimited(key)
		}
		d.queue.Done(key)
	}
}

// syncNetwork makes one Network as it should be, or gone.
func (d *Daemon) syncNetwork(ctx context.Context, key types.NamespacedName) error {
	if !d.cluster.group.hasSynced() {
		return nil // begin enqueues all
	}
	if !d.present()[key] {
		return d.dismiss(ctx, key)
	}
	n := d.network(key, 0)
	n.watch(d.cluster.namespacesOf(key))
	if !n.synced() {
		// Half of the truth would cut connections.
		d.queue.AddAfter(key, coalesce)
		return nil
	}
	err := n.flush()
	if errors.Is(err, errNotAccepted) || errors.Is(err, errNoNetwork) {
		// What is there stays as it is; its object's next change comes back here.
		log.G(ctx).WithError(err).WithField("network", key.String()).Debug("wait")
		return nil
	}
	return err
}

// network returns a Network's state and counts users of it.
func (d *Daemon) network(key types.NamespacedName, users int) *network {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := d.networks[key]
	if n == nil {
		n = &network{d: d, key: key}
		d.networks[key] = n
	}
	n.users += users
	return n
}

// present are the Networks that this node carries.
func (d *Daemon) present() map[types.NamespacedName]bool {
	out := map[types.NamespacedName]bool{}
	for _, r := range d.records.list() {
		for _, n := range r.NICs {
			out[n.Network] = true
		}
	}
	d.mu.Lock()
	for key, n := range d.networks {
		if n.users > 0 {
			out[key] = true
		}
	}
	d.mu.Unlock()
	nodes := d.cluster.allNodes(d.opts.NodeIP)
	ready := readyNodes(nodes)
	for key, vips := range d.cluster.vips() {
		for _, v := range vips {
			if announcer.Winner(v.Address.String(), ready) == d.opts.Node {
				d.addBound(out, key)
			}
		}
	}
	for _, p := range d.cluster.frontsOf(nil) {
		if p.Spec.Node == d.opts.Node {
			out[types.NamespacedName{Namespace: p.Namespace, Name: p.Spec.Network}] = true
		}
	}
	if nodes[d.opts.Node].ControlPlane {
		for key := range d.cluster.exported() {
			d.addBound(out, key)
		}
	}
	return out
}

// announced are the addresses this node answers for whose Services belong to no tenant.
func (d *Daemon) announced(nodes map[string]node) []netip.Addr {
	ready := readyNodes(nodes)
	var out []netip.Addr
	for key, vips := range d.cluster.vips() {
		namespace, _, _ := strings.Cut(key, "/")
		if _, _, bound := d.cluster.bound(namespace); bound {
			continue
		}
		// A namespace that was a tenant's a moment ago is nobody's, but not the node's own.
		if ns, ok := d.cluster.namespaces.get(namespace); !ok || ns.Labels[v1alpha1.LabelTenant] != "" {
			continue
		}
		for _, v := range vips {
			if announcer.Winner(v.Address.String(), ready) == d.opts.Node {
				out = append(out, v.Address)
			}
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}

func (d *Daemon) addBound(to map[types.NamespacedName]bool, service string) {
	namespace, _, _ := strings.Cut(service, "/")
	if key, _, ok := d.cluster.bound(namespace); ok {
		to[key] = true
	}
}

// dismiss takes a Network that is not present off the node.
func (d *Daemon) dismiss(ctx context.Context, key types.NamespacedName) error {
	d.mu.Lock()
	n := d.networks[key]
	if n == nil || n.users > 0 {
		d.mu.Unlock()
		return nil
	}
	delete(d.networks, key)
	delete(d.figures, key)
	d.mu.Unlock()
	n.unplugFronts(ctx)
	n.leave()
	return d.removeStrays(ctx)
}

// removeStrays removes the edges of Networks that are not present.
func (d *Daemon) removeStrays(ctx context.Context) error {
	d.strays.Lock()
	defer d.strays.Unlock()
	ids, err := d.edges.List()
	if err != nil {
		return err
	}
	keep := map[string]bool{}
	present := d.present()
	for key := range present {
		if n, ok := d.cluster.networks.get(key.String()); ok {
			keep[edgeID(n.UID)] = true
		}
	}
	for _, r := range d.records.list() {
		for _, n := range r.NICs {
			keep[n.Edge] = true
		}
	}
	var errs []error
	for _, id := range ids {
		if keep[id] {
			continue
		}
		log.G(ctx).WithField("edge", id).Info("remove the edge of a network nobody here is on")
		errs = append(errs, d.edges.Remove(ctx, id))
	}
	return errors.Join(errs...)
}

// syncNode is about the node itself, and about which Networks are present.
func (d *Daemon) syncNode(ctx context.Context) error {
	if !d.cluster.group.hasSynced() {
		return nil
	}
	nodes := d.cluster.allNodes(d.opts.NodeIP)
	// Without an answer in the edge a ClusterIP must not find kube-proxy on the node.
	host := edge.Host{APIServers: d.opts.APIServers, Reserved: slices.Clone(d.opts.ServiceCIDRs)}
	for _, n := range nodes {
		host.Nodes = append(host.Nodes, n.Addresses...)
		host.Reserved = append(host.Reserved, n.PodCIDRs...)
	}
	if !slices.Contains(host.Nodes, d.opts.NodeIP) {
		host.Nodes = append(host.Nodes, d.opts.NodeIP)
	}
	slices.SortFunc(host.Nodes, netip.Addr.Compare)
	host.Nodes = slices.Compact(host.Nodes)
	host.Announced = d.announced(nodes)
	slices.SortFunc(host.Reserved, func(a, b netip.Prefix) int { return cmp.Compare(a.String(), b.String()) })
	d.host.Lock()
	err := errors.Join(d.edges.SetHost(ctx, host), d.routes.Sync(ctx, routesTo(nodes, d.opts.Node)))
	d.host.Unlock()
	if err != nil {
		return fmt.Errorf("node: %w", err)
	}
	d.hosted.Store(true)
	present := d.present()
	d.mu.Lock()
	var gone []types.NamespacedName
	for key := range d.networks {
		if !present[key] {
			gone = append(gone, key)
		}
	}
	d.mu.Unlock()
	for key := range present {
		d.enqueue(key)
	}
	for _, key := range gone {
		d.enqueue(key)
	}
	return d.removeStrays(ctx)
}

// claimed are Ports of a Network that this node has just claimed.
func (d *Daemon) claimed(network types.NamespacedName) []*v1alpha1.Port {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []*v1alpha1.Port
	for key, p := range d.ports {
		if key.Namespace == network.Namespace && p.Spec.Network == network.Name {
			out = append(out, p)
		}
	}
	return out
}

func (d *Daemon) count(key types.NamespacedName, ports, services int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.figures[key] = [2]int{ports, services}
	var p, s int
	for _, f := range d.figures {
		p, s = p+f[0], s+f[1]
	}
	networksGauge.Set(float64(len(d.figures)))
	portsGauge.Set(float64(p))
	servicesGauge.Set(float64(s))
}
