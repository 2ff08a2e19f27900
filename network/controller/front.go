package controller

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/util/workqueue"
	"k8s.io/utils/ptr"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/log"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/identity/binding"
	"github.com/hypernetes/hypernetes/network/announcer"
	"github.com/hypernetes/hypernetes/network/claim"
	"github.com/hypernetes/hypernetes/network/ipam"
	"github.com/hypernetes/hypernetes/network/provider"
)

// What a Service in a Network of a provider with ports of its own says to us.
const (
	// FrontClass asks for a Port of the Service's own, and a floating IP that leads to it.
	FrontClass = "hypernetes.io/neutron"
	// FinalizerFront keeps a Service until these are gone.
	FinalizerFront = "hypernetes.io/vip"
	// FinalizerBalancer keeps a Service until the cloud's load balancer is gone (package
	// octavia): one without a class that has it is the cloud's.
	FinalizerBalancer = "hypernetes.io/octavia"
	// AnnotationInternal "true" asks for no floating IP.
	AnnotationInternal = "hypernetes.io/internal-load-balancer"

	// annotationFloating on a Port of a Service is "<ID> <address>" of its floating IP. Only
	// controllers and nodes write Ports that are there.
	annotationFloating = "hypernetes.io/floating-ip"
	// claimAttempts bounds how many addresses are tried that others turn out to have.
	claimAttempts = 16
	// unbindableFor is how many resyncs a node that could not be bound to is left alone.
	unbindableFor = 5
)

var _ reconcile.Reconciler = (*fronts)(nil)

// fronts gives Services Ports, by which their clients come to a node, which translates. The
// Port is the record of what there is: it names the Service. There is one worker, so that a
// quota is counted and used by one at a time.
type fronts struct {
	base
	failures workqueue.TypedRateLimiter[reconcile.Request]
	// unbindable are the nodes that the provider could not bind a Service's Port to, by UID,
	// and when. A controller that restarts tries them anew.
	unbindable map[types.UID]map[string]time.Time
}

func (r *fronts) setup(m manager.Manager) error {
	r.unbindable = map[types.UID]map[string]time.Time{}
	r.failures = workqueue.NewTypedItemExponentialFailureRateLimiter[reconcile.Request](r.o.Poll, time.Minute)
	which := func(ctx context.Context, f func(*corev1.Service) bool, opts ...client.ListOption) []reconcile.Request {
		list := &corev1.ServiceList{}
		if err := r.client.List(ctx, list, opts...); err != nil {
			return nil
		}
		var all []reconcile.Request
		for i := range list.Items {
			if s := &list.Items[i]; mayFront(s) && f(s) {
				all = append(all, one(s.Namespace, s.Name)...)
			}
		}
		return all
	}
	any := func(*corev1.Service) bool { return true }
	waiting := func(s *corev1.Service) bool { return len(s.Status.LoadBalancer.Ingress) == 0 }
	return ctrl.NewControllerManagedBy(m).Named("front").
		For(&corev1.Service{}).
		Watches(&v1alpha1.Port{}, handler.EnqueueRequestsFromMapFunc(func(_ context.Context, o client.Object) []reconcile.Request {
			if s := o.(*v1alpha1.Port).Spec.Service; s != nil {
				return one(s.Namespace, s.Name)
			}
			return nil
		})).
		Watches(&discoveryv1.EndpointSlice{}, handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) []reconcile.Request {
			s := &corev1.Service{}
			err := r.client.Get(ctx, client.ObjectKey{Namespace: o.GetNamespace(), Name: o.GetLabels()[discoveryv1.LabelServiceName]}, s)
			if err != nil || !mayFront(s) || s.Spec.ExternalTrafficPolicy != corev1.ServiceExternalTrafficPolicyLocal {
				return nil
			}
			return one(s.Namespace, s.Name)
		})).
		Watches(&corev1.Node{}, handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, _ client.Object) []reconcile.Request {
			return which(ctx, any)
		}), builder.WithPredicates(predicate.Funcs{UpdateFunc: func(e event.UpdateEvent) bool {
			was, ok := e.ObjectOld.(*corev1.Node)
			is, ok2 := e.ObjectNew.(*corev1.Node)
			return ok && ok2 && (announcer.Readiness(was).Status != announcer.Readiness(is).Status || announcer.Excluded(was) != announcer.Excluded(is))
		}})).
		Watches(&v1alpha1.TenantNamespace{}, handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) []reconcile.Request {
			return which(ctx, any, client.InNamespace(o.GetName()))
		})).
		Watches(&v1alpha1.Network{}, handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, _ client.Object) []reconcile.Request {
			return which(ctx, waiting)
		})).
		// Who waits for an address of a pool that is gone need not.
		Watches(&v1alpha1.AddressPool{}, handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, _ client.Object) []reconcile.Request {
			return which(ctx, waiting)
		}), builder.WithPredicates(lifeOnly)).
		Complete(r)
}

