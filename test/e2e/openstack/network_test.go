package openstack

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/hypernetes/hypernetes/test/e2e/testcloud"
	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
	"github.com/hypernetes/hypernetes/test/openstack/openstacktest"
)

// TestSeeds: the manifests of the first Hypernetes make a network, a subnet and a router in
// the tenant's project, as its user sees with OpenStack's own client, and Pods make ports
// there. Deleting them leaves nothing.
func TestSeeds(t *testing.T) {
	c := testcloud.Up(t, 2)
	seeds(t, c, c.Project(t))
}

func seeds(t *testing.T, c *testcloud.Cloud, p *testcloud.Project) {
	t.Helper()
	user := c.CloudsYAML(t, map[string]map[string]string{"user": p.User("member").Auth()})
	tn := c.TenantOf(t, p)
	space := tn.Name + "-ns1"
	dir := t.TempDir()
	for _, file := range []string{"namespace.yaml", "network.yaml", "nginx.yaml"} {
		text, err := os.ReadFile(filepath.Join("..", "..", "..", "examples", "tenant-network", file))
		if err != nil {
			t.Fatal(err)
		}
		changed := strings.NewReplacer("ns1", space, "065f210a2ca9442aad898ab129426350", p.ID).Replace(string(text))
		if err := os.WriteFile(filepath.Join(dir, file), []byte(changed), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Log(c.H8S(t, "apply", "-f", dir))
	tn.Kubectl(t, "-n", tn.Home(), "wait", "network/net1", "--for=jsonpath={.status.phase}=Active", "--timeout=240s")
	id, router := home(t, tn, "network/net1", ".status.providerNetworkID"), home(t, tn, "network/net1", ".status.providerRouterID")

	var seen struct {
		Networks, Subnets, Routers []struct{ ID, Name, Subnet string }
	}
	for what, into := range map[string]any{"network": &seen.Networks, "subnet": &seen.Subnets, "router": &seen.Routers} {
		text := bare(t, c, user, what, "list", "-f", "json")
		t.Logf("openstack %s list: %s", what, text)
		if err := json.Unmarshal([]byte(text), into); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
	}
	if !slices.ContainsFunc(seen.Networks, func(o struct{ ID, Name, Subnet string }) bool { return o.ID == id }) ||
		!slices.ContainsFunc(seen.Routers, func(o struct{ ID, Name, Subnet string }) bool { return o.ID == router }) ||
		!slices.ContainsFunc(seen.Subnets, func(o struct{ ID, Name, Subnet string }) bool { return o.Subnet == "192.168.0.0/24" }) {
		t.Errorf("network %s and router %s are not among %+v", id, router, seen)
	}

	tn.Kubectl(t, "-n", space, "rollout", "status", "deployment/nginx", "--timeout="+testcluster.Patience.String())
	n := &testcluster.Namespace{Cluster: c.Cluster, Name: space}
	n = n.For(t)
	names := strings.Fields(n.Kubectl("get", "pods", "-o", "jsonpath={.items[*].metadata.name}"))
	for _, name := range names {
		o := portOf(t, p, n, name, n.Get("pod/"+name, ".spec.nodeName"))
		k8s := home(t, tn, "port/net1."+strings.ReplaceAll(n.Get("pod/"+name, ".status.podIP"), ".", "-"), ".status.mac")
		mac := n.Exec(name, "cat", "/sys/class/net/eth0/address")
		t.Logf("%s: port %s %v %s %s on %s; Port.status.mac %s; eth0 %s", name, o.Text("id"), o.Addresses(), o.Text("mac_address"), o.Text("status"), o.Text("binding:host_id"), k8s, mac)
		if want := o.Text("mac_address"); want != k8s || want != mac {
			t.Errorf("%s: Neutron's MAC is %s, the Port says %s, the Pod has %s", name, want, k8s, mac)
		}
		if o.Text("network_id") != id {
			t.Errorf("%s is in network %s", name, o.Text("network_id"))
		}
	}
	if page := n.Exec(names[0], "wget", "-qO-", "http://nginx:8078/"); !strings.Contains(page, "Welcome to nginx!") {
		t.Errorf("page: %s", page)
	}
	shown := bare(t, c, user, "port", "list", "--network", id, "--device-owner", "hypernetes:pod", "-f", "json")
	t.Logf("openstack port list: %s", shown)
	if strings.Count(shown, `"ACTIVE"`) != len(names) {
		t.Errorf("%d Pods, but: %s", len(names), shown)
	}

	n.Kubectl("delete", "deployment/nginx")
	n.Kubectl("wait", "--for=delete", "pod", "-l", "app=nginx", "--timeout="+testcluster.Patience.String())
	testcloud.Until(t, "the Pods' ports are gone", func() error {
		if left, err := ports(p); err != nil || len(left) > 0 {
			return fmt.Errorf("%v %v", left, err)
		}
		return nil
	})
	tn.Kubectl(t, "-n", tn.Home(), "delete", "tenantnamespace", space, "--timeout=240s")
	tn.Kubectl(t, "-n", tn.Home(), "delete", "network", "net1", "--timeout=240s")
	for _, kind := range []string{"networks", "routers"} {
		for _, o := range p.List(kind) {
			if o.Text("id") == id || o.Text("id") == router {
				t.Errorf("%s %s is left", kind, o.Text("id"))
			}
		}
	}
}

// TestRepair: what others change or delete at Neutron is as it was soon after, Pods go on
// talking, and an event says it.
func TestRepair(t *testing.T) {
	c := testcloud.Up(t, 2)
	p := c.Project(t)
	tn := c.TenantOf(t, p, append([]string{"--cidr", "192.168.7.0/24"}, light...)...)
	n := tn.Namespace("web", "default")
	tn.Apply(join(pod(n, "a", c.Nodes[0], false), pod(n, "b", c.Nodes[1], false)))
	n.Ready("a", "b")
	reaches(t, n, "a", url(n, "b", "/hostname"), "b")
	b := portOf(t, p, n, "b", c.Nodes[1])

	if err := p.Delete("ports", b.Text("id")); err != nil {
		t.Fatal(err)
	}
	testcloud.Until(t, "a port anew", func() error {
		all, err := ports(p)
		if err != nil {
			return err
		}
		o := all[b.Addresses()[0]]
		if o == nil || o.Text("id") == b.Text("id") || o.Text("status") != "ACTIVE" || o.Text("mac_address") != b.Text("mac_address") {
			return fmt.Errorf("%v", o)
		}
		return nil
	})
	reaches(t, n, "a", url(n, "b", "/hostname"), "b")

	id, router := home(t, tn, "network/default", ".status.providerNetworkID"), home(t, tn, "network/default", ".status.providerRouterID")
	subnet := home(t, tn, "network/default", ".status.subnets[0].providerSubnetID")
	beyond := "http://" + openstacktest.Outside + ":8080/hostname"
	if _, err := get(n, "a", beyond); err != nil {
		t.Errorf("egress: %v", err)
	}
	if err := p.Detach(router, subnet); err != nil {
		t.Fatal(err)
	}
	if err := p.Delete("routers", router); err != nil {
		t.Fatal(err)
	}
	testcloud.Until(t, "a router anew", func() error {
		all, err := p.Try("routers")
		if err != nil || len(all) != 1 || all[0].Text("id") == router {
			return fmt.Errorf("%v %v", all, err)
		}
		_, err = get(n, "a", beyond)
		return err
	})
	// Down, without security, with a hole.
	if err := p.Update("networks", id, map[string]any{"admin_state_up": false}); err != nil {
		t.Fatal(err)
	}
	a := portOf(t, p, n, "a", c.Nodes[0])
	if err := p.Update("ports", a.Text("id"), map[string]any{"allowed_address_pairs": []any{map[string]any{"ip_address": "0.0.0.0/0"}}}); err != nil {
		t.Fatal(err)
	}
	testcloud.Until(t, "network and port are as they were", func() error {
		nets, err := p.Try("networks")
		if err != nil || len(nets) != 1 || nets[0]["admin_state_up"] != true {
			return fmt.Errorf("%v %v", nets, err)
		}
		all, err := ports(p)
		if err != nil {
			return err
		}
		if pairs, _ := all[a.Addresses()[0]]["allowed_address_pairs"].([]any); len(pairs) > 0 {
			return fmt.Errorf("pairs: %v", pairs)
		}
		return nil
	})
	reaches(t, n, "b", url(n, "a", "/hostname"), "a")
	events := tn.Kubectl(t, "-n", tn.Home(), "get", "events", "-o", `jsonpath={range .items[*]}{.reason} {.involvedObject.kind} {.message}{"\n"}{end}`)
	for _, kind := range []string{"Network", "Port"} {
		if !strings.Contains(events, "Repaired "+kind) {
			t.Errorf("no event of a repaired %s:\n%s", kind, events)
		}
	}
}

// TestFloatingIP: a floating address of Neutron's leads to a Pod from outside, and the Pod
// leaves under it; deleting it frees it.
func TestFloatingIP(t *testing.T) {
	c := testcloud.Up(t, 2)
	p := c.Project(t)
	tn := c.TenantOf(t, p, light...)
	n := tn.Namespace("web", "default")
	tn.Apply(join(pod(n, "vm", c.Nodes[0], true), pod(n, "far", c.Nodes[1], false)))
	n.Ready("vm", "far")
	for _, name := range []string{"vm", "far"} {
		tn.Apply(fmt.Sprintf("apiVersion: hypernetes.io/v1alpha1\nkind: FloatingIP\nmetadata: {name: %s, namespace: %s}\nspec: {pod: {namespace: %s, name: %[1]s}}\n", name, tn.Home(), n.Name))
	}
	for _, name := range []string{"vm", "far"} {
		tn.Kubectl(t, "-n", tn.Home(), "wait", "floatingip/"+name, "--for=jsonpath={.status.phase}=Active", "--timeout=240s")
		ip := home(t, tn, "floatingip/"+name, ".status.address")
		testcloud.Until(t, ip+" answers from outside", func() error {
			if got, ok := c.Outside.Get("http://" + ip + ":8080/hostname"); !ok || got != name {
				return fmt.Errorf("%q %v", got, ok)
			}
			return nil
		})
		if got, err := get(n, name, "http://"+openstacktest.Outside+":8080/clientip"); err != nil || got != ip {
			t.Errorf("%s leaves as %q, %v; want %s", name, got, err, ip)
		}
		if all := p.List("floatingips", "floating_ip_address", ip); len(all) != 1 || all[0].Text("fixed_ip_address") != n.Get("pod/"+name, ".status.podIP") {
			t.Errorf("at Neutron: %v", all)
		}
	}
	tn.Kubectl(t, "-n", tn.Home(), "delete", "floatingips", "--all", "--timeout=240s")
	if left := p.List("floatingips"); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// TestApart: two projects that are the same in everything do not meet, on either node.
func TestApart(t *testing.T) {
	c := testcloud.Up(t, 2)
	type side struct {
		*testcluster.Tenant
		n *testcluster.Namespace
		p *testcloud.Project
	}
	var sides []side
	for range 2 {
		p := c.Project(t)
		tn := c.TenantOf(t, p, append([]string{"--cidr", "192.168.0.0/24"}, light...)...)
		s := side{tn, tn.Namespace("web", "default"), p}
		var docs []string
		for i, node := range c.Nodes {
			for j, name := range []string{"near", "vm"} {
				docs = append(docs, strings.Replace(pod(s.n, fmt.Sprintf("%s%d-%s", name, i, tn.Name), node, name == "vm" && i == 0),
					"labels:", fmt.Sprintf("annotations: {hypernetes.io/address: 192.168.0.%d}, labels:", 10+10*i+j), 1))
			}
		}
		tn.Apply(join(docs...))
		sides = append(sides, s)
	}
	pods := map[string]string{"near0": "192.168.0.10", "vm0": "192.168.0.11", "near1": "192.168.0.20", "vm1": "192.168.0.21"}
	for i, s := range sides {
		for name, ip := range pods {
			s.n.Ready(name + "-" + s.Name)
			if got := s.n.Get("pod/"+name+"-"+s.Name, ".status.podIP"); got != ip {
				t.Errorf("tenant %d: %s has %s", i, name, got)
			}
		}
	}
	for i, s := range sides {
		other := sides[1-i]
		for from := range pods {
			for to, ip := range pods {
				reaches(t, s.n, from+"-"+s.Name, "http://"+ip+":8080/hostname", to+"-"+s.Name)
			}
		}
		// What the other has and this one has not.
		extra := "192.168.0.99"
		other.Apply(strings.Replace(pod(other.n, "extra", c.Nodes[i], false), "labels:", "annotations: {hypernetes.io/address: "+extra+"}, labels:", 1))
		other.n.Ready("extra")
		reaches(t, other.n, "near0-"+other.Name, "http://"+extra+":8080/hostname", "extra")
		for from := range pods {
			if out, code := s.n.ExecCode(from+"-"+s.Name, "/testbox", "get", "-timeout", "3s", "http://"+extra+":8080/hostname"); code == 0 {
				t.Errorf("tenant %d: %s reaches the other's Pod: %s", i, from, out)
			}
		}
		other.n.Kubectl("delete", "pod", "extra", "--wait")
		for name, ip := range pods {
			o := portOf(t, s.p, s.n, name+"-"+s.Name, s.n.Get("pod/"+name+"-"+s.Name, ".spec.nodeName"))
			if o.Addresses()[0] != ip {
				t.Errorf("%v", o)
			}
		}
	}
}

// TestReserved: no tenant's Network may have OpenStack's own addresses.
func TestReserved(t *testing.T) {
	c := testcloud.Up(t, 2)
	tn := c.Tenant(t, light...)
	file := filepath.Join(t.TempDir(), "network.yaml")
	if err := os.WriteFile(file, []byte(fmt.Sprintf("apiVersion: hypernetes.io/v1alpha1\nkind: Network\nmetadata: {name: mine, namespace: %s}\nspec: {subnets: {a: {cidr: 10.250.0.0/24}}}\n", tn.Home())), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := tn.As(tn.Kubeconfig("ann", "manager"), "apply", "-f", file)
	if err == nil || !strings.Contains(out, "10.250.0.0/24") {
		t.Errorf("%v: %s", err, out)
	}
}
