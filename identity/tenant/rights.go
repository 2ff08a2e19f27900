package tenant

import (
	"context"
	"slices"

	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
)

// roles of a tenant's users.
var roles = []v1alpha1.Role{v1alpha1.RoleReader, v1alpha1.RoleMember, v1alpha1.RoleManager}

// Names of the ClusterRoles that the bindings in namespaces refer to. The rights are
// written out here and not taken from Kubernetes' view, edit and admin, which others may
// aggregate into and which contain pods/proxy, services/proxy and impersonation.
func spaceRole(r v1alpha1.Role) string { return "h8s:tenant-" + string(r) }

func homeRole(r v1alpha1.Role) string { return "h8s:home-" + string(r) }

// userRole is what every user of every tenant may read of the cluster.
const userRole = "h8s:tenant-user"

// managerRole is what every tenant's manager may do in the cluster.
const managerRole = "h8s:tenant-signer"

var (
	read  = []string{"get", "list", "watch"}
	write = []string{"create", "delete", "deletecollection", "patch", "update"}
)

func rule(verbs []string, group string, resources ...string) rbacv1.PolicyRule {
	return rbacv1.PolicyRule{Verbs: verbs, APIGroups: []string{group}, Resources: resources}
}

// clusterRoles are those that all tenants share.
func clusterRoles() map[string][]rbacv1.PolicyRule {
	both := slices.Concat(read, write)
	reader := []rbacv1.PolicyRule{
		rule(read, "", "configmaps", "endpoints", "events", "limitranges", "persistentvolumeclaims", "persistentvolumeclaims/status",
			"pods", "pods/log", "pods/status", "replicationcontrollers", "replicationcontrollers/scale", "replicationcontrollers/status",
			"resourcequotas", "resourcequotas/status", "serviceaccounts", "services", "services/status"),
		rule(read, "apps", "controllerrevisions", "daemonsets", "daemonsets/status", "deployments", "deployments/scale", "deployments/status",
			"replicasets", "replicasets/scale", "replicasets/status", "statefulsets", "statefulsets/scale", "statefulsets/status"),
		rule(read, "autoscaling", "horizontalpodautoscalers", "horizontalpodautoscalers/status"),
		rule(read, "batch", "cronjobs", "cronjobs/status", "jobs", "jobs/status"),
		rule(read, "coordination.k8s.io", "leases"),
		rule(read, "discovery.k8s.io", "endpointslices"),
		rule(read, "events.k8s.io", "events"),
		rule([]string{"get", "list"}, "metrics.k8s.io", "pods"),
		rule(read, "networking.k8s.io", "ingresses", "ingresses/status", "networkpolicies"),
		rule(read, "policy", "poddisruptionbudgets", "poddisruptionbudgets/status"),
		rule(read, "snapshot.storage.k8s.io", "volumesnapshots", "volumesnapshots/status"),
	}
	// Not among them: pods/proxy and services/proxy, which dial a Pod's address from the API
	// server; endpoints and endpointslices, which would lead a Service elsewhere; status of
	// Services; impersonation; anything of Namespaces, quota and limits.
	member := slices.Concat(reader, []rbacv1.PolicyRule{
		rule(read, "", "secrets"),
		rule(write, "", "configmaps", "persistentvolumeclaims", "pods", "replicationcontrollers", "replicationcontrollers/scale",
			"secrets", "serviceaccounts", "services"),
		rule([]string{"create", "get"}, "", "pods/attach", "pods/exec", "pods/portforward"),
		rule([]string{"create"}, "", "pods/eviction", "serviceaccounts/token"),
		rule([]string{"get", "patch", "update"}, "", "pods/ephemeralcontainers", "pods/resize"),
		rule([]string{"create", "patch", "update"}, "", "events"),
		rule([]string{"create", "patch", "update"}, "events.k8s.io", "events"),
		rule(write, "apps", "daemonsets", "deployments", "deployments/scale", "replicasets", "replicasets/scale", "statefulsets", "statefulsets/scale"),
		rule(write, "autoscaling", "horizontalpodautoscalers"),
		rule(write, "batch", "cronjobs", "jobs"),
		rule(write, "coordination.k8s.io", "leases"),
		rule(write, "networking.k8s.io", "ingresses", "networkpolicies"),
		rule(write, "policy", "poddisruptionbudgets"),
		rule(write, "snapshot.storage.k8s.io", "volumesnapshots"),
	})
	// The API server lets nobody write Roles or bind roles with rights they do not have
	// themselves: neither bind nor escalate is given.
	manager := slices.Concat(member, []rbacv1.PolicyRule{
		rule(both, "rbac.authorization.k8s.io", "rolebindings", "roles"),
		rule([]string{"create"}, "authorization.k8s.io", "localsubjectaccessreviews"),
	})
	homeReader := []rbacv1.PolicyRule{
		rule(read, v1alpha1.GroupVersion.Group, "tenantnamespaces", "networks", "ports", "floatingips"),
		rule(read, "", "events", "resourcequotas"),
		rule(read, "events.k8s.io", "events"),
	}
	// A Port is made or deleted, never changed: what admission lets a tenant claim has no
	// node and no Pod.
	homeManager := slices.Concat(homeReader, []rbacv1.PolicyRule{
		rule(write, v1alpha1.GroupVersion.Group, "tenantnamespaces", "networks", "floatingips"),
		rule([]string{"create", "delete"}, v1alpha1.GroupVersion.Group, "ports"),
	})
	return map[string][]rbacv1.PolicyRule{
		spaceRole(v1alpha1.RoleReader):  reader,
		spaceRole(v1alpha1.RoleMember):  member,
		spaceRole(v1alpha1.RoleManager): manager,
		homeRole(v1alpha1.RoleReader):   homeReader,
		homeRole(v1alpha1.RoleMember):   homeReader,
		homeRole(v1alpha1.RoleManager):  homeManager,
		userRole: {
			rule(read, "node.k8s.io", "runtimeclasses"),
			rule(read, "storage.k8s.io", "storageclasses", "volumeattributesclasses"),
			rule(read, "snapshot.storage.k8s.io", "volumesnapshotclasses"),
			rule(read, "scheduling.k8s.io", "priorityclasses"),
		},
		// A request is signed by our approver's leave only (package csr); to see it one has to
		// know its name.
		managerRole: {rule([]string{"create", "get"}, "certificates.k8s.io", "certificatesigningrequests")},
	}
}

