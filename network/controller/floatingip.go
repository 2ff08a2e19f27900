package controller

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/containerd/errdefs"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/identity/binding"
	"github.com/hypernetes/hypernetes/network/claim"
	"github.com/hypernetes/hypernetes/network/provider"
)

// Phases of a FloatingIP.
const (
	floatingPending     = "Pending"
	floatingHeld        = "Held"
	floatingActive      = "Active"
	floatingTerminating = "Terminating"
)

// onTheirWay are the reasons of what is as it should be, or will be in a moment.
var onTheirWay = []string{"NoTarget", notYet, "NamespaceNotBound", "PodNotPlugged", "NotPlugged"}

var _ reconcile.Reconciler = (*floatingIPs)(nil)

// floatingIPs reconciles FloatingIPs.
type floatingIPs struct{ base }

func (r *floatingIPs) setup(m manager.Manager) error {
	home := func(ctx context.Context, o client.Object) []reconcile.Request {
		return r.of(ctx, nil, client.InNamespace(o.GetNamespace()))
	}
	pending := func(ctx context.Context, _ client.Object) []reconcile.Request {
		return r.of(ctx, func(f *v1alpha1.FloatingIP) bool { return f.Status.Address == "" })
	}
	return ctrl.NewControllerManagedBy(m).Named("floatingip").
		For(&v1alpha1.FloatingIP{}).
		// What one lets go of, another may wait for.
		Watches(&v1alpha1.FloatingIP{}, handler.EnqueueRequestsFromMapFunc(home), builder.WithPredicates(predicate.Funcs{
			CreateFunc:  func(event.CreateEvent) bool { return false },
			GenericFunc: func(event.GenericEvent) bool { return false },
			UpdateFunc: func(e event.UpdateEvent) bool {
				was, ok := e.ObjectOld.(*v1alpha1.FloatingIP)
				is, ok2 := e.ObjectNew.(*v1alpha1.FloatingIP)
				return ok && ok2 && was.Status.Target != "" && was.Status.Target != is.Status.Target
			},
		})).
		Watches(&v1alpha1.Port{}, handler.EnqueueRequestsFromMapFunc(home)).
		Watches(&v1alpha1.TenantNamespace{}, handler.EnqueueRequestsFromMapFunc(home)).
		Watches(&v1alpha1.AddressPool{}, handler.EnqueueRequestsFromMapFunc(pending)).
		Watches(&coordinationv1.Lease{}, handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) []reconcile.Request {
			return ownerRequest(o, claim.KindFloatingIP)
		})).
		WatchesMetadata(partial("Pod"), handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) []reconcile.Request {
			return r.of(ctx, func(f *v1alpha1.FloatingIP) bool {
				return f.Spec.Pod != nil && f.Spec.Pod.Namespace == o.GetNamespace() && f.Spec.Pod.Name == o.GetName()
			})
		}), builder.WithPredicates(lifeOnly)).
		Complete(r)
}

// ownerRequest is a Lease's owner, if it is of the kind.
func ownerRequest(o client.Object, kind string) []reconcile.Request {
	l, ok := o.(*coordinationv1.Lease)
	if !ok {
		return nil
	}
	c, ok := claim.Of(l)
	if !ok || c.Owner.Kind != kind {
		return nil
	}
	return one(c.Owner.Namespace, c.Owner.Name)
}

func (r *floatingIPs) of(ctx context.Context, which func(*v1alpha1.FloatingIP) bool, opts ...client.ListOption) []reconcile.Request {
	list := &v1alpha1.FloatingIPList{}
	if err := r.client.List(ctx, list, opts...); err != nil {
		return nil
	}
	var all []reconcile.Request
	for i := range list.Items {
		if f := &list.Items[i]; which == nil || which(f) {
			all = append(all, one(f.Namespace, f.Name)...)
		}
	}
	return all
}

