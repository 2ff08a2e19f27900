package tenant

import (
	"context"
	"fmt"
	"maps"
	"strings"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/identity/binding"
)

var _ reconcile.Reconciler = (*namespaces)(nil)

// namespaces reconciles TenantNamespaces.
type namespaces struct{ base }

func (r *namespaces) setup(m manager.Manager) error {
	byName := func(ctx context.Context, name string) []reconcile.Request {
		return r.of(ctx, client.MatchingFields{binding.IndexName: name})
	}
	inside := handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) []reconcile.Request {
		return byName(ctx, o.GetNamespace())
	})
	return ctrl.NewControllerManagedBy(m).Named("tenantnamespace").
		WithOptions(controller.Options{MaxConcurrentReconciles: 4}).
		For(&v1alpha1.TenantNamespace{}).
		Watches(&corev1.Namespace{}, handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) []reconcile.Request {
			return byName(ctx, o.GetName())
		})).
		Watches(&v1alpha1.Network{}, handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) []reconcile.Request {
			return r.of(ctx, client.InNamespace(o.GetNamespace()))
		})).
		Watches(&v1alpha1.Tenant{}, handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) []reconcile.Request {
			return r.of(ctx, client.InNamespace(v1alpha1.Home(o.GetName())))
		})).
		Watches(&rbacv1.RoleBinding{}, inside).
		Watches(&corev1.ResourceQuota{}, inside).
		Watches(&corev1.LimitRange{}, inside).
		Complete(r)
}

func (r *namespaces) of(ctx context.Context, opts ...client.ListOption) []reconcile.Request {
	list := &v1alpha1.TenantNamespaceList{}
	if err := r.client.List(ctx, list, opts...); err != nil {
		return nil
	}
	var all []reconcile.Request
	for i := range list.Items {
		all = append(all, one(list.Items[i].Namespace, list.Items[i].Name)...)
	}
	return all
}

// Reconcile implements reconcile.Reconciler.
func (r *namespaces) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	tns := &v1alpha1.TenantNamespace{}
	if err := r.client.Get(ctx, req.NamespacedName, tns); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	old := tns.DeepCopy()
	if !tns.DeletionTimestamp.IsZero() {
		return r.remove(ctx, tns, old)
	}
	if controllerutil.AddFinalizer(tns, v1alpha1.Finalizer) {
		if err := r.client.Patch(ctx, tns, client.MergeFromWithOptions(old, client.MergeFromWithOptimisticLock{})); err != nil {
			return reconcile.Result{}, client.IgnoreNotFound(err)
		}
		old = tns.DeepCopy()
	}
	tns.Status.ObservedGeneration = tns.Generation
	f, err := r.ensure(ctx, tns, old)
	result := reconcile.Result{}
	switch {
	case err != nil:
		set(&tns.Status.Conditions, tns.Generation, v1alpha1.ConditionReady, metav1.ConditionFalse, "Error", err.Error())
		if tns.Status.Phase == "" {
			tns.Status.Phase = v1alpha1.NamespacePending
		}
	case f != nil:
		tns.Status.Phase = f.phase
		if tns.Status.NamespaceUID != "" {
			// Whatever is wrong, its Pods are on that Network or on none.
			tns.Status.Phase = v1alpha1.NamespaceBound
		}
		if set(&tns.Status.Conditions, tns.Generation, v1alpha1.ConditionReady, metav1.ConditionFalse, f.reason, f.message) && f.phase == v1alpha1.NamespaceFailed {
			r.note(tns, corev1.EventTypeWarning, f.reason, "Bind", "%s", f.message)
		}
		result.RequeueAfter = r.o.Retry
	default:
		tns.Status.Phase = v1alpha1.NamespaceBound
		if set(&tns.Status.Conditions, tns.Generation, v1alpha1.ConditionReady, metav1.ConditionTrue, "Bound",
			fmt.Sprintf("Namespace %s is on Network %s", tns.Name, tns.Spec.Network)) {
			r.note(tns, corev1.EventTypeNormal, "Bound", "Bind", "Namespace %s is on Network %s", tns.Name, tns.Spec.Network)
		}
	}
	if serr := r.patchStatus(ctx, tns, old); serr != nil {
		return reconcile.Result{}, serr
	}
	return result, err
}

func (r *namespaces) patchStatus(ctx context.Context, tns, old *v1alpha1.TenantNamespace) error {
	if equality.Semantic.DeepEqual(tns.Status, old.Status) {
		return nil
	}
	return client.IgnoreNotFound(r.client.Status().Patch(ctx, tns, client.MergeFrom(old)))
}

// owns says whether ns was made for tns: its status says so or, where that could not be
// written any more, the Namespace does.
func owns(tns *v1alpha1.TenantNamespace, ns *corev1.Namespace) bool {
	return tns.Status.NamespaceUID == string(ns.UID) || ns.Annotations[binding.AnnotationOwner] == string(tns.UID)
}

