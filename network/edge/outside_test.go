package edge_test

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/network/edge"
	"github.com/hypernetes/hypernetes/network/edge/edgetest"
)

func addrOf(s string) netip.Addr { return netip.MustParseAddr(s) }

// A floating IP stands for one Pod, both ways, and moves to another node.
func TestFloatingIP(t *testing.T) {
	t.Parallel()
	rig := edgetest.New(t, 2)
	edgetest.Echo(t, rig.Outside, "outside", "[::]:80")
	n := rig.Network("red", 4097)
	p := n.Pod(rig.Nodes[0], "p", "192.168.0.5", "fd00:1::5")
	q := n.Pod(rig.Nodes[1], "q", "192.168.0.6", "fd00:1::6")
	blue := rig.Network("blue", 4098)
	x := blue.Pod(rig.Nodes[0], "x", "192.168.0.9")
	for _, pod := range []*edgetest.Pod{p, q} {
		edgetest.Echo(t, pod.NS, pod.Name, "[::]:80")
	}
	place := func(at *edgetest.Node, v4, v6 string) {
		for _, node := range rig.Nodes {
			n.External[node] = []edge.External{
				{Address: addrOf("100.64.0.90"), Announce: node == at, Target: addrOf(v4)},
				{Address: addrOf("fd00:64::90"), Announce: node == at, Target: addrOf(v6)},
			}
		}
		n.Ensure()
	}
	place(rig.Nodes[0], "192.168.0.5", "fd00:1::5")
	edgetest.Expect(t, rig.Outside, "tcp", "100.64.0.90:80", "p 100.64.0.200")
	edgetest.Expect(t, rig.Outside, "udp", "100.64.0.90:80", "p 100.64.0.200")
	edgetest.Expect(t, rig.Outside, "tcp", "[fd00:64::90]:80", "p fd00:64::200")
	edgetest.Expect(t, p.NS, "tcp", "100.64.0.200:80", "outside 100.64.0.90")
	edgetest.Expect(t, p.NS, "tcp", "[fd00:64::200]:80", "outside fd00:64::90")
	edgetest.Expect(t, q.NS, "tcp", "100.64.0.200:80", "outside 100.64.0.2")
	// From another tenant on the same node, and from the nodes.
	here, _ := blue.Edges[rig.Nodes[0]].Transit()
	edgetest.Expect(t, x.NS, "tcp", "100.64.0.90:80", "p "+here.String())
	_, at := n.Edges[rig.Nodes[0]].Transit()
	edgetest.Expect(t, rig.Nodes[0].NS, "tcp", "100.64.0.90:80", "p "+at.String())
	edgetest.Expect(t, rig.Nodes[1].NS, "tcp", "100.64.0.90:80", "p "+at.String())

	place(rig.Nodes[1], "192.168.0.6", "fd00:1::6")
	edgetest.Expect(t, rig.Outside, "tcp", "100.64.0.90:80", "q 100.64.0.200")
	edgetest.Expect(t, rig.Outside, "tcp", "[fd00:64::90]:80", "q fd00:64::200")
	edgetest.Expect(t, p.NS, "tcp", "100.64.0.200:80", "outside 100.64.0.1")
	if out := run(t, rig.Nodes[0].NS, "ip", "neigh", "show", "proxy"); strings.Contains(out, "100.64.0.90") {
		t.Errorf("the first node still answers for the address: %s", out)
	}
	// A connection from before goes on nowhere: the address's next owner does not see it.
	for _, address := range []string{"100.64.0.90:80", "[fd00:64::90]:80"} {
		c, err := rig.Outside.DialContext(t.Context(), "tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if got, err := edgetest.Again(c); err != nil || !strings.HasPrefix(got, "q ") {
			t.Errorf("%s: %q, %v", address, got, err)
		}
		place(rig.Nodes[0], "192.168.0.5", "fd00:1::5")
		if got, err := edgetest.Again(c); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("%s: the old connection at its new owner: %q, %v", address, got, err)
		}
		place(rig.Nodes[1], "192.168.0.6", "fd00:1::6")
	}
	n.External = nil
	n.Ensure()
	edgetest.Refuse(t, rig.Outside, "tcp", "100.64.0.90:80", "[fd00:64::90]:80")
}

