package neutron

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/uuid"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/controller"
	"github.com/hypernetes/hypernetes/network/openstack"
	"github.com/hypernetes/hypernetes/network/provider"
	"github.com/hypernetes/hypernetes/network/provider/neutron/neutrontest"
	"github.com/hypernetes/hypernetes/network/provider/providertest"
	"github.com/hypernetes/hypernetes/network/subnet"
	"github.com/hypernetes/hypernetes/test/openstack/openstacktest"
)

var limits = subnet.Limits{FabricMTU: 1500, DefaultProvider: provider.Neutron}

// world is a Neutron under test, the real one or the stand-in.
type world struct {
	t testing.TB
	// config is a clouds.yaml; full and least are clouds of it.
	config, full, least string
	transport           *http.Transport
	// projects by tenant.
	projects map[string]string
	host     string
	external string
	cluster  string
	// admin may do everything, behind the provider's back.
	admin *openstack.Client
	fake  *neutrontest.Server
}

func fake(t testing.TB) *world {
	s := neutrontest.New(t)
	w := &world{
		t: t, config: s.CloudsYAML(t), full: "admin", least: "least", host: "n1", external: "public", fake: s,
		projects: map[string]string{"blue": neutrontest.Alpha, "red": neutrontest.Beta},
	}
	w.begin()
	return w
}

func live(t testing.TB) *world {
	c := openstacktest.Up(t)
	w := &world{
		t: t, config: c.ConfigFile(), full: "admin", least: "least", external: openstacktest.ExternalNetwork,
		transport: &http.Transport{DialContext: c.DialContext}, projects: map[string]string{},
	}
	w.host, _ = c.Node(1)
	for tenant, cloud := range map[string]string{"blue": "alpha", "red": "beta"} {
		p, err := c.Provider(t.Context(), cloud)
		if err != nil {
			t.Fatal(err)
		}
		if w.projects[tenant], err = openstacktest.ProjectID(p); err != nil {
			t.Fatal(err)
		}
	}
	w.begin()
	return w
}

func (w *world) begin() {
	w.cluster = string(uuid.NewUUID())
	c, err := openstack.New(openstack.Options{File: w.config, Name: w.full, Transport: w.transport})
	if err != nil {
		w.t.Fatal(err)
	}
	if w.admin, err = c.Client(w.t.Context(), openstack.Network, ""); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(w.clean)
}

// clean removes what a test that failed left.
func (w *world) clean() {
	if w.fake != nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for _, kind := range []string{floatingIPs, ports, routers, networks, groups} {
		all, err := list[object](ctx, w.admin, kind, nil)
		if err != nil {
			w.t.Error(err)
		}
		for _, o := range all {
			if !strings.Contains(o.Description, w.cluster) {
				continue
			}
			if kind == routers {
				err = releaseRouter(ctx, w.admin, o.ID)
			} else {
				err = remove(ctx, w.admin, kind, o.ID)
			}
			if err != nil {
				w.t.Error(kind, o.ID, err)
			}
		}
	}
}

// provider is one as after a restart of the controller.
func (w *world) provider(profile string) *Provider {
	name := w.full
	if profile == openstack.Least {
		name = w.least
	}
	c, err := openstack.New(openstack.Options{File: w.config, Name: name, Profile: profile, Transport: w.transport, Timeout: time.Minute})
	if err != nil {
		w.t.Fatal(err)
	}
	return New(Options{
		Cloud: c, Cluster: w.cluster, External: w.external, Limits: limits,
		Projects: func(_ context.Context, tenant string) (string, error) {
			if id := w.projects[tenant]; id != "" {
				return id, nil
			}
			return "", errdefs.ErrNotFound
		},
	})
}