// ensure makes and binds the Namespace. What it has written down already goes to old.
func (r *namespaces) ensure(ctx context.Context, tns, old *v1alpha1.TenantNamespace) (*fault, error) {
	t, err := binding.Home(ctx, r.client, tns.Namespace)
	if errdefs.IsNotFound(err) {
		return &fault{v1alpha1.NamespaceFailed, "NoTenant", fmt.Sprintf("%v: make it in the namespace tenant-<tenant> of an existing tenant", err)}, nil
	} else if errdefs.IsUnavailable(err) {
		return &fault{v1alpha1.NamespacePending, "TenantNotReady", err.Error()}, nil
	} else if err != nil {
		return nil, err
	}
	bound := tns.Status.NamespaceUID != ""
	n := &v1alpha1.Network{}
	err = r.client.Get(ctx, client.ObjectKey{Namespace: tns.Namespace, Name: tns.Spec.Network}, n)
	switch {
	case apierrors.IsNotFound(err) && !bound:
		return &fault{v1alpha1.NamespacePending, "NoNetwork", fmt.Sprintf("spec.network: there is no Network %s in %s yet", tns.Spec.Network, tns.Namespace)}, nil
	case client.IgnoreNotFound(err) != nil:
		return nil, err
	case !bound && (n.Status.Phase != v1alpha1.NetworkActive || !n.DeletionTimestamp.IsZero()):
		return &fault{v1alpha1.NamespacePending, "NetworkNotActive", fmt.Sprintf("waits for Network %s: %s", n.Name, message(n.Status.Conditions))}, nil
	}
	// What is bound stays bound, whatever becomes of its Network; Pods of it fail closed.
	ns, f, err := r.namespace(ctx, tns, t, n)
	if ns == nil || err != nil {
		return f, err
	}
	tns.Status.NamespaceUID = string(ns.UID)
	if n.UID != "" && tns.Status.NetworkUID == "" {
		tns.Status.NetworkUID = string(n.UID)
	}
	if f != nil {
		return f, nil
	}
	// The binding is public before anybody may make a Pod there: a Pod of a namespace that
	// is bound to nothing would be on the cluster's own network.
	if tns.Status.Phase = v1alpha1.NamespaceBound; !equality.Semantic.DeepEqual(tns.Status, old.Status) {
		if err := r.client.Status().Patch(ctx, tns, client.MergeFrom(old)); err != nil {
			return nil, err
		}
		*old = *tns.DeepCopy()
	}
	if err := ignoreGone(r.furnish(ctx, t, ns.Name)); err != nil {
		return nil, err
	}
	if n.UID == "" || tns.Status.NetworkUID != string(n.UID) {
		return &fault{v1alpha1.NamespaceBound, "NetworkLost", fmt.Sprintf(
			"Network %s that the Namespace was bound to is gone: delete the TenantNamespace and make it anew", tns.Spec.Network)}, nil
	}
	return nil, nil
}

// namespace returns the core Namespace, made and labelled; nil with a fault if it is not
// to be had.
func (r *namespaces) namespace(ctx context.Context, tns *v1alpha1.TenantNamespace, t *v1alpha1.Tenant, n *v1alpha1.Network) (*corev1.Namespace, *fault, error) {
	ns := &corev1.Namespace{}
	err := r.client.Get(ctx, client.ObjectKey{Name: tns.Name}, ns)
	if client.IgnoreNotFound(err) != nil {
		return nil, nil, err
	}
	if apierrors.IsNotFound(err) {
		// The cache may not know what was made a moment ago.
		err = r.live.Get(ctx, client.ObjectKey{Name: tns.Name}, ns)
		if client.IgnoreNotFound(err) != nil {
			return nil, nil, err
		}
	}
	if apierrors.IsNotFound(err) {
		if tns.Status.NamespaceUID != "" {
			r.note(tns, corev1.EventTypeWarning, "NamespaceLost", "Repair",
				"Namespace %s was deleted behind the TenantNamespace's back: it is made again, what was in it is lost", tns.Name)
			tns.Status.NamespaceUID = ""
			if n.UID != "" {
				// Nothing lives on the Network it had.
				tns.Status.NetworkUID = ""
			}
		}
		ns = &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: tns.Name, Annotations: map[string]string{binding.AnnotationOwner: string(tns.UID)}}}
		display(ns, tns, t)
		if err := r.client.Create(ctx, ns); apierrors.IsAlreadyExists(err) {
			return nil, nil, fmt.Errorf("namespace %s was made by somebody else this moment", tns.Name)
		} else if err != nil {
			return nil, nil, err
		}
		return ns, nil, nil
	}
	if !owns(tns, ns) {
		// Nobody adopts what another made, whatever its labels say.
		phase := v1alpha1.NamespaceFailed
		if tns.Status.NamespaceUID != "" {
			r.note(tns, corev1.EventTypeWarning, "NamespaceLost", "Repair", "Namespace %s was deleted and made by somebody else", tns.Name)
			tns.Status.NamespaceUID, tns.Status.NetworkUID = "", ""
		}
		return nil, &fault{phase, "NamespaceTaken", fmt.Sprintf("a Namespace %s exists already and is not this tenant's: choose another name", tns.Name)}, nil
	}
	if !ns.DeletionTimestamp.IsZero() {
		// Its Pods still run: it stays bound until it is gone.
		return ns, &fault{v1alpha1.NamespaceBound, "NamespaceTerminating", fmt.Sprintf(
			"somebody deleted Namespace %s: it is made again when it is gone, unless the TenantNamespace is deleted", ns.Name)}, nil
	}
	old := ns.DeepCopy()
	display(ns, tns, t)
	if !equality.Semantic.DeepEqual(old.Labels, ns.Labels) || !equality.Semantic.DeepEqual(old.Annotations, ns.Annotations) {
		if err := r.client.Patch(ctx, ns, client.MergeFrom(old)); err != nil {
			return nil, nil, err
		}
		r.note(tns, corev1.EventTypeWarning, "Repaired", "Repair", "labels of Namespace %s were not as they should be: put right", ns.Name)
	}
	return ns, nil, nil
}

