package edge_test

import (
	"net"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/network/edge"
	"github.com/hypernetes/hypernetes/network/edge/edgetest"
	"github.com/hypernetes/hypernetes/network/service"
)

func endpoint(a string, local bool) service.Endpoint {
	return service.Endpoint{Address: netip.MustParseAddrPort(a), Local: local}
}

func port(proto uint8, number uint16, to ...service.Endpoint) service.Port {
	return service.Port{Protocol: proto, Port: number, Internal: to, External: to}
}

// Clients from outside come to Services by fronts: a router leads a floating IP to their
// addresses, and Pods on the front's node and elsewhere answer.
func TestFronts(t *testing.T) {
	t.Parallel()
	rig := edgetest.New(t, 2)
	one, two := rig.Nodes[0], rig.Nodes[1]
	n := rig.Carried("red", 1)
	near := n.Pod(one, "near", "192.168.0.5", "fd00:1::5")
	far := n.Pod(two, "far", "192.168.0.6", "fd00:1::6")
	edgetest.Echo(t, near.NS, "near", "[::]:80")
	edgetest.Echo(t, far.NS, "far", "[::]:80")
	edgetest.Echo(t, n.Carrier.Host, "host", "[::]:80")
	const floating, second = "100.64.0.190", "100.64.0.191"
	for address, to := range map[string]string{floating: "192.168.0.50", second: "192.168.0.51"} {
		run(t, n.Carrier.Router, "sh", "-c", "ip addr add "+address+"/32 dev eth1; nft 'add chain inet nat pre { type nat hook prerouting priority -100; }; add rule inet nat pre ip daddr "+address+" dnat ip to "+to+"'")
	}
	front := func(i byte, v4, v6 string) edge.Front {
		return edge.Front{
			Link: edge.LinkName(v4, "vip"), Uplink: "tapf" + string('0'+i), MAC: net.HardwareAddr{0xfa, 0x16, 0x3e, 0xff, 0, i},
			Addresses: []netip.Addr{netip.MustParseAddr(v4), netip.MustParseAddr(v6)},
		}
	}
	fronts := []edge.Front{front(0, "192.168.0.50", "fd00:1::50"), front(1, "192.168.0.51", "fd00:1::51")}
	tables := map[*edgetest.Node]*service.Table{}
	for _, node := range rig.Nodes {
		table, err := service.Open(n.Edges[node].NS(), service.Options{Gateways: n.Spec.Gateways, Inside: n.Spec.Subnets})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = table.Close() })
		tables[node] = table
	}
	services := func(node *edgetest.Node) []service.Service {
		nears := []service.Endpoint{endpoint("192.168.0.5:80", node == one)}
		fars := []service.Endpoint{endpoint("192.168.0.6:80", node == two)}
		vip, other := fronts[0].Addresses, fronts[1].Addresses
		six := func(s string) []service.Endpoint {
			return []service.Endpoint{endpoint(s, node == one && s == "[fd00:1::5]:80" || node == two && s == "[fd00:1::6]:80")}
		}
		return []service.Service{
			{Key: "a/s", ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.1.1")}, External: vip[:1], Ports: []service.Port{
				port(unix.IPPROTO_TCP, 80, nears...), port(unix.IPPROTO_UDP, 80, nears...), port(unix.IPPROTO_TCP, 81, fars...), port(unix.IPPROTO_UDP, 81, fars...)}},
			{Key: "a/six", ClusterIPs: []netip.Addr{netip.MustParseAddr("fd00:10:96::1")}, External: vip[1:], Ports: []service.Port{
				port(unix.IPPROTO_TCP, 80, six("[fd00:1::5]:80")...), port(unix.IPPROTO_TCP, 81, six("[fd00:1::6]:80")...)}},
			{Key: "a/t", ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.1.2")}, External: other[:1], Ports: []service.Port{port(unix.IPPROTO_TCP, 80, nears...)},
				SourceRanges: []netip.Prefix{netip.MustParsePrefix("100.64.0.200/32")}},
		}
	}
	sync := func() {
		t.Helper()
		for node, table := range tables {
			if _, err := table.Sync(t.Context(), services(node)); err != nil {
				t.Fatal(err)
			}
		}
	}
	at := func(node *edgetest.Node, all ...edge.Front) {
		t.Helper()
		s := n.SpecFor(node)
		s.Fronts = all
		if _, err := node.Manager.Ensure(t.Context(), s); err != nil {
			t.Fatal(err)
		}
		for _, f := range all {
			if err := n.Carrier.Plug(node, f.Uplink, f.MAC, f.Addresses); err != nil {
				t.Fatal(err)
			}
			if err := n.Edges[node].AnnounceFront(t.Context(), f.Link); err != nil {
				t.Fatal(err)
			}
		}
	}
	at(one, fronts...)
	sync()
	reached := func() {
		t.Helper()
		for _, proto := range []string{"tcp", "udp"} {
			// Who is on the front's node sees the client, others the front.
			edgetest.Expect(t, rig.Outside, proto, floating+":80", "near 100.64.0.200")
			edgetest.Expect(t, rig.Outside, proto, floating+":81", "far 192.168.0.50")
			edgetest.Expect(t, n.Carrier.Host, proto, "192.168.0.50:80", "near 192.168.0.200")
			edgetest.Expect(t, n.Carrier.Host, proto, "192.168.0.50:81", "far 192.168.0.50")
			// Pods do not need it.
			edgetest.Expect(t, near.NS, proto, "192.168.0.50:81", "far 192.168.0.5")
			edgetest.Expect(t, far.NS, proto, "192.168.0.50:80", "near 192.168.0.6")
		}
		edgetest.Expect(t, n.Carrier.Host, "tcp", "[fd00:1::50]:80", "near fd00:1::200")
		edgetest.Expect(t, n.Carrier.Host, "tcp", "[fd00:1::50]:81", "far fd00:1::50")
		edgetest.Expect(t, rig.Outside, "tcp", second+":80", "near 100.64.0.200")
		// What is no Service's is refused at once, in the front's name.
		edgetest.Refuse(t, rig.Outside, "tcp", floating+":82")
		edgetest.Refuse(t, n.Carrier.Host, "tcp", "192.168.0.51:80")
		// Who was there goes on.
		edgetest.Expect(t, near.NS, "tcp", "192.168.0.6:80", "far 192.168.0.5")
		edgetest.Expect(t, near.NS, "tcp", "192.168.0.200:80", "host 192.168.0.5")
		for _, node := range rig.Nodes {
			if got := n.Carrier.Refused(node); got != "0" {
				t.Errorf("%s: the agent refused %s frames of uplinks", node.Name, got)
			}
		}
	}
	reached()
	// A Pod that comes does not take it away.
	late := n.NewPod(one, "late", "192.168.0.9")
	if err := n.Edges[one].Attach(t.Context(), late.Attachment); err != nil {
		t.Fatal(err)
	}
	edgetest.Expect(t, rig.Outside, "tcp", floating+":81", "far 192.168.0.50")
	if err := n.Edges[one].Detach(t.Context(), late.Attachment.Link); err != nil {
		t.Fatal(err)
	}
	reached()
	// What others changed comes back, and what is in order is left alone: connections live on.
	conn, err := rig.Outside.DialContext(t.Context(), "tcp", floating+":80")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	e := n.Edges[one]
	run(t, e.NS(), "sh", "-c", "nft flush map inet h8s_edge marks; nft flush map inet h8s_edge fronts4; ip rule del pref 50; ip -6 rule del pref 50")
	at(one, fronts...)
	reached()
	run(t, e.NS(), "sh", "-c", "for s in flows seen4 seen6; do nft flush set inet h8s_edge $s; done")
	handles := nftHandles(t, e.NS())
	want := uplinkState(t, one, e)
	at(one, fronts...)
	if got := nftHandles(t, e.NS()); got != handles {
		t.Errorf("rules were made anew: %s", difference(handles, got))
	}
	if d := difference(want, uplinkState(t, one, e)); d != "" {
		t.Errorf("changed although nothing differed: %s", d)
	}
	if got, err := edgetest.Again(conn); err != nil || got != "near 100.64.0.200" {
		t.Errorf("a connection from before: %q, %v", got, err)
	}
	// The node is lost: another has the one front, with the same MAC address. Nobody here
	// needs a Pod for it.
	far.Delete()
	at(one, fronts[1])
	at(two, fronts[0])
	sync()
	edgetest.Expect(t, rig.Outside, "tcp", floating+":80", "near 192.168.0.50")
	edgetest.Expect(t, rig.Outside, "udp", floating+":80", "near 192.168.0.50")
	edgetest.Expect(t, rig.Outside, "tcp", second+":80", "near 100.64.0.200")
	edgetest.Refuse(t, rig.Outside, "tcp", floating+":82")
	at(one)
	at(two)
	edgetest.Refuse(t, rig.Outside, "tcp", floating+":80", second+":80")
	if out := run(t, one.NS, "ip", "-br", "link") + run(t, two.NS, "ip", "-br", "link"); strings.Contains(out, "tapf") {
		t.Errorf("left: %s", out)
	}
}
