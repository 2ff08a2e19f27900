package controller

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/util/workqueue"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/identity/binding"
	"github.com/hypernetes/hypernetes/network/claim"
	"github.com/hypernetes/hypernetes/network/provider"
	"github.com/hypernetes/hypernetes/network/subnet"
)

var _ reconcile.Reconciler = (*networks)(nil)

// networks reconciles Networks.
type networks struct{ base }

func (r *networks) setup(m manager.Manager) error {
	return ctrl.NewControllerManagedBy(m).Named("network").
		WithOptions(controller.Options{
			MaxConcurrentReconciles: 4,
			// What failed for long is to be in order soon after it can be.
			RateLimiter: workqueue.NewTypedItemExponentialFailureRateLimiter[reconcile.Request](20*time.Millisecond, 2*r.o.Retry),
		}).
		For(&v1alpha1.Network{}).
		Watches(&v1alpha1.Port{}, handler.EnqueueRequestsFromMapFunc(func(_ context.Context, o client.Object) []reconcile.Request {
			return one(o.GetNamespace(), o.(*v1alpha1.Port).Spec.Network)
		})).
		Watches(&v1alpha1.TenantNamespace{}, handler.EnqueueRequestsFromMapFunc(func(_ context.Context, o client.Object) []reconcile.Request {
			return one(o.GetNamespace(), o.(*v1alpha1.TenantNamespace).Spec.Network)
		})).
		Watches(&coordinationv1.Lease{}, handler.EnqueueRequestsFromMapFunc(func(_ context.Context, o client.Object) []reconcile.Request {
			return ownerRequest(o, claim.KindNetwork)
		})).
		Watches(&v1alpha1.Tenant{}, handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) []reconcile.Request {
			list := &v1alpha1.NetworkList{}
			if err := r.client.List(ctx, list, client.InNamespace(v1alpha1.Home(o.GetName()))); err != nil {
				return nil
			}
			var all []reconcile.Request
			for i := range list.Items {
				all = append(all, one(list.Items[i].Namespace, list.Items[i].Name)...)
			}
			return all
		})).
		Complete(r)
}

func one(namespace, name string) []reconcile.Request {
	return []reconcile.Request{{NamespacedName: types.NamespacedName{Namespace: namespace, Name: name}}}
}

// notYet is the reason of what waits for a tenant that is being made.
const notYet = "TenantNotReady"

// stillActive is the reason of what was in order when it was last seen.
const stillActive = "StillActive"

// fault is why a Network is not Active.
type fault struct {
	phase, reason, message string
	// after is how long the provider wants to be left alone.
	after time.Duration
}

// Reconcile implements reconcile.Reconciler.
func (r *networks) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	n := &v1alpha1.Network{}
	if err := r.client.Get(ctx, req.NamespacedName, n); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	old := n.DeepCopy()
	if !n.DeletionTimestamp.IsZero() {
		return r.remove(ctx, n, old)
	}
	if controllerutil.AddFinalizer(n, v1alpha1.Finalizer) {
		if err := r.client.Patch(ctx, n, client.MergeFromWithOptions(old, client.MergeFromWithOptimisticLock{})); err != nil {
			return reconcile.Result{}, client.IgnoreNotFound(err)
		}
		old = n.DeepCopy()
	}
	f, err := r.ensure(ctx, n)
	if err != nil && f == nil {
		f = &fault{phase: v1alpha1.NetworkPending, reason: provider.Reason(err, "ProviderError"), message: err.Error()}
	}
	if cerr := r.count(ctx, n); cerr != nil {
		return reconcile.Result{}, cerr
	}
	result := reconcile.Result{}
	n.Status.ObservedGeneration = n.Generation
	if f == nil {
		n.Status.Phase = v1alpha1.NetworkActive
		if set(&n.Status.Conditions, n.Generation, v1alpha1.ConditionReady, metav1.ConditionTrue, "Active",
			fmt.Sprintf("carried by provider %s", n.Status.Provider)) {
			r.note(n, corev1.EventTypeNormal, "Active", "Reconcile", "Network is active (provider %s)", n.Status.Provider)
		}
	} else if f.reason == stillActive {
		result.RequeueAfter = max(r.o.Retry, f.after)
	} else {
		// What runs on it stays as it is: subnets and VNI are left in the status.
		n.Status.Phase = f.phase
		if set(&n.Status.Conditions, n.Generation, v1alpha1.ConditionReady, metav1.ConditionFalse, f.reason, f.message) &&
			f.reason != notYet && !apierrors.IsConflict(err) { // what is on its way is no warning
			r.note(n, corev1.EventTypeWarning, f.reason, "Reconcile", "%s", f.message)
		}
		result.RequeueAfter = max(r.o.Retry, f.after)
	}
	if _, ok := r.portProvider(n); ok && f == nil {
		// Others may change what is at the provider, and nobody tells us.
		result.RequeueAfter = wait.Jitter(r.o.Resync, 0.2)
	}
	if serr := r.patchStatus(ctx, n, old); serr != nil {
		return reconcile.Result{}, serr
	}
	if err != nil {
		return reconcile.Result{}, err
	}
	return result, nil
}

