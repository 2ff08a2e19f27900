package controlplane_test

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/test/controlplane"
)

func TestStart(t *testing.T) {
	cfg := controlplane.Start(t)
	admin, err := client.New(cfg, client.Options{Scheme: controlplane.Scheme()})
	if err != nil {
		t.Fatal(err)
	}
	tenant := &v1alpha1.Tenant{ObjectMeta: metav1.ObjectMeta{Name: "blue"}}
	if err := admin.Create(t.Context(), tenant); err != nil {
		t.Fatal(err)
	}
	if len(tenant.Spec.RuntimeClasses) != 1 || tenant.Spec.DefaultNetwork == nil {
		t.Errorf("defaults of the CRD: %+v", tenant.Spec)
	}
	ann, err := client.New(controlplane.As(cfg, "blue:ann", "h8s:tenant:blue:member"), client.Options{Scheme: controlplane.Scheme()})
	if err != nil {
		t.Fatal(err)
	}
	if err := ann.List(t.Context(), &corev1.SecretList{}); !apierrors.IsForbidden(err) {
		t.Errorf("a user nobody granted anything lists Secrets: %v", err)
	}
}
