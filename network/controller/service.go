package controller

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/log"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/containerd/errdefs"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/identity/binding"
	"github.com/hypernetes/hypernetes/network/claim"
)

// What a Service says to us.
const (
	// LoadBalancerClass is ours; Services without a class are ours too.
	LoadBalancerClass = "hypernetes.io/pool"
	// AnnotationPool on a Service names the AddressPool.
	AnnotationPool = claim.AnnotationPool
	// AnnotationAddress on a Service asks for addresses, separated by commas, at most one
	// per family; spec.loadBalancerIP does too.
	AnnotationAddress = claim.AnnotationAddress
)

// lifeOnly lets through that an object is there or is not, and changes of metadata that
// begin its end.
var lifeOnly = predicate.Funcs{
	UpdateFunc: func(e event.UpdateEvent) bool {
		return e.ObjectOld.GetUID() != e.ObjectNew.GetUID() ||
			e.ObjectOld.GetDeletionTimestamp().IsZero() != e.ObjectNew.GetDeletionTimestamp().IsZero()
	},
}

var _ reconcile.Reconciler = (*services)(nil)

// services gives Services of type LoadBalancer their addresses. There is one worker, so
// that a quota is counted and used by one at a time.
type services struct{ base }

func (r *services) setup(m manager.Manager) error {
	waiting := func(ctx context.Context, _ client.Object) []reconcile.Request {
		list := &corev1.ServiceList{}
		if err := r.client.List(ctx, list); err != nil {
			return nil
		}
		var all []reconcile.Request
		for i := range list.Items {
			if s := &list.Items[i]; ours(s) && len(s.Status.LoadBalancer.Ingress) == 0 {
				all = append(all, one(s.Namespace, s.Name)...)
			}
		}
		return all
	}
	return ctrl.NewControllerManagedBy(m).Named("service").
		For(&corev1.Service{}).
		Watches(&v1alpha1.AddressPool{}, handler.EnqueueRequestsFromMapFunc(waiting)).
		Watches(&v1alpha1.TenantNamespace{}, handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) []reconcile.Request {
			list := &corev1.ServiceList{}
			if err := r.client.List(ctx, list, client.InNamespace(o.GetName())); err != nil {
				return nil
			}
			var all []reconcile.Request
			for i := range list.Items {
				if ours(&list.Items[i]) {
					all = append(all, one(list.Items[i].Namespace, list.Items[i].Name)...)
				}
			}
			return all
		})).
		Watches(&coordinationv1.Lease{}, handler.EnqueueRequestsFromMapFunc(func(_ context.Context, o client.Object) []reconcile.Request {
			return ownerRequest(o, claim.KindService)
		})).
		Complete(r)
}

// ours says whether we give s addresses.
func ours(s *corev1.Service) bool {
	return s.Spec.Type == corev1.ServiceTypeLoadBalancer && s.DeletionTimestamp.IsZero() &&
		(s.Spec.LoadBalancerClass == nil || *s.Spec.LoadBalancerClass == LoadBalancerClass)
}

// Reconcile implements reconcile.Reconciler.
func (r *services) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	s := &corev1.Service{}
	err := r.client.Get(ctx, req.NamespacedName, s)
	if client.IgnoreNotFound(err) != nil {
		return reconcile.Result{}, err
	}
	if err == nil && ours(s) && s.Spec.LoadBalancerClass == nil {
		if _, by, err := r.balancer(ctx, s); err != nil || by != byPool {
			return reconcile.Result{}, err
		}
	}
	// Most Services have nothing to do with us: of these the cache is asked, which will tell
	// of what it does not know yet.
	from := r.o.Claims
	if err != nil || !ours(s) {
		from.Reader = r.client
	}
	claims, cerr := from.List(ctx, claim.Address)
	if cerr != nil {
		return reconcile.Result{}, cerr
	}
	// What Services of this name before this one left is nobody's.
	var mine []claim.Claim
	for _, c := range claims {
		if o := c.Owner; o.Kind != claim.KindService || o.Namespace != req.Namespace || o.Name != req.Name {
			continue
		}
		if err == nil && ours(s) && c.Owner.UID == s.UID {
			mine = append(mine, c)
			continue
		}
		if stale, serr := r.stale(ctx, c); serr != nil {
			return reconcile.Result{}, serr
		} else if stale {
			if err := r.o.Claims.Release(ctx, c, r.quarantine(ctx, c.Pool)); err != nil {
				return reconcile.Result{}, ignoreLost(err)
			}
			log.FromContext(ctx).Info("external address released", "address", c.Address.String())
			if err == nil {
				r.note(s, corev1.EventTypeNormal, "AddressReleased", "Release", "external address %s released", c.Address)
			}
		}
	}
	if err != nil || !s.DeletionTimestamp.IsZero() {
		return reconcile.Result{}, nil
	}
	if !ours(s) {
		if s.Spec.Type != corev1.ServiceTypeLoadBalancer && len(s.Status.LoadBalancer.Ingress) > 0 {
			return reconcile.Result{}, r.publish(ctx, s, nil)
		}
		return reconcile.Result{}, nil
	}
	have, why, err := r.ensure(ctx, s, claims, mine)
	if err != nil {
		return reconcile.Result{}, err
	}
	if err := r.publish(ctx, s, have); err != nil {
		return reconcile.Result{}, err
	}
	if why == nil {
		return reconcile.Result{}, nil
	}
	r.note(s, corev1.EventTypeWarning, why.reason, "Allocate", "no external address: %s", why.message)
	return reconcile.Result{RequeueAfter: r.o.Retry}, nil
}

