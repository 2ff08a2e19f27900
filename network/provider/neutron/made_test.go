package neutron

import (
	"slices"
	"testing"

	"k8s.io/apimachinery/pkg/types"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/openstack"
	"github.com/hypernetes/hypernetes/network/provider"
	"github.com/hypernetes/hypernetes/network/provider/neutron/neutrontest"
)

// testLeftovers is what there is for whom, and that all of it can be removed in the order
// in which it is told, and nothing else.
func testLeftovers(t *testing.T, w *world, profile string) {
	p := w.provider(profile)
	n := w.network("blue", "net", "192.168.0.0/24")
	w.ensure(p, n)
	x := w.port(n, "192.168.0.5", w.host)
	w.plug(p, n, x)
	f := &v1alpha1.FloatingIP{ObjectMeta: metav1.ObjectMeta{Namespace: n.Namespace, Name: "f", UID: "8d5c8b0a-0000-4000-8000-000000000001"}}
	if _, err := p.EnsureAddress(t.Context(), f, x); err != nil {
		t.Fatal(err)
	}
	// Others': a port of a machine that copied the mark, and what another cluster made.
	theirs := w.do("POST", ports, map[string]any{"port": map[string]any{
		"network_id": n.Status.ProviderNetworkID, "project_id": w.projects["blue"], "description": p.mark(x.UID), "device_owner": "compute:x"}})["port"].(map[string]any)["id"].(string)
	q := w.provider(profile)
	q.o.Cluster += "-2"
	m := w.network("blue", "net", "192.168.0.0/24")
	w.ensure(q, m)

	told := func(tenant string) map[string]types.UID {
		t.Helper()
		all, err := p.Made(t.Context(), tenant)
		if err != nil {
			t.Fatal(err)
		}
		out := map[string]types.UID{}
		for _, x := range all {
			out[x.Kind] = x.Owner
			if x.Project != w.projects["blue"] {
				t.Errorf("%+v", x)
			}
		}
		if len(out) != len(all) {
			t.Errorf("twice one kind: %+v", all)
		}
		return out
	}
	want := map[string]types.UID{floatingIPs: f.UID, ports: x.UID, routers: n.UID, networks: n.UID, groups: n.UID}
	same := func(tenant string, want map[string]types.UID) {
		t.Helper()
		got := told(tenant)
		for kind, uid := range want {
			if got[kind] != uid {
				t.Errorf("%q: %s is for %q, want %q", tenant, kind, got[kind], uid)
			}
		}
		if len(got) != len(want) {
			t.Errorf("%q: %v, want %v", tenant, got, want)
		}
	}
	same("blue", want)
	same("red", nil)
	if profile == openstack.Full {
		same("", want)
	} else {
		same("", nil)
	}
	all, err := p.Made(t.Context(), "blue")
	if err != nil {
		t.Fatal(err)
	}
	// One that is somebody else's by now stays.
	other := all[0]
	other.Owner = "9f0f7e3c-0000-4000-8000-000000000000"
	if err := p.Unmake(t.Context(), "blue", other); err != nil {
		t.Error(err)
	}
	same("blue", want)
	w.del(ports, theirs)
	for _, x := range all {
		if err := p.Unmake(t.Context(), "blue", x); err != nil {
			t.Errorf("%+v: %v", x, err)
		}
		if err := p.Unmake(t.Context(), "blue", x); err != nil {
			t.Errorf("%+v again: %v", x, err)
		}
	}
	same("blue", nil)
	if s := w.get(networks, m.Status.ProviderNetworkID); s["id"] == nil {
		t.Error("another cluster's network is gone")
	}
	if err := q.Release(t.Context(), m); err != nil {
		t.Error(err)
	}
}

// TestLeftoversInUse: what others use stays, and it is said who.
func TestLeftoversInUse(t *testing.T) {
	w := fake(t)
	p := w.provider(openstack.Full)
	n := w.network("blue", "net", "192.168.0.0/24")
	w.ensure(p, n)
	w.fake.Put(ports, map[string]any{"network_id": n.Status.ProviderNetworkID, "project_id": neutrontest.Alpha, "device_owner": "compute:x", "device_id": "m", "fixed_ips": []any{}})
	all, err := p.Made(t.Context(), "blue")
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(all, func(x provider.Resource) bool { return x.Kind == networks })
	if err := p.Unmake(t.Context(), "blue", all[i]); provider.Reason(err, "") != "NetworkInUse" {
		t.Errorf("%v", err)
	}
	w.get(networks, n.Status.ProviderNetworkID)
}
