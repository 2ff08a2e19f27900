// Package octavia owns Services of class hypernetes.io/octavia, and those without a class
// that nobody else balances for: a load balancer of the cloud in the Service's Network,
// whose members are the Pods, with a floating IP before it.
//
// It is found by the mark in its description, which is there from the moment it is made,
// and in the tenant's project only: nothing that a tenant may write on a Service is
// believed. Octavia takes one change at a time, so each round does the next one there is
// (package-private plan, which is pure) and comes again when that is done. It must not know
// nodes.
package octavia

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/tools/events"
	"k8s.io/client-go/util/workqueue"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	ctrlcontroller "sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/log"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/identity/binding"
	"github.com/hypernetes/hypernetes/network/claim"
	"github.com/hypernetes/hypernetes/network/controller"
	"github.com/hypernetes/hypernetes/network/openstack"
	"github.com/hypernetes/hypernetes/network/provider"
)

// What a Service says to us.
const (
	// Class selects us.
	Class = "hypernetes.io/octavia"
	// Finalizer keeps a Service until its load balancer is gone.
	Finalizer = controller.FinalizerBalancer
	// AnnotationInternal "true" asks for no floating IP.
	AnnotationInternal = "hypernetes.io/internal-load-balancer"
)

// Addresses gives load balancers floating IPs; the provider of Networks does.
type Addresses interface {
	EnsureAddress(ctx context.Context, f *v1alpha1.FloatingIP, target *v1alpha1.Port) (provider.AddressState, error)
	ReleaseAddress(ctx context.Context, f *v1alpha1.FloatingIP) error
}

// Unclassed says which Services without a class are ours.
type Unclassed interface {
	Balances(ctx context.Context, s *corev1.Service) (bool, error)
}

// Options of Setup.
type Options struct {
	Cloud     *openstack.Cloud
	Addresses Addresses
	Unclassed Unclassed
	// Cluster and Projects as package neutron has them.
	Cluster  string
	Projects func(ctx context.Context, tenant string) (string, error)
	// Provider of Octavia; its default if empty.
	Provider string
	// Resync is how often what others may change is compared, Poll how often a load balancer
	// that is being changed is looked at.
	Resync, Poll time.Duration
}

var _ reconcile.Reconciler = (*reconciler)(nil)

type reconciler struct {
	client   client.Client
	live     client.Reader
	events   events.EventRecorder
	o        Options
	failures workqueue.TypedRateLimiter[reconcile.Request]

	mu sync.Mutex
	// stepwise is set when the cloud has shown that it does not finish load balancers that
	// are made whole; pending is since when parts of one are unfinished.
	stepwise bool
	pending  map[string]time.Time
	// told is the last reason an event was made of: one fault that lasts makes few.
	told map[reconcile.Request]string
}

// news says whether a reason is another than the last one; "" is that all is well.
func (r *reconciler) news(req reconcile.Request, reason string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	was := r.told[req]
	if reason == "" {
		delete(r.told, req)
	} else {
		r.told[req] = reason
	}
	return was != reason
}

// stuckAfter is how many polls parts of a load balancer may be unfinished.
const stuckAfter = 30

// stuck says whether a load balancer's parts have been unfinished for too long.
func (r *reconciler) stuck(s sight) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	id := s.Balancer.ID
	since, ok := r.pending[id]
	switch {
	case !s.pending():
		delete(r.pending, id)
		return false
	case !ok:
		r.pending[id] = time.Now()
		return false
	case time.Since(since) < stuckAfter*r.o.Poll:
		return false
	}
	delete(r.pending, id)
	r.stepwise = true
	return true
}

func (r *reconciler) isStepwise() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.stepwise
}

