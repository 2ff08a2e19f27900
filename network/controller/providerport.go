package controller

import (
	"context"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/util/workqueue"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/log"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/source"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/provider"
)

var (
	_ reconcile.Reconciler           = (*providerPorts)(nil)
	_ manager.Runnable               = (*providerPorts)(nil)
	_ manager.LeaderElectionRunnable = (*providerPorts)(nil)
)

// providerPorts keeps the ports that providers have of Ports, where they have such.
type providerPorts struct {
	base
	// drifted are Ports to look at although nothing here changed.
	drifted chan event.GenericEvent
	// failures and looks count how often in a row a Port could not be made, and was not
	// wired.
	failures, looks workqueue.TypedRateLimiter[reconcile.Request]
	// strays are ports at a provider that belonged to no Port when they were last looked for.
	strays map[string]bool
}

// pollsFast is how often a Port that is not wired is looked at before that becomes rarer.
const pollsFast = 30

func (r *providerPorts) setup(m manager.Manager) error {
	r.drifted = make(chan event.GenericEvent)
	r.failures = workqueue.NewTypedItemExponentialFailureRateLimiter[reconcile.Request](r.o.Poll, 30*time.Second)
	r.looks = workqueue.NewTypedItemFastSlowRateLimiter[reconcile.Request](r.o.Poll, max(5*time.Second, r.o.Poll), pollsFast)
	if err := m.Add(r); err != nil {
		return err
	}
	return ctrl.NewControllerManagedBy(m).Named("providerport").
		WithOptions(controller.Options{MaxConcurrentReconciles: 8}).
		For(&v1alpha1.Port{}, builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		Watches(&v1alpha1.Network{}, handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) []reconcile.Request {
			return r.portsOf(ctx, client.InNamespace(o.GetNamespace()), client.MatchingFields{indexNetwork: o.GetName()})
		}), builder.WithPredicates(predicate.Funcs{UpdateFunc: func(e event.UpdateEvent) bool {
			was, ok := e.ObjectOld.(*v1alpha1.Network)
			is, ok2 := e.ObjectNew.(*v1alpha1.Network)
			return ok && ok2 && (was.Status.Provider != is.Status.Provider || was.Status.ProviderNetworkID != is.Status.ProviderNetworkID ||
				was.Status.ProviderGroupID != is.Status.ProviderGroupID || !equality.Semantic.DeepEqual(was.Status.Subnets, is.Status.Subnets))
		}})).
		WatchesRawSource(source.Channel(r.drifted, &handler.EnqueueRequestForObject{})).
		Complete(r)
}

// NeedLeaderElection implements manager.LeaderElectionRunnable.
func (r *providerPorts) NeedLeaderElection() bool { return true }

// Start implements manager.Runnable: it looks for what others changed.
func (r *providerPorts) Start(ctx context.Context) error {
	if !slices.ContainsFunc(r.o.Providers, func(p Provider) bool { _, ok := p.(PortProvider); return ok }) {
		return nil
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait.Jitter(r.o.Resync, 0.2)):
		}
		list := &v1alpha1.NetworkList{}
		if err := r.client.List(ctx, list); err != nil {
			continue
		}
		seen := map[string]bool{}
		for i := range list.Items {
			if err := r.compare(ctx, &list.Items[i]); err != nil && ctx.Err() == nil {
				log.FromContext(ctx).Info("Ports could not be compared", "network", list.Items[i].Name, "tenant", list.Items[i].Status.Tenant, "reason", err.Error())
			}
			if err := r.tidy(ctx, &list.Items[i], seen); err != nil && ctx.Err() == nil {
				log.FromContext(ctx).Info("ports of no Port could not be looked for", "network", list.Items[i].Name, "tenant", list.Items[i].Status.Tenant, "reason", err.Error())
			}
		}
		r.strays = seen
	}
}