// An external address that package service translates, and an exported ClusterIP.
func TestExternalAndExported(t *testing.T) {
	t.Parallel()
	rig := edgetest.New(t, 2)
	one := rig.Nodes[0]
	n := rig.Network("red", 4097)
	local := n.Pod(one, "p", "192.168.0.5")
	remote := n.Pod(rig.Nodes[1], "q", "192.168.0.6")
	edgetest.Echo(t, local.NS, "p", "[::]:80")
	edgetest.Echo(t, remote.NS, "q", "[::]:80")
	n.External[one] = []edge.External{{Address: addrOf("100.64.0.91"), Announce: true}}
	n.Spec.Exported = []netip.Addr{addrOf("10.96.7.7"), addrOf("10.96.7.8")}
	n.Ensure()
	// Without an endpoint nothing goes round in circles or gets anywhere.
	edgetest.Refuse(t, rig.Outside, "tcp", "100.64.0.91:80")
	ns := n.Edges[one].NS()
	translate(t, ns, "100.64.0.91", 80, netip.MustParseAddrPort("192.168.0.5:80"))
	translate(t, ns, "100.64.0.91", 81, netip.MustParseAddrPort("192.168.0.6:80"))
	translate(t, ns, "10.96.7.7", 80, netip.MustParseAddrPort("192.168.0.5:80"))
	translate(t, ns, "10.96.7.8", 80, netip.MustParseAddrPort("192.168.0.6:80"))
	edgetest.Expect(t, rig.Outside, "tcp", "100.64.0.91:80", "p 100.64.0.200")
	edgetest.Expect(t, rig.Outside, "tcp", "100.64.0.91:81", "q 100.64.0.1") // by the overlay
	_, at := n.Edges[one].Transit()
	edgetest.KubeProxy(t, one)
	edgetest.Expect(t, one.NS, "tcp", "10.96.7.7:80", "p "+at.String())
	edgetest.Expect(t, one.NS, "tcp", "10.96.7.8:80", "q 100.64.0.1")
	edgetest.Refuse(t, one.NS, "tcp", "10.96.7.9:80")
	// A ClusterIP is for the node itself, not for whoever sends it there.
	run(t, rig.Outside, "ip", "route", "add", "10.96.7.7", "via", "100.64.0.1")
	run(t, rig.Outside, "ip", "route", "add", "192.168.0.0/24", "via", "100.64.0.1")
	edgetest.Refuse(t, rig.Outside, "tcp", "10.96.7.7:80", "192.168.0.5:80")
	// The node has no route to Pods unless the Network is routed.
	edgetest.Refuse(t, one.NS, "tcp", "192.168.0.5:80")
	n.Spec.Routed = true
	n.Ensure()
	edgetest.Expect(t, one.NS, "tcp", "192.168.0.5:80", "p "+at.String())
	edgetest.Expect(t, one.NS, "tcp", "192.168.0.6:80", "q 100.64.0.1")
	edgetest.Refuse(t, rig.Outside, "tcp", "192.168.0.5:80")
}