// display labels a Namespace with what it is. Nothing is ever read from there.
func display(ns *corev1.Namespace, tns *v1alpha1.TenantNamespace, t *v1alpha1.Tenant) {
	if ns.Labels == nil {
		ns.Labels = map[string]string{}
	}
	maps.Copy(ns.Labels, map[string]string{v1alpha1.LabelTenant: t.Name, v1alpha1.LabelNetwork: tns.Spec.Network})
	delete(ns.Labels, v1alpha1.LabelHome)
	level := t.Spec.PodSecurity
	if level == "" {
		level = "baseline"
	}
	podSecurity(ns.Labels, level)
	if ns.Annotations == nil {
		ns.Annotations = map[string]string{}
	}
	ns.Annotations[binding.AnnotationOwner] = string(tns.UID)
}

// furnish puts into a Namespace what each of a tenant's has.
func (r *namespaces) furnish(ctx context.Context, t *v1alpha1.Tenant, name string) error {
	// Rights last: who may enter finds the limits in place.
	if err := r.quota(ctx, name, spaceQuota(t)); err != nil {
		return err
	}
	if err := r.limits(ctx, name, t); err != nil {
		return err
	}
	return r.bindings(ctx, t, name, spaceRole)
}

// remove deletes the Namespace that tns owns, and waits for it.
func (r *namespaces) remove(ctx context.Context, tns, old *v1alpha1.TenantNamespace) (reconcile.Result, error) {
	if !controllerutil.ContainsFinalizer(tns, v1alpha1.Finalizer) {
		return reconcile.Result{}, nil
	}
	ns := &corev1.Namespace{}
	err := r.live.Get(ctx, client.ObjectKey{Name: tns.Name}, ns)
	if client.IgnoreNotFound(err) != nil {
		return reconcile.Result{}, err
	}
	if apierrors.IsNotFound(err) || !owns(tns, ns) {
		// Somebody else's Namespace of this name is none of ours.
		return reconcile.Result{}, dropFinalizer(ctx, r.client, tns)
	}
	if ns.DeletionTimestamp.IsZero() {
		uid := ns.UID
		if err := r.client.Delete(ctx, ns, client.Preconditions{UID: &uid}); client.IgnoreNotFound(err) != nil && !apierrors.IsConflict(err) {
			return reconcile.Result{}, err
		}
	}
	tns.Status.Phase = v1alpha1.NamespaceTerminating
	tns.Status.NamespaceUID = string(ns.UID)
	set(&tns.Status.Conditions, tns.Generation, v1alpha1.ConditionReady, metav1.ConditionFalse, "Terminating", "being deleted")
	message := "waits until Namespace " + ns.Name + " is gone" + remaining(ns)
	if was := meta.FindStatusCondition(tns.Status.Conditions, v1alpha1.ConditionBlocked); was == nil || was.Message != message {
		r.note(tns, corev1.EventTypeNormal, "DeletionBlocked", "Delete", "%s", message)
	}
	set(&tns.Status.Conditions, tns.Generation, v1alpha1.ConditionBlocked, metav1.ConditionTrue, "NamespaceTerminating", message)
	return reconcile.Result{RequeueAfter: r.o.Retry}, r.patchStatus(ctx, tns, old)
}

// remaining is what Kubernetes says is left in a Namespace that is being deleted.
func remaining(ns *corev1.Namespace) string {
	var out []string
	for _, c := range ns.Status.Conditions {
		// Not only that there is something: also whose finalizer it waits for.
		if c.Status == corev1.ConditionTrue && (c.Type == corev1.NamespaceContentRemaining || c.Type == corev1.NamespaceFinalizersRemaining) {
			out = append(out, c.Message)
		}
	}
	if len(out) == 0 {
		return ""
	}
	return ": " + strings.Join(out, "; ")
}