// tidy removes ports at the provider that belong to no Port, and did not the last time
// either; seen becomes those found now.
func (r *providerPorts) tidy(ctx context.Context, n *v1alpha1.Network, seen map[string]bool) error {
	provider, ok := r.portProvider(n)
	p, ok2 := provider.(StrayProvider)
	if !ok || !ok2 || n.Status.ProviderNetworkID == "" || !n.DeletionTimestamp.IsZero() {
		return nil
	}
	ports, err := r.ports(ctx, n)
	if err != nil {
		return err
	}
	strays, err := p.Strays(ctx, n, ports)
	if err != nil || len(strays) == 0 {
		return err
	}
	// The cache may not know yet whom it was made for.
	list := &v1alpha1.PortList{}
	if err := r.live.List(ctx, list, client.InNamespace(n.Namespace)); err != nil {
		return err
	}
	for id, uid := range strays {
		if slices.ContainsFunc(list.Items, func(x v1alpha1.Port) bool { return x.UID == uid }) {
			continue
		}
		if seen[id] = true; !r.strays[id] {
			continue
		}
		if err := p.RemoveStray(ctx, n, id); err != nil {
			return err
		}
		delete(seen, id)
		r.note(n, corev1.EventTypeWarning, "Repaired", "Repair", "port %s at the provider belonged to no Port any more: removed", id)
	}
	return nil
}

