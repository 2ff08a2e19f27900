// Package tenant owns what makes a Tenant: its home namespace, its users' rights, quota,
// limits and Pod Security levels, its namespaces and the order in which all of it goes. It
// must not know how Networks are carried.
package tenant

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/source"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
)

// Phases of a Tenant.
const (
	phasePending     = "Pending"
	phaseActive      = "Active"
	phaseDegraded    = "Degraded"
	phaseFailed      = "Failed"
	phaseTerminating = "Terminating"
)

// conditionDefaultNetwork is true once the Network a tenant begins with was made. The
// tenant may delete it; it is not made again.
const conditionDefaultNetwork = "DefaultNetwork"

// Options of the reconcilers.
type Options struct {
	// Retry is after how long what is blocked is looked at again unasked.
	Retry time.Duration
	// Projects tells how Keystone's projects are; nil if there is no Keystone.
	Projects Projects
}

// Setup registers the reconcilers. The index of package binding must be there.
func Setup(m manager.Manager, o Options) error {
	if o.Retry == 0 {
		o.Retry = 10 * time.Second
	}
	b := base{client: m.GetClient(), live: m.GetAPIReader(), events: m.GetEventRecorder("h8s-controller"), o: o}
	if err := (&tenants{b}).setup(m); err != nil {
		return err
	}
	return (&namespaces{b}).setup(m)
}

type base struct {
	client client.Client
	// live asks the API server.
	live   client.Reader
	events events.EventRecorder
	o      Options
}

// note makes an event, which holds 1024 bytes.
func (b base) note(obj runtime.Object, kind, reason, action, format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if len(text) > 1000 {
		text = text[:1000] + "…"
	}
	b.events.Eventf(obj, nil, kind, reason, action, "%s", text)
}

func set(conditions *[]metav1.Condition, generation int64, kind string, status metav1.ConditionStatus, reason, message string) bool {
	was := meta.FindStatusCondition(*conditions, kind)
	news := was == nil || was.Status != status || was.Reason != reason
	meta.SetStatusCondition(conditions, metav1.Condition{
		Type: kind, Status: status, Reason: reason, Message: message, ObservedGeneration: generation,
	})
	return news
}

func one(namespace, name string) []reconcile.Request {
	return []reconcile.Request{{NamespacedName: types.NamespacedName{Namespace: namespace, Name: name}}}
}

var _ reconcile.Reconciler = (*tenants)(nil)

// tenants reconciles Tenants.
type tenants struct{ base }

func (r *tenants) setup(m manager.Manager) error {
	byHome := handler.EnqueueRequestsFromMapFunc(func(_ context.Context, o client.Object) []reconcile.Request {
		return ofHome(o.GetNamespace())
	})
	byLabel := handler.EnqueueRequestsFromMapFunc(func(_ context.Context, o client.Object) []reconcile.Request {
		if t := o.GetLabels()[v1alpha1.LabelTenant]; t != "" {
			return one("", t)
		}
		return nil
	})
	b := ctrl.NewControllerManagedBy(m).Named("tenant")
	if r.o.Projects != nil {
		b = b.WatchesRawSource(source.Channel(r.o.Projects.Changed(), &handler.EnqueueRequestForObject{}))
	}
	return b.For(&v1alpha1.Tenant{}).
		Watches(&corev1.Namespace{}, handler.EnqueueRequestsFromMapFunc(func(_ context.Context, o client.Object) []reconcile.Request {
			return ofHome(o.GetName())
		})).
		Watches(&v1alpha1.Network{}, byHome).
		Watches(&v1alpha1.TenantNamespace{}, byHome).
		Watches(&rbacv1.RoleBinding{}, byHome).
		Watches(&corev1.ResourceQuota{}, byHome).
		Watches(&rbacv1.ClusterRole{}, byLabel).
		Watches(&rbacv1.ClusterRole{}, handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) []reconcile.Request {
			list := &v1alpha1.TenantList{}
			if _, shared := clusterRoles()[o.GetName()]; !shared || r.client.List(ctx, list) != nil || len(list.Items) == 0 {
				return nil
			}
			return one("", list.Items[0].Name) // any one repairs what all share
		})).
		Watches(&rbacv1.ClusterRoleBinding{}, byLabel).
		Complete(r)
}

// ofHome is the tenant whose home a namespace may be.
func ofHome(namespace string) []reconcile.Request {
	if t, ok := strings.CutPrefix(namespace, v1alpha1.HomePrefix); ok {
		return one("", t)
	}
	return nil
}