// Setup registers the reconciler.
func Setup(m manager.Manager, o Options) error {
	o.Resync, o.Poll = cmp.Or(o.Resync, time.Minute), cmp.Or(o.Poll, time.Second)
	r := &reconciler{
		client: m.GetClient(), live: m.GetAPIReader(), events: m.GetEventRecorder("h8s-controller"), o: o,
		pending: map[string]time.Time{}, told: map[reconcile.Request]string{},
		failures: workqueue.NewTypedItemExponentialFailureRateLimiter[reconcile.Request](o.Poll, time.Minute),
	}
	named := func(namespace, name string) []reconcile.Request {
		return []reconcile.Request{{NamespacedName: types.NamespacedName{Namespace: namespace, Name: name}}}
	}
	if err := m.Add(r); err != nil {
		return err
	}
	which := func(ctx context.Context, f func(*corev1.Service) bool, opts ...client.ListOption) []reconcile.Request {
		list := &corev1.ServiceList{}
		if err := r.client.List(ctx, list, opts...); err != nil {
			return nil
		}
		var all []reconcile.Request
		for i := range list.Items {
			if s := &list.Items[i]; f(s) {
				all = append(all, named(s.Namespace, s.Name)...)
			}
		}
		return all
	}
	waiting := func(s *corev1.Service) bool { return unclassed(s) && len(s.Status.LoadBalancer.Ingress) == 0 }
	return ctrl.NewControllerManagedBy(m).Named("octavia").
		WithOptions(ctrlcontroller.Options{MaxConcurrentReconciles: 4}).
		For(&corev1.Service{}).
		Watches(&discoveryv1.EndpointSlice{}, handler.EnqueueRequestsFromMapFunc(func(_ context.Context, o client.Object) []reconcile.Request {
			return named(o.GetNamespace(), o.GetLabels()[discoveryv1.LabelServiceName])
		})).
		Watches(&v1alpha1.TenantNamespace{}, handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) []reconcile.Request {
			return which(ctx, func(s *corev1.Service) bool { return ours(s) || unclassed(s) }, client.InNamespace(o.GetName()))
		})).
		Watches(&v1alpha1.Network{}, handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, _ client.Object) []reconcile.Request {
			return which(ctx, waiting)
		})).
		Watches(&v1alpha1.AddressPool{}, handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, _ client.Object) []reconcile.Request {
			return which(ctx, waiting)
		})).
		Complete(r)
}

// ours says whether a Service wants a load balancer of us.
func ours(s *corev1.Service) bool {
	return s.Spec.Type == corev1.ServiceTypeLoadBalancer && s.DeletionTimestamp.IsZero() &&
		s.Spec.LoadBalancerClass != nil && *s.Spec.LoadBalancerClass == Class
}

// unclassed says whether a Service wants a load balancer of whoever gives one.
func unclassed(s *corev1.Service) bool {
	return s.Spec.Type == corev1.ServiceTypeLoadBalancer && s.DeletionTimestamp.IsZero() && s.Spec.LoadBalancerClass == nil
}