func (r *providerPorts) compare(ctx context.Context, n *v1alpha1.Network) error {
	p, ok := r.portProvider(n)
	if !ok || n.Status.ProviderNetworkID == "" {
		return nil
	}
	ports, err := r.ports(ctx, n)
	if err != nil || len(ports) == 0 {
		return err
	}
	names, err := p.Drifted(ctx, n, ports)
	if err != nil {
		return err
	}
	for _, name := range names {
		x := &v1alpha1.Port{ObjectMeta: metav1.ObjectMeta{Namespace: n.Namespace, Name: name}}
		select {
		case r.drifted <- event.GenericEvent{Object: x}:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// Reconcile implements reconcile.Reconciler.
func (r *providerPorts) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	x := &v1alpha1.Port{}
	if err := r.client.Get(ctx, req.NamespacedName, x); err != nil {
		r.failures.Forget(req)
		r.looks.Forget(req)
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	if !x.DeletionTimestamp.IsZero() {
		return r.release(ctx, req, x)
	}
	n := &v1alpha1.Network{}
	if err := r.client.Get(ctx, client.ObjectKey{Namespace: x.Namespace, Name: x.Spec.Network}, n); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	p, ok := r.portProvider(n)
	if !ok || x.Spec.NetworkUID != "" && x.Spec.NetworkUID != string(n.UID) {
		return reconcile.Result{}, nil
	}
	old := x.DeepCopy()
	// Before there is a port, so that none is forgotten.
	if controllerutil.AddFinalizer(x, v1alpha1.FinalizerProvider) {
		if err := r.client.Patch(ctx, x, client.MergeFromWithOptions(old, client.MergeFromWithOptimisticLock{})); err != nil {
			return reconcile.Result{}, ignoreLost(err)
		}
		old = x.DeepCopy()
	}
	if x.Status.ProviderPortID == "" {
		// The cache may not know yet what was written a moment ago.
		if err := r.live.Get(ctx, req.NamespacedName, x); err != nil {
			return reconcile.Result{}, client.IgnoreNotFound(err)
		}
		if !x.DeletionTimestamp.IsZero() {
			return reconcile.Result{}, nil // its event will come
		}
		old = x.DeepCopy()
	}
	st, err := p.EnsurePort(ctx, n, x)
	result := r.record(req, x, st, err)
	if ctx.Err() != nil {
		return reconcile.Result{}, ctx.Err()
	}
	if equality.Semantic.DeepEqual(x.Status, old.Status) {
		return result, nil
	}
	return result, client.IgnoreNotFound(r.client.Status().Patch(ctx, x, client.MergeFrom(old)))
}

// record writes down what came of a Port and says when to look again.
func (r *providerPorts) record(req reconcile.Request, x *v1alpha1.Port, st provider.PortState, err error) reconcile.Result {
	s, generation := &x.Status, x.Generation
	if st.ID != "" {
		s.ProviderPortID, s.MAC, s.VIFType = st.ID, st.MAC, st.VIFType
	}
	if err != nil {
		reason := provider.Reason(err, "ProviderError")
		again := reconcile.Result{RequeueAfter: max(r.failures.When(req), provider.RetryAfter(err))}
		ready := meta.FindStatusCondition(s.Conditions, v1alpha1.ConditionReady)
		if s.Phase == v1alpha1.PortActive && ready != nil && ready.ObservedGeneration == generation && passes(err) {
			// It is plugged and goes on: only that it is in order is not known.
			set(&s.Conditions, generation, v1alpha1.ConditionInSync, metav1.ConditionUnknown, reason, err.Error())
			return again
		}
		s.Phase = v1alpha1.PortPending
		if !passes(err) {
			s.Phase = v1alpha1.PortFailed
		}
		if set(&s.Conditions, generation, v1alpha1.ConditionReady, metav1.ConditionFalse, reason, err.Error()) {
			r.note(x, corev1.EventTypeWarning, reason, "Reconcile", "%v", err)
		}
		meta.RemoveStatusCondition(&s.Conditions, v1alpha1.ConditionWired)
		return again
	}
	r.failures.Forget(req)
	if st.Repaired != "" {
		r.note(x, corev1.EventTypeWarning, "Repaired", "Repair", "%s: put right", st.Repaired)
	}
	s.Phase = v1alpha1.PortActive
	set(&s.Conditions, generation, v1alpha1.ConditionReady, metav1.ConditionTrue, "Active", "the provider has the port")
	set(&s.Conditions, generation, v1alpha1.ConditionInSync, metav1.ConditionTrue, "InSync", "the provider has what is asked for")
	switch {
	case x.Spec.Node == "":
		meta.RemoveStatusCondition(&s.Conditions, v1alpha1.ConditionWired)
	case st.Wired:
		set(&s.Conditions, generation, v1alpha1.ConditionWired, metav1.ConditionTrue, "Wired", "the provider carries its packets")
	default:
		was := meta.IsStatusConditionTrue(s.Conditions, v1alpha1.ConditionWired)
		set(&s.Conditions, generation, v1alpha1.ConditionWired, metav1.ConditionFalse, "NotWired", st.Why)
		looks := r.looks.NumRequeues(req)
		if was || looks == pollsFast {
			r.note(x, corev1.EventTypeWarning, "NotWired", "Wire", "%s", st.Why)
		}
		return reconcile.Result{RequeueAfter: r.looks.When(req)}
	}
	r.looks.Forget(req)
	return reconcile.Result{}
}

// passes says whether an error goes by without anybody here doing something.
func passes(err error) bool {
	return !(errdefs.IsInvalidArgument(err) || errdefs.IsResourceExhausted(err) || errdefs.IsPermissionDenied(err) ||
		errdefs.IsAlreadyExists(err) || errdefs.IsFailedPrecondition(err))
}

// release lets a Port go when the provider's is gone.
func (r *providerPorts) release(ctx context.Context, req reconcile.Request, x *v1alpha1.Port) (reconcile.Result, error) {
	if !controllerutil.ContainsFinalizer(x, v1alpha1.FinalizerProvider) {
		return reconcile.Result{}, nil
	}
	// What the cache does not know yet would be forgotten.
	if err := r.live.Get(ctx, req.NamespacedName, x); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	old := x.DeepCopy()
	for _, p := range r.o.Providers {
		pp, ok := p.(PortProvider)
		if !ok {
			continue
		}
		if err := pp.ReleasePort(ctx, x); err != nil {
			if set(&x.Status.Conditions, x.Generation, v1alpha1.ConditionBlocked, metav1.ConditionTrue, provider.Reason(err, "ProviderError"), err.Error()) {
				r.note(x, corev1.EventTypeWarning, "DeletionBlocked", "Delete", "%v", err)
			}
			if !equality.Semantic.DeepEqual(x.Status, old.Status) {
				if perr := client.IgnoreNotFound(r.client.Status().Patch(ctx, x, client.MergeFrom(old))); perr != nil {
					return reconcile.Result{}, perr
				}
			}
			return reconcile.Result{RequeueAfter: max(r.failures.When(req), provider.RetryAfter(err))}, nil
		}
	}
	controllerutil.RemoveFinalizer(x, v1alpha1.FinalizerProvider)
	err := r.client.Patch(ctx, x, client.MergeFromWithOptions(old, client.MergeFromWithOptimisticLock{}))
	if apierrors.IsConflict(err) {
		return reconcile.Result{RequeueAfter: r.o.Poll}, nil
	}
	return reconcile.Result{}, client.IgnoreNotFound(err)
}
