package openstack

import (
	"fmt"
	"hash/fnv"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hypernetes/hypernetes/test/e2e/testcloud"
	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
	"github.com/hypernetes/hypernetes/test/openstack/faultproxy"
)

// neutronPort is in the Host of each request to Neutron.
const neutronPort = ":9696"

// spoilt are the ways in which an answer can be none. Reason is what is said of a Network
// that gets no other.
var spoilt = []struct {
	faultproxy.Rule
	reason string
}{
	{faultproxy.Rule{Name: "401", Status: 401, Body: `{"error": {"code": 401, "title": "Unauthorized", "message": "The request you have made requires authentication."}}`}, "CredentialRefused"},
	{faultproxy.Rule{Name: "409", Status: 409, Body: `{"NeutronError": {"type": "RetryRequest", "message": "conflict", "detail": ""}}`}, "ProviderError"},
	{faultproxy.Rule{Name: "429", Status: 429, Header: map[string]string{"Retry-After": "2"}}, "ProviderUnavailable"},
	{faultproxy.Rule{Name: "500", Status: 500, Body: "<html>", After: true}, "ProviderUnavailable"},
	{faultproxy.Rule{Name: "cut", Cut: true, After: true}, "ProviderUnavailable"},
}

// TestInjected spoils what the cloud answers, by a proxy the controller knows nothing of:
// what is wrong is said, all ends as it should, and nothing is left at Neutron.
func TestInjected(t *testing.T) {
	c := testcloud.Up(t, 2)
	p := c.Project(t)
	tn := c.TenantOf(t, p, append([]string{"--cidr", "192.168.9.0/24", "--quota", "networks=16"}, light...)...)
	becomes(t, tn, "network/default", "Active")
	before := inventory(t, p)
	proxy := c.Proxy(t)

	t.Run("said", func(t *testing.T) {
		var names []string
		for i, x := range spoilt {
			name := "said-" + x.Name
			names = append(names, name)
			all := x.Rule
			all.Host = neutronPort
			proxy.Set(all)
			tn.Apply(networkNamed(tn, name, fmt.Sprintf("10.5.%d.0/24", i)))
			testcloud.Until(t, x.Name+" is said", func() error {
				says := home(t, tn, "network/"+name, `range .status.conditions[*]}{.type}={.status} {.reason}: {.message}{"\n"}{end`)
				events := tn.Kubectl(t, "-n", tn.Home(), "get", "events", "--field-selector", "involvedObject.name="+name, "-o", `jsonpath={range .items[*]}{.reason} {.message}{"\n"}{end}`)
				if !strings.Contains(says, " "+x.reason+": ") || !strings.Contains(events, x.reason+" ") {
					return fmt.Errorf("conditions:\n%sevents:\n%s", says, events)
				}
				t.Logf("%s: %s", x.Name, strings.SplitN(events, "\n", 2)[0])
				return nil
			})
		}
		proxy.Set()
		for _, name := range names {
			becomes(t, tn, "network/"+name, "Active")
		}
		goes(t, tn, append([]string{"network"}, names...)...)
		same(t, p, before)
	})

	// Every kind of request that changes something is spoilt once while all is made and once
	// while all goes, each in one of the ways, and in another one in the next round.
	for round := range 2 {
		t.Run(fmt.Sprintf("each step, round %d", round+1), func(t *testing.T) {
			arm := func() {
				var rules []faultproxy.Rule
				for i, x := range spoilt {
					r := x.Rule
					r.Each, r.Times = true, 1
					r.Pick = func(kind string) bool {
						h := fnv.New32a()
						_, _ = h.Write([]byte(kind))
						return !strings.HasPrefix(kind, "GET ") && (int(h.Sum32()%uint32(len(spoilt)))+round)%len(spoilt) == i
					}
					rules = append(rules, r)
				}
				proxy.Set(rules...)
			}
			told := func(what string) {
				n := 0
				for _, v := range proxy.Counts() {
					n += v
				}
				t.Logf("%s: spoilt %v", what, proxy.Counts())
				if n < 5 {
					t.Errorf("%s: only %d requests were spoilt of %v", what, n, proxy.Kinds())
				}
			}
			l := life{c, p, tn, fmt.Sprint("r", round), fmt.Sprintf("10.6.%d.0/24", round)}
			arm()
			l.begin(t, before)
			told("made")
			arm()
			l.end(t)
			told("removed")
			proxy.Set()
			same(t, p, before)
		})
	}

	t.Run("no answer", func(t *testing.T) {
		// Longer than the controller waits: it asks again while the first request is still being
		// carried out, for all it knows.
		proxy.Set(
			faultproxy.Rule{Name: "port", Host: neutronPort, Method: "POST", Path: "/ports", Times: 1, After: true, Delay: 2 * time.Minute},
			faultproxy.Rule{Name: "floating IP", Host: neutronPort, Method: "POST", Path: "/floatingips", Times: 1, After: true, Delay: 2 * time.Minute},
		)
		l := life{c, p, tn, "late", "10.7.0.0/24"}
		l.begin(t, before)
		if got := proxy.Counts(); got["port"] != 1 || got["floating IP"] != 1 {
			t.Errorf("spoilt: %v", got)
		}
		l.end(t)
		same(t, p, before)
	})
}