// mayFront says whether s could be ours by what it says of itself.
func mayFront(s *corev1.Service) bool {
	return s.Spec.Type == corev1.ServiceTypeLoadBalancer && s.DeletionTimestamp.IsZero() &&
		(s.Spec.LoadBalancerClass == nil || *s.Spec.LoadBalancerClass == FrontClass)
}

// networkOf is the Network a Service is in; nil if it is nobody's.
func (b base) networkOf(ctx context.Context, s *corev1.Service) (*v1alpha1.Network, error) {
	ns := &corev1.Namespace{}
	if err := b.client.Get(ctx, client.ObjectKey{Name: s.Namespace}, ns); err != nil {
		return nil, err
	}
	bound, ok, err := binding.Of(ctx, b.client, ns)
	if err != nil || !ok {
		return nil, err
	}
	n := &v1alpha1.Network{}
	err = b.client.Get(ctx, client.ObjectKey{Namespace: bound.TenantNamespace.Namespace, Name: bound.TenantNamespace.Spec.Network}, n)
	return n, err
}

// who balances for a Service.
type who int

const (
	// byPool is that its address is of an AddressPool, and nodes announce it.
	byPool who = iota
	// byPort is that it has a Port of its own.
	byPort
	// byCloud is that the provider's cloud has load balancers.
	byCloud
)

// balancer says who balances for a Service that fronts may be asked for: its class says so.
// Where there is none, it has none of an AddressPool and can have none, and the Network is
// of a provider with addresses, it is the cloud if that balances by itself, and a Port of
// its own otherwise. Once it has one of these, it stays.
func (b base) balancer(ctx context.Context, s *corev1.Service) (*v1alpha1.Network, who, error) {
	if !mayFront(s) {
		return nil, byPool, nil
	}
	n, err := b.networkOf(ctx, s)
	if s.Spec.LoadBalancerClass != nil {
		return n, byPort, err
	}
	if errdefs.IsUnavailable(err) || apierrors.IsNotFound(err) || n == nil {
		return nil, byPool, nil // who else looks at it says so
	} else if err != nil {
		return nil, byPool, err
	}
	if controllerutil.ContainsFinalizer(s, FinalizerBalancer) {
		return n, byCloud, nil
	}
	if _, ok := b.portProvider(n); !ok || b.addressProviderOf(n.Status.Provider) == nil || s.Annotations[AnnotationPool] != "" {
		return n, byPool, nil
	}
	have, err := b.portsOfService(ctx, b.client, client.ObjectKeyFromObject(s))
	if err != nil || slices.ContainsFunc(have, func(p v1alpha1.Port) bool { return p.Spec.Service.UID == string(s.UID) }) {
		return n, byPort, err
	}
	cached := b.o.Claims
	cached.Reader = b.client
	owned, err := cached.Owned(ctx, claim.Address, claim.OwnerOf(claim.KindService, s))
	if err != nil || len(owned) > 0 {
		return n, byPool, err
	}
	pools := &v1alpha1.AddressPoolList{}
	if err := b.client.List(ctx, pools); err != nil {
		return n, byPool, err
	}
	if slices.ContainsFunc(pools.Items, func(p v1alpha1.AddressPool) bool { return usable(&p, n.Status.Tenant) }) {
		return n, byPool, nil
	}
	for _, p := range b.o.Providers {
		if x, ok := p.(Balancer); ok && p.Name() == n.Status.Provider {
			balances, err := x.Balances(ctx, n.Status.Tenant)
			if err == nil && balances {
				return n, byCloud, nil
			}
			return n, byPort, err
		}
	}
	return n, byPool, nil
}