func (r *networks) patchStatus(ctx context.Context, n, old *v1alpha1.Network) error {
	if equality.Semantic.DeepEqual(n.Status, old.Status) {
		return nil
	}
	return client.IgnoreNotFound(r.client.Status().Patch(ctx, n, client.MergeFrom(old)))
}

// ensure makes n's provider's side. An error is tried again soon, a fault later.
func (r *networks) ensure(ctx context.Context, n *v1alpha1.Network) (*fault, error) {
	if n.Status.Phase == "" {
		n.Status.Phase = v1alpha1.NetworkInitializing
	}
	failed := func(reason, format string, args ...any) *fault {
		return &fault{phase: v1alpha1.NetworkFailed, reason: reason, message: fmt.Sprintf(format, args...)}
	}
	t, err := binding.Home(ctx, r.client, n.Namespace)
	if errdefs.IsNotFound(err) {
		return failed("NoTenant", "%v: make the Network in the namespace tenant-<tenant> of an existing tenant", err), nil
	} else if errdefs.IsUnavailable(err) {
		return &fault{phase: v1alpha1.NetworkPending, reason: notYet, message: err.Error()}, nil
	} else if err != nil {
		return nil, err
	}
	n.Status.Tenant = t.Name
	if f := ownerCheck(n, t); f != nil {
		return f, nil
	}
	if errs := subnet.ValidateNetwork(n.Spec, r.o.Limits); len(errs) > 0 {
		return failed("Invalid", "%v", errs.ToAggregate()), nil
	}
	p, f := r.provider(n)
	if f != nil {
		return f, nil
	}
	subnets := subnet.Normalise(n.Spec, n.Status.Subnets)
	if n.Spec.HostAccess != v1alpha1.HostRouted {
		n.Status.HostAccess = v1alpha1.HostIsolated
	} else if f, err := r.routed(ctx, n, subnets); f != nil || err != nil {
		return f, err
	}
	st, err := p.Ensure(ctx, n, subnets)
	switch {
	case errdefs.IsInvalidArgument(err), errdefs.IsResourceExhausted(err), errdefs.IsPermissionDenied(err):
		return failed(provider.Reason(err, "ProviderRefused"), "%v", err), nil
	case errdefs.IsUnavailable(err), errdefs.IsUnauthorized(err):
		if set(&n.Status.Conditions, n.Generation, v1alpha1.ConditionInSync, metav1.ConditionUnknown, provider.Reason(err, "ProviderUnavailable"), err.Error()) &&
			n.Status.Phase == v1alpha1.NetworkActive {
			r.note(n, corev1.EventTypeWarning, provider.Reason(err, "ProviderUnavailable"), "Reconcile", "%v", err)
		}
		if n.Status.Phase == v1alpha1.NetworkActive && n.Status.Provider == p.Name() && n.Generation == n.Status.ObservedGeneration {
			// What runs on it goes on: only that it is in order is not known.
			return &fault{v1alpha1.NetworkActive, stillActive, err.Error(), provider.RetryAfter(err)}, nil
		}
		return &fault{v1alpha1.NetworkPending, provider.Reason(err, "ProviderUnavailable"), err.Error(), provider.RetryAfter(err)}, nil
	case err != nil:
		set(&n.Status.Conditions, n.Generation, v1alpha1.ConditionInSync, metav1.ConditionUnknown, "ProviderError", err.Error())
		return nil, err
	}
	if st.Repaired != "" {
		r.note(n, corev1.EventTypeWarning, "Repaired", "Repair", "%s: put right", st.Repaired)
	}
	set(&n.Status.Conditions, n.Generation, v1alpha1.ConditionInSync, metav1.ConditionTrue, "InSync", "the provider has what is asked for")
	n.Status.Provider, n.Status.ProviderNetworkID = p.Name(), st.NetworkID
	n.Status.ProviderRouterID, n.Status.ProviderGroupID = st.RouterID, st.GroupID
	n.Status.VNI, n.Status.MTU, n.Status.Subnets = st.VNI, st.MTU, st.Subnets
	n.Status.HostAccess = n.Spec.HostAccess
	return nil, nil
}

