package kubestack

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/dns"
	"github.com/hypernetes/hypernetes/network/edge"
	"github.com/hypernetes/hypernetes/network/netns"
	"github.com/hypernetes/hypernetes/network/policy"
	"github.com/hypernetes/hypernetes/network/service"
)

// Edges makes edge namespaces (package edge).
type Edges interface {
	SetHost(ctx context.Context, h edge.Host) error
	Ensure(ctx context.Context, s edge.Spec) (Edge, error)
	Get(id string) (Edge, error)
	List() ([]string, error)
	Remove(ctx context.Context, id string) error
}

// Edge is one of them.
type Edge interface {
	NS() *netns.NS
	Transit() (here, node netip.Addr)
	Attach(ctx context.Context, a edge.Attachment) error
	Up(ctx context.Context, link string) error
	Check(ctx context.Context, a edge.Attachment) error
	Detach(ctx context.Context, link string) error
	Announce(ctx context.Context, a edge.Attachment) error
	AnnounceFront(ctx context.Context, link string) error
	Links() ([]string, error)
}

// Plane opens what is inside an edge (packages service, policy and dns).
type Plane interface {
	Services(ns *netns.NS, o service.Options) (Services, error)
	Policies(ns *netns.NS) (Policies, error)
	Resolver(ctx context.Context, c dns.Config) (Resolver, error)
}

// Services is a table of Services.
type Services interface {
	Sync(ctx context.Context, services []service.Service) (service.Stats, error)
	// Close gives back the sockets; the table stays.
	Close() error
}

// Policies is a table of policies.
type Policies interface {
	Sync(ctx context.Context, s policy.State) error
	// Problems are those of the last Sync.
	Problems() []policy.Problem
}

// Resolver answers names.
type Resolver interface {
	Update(v dns.View)
	Close() error
}

// network is a Network that is present here.
type network struct {
	d   *Daemon
	key types.NamespacedName

	// users are calls that need it present whatever else; guarded by d.mu.
	users int

	watches sync.Mutex // guards what follows
	ports   *source[*v1alpha1.Port]
	portsOf *group
	perNS   map[string]*namespace

	// want and done number requests for a sync and those it has served: callers that wait
	// for one share it.
	count sync.Mutex
	want  uint64

	sync     sync.Mutex // guards what follows: one sync at a time
	done     uint64
	edge     Edge
	opened   opened
	services Services
	policies Policies
	dns      map[netip.Addr]Resolver
	// selections are what the last sync made of Services.
	selections selections
	// fronts are those plugged in by this process, by link.
	fronts map[string]plugged
	// told are the problems of policies there are events of.
	told map[policy.Problem]bool
}

// opened is what the tables and resolvers were opened with; they are opened anew when it
// changes.
type opened struct {
	edge      Edge
	inode     uint64 // the namespace may have been made anew behind our back
	gateways  string
	upstreams string
}

// namespace are the watches of one bound namespace.
type namespace struct {
	group    *group
	pods     *source[*corev1.Pod]
	services *source[*corev1.Service]
	slices   *source[*discoveryv1.EndpointSlice]
	policies *source[*networkingv1.NetworkPolicy]
}

// watch begins to watch what belongs to the Network and ends what no longer does.
func (n *network) watch(bound map[string]map[string]string) {
	changed := func() { n.d.enqueue(n.key) }
	n.watches.Lock()
	defer n.watches.Unlock()
	if n.portsOf == nil {
		n.portsOf = newGroup(n.d.ctx)
		n.ports = watchAll(n.portsOf, n.d.api, &v1alpha1.Port{}, &v1alpha1.PortList{}, func(was, is *v1alpha1.Port) {
			if was == nil || is == nil || !samePort(was, is) {
				changed()
			}
		},
			client.InNamespace(n.key.Namespace), client.MatchingLabels{v1alpha1.LabelNetwork: n.key.Name})
		n.perNS = map[string]*namespace{}
	}
	for name, ns := range n.perNS {
		if _, ok := bound[name]; !ok {
			ns.group.stop()
			delete(n.perNS, name)
		}
	}
	for name := range bound {
		if n.perNS[name] != nil {
			continue
		}
		g, in := newGroup(n.d.ctx), client.InNamespace(name)
		n.perNS[name] = &namespace{
			group: g,
			pods: watchAll(g, n.d.api, &corev1.Pod{}, &corev1.PodList{}, func(was, is *corev1.Pod) {
				// Of a Pod only its labels and named ports matter here, not its status.
				if was == nil || is == nil || !maps(was.Labels, is.Labels) {
					changed()
				}
			}, in),
			services: watchAll(g, n.d.api, &corev1.Service{}, &corev1.ServiceList{}, func(was, is *corev1.Service) { changed() }, in),
			slices:   watchAll(g, n.d.api, &discoveryv1.EndpointSlice{}, &discoveryv1.EndpointSliceList{}, func(was, is *discoveryv1.EndpointSlice) { changed() }, in),
			policies: watchAll(g, n.d.api, &networkingv1.NetworkPolicy{}, &networkingv1.NetworkPolicyList{}, func(was, is *networkingv1.NetworkPolicy) { changed() }, in),
		}
	}
}