// Cloud tells which Services without a class have a load balancer of the cloud's.
type Cloud struct{ base }

// NewCloud asks as the reconcilers of Setup do, which must be there by the time it is asked.
func NewCloud(m manager.Manager, o Options) *Cloud {
	o.defaults(m)
	return &Cloud{base{client: m.GetClient(), live: m.GetAPIReader(), o: o}}
}

// Balances says whether s, which names no class, is the cloud's to balance for.
func (c *Cloud) Balances(ctx context.Context, s *corev1.Service) (bool, error) {
	_, by, err := c.balancer(ctx, s)
	return err == nil && by == byCloud, err
}

// portsOfService are the Ports of Services of a name.
func (b base) portsOfService(ctx context.Context, from client.Reader, key types.NamespacedName) ([]v1alpha1.Port, error) {
	list := &v1alpha1.PortList{}
	err := from.List(ctx, list, client.MatchingFields{indexService: key.Namespace + "/" + key.Name})
	return list.Items, err
}

// balanced is how much of its quota of load balancers a tenant has used: the external
// addresses its Services have claimed, and its Services that have Ports.
func (b base) balanced(ctx context.Context, tenant string, claims []claim.Claim) (int, error) {
	used := 0
	for _, c := range claims {
		if c.Held() && c.Tenant == tenant && c.Owner.Kind == claim.KindService {
			used++
		}
	}
	if tenant == "" {
		return used, nil
	}
	list := &v1alpha1.PortList{}
	if err := b.client.List(ctx, list, client.InNamespace(v1alpha1.Home(tenant)), client.HasLabels{v1alpha1.LabelService}); err != nil {
		return 0, err
	}
	seen := map[string]bool{}
	for _, p := range list.Items {
		if p.Spec.Service != nil {
			seen[p.Spec.Service.UID] = true
		}
	}
	return used + len(seen), nil
}

func balancerQuota(t *v1alpha1.Tenant) int {
	return int(ptr.Deref(t.Spec.Quota.LoadBalancers, v1alpha1.DefaultQuotaLoadBalancers))
}