// ownerCheck compares spec.tenantID with the tenant that n is of.
func ownerCheck(n *v1alpha1.Network, t *v1alpha1.Tenant) *fault {
	id := n.Spec.TenantID
	if id == "" || id == t.Name || (t.Spec.Keystone != nil && id == t.Spec.Keystone.ProjectID) {
		return nil
	}
	return &fault{phase: v1alpha1.NetworkFailed, reason: "WrongTenant", message: fmt.Sprintf(
		"spec.tenantID: %q is neither tenant %s, whose namespace this is, nor its Keystone project: "+
			"apply the Network in that tenant's namespace tenant-<tenant>, or leave tenantID out", id, t.Name)}
}

func (r *networks) provider(n *v1alpha1.Network) (Provider, *fault) {
	// A Network stays with its provider when the default changes.
	name := cmp.Or(n.Spec.Provider, n.Status.Provider, r.o.Providers[0].Name())
	if was := n.Status.Provider; was != "" && was != name {
		return nil, &fault{phase: v1alpha1.NetworkFailed, reason: "ProviderChanged", message: fmt.Sprintf(
			"spec.provider: the Network is carried by %s and cannot move to %q: make a new Network", was, name)}
	}
	for _, p := range r.o.Providers {
		if p.Name() == name {
			return p, nil
		}
	}
	return nil, &fault{phase: v1alpha1.NetworkFailed, reason: "NoProvider", message: fmt.Sprintf(
		"spec.provider: the cluster has no provider %q: leave it out for the default (%s)", name, r.o.Providers[0].Name())}
}

// routed says whether nodes may have routes to n: if no Network that was there before has
// any of its addresses. What nodes have routes to already stays n's whatever others get
// later, or a tenant could end an operator's routes by asking for their range. That the
// operator agrees, admission sees to.
func (r *networks) routed(ctx context.Context, n *v1alpha1.Network, subnets []v1alpha1.SubnetStatus) (*fault, error) {
	if n.Status.HostAccess == v1alpha1.HostRouted {
		subnets = slices.DeleteFunc(slices.Clone(subnets), func(s v1alpha1.SubnetStatus) bool {
			return slices.ContainsFunc(n.Status.Subnets, func(has v1alpha1.SubnetStatus) bool { return has.CIDR == s.CIDR })
		})
	}
	list := &v1alpha1.NetworkList{}
	if err := r.client.List(ctx, list); err != nil {
		return nil, err
	}
	for i := range list.Items {
		o := &list.Items[i]
		if o.UID == n.UID || !before(o, n) {
			continue
		}
		// The other's name and range are not told: it may be another tenant's.
		if mine, _, ok := subnet.Overlap(subnets, r.ranges(o)); ok {
			return &fault{phase: v1alpha1.NetworkFailed, reason: "NotUnique", message: fmt.Sprintf(
				"spec.hostAccess: Routed needs ranges nobody else in the cluster has, and %s is in use: choose another, or Isolated", mine)}, nil
		}
	}
	return nil, nil
}

// ranges are those a Network has and those it is about to get, which its status does not
// say yet. What is refused gets none.
func (r *networks) ranges(n *v1alpha1.Network) []v1alpha1.SubnetStatus {
	out := slices.Clone(n.Status.Subnets)
	if n.Status.Phase != v1alpha1.NetworkFailed && len(subnet.ValidateNetwork(n.Spec, r.o.Limits)) == 0 {
		out = append(out, subnet.Normalise(n.Spec, n.Status.Subnets)...)
	}
	return out
}

func before(a, b client.Object) bool {
	x, y := a.GetCreationTimestamp(), b.GetCreationTimestamp()
	if !x.Equal(&y) {
		return x.Before(&y)
	}
	return a.GetUID() < b.GetUID()
}

// count fills in what a Network has and has left.
func (r *networks) count(ctx context.Context, n *v1alpha1.Network) error {
	ports, err := r.ports(ctx, n)
	if err != nil {
		return err
	}
	n.Status.Ports = int32(len(ports))
	n.Status.FreeAddresses = subnet.Free(n.Status.Subnets, len(ports))
	switch {
	case len(n.Status.Subnets) == 0:
		meta.RemoveStatusCondition(&n.Status.Conditions, v1alpha1.ConditionAddresses)
	case n.Status.FreeAddresses > 0:
		set(&n.Status.Conditions, n.Generation, v1alpha1.ConditionAddresses, metav1.ConditionTrue, "Free", "new Pods get an address")
	default:
		if set(&n.Status.Conditions, n.Generation, v1alpha1.ConditionAddresses, metav1.ConditionFalse, "Exhausted",
			"every address is taken: delete Pods or claimed Ports, or add a subnet to spec.subnets") {
			r.note(n, corev1.EventTypeWarning, "AddressesExhausted", "Allocate", "every address of the Network is taken: delete Pods or claimed Ports, or add a subnet")
		}
	}
	return nil
}