// samePort tells whether two versions of a Port are one for the edge: of its status what the
// provider plugs it by matters, not how far it is.
func samePort(a, b *v1alpha1.Port) bool {
	x, y := a.Status, b.Status
	return reflect.DeepEqual(a.Spec, b.Spec) && a.DeletionTimestamp.IsZero() == b.DeletionTimestamp.IsZero() &&
		x.ProviderPortID == y.ProviderPortID && x.MAC == y.MAC && x.VIFType == y.VIFType
}

func maps(a, b map[string]string) bool {
	if len(a) != len(b) {
		return false
	}
	for k, v := range a {
		if w, ok := b[k]; !ok || v != w {
			return false
		}
	}
	return true
}

// synced tells whether everything watched is known.
func (n *network) synced() bool {
	n.watches.Lock()
	defer n.watches.Unlock()
	if n.portsOf == nil || !n.portsOf.hasSynced() {
		return false
	}
	for _, ns := range n.perNS {
		if !ns.group.hasSynced() {
			return false
		}
	}
	return true
}

// stopWatching ends every watch.
func (n *network) stopWatching() {
	n.watches.Lock()
	defer n.watches.Unlock()
	if n.portsOf == nil {
		return
	}
	n.portsOf.stop()
	for _, ns := range n.perNS {
		ns.group.stop()
	}
	n.portsOf, n.ports, n.perNS = nil, nil, nil
}

// knownPorts are the Network's Ports as watched and as claimed just now.
func (n *network) knownPorts() []*v1alpha1.Port {
	n.watches.Lock()
	var all []*v1alpha1.Port
	if n.ports != nil {
		all = n.ports.list()
	}
	n.watches.Unlock()
	byName := map[string]*v1alpha1.Port{}
	for _, p := range all {
		byName[p.Name] = p
	}
	for _, p := range n.d.claimed(n.key) {
		byName[p.Name] = p
	}
	out := make([]*v1alpha1.Port, 0, len(byName))
	for _, p := range byName {
		out = append(out, p)
	}
	return out
}

var errNoNetwork = errdefs.ErrNotFound.WithMessage("there is no such Network")

// snapshot gathers everything.
func (n *network) snapshot() (*snapshot, error) {
	d := n.d
	object, ok := d.cluster.networks.get(n.key.String())
	if !ok {
		return nil, fmt.Errorf("network %s: %w", n.key, errNoNetwork)
	}
	s := &snapshot{
		Network: object, Namespaces: d.cluster.namespacesOf(n.key), Ports: n.knownPorts(), Links: map[string]string{}, VIFs: map[string]VIF{},
		Pods: map[types.UID]*corev1.Pod{}, Nodes: d.cluster.allNodes(d.opts.NodeIP), Self: d.opts.Node,
		VIPs: d.cluster.vips(), Fronts: d.cluster.frontsOf(&n.key), Floating: d.cluster.floatingOf(n.key), Ranges: d.opts.ServiceCIDRs,
	}
	for port, c := range d.records.nics(n.key, s.Ports) {
		s.Links[port] = c.Link
		if c.VIF != nil {
			s.VIFs[port] = *c.VIF
		}
	}
	s.Kubernetes, _ = d.cluster.kubernetes.get(corev1.NamespaceDefault + "/kubernetes")
	// A node knows its own address before its Node does.
	self := s.Nodes[s.Self]
	self.Name, self.Address = s.Self, d.opts.NodeIP
	s.Nodes[s.Self] = self
	if self.ControlPlane {
		s.Exported = d.cluster.exported()
	}
	families := map[bool]bool{}
	for _, sub := range object.Status.Subnets {
		if p, err := netip.ParsePrefix(sub.CIDR); err == nil {
			families[p.Addr().Is4()] = true
		}
	}
	for _, v4 := range []bool{true, false} {
		if families[v4] {
			if a, ok := d.opts.resolver(v4); ok {
				s.DNS = append(s.DNS, a)
			}
		}
	}
	n.watches.Lock()
	for _, ns := range n.perNS {
		for _, p := range ns.pods.list() {
			s.Pods[p.UID] = p
		}
		s.Services = append(s.Services, ns.services.list()...)
		s.Slices = append(s.Slices, ns.slices.list()...)
		s.Policies = append(s.Policies, ns.policies.list()...)
	}
	n.watches.Unlock()
	s.Records = d.records.pods()
	s.sort()
	return s, nil
}