// Reconcile implements reconcile.Reconciler.
func (r *fronts) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	s := &corev1.Service{}
	err := r.client.Get(ctx, req.NamespacedName, s)
	if client.IgnoreNotFound(err) != nil {
		return reconcile.Result{}, err
	}
	there := err == nil
	ports, err := r.portsOfService(ctx, r.client, req.NamespacedName)
	if err != nil {
		return reconcile.Result{}, err
	}
	var n *v1alpha1.Network
	mine := false
	if there {
		by := byPool
		if n, by, err = r.balancer(ctx, s); err != nil {
			return r.fail(ctx, req, s, err)
		}
		mine = by == byPort
	}
	// What Services of this name before it left, or it itself before it said otherwise.
	for i := range ports {
		p := &ports[i]
		if mine && p.Spec.Service.UID == string(s.UID) && n != nil && p.Namespace == n.Namespace && p.Spec.NetworkUID == string(n.UID) {
			continue
		}
		if stale, err := r.stale(ctx, p, mine); err != nil {
			return reconcile.Result{}, err
		} else if !stale {
			continue
		}
		if err := r.releasePort(ctx, p); err != nil {
			return r.fail(ctx, req, orNil(s, there), err)
		}
	}
	switch {
	case !there:
		r.failures.Forget(req)
		return reconcile.Result{}, nil
	case mine:
		have, err := r.ensure(ctx, s, n)
		switch {
		case errors.Is(err, errNotYet):
			return reconcile.Result{RequeueAfter: max(r.o.Poll, time.Second)}, nil
		case err != nil:
			return r.fail(ctx, req, s, err)
		}
		r.failures.Forget(req)
		if err := r.publish(ctx, s, have); err != nil {
			return reconcile.Result{}, err
		}
		return reconcile.Result{RequeueAfter: wait.Jitter(r.o.Resync, 0.2)}, nil
	case !controllerutil.ContainsFinalizer(s, FinalizerFront):
		return reconcile.Result{}, nil
	}
	if err := r.release(ctx, s); errors.Is(err, errNotYet) {
		return reconcile.Result{RequeueAfter: max(r.o.Poll, time.Second)}, nil
	} else if err != nil {
		return r.fail(ctx, req, s, err)
	}
	r.failures.Forget(req)
	return reconcile.Result{}, nil
}

func orNil(s *corev1.Service, there bool) *corev1.Service {
	if there {
		return s
	}
	return nil
}

// errNotYet says that something is on its way.
var errNotYet = errors.New("not yet")

// fail says why and comes again.
func (r *fronts) fail(ctx context.Context, req reconcile.Request, s *corev1.Service, err error) (reconcile.Result, error) {
	switch {
	case ctx.Err() != nil:
		return reconcile.Result{}, ctx.Err()
	case apierrors.IsConflict(err):
		return reconcile.Result{RequeueAfter: r.o.Poll}, nil
	}
	reason := provider.Reason(err, "LoadBalancerFailed")
	if why, ok := asRefusal(err); ok {
		reason = why.reason
	}
	if s != nil && r.failures.NumRequeues(req)%10 == 0 {
		r.note(s, corev1.EventTypeWarning, reason, "Reconcile", "load balancer: %v", err)
	}
	log.FromContext(ctx).Info("load balancer at the provider", "reason", err.Error())
	return reconcile.Result{RequeueAfter: max(r.failures.When(req), provider.RetryAfter(err))}, nil
}

// stale asks the API server whether a Port's Service has no right to it: the cache may not
// have heard of it yet.
func (r *fronts) stale(ctx context.Context, p *v1alpha1.Port, mine bool) (bool, error) {
	s := &corev1.Service{}
	err := r.live.Get(ctx, client.ObjectKey{Namespace: p.Spec.Service.Namespace, Name: p.Spec.Service.Name}, s)
	if apierrors.IsNotFound(err) {
		return true, nil
	}
	// What a Service that has the finalizer does not want any more it releases itself.
	return err == nil && (mine || string(s.UID) != p.Spec.Service.UID || !mayFront(s) || !controllerutil.ContainsFinalizer(s, FinalizerFront)), err
}

// floating is a Service's floating IP as providers know such.
func floating(home string, uid string, p *v1alpha1.Port) *v1alpha1.FloatingIP {
	f := &v1alpha1.FloatingIP{ObjectMeta: metav1.ObjectMeta{Namespace: home, Name: "service-" + uid, UID: types.UID(uid)}}
	if p != nil {
		if id, address, ok := strings.Cut(p.Annotations[annotationFloating], " "); ok {
			f.Status.ProviderID, f.Status.Address, f.Status.Target = id, address, p.Spec.Addresses[0]
		}
	}
	return f
}

