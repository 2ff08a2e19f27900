package service_test

import (
	"context"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/network/edge"
	"github.com/hypernetes/hypernetes/network/edge/edgetest"
	"github.com/hypernetes/hypernetes/network/service"
)

// TestInEdges has two Networks with the same addresses on two nodes, and in each Services
// with the same addresses: the edges' filters let through what is translated, and each
// Network finds its own.
func TestInEdges(t *testing.T) {
	rig := edgetest.New(t, 2)
	vip := netip.MustParseAddr("100.64.0.91")
	one, two := rig.Nodes[0], rig.Nodes[1]
	for i, name := range []string{"red", "blue"} {
		n := rig.Network(name, uint32(4097+i))
		a := n.Pod(one, name+"a", "192.168.0.5", "fd00:1::5")
		b := n.Pod(two, name+"b", "192.168.0.6", "fd00:1::6")
		for _, p := range []*edgetest.Pod{a, b} {
			for _, addr := range p.Addresses {
				edgetest.Echo(t, p.NS, p.Name, netip.AddrPortFrom(addr, 80).String())
			}
		}
		if name == "red" {
			n.External[one] = []edge.External{{Address: vip, Announce: true}}
			n.Ensure()
		}
		tables := map[*edgetest.Node]*service.Table{}
		sync := func(pods ...*edgetest.Pod) {
			t.Helper()
			for _, node := range rig.Nodes {
				if tables[node] == nil {
					v4, v6 := edge.Overlay(node.Address)
					table, err := service.Open(n.Edges[node].NS(), service.Options{Gateways: n.Spec.Gateways, Overlay: []netip.Addr{v4, v6}, Inside: n.Spec.Subnets})
					if err != nil {
						t.Fatal(err)
					}
					t.Cleanup(func() { _ = table.Close() })
					tables[node] = table
				}
				var eps []service.Endpoint
				for _, p := range pods {
					for _, addr := range p.Addresses {
						eps = append(eps, service.Endpoint{Address: netip.AddrPortFrom(addr, 80), Local: p.Node == node})
					}
				}
				svc := service.Service{Key: "ns/web", ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.3.3"), netip.MustParseAddr("fd00:10:96::33")}, External: []netip.Addr{vip}}
				for _, proto := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
					svc.Ports = append(svc.Ports, service.Port{Protocol: proto, Port: 80, Internal: eps, External: eps})
				}
				if _, err := tables[node].Sync(context.Background(), []service.Service{svc}); err != nil {
					t.Fatal(err)
				}
			}
		}
		overlay, _ := edge.Overlay(one.Address)
		for _, network := range []string{"tcp", "udp"} {
			sync(b)
			edgetest.Expect(t, a.NS, network, "10.96.3.3:80", name+"b 192.168.0.5")
			edgetest.Expect(t, a.NS, network, "[fd00:10:96::33]:80", name+"b fd00:1::5")
			edgetest.Expect(t, b.NS, network, "10.96.3.3:80", name+"b 192.168.0.1")
			edgetest.Expect(t, b.NS, network, "[fd00:10:96::33]:80", name+"b fd00:1::1")
			edgetest.Expect(t, a.NS, network, "100.64.0.91:80", name+"b 192.168.0.5")
			if name == "red" {
				edgetest.Expect(t, rig.Outside, network, "100.64.0.91:80", "redb "+overlay.String())
			}
			sync(a)
			edgetest.Expect(t, a.NS, network, "10.96.3.3:80", name+"a 192.168.0.1")
			edgetest.Expect(t, b.NS, network, "10.96.3.3:80", name+"a 192.168.0.6")
			if name == "red" {
				edgetest.Expect(t, rig.Outside, network, "100.64.0.91:80", "reda 100.64.0.200")
			}
		}
	}
}