func refuse(reason, format string, args ...any) error {
	return provider.Faultf(reason, "%s: %w", fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
}

// errBusy says that Octavia is at work.
var errBusy = errors.New("the load balancer is being changed")

// Reconcile implements reconcile.Reconciler.
func (r *reconciler) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	s := &corev1.Service{}
	if err := r.client.Get(ctx, req.NamespacedName, s); err != nil {
		r.failures.Forget(req)
		r.news(req, "")
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	mine := ours(s)
	if unclassed(s) {
		var err error
		if mine, err = r.o.Unclassed.Balances(ctx, s); ctx.Err() != nil {
			return reconcile.Result{}, ctx.Err()
		} else if err != nil { // who else looks at it says why
			return reconcile.Result{RequeueAfter: max(r.failures.When(req), provider.RetryAfter(err))}, nil
		}
	}
	if !mine && !controllerutil.ContainsFinalizer(s, Finalizer) {
		return reconcile.Result{}, nil
	}
	var address string
	var err error
	if mine {
		address, err = r.ensure(ctx, s)
	} else {
		err = r.release(ctx, s)
	}
	switch {
	case ctx.Err() != nil:
		return reconcile.Result{}, ctx.Err()
	case errors.Is(err, errBusy):
		return reconcile.Result{RequeueAfter: r.o.Poll}, nil
	case apierrors.IsConflict(err):
		return reconcile.Result{RequeueAfter: r.o.Poll}, nil
	case err != nil:
		reason := provider.Reason(err, "LoadBalancerFailed")
		if r.news(req, reason) || r.failures.NumRequeues(req)%10 == 0 {
			r.note(s, corev1.EventTypeWarning, reason, "Reconcile", "load balancer: %v", err)
		}
		log.FromContext(ctx).Info("load balancer", "reason", err.Error())
		return reconcile.Result{RequeueAfter: max(r.failures.When(req), provider.RetryAfter(err))}, nil
	}
	r.failures.Forget(req)
	r.news(req, "")
	if !mine {
		return reconcile.Result{}, r.publish(ctx, s, "")
	}
	if err := r.publish(ctx, s, address); err != nil {
		return reconcile.Result{}, err
	}
	return reconcile.Result{RequeueAfter: wait.Jitter(r.o.Resync, 0.2)}, nil
}

func (r *reconciler) note(s *corev1.Service, kind, reason, action, format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	r.events.Eventf(s, nil, kind, reason, action, "%s", text[:min(len(text), 1000)])
}

// publish writes the address where kubectl shows it.
func (r *reconciler) publish(ctx context.Context, s *corev1.Service, address string) error {
	var want []corev1.LoadBalancerIngress
	if address != "" {
		// What is sent there goes through the load balancer, from inside too.
		mode := corev1.LoadBalancerIPModeProxy
		want = []corev1.LoadBalancerIngress{{IP: address, IPMode: &mode}}
	}
	if equality.Semantic.DeepEqual(s.Status.LoadBalancer.Ingress, want) || !s.DeletionTimestamp.IsZero() {
		return nil
	}
	old := s.DeepCopy()
	s.Status.LoadBalancer.Ingress = want
	if err := client.IgnoreNotFound(r.client.Status().Patch(ctx, s, client.MergeFrom(old))); err != nil {
		return err
	}
	if address != "" {
		r.note(s, corev1.EventTypeNormal, "LoadBalancerReady", "Reconcile", "load balancer of Octavia at %s", address)
	}
	return nil
}

// Collections of Octavia's API.
const (
	balancers = "lbaas/loadbalancers"
	listeners = "lbaas/listeners"
	pools     = "lbaas/pools"
	members_  = "members"
)

func of(path string) openstack.Collection {
	k := path[strings.LastIndex(path, "/")+1:]
	return openstack.Collection{Path: path, Key: k, One: strings.TrimSuffix(k, "s")}
}

func (r *reconciler) mark(uid types.UID) string {
	return "hypernetes cluster=" + r.o.Cluster + " uid=" + string(uid)
}

// network is what a Service's namespace is bound to.
func (r *reconciler) network(ctx context.Context, s *corev1.Service) (*v1alpha1.Network, error) {
	ns := &corev1.Namespace{}
	if err := r.client.Get(ctx, client.ObjectKey{Name: s.Namespace}, ns); err != nil {
		return nil, err
	}
	b, ok, err := binding.Of(ctx, r.client, ns)
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, refuse("NoNetwork", "spec.loadBalancerClass: namespace %s is bound to no Network: leave the class out", s.Namespace)
	}
	n := &v1alpha1.Network{}
	if err := r.client.Get(ctx, client.ObjectKey{Namespace: b.TenantNamespace.Namespace, Name: b.TenantNamespace.Spec.Network}, n); err != nil {
		return nil, err
	}
	if n.Status.Provider != provider.Neutron {
		return nil, refuse("WrongProvider", "spec.loadBalancerClass: Network %s is of provider %s, and %s balances for those of %s: leave the class out", n.Name, n.Status.Provider, Class, provider.Neutron)
	}
	return n, nil
}

// cloud is a client for a tenant's project.
func (r *reconciler) cloud(ctx context.Context, tenant string) (*openstack.Client, string, error) {
	project, err := r.o.Projects(ctx, tenant)
	if err != nil {
		return nil, "", err
	}
	c, err := r.o.Cloud.Client(ctx, openstack.LoadBalancer, project)
	if errdefs.IsNotFound(err) {
		return nil, "", refuse("NoOctavia", "spec.loadBalancerClass: %v: leave the class out", err)
	}
	return c, project, err
}