// Reconcile implements reconcile.Reconciler.
func (r *floatingIPs) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	f := &v1alpha1.FloatingIP{}
	if err := r.client.Get(ctx, req.NamespacedName, f); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	old := f.DeepCopy()
	owner := claim.OwnerOf(claim.KindFloatingIP, f)
	if !f.DeletionTimestamp.IsZero() {
		if !controllerutil.ContainsFinalizer(f, v1alpha1.Finalizer) {
			return reconcile.Result{}, nil
		}
		f.Status.Phase = floatingTerminating
		if err := r.patchStatus(ctx, f, old); err != nil {
			return reconcile.Result{}, err
		}
		if err := r.releaseAll(ctx, owner); err != nil {
			return reconcile.Result{}, err
		}
		if err := r.releaseAtProviders(ctx, f); err != nil {
			old := f.DeepCopy()
			if set(&f.Status.Conditions, f.Generation, v1alpha1.ConditionBlocked, metav1.ConditionTrue, provider.Reason(err, "ProviderError"), err.Error()) {
				r.note(f, corev1.EventTypeWarning, "DeletionBlocked", "Delete", "%v", err)
			}
			return reconcile.Result{RequeueAfter: max(r.o.Retry, provider.RetryAfter(err))}, r.patchStatus(ctx, f, old)
		}
		return reconcile.Result{}, dropFinalizer(ctx, r.client, f)
	}
	if controllerutil.AddFinalizer(f, v1alpha1.Finalizer) {
		if err := r.client.Patch(ctx, f, client.MergeFromWithOptions(old, client.MergeFromWithOptimisticLock{})); err != nil {
			return reconcile.Result{}, client.IgnoreNotFound(err)
		}
		old = f.DeepCopy()
	}
	f.Status.ObservedGeneration = f.Generation
	err := r.ensure(ctx, f, owner)
	result := reconcile.Result{}
	if f.Status.Provider != "" {
		// Others may change what is at the provider, and nobody tells us.
		result.RequeueAfter = wait.Jitter(r.o.Resync, 0.2)
	}
	if u, ok := errors.AsType[*unknown](err); ok {
		// What it leads to is left as it was.
		err = nil
		result.RequeueAfter = max(r.o.Retry, provider.RetryAfter(u))
		if set(&f.Status.Conditions, f.Generation, v1alpha1.ConditionInSync, metav1.ConditionUnknown, provider.Reason(u, "ProviderError"), u.Error()) {
			r.note(f, corev1.EventTypeWarning, provider.Reason(u, "ProviderError"), "Reconcile", "%v", u)
		}
		if f.Status.Phase == "" {
			f.Status.Phase = floatingPending
		}
		return result, r.patchStatus(ctx, f, old)
	}
	if why, ok := asRefusal(err); ok {
		err = nil
		if f.Status.Address == "" {
			f.Status.Phase = floatingPending
			result.RequeueAfter = r.o.Retry
		} else {
			f.Status.Phase = floatingHeld
		}
		f.Status.Network, f.Status.PortName, f.Status.Target, f.Status.Node = "", "", "", ""
		if set(&f.Status.Conditions, f.Generation, v1alpha1.ConditionReady, metav1.ConditionFalse, why.reason, why.message) && !slices.Contains(onTheirWay, why.reason) {
			r.note(f, corev1.EventTypeWarning, why.reason, "Reconcile", "%s", why.message)
		}
	} else if err == nil {
		f.Status.Phase = floatingActive
		text := fmt.Sprintf("%s leads to %s on node %s", f.Status.Address, f.Status.Target, f.Status.Node)
		set(&f.Status.Conditions, f.Generation, v1alpha1.ConditionReady, metav1.ConditionTrue, "Active", text)
		if old.Status.Phase != floatingActive || old.Status.Target != f.Status.Target || old.Status.Node != f.Status.Node {
			r.note(f, corev1.EventTypeNormal, "Active", "Reconcile", "%s", text)
		}
	}
	if perr := r.patchStatus(ctx, f, old); perr != nil {
		return reconcile.Result{}, perr
	}
	return result, err
}

func (r *floatingIPs) patchStatus(ctx context.Context, f, old *v1alpha1.FloatingIP) error {
	if equality.Semantic.DeepEqual(f.Status, old.Status) {
		return nil
	}
	return client.IgnoreNotFound(r.client.Status().Patch(ctx, f, client.MergeFrom(old)))
}