func networkNamed(tn *testcluster.Tenant, name, cidr string) string {
	return fmt.Sprintf("apiVersion: hypernetes.io/v1alpha1\nkind: Network\nmetadata: {name: %s, namespace: %s}\nspec: {subnets: {s: {cidr: %s}}}\n", name, tn.Home(), cidr)
}

// life is that of a Network, a Pod in it, and a FloatingIP of that.
type life struct {
	c          *testcloud.Cloud
	p          *testcloud.Project
	tn         *testcluster.Tenant
	name, cidr string
}

func (l life) space() string { return l.tn.Name + "-" + l.name }

// begin makes all, and looks whether each has just one at Neutron, more than before.
func (l life) begin(t *testing.T, before map[string]int) {
	t.Helper()
	n := &testcluster.Namespace{Cluster: l.c.Cluster, Name: l.space()}
	n = n.For(t)
	l.tn.Apply(join(networkNamed(l.tn, l.name, l.cidr),
		fmt.Sprintf("apiVersion: hypernetes.io/v1alpha1\nkind: TenantNamespace\nmetadata: {name: %s, namespace: %s}\nspec: {network: %s}\n", l.space(), l.tn.Home(), l.name)))
	becomes(t, l.tn, "network/"+l.name, "Active")
	becomes(t, l.tn, "tenantnamespace/"+l.space(), "Bound")
	testcloud.Until(t, "service account", func() error {
		_, err := n.Try("get", "serviceaccount", "default")
		return err
	})
	l.tn.Apply(join(pod(n, "a", l.c.Nodes[0], false),
		fmt.Sprintf("apiVersion: hypernetes.io/v1alpha1\nkind: FloatingIP\nmetadata: {name: %s, namespace: %s}\nspec: {pod: {namespace: %s, name: a}}\n", l.name, l.tn.Home(), n.Name)))
	testcloud.Until(t, "the Pod is ready", func() error {
		out, err := n.Try("get", "pod", "a", "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].status}`)
		if err != nil || out != "True" {
			return fmt.Errorf("%q %v: %s", out, err, n.Kubectl("get", "events", "--field-selector", "involvedObject.name=a", "-o", `jsonpath={range .items[*]}{.reason} {.message}{"\n"}{end}`))
		}
		return nil
	})
	becomes(t, l.tn, "floatingip/"+l.name, "Active")
	portOf(t, l.p, n, "a", l.c.Nodes[0])
	ip := home(t, l.tn, "floatingip/"+l.name, ".status.address")
	testcloud.Until(t, ip+" answers from outside", func() error {
		if got, ok := l.c.Outside.Get("http://" + ip + ":8080/hostname"); !ok || got != "a" {
			return fmt.Errorf("%q %v", got, ok)
		}
		return nil
	})
	now := inventory(t, l.p)
	// The router's port, the Pod's and the one in the external network of no project.
	for kind, more := range map[string]int{"networks": 1, "subnets": 1, "routers": 1, "security-groups": 1, "floatingips": 1, "ports": 2} {
		if now[kind] != before[kind]+more {
			t.Errorf("%d %s, were %d: want %d more", now[kind], kind, before[kind], more)
		}
	}
}

// end deletes all.
func (l life) end(t *testing.T) {
	t.Helper()
	n := &testcluster.Namespace{Cluster: l.c.Cluster, Name: l.space()}
	n = n.For(t)
	goes(t, l.tn, "floatingip", l.name)
	n.Kubectl("delete", "pod", "a", "--wait=false")
	goes(t, l.tn, "tenantnamespace", l.space())
	goes(t, l.tn, "network", l.name)
}

// becomes waits for the phase of an object in a tenant's home.
func becomes(t *testing.T, tn *testcluster.Tenant, object, phase string) {
	t.Helper()
	testcloud.Until(t, object+" is "+phase, func() error {
		out := home(t, tn, object, ".status")
		if home(t, tn, object, ".status.phase") != phase {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
}

// goes deletes objects of a kind in a tenant's home and waits until they are gone.
func goes(t *testing.T, tn *testcluster.Tenant, objects ...string) {
	t.Helper()
	tn.Kubectl(t, append([]string{"-n", tn.Home(), "delete", "--wait=false"}, objects...)...)
	testcloud.Until(t, strings.Join(objects, " ")+" are gone", func() error {
		out := tn.Kubectl(t, append([]string{"-n", tn.Home(), "get", "--ignore-not-found", "-o", "yaml"}, objects...)...)
		if strings.TrimSpace(out) != "" && !strings.Contains(out, "items: []") {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
}

// inventory counts what a project has.
func inventory(t *testing.T, p *testcloud.Project) map[string]int {
	t.Helper()
	out := map[string]int{}
	for _, kind := range testcloud.Kinds {
		out[kind] = len(slices.DeleteFunc(p.List(kind), func(o testcloud.Object) bool {
			return kind == "ports" && o.Text("device_owner") == "network:dhcp" || kind == "security-groups" && o.Text("name") == "default"
		}))
	}
	return out
}

// same waits until a project has just what it had.
func same(t *testing.T, p *testcloud.Project, before map[string]int) {
	t.Helper()
	testcloud.Until(t, "nothing is left at Neutron", func() error {
		now := inventory(t, p)
		for kind, n := range now {
			if n != before[kind] {
				return fmt.Errorf("%d %s, were %d", n, kind, before[kind])
			}
		}
		return nil
	})
}