// find returns the load balancer of a mark, the oldest one.
func find(ctx context.Context, c *openstack.Client, project, mark string) (*balancer, error) {
	all, err := openstack.List[balancer](ctx, c, of(balancers), url.Values{"project_id": {project}, "description": {mark}})
	if err != nil {
		return nil, err
	}
	all = slices.DeleteFunc(all, func(b balancer) bool { return b.Project != project || b.Description != mark })
	if len(all) == 0 {
		return nil, nil
	}
	b := slices.MinFunc(all, func(a, b balancer) int { return strings.Compare(a.Created+a.ID, b.Created+b.ID) })
	return &b, nil
}

// ensure does the next thing for a Service and returns its address when all is done.
func (r *reconciler) ensure(ctx context.Context, s *corev1.Service) (address string, err error) {
	n, err := r.network(ctx, s)
	if err != nil {
		return "", err
	}
	list := &discoveryv1.EndpointSliceList{}
	if err := r.client.List(ctx, list, client.InNamespace(s.Namespace), client.MatchingLabels{discoveryv1.LabelServiceName: s.Name}); err != nil {
		return "", err
	}
	w, err := desire(s, list.Items, n)
	if err != nil {
		return "", err
	}
	c, project, err := r.cloud(ctx, n.Status.Tenant)
	if err != nil {
		return "", err
	}
	w.Mark, w.Project, w.Provider, w.Stepwise = r.mark(s.UID), project, r.o.Provider, r.isStepwise()
	w.Tags = []string{"hypernetes", "h8s-cluster=" + r.o.Cluster, "h8s-uid=" + string(s.UID)}
	// Before there is anything, so that nothing is forgotten.
	if old := s.DeepCopy(); controllerutil.AddFinalizer(s, Finalizer) {
		if err := r.client.Patch(ctx, s, client.MergeFromWithOptions(old, client.MergeFromWithOptimisticLock{})); err != nil {
			return "", err
		}
	}
	seen := sight{Members: map[string][]member{}}
	if seen.Balancer, err = find(ctx, c, project, w.Mark); err != nil {
		return "", err
	}
	if b := seen.Balancer; b != nil {
		switch {
		case strings.HasPrefix(b.Provisioning, "PENDING_"):
			return "", errBusy
		case b.Provisioning == "ERROR":
			// Octavia mends none of its own accord; its address is the floating IP's and stays.
			if err := openstack.Remove(ctx, c, of(balancers), b.ID, url.Values{"cascade": {"true"}}); err != nil {
				return "", err
			}
			return "", provider.Faultf("LoadBalancerError", "Octavia says ERROR of load balancer %s: it is made anew: %w", b.ID, errdefs.ErrUnavailable)
		}
		if err := look(ctx, c, &seen); err != nil {
			return "", err
		}
		if r.stuck(seen) {
			if err := openstack.Remove(ctx, c, of(balancers), b.ID, url.Values{"cascade": {"true"}}); err != nil {
				return "", err
			}
			return "", provider.Faultf("LoadBalancerStuck", "Octavia does not finish the parts of load balancer %s: it is made anew, part by part: %w", b.ID, errdefs.ErrUnavailable)
		}
		if seen.pending() {
			return "", errBusy
		}
	}
	if x, ok := plan(w, seen); ok {
		return "", do(ctx, c, x)
	}
	f, port := r.floating(s, n.Status.Tenant, seen.Balancer)
	if s.Annotations[AnnotationInternal] == "true" || strings.Contains(seen.Balancer.VIP, ":") {
		return seen.Balancer.VIP, r.o.Addresses.ReleaseAddress(ctx, f)
	}
	st, err := r.o.Addresses.EnsureAddress(ctx, f, port)
	if err != nil {
		return "", err
	}
	return st.Address, nil
}