// releasePort gives up a Port: first what leads to it, then it. It is errNotYet until it is
// gone.
func (r *fronts) releasePort(ctx context.Context, p *v1alpha1.Port) error {
	if p.DeletionTimestamp.IsZero() {
		if err := r.releaseFloating(ctx, floating(p.Namespace, p.Spec.Service.UID, p)); err != nil {
			return err
		}
		uid := p.UID
		if err := r.client.Delete(ctx, p, client.Preconditions{UID: &uid}); client.IgnoreNotFound(err) != nil {
			return err
		}
		log.FromContext(ctx).Info("port of a Service released", "port", p.Name, "service", p.Spec.Service.Name)
	}
	return nil
}

func (r *fronts) releaseFloating(ctx context.Context, f *v1alpha1.FloatingIP) error {
	for _, p := range r.o.Providers {
		if ap, ok := p.(AddressProvider); ok {
			if err := ap.ReleaseAddress(ctx, f); err != nil {
				return err
			}
		}
	}
	return nil
}

// release takes everything of a Service away, and then its finalizer.
func (r *fronts) release(ctx context.Context, s *corev1.Service) error {
	ports, err := r.livePorts(ctx, s, "")
	if err != nil {
		return err
	}
	for i := range ports {
		if err := r.releasePort(ctx, &ports[i]); err != nil {
			return err
		}
	}
	if len(ports) > 0 {
		return errNotYet
	}
	// Somebody may have deleted its Port.
	if n, err := r.networkOf(ctx, s); err == nil && n != nil {
		if err := r.releaseFloating(ctx, floating(n.Namespace, string(s.UID), nil)); err != nil {
			return err
		}
	} else if client.IgnoreNotFound(err) != nil {
		return err
	}
	if err := r.publish(ctx, s, nil); err != nil {
		return err
	}
	old := s.DeepCopy()
	if !controllerutil.RemoveFinalizer(s, FinalizerFront) {
		return nil
	}
	return client.IgnoreNotFound(r.client.Patch(ctx, s, client.MergeFromWithOptions(old, client.MergeFromWithOptimisticLock{})))
}

// livePorts are a Service's, the oldest first.
func (r *fronts) livePorts(ctx context.Context, s *corev1.Service, home string) ([]v1alpha1.Port, error) {
	list := &v1alpha1.PortList{}
	if err := r.live.List(ctx, list, client.InNamespace(home), client.MatchingLabels{v1alpha1.LabelService: string(s.UID)}); err != nil {
		return nil, err
	}
	all := slices.DeleteFunc(list.Items, func(p v1alpha1.Port) bool { return p.Spec.Service == nil || p.Spec.Service.UID != string(s.UID) })
	slices.SortFunc(all, func(a, b v1alpha1.Port) int {
		return cmp.Or(a.CreationTimestamp.Compare(b.CreationTimestamp.Time), strings.Compare(a.Name, b.Name))
	})
	return all, nil
}