// releaseAll gives up every address of an owner.
func (b base) releaseAll(ctx context.Context, o claim.Owner) error {
	owned, err := b.o.Claims.Owned(ctx, claim.Address, o)
	if err != nil {
		return err
	}
	for _, c := range owned {
		if err := b.o.Claims.Release(ctx, c, b.quarantine(ctx, c.Pool)); err != nil {
			return err
		}
	}
	return nil
}

// ensure gives f an address and finds where it leads. A refusal says why not.
func (r *floatingIPs) ensure(ctx context.Context, f *v1alpha1.FloatingIP, owner claim.Owner) error {
	t, err := binding.Home(ctx, r.client, f.Namespace)
	if errdefs.IsNotFound(err) {
		f.Status.Address = ""
		return refuse("NoTenant", "%v: make it in the namespace tenant-<tenant> of an existing tenant", err)
	} else if errdefs.IsUnavailable(err) {
		return refuse(notYet, "%v", err)
	} else if err != nil {
		return err
	}
	// Of one that is settled the cache knows as much as the API server.
	cached := r.o.Claims
	cached.Reader = r.client
	owned, err := cached.Owned(ctx, claim.Address, owner)
	if err != nil || len(owned) != 1 || owned[0].Address.String() != f.Status.Address {
		owned, err = r.o.Claims.Owned(ctx, claim.Address, owner)
	}
	if err != nil {
		return err
	}
	if len(owned) == 0 {
		p, err := r.addressProvider(ctx, f)
		if err != nil {
			return err
		}
		if p != nil {
			return r.ensureAtProvider(ctx, f, p)
		}
	}
	f.Status.Address, f.Status.Pool = "", ""
	w := wish{tenant: t.Name, pool: f.Spec.Pool}
	if f.Spec.Address != "" {
		if w.address, err = netip.ParseAddr(f.Spec.Address); err != nil || w.address.Zone() != "" {
			return refuse("Invalid", "address: %q is not an IP address", f.Spec.Address)
		}
		w.address = w.address.Unmap()
		w.v6 = w.address.Is6()
	}
	for _, c := range owned {
		if f.Status.Address == "" && (!w.address.IsValid() || w.address == c.Address) {
			f.Status.Address, f.Status.Pool = c.Address.String(), c.Pool
			continue
		}
		// A second one is left of a controller that died.
		if err := r.o.Claims.Release(ctx, c, r.quarantine(ctx, c.Pool)); err != nil {
			return err
		}
	}
	if f.Status.Address == "" {
		a, pool, err := r.take(ctx, w, owner)
		if err != nil {
			return err
		}
		f.Status.Address, f.Status.Pool = a.String(), pool
		r.note(f, corev1.EventTypeNormal, "Allocated", "Allocate", "%s of AddressPool %s", a, pool)
	}
	p, err := r.target(ctx, r.client, f)
	if err != nil {
		return err
	}
	if other, err := r.carrier(ctx, p); err != nil {
		return err
	} else if other != nil {
		return refuse("ProviderMismatch", "Port %s is in Network %s, whose external addresses are of provider %s, and %s is of AddressPool %s: make another FloatingIP",
			p.Name, p.Spec.Network, other.Name(), f.Status.Address, f.Status.Pool)
	}
	return r.lead(ctx, f, p)
}

// target is the Port f is for.
func (r *floatingIPs) target(ctx context.Context, from client.Reader, f *v1alpha1.FloatingIP) (*v1alpha1.Port, error) {
	switch {
	case f.Spec.Port != "":
		p := &v1alpha1.Port{}
		if err := from.Get(ctx, client.ObjectKey{Namespace: f.Namespace, Name: f.Spec.Port}, p); apierrors.IsNotFound(err) {
			return nil, refuse("PortNotFound", "port: there is no Port %s in %s", f.Spec.Port, f.Namespace)
		} else if err != nil {
			return nil, err
		}
		return p, nil
	case f.Spec.Pod != nil:
		return r.podPort(ctx, from, f.Namespace, *f.Spec.Pod)
	}
	return nil, refuse("NoTarget", "the address is held unused: name spec.port or spec.pod")
}

