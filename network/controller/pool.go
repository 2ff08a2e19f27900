package controller

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/claim"
	"github.com/hypernetes/hypernetes/network/ipam"
	"github.com/hypernetes/hypernetes/network/subnet"
)

// usable says whether a tenant may have addresses of p; "" is nobody's namespace.
func usable(p *v1alpha1.AddressPool, tenant string) bool {
	return p.DeletionTimestamp.IsZero() && (len(p.Spec.Tenants) == 0 || (tenant != "" && slices.Contains(p.Spec.Tenants, tenant)))
}

// wish is what is asked of the pools.
type wish struct {
	tenant string
	// pool by name; any if empty.
	pool string
	// address asked for; any of the family if not valid.
	address netip.Addr
	v6      bool
}

// refusal is why nothing can be had; its text is for the tenant.
type refusal struct{ reason, message string }

func (r *refusal) Error() string { return r.message }

func refuse(reason, format string, args ...any) error {
	return &refusal{reason, fmt.Sprintf(format, args...)}
}

// choose returns the pool a wish is about.
func choose(all []v1alpha1.AddressPool, w wish) (*v1alpha1.AddressPool, ipam.Pool, error) {
	type candidate struct {
		*v1alpha1.AddressPool
		addresses ipam.Pool
	}
	var may []candidate
	for i := range all {
		if !usable(&all[i], w.tenant) {
			continue
		}
		if a, err := ipam.ParsePool(all[i].Spec.Addresses); err == nil {
			may = append(may, candidate{&all[i], a})
		}
	}
	slices.SortFunc(may, func(a, b candidate) int { return cmp.Compare(a.Name, b.Name) })
	names := func() string {
		if len(may) == 0 {
			return "there is none you may use: ask the operator for an AddressPool"
		}
		var s []string
		for _, c := range may {
			s = append(s, c.Name)
		}
		return "choose one of " + strings.Join(s, ", ")
	}
	if w.pool != "" {
		i := slices.IndexFunc(may, func(c candidate) bool { return c.Name == w.pool })
		if i < 0 {
			return nil, ipam.Pool{}, refuse("NoPool", "pool: no AddressPool %q for you: %s", w.pool, names())
		}
		if w.address.IsValid() && !may[i].addresses.Contains(w.address) {
			return nil, ipam.Pool{}, refuse("AddressNotInPool", "address: %s is not in AddressPool %s (%s)",
				w.address, w.pool, strings.Join(may[i].Spec.Addresses, ", "))
		}
		return may[i].AddressPool, may[i].addresses, nil
	}
	if w.address.IsValid() {
		for _, c := range may {
			if c.addresses.Contains(w.address) {
				return c.AddressPool, c.addresses, nil
			}
		}
		return nil, ipam.Pool{}, refuse("AddressNotInPool", "address: %s is in no AddressPool you may use", w.address)
	}
	family := slices.DeleteFunc(slices.Clone(may), func(c candidate) bool {
		return c.addresses.Family(w.v6).Size() == 0
	})
	if len(family) == 0 {
		if len(may) == 0 {
			return nil, ipam.Pool{}, refuse("NoPool", "pool: %s", names())
		}
		return nil, ipam.Pool{}, refuse("NoPool", "pool: no AddressPool you may use has addresses of %s", familyName(w.v6))
	}
	defaults := slices.DeleteFunc(slices.Clone(family), func(c candidate) bool { return !c.Spec.Default })
	switch {
	case len(defaults) > 0:
		return defaults[0].AddressPool, defaults[0].addresses, nil
	case len(family) == 1:
		return family[0].AddressPool, family[0].addresses, nil
	}
	may = family
	return nil, ipam.Pool{}, refuse("PoolAmbiguous", "pool: several are possible and none is the default: %s", names())
}

func familyName(v6 bool) string {
	if v6 {
		return "IPv6"
	}
	return "IPv4"
}

