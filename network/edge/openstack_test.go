package edge_test

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gophercloud/gophercloud/v2"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/network/edge"
	"github.com/hypernetes/hypernetes/network/edge/edgetest"
	"github.com/hypernetes/hypernetes/network/netns"
	"github.com/hypernetes/hypernetes/network/service"
	"github.com/hypernetes/hypernetes/test/openstack/openstacktest"
)

// neutronNet is a network of a project at a real Neutron.
type neutronNet struct {
	t                    *testing.T
	admin, tenant        *gophercloud.ServiceClient
	id, v4, v6, group    string
	project, externalNet string
}

// post makes something, which is deleted with the test; the answer is body's one member.
func post(t *testing.T, c *gophercloud.ServiceClient, kind string, body map[string]any) map[string]any {
	t.Helper()
	plural := kind + "s"
	if kind == "security_group" || kind == "security_group_rule" {
		plural = strings.ReplaceAll(plural, "_", "-")
	}
	var out map[string]map[string]any
	if _, err := c.Post(t.Context(), c.ServiceURL(plural), map[string]any{kind: body}, &out, &gophercloud.RequestOpts{OkCodes: []int{201}}); err != nil {
		t.Fatalf("make %s: %v", kind, err)
	}
	url := c.ServiceURL(plural, out[kind]["id"].(string))
	t.Cleanup(func() {
		if _, err := c.Delete(context.Background(), url, &gophercloud.RequestOpts{OkCodes: []int{204, 404}}); err != nil {
			t.Errorf("delete %s: %v", kind, err)
		}
	})
	return out[kind]
}

func newNeutronNet(t *testing.T, cloud *openstacktest.Cloud, project string) *neutronNet {
	t.Helper()
	n := &neutronNet{t: t, admin: cloud.Neutron(t, "admin"), tenant: cloud.Neutron(t, project)}
	c := n.tenant
	network := post(t, c, "network", map[string]any{"name": "edge-test"})
	n.id, n.project = network["id"].(string), network["project_id"].(string)
	n.v4 = post(t, c, "subnet", map[string]any{"network_id": n.id, "ip_version": 4, "cidr": "192.168.0.0/24", "enable_dhcp": false})["id"].(string)
	n.v6 = post(t, c, "subnet", map[string]any{"network_id": n.id, "ip_version": 6, "cidr": "fd00:1::/64", "gateway_ip": "fd00:1::1", "enable_dhcp": false})["id"].(string)
	var list struct {
		Networks []struct {
			ID string `json:"id"`
		} `json:"networks"`
	}
	if _, err := c.Get(t.Context(), c.ServiceURL("networks")+"?name="+openstacktest.ExternalNetwork, &list, nil); err != nil || len(list.Networks) != 1 {
		t.Fatalf("external network: %v, %v", list, err)
	}
	n.externalNet = list.Networks[0].ID
	router := post(t, c, "router", map[string]any{"name": "edge-test", "external_gateway_info": map[string]any{"network_id": n.externalNet}})["id"].(string)
	for _, s := range []string{n.v4, n.v6} {
		body := map[string]any{"subnet_id": s}
		if _, err := c.Put(t.Context(), c.ServiceURL("routers", router, "add_router_interface"), body, nil, &gophercloud.RequestOpts{OkCodes: []int{200}}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if _, err := c.Put(context.Background(), c.ServiceURL("routers", router, "remove_router_interface"), body, nil, &gophercloud.RequestOpts{OkCodes: []int{200}}); err != nil {
				t.Error(err)
			}
		})
	}
	n.group = post(t, c, "security_group", map[string]any{"name": "edge-test"})["id"].(string)
	for _, family := range []string{"IPv4", "IPv6"} {
		post(t, c, "security_group_rule", map[string]any{"security_group_id": n.group, "direction": "ingress", "ethertype": family})
	}
	return n
}

// osNode is one of Neutron's hosts with our edges on it.
type osNode struct {
	host    string
	ns      *netns.NS
	address netip.Addr
	m       *edge.Manager
}

func newOSNode(t *testing.T, cloud *openstacktest.Cloud, number int) *osNode {
	t.Helper()
	n := &osNode{}
	var path string
	n.host, path = cloud.Node(number)
	ns, err := netns.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ns.Close() })
	n.ns = ns
	if err := ns.Do(func() error {
		addrs, err := net.InterfaceAddrs()
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is4() && !p.Addr().IsLoopback() && !n.address.IsValid() {
				n.address = p.Addr()
			}
		}
		return err
	}); err != nil || !n.address.IsValid() {
		t.Fatalf("address of %s: %v, %v", n.host, n.address, err)
	}
	if n.m, err = edge.New(edge.Config{Dir: filepath.Join(t.TempDir(), "edges"), Node: n.address, VXLANPort: edgetest.Port, NS: ns}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.m.RemoveHost(); err != nil {
			t.Error(err)
		}
	})
	if err := n.m.SetHost(t.Context(), edge.Host{}); err != nil {
		t.Fatal(err)
	}
	return n
}

// osPod is a Pod with a Neutron port.
type osPod struct {
	ns   *netns.NS
	port string
}

