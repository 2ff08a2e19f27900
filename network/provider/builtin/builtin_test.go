package builtin

import (
	"context"
	"testing"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/claim"
	"github.com/hypernetes/hypernetes/network/controller"
	"github.com/hypernetes/hypernetes/network/provider/providertest"
	"github.com/hypernetes/hypernetes/network/subnet"
	"github.com/hypernetes/hypernetes/test/controlplane"
)

func TestProvider(t *testing.T) {
	c, err := client.New(controlplane.Start(t), client.Options{Scheme: controlplane.Scheme()})
	if err != nil {
		t.Fatal(err)
	}
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: v1alpha1.SystemNamespace}}
	if err := c.Create(t.Context(), ns); err != nil {
		t.Fatal(err)
	}
	store := claim.Store{Writer: c, Reader: c}
	next := int32(0)
	providertest.Run(t, providertest.Harness{
		New: func() controller.Provider {
			p := New(store, subnet.Limits{FabricMTU: 1500})
			// Every number is met twice.
			p.Random = func(int32) int32 { next++; return next / 2 }
			return p
		},
		Networks: func(ctx context.Context) (int, error) {
			all, err := store.List(ctx, claim.VNI)
			return len(all), err
		},
	})

	t.Run("a VNI that another Network has", func(t *testing.T) {
		n := func(uid string) *v1alpha1.Network {
			return &v1alpha1.Network{ObjectMeta: metav1.ObjectMeta{Namespace: "tenant-blue", Name: "n" + uid, UID: types.UID(uid)}}
		}
		p := New(store, subnet.Limits{FabricMTU: 1500})
		st, err := p.Ensure(t.Context(), n("1"), nil)
		if err != nil {
			t.Fatal(err)
		}
		forged := n("2")
		forged.Status.VNI = st.VNI
		got, err := p.Ensure(t.Context(), forged, nil)
		if err != nil || got.VNI == st.VNI || got.Repaired == "" {
			t.Errorf("%+v, %v", got, err)
		}
		lease := &coordinationv1.Lease{}
		key := client.ObjectKey{Namespace: v1alpha1.ClaimNamespace, Name: claim.VNIName(st.VNI)}
		if err := c.Get(t.Context(), key, lease); err != nil {
			t.Fatal(err)
		}
		if err := c.Delete(t.Context(), lease); err != nil {
			t.Fatal(err)
		}
		lost := n("1")
		lost.Status.VNI = st.VNI
		if again, err := p.Ensure(t.Context(), lost, nil); err != nil || again.VNI != st.VNI {
			t.Errorf("a lost claim is made again: %+v, %v", again, err)
		}
	})
}