// Reconcile implements reconcile.Reconciler.
func (r *tenants) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	t := &v1alpha1.Tenant{}
	if err := r.client.Get(ctx, req.NamespacedName, t); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	old := t.DeepCopy()
	if !t.DeletionTimestamp.IsZero() {
		return r.remove(ctx, t, old)
	}
	if controllerutil.AddFinalizer(t, v1alpha1.Finalizer) {
		if err := r.client.Patch(ctx, t, client.MergeFromWithOptions(old, client.MergeFromWithOptimisticLock{})); err != nil {
			return reconcile.Result{}, client.IgnoreNotFound(err)
		}
		old = t.DeepCopy()
	}
	t.Status.ObservedGeneration = t.Generation
	fault, err := r.ensure(ctx, t)
	if err == nil && fault == nil {
		fault, err = r.count(ctx, t)
	}
	result := reconcile.Result{}
	if err == nil {
		wrong, perr := r.project(ctx, t)
		if err = perr; fault == nil {
			fault = wrong
		}
	}
	switch {
	case err != nil:
		if t.Status.Phase == "" {
			t.Status.Phase = phasePending
		}
		set(&t.Status.Conditions, t.Generation, v1alpha1.ConditionReady, metav1.ConditionFalse, "Error", err.Error())
	case fault != nil:
		t.Status.Phase = fault.phase
		if set(&t.Status.Conditions, t.Generation, v1alpha1.ConditionReady, metav1.ConditionFalse, fault.reason, fault.message) && fault.phase != phasePending {
			r.note(t, corev1.EventTypeWarning, fault.reason, "Reconcile", "%s", fault.message)
		}
		result.RequeueAfter = r.o.Retry
	default:
		t.Status.Phase = phaseActive
		if set(&t.Status.Conditions, t.Generation, v1alpha1.ConditionReady, metav1.ConditionTrue, "Active", "home, rights and quota are in place") {
			r.note(t, corev1.EventTypeNormal, "Active", "Reconcile", "Tenant is active, its home is namespace %s", t.Status.HomeNamespace)
		}
	}
	if serr := r.patchStatus(ctx, t, old); serr != nil {
		return reconcile.Result{}, serr
	}
	return result, err
}

func (r *tenants) patchStatus(ctx context.Context, t, old *v1alpha1.Tenant) error {
	if equality.Semantic.DeepEqual(t.Status, old.Status) {
		return nil
	}
	return client.IgnoreNotFound(r.client.Status().Patch(ctx, t, client.MergeFrom(old)))
}

// fault is why an object is not as asked for.
type fault struct{ phase, reason, message string }

func (r *tenants) ensure(ctx context.Context, t *v1alpha1.Tenant) (*fault, error) {
	home := v1alpha1.Home(t.Name)
	ns := &corev1.Namespace{}
	err := r.client.Get(ctx, client.ObjectKey{Name: home}, ns)
	if apierrors.IsNotFound(err) {
		ns = &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: home}}
		homeLabels(ns, t)
		if err := controllerutil.SetControllerReference(t, ns, r.client.Scheme()); err != nil {
			return nil, err
		}
		if err := r.client.Create(ctx, ns); err != nil {
			return nil, err
		}
		r.note(t, corev1.EventTypeNormal, "HomeCreated", "Create", "made namespace %s", home)
	} else if err != nil {
		return nil, err
	}
	switch {
	case !metav1.IsControlledBy(ns, t):
		t.Status.HomeNamespace = ""
		return &fault{phaseFailed, "HomeTaken", fmt.Sprintf(
			"namespace %s exists and was not made for this Tenant: move what is in it elsewhere and delete it", home)}, nil
	case !ns.DeletionTimestamp.IsZero():
		return &fault{phaseDegraded, "HomeTerminating", fmt.Sprintf(
			"somebody deleted namespace %s: it is made again when it is gone, what was in it is lost", home)}, nil
	}
	before := ns.DeepCopy()
	homeLabels(ns, t)
	if !equality.Semantic.DeepEqual(before.Labels, ns.Labels) {
		if err := r.client.Patch(ctx, ns, client.MergeFrom(before)); err != nil {
			return nil, err
		}
	}
	t.Status.HomeNamespace = home
	if err := r.clusterRights(ctx, t); err != nil {
		return nil, err
	}
	if err := r.bindings(ctx, t, home, homeRole); err != nil {
		return nil, err
	}
	if err := r.quota(ctx, home, homeQuota(t)); err != nil {
		return nil, err
	}
	return nil, r.defaultNetwork(ctx, t, home)
}