// take claims an address as wished. What cannot be had is a refusal.
func (b base) take(ctx context.Context, w wish, owner claim.Owner) (netip.Addr, string, error) {
	list := &v1alpha1.AddressPoolList{}
	if err := b.client.List(ctx, list); err != nil {
		return netip.Addr{}, "", err
	}
	pool, addresses, err := choose(list.Items, w)
	if err != nil {
		return netip.Addr{}, "", err
	}
	if !meta.IsStatusConditionTrue(pool.Status.Conditions, v1alpha1.ConditionReady) {
		return netip.Addr{}, "", refuse("PoolNotReady", "pool: AddressPool %s is not ready: ask the operator", pool.Name)
	}
	req := claim.Request{Owner: owner, Tenant: w.tenant, Pool: pool.Name, Explicit: w.address.IsValid()}
	if w.address.IsValid() {
		err := b.o.Claims.ClaimAddress(ctx, w.address, req)
		switch {
		case errdefs.IsAlreadyExists(err):
			return netip.Addr{}, "", refuse("AddressInUse", "address: %s is taken: ask for another, or for none", w.address)
		case errdefs.IsUnavailable(err):
			return netip.Addr{}, "", refuse("AddressKeptBack", "address: %s was released a moment ago and is kept back for %d s", w.address, quarantine(pool)/time.Second)
		case err != nil:
			return netip.Addr{}, "", err
		}
		return w.address, pool.Name, nil
	}
	claims, err := b.o.Claims.List(ctx, claim.Address)
	if err != nil {
		return netip.Addr{}, "", err
	}
	taken := map[netip.Addr]bool{}
	for _, c := range claims {
		taken[c.Address] = c.Held() || time.Now().Before(c.FreeAt)
	}
	for a := range addresses.Family(w.v6).Addresses() {
		if taken[a] || !claim.Claimable(a) || b.unfit(a) {
			continue
		}
		err := b.o.Claims.ClaimAddress(ctx, a, req)
		if err == nil {
			return a, pool.Name, nil
		}
		if !errdefs.IsAlreadyExists(err) && !errdefs.IsUnavailable(err) {
			return netip.Addr{}, "", err
		}
	}
	return netip.Addr{}, "", refuse("PoolExhausted", "pool: AddressPool %s has no free address of %s: release one, or ask the operator for more", pool.Name, familyName(w.v6))
}

// unfit says that an address means something else in every Network.
func (b base) unfit(a netip.Addr) bool {
	return a.IsLoopback() || a.IsMulticast() || a.IsLinkLocalUnicast() || a.IsUnspecified() ||
		slices.ContainsFunc(b.o.Limits.Services, func(p netip.Prefix) bool { return p.Contains(a) })
}

// quarantine is how long a released address is kept back.
func (b base) quarantine(ctx context.Context, pool string) time.Duration {
	p := &v1alpha1.AddressPool{}
	if err := b.client.Get(ctx, client.ObjectKey{Name: pool}, p); err != nil {
		return quarantine(&v1alpha1.AddressPool{})
	}
	return quarantine(p)
}

func quarantine(p *v1alpha1.AddressPool) time.Duration {
	return time.Duration(ptr.Deref(p.Spec.QuarantineSeconds, v1alpha1.DefaultQuarantine)) * time.Second
}

// asRefusal is the refusal that err is.
func asRefusal(err error) (*refusal, bool) {
	var r *refusal
	ok := errors.As(err, &r)
	return r, ok
}

var _ reconcile.Reconciler = (*pools)(nil)

// pools reconciles AddressPools.
type pools struct{ base }

func (r *pools) setup(m manager.Manager) error {
	all := func(ctx context.Context) []reconcile.Request {
		list := &v1alpha1.AddressPoolList{}
		if err := r.client.List(ctx, list); err != nil {
			return nil
		}
		var reqs []reconcile.Request
		for i := range list.Items {
			reqs = append(reqs, one("", list.Items[i].Name)...)
		}
		return reqs
	}
	return ctrl.NewControllerManagedBy(m).Named("addresspool").
		For(&v1alpha1.AddressPool{}).
		Watches(&v1alpha1.AddressPool{}, handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, _ client.Object) []reconcile.Request {
			return all(ctx) // overlaps
		})).
		Watches(&coordinationv1.Lease{}, handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) []reconcile.Request {
			if o.GetLabels()[claim.LabelKind] != claim.Address {
				return nil
			}
			return all(ctx)
		})).
		Complete(r)
}

