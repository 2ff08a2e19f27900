package owner

import (
	"testing"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/identity/binding"
	"github.com/hypernetes/hypernetes/test/controlplane"
)

// TestOwnerOf asks a fake, and the real API server, whose selectors are not the fake's.
func TestOwnerOf(t *testing.T) {
	scheme := controlplane.Scheme()
	t.Run("fake", func(t *testing.T) {
		ownerOf(t, fake.NewClientBuilder().WithScheme(scheme).WithIndex(&v1alpha1.TenantNamespace{}, binding.IndexName, func(o client.Object) []string { return []string{o.GetName()} }).
			WithStatusSubresource(&v1alpha1.Tenant{}, &v1alpha1.TenantNamespace{}).Build())
	})
	t.Run("real", func(t *testing.T) {
		c, err := client.New(controlplane.Start(t), client.Options{Scheme: scheme})
		if err != nil {
			t.Fatal(err)
		}
		ownerOf(t, c)
	})
}

func ownerOf(t *testing.T, c client.Client) {
	ctx := t.Context()
	put := func(o client.Object) client.Object {
		t.Helper()
		if err := c.Create(ctx, o); err != nil {
			t.Fatal(err)
		}
		return o
	}
	namespace := func(name string) types.UID {
		return put(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID("uid-of-" + name)}}).GetUID()
	}
	bind := func(tenant, name string, uid types.UID) {
		t.Helper()
		if err := c.Get(ctx, client.ObjectKey{Name: v1alpha1.HomePrefix + tenant}, &corev1.Namespace{}); err != nil {
			namespace(v1alpha1.HomePrefix + tenant)
		}
		tns := &v1alpha1.TenantNamespace{ObjectMeta: metav1.ObjectMeta{Namespace: v1alpha1.HomePrefix + tenant, Name: name, UID: types.UID("tns-" + name)}}
		put(tns)
		tns.Status.NamespaceUID = string(uid)
		if err := c.Status().Update(ctx, tns); err != nil {
			t.Fatal(err)
		}
		if uid == "" {
			ns := &corev1.Namespace{}
			if err := c.Get(ctx, client.ObjectKey{Name: name}, ns); err != nil {
				t.Fatal(err)
			}
			ns.Annotations = map[string]string{binding.AnnotationOwner: string(tns.UID)}
			if err := c.Update(ctx, ns); err != nil {
				t.Fatal(err)
			}
		}
	}
	tenant := func(name, project string, conditions ...metav1.Condition) {
		t.Helper()
		x := &v1alpha1.Tenant{ObjectMeta: metav1.ObjectMeta{Name: name}}
		if project != "" {
			x.Spec.Keystone = &v1alpha1.KeystoneProject{ProjectID: project}
		}
		put(x)
		x.Status.Conditions = conditions
		if err := c.Status().Update(ctx, x); err != nil {
			t.Fatal(err)
		}
	}
	const project = "0123456789abcdef0123456789abcdef"
	tenant("a", project)
	tenant("b", "")
	tenant("c", project, metav1.Condition{Type: conditionProject, Status: metav1.ConditionFalse, Reason: "ProjectTaken", Message: "tenant a has this project", LastTransitionTime: metav1.Now()})
	namespace("free")
	bind("a", "web", namespace("web"))
	bind("b", "bare", namespace("bare"))
	bind("c", "taken", namespace("taken"))
	namespace("forged")
	bind("a", "forged", "uid-of-another")
	bind("lost", "orphan", namespace("orphan"))
	namespace("being-bound")
	bind("a", "being-bound", "")

	for _, x := range []struct {
		namespace, want string
		is              func(error) bool
	}{
		{"free", "", nil},
		{"web", project, nil},
		{"bare", "", errdefs.IsFailedPrecondition},
		{"taken", "", errdefs.IsFailedPrecondition},
		// A TenantNamespace of the same name that is bound to another Namespace.
		{"forged", "", nil},
		{"orphan", "", errdefs.IsUnavailable},
		{"being-bound", "", errdefs.IsUnavailable},
		{"missing", "", errdefs.IsNotFound},
	} {
		got, err := API{c}.OwnerOf(ctx, x.namespace)
		if got != x.want || (x.is == nil) != (err == nil) || x.is != nil && !x.is(err) {
			t.Errorf("%s: %q, %v", x.namespace, got, err)
		}
	}
}