// ports are those of a Network.
func (b base) ports(ctx context.Context, n *v1alpha1.Network) ([]v1alpha1.Port, error) {
	list := &v1alpha1.PortList{}
	err := b.client.List(ctx, list, client.InNamespace(n.Namespace), client.MatchingFields{indexNetwork: n.Name})
	return list.Items, err
}

// remove lets a Network go when nobody uses it any more.
func (r *networks) remove(ctx context.Context, n, old *v1alpha1.Network) (reconcile.Result, error) {
	if !controllerutil.ContainsFinalizer(n, v1alpha1.Finalizer) {
		return reconcile.Result{}, nil
	}
	n.Status.Phase = v1alpha1.NetworkTerminating
	if err := r.count(ctx, n); err != nil {
		return reconcile.Result{}, err
	}
	users, err := r.users(ctx, n)
	if err != nil {
		return reconcile.Result{}, err
	}
	if len(users) > 0 {
		message := "in use by " + listed(users) + ": delete these first"
		set(&n.Status.Conditions, n.Generation, v1alpha1.ConditionReady, metav1.ConditionFalse, "Terminating", "being deleted")
		was := meta.FindStatusCondition(n.Status.Conditions, v1alpha1.ConditionBlocked)
		if was == nil || was.Status != metav1.ConditionTrue {
			r.note(n, corev1.EventTypeWarning, "DeletionBlocked", "Delete", "%s", message)
		}
		set(&n.Status.Conditions, n.Generation, v1alpha1.ConditionBlocked, metav1.ConditionTrue, "InUse", message)
		return reconcile.Result{RequeueAfter: r.o.Retry}, r.patchStatus(ctx, n, old)
	}
	for _, p := range r.o.Providers {
		// Also of a provider it was not recorded with: it may have died before that.
		if n.Status.Provider != "" && n.Status.Provider != p.Name() {
			continue
		}
		if err := p.Release(ctx, n); err != nil {
			if set(&n.Status.Conditions, n.Generation, v1alpha1.ConditionBlocked, metav1.ConditionTrue, provider.Reason(err, "ProviderError"),
				fmt.Sprintf("provider %s: %v", p.Name(), err)) {
				r.note(n, corev1.EventTypeWarning, "DeletionBlocked", "Delete", "provider %s: %v", p.Name(), err)
			}
			if perr := r.patchStatus(ctx, n, old); perr != nil {
				return reconcile.Result{}, perr
			}
			if provider.Reason(err, "") != "" {
				return reconcile.Result{RequeueAfter: max(r.o.Retry, provider.RetryAfter(err))}, nil
			}
			return reconcile.Result{}, fmt.Errorf("release at provider %s: %w", p.Name(), err)
		}
	}
	return reconcile.Result{}, dropFinalizer(ctx, r.client, n)
}

// dropFinalizer lets an object go.
func dropFinalizer(ctx context.Context, c client.Client, o client.Object) error {
	old := o.DeepCopyObject().(client.Object)
	if !controllerutil.RemoveFinalizer(o, v1alpha1.Finalizer) {
		return nil
	}
	return client.IgnoreNotFound(c.Patch(ctx, o, client.MergeFromWithOptions(old, client.MergeFromWithOptimisticLock{})))
}

// users are the objects a Network may not go before, asked of the API server: one that was
// made a moment ago counts.
func (r *networks) users(ctx context.Context, n *v1alpha1.Network) ([]string, error) {
	var users []string
	namespaces := &v1alpha1.TenantNamespaceList{}
	if err := r.live.List(ctx, namespaces, client.InNamespace(n.Namespace)); err != nil {
		return nil, err
	}
	for i := range namespaces.Items {
		if t := &namespaces.Items[i]; t.Spec.Network == n.Name && (t.Status.NetworkUID == "" || t.Status.NetworkUID == string(n.UID)) {
			users = append(users, "TenantNamespace "+t.Name)
		}
	}
	ports := &v1alpha1.PortList{}
	if err := r.live.List(ctx, ports, client.InNamespace(n.Namespace)); err != nil {
		return nil, err
	}
	for i := range ports.Items {
		p := &ports.Items[i]
		if p.Spec.Network != n.Name || (p.Spec.NetworkUID != "" && p.Spec.NetworkUID != string(n.UID)) {
			continue
		}
		if p.Spec.Pod != nil {
			users = append(users, "Pod "+p.Spec.Pod.Namespace+"/"+p.Spec.Pod.Name)
		} else if s := p.Spec.Service; s != nil {
			users = append(users, "Service "+s.Namespace+"/"+s.Name)
		} else {
			users = append(users, "Port "+p.Name)
		}
	}
	slices.Sort(users)
	return slices.Compact(users), nil
}