func homeLabels(ns *corev1.Namespace, t *v1alpha1.Tenant) {
	if ns.Labels == nil {
		ns.Labels = map[string]string{}
	}
	maps.Copy(ns.Labels, map[string]string{v1alpha1.LabelTenant: t.Name, v1alpha1.LabelHome: "true"})
	podSecurity(ns.Labels, "restricted") // no Pod belongs there
}

// podSecurity sets the labels of a Pod Security level.
func podSecurity(labels map[string]string, level string) {
	for _, mode := range []string{"enforce", "audit", "warn"} {
		labels["pod-security.kubernetes.io/"+mode] = level
		labels["pod-security.kubernetes.io/"+mode+"-version"] = "latest"
	}
}

func (r *tenants) defaultNetwork(ctx context.Context, t *v1alpha1.Tenant, home string) error {
	spec := t.Spec.DefaultNetwork
	if spec == nil || (len(spec.Subnets) == 0 && spec.ProviderNetworkID == "") ||
		meta.IsStatusConditionTrue(t.Status.Conditions, conditionDefaultNetwork) {
		return nil
	}
	n := &v1alpha1.Network{
		ObjectMeta: metav1.ObjectMeta{Namespace: home, Name: v1alpha1.DefaultNetwork},
		Spec:       *spec.DeepCopy(),
	}
	err := r.client.Create(ctx, n)
	switch {
	case apierrors.IsInvalid(err) || apierrors.IsForbidden(err):
		// The operator's to mend; the tenant can work on other Networks.
		if set(&t.Status.Conditions, t.Generation, conditionDefaultNetwork, metav1.ConditionFalse, "Refused", "spec.defaultNetwork: "+err.Error()) {
			r.note(t, corev1.EventTypeWarning, "DefaultNetworkRefused", "Create", "spec.defaultNetwork: %v", err)
		}
		return nil
	case err != nil && !apierrors.IsAlreadyExists(err):
		return err
	}
	set(&t.Status.Conditions, t.Generation, conditionDefaultNetwork, metav1.ConditionTrue, "Created", "Network default was made")
	return nil
}

// count fills in what a tenant has, and says what of it is not well.
func (r *tenants) count(ctx context.Context, t *v1alpha1.Tenant) (*fault, error) {
	networks, namespaces := &v1alpha1.NetworkList{}, &v1alpha1.TenantNamespaceList{}
	home := client.InNamespace(t.Status.HomeNamespace)
	if err := r.client.List(ctx, networks, home); err != nil {
		return nil, err
	}
	if err := r.client.List(ctx, namespaces, home); err != nil {
		return nil, err
	}
	t.Status.Networks, t.Status.Namespaces = int32(len(networks.Items)), 0
	for i := range namespaces.Items {
		if namespaces.Items[i].Status.NamespaceUID != "" {
			t.Status.Namespaces++
		}
	}
	if c := meta.FindStatusCondition(t.Status.Conditions, conditionDefaultNetwork); c != nil && c.Status == metav1.ConditionFalse {
		return &fault{phaseDegraded, "DefaultNetworkRefused", c.Message}, nil
	}
	for i := range networks.Items {
		if n := &networks.Items[i]; n.Name == v1alpha1.DefaultNetwork && n.Status.Phase == v1alpha1.NetworkFailed {
			return &fault{phaseDegraded, "DefaultNetworkFailed", "Network default: " + message(n.Status.Conditions)}, nil
		}
	}
	return nil, nil
}

func message(conditions []metav1.Condition) string {
	if c := meta.FindStatusCondition(conditions, v1alpha1.ConditionReady); c != nil {
		return c.Message
	}
	return "not ready"
}

// remove takes a tenant down: namespaces and what runs in them, then addresses, then
// Networks, then the home. Each step waits for the one before.
func (r *tenants) remove(ctx context.Context, t, old *v1alpha1.Tenant) (reconcile.Result, error) {
	if !controllerutil.ContainsFinalizer(t, v1alpha1.Finalizer) {
		return reconcile.Result{}, nil
	}
	if t.Status.Phase != phaseTerminating {
		r.note(t, corev1.EventTypeNormal, "Terminating", "Delete", "the tenant is taken down")
	}
	t.Status.Phase = phaseTerminating
	set(&t.Status.Conditions, t.Generation, v1alpha1.ConditionReady, metav1.ConditionFalse, "Terminating", "being deleted")
	waits, err := r.takeDown(ctx, t)
	if err != nil {
		if perr := r.patchStatus(ctx, t, old); perr != nil {
			return reconcile.Result{}, perr
		}
		return reconcile.Result{}, err
	}
	if waits == "" {
		return reconcile.Result{}, dropFinalizer(ctx, r.client, t)
	}
	waits = "waits for " + waits
	if was := meta.FindStatusCondition(t.Status.Conditions, v1alpha1.ConditionBlocked); was == nil || was.Message != waits {
		r.note(t, corev1.EventTypeNormal, "DeletionBlocked", "Delete", "%s", waits)
	}
	set(&t.Status.Conditions, t.Generation, v1alpha1.ConditionBlocked, metav1.ConditionTrue, "Waiting", waits)
	return reconcile.Result{RequeueAfter: r.o.Retry}, r.patchStatus(ctx, t, old)
}