// ours are the resources of this test's cluster.
func (w *world) ours(kind string) []map[string]any {
	w.t.Helper()
	all, err := list[map[string]any](w.t.Context(), w.admin, kind, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	return slices.DeleteFunc(all, func(o map[string]any) bool {
		d, _ := o["description"].(string)
		return !strings.Contains(d, w.cluster)
	})
}

func (w *world) do(method, path string, body any) map[string]any {
	w.t.Helper()
	answer := map[string]any{}
	if err := w.admin.Do(w.t.Context(), method, path, nil, body, &answer); err != nil {
		w.t.Fatal(err)
	}
	return answer
}

func (w *world) edit(kind, id string, fields map[string]any) {
	w.t.Helper()
	w.do(http.MethodPut, kind+"/"+id, map[string]any{single(kind): fields})
}

func (w *world) del(kind, id string) {
	w.t.Helper()
	if err := remove(w.t.Context(), w.admin, kind, id); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) network(tenant, name string, cidrs ...string) *v1alpha1.Network {
	n := &v1alpha1.Network{
		ObjectMeta: metav1.ObjectMeta{Namespace: v1alpha1.Home(tenant), Name: name, UID: uuid.NewUUID()},
		Spec:       v1alpha1.NetworkSpec{Subnets: map[string]v1alpha1.Subnet{}},
		Status:     v1alpha1.NetworkStatus{Tenant: tenant},
	}
	for i, c := range cidrs {
		n.Spec.Subnets[fmt.Sprint("s", i)] = v1alpha1.Subnet{CIDR: c}
	}
	return n
}

// ensure does what the reconciler does.
func (w *world) ensure(p *Provider, n *v1alpha1.Network) provider.State {
	w.t.Helper()
	st, err := p.Ensure(w.t.Context(), n, subnet.Normalise(n.Spec, n.Status.Subnets))
	if err != nil {
		w.t.Fatal(err)
	}
	n.Status.Provider, n.Status.ProviderNetworkID, n.Status.ProviderRouterID, n.Status.ProviderGroupID = provider.Neutron, st.NetworkID, st.RouterID, st.GroupID
	n.Status.MTU, n.Status.Subnets = st.MTU, st.Subnets
	return st
}

func (w *world) port(n *v1alpha1.Network, address, node string) *v1alpha1.Port {
	x := &v1alpha1.Port{
		ObjectMeta: metav1.ObjectMeta{Namespace: n.Namespace, Name: v1alpha1.PortName(n.Name, address), UID: uuid.NewUUID()},
		Spec:       v1alpha1.PortSpec{Network: n.Name, NetworkUID: string(n.UID), Addresses: []string{address}, Node: node},
	}
	if node != "" {
		x.Spec.Pod = &v1alpha1.PodRef{Namespace: "web", Name: "p", UID: string(uuid.NewUUID()), Interface: "eth0"}
	}
	return x
}

func (w *world) plug(p *Provider, n *v1alpha1.Network, x *v1alpha1.Port) provider.PortState {
	w.t.Helper()
	st, err := p.EnsurePort(w.t.Context(), n, x)
	if err != nil {
		w.t.Fatal(err)
	}
	x.Status.ProviderPortID, x.Status.MAC, x.Status.VIFType = st.ID, st.MAC, st.VIFType
	return st
}

func (w *world) get(kind, id string) map[string]any {
	w.t.Helper()
	x, err := get[map[string]any](w.t.Context(), w.admin, kind, id)
	if err != nil || x == nil {
		w.t.Fatalf("%s %s: %v", kind, id, err)
	}
	return *x
}

func TestFake(t *testing.T) {
	t.Run("tags afterwards", func(t *testing.T) { suite(t, func(t *testing.T) *world { return fake(t) }) })
	t.Run("tags at once", func(t *testing.T) {
		suite(t, func(t *testing.T) *world {
			w := fake(t)
			w.fake.TagsAtOnce(true)
			w.fake.PageSize(2)
			return w
		})
	})
}

func TestLive(t *testing.T) { suite(t, func(t *testing.T) *world { return live(t) }) }

func suite(t *testing.T, make func(*testing.T) *world) {
	for _, profile := range []string{openstack.Full, openstack.Least} {
		t.Run(profile, func(t *testing.T) {
			t.Run("provider", func(t *testing.T) {
				w := make(t)
				providertest.Run(t, providertest.Harness{
					New:      func() controller.Provider { return w.provider(profile) },
					Networks: func(context.Context) (int, error) { return len(w.ours(networks)), nil },
				})
				for _, kind := range []string{routers, groups, ports} {
					if left := w.ours(kind); len(left) > 0 {
						t.Errorf("%s left: %v", kind, left)
					}
				}
			})
			t.Run("drift", func(t *testing.T) { testDrift(t, make(t), profile) })
			t.Run("ports", func(t *testing.T) { testPorts(t, make(t), profile) })
			t.Run("addresses", func(t *testing.T) { testAddresses(t, make(t), profile) })
			t.Run("leftovers", func(t *testing.T) { testLeftovers(t, make(t), profile) })
			t.Run("tenants", func(t *testing.T) { testTenants(t, make(t), profile) })
		})
	}
}

func testDrift(t *testing.T, w *world, profile string) {
	n := w.network("blue", "net", "192.168.0.0/24", "fd00:7::/64")
	p := w.provider(profile)
	first := w.ensure(p, n)
	if first.Repaired != "" {
		t.Errorf("repaired %q of what is new", first.Repaired)
	}
	sub := func(i int) string { return n.Status.Subnets[i].ProviderSubnetID }
	if r := w.get(routers, first.RouterID); r["external_gateway_info"] == nil {
		t.Errorf("no gateway: %v", r)
	}
	if g := w.get(subnets, sub(0)); g["gateway_ip"] != "192.168.0.1" || g["enable_dhcp"] != false || g["project_id"] != w.projects["blue"] {
		t.Errorf("%v", g)
	}
	rulesOf := func() []rule {
		g, err := get[group](t.Context(), w.admin, groups, n.Status.ProviderGroupID)
		if err != nil {
			t.Fatal(err)
		}
		return g.Rules
	}
	attachment := func(subnet string) string {
		in, err := interfaces(t.Context(), w.admin, n.Status.ProviderRouterID)
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range in {
			if x.Fixed[0].Subnet == subnet {
				return x.ID
			}
		}
		t.Fatalf("no interface in %s: %v", subnet, in)
		return ""
	}
	leave := func(i int) {
		w.do(http.MethodPut, routers+"/"+n.Status.ProviderRouterID+"/remove_router_interface", map[string]any{"port_id": attachment(sub(i))})
	}
	for _, x := range []struct {
		name string
		do   func()
		want string
	}{
		{"network down", func() { w.edit(networks, n.Status.ProviderNetworkID, map[string]any{"admin_state_up": false}) }, "network was down"},
		{"port security", func() {
			w.edit(networks, n.Status.ProviderNetworkID, map[string]any{"port_security_enabled": false})
		}, "no port security"},
		{"tags", func() {
			w.do(http.MethodPut, networks+"/"+n.Status.ProviderNetworkID+"/tags", map[string]any{"tags": []string{"mine"}})
		}, "network had other tags"},
		{"router tags", func() {
			w.do(http.MethodPut, routers+"/"+n.Status.ProviderRouterID+"/tags", map[string]any{"tags": []string{}})
		}, "router had other tags"},
		{"gateway", func() {
			w.edit(routers, n.Status.ProviderRouterID, map[string]any{"external_gateway_info": map[string]any{}})
		}, "router had no external gateway"},
		{"router down", func() { w.edit(routers, n.Status.ProviderRouterID, map[string]any{"admin_state_up": false}) }, "router was down"},
		{"interface", func() { leave(0) }, "router was not in subnet 192.168.0.0/24"},
		{"dhcp", func() { w.edit(subnets, sub(0), map[string]any{"enable_dhcp": true}) }, "subnet 192.168.0.0/24 had DHCP"},
		{"subnet", func() { leave(1); w.del(subnets, sub(1)) }, "subnet fd00:7::/64 was deleted"},
		{"router", func() {
			leave(0)
			leave(1)
			w.del(routers, n.Status.ProviderRouterID)
		}, "router " + first.RouterID + " was deleted"},
		{"rule", func() {
			for _, r := range rulesOf() {
				if r.Direction == "ingress" && r.Family == "IPv4" {
					w.del(rules, r.ID)
				}
			}
		}, "lacked the rule for ingress IPv4"},
		{"group", func() { w.del(groups, n.Status.ProviderGroupID) }, "security_group " + first.GroupID + " was deleted"},
		{"network", func() {
			leave(0)
			leave(1)
			w.del(networks, n.Status.ProviderNetworkID)
		}, "network " + first.NetworkID + " was deleted"},
	} {
		t.Run(x.name, func(t *testing.T) {
			x.do()
			if st := w.ensure(p, n); !strings.Contains(st.Repaired, x.want) {
				t.Errorf("repaired %q, want %q", st.Repaired, x.want)
			}
			if st := w.ensure(w.provider(profile), n); st.Repaired != "" {
				t.Errorf("repaired again: %q", st.Repaired)
			}
		})
	}
	if got := len(rulesOf()); got != 4 {
		t.Errorf("%d rules", got)
	}
	// Isolated on demand: no router leads out.
	n.Spec.Egress = v1alpha1.EgressNone
	w.ensure(p, n)
	if r := w.get(routers, n.Status.ProviderRouterID); r["external_gateway_info"] != nil {
		t.Errorf("a gateway: %v", r)
	}
	// Others in the network keep it.
	foreign := w.do(http.MethodPost, ports, map[string]any{"port": map[string]any{
		"network_id": n.Status.ProviderNetworkID, "project_id": w.projects["blue"], "device_owner": "compute:other", "device_id": "vm", "admin_state_up": true,
		"fixed_ips": []any{map[string]any{"ip_address": "192.168.0.77"}},
	}})["port"].(map[string]any)["id"].(string)
	w.plug(p, n, w.port(n, "192.168.0.9", w.host)) // left by a Port that was lost
	if err := p.Release(t.Context(), n); provider.Reason(err, "") != "NetworkInUse" || !strings.Contains(err.Error(), foreign) {
		t.Errorf("%v", err)
	}
	w.del(ports, foreign)
	if err := p.Release(t.Context(), n); err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{networks, routers, groups, ports} {
		if left := w.ours(kind); len(left) > 0 {
			t.Errorf("%s left: %v", kind, left)
		}
	}
}

func testPorts(t *testing.T, w *world, profile string) {
	n := w.network("blue", "net", "192.168.0.0/24", "fd00:7::/64")
	p := w.provider(profile)
	w.ensure(p, n)
	x := w.port(n, "192.168.0.5", w.host)
	x.Spec.Addresses = append(x.Spec.Addresses, "fd00:7::5")
	st := w.plug(p, n, x)
	if st.ID == "" || st.MAC == "" || st.VIFType != "bridge" || st.Repaired != "" {
		t.Errorf("%+v", st)
	}
	h := w.get(ports, st.ID)
	for k, want := range map[string]any{
		"binding:host_id": w.host, "device_id": x.Spec.Pod.UID, "device_owner": "hypernetes:pod", "project_id": w.projects["blue"], "network_id": n.Status.ProviderNetworkID,
	} {
		if h[k] != want {
			t.Errorf("%s: %v, want %v", k, h[k], want)
		}
	}
	if tags := fmt.Sprint(h["tags"]); !strings.Contains(tags, "h8s-cluster="+w.cluster) || !strings.Contains(tags, "h8s-uid="+string(x.UID)) || !strings.Contains(tags, "h8s-pod="+x.Spec.Pod.UID) {
		t.Errorf("tags %v", tags)
	}
	// A controller that died before it wrote the ID down finds it.
	again := x.DeepCopy()
	again.Status = v1alpha1.PortStatus{}
	if got := w.plug(w.provider(profile), n, again); got.ID != st.ID || got.MAC != st.MAC || len(w.ours(ports)) != 1 {
		t.Errorf("%+v, want %+v", got, st)
	}
	// Somebody else has the address.
	taken := w.port(n, "192.168.0.5", w.host)
	if _, err := p.EnsurePort(t.Context(), n, taken); provider.Reason(err, "") != v1alpha1.ReasonAddressInUse || !errdefs.IsAlreadyExists(err) {
		t.Errorf("%v", err)
	}
	router := w.port(n, "192.168.0.1", w.host)
	if _, err := p.EnsurePort(t.Context(), n, router); provider.Reason(err, "") != v1alpha1.ReasonAddressInUse {
		t.Errorf("%v", err)
	}
	outside := w.port(n, "10.9.9.9", w.host)
	if _, err := p.EnsurePort(t.Context(), n, outside); !errdefs.IsInvalidArgument(err) {
		t.Errorf("%v", err)
	}
	mac := w.port(n, "192.168.0.6", w.host)
	mac.Spec.MAC = "02:11:22:33:44:55"
	if got := w.plug(p, n, mac); got.MAC != mac.Spec.MAC {
		t.Errorf("%+v", got)
	}
	same := w.port(n, "192.168.0.7", w.host)
	same.Spec.MAC = mac.Spec.MAC
	if _, err := p.EnsurePort(t.Context(), n, same); provider.Reason(err, "") != "MACInUse" {
		t.Errorf("%v", err)
	}
	lost := w.port(n, "192.168.0.8", "no-such-host")
	if _, err := p.EnsurePort(t.Context(), n, lost); provider.Reason(err, "") != v1alpha1.ReasonBindingFailed || !strings.Contains(err.Error(), "no-such-host") {
		t.Errorf("%v", err)
	} else {
		t.Log(err)
	}
	// The agent comes, as it were: the same port is bound after all.
	lost.Spec.Node = w.host
	if got := w.plug(p, n, lost); got.VIFType != "bridge" {
		t.Errorf("%+v", got)
	}
	quiet := func() {
		t.Helper()
		if names, err := w.provider(profile).Drifted(t.Context(), n, []v1alpha1.Port{*x}); err != nil || len(names) > 0 {
			if h := w.get(ports, x.Status.ProviderPortID); h["status"] != "ACTIVE" { // nobody wires it here, or has yet
				t.Errorf("drifted: %v %v %v", names, err, h)
			}
		}
	}
	quiet()
	foreign := w.do(http.MethodPost, groups, map[string]any{"security_group": map[string]any{"name": "x", "project_id": w.projects["blue"], "description": w.cluster}})["security_group"].(map[string]any)["id"].(string)
	for _, c := range []struct {
		name   string
		fields map[string]any
		want   string
	}{
		{"pairs", map[string]any{"allowed_address_pairs": []any{map[string]any{"ip_address": "0.0.0.0/0"}}}, "allowed_address_pairs"},
		{"groups", map[string]any{"security_groups": []string{foreign}}, "other security groups"},
		{"addresses", map[string]any{"fixed_ips": []any{map[string]any{"ip_address": "192.168.0.99"}}}, "other addresses"},
		{"host", map[string]any{"binding:host_id": "elsewhere"}, "bound to host elsewhere"},
		{"security", map[string]any{"security_groups": []string{}, "port_security_enabled": false}, "no port security"},
		{"down", map[string]any{"admin_state_up": false}, "port was down"},
		{"owner", map[string]any{"device_owner": "compute:x"}, "another device_owner"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w.edit(ports, x.Status.ProviderPortID, c.fields)
			if names, err := p.Drifted(t.Context(), n, []v1alpha1.Port{*x}); err != nil || len(names) != 1 {
				t.Errorf("%v %v", names, err)
			}
			if got := w.plug(p, n, x); !strings.Contains(got.Repaired, c.want) || got.ID != st.ID || got.MAC != st.MAC {
				t.Errorf("%+v, want %q", got, c.want)
			}
			if got := w.plug(p, n, x); got.Repaired != "" {
				t.Errorf("again: %+v", got)
			}
			quiet()
		})
	}
	t.Run("deleted", func(t *testing.T) {
		w.del(ports, st.ID)
		if names, err := p.Drifted(t.Context(), n, []v1alpha1.Port{*x}); err != nil || len(names) != 1 {
			t.Errorf("%v %v", names, err)
		}
		got := w.plug(p, n, x)
		if got.ID == st.ID || got.MAC != st.MAC || !strings.Contains(got.Repaired, "port "+st.ID+" was deleted") {
			t.Errorf("%+v, had %+v", got, st)
		}
		if h := w.get(ports, got.ID); len(h["fixed_ips"].([]any)) != 2 {
			t.Errorf("%v", h)
		}
	})
	t.Run("other MAC", func(t *testing.T) {
		x.Spec.MAC = "02:aa:aa:aa:aa:01"
		if got := w.plug(p, n, x); got.MAC != x.Spec.MAC {
			t.Errorf("%+v", got)
		}
	})
	t.Run("claimed", func(t *testing.T) {
		c := w.port(n, "192.168.0.20", "")
		if got := w.plug(p, n, c); got.VIFType != "" || got.Wired || w.get(ports, got.ID)["binding:host_id"] != "" {
			t.Errorf("%+v", got)
		}
		c.Spec.Node, c.Spec.Pod = w.host, x.Spec.Pod
		if got := w.plug(p, n, c); got.VIFType != "bridge" || got.Repaired != "" {
			t.Errorf("%+v", got)
		}
		c.Spec.Node, c.Spec.Pod = "", nil
		if got := w.plug(p, n, c); got.VIFType != "" || got.Repaired != "" || w.get(ports, got.ID)["device_id"] != "" {
			t.Errorf("%+v", got)
		}
		if err := p.ReleasePort(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	})
	for range 2 {
		for _, o := range []*v1alpha1.Port{x, mac, lost} {
			if err := w.provider(profile).ReleasePort(t.Context(), o); err != nil {
				t.Fatal(err)
			}
		}
	}
	// One whose ID was never written down.
	unwritten := w.port(n, "192.168.0.30", w.host)
	if _, err := p.EnsurePort(t.Context(), n, unwritten); err != nil {
		t.Fatal(err)
	}
	if err := p.ReleasePort(t.Context(), unwritten); err != nil {
		t.Fatal(err)
	}
	if left := w.ours(ports); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	w.del(groups, foreign)
	if err := p.Release(t.Context(), n); err != nil {
		t.Fatal(err)
	}
}

func testAddresses(t *testing.T, w *world, profile string) {
	n := w.network("blue", "net", "192.168.0.0/24")
	p := w.provider(profile)
	w.ensure(p, n)
	x := w.port(n, "192.168.0.5", w.host)
	w.plug(p, n, x)
	f := &v1alpha1.FloatingIP{ObjectMeta: metav1.ObjectMeta{Namespace: "tenant-blue", Name: "f", UID: uuid.NewUUID()}}
	ensure := func(target *v1alpha1.Port) provider.AddressState {
		t.Helper()
		st, err := w.provider(profile).EnsureAddress(t.Context(), f, target)
		if err != nil {
			t.Fatal(err)
		}
		f.Status.Provider, f.Status.ProviderID, f.Status.Address, f.Status.Target = provider.Neutron, st.ID, st.Address, ""
		if target != nil {
			f.Status.Target = target.Spec.Addresses[0]
		}
		return st
	}
	at := func() any { return w.get(floatingIPs, f.Status.ProviderID)["port_id"] }
	first := ensure(nil)
	if first.Address == "" || first.Pool != "openstack/public" || first.Repaired != "" || at() != nil {
		t.Errorf("%+v", first)
	}
	written := f.Status
	f.Status = v1alpha1.FloatingIPStatus{}
	if again := ensure(nil); again.ID != first.ID {
		t.Errorf("another one: %+v", again)
	}
	f.Status = written
	if st := ensure(x); st.Repaired != "" || at() != x.Status.ProviderPortID {
		t.Errorf("%+v %v", st, at())
	}
	w.edit(floatingIPs, f.Status.ProviderID, map[string]any{"port_id": nil})
	if st := ensure(x); !strings.Contains(st.Repaired, "led elsewhere") || at() != x.Status.ProviderPortID {
		t.Errorf("%+v %v", st, at())
	}
	w.del(floatingIPs, f.Status.ProviderID)
	if st := ensure(x); !strings.Contains(st.Repaired, "was deleted") || st.Address != first.Address || at() != x.Status.ProviderPortID {
		t.Errorf("%+v, had %+v", st, first)
	}
	second := &v1alpha1.FloatingIP{ObjectMeta: metav1.ObjectMeta{Namespace: "tenant-blue", Name: "g", UID: uuid.NewUUID()}}
	for name, c := range map[string]struct {
		address, pool, reason string
		target                *v1alpha1.Port
	}{
		"taken":   {first.Address, "", "AddressInUse", nil},
		"outside": {"203.0.113.9", "", "AddressNotInPool", nil},
		"pool":    {"", "elsewhere", "NoPool", nil},
	} {
		second.Spec = v1alpha1.FloatingIPSpec{Address: c.address, Pool: c.pool}
		if _, err := p.EnsureAddress(t.Context(), second, c.target); provider.Reason(err, "") != c.reason {
			t.Errorf("%s: %v", name, err)
		}
	}
	second.Spec = v1alpha1.FloatingIPSpec{}
	st, err := p.EnsureAddress(t.Context(), second, x)
	if provider.Reason(err, "") != "TargetTaken" {
		t.Errorf("%+v %v", st, err)
	}
	inward := w.network("blue", "inward", "192.168.1.0/24")
	inward.Spec.Egress = v1alpha1.EgressNone
	w.ensure(p, inward)
	y := w.port(inward, "192.168.1.5", w.host)
	w.plug(p, inward, y)
	if _, err := p.EnsureAddress(t.Context(), second, y); provider.Reason(err, "") != "NoRouter" {
		t.Errorf("%v", err)
	}
	for _, o := range []*v1alpha1.FloatingIP{f, second, f} {
		if err := w.provider(profile).ReleaseAddress(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
	if left := w.ours(floatingIPs); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	for _, n := range []*v1alpha1.Network{n, inward} {
		if err := p.Release(t.Context(), n); err != nil {
			t.Fatal(err)
		}
	}
}

// testTenants is about whose things are whose.
func testTenants(t *testing.T, w *world, profile string) {
	p := w.provider(profile)
	if _, err := p.Ensure(t.Context(), w.network("green", "net", "192.168.0.0/24"), nil); provider.Reason(err, "") != noProject || !errdefs.IsInvalidArgument(err) {
		t.Errorf("%v", err)
	}
	if err := p.Release(t.Context(), w.network("green", "net", "192.168.0.0/24")); err != nil {
		t.Error(err)
	}
	blue, red := w.network("blue", "net", "192.168.0.0/24"), w.network("red", "net", "192.168.0.0/24")
	// Who copies a mark into another project gains nothing, and loses nothing.
	forged := w.do(http.MethodPost, networks, map[string]any{"network": map[string]any{"name": "x", "project_id": w.projects["red"], "description": p.mark(blue.UID)}})["network"].(map[string]any)["id"].(string)
	w.ensure(p, blue)
	w.ensure(p, red)
	if blue.Status.ProviderNetworkID == forged || w.get(networks, blue.Status.ProviderNetworkID)["project_id"] != w.projects["blue"] {
		t.Errorf("%+v", blue.Status)
	}
	// Nor does who has a port with the mark, in the same network, that is no Pod's.
	x := w.port(blue, "192.168.0.5", w.host)
	trap := w.do(http.MethodPost, ports, map[string]any{"port": map[string]any{
		"network_id": blue.Status.ProviderNetworkID, "project_id": w.projects["blue"], "description": p.mark(x.UID), "device_owner": "compute:x",
		"fixed_ips": []any{map[string]any{"ip_address": "192.168.0.5"}},
	}})["port"].(map[string]any)["id"].(string)
	if _, err := p.EnsurePort(t.Context(), blue, x); provider.Reason(err, "") != v1alpha1.ReasonAddressInUse {
		t.Errorf("%v", err)
	}
	if err := p.ReleasePort(t.Context(), x); err != nil {
		t.Error(err)
	}
	w.get(ports, trap) // left alone
	w.del(ports, trap)
	// Ranges overlap completely.
	w.plug(p, blue, x)
	y := w.port(red, "192.168.0.5", w.host)
	w.plug(p, red, y)

	adopt := func(tenant, id string) *v1alpha1.Network {
		n := w.network(tenant, "adopted")
		n.Spec = v1alpha1.NetworkSpec{ProviderNetworkID: id, Provider: provider.Neutron}
		return n
	}
	for _, id := range []string{blue.Status.ProviderNetworkID, neutrontest.External, string(uuid.NewUUID())} {
		if _, err := p.Ensure(t.Context(), adopt("red", id), nil); provider.Reason(err, "") != wrongProject || !errdefs.IsInvalidArgument(err) {
			t.Errorf("adopt %s: %v", id, err)
		}
	}
	theirs := w.do(http.MethodPost, networks, map[string]any{"network": map[string]any{"name": "theirs", "project_id": w.projects["red"], "description": w.cluster}})["network"].(map[string]any)["id"].(string)
	mine := adopt("red", theirs)
	if _, err := p.Ensure(t.Context(), mine, nil); provider.Reason(err, "") != refused {
		t.Errorf("without a subnet: %v", err)
	}
	bad := w.do(http.MethodPost, subnets, map[string]any{"subnet": map[string]any{"network_id": theirs, "project_id": w.projects["red"], "cidr": "169.254.0.0/16", "ip_version": 4, "gateway_ip": "169.254.0.1"}})["subnet"].(map[string]any)["id"].(string)
	if _, err := p.Ensure(t.Context(), mine, nil); provider.Reason(err, "") != refused || !strings.Contains(err.Error(), "169.254.0.0/16") {
		t.Errorf("a range that is not to be had: %v", err)
	}
	w.del(subnets, bad)
	w.do(http.MethodPost, subnets, map[string]any{"subnet": map[string]any{"network_id": theirs, "project_id": w.projects["red"], "cidr": "10.1.0.0/24", "ip_version": 4, "gateway_ip": "10.1.0.254"}})
	w.ensure(p, mine)
	if len(mine.Status.Subnets) != 1 || mine.Status.Subnets[0].Gateway != "10.1.0.254" || mine.Status.ProviderRouterID != "" || mine.Status.Subnets[0].ProviderSubnetID == "" {
		t.Errorf("%+v", mine.Status)
	}
	z := w.port(mine, "10.1.0.5", w.host)
	w.plug(p, mine, z)
	if err := p.Release(t.Context(), mine); err != nil {
		t.Fatal(err)
	}
	w.get(networks, theirs)
	if _, err := get[object](t.Context(), w.admin, ports, z.Status.ProviderPortID); err != nil {
		t.Error(err)
	}
	// A tenant that is given another project does not take its Networks along.
	was := w.projects["blue"]
	w.projects["blue"] = w.projects["red"]
	if profile == openstack.Full { // the other account does not even see it
		if _, err := p.Ensure(t.Context(), blue, subnet.Normalise(blue.Spec, blue.Status.Subnets)); provider.Reason(err, "") != wrongProject {
			t.Errorf("%v", err)
		}
		if _, err := p.EnsurePort(t.Context(), blue, x); provider.Reason(err, "") != wrongProject {
			t.Errorf("%v", err)
		}
	}
	w.projects["blue"] = was
	for _, n := range []*v1alpha1.Network{blue, red} {
		if err := p.Release(t.Context(), n); err != nil {
			t.Fatal(err)
		}
	}
	w.del(networks, theirs)
	w.get(networks, forged)
	w.del(networks, forged)
}

func BenchmarkFake(b *testing.B) { benchmark(b, fake(b)) }

func BenchmarkLive(b *testing.B) { benchmark(b, live(b)) }

// benchmark makes and removes ports, eight at a time as the controller does.
func benchmark(b *testing.B, w *world) {
	p := w.provider(openstack.Full)
	n := w.network("blue", "net", "10.0.0.0/16")
	w.ensure(p, n)
	run := func(what string, f func(x *v1alpha1.Port) error) func(all []*v1alpha1.Port) {
		return func(all []*v1alpha1.Port) {
			begun, slots := time.Now(), make(chan struct{}, 8)
			var wg sync.WaitGroup
			for _, x := range all {
				slots <- struct{}{}
				wg.Go(func() {
					defer func() { <-slots }()
					if err := f(x); err != nil {
						b.Error(err)
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64(len(all))/time.Since(begun).Seconds(), what+"/s")
		}
	}
	var all []*v1alpha1.Port
	for i := range b.N {
		all = append(all, w.port(n, fmt.Sprintf("10.0.%d.%d", 1+i/250, 2+i%250), w.host))
	}
	b.ResetTimer()
	run("made", func(x *v1alpha1.Port) error {
		st, err := p.EnsurePort(b.Context(), n, x)
		x.Status.ProviderPortID = st.ID
		return err
	})(all)
	run("removed", func(x *v1alpha1.Port) error { return p.ReleasePort(b.Context(), x) })(all)
	b.StopTimer()
	if err := p.Release(b.Context(), n); err != nil {
		b.Fatal(err)
	}
}