// subjects are who has a role in a tenant.
func subjects(t *v1alpha1.Tenant, r v1alpha1.Role) []rbacv1.Subject {
	out := []rbacv1.Subject{{Kind: rbacv1.GroupKind, APIGroup: rbacv1.GroupName, Name: v1alpha1.Group(t.Name, r)}}
	if r == v1alpha1.RoleManager {
		for _, o := range t.Spec.Owners {
			out = append(out, rbacv1.Subject{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: o})
		}
	}
	return out
}

// bindings gives a tenant's users their roles in a namespace.
func (b base) bindings(ctx context.Context, t *v1alpha1.Tenant, namespace string, role func(v1alpha1.Role) string) error {
	for _, r := range roles {
		want := &rbacv1.RoleBinding{
			ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "h8s:" + string(r), Labels: map[string]string{v1alpha1.LabelTenant: t.Name}},
			RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: role(r)},
			Subjects:   subjects(t, r),
		}
		have := &rbacv1.RoleBinding{}
		err := b.client.Get(ctx, client.ObjectKeyFromObject(want), have)
		if err == nil && have.RoleRef != want.RoleRef {
			// It cannot be changed.
			if err := b.client.Delete(ctx, have); client.IgnoreNotFound(err) != nil {
				return err
			}
			err = apierrors.NewNotFound(rbacv1.Resource("rolebindings"), want.Name)
		}
		if err := b.apply(ctx, err, have, want, func() bool {
			same := equality.Semantic.DeepEqual(have.Subjects, want.Subjects) && have.Labels[v1alpha1.LabelTenant] == t.Name
			have.Subjects = want.Subjects
			have.Labels = with(have.Labels, v1alpha1.LabelTenant, t.Name)
			return same
		}); err != nil {
			return err
		}
	}
	return nil
}