// podPort is the Port of a Pod's first NIC. Only namespaces of the same tenant are looked
// at, and whether others have such a Pod is not told.
func (r *floatingIPs) podPort(ctx context.Context, from client.Reader, home string, name v1alpha1.PodName) (*v1alpha1.Port, error) {
	tns := &v1alpha1.TenantNamespace{}
	if err := from.Get(ctx, client.ObjectKey{Namespace: home, Name: name.Namespace}, tns); apierrors.IsNotFound(err) {
		return nil, refuse("NotYours", "pod.namespace: %s is not a namespace of this tenant", name.Namespace)
	} else if err != nil {
		return nil, err
	}
	if tns.Status.NamespaceUID == "" {
		return nil, refuse("NamespaceNotBound", "pod.namespace: %s is not bound yet", name.Namespace)
	}
	pod := partial("Pod")
	if err := from.Get(ctx, client.ObjectKey{Namespace: name.Namespace, Name: name.Name}, pod); apierrors.IsNotFound(err) {
		return nil, refuse("PodNotFound", "pod: there is no Pod %s in namespace %s", name.Name, name.Namespace)
	} else if err != nil {
		return nil, err
	}
	list := &v1alpha1.PortList{}
	if err := from.List(ctx, list, client.InNamespace(home), client.MatchingFields{indexPod: name.Namespace + "/" + name.Name}); err != nil {
		return nil, err
	}
	ports := slices.DeleteFunc(list.Items, func(p v1alpha1.Port) bool { return p.Spec.Pod.UID != string(pod.UID) })
	if len(ports) == 0 {
		return nil, refuse("PodNotPlugged", "pod: Pod %s/%s has no address yet", name.Namespace, name.Name)
	}
	slices.SortFunc(ports, func(a, b v1alpha1.Port) int {
		first := func(p v1alpha1.Port) int {
			if p.Spec.Pod.Interface == "eth0" {
				return 0
			}
			return 1
		}
		return cmp.Or(cmp.Compare(first(a), first(b)), cmp.Compare(a.Spec.Pod.Interface, b.Spec.Pod.Interface), cmp.Compare(a.Name, b.Name))
	})
	return &ports[0], nil
}

// lead points f to a Port.
func (r *floatingIPs) lead(ctx context.Context, f *v1alpha1.FloatingIP, p *v1alpha1.Port) error {
	mine, err := netip.ParseAddr(f.Status.Address)
	if err != nil {
		return err
	}
	target := ""
	for _, s := range p.Spec.Addresses {
		if a, err := netip.ParseAddr(s); err == nil && a.Is6() == mine.Is6() {
			target = a.String()
			break
		}
	}
	if target == "" {
		return refuse("NoFamily", "Port %s has no address of %s, which %s is", p.Name, familyName(mine.Is6()), mine)
	}
	// One Pod goes out under one address: whose FloatingIP has it keeps it, and of two that
	// took it at the same time the older.
	holds := f.Status.PortName == p.Name && f.Status.Target == target
	others := &v1alpha1.FloatingIPList{}
	if err := r.client.List(ctx, others, client.InNamespace(f.Namespace)); err != nil {
		return err
	}
	for i := range others.Items {
		o := &others.Items[i]
		if o.UID != f.UID && o.Status.PortName == p.Name && o.Status.Target == target && o.DeletionTimestamp.IsZero() && (!holds || before(o, f)) {
			return refuse("TargetTaken", "Port %s has FloatingIP %s already: choose another, or delete that one", p.Name, o.Name)
		}
	}
	if p.Spec.Node == "" || p.Spec.Pod == nil {
		return refuse("NotPlugged", "Port %s is claimed, but no Pod has it yet", p.Name)
	}
	f.Status.Network, f.Status.PortName, f.Status.Target, f.Status.Node = p.Spec.Network, p.Name, target, p.Spec.Node
	return nil
}