// ensure does what is to be done for a Service and returns its addresses.
func (r *fronts) ensure(ctx context.Context, s *corev1.Service, n *v1alpha1.Network) ([]netip.Addr, error) {
	if n == nil {
		return nil, refuse("NoNetwork", "spec.loadBalancerClass: namespace %s is bound to no Network: leave the class out", s.Namespace)
	}
	ap := r.addressProviderOf(n.Status.Provider)
	if _, ok := r.portProvider(n); !ok || ap == nil {
		return nil, refuse("WrongProvider", "spec.loadBalancerClass: Network %s is of provider %s, which has no ports of its own: leave the class out", n.Name, n.Status.Provider)
	}
	if n.Status.Phase != v1alpha1.NetworkActive && n.Status.ProviderNetworkID == "" {
		return nil, refuse("NetworkNotReady", "Network %s is %s", n.Name, n.Status.Phase)
	}
	ask, err := requested(s)
	if err != nil {
		return nil, err
	}
	internal := s.Annotations[AnnotationInternal] == "true"
	// Before there is anything, so that nothing is forgotten.
	if old := s.DeepCopy(); controllerutil.AddFinalizer(s, FinalizerFront) {
		if err := r.client.Patch(ctx, s, client.MergeFromWithOptions(old, client.MergeFromWithOptimisticLock{})); err != nil {
			return nil, err
		}
	}
	ports, err := r.livePorts(ctx, s, n.Namespace)
	if err != nil {
		return nil, err
	}
	for i := range ports {
		if i > 0 && ports[i].DeletionTimestamp.IsZero() { // of a controller that died
			if err := r.client.Delete(ctx, &ports[i]); client.IgnoreNotFound(err) != nil {
				return nil, err
			}
		}
	}
	if len(ports) > 0 && !ports[0].DeletionTimestamp.IsZero() {
		return nil, errNotYet
	}
	may, err := r.nodes(ctx, s)
	if err != nil {
		return nil, err
	}
	if len(ports) == 0 {
		var want []netip.Addr
		if internal {
			for _, a := range ask {
				want = append(want, a)
			}
		}
		return nil, r.claim(ctx, s, n, want, may)
	}
	p := &ports[0]
	if node := announcer.Winner(p.Spec.Addresses[0], may); node != "" && !slices.Contains(may, p.Spec.Node) {
		was := p.Spec.Node
		p.Spec.Node = node
		if err := r.client.Update(ctx, p); err != nil {
			return nil, err
		}
		r.note(s, corev1.EventTypeNormal, "Moved", "Move", "clients come in by node %s, no longer by %s", node, was)
		log.FromContext(ctx).Info("port of a Service moved", "port", p.Name, "from", was, "to", node)
	}
	if c := meta.FindStatusCondition(p.Status.Conditions, v1alpha1.ConditionReady); c != nil && c.Status == metav1.ConditionFalse && c.ObservedGeneration == p.Generation {
		if c.Reason == v1alpha1.ReasonAddressInUse && !(internal && len(ask) > 0) {
			if err := r.releasePort(ctx, p); err != nil { // and another is claimed
				return nil, err
			}
			return nil, errNotYet
		}
		if c.Reason == v1alpha1.ReasonBindingFailed {
			if node := r.another(s, p, may); node != "" {
				was := p.Spec.Node
				p.Spec.Node = node
				if err := r.client.Update(ctx, p); err != nil {
					return nil, err
				}
				r.note(s, corev1.EventTypeWarning, c.Reason, "Move", "clients cannot come in by node %s, node %s is tried: %s", was, node, c.Message)
				log.FromContext(ctx).Info("port of a Service cannot be bound", "port", p.Name, "from", was, "to", node)
				return nil, errNotYet
			}
		}
		return nil, refuse(c.Reason, "Port %s: %s", p.Name, c.Message)
	}
	if p.Status.ProviderPortID == "" {
		return nil, errNotYet // its next change comes here
	}
	families := s.Spec.IPFamilies
	if len(families) == 0 {
		families = []corev1.IPFamily{corev1.IPv4Protocol}
	}
	var out []netip.Addr
	outside := false
	for _, text := range p.Spec.Addresses {
		a, err := netip.ParseAddr(text)
		if err != nil {
			return nil, err
		}
		switch {
		case !slices.Contains(families, familyOf(a.Is6())):
		case a.Is4() && !internal:
			outside = true
		default:
			out = append(out, a)
		}
	}
	f := floating(p.Namespace, string(s.UID), p)
	if !outside {
		return out, r.inside(ctx, ap, p, f)
	}
	if a := ask[false]; a.IsValid() {
		f.Spec.Address = a.String()
		if f.Status.Address != "" && f.Status.Address != f.Spec.Address { // it asks for another
			if err := ap.ReleaseAddress(ctx, f); err != nil {
				return nil, err
			}
			f.Status = v1alpha1.FloatingIPStatus{}
		}
	}
	st, err := ap.EnsureAddress(ctx, f, p)
	if err != nil {
		return nil, err
	}
	if err := r.remember(ctx, p, st.ID+" "+st.Address); err != nil {
		return nil, err
	}
	if st.Repaired != "" {
		r.note(s, corev1.EventTypeWarning, "Repaired", "Repair", "%s: put right", st.Repaired)
	}
	a, err := netip.ParseAddr(st.Address)
	if err != nil {
		return nil, err
	}
	return append([]netip.Addr{a}, out...), nil
}