// apply creates want, or updates have unless mend found nothing to do.
func (b base) apply(ctx context.Context, got error, have, want client.Object, mend func() (same bool)) error {
	switch {
	case apierrors.IsNotFound(got):
		return b.client.Create(ctx, want)
	case got != nil:
		return got
	case mend():
		return nil
	}
	return b.client.Update(ctx, have)
}

func with(labels map[string]string, key, value string) map[string]string {
	if labels == nil {
		labels = map[string]string{}
	}
	labels[key] = value
	return labels
}

// tenantRole is the ClusterRole by which a tenant's users see their own Tenant.
func tenantRole(t string) string { return "h8s:tenant:" + t }

// clusterRights gives a tenant's users the little they may see of the cluster.
func (r *tenants) clusterRights(ctx context.Context, t *v1alpha1.Tenant) error {
	all := clusterRoles()
	all[tenantRole(t.Name)] = []rbacv1.PolicyRule{{
		Verbs: read, APIGroups: []string{v1alpha1.GroupVersion.Group}, Resources: []string{"tenants"}, ResourceNames: []string{t.Name},
	}}
	for name, rules := range all {
		want := &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: name}, Rules: rules}
		if name == tenantRole(t.Name) {
			want.Labels = map[string]string{v1alpha1.LabelTenant: t.Name}
		}
		have := &rbacv1.ClusterRole{}
		err := r.client.Get(ctx, client.ObjectKey{Name: name}, have)
		if err := r.apply(ctx, err, have, want, func() bool {
			same := equality.Semantic.DeepEqual(have.Rules, want.Rules) && have.AggregationRule == nil
			have.Rules, have.AggregationRule = want.Rules, nil
			return same
		}); err != nil && !apierrors.IsAlreadyExists(err) {
			return err
		}
	}
	var everybody []rbacv1.Subject
	for _, role := range roles {
		everybody = append(everybody, subjects(t, role)...)
	}
	for _, b := range []struct {
		name, role string
		subjects   []rbacv1.Subject
	}{
		{tenantRole(t.Name), tenantRole(t.Name), everybody},
		{tenantRole(t.Name) + ":user", userRole, everybody},
		{tenantRole(t.Name) + ":signer", managerRole, subjects(t, v1alpha1.RoleManager)},
	} {
		want := &rbacv1.ClusterRoleBinding{
			ObjectMeta: metav1.ObjectMeta{Name: b.name, Labels: map[string]string{v1alpha1.LabelTenant: t.Name}},
			RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: b.role},
			Subjects:   b.subjects,
		}
		have := &rbacv1.ClusterRoleBinding{}
		err := r.client.Get(ctx, client.ObjectKey{Name: b.name}, have)
		if err == nil && have.RoleRef != want.RoleRef {
			if err := r.client.Delete(ctx, have); client.IgnoreNotFound(err) != nil {
				return err
			}
			err = apierrors.NewNotFound(rbacv1.Resource("clusterrolebindings"), b.name)
		}
		if err := r.apply(ctx, err, have, want, func() bool {
			same := equality.Semantic.DeepEqual(have.Subjects, want.Subjects) && have.Labels[v1alpha1.LabelTenant] == t.Name
			have.Subjects, have.Labels = want.Subjects, with(have.Labels, v1alpha1.LabelTenant, t.Name)
			return same
		}); err != nil {
			return err
		}
	}
	return nil
}

// dropClusterRights removes what clusterRights made for one tenant.
func (r *tenants) dropClusterRights(ctx context.Context, t *v1alpha1.Tenant) error {
	for _, o := range []client.Object{
		&rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: tenantRole(t.Name)}},
		&rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: tenantRole(t.Name) + ":user"}},
		&rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: tenantRole(t.Name) + ":signer"}},
		&rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: tenantRole(t.Name)}},
	} {
		if err := r.client.Delete(ctx, o); client.IgnoreNotFound(err) != nil {
			return err
		}
	}
	return nil
}