// Reconcile implements reconcile.Reconciler.
func (r *pools) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	p := &v1alpha1.AddressPool{}
	if err := r.client.Get(ctx, req.NamespacedName, p); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	old := p.DeepCopy()
	claims, err := r.o.Claims.List(ctx, claim.Address)
	if err != nil {
		return reconcile.Result{}, err
	}
	addresses, perr := ipam.ParsePool(p.Spec.Addresses)
	inside := 0
	var users, outside []string
	for _, c := range claims {
		in := perr == nil && addresses.Contains(c.Address)
		if in {
			inside++
		}
		if c.Held() && c.Pool == p.Name {
			users = append(users, fmt.Sprintf("%s (%s)", c.Address, c.Owner))
			if !in {
				outside = append(outside, fmt.Sprintf("%s (%s)", c.Address, c.Owner))
			}
		}
	}
	if !p.DeletionTimestamp.IsZero() {
		if len(users) == 0 {
			return reconcile.Result{}, dropFinalizer(ctx, r.client, p)
		}
		if set(&p.Status.Conditions, p.Generation, v1alpha1.ConditionBlocked, metav1.ConditionTrue, "InUse",
			"addresses are in use: "+listed(users)) {
			r.note(p, corev1.EventTypeWarning, "DeletionBlocked", "Delete", "addresses are in use: %s", listed(users))
		}
		return reconcile.Result{RequeueAfter: r.o.Retry}, r.patchStatus(ctx, p, old)
	}
	if controllerutil.AddFinalizer(p, v1alpha1.Finalizer) {
		if err := r.client.Patch(ctx, p, client.MergeFromWithOptions(old, client.MergeFromWithOptimisticLock{})); err != nil {
			return reconcile.Result{}, client.IgnoreNotFound(err)
		}
		old = p.DeepCopy()
	}
	list := &v1alpha1.AddressPoolList{}
	if err := r.client.List(ctx, list); err != nil {
		return reconcile.Result{}, err
	}
	p.Status.Total = addresses.Size()
	p.Status.Free = max(0, p.Status.Total-int32(inside))
	reason, message := poolFault(p, addresses, perr, list.Items, r.o.Limits)
	status := metav1.ConditionFalse
	if reason == "" {
		status, reason, message = metav1.ConditionTrue, "Ready", "addresses are given away"
	}
	if set(&p.Status.Conditions, p.Generation, v1alpha1.ConditionReady, status, reason, message) && status == metav1.ConditionFalse {
		r.note(p, corev1.EventTypeWarning, reason, "Reconcile", "%s", message)
	}
	// Addresses that are in use stay with who has them; nobody else gets them.
	if len(outside) > 0 {
		if set(&p.Status.Conditions, p.Generation, conditionShrunk, metav1.ConditionTrue, "InUseOutside",
			"addresses that are no longer in spec.addresses are still in use: "+listed(outside)) {
			r.note(p, corev1.EventTypeWarning, "InUseOutside", "Reconcile", "addresses that were taken out are still in use: %s", listed(outside))
		}
	} else {
		meta.RemoveStatusCondition(&p.Status.Conditions, conditionShrunk)
	}
	if free := p.Status.Free; free == 0 && old.Status.Free > 0 {
		r.note(p, corev1.EventTypeWarning, "PoolExhausted", "Allocate", "no address is left")
	}
	return reconcile.Result{}, r.patchStatus(ctx, p, old)
}

// conditionShrunk is true while addresses are in use that a pool no longer has.
const conditionShrunk = "AddressesOutside"

func (r *pools) patchStatus(ctx context.Context, p, old *v1alpha1.AddressPool) error {
	if equality.Semantic.DeepEqual(p.Status, old.Status) {
		return nil
	}
	return client.IgnoreNotFound(r.client.Status().Patch(ctx, p, client.MergeFrom(old)))
}

// poolFault says what is wrong with a pool.
func poolFault(p *v1alpha1.AddressPool, addresses ipam.Pool, perr error, all []v1alpha1.AddressPool, l subnet.Limits) (reason, message string) {
	if perr != nil {
		return "Invalid", "spec.addresses: " + perr.Error()
	}
	for _, s := range l.Services {
		if addresses.Overlaps(s) {
			return "Invalid", fmt.Sprintf("spec.addresses: overlaps with the cluster's Service range %s: take that out", s)
		}
	}
	for _, s := range []string{"0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3", "::/16", "fe80::/10", "ff00::/8"} {
		if addresses.Overlaps(netip.MustParsePrefix(s)) {
			return "Invalid", fmt.Sprintf("spec.addresses: overlaps with %s, which hosts treat specially: take that out", s)
		}
	}
	for i := range all {
		o := &all[i]
		if o.Name == p.Name || !before(o, p) {
			continue
		}
		other, err := ipam.ParsePool(o.Spec.Addresses)
		if err != nil {
			continue
		}
		for _, a := range addresses.Ranges() {
			for _, b := range other.Ranges() {
				if a.Contains(b.First) || b.Contains(a.First) {
					return "Overlap", fmt.Sprintf("spec.addresses: %s is also in AddressPool %s: leave it in one of them", a, o.Name)
				}
			}
		}
	}
	return "", ""
}
