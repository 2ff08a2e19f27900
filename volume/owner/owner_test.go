package owner

import (
	"testing"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/identity/binding"
)

func TestOwnerOf(t *testing.T) {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{clientgoscheme.AddToScheme, v1alpha1.AddToScheme} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	ns := func(name string) *corev1.Namespace {
		return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, UID: "uid-of-1"}}
	}
	bound := func(tenant, name, uid string) *v1alpha1.TenantNamespace {
		return &v1alpha1.TenantNamespace{
			ObjectMeta: metav1.ObjectMeta{Namespace: v1alpha1.HomePrefix + tenant, Name: name, UID: "tns-1"},
			Status:     v1alpha1.TenantNamespaceStatus{NamespaceUID: uid},
		}
	}
	tenant := func(name, project string, conditions ...metav1.Condition) *v1alpha1.Tenant {
		x := &v1alpha1.Tenant{ObjectMeta: metav1.ObjectMeta{Name: name}}
		if project != "" {
			x.Spec.Keystone = &v1alpha1.KeystoneProject{ProjectID: project}
		}
		x.Status.Conditions = conditions
		return x
	}
	being := ns("being-bound")
	being.Annotations = map[string]string{binding.AnnotationOwner: "tns-1"}
	api := API{fake.NewClientBuilder().WithScheme(scheme).WithIndex(&v1alpha1.TenantNamespace{}, binding.IndexName, func(o client.Object) []string { return []string{o.GetName()} }).
		WithStatusSubresource(&v1alpha1.Tenant{}).WithObjects(
		ns("default"), ns("web"), ns("bare"), ns("taken"), ns("forged"), ns("orphan"), being,
		bound("a", "web", "uid-of-1"), bound("b", "bare", "uid-of-1"), bound("c", "taken", "uid-of-1"), bound("a", "forged", "uid-of-another"),
		bound("lost", "orphan", "uid-of-1"), bound("a", "being-bound", ""),
		tenant("a", "project-a"), tenant("b", ""),
		tenant("c", "project-a", metav1.Condition{Type: conditionProject, Status: metav1.ConditionFalse, Reason: "ProjectTaken", Message: "tenant a has this project", LastTransitionTime: metav1.Now()}),
	).Build()}
	for _, c := range []struct {
		namespace, want string
		is              func(error) bool
	}{
		{"default", "", nil},
		{"web", "project-a", nil},
		{"bare", "", errdefs.IsFailedPrecondition},
		{"taken", "", errdefs.IsFailedPrecondition},
		// A TenantNamespace of the same name that is bound to another Namespace.
		{"forged", "", nil},
		{"orphan", "", errdefs.IsUnavailable},
		{"being-bound", "", errdefs.IsUnavailable},
		{"missing", "", errdefs.IsNotFound},
	} {
		got, err := api.OwnerOf(t.Context(), c.namespace)
		if got != c.want || (c.is == nil) != (err == nil) || c.is != nil && !c.is(err) {
			t.Errorf("%s: %q, %v", c.namespace, got, err)
		}
	}
	all, err := api.Owners(t.Context())
	if err != nil || len(all) != 1 || all[0] != "project-a" {
		t.Errorf("owners %v: %v", all, err)
	}
}