// plug makes a port, a Pod and what connects them, and waits until Neutron says ACTIVE.
func (n *neutronNet) plug(node *osNode, name, v4, v6 string) *osPod {
	t := n.t
	t.Helper()
	port := post(t, n.admin, "port", map[string]any{
		"network_id": n.id, "project_id": n.project, "device_owner": "hypernetes:pod", "device_id": name, "name": name,
		"fixed_ips":       []any{map[string]any{"subnet_id": n.v4, "ip_address": v4}, map[string]any{"subnet_id": n.v6, "ip_address": v6}},
		"binding:host_id": node.host, "security_groups": []string{n.group},
	})
	id := port["id"].(string)
	if vif := port["binding:vif_type"]; vif != "bridge" {
		t.Fatalf("port on %s: vif_type %v", node.host, vif)
	}
	hw, err := net.ParseMAC(port["mac_address"].(string))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), name)
	ns, err := netns.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = ns.Close()
		if err := netns.Remove(path); err != nil {
			t.Error(err)
		}
	})
	s := n.spec()
	e, err := node.m.Ensure(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := node.m.Remove(context.Background(), s.ID); err != nil {
			t.Error(err)
		}
	})
	a := edge.Attachment{
		Link: edge.LinkName(id, "eth0"), NetNS: path, Interface: "eth0", MAC: hw, MTU: 1450, Addresses: []netip.Addr{addrOf(v4), addrOf(v6)},
		Gateways: s.Gateways, Default: true, Uplink: "tap" + id[:11],
	}
	if err := e.Attach(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	if err := e.Up(t.Context(), a.Link); err != nil {
		t.Fatal(err)
	}
	n.active(node, name, id)
	if err := e.Announce(t.Context(), a); err != nil {
		t.Error(err)
	}
	if err := e.Check(t.Context(), a); err != nil {
		t.Error(err)
	}
	return &osPod{ns: ns, port: id}
}

func (n *neutronNet) spec() edge.Spec {
	return edge.Spec{
		ID: edgeIDOf(n.id), Name: "test/" + n.id, Uplinks: true, MTU: 1450, Egress: true,
		Subnets:  []netip.Prefix{netip.MustParsePrefix("192.168.0.0/24"), netip.MustParsePrefix("fd00:1::/64")},
		Gateways: []netip.Addr{addrOf("192.168.0.1"), addrOf("fd00:1::1")}, Local: []netip.Addr{addrOf("10.96.0.10")},
	}
}

// active waits until Neutron says that a port is.
func (n *neutronNet) active(node *osNode, name, id string) {
	t := n.t
	t.Helper()
	start := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	for ticks := time.NewTicker(200 * time.Millisecond); ; {
		var out struct {
			Port struct {
				Status string `json:"status"`
			} `json:"port"`
		}
		if _, err := n.admin.Get(ctx, n.admin.ServiceURL("ports", id), &out, nil); err != nil {
			t.Fatal(err)
		}
		if out.Port.Status == "ACTIVE" {
			break
		}
		select {
		case <-ctx.Done():
			t.Fatalf("port %s on %s is %s", name, node.host, out.Port.Status)
		case <-ticks.C:
		}
	}
	t.Logf("%s: ACTIVE after %s", name, time.Since(start).Round(100*time.Millisecond))
}

func edgeIDOf(network string) string { return strings.ReplaceAll(network, "-", "")[:8] }

// eventually asks until that is the answer: ACTIVE says that a port is wired on its node,
// not that all others have heard.
func eventually(t *testing.T, ns *netns.NS, network, address, want string) {
	t.Helper()
	var got string
	var err error
	for range 6 {
		if got, err = edgetest.Ask(ns, network, address); err == nil && got == want {
			return
		}
	}
	t.Errorf("%s %s: answer %q, %v; want %q", network, address, got, err, want)
}