// dropFinalizer lets an object go.
func dropFinalizer(ctx context.Context, c client.Client, o client.Object) error {
	old := o.DeepCopyObject().(client.Object)
	if !controllerutil.RemoveFinalizer(o, v1alpha1.Finalizer) {
		return nil
	}
	return client.IgnoreNotFound(c.Patch(ctx, o, client.MergeFromWithOptions(old, client.MergeFromWithOptimisticLock{})))
}

// takeDown does the next step and says what it waits for; nothing if all is gone.
func (r *tenants) takeDown(ctx context.Context, t *v1alpha1.Tenant) (string, error) {
	home := v1alpha1.Home(t.Name)
	ns := &corev1.Namespace{}
	err := r.live.Get(ctx, client.ObjectKey{Name: home}, ns)
	ours := err == nil && metav1.IsControlledBy(ns, t)
	if client.IgnoreNotFound(err) != nil {
		return "", err
	}
	if ours {
		for _, step := range []struct {
			kind string
			list client.ObjectList
			// keep what goes by itself: a Port of a Pod when that goes.
			keep func(client.Object) bool
		}{
			{"TenantNamespace", &v1alpha1.TenantNamespaceList{}, nil},
			{"FloatingIP", &v1alpha1.FloatingIPList{}, nil},
			{"Port", &v1alpha1.PortList{}, func(o client.Object) bool { return o.(*v1alpha1.Port).Spec.Pod != nil }},
			{"Network", &v1alpha1.NetworkList{}, nil},
		} {
			if waits, err := r.empty(ctx, home, step.kind, step.list, step.keep); err != nil || waits != "" {
				return waits, err
			}
		}
		if ns.DeletionTimestamp.IsZero() {
			uid := ns.UID
			if err := r.client.Delete(ctx, ns, client.Preconditions{UID: &uid}); client.IgnoreNotFound(err) != nil {
				return "", err
			}
		}
		return "Namespace " + home, nil
	}
	return "", r.dropClusterRights(ctx, t)
}

// empty deletes all objects of a kind and names those that are there still.
func (r *tenants) empty(ctx context.Context, home, kind string, list client.ObjectList, keep func(client.Object) bool) (string, error) {
	if err := r.live.List(ctx, list, client.InNamespace(home)); err != nil {
		return "", err
	}
	items, err := meta.ExtractList(list)
	if err != nil {
		return "", err
	}
	var names []string
	for _, item := range items {
		o := item.(client.Object)
		names = append(names, o.GetName()+blocked(o))
		if !o.GetDeletionTimestamp().IsZero() || (keep != nil && keep(o)) {
			continue
		}
		if err := r.client.Delete(ctx, o); client.IgnoreNotFound(err) != nil {
			return "", err
		}
	}
	if len(names) == 0 {
		return "", nil
	}
	slices.Sort(names)
	if n := len(names); n > 8 {
		names = append(names[:8], fmt.Sprintf("and %d more", n-8))
	}
	return kind + " " + strings.Join(names, ", "), nil
}

// blocked is what an object's own condition says of its deletion.
func blocked(o client.Object) string {
	var conditions []metav1.Condition
	switch o := o.(type) {
	case *v1alpha1.TenantNamespace:
		conditions = o.Status.Conditions
	case *v1alpha1.Network:
		conditions = o.Status.Conditions
	case *v1alpha1.Port:
		if o.Spec.Pod != nil {
			return fmt.Sprintf(" (Pod %s/%s)", o.Spec.Pod.Namespace, o.Spec.Pod.Name)
		}
	}
	if c := meta.FindStatusCondition(conditions, v1alpha1.ConditionBlocked); c != nil && c.Status == metav1.ConditionTrue {
		return " (" + c.Message + ")"
	}
	return ""
}
