package neutron

import (
	"context"
	"net/http"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/openstack"
	"github.com/hypernetes/hypernetes/network/provider"
	"github.com/hypernetes/hypernetes/network/provider/neutron/neutrontest"
	"github.com/hypernetes/hypernetes/network/subnet"
)

// TestEachCall spoils each request of a life of a Network, a Port and a FloatingIP in turn,
// in each of the ways in which an answer can be none, Keystone's too: who asks again finds
// or makes what is to be, once, and nothing is left in the end.
func TestEachCall(t *testing.T) {
	after := func(f neutrontest.Fault) neutrontest.Fault { f.After = true; return f }
	conflict := `{"NeutronError": {"type": "Conflict", "message": "try again", "detail": ""}}`
	for name, f := range map[string]neutrontest.Fault{
		"401":        {Status: 401},
		"409":        {Status: 409, Body: conflict},
		"409 after":  after(neutrontest.Fault{Status: 409, Body: conflict}),
		"429":        {Status: 429, Header: map[string]string{"Retry-After": "1"}},
		"500":        {Status: 500, Body: "<html>"},
		"500 after":  after(neutrontest.Fault{Status: 500}),
		"cut":        {Cut: true},
		"cut after":  after(neutrontest.Fault{Cut: true}),
		"hang after": after(neutrontest.Fault{Hang: true}),
	} {
		profiles := []string{openstack.Full}
		if f.Status == http.StatusUnauthorized {
			profiles = append(profiles, openstack.Least)
		}
		for _, profile := range profiles {
			t.Run(name+" "+profile, func(t *testing.T) {
				t.Parallel()
				for n := 0; ; n++ {
					w := fake(t)
					w.fake.TagsAtOnce(n%2 == 0)
					x := f
					x.Times, x.Skip = 1, n
					w.fake.Fail(x)
					failed := w.life(profile, f.Hang)
					if w.fake.Mend() {
						t.Logf("%d requests", n)
						if n < 30 {
							t.Error("so few?")
						}
						break
					}
					if failed > 1 && !f.Hang {
						t.Errorf("%d calls failed of one fault", failed)
					}
					if t.Failed() {
						t.Fatalf("request %d was spoilt", n)
					}
				}
			})
		}
	}
}

// life goes through one, with a new controller after each failure, and returns how many
// there were.
func (w *world) life(profile string, hasty bool) (failed int) {
	t := w.t
	t.Helper()
	ctx := context.Background()
	o := openstack.Options{File: w.config, Name: w.full, Profile: profile}
	if profile == openstack.Least {
		o.Name = w.least
	}
	tries := 3
	if hasty {
		o.Timeout, tries = 200*time.Millisecond, 20
	}
	var p *Provider
	do := func(what string, f func(p *Provider) error) {
		t.Helper()
		for try := 1; ; try++ {
			if p == nil {
				c, err := openstack.New(o)
				if err != nil {
					t.Fatal(err)
				}
				p = w.provider(profile)
				p.o.Cloud = c
			}
			err := f(p)
			if err == nil {
				return
			}
			p = nil
			if failed++; try == tries {
				t.Fatalf("%s: %v", what, err)
			}
			if len(err.Error()) > 2000 || provider.Reason(err, "") == "" && !errdefs.IsConflict(err) {
				t.Errorf("%s: an error without a reason: %v", what, err)
			}
		}
	}
	n := w.network("blue", "net", "192.168.0.0/24")
	x := w.port(n, "192.168.0.5", w.host)
	f := &v1alpha1.FloatingIP{ObjectMeta: metav1.ObjectMeta{Namespace: n.Namespace, Name: "f", UID: "8d5c8b0a-0000-4000-8000-000000000001"}}
	do("Ensure", func(p *Provider) error {
		st, err := p.Ensure(ctx, n, subnet.Normalise(n.Spec, n.Status.Subnets))
		if err == nil {
			n.Status.Provider, n.Status.ProviderNetworkID, n.Status.ProviderRouterID, n.Status.ProviderGroupID = provider.Neutron, st.NetworkID, st.RouterID, st.GroupID
			n.Status.MTU, n.Status.Subnets = st.MTU, st.Subnets
		}
		return err
	})
	do("EnsurePort", func(p *Provider) error {
		st, err := p.EnsurePort(ctx, n, x)
		if err == nil {
			x.Status.ProviderPortID, x.Status.MAC = st.ID, st.MAC
		}
		return err
	})
	lead := func(to *v1alpha1.Port) {
		do("EnsureAddress", func(p *Provider) error {
			st, err := p.EnsureAddress(ctx, f, to)
			if st.ID != "" {
				f.Status.ProviderID, f.Status.Address = st.ID, st.Address
			}
			return err
		})
	}
	lead(nil)
	lead(x)
	for kind, want := range map[string]int{networks: 1, routers: 1, subnets: 1, groups: 1, ports: 1, floatingIPs: 1} {
		if got := w.fake.Get(kind, func(r map[string]any) bool { return r["description"] != "" }); len(got) != want {
			t.Errorf("%d %s, want %d: %v", len(got), kind, want, got)
		}
	}
	if got := len(w.fake.Get(rules, nil)); got != 4 {
		t.Errorf("%d rules", got)
	}
	// What is in order is found to be.
	do("again", func(p *Provider) error {
		st, err := p.Ensure(ctx, n, n.Status.Subnets)
		if st.Repaired != "" || err == nil && st.NetworkID != n.Status.ProviderNetworkID {
			t.Errorf("%+v", st)
		}
		return err
	})
	do("Drifted", func(p *Provider) error {
		x.Status.Conditions = []metav1.Condition{{Type: v1alpha1.ConditionWired, Status: "True"}}
		names, err := p.Drifted(ctx, n, []v1alpha1.Port{*x})
		if len(names) > 0 {
			t.Errorf("%v", names)
		}
		return err
	})
	do("Made", func(p *Provider) error {
		all, err := p.Made(ctx, "blue")
		if err == nil && len(all) != 5 {
			t.Errorf("%+v", all)
		}
		return err
	})
	do("ReleaseAddress", func(p *Provider) error { return p.ReleaseAddress(ctx, f) })
	do("ReleasePort", func(p *Provider) error { return p.ReleasePort(ctx, x) })
	do("Release", func(p *Provider) error { return p.Release(ctx, n) })
	for _, kind := range []string{routers, groups, rules, ports, floatingIPs} {
		if left := w.fake.Get(kind, nil); len(left) > 0 {
			t.Errorf("%s left: %v", kind, left)
		}
	}
	if left := w.fake.Get(networks, nil); len(left) != 1 {
		t.Errorf("networks left: %v", left)
	}
	return failed
}