// sort puts what watches give in any order into one.
func (s *snapshot) sort() {
	byName := func(a, b *metav1.ObjectMeta) int {
		if c := strings.Compare(a.Namespace, b.Namespace); c != 0 {
			return c
		}
		return strings.Compare(a.Name, b.Name)
	}
	slices.SortFunc(s.Services, func(a, b *corev1.Service) int { return byName(&a.ObjectMeta, &b.ObjectMeta) })
	slices.SortFunc(s.Slices, func(a, b *discoveryv1.EndpointSlice) int { return byName(&a.ObjectMeta, &b.ObjectMeta) })
	slices.SortFunc(s.Policies, func(a, b *networkingv1.NetworkPolicy) int { return byName(&a.ObjectMeta, &b.ObjectMeta) })
}

// flush returns once a sync that began after the call has succeeded. Callers at the same
// time share one.
func (n *network) flush() error {
	n.count.Lock()
	n.want++
	mine := n.want
	n.count.Unlock()
	n.sync.Lock()
	defer n.sync.Unlock()
	if n.done >= mine {
		return nil
	}
	n.count.Lock()
	serves := n.want
	n.count.Unlock()
	// Not the caller's context: a call that is given up must not leave half of it done.
	ctx, cancel := context.WithTimeout(n.d.ctx, syncTimeout)
	defer cancel()
	start := time.Now()
	n.d.strays.RLock()
	err := n.apply(ctx)
	n.d.strays.RUnlock()
	syncSeconds.Observe(time.Since(start).Seconds())
	if err != nil {
		syncErrors.Inc()
		return err
	}
	n.done = serves
	return nil
}

const syncTimeout = time.Minute

// apply makes everything as it should be.
func (n *network) apply(ctx context.Context) error {
	s, err := n.snapshot()
	if err != nil {
		return err
	}
	spec, err := s.spec()
	if err != nil {
		return err
	}
	e, err := n.d.edges.Ensure(ctx, spec)
	if err != nil {
		return err
	}
	n.edge = e
	if err := n.d.rewire(ctx, s, spec); err != nil {
		return err
	}
	if err := n.plugFronts(ctx, s); err != nil {
		return err
	}
	defer n.announceFronts(ctx, s)
	_, transit := e.Transit()
	if err := n.open(ctx, s, spec); err != nil {
		return err
	}
	// Policy before everything that lets packets reach new places.
	if err := n.policies.Sync(ctx, s.policies()); err != nil {
		return fmt.Errorf("policies of %s: %w", n.key, err)
	}
	n.tell(ctx, s.Policies)
	var list []service.Service
	list, n.selections = s.services(transit, n.selections)
	if _, err := n.services.Sync(ctx, list); err != nil {
		return fmt.Errorf("services of %s: %w", n.key, err)
	}
	for _, r := range n.dns {
		r.Update(s.view())
	}
	n.d.count(n.key, len(spec.Ports), len(list))
	return nil
}

// tell writes an event for each mistake in a policy, once.
func (n *network) tell(ctx context.Context, all []*networkingv1.NetworkPolicy) {
	now := map[policy.Problem]bool{}
	for _, p := range n.policies.Problems() {
		now[p] = true
		i := slices.IndexFunc(all, func(np *networkingv1.NetworkPolicy) bool { return np.Namespace+"/"+np.Name == p.Policy })
		if i >= 0 && !n.told[p] {
			n.d.events.mistake(ctx, all[i], p.Message)
		}
	}
	n.told = now
}