// floating is the floating IP of a Service, as the provider knows such.
func (r *reconciler) floating(s *corev1.Service, tenant string, b *balancer) (*v1alpha1.FloatingIP, *v1alpha1.Port) {
	f := &v1alpha1.FloatingIP{ObjectMeta: metav1.ObjectMeta{Namespace: v1alpha1.Home(tenant), Name: s.Name, UID: s.UID}}
	f.Spec.Address = cmp.Or(s.Annotations[claim.AnnotationAddress], s.Spec.LoadBalancerIP)
	if b == nil {
		return f, nil
	}
	x := &v1alpha1.Port{ObjectMeta: metav1.ObjectMeta{Namespace: f.Namespace, Name: s.Name}}
	x.Spec.Addresses, x.Status.ProviderPortID = []string{b.VIP}, b.VIPPort
	return f, x
}

func look(ctx context.Context, c *openstack.Client, s *sight) error {
	q := url.Values{"loadbalancer_id": {s.Balancer.ID}}
	var err error
	if s.Listeners, err = openstack.List[listener](ctx, c, of(listeners), url.Values{"load_balancer_id": {s.Balancer.ID}}); err != nil {
		return err
	}
	if s.Pools, err = openstack.List[pool](ctx, c, of(pools), q); err != nil {
		return err
	}
	for _, p := range s.Pools {
		all, err := openstack.List[member](ctx, c, of(pools+"/"+url.PathEscape(p.ID)+"/members"), nil)
		if err != nil {
			return err
		}
		s.Members[p.ID] = all
	}
	return nil
}

// do takes a step. Octavia is errBusy then, or was already.
func do(ctx context.Context, c *openstack.Client, x step) error {
	var err error
	switch {
	case x.Kind == members_:
		err = c.Do(ctx, http.MethodPut, pools+"/"+url.PathEscape(x.ID)+"/members", nil, x.Body, nil)
	case x.Verb == drop:
		err = openstack.Remove(ctx, c, of(x.Kind), x.ID, nil)
	default:
		_, err = openstack.Put[struct{}](ctx, c, of(x.Kind), x.ID, x.Body)
	}
	switch {
	case err == nil, errdefs.IsConflict(err):
		return errBusy
	case errdefs.IsPermissionDenied(err) && strings.Contains(err.Error(), "uota"):
		return provider.Faultf("QuotaExceeded", "the project's quota at Octavia is used up: delete what is not needed, or ask the cloud's operator for more: %w", err)
	case errdefs.IsInvalidArgument(err):
		return provider.Faultf("LoadBalancerRefused", "%w", err)
	}
	return err
}

// release removes what a Service has, and then its finalizer.
func (r *reconciler) release(ctx context.Context, s *corev1.Service) error {
	// Its namespace may be bound no longer: whose it is says the one that made it.
	tenant, err := r.tenant(ctx, s)
	if err != nil {
		return err
	}
	if tenant != "" {
		c, project, err := r.cloud(ctx, tenant)
		if err != nil {
			return err
		}
		f, _ := r.floating(s, tenant, nil)
		if err := r.o.Addresses.ReleaseAddress(ctx, f); err != nil {
			return err
		}
		b, err := find(ctx, c, project, r.mark(s.UID))
		if err != nil {
			return err
		}
		if b != nil {
			if b.Provisioning == "PENDING_DELETE" {
				return errBusy
			}
			err := openstack.Remove(ctx, c, of(balancers), b.ID, url.Values{"cascade": {"true"}})
			if err == nil || errdefs.IsConflict(err) {
				return errBusy
			}
			return err
		}
	}
	old := s.DeepCopy()
	controllerutil.RemoveFinalizer(s, Finalizer)
	return client.IgnoreNotFound(r.client.Patch(ctx, s, client.MergeFromWithOptions(old, client.MergeFromWithOptimisticLock{})))
}

// tenant is whose a Service is: of the binding of its namespace, which lasts as long as
// the namespace does.
func (r *reconciler) tenant(ctx context.Context, s *corev1.Service) (string, error) {
	ns := &corev1.Namespace{}
	if err := r.client.Get(ctx, client.ObjectKey{Name: s.Namespace}, ns); err != nil {
		return "", client.IgnoreNotFound(err)
	}
	b, ok, err := binding.Of(ctx, r.client, ns)
	if err != nil || !ok {
		return "", err
	}
	return b.Tenant, nil
}