// another is a node to try after the one that a Service's Port could not be bound to; none
// if all were tried not long ago.
func (r *fronts) another(s *corev1.Service, p *v1alpha1.Port, may []string) string {
	tried := r.unbindable[s.UID]
	if tried == nil {
		tried = map[string]time.Time{}
		for uid, nodes := range r.unbindable { // of Services that are gone
			if !slices.ContainsFunc(slices.Collect(maps.Values(nodes)), r.lately) {
				delete(r.unbindable, uid)
			}
		}
		r.unbindable[s.UID] = tried
	}
	if !r.lately(tried[p.Spec.Node]) {
		tried[p.Spec.Node] = time.Now()
	}
	return announcer.Winner(p.Spec.Addresses[0], slices.DeleteFunc(slices.Clone(may), func(n string) bool { return r.lately(tried[n]) }))
}

// lately says whether a node that could not be bound to is not to be tried again yet.
func (r *fronts) lately(t time.Time) bool { return time.Since(t) < unbindableFor*r.o.Resync }

// inside takes the floating IP away.
func (r *fronts) inside(ctx context.Context, ap AddressProvider, p *v1alpha1.Port, f *v1alpha1.FloatingIP) error {
	if p.Annotations[annotationFloating] == "none" {
		return nil
	}
	if err := ap.ReleaseAddress(ctx, f); err != nil {
		return err
	}
	return r.remember(ctx, p, "none")
}

func (r *fronts) remember(ctx context.Context, p *v1alpha1.Port, text string) error {
	if p.Annotations[annotationFloating] == text {
		return nil
	}
	old := p.DeepCopy()
	if p.Annotations == nil {
		p.Annotations = map[string]string{}
	}
	p.Annotations[annotationFloating] = text
	return r.client.Patch(ctx, p, client.MergeFrom(old))
}

// claim makes a Service's Port.
func (r *fronts) claim(ctx context.Context, s *corev1.Service, n *v1alpha1.Network, want []netip.Addr, may []string) error {
	t := &v1alpha1.Tenant{}
	if err := r.client.Get(ctx, client.ObjectKey{Name: n.Status.Tenant}, t); err != nil {
		return err
	}
	cached := r.o.Claims
	cached.Reader = r.client
	leases, err := cached.List(ctx, claim.Address)
	if err != nil {
		return err
	}
	used, err := r.balanced(ctx, t.Name, leases)
	if err != nil {
		return err
	}
	if quota := balancerQuota(t); used >= quota {
		return refuse("QuotaExceeded", "quota: tenant %s has %d of %d external addresses of Services: delete one, or ask the operator for more", t.Name, used, quota)
	}
	if len(may) == 0 {
		return refuse("NoNode", "no node is ready that clients could come in by (for externalTrafficPolicy Local one with a ready endpoint)")
	}
	subnets, err := ipam.Subnets(n)
	if err != nil {
		return err
	}
	ports, err := r.ports(ctx, n)
	if err != nil {
		return err
	}
	taken := map[netip.Addr]bool{}
	for i := range ports {
		all, _ := ipam.Addresses(&ports[i])
		for _, a := range all {
			taken[a] = true
		}
	}
	for range claimAttempts {
		var addrs []netip.Addr
		if len(want) > 0 {
			if addrs, err = ipam.Request(subnets, want); err != nil {
				return refuse("Invalid", "address: %v", err)
			}
		} else if addrs, err = ipam.Choose(subnets, func(a netip.Addr) bool { return taken[a] }, rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64()))); err != nil {
			return refuse("AddressesExhausted", "%v", err)
		}
		p := &v1alpha1.Port{
			ObjectMeta: metav1.ObjectMeta{
				Namespace: n.Namespace, Name: v1alpha1.PortName(n.Name, addrs[0].String()), Finalizers: []string{v1alpha1.FinalizerProvider},
				Labels: map[string]string{v1alpha1.LabelNetwork: n.Name, v1alpha1.LabelService: string(s.UID)},
			},
			Spec: v1alpha1.PortSpec{
				Network: n.Name, NetworkUID: string(n.UID), Node: announcer.Winner(addrs[0].String(), may),
				Service: &v1alpha1.ServiceRef{Namespace: s.Namespace, Name: s.Name, UID: string(s.UID)},
			},
		}
		for _, a := range addrs {
			p.Spec.Addresses = append(p.Spec.Addresses, a.String())
		}
		err := r.client.Create(ctx, p)
		switch {
		case err == nil:
			r.note(s, corev1.EventTypeNormal, "AddressAllocated", "Allocate", "%s of Network %s, by node %s", addrs[0], n.Name, p.Spec.Node)
			log.FromContext(ctx).Info("port of a Service claimed", "port", p.Name, "network", n.Name, "tenant", t.Name)
			return errNotYet
		case apierrors.IsForbidden(err):
			return refuse("QuotaExceeded", "Port %s: %v", p.Name, err)
		case !apierrors.IsAlreadyExists(err):
			return err
		case len(want) > 0:
			return refuse("AddressInUse", "address: %s is taken: ask for another, or for none", want[0])
		}
		taken[addrs[0]] = true
	}
	return errNotYet
}