// A new owner of an address tells the fabric.
func TestAnnouncement(t *testing.T) {
	t.Parallel()
	rig := edgetest.New(t, 1)
	n := rig.Network("red", 4097)
	stop := edgetest.Capture(t, rig.Outside, "eth0")
	n.Spec.External = []edge.External{{Address: addrOf("100.64.0.91"), Announce: true}, {Address: addrOf("fd00:64::91"), Announce: true}}
	n.Ensure()
	n.Ensure() // says it once
	var arps, nas int
	for _, f := range stop() {
		if len(f) >= 42 && f[12] == 8 && f[13] == 6 && bytes.Equal(f[28:32], addrOf("100.64.0.91").AsSlice()) && bytes.Equal(f[38:42], f[28:32]) {
			arps++
		}
		if len(f) >= 78 && f[12] == 0x86 && f[54] == 136 && bytes.Equal(f[62:78], addrOf("fd00:64::91").AsSlice()) {
			nas++
			src, dst := netip.AddrFrom16([16]byte(f[22:38])), netip.AddrFrom16([16]byte(f[38:54]))
			if sum6(src, dst, 58, f[54:]) != 0 {
				t.Error("wrong checksum of the neighbour advertisement")
			}
		}
	}
	if arps != 1 || nas != 1 {
		t.Errorf("%d gratuitous ARPs and %d unsolicited advertisements, want one of each", arps, nas)
	}
	// Drift: somebody removed the proxy entry and the route.
	run(t, rig.Nodes[0].NS, "ip", "neigh", "del", "proxy", "100.64.0.91", "dev", "eth0")
	run(t, rig.Nodes[0].NS, "ip", "route", "del", "100.64.0.91")
	n.Ensure()
	if out := run(t, rig.Nodes[0].NS, "ip", "neigh", "show", "proxy"); !strings.Contains(out, "100.64.0.91") {
		t.Errorf("proxy entry not repaired: %s", out)
	}
	if err := rig.Nodes[0].Manager.Remove(context.Background(), n.Spec.ID); err != nil {
		t.Fatal(err)
	}
	if out := run(t, rig.Nodes[0].NS, "sh", "-c", "ip neigh show proxy; ip route; ip -6 neigh show proxy; nft list table inet h8s_host"); strings.Contains(out, "64.0.91") || strings.Contains(out, "64::91") || strings.Contains(out, "elements = { \"h-") {
		t.Errorf("left after Remove: %s", out)
	}
}

// An address of the node's own Services is where the node that announces it is.
func TestAnnounced(t *testing.T) {
	t.Parallel()
	rig := edgetest.New(t, 2)
	for i, name := range []string{"one", "two"} {
		edgetest.Echo(t, rig.Nodes[i].NS, name, "[::]:80")
	}
	at := func(i int, all ...string) {
		t.Helper()
		h := rig.Nodes[i].Host
		for _, a := range all {
			h.Announced = append(h.Announced, addrOf(a))
		}
		for range 2 {
			if err := rig.Nodes[i].Manager.SetHost(t.Context(), h); err != nil {
				t.Fatal(err)
			}
		}
	}
	at(0, "100.64.0.91", "fd00:64::91")
	edgetest.Expect(t, rig.Outside, "tcp", "100.64.0.91:80", "one 100.64.0.200")
	edgetest.Expect(t, rig.Outside, "tcp", "[fd00:64::91]:80", "one fd00:64::200")
	at(0, "100.64.0.92")
	at(1, "100.64.0.91", "fd00:64::91")
	edgetest.Expect(t, rig.Outside, "tcp", "100.64.0.91:80", "two 100.64.0.200")
	edgetest.Expect(t, rig.Outside, "tcp", "[fd00:64::91]:80", "two fd00:64::200")
	edgetest.Expect(t, rig.Outside, "tcp", "100.64.0.92:80", "one 100.64.0.200")
	at(0)
	at(1)
	edgetest.Refuse(t, rig.Outside, "tcp", "100.64.0.91:80", "100.64.0.92:80", "[fd00:64::91]:80")
	for _, n := range rig.Nodes {
		if out := run(t, n.NS, "ip", "-o", "link") + run(t, n.NS, "ip", "neigh", "show", "proxy"); strings.Contains(out, "h8s-own") || strings.Contains(out, "100.64.0.9") {
			t.Errorf("left: %s", out)
		}
	}
	if err := rig.Nodes[0].Manager.SetHost(t.Context(), edge.Host{Announced: []netip.Addr{{}}}); err == nil {
		t.Error("an address that is none is announced")
	}
}