// open opens tables and resolvers, anew if the edge was made anew.
func (n *network) open(ctx context.Context, s *snapshot, spec edge.Spec) error {
	ns := n.edge.NS()
	now := opened{edge: n.edge, inode: inode(ns), gateways: fmt.Sprint(spec.Gateways, spec.Subnets)}
	upstreams, dial := n.upstreams(s.Network, ns)
	now.upstreams = fmt.Sprint(upstreams, s.DNS)
	was := n.opened
	anew := was.edge != now.edge || was.inode != now.inode
	if n.services == nil || anew || was.gateways != now.gateways {
		o := service.Options{Gateways: onePerFamily(spec.Gateways), Inside: spec.Subnets}
		if !spec.Uplinks {
			v4, v6 := edge.Overlay(n.d.opts.NodeIP)
			o.Overlay = onePerFamily([]netip.Addr{v4, v6})
		}
		t, err := n.d.plane.Services(ns, o)
		if err != nil {
			return fmt.Errorf("services of %s: %w", n.key, err)
		}
		if n.services != nil {
			if err := n.services.Close(); err != nil {
				log.G(ctx).WithError(err).Debug("close a former table of services")
			}
		}
		n.services = t
	}
	if n.policies == nil || anew {
		t, err := n.d.plane.Policies(ns)
		if err != nil {
			return fmt.Errorf("policies of %s: %w", n.key, err)
		}
		n.policies = t
	}
	if n.dns == nil || anew || was.upstreams != now.upstreams {
		if err := n.closeDNS(); err != nil {
			return err
		}
		n.dns = map[netip.Addr]Resolver{}
		for _, a := range s.DNS {
			// It serves as long as the daemon, not as this sync.
			r, err := n.d.plane.Resolver(n.d.ctx, dns.Config{
				NS: ns, Address: a, Domain: n.d.opts.ClusterDomain, Upstreams: upstreams, UpstreamDial: dial,
				Rate: dnsRate, CacheEntries: dnsCache,
			})
			if err != nil {
				// The rest of the Network serves without names; the next sync tries again.
				err = fmt.Errorf("resolver of %s on %s: %w", n.key, a, err)
				return errors.Join(err, n.closeDNS())
			}
			n.dns[a] = r
		}
	}
	n.opened = now
	return nil
}

// Bounds of a Network's resolver on one node.
const (
	dnsRate  = 500
	dnsCache = 4096
)

// upstreams are who answers other names, and from where they are asked: the Network's own
// from inside it, the node's from the node.
func (n *network) upstreams(object *v1alpha1.Network, ns *netns.NS) ([]netip.AddrPort, func(context.Context, string, string) (net.Conn, error)) {
	if len(object.Spec.DNSServers) > 0 {
		var out []netip.AddrPort
		for _, a := range addresses(object.Spec.DNSServers) {
			out = append(out, netip.AddrPortFrom(a, 53))
		}
		return out, ns.DialContext
	}
	return nameservers(n.d.opts.ResolvConf), (&net.Dialer{}).DialContext
}

func (n *network) closeDNS() error {
	var errs []error
	for a, r := range n.dns {
		if err := r.Close(); err != nil {
			errs = append(errs, fmt.Errorf("resolver of %s on %s: %w", n.key, a, err))
		}
	}
	n.dns = nil
	return errors.Join(errs...)
}

// leave stops serving without touching the data plane: connections live on.
func (n *network) leave() {
	n.stopWatching()
	n.sync.Lock()
	defer n.sync.Unlock()
	if err := n.closeDNS(); err != nil {
		log.G(n.d.ctx).WithError(err).Warn("close resolver")
	}
	if n.services == nil {
		return
	}
	if err := n.services.Close(); err != nil {
		log.G(n.d.ctx).WithError(err).Warn("close the table of services")
	}
}

// inode tells one namespace from another at the same path.
func inode(ns *netns.NS) uint64 {
	var st unix.Stat_t
	if ns == nil || unix.Fstat(ns.FD(), &st) != nil {
		return 0
	}
	return st.Ino
}

func onePerFamily(all []netip.Addr) []netip.Addr {
	var out []netip.Addr
	for _, a := range all {
		if a.IsValid() && !slices.ContainsFunc(out, func(b netip.Addr) bool { return b.BitLen() == a.BitLen() }) {
			out = append(out, a)
		}
	}
	return out
}