// nodes are those a Service's clients may come in by.
func (r *fronts) nodes(ctx context.Context, s *corev1.Service) ([]string, error) {
	list := &corev1.NodeList{}
	if err := r.client.List(ctx, list); err != nil {
		return nil, err
	}
	var ready []string
	for i := range list.Items {
		n := &list.Items[i]
		c := announcer.Readiness(n)
		if announcer.Excluded(n) {
			continue
		}
		if c.Status == corev1.ConditionTrue || c.Status == corev1.ConditionFalse && time.Since(c.LastTransitionTime.Time) < announcer.Grace {
			ready = append(ready, n.Name)
		}
	}
	var endpoints []*discoveryv1.EndpointSlice
	if s.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal {
		all := &discoveryv1.EndpointSliceList{}
		if err := r.client.List(ctx, all, client.InNamespace(s.Namespace), client.MatchingLabels{discoveryv1.LabelServiceName: s.Name}); err != nil {
			return nil, err
		}
		for i := range all.Items {
			endpoints = append(endpoints, &all.Items[i])
		}
	}
	return announcer.Candidates(s, endpoints, ready), nil
}

// publish writes the addresses where kubectl shows them.
func (r *fronts) publish(ctx context.Context, s *corev1.Service, have []netip.Addr) error {
	// What is sent there goes by the front, from inside too.
	mode := corev1.LoadBalancerIPModeProxy
	var want []corev1.LoadBalancerIngress
	var texts []string
	for _, a := range have {
		want = append(want, corev1.LoadBalancerIngress{IP: a.String(), IPMode: &mode})
		texts = append(texts, a.String())
	}
	if equality.Semantic.DeepEqual(s.Status.LoadBalancer.Ingress, want) || !s.DeletionTimestamp.IsZero() {
		return nil
	}
	old := s.DeepCopy()
	s.Status.LoadBalancer.Ingress = want
	if err := client.IgnoreNotFound(r.client.Status().Patch(ctx, s, client.MergeFrom(old))); err != nil {
		return err
	}
	if len(want) > 0 {
		r.note(s, corev1.EventTypeNormal, "LoadBalancerReady", "Reconcile", "clients come in at %s", strings.Join(texts, ", "))
	}
	return nil
}