// stale asks the API server whether the Service that has a claim has no right to it: the
// cache may not have heard of it yet.
func (r *services) stale(ctx context.Context, c claim.Claim) (bool, error) {
	s := &corev1.Service{}
	err := r.live.Get(ctx, client.ObjectKey{Namespace: c.Owner.Namespace, Name: c.Owner.Name}, s)
	if apierrors.IsNotFound(err) {
		return true, nil
	}
	return err == nil && (s.UID != c.Owner.UID || !ours(s)), err
}

// publish writes the addresses where kubectl shows them. It is not the truth: the claims
// are.
func (r *services) publish(ctx context.Context, s *corev1.Service, have []netip.Addr) error {
	vip := corev1.LoadBalancerIPModeVIP
	var want []corev1.LoadBalancerIngress
	for _, a := range have {
		want = append(want, corev1.LoadBalancerIngress{IP: a.String(), IPMode: &vip})
	}
	if equality.Semantic.DeepEqual(s.Status.LoadBalancer.Ingress, want) {
		return nil
	}
	old := s.DeepCopy()
	s.Status.LoadBalancer.Ingress = want
	return client.IgnoreNotFound(r.client.Status().Patch(ctx, s, client.MergeFrom(old)))
}

// requested are the addresses a Service asks for.
func requested(s *corev1.Service) (map[bool]netip.Addr, error) {
	out := map[bool]netip.Addr{}
	text := s.Annotations[AnnotationAddress]
	field := "annotation " + AnnotationAddress
	if text == "" {
		text, field = s.Spec.LoadBalancerIP, "spec.loadBalancerIP"
	}
	for _, part := range strings.Split(text, ",") {
		if part = strings.TrimSpace(part); part == "" {
			continue
		}
		a, err := netip.ParseAddr(part)
		if err != nil || a.Zone() != "" {
			return nil, refuse("Invalid", "%s: %q is not an IP address", field, part)
		}
		a = a.Unmap()
		if _, twice := out[a.Is6()]; twice {
			return nil, refuse("Invalid", "%s: at most one address of each family, not %q", field, text)
		}
		out[a.Is6()] = a
	}
	return out, nil
}