// The same with the agents of a real Neutron: they find the uplinks, wire them, and take
// what comes out of them.
func TestOpenStack(t *testing.T) {
	cloud := openstacktest.Up(t)
	one, two := newOSNode(t, cloud, 1), newOSNode(t, cloud, 2)
	outside, err := netns.Open(cloud.OutsideNetNS())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = outside.Close() }()
	random := make([]byte, 2)
	_, _ = rand.Read(random)
	port := fmt.Sprint(20000 + int(random[0])<<4)
	mark := hex.EncodeToString(random)
	edgetest.Echo(t, outside, "outside-"+mark, openstacktest.Outside+":"+port)
	for _, project := range []string{"alpha", "beta"} {
		n := newNeutronNet(t, cloud, project)
		a := n.plug(one, "a", "192.168.0.50", "fd00:1::50")
		b := n.plug(one, "b", "192.168.0.51", "fd00:1::51")
		c := n.plug(two, "c", "192.168.0.52", "fd00:1::52")
		edgetest.Echo(t, a.ns, project+"-a", "[::]:80")
		edgetest.Echo(t, b.ns, project+"-b", "[::]:80")
		edgetest.Echo(t, c.ns, project+"-c", "[::]:80")
		for _, proto := range []string{"tcp", "udp"} {
			eventually(t, a.ns, proto, "192.168.0.51:80", project+"-b 192.168.0.50")
			eventually(t, a.ns, proto, "192.168.0.52:80", project+"-c 192.168.0.50")
			eventually(t, c.ns, proto, "192.168.0.50:80", project+"-a 192.168.0.52")
			eventually(t, c.ns, proto, "[fd00:1::51]:80", project+"-b fd00:1::52")
		}
		for _, g := range []string{"192.168.0.1", "fd00:1::1"} {
			if err := edgetest.Ping(a.ns, g); err != nil {
				t.Errorf("%s: ping %s: %v", project, g, err)
			}
		}
		if got, err := edgetest.Ask(c.ns, "tcp", openstacktest.Outside+":"+port); err != nil || !strings.HasPrefix(got, "outside-"+mark+" 172.24.4.") {
			t.Errorf("%s: outside: %q, %v", project, got, err)
		}
		fip := post(t, n.tenant, "floatingip", map[string]any{"floating_network_id": n.externalNet, "port_id": c.port, "fixed_ip_address": "192.168.0.52"})
		eventually(t, outside, "tcp", fip["floating_ip_address"].(string)+":80", project+"-c "+openstacktest.Outside)
	}
}

// A front with a real Neutron's router, floating IP and agents: a Pod on its node and one
// elsewhere answer who comes from outside. Then it moves.
func TestOpenStackFront(t *testing.T) {
	cloud := openstacktest.Up(t)
	one, two := newOSNode(t, cloud, 1), newOSNode(t, cloud, 2)
	outside, err := netns.Open(cloud.OutsideNetNS())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = outside.Close() }()
	n := newNeutronNet(t, cloud, "alpha")
	a := n.plug(one, "a", "192.168.0.50", "fd00:1::50")
	c := n.plug(two, "c", "192.168.0.52", "fd00:1::52")
	edgetest.Echo(t, a.ns, "a", "[::]:80")
	edgetest.Echo(t, c.ns, "c", "[::]:80")
	vip := post(t, n.admin, "port", map[string]any{
		"network_id": n.id, "project_id": n.project, "device_owner": "hypernetes:vip", "device_id": "s", "name": "s",
		"fixed_ips": []any{map[string]any{"subnet_id": n.v4, "ip_address": "192.168.0.60"}}, "binding:host_id": one.host, "security_groups": []string{n.group},
	})
	id := vip["id"].(string)
	mac, err := net.ParseMAC(vip["mac_address"].(string))
	if err != nil {
		t.Fatal(err)
	}
	front := edge.Front{Link: edge.LinkName(id, "front"), Uplink: "tap" + id[:11], MAC: mac, Addresses: []netip.Addr{addrOf("192.168.0.60")}}
	floating := post(t, n.tenant, "floatingip", map[string]any{"floating_network_id": n.externalNet, "port_id": id, "fixed_ip_address": "192.168.0.60"})["floating_ip_address"].(string)
	at := func(node *osNode, here string) {
		t.Helper()
		s := n.spec()
		s.Fronts = []edge.Front{front}
		e, err := node.m.Ensure(t.Context(), s)
		if err != nil {
			t.Fatal(err)
		}
		table, err := service.Open(e.NS(), service.Options{Gateways: s.Gateways, Inside: s.Subnets})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = table.Close() }()
		svc := service.Service{Key: "a/s", ClusterIPs: []netip.Addr{addrOf("10.96.1.1")}, External: front.Addresses}
		for _, proto := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
			for number, to := range map[uint16]string{80: "192.168.0.50:80", 81: "192.168.0.52:80"} {
				svc.Ports = append(svc.Ports, port(proto, number, endpoint(to, to == here)))
			}
		}
		if _, err := table.Sync(t.Context(), []service.Service{svc}); err != nil {
			t.Fatal(err)
		}
		n.active(node, "front", id)
		if err := e.AnnounceFront(t.Context(), front.Link); err != nil {
			t.Error(err)
		}
	}
	at(one, "192.168.0.50:80")
	for _, proto := range []string{"tcp", "udp"} {
		eventually(t, outside, proto, floating+":80", "a "+openstacktest.Outside)
		eventually(t, outside, proto, floating+":81", "c 192.168.0.60")
		eventually(t, c.ns, proto, "192.168.0.60:80", "a 192.168.0.52")
	}
	if _, err := one.m.Ensure(t.Context(), n.spec()); err != nil {
		t.Fatal(err)
	}
	body := map[string]any{"port": map[string]any{"binding:host_id": two.host}}
	if _, err := n.admin.Put(t.Context(), n.admin.ServiceURL("ports", id), body, nil, &gophercloud.RequestOpts{OkCodes: []int{200}}); err != nil {
		t.Fatal(err)
	}
	at(two, "192.168.0.52:80")
	for _, proto := range []string{"tcp", "udp"} {
		eventually(t, outside, proto, floating+":80", "a 192.168.0.60")
		eventually(t, outside, proto, floating+":81", "c "+openstacktest.Outside)
	}
}
