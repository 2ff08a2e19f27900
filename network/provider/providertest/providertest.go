// Package providertest owns the tests every provider of Networks must pass. It must not
// know any provider.
package providertest

import (
	"context"
	"testing"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/controller"
	"github.com/hypernetes/hypernetes/network/subnet"
)

// Harness is a provider under test.
type Harness struct {
	// New makes the provider as after a restart of the controller: it keeps no memory.
	New func() controller.Provider
	// Networks counts what there is at the provider.
	Networks func(ctx context.Context) (int, error)
}

// Run tests a provider.
func Run(t *testing.T, h Harness) {
	ctx := t.Context()
	count := func(want int) {
		t.Helper()
		n, err := h.Networks(ctx)
		if err != nil || n != want {
			t.Errorf("%d networks at the provider, want %d (%v)", n, want, err)
		}
	}
	ensure := func(n *v1alpha1.Network) v1alpha1.NetworkStatus {
		t.Helper()
		st, err := h.New().Ensure(ctx, n, subnet.Normalise(n.Spec, n.Status.Subnets))
		if err != nil {
			t.Fatal(err)
		}
		return v1alpha1.NetworkStatus{Tenant: n.Status.Tenant, ProviderNetworkID: st.NetworkID, VNI: st.VNI, MTU: st.MTU, Subnets: st.Subnets}
	}
	if h.New().Name() == "" {
		t.Error("a provider without a name")
	}
	a, b := network("blue", "net1", "u1"), network("red", "net1", "u2")

	count(0)
	first := ensure(a)
	count(1)
	if first.MTU <= 0 || len(first.Subnets) != 1 || first.Subnets[0].Gateway != "192.168.0.1" {
		t.Errorf("%+v", first)
	}
	if d := cmp.Diff(first, ensure(a)); d != "" {
		t.Errorf("a controller that died before it wrote the status down gets another network: %s", d)
	}
	count(1)
	a.Status = first
	if d := cmp.Diff(first, ensure(a)); d != "" {
		t.Errorf("asked again: %s", d)
	}
	b.Status = ensure(b)
	count(2)
	if b.Status.VNI != 0 && b.Status.VNI == first.VNI || b.Status.ProviderNetworkID != "" && b.Status.ProviderNetworkID == first.ProviderNetworkID {
		t.Errorf("two Networks share one: %+v", b.Status)
	}
	if d := cmp.Diff(first, ensure(a)); d != "" {
		t.Errorf("another Network changed the first: %s", d)
	}
	a.Spec.Subnets["b"] = v1alpha1.Subnet{CIDR: "192.168.9.0/24"}
	if more := ensure(a); len(more.Subnets) != 2 || more.VNI != first.VNI || more.ProviderNetworkID != first.ProviderNetworkID {
		t.Errorf("a subnet added: %+v", more)
	}
	a.Spec.MTU = 1300
	if small := ensure(a); small.MTU != 1300 {
		t.Errorf("MTU: %+v", small)
	}
	for range 2 { // a second time it is gone already
		if err := h.New().Release(ctx, a); err != nil {
			t.Fatal(err)
		}
		count(1)
	}
	if err := h.New().Release(ctx, network("red", "net1", "u3")); err != nil {
		t.Fatal(err)
	}
	count(1) // one of the same name is another
	if err := h.New().Release(ctx, b); err != nil {
		t.Fatal(err)
	}
	count(0)
	done, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := h.New().Ensure(done, a, nil); err == nil {
		t.Error("an ended context is no error")
	}
}

func network(tenant, name, uid string) *v1alpha1.Network {
	return &v1alpha1.Network{
		ObjectMeta: metav1.ObjectMeta{Namespace: v1alpha1.Home(tenant), Name: name, UID: types.UID(uid)},
		Spec:       v1alpha1.NetworkSpec{Subnets: map[string]v1alpha1.Subnet{"a": {CIDR: "192.168.0.0/24"}}},
		Status:     v1alpha1.NetworkStatus{Tenant: tenant},
	}
}