// ensure returns the addresses s has and, if it lacks one, why.
func (r *services) ensure(ctx context.Context, s *corev1.Service, all, mine []claim.Claim) ([]netip.Addr, *refusal, error) {
	slices.SortFunc(mine, func(a, b claim.Claim) int { return a.Address.Compare(b.Address) })
	held := func() []netip.Addr {
		var out []netip.Addr
		for _, c := range mine {
			out = append(out, c.Address)
		}
		slices.SortFunc(out, netip.Addr.Compare)
		return out
	}
	tenant, quota, err := r.tenant(ctx, s)
	if why, ok := asRefusal(err); ok {
		return held(), why, nil
	} else if err != nil {
		return nil, nil, err
	}
	// Which nodes have endpoints nobody follows for kube-proxy's Services.
	if tenant == "" && s.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal && len(mine) == 0 {
		return nil, &refusal{"Invalid", "spec.externalTrafficPolicy: Local is for Services of tenants: outside a tenant's namespace want Cluster"}, nil
	}
	ask, err := requested(s)
	if why, ok := asRefusal(err); ok {
		return held(), why, nil
	}
	families := s.Spec.IPFamilies
	if len(families) == 0 {
		families = []corev1.IPFamily{corev1.IPv4Protocol}
	}
	for v6 := range ask {
		if !slices.Contains(families, familyOf(v6)) {
			return held(), &refusal{"Invalid", fmt.Sprintf("address: %s is of a family that spec.ipFamilies has not (%v)", ask[v6], families)}, nil
		}
	}
	used, err := r.balanced(ctx, tenant, all)
	if err != nil {
		return nil, nil, err
	}
	owner := claim.OwnerOf(claim.KindService, s)
	pool := s.Annotations[AnnotationPool]
	var missing []*refusal
	for _, family := range families {
		v6 := family == corev1.IPv6Protocol
		want := ask[v6]
		i := slices.IndexFunc(mine, func(c claim.Claim) bool { return c.Address.Is6() == v6 })
		if want.IsValid() {
			if j := slices.IndexFunc(mine, func(c claim.Claim) bool { return c.Address == want }); j >= 0 {
				i = j
			}
		}
		if i >= 0 && (!want.IsValid() || mine[i].Address == want) && (pool == "" || mine[i].Pool == pool) {
			continue
		}
		if i < 0 && tenant != "" && used >= quota {
			missing = append(missing, &refusal{"QuotaExceeded", fmt.Sprintf(
				"quota: tenant %s has %d of %d external addresses of Services: delete one, or ask the operator for more", tenant, used, quota)})
			continue
		}
		a, from, err := r.take(ctx, wish{tenant: tenant, pool: pool, address: want, v6: v6}, owner)
		if why, ok := asRefusal(err); ok {
			missing = append(missing, why)
			continue
		} else if err != nil {
			return nil, nil, err
		}
		used++
		r.note(s, corev1.EventTypeNormal, "AddressAllocated", "Allocate", "external address %s of AddressPool %s", a, from)
		log.FromContext(ctx).Info("external address allocated", "address", a.String(), "pool", from, "tenant", tenant)
		if mine, err = r.o.Claims.Owned(ctx, claim.Address, owner); err != nil {
			return nil, nil, err
		}
		// The new one first, then the old one goes.
		if mine, err = r.drop(ctx, mine, func(c claim.Claim) bool { return c.Address.Is6() == v6 && c.Address != a }); err != nil {
			return nil, nil, err
		}
	}
	// Of families that it no longer has, and seconds left by a controller that died.
	seen := map[bool]bool{}
	mine, err = r.drop(ctx, mine, func(c claim.Claim) bool {
		v6 := c.Address.Is6()
		extra := seen[v6] || !slices.Contains(families, familyOf(v6))
		if want := ask[v6]; want.IsValid() && c.Address != want && slices.ContainsFunc(mine, func(o claim.Claim) bool { return o.Address == want }) {
			return true
		}
		seen[v6] = true
		return extra
	})
	if err != nil {
		return nil, nil, err
	}
	if len(missing) == 0 {
		return held(), nil, nil
	}
	// One family is enough where the second is only preferred and nothing named it.
	policy := s.Spec.IPFamilyPolicy
	if len(mine) > 0 && len(ask) == 0 && policy != nil && *policy == corev1.IPFamilyPolicyPreferDualStack &&
		!slices.ContainsFunc(missing, func(m *refusal) bool { return m.reason != "NoPool" && m.reason != "PoolExhausted" }) {
		return held(), nil, nil
	}
	return held(), missing[0], nil
}

func (r *services) drop(ctx context.Context, mine []claim.Claim, which func(claim.Claim) bool) ([]claim.Claim, error) {
	var kept []claim.Claim
	for _, c := range mine {
		if !which(c) {
			kept = append(kept, c)
			continue
		}
		if err := r.o.Claims.Release(ctx, c, r.quarantine(ctx, c.Pool)); err != nil {
			return nil, err
		}
	}
	return kept, nil
}

func familyOf(v6 bool) corev1.IPFamily {
	if v6 {
		return corev1.IPv6Protocol
	}
	return corev1.IPv4Protocol
}

// tenant is whose Service s is, "" for nobody's, and how many addresses that one may have.
func (r *services) tenant(ctx context.Context, s *corev1.Service) (string, int, error) {
	ns := &corev1.Namespace{}
	if err := r.client.Get(ctx, client.ObjectKey{Name: s.Namespace}, ns); err != nil {
		return "", 0, err
	}
	b, ok, err := binding.Of(ctx, r.client, ns)
	if errdefs.IsUnavailable(err) {
		return "", 0, refuse("NamespaceNotBound", "%v", err)
	}
	if err != nil || !ok {
		return "", 0, err
	}
	t := &v1alpha1.Tenant{}
	if err := r.client.Get(ctx, client.ObjectKey{Name: b.Tenant}, t); apierrors.IsNotFound(err) {
		return "", 0, refuse("NoTenant", "tenant %s is gone", b.Tenant)
	} else if err != nil {
		return "", 0, err
	}
	return t.Name, balancerQuota(t), nil
}
