package edge_test

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"

	"github.com/hypernetes/hypernetes/network/edge/edgetest"
)

// What a guest's root may send that is not its own: none of it arrives anywhere, and the
// edge believes none of it.
func TestSpoof(t *testing.T) {
	t.Parallel()
	rig := edgetest.New(t, 2)
	one := rig.Nodes[0]
	n := rig.Network("red", 4097)
	a := n.Pod(one, "a", "192.168.0.5", "fd00:1::5")
	b := n.Pod(one, "b", "192.168.0.6", "fd00:1::6")
	c := n.Pod(rig.Nodes[1], "c", "192.168.0.7", "fd00:1::7")
	edgetest.Echo(t, b.NS, "b", "[::]:80")
	edgetest.Echo(t, c.NS, "c", "[::]:80")
	own, gw := []byte(a.Attachment.MAC), mac("0a:68:38:73:00:01")
	bmac := []byte(b.Attachment.MAC)
	mark := []byte("forged-by-a")
	a4, b4, c4, x4 := addrOf("192.168.0.5"), addrOf("192.168.0.6"), addrOf("192.168.0.7"), addrOf("100.64.0.200")
	a6, b6, c6, x6 := addrOf("fd00:1::5"), addrOf("fd00:1::6"), addrOf("fd00:1::7"), addrOf("fd00:64::200")
	g4, g6 := addrOf("192.168.0.1"), addrOf("fd00:1::1")
	at := func(x netip.Addr) netip.AddrPort { return netip.AddrPortFrom(x, 9999) }
	allNodes := addrOf("ff02::1")
	lla := addrOf("fe80::858:c0ff:fea8:5")
	naFor := func(x netip.Addr) []byte {
		return append(append([]byte{136, 0, 0, 0, 0xe0, 0, 0, 0}, x.AsSlice()...), append([]byte{2, 1}, own...)...)
	}
	nsFor := func(x netip.Addr) []byte {
		return append(append([]byte{135, 0, 0, 0, 0, 0, 0, 0}, x.AsSlice()...), append([]byte{1, 1}, own...)...)
	}
	ra := append([]byte{134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0}, append([]byte{1, 1}, own...)...)
	long := bytes.Repeat([]byte{'f'}, 1000)
	whole := udpHeader(9999, 9999, append(append([]byte(nil), mark...), long...))
	type frame struct {
		name string
		b    []byte
	}
	var frames []frame
	add := func(name string, b []byte) { frames = append(frames, frame{name, b}) }
	v4 := func(p []byte) []byte { return eth(gw, own, 0x0800, p) }
	v6 := func(p []byte) []byte { return eth(gw, own, 0x86dd, p) }
	for _, dst := range []netip.Addr{b4, c4, x4} {
		add("IPv4 of a neighbour to "+dst.String(), v4(udp(at(addrOf("192.168.0.77")), at(dst), mark)))
		add("IPv4 of another Pod to "+dst.String(), v4(udp(at(c4), at(dst), mark)))
		add("IPv4 of the gateway to "+dst.String(), v4(udp(at(g4), at(dst), mark)))
		add("IPv4 of the node to "+dst.String(), v4(udp(at(addrOf("100.64.0.1")), at(dst), mark)))
		add("IPv4 nobody to "+dst.String(), v4(udp(at(netip.IPv4Unspecified()), at(dst), mark)))
		add("IPv4 loopback to "+dst.String(), v4(udp(at(addrOf("127.0.0.1")), at(dst), mark)))
		add("foreign MAC to "+dst.String(), eth(gw, mac("0a:58:01:02:03:04"), 0x0800, udp(at(a4), at(dst), mark)))
		add("VLAN 5 to "+dst.String(), vlan(5, v4(udp(at(a4), at(dst), mark))))
		add("VLAN 0, another's address, to "+dst.String(), vlan(0, v4(udp(at(c4), at(dst), mark))))
		add("VLAN in VLAN to "+dst.String(), vlan(5, vlan(6, v4(udp(at(a4), at(dst), mark)))))
		add("first fragment to "+dst.String(), v4(ip4(addrOf("192.168.0.77"), dst, 17, 0x2000, whole[:512])))
		add("last fragment to "+dst.String(), v4(ip4(addrOf("192.168.0.77"), dst, 17, 64, whole[512:])))
	}
	for _, dst := range []netip.Addr{b6, c6, x6} {
		add("IPv6 of a neighbour to "+dst.String(), v6(udp(at(addrOf("fd00:1::77")), at(dst), mark)))
		add("IPv6 of another Pod to "+dst.String(), v6(udp(at(c6), at(dst), mark)))
		add("IPv6 of the gateway to "+dst.String(), v6(udp(at(g6), at(dst), mark)))
		add("link-local to "+dst.String(), v6(udp(at(lla), at(dst), mark)))
		add("foreign MAC, IPv6, to "+dst.String(), eth(gw, mac("0a:58:01:02:03:04"), 0x86dd, udp(at(a6), at(dst), mark)))
		h := udpHeader(9999, 9999, mark)
		add("IPv6 fragment to "+dst.String(), v6(ip6(addrOf("fd00:1::77"), dst, 44, 64, append([]byte{17, 0, 0, 0, 1, 2, 3, 4}, h...))))
	}
	add("straight to a neighbour's MAC", eth(bmac, own, 0x0800, udp(at(a4), at(b4), mark)))
	add("broadcast", eth(mac("ff:ff:ff:ff:ff:ff"), own, 0x0800, udp(at(a4), at(addrOf("255.255.255.255")), mark)))
	add("multicast", eth(mac("01:00:5e:00:00:fb"), own, 0x0800, udp(at(a4), at(addrOf("224.0.0.251")), mark)))
	add("DHCP discover", eth(mac("ff:ff:ff:ff:ff:ff"), own, 0x0800, udp(netip.AddrPortFrom(netip.IPv4Unspecified(), 68), netip.MustParseAddrPort("255.255.255.255:67"), mark)))
	add("DHCP offer", v4(udp(netip.AddrPortFrom(a4, 67), netip.AddrPortFrom(b4, 68), mark)))
	add("DHCPv6 advertise", v6(udp(netip.AddrPortFrom(a6, 547), netip.AddrPortFrom(b6, 546), mark)))
	add("router advertisement", eth(mac("33:33:00:00:00:01"), own, 0x86dd, icmp6(lla, allNodes, append(ra, mark...))))
	add("router advertisement to a Pod", v6(icmp6(a6, b6, append(ra, mark...))))
	add("IPv6 redirect", v6(icmp6(a6, b6, append(append(append([]byte{137, 0, 0, 0, 0, 0, 0, 0}, a6.AsSlice()...), c6.AsSlice()...), mark...))))
	add("ICMP redirect", v4(ip4(a4, b4, 1, 0, append(append([]byte{5, 1, 0, 0}, a4.AsSlice()...), mark...))))
	add("neighbour advertisement for another", eth(mac("33:33:00:00:00:01"), own, 0x86dd, icmp6(b6, allNodes, naFor(b6))))
	add("neighbour advertisement for the gateway", v6(icmp6(a6, b6, append(naFor(g6), mark...))))
	add("neighbour solicitation as another", v6(icmp6(addrOf("fd00:1::88"), g6, nsFor(g6))))
	add("ARP as another", eth(mac("ff:ff:ff:ff:ff:ff"), own, 0x0806, arp(1, own, addrOf("192.168.0.88"), g4)))
	add("gratuitous ARP for a neighbour", eth(mac("ff:ff:ff:ff:ff:ff"), own, 0x0806, arp(2, own, b4, b4)))
	add("ARP reply for the gateway", eth(gw, own, 0x0806, arp(2, own, g4, a4)))
	add("ARP for a neighbour's address", eth(mac("ff:ff:ff:ff:ff:ff"), own, 0x0806, arp(1, own, a4, b4)))

	before := run(t, n.Edges[one].NS(), "sh", "-c", "ip neigh show nud permanent; ip -6 neigh show nud permanent")
	stops := map[string]func() [][]byte{
		"b":           edgetest.Capture(t, b.NS, "eth0"),
		"c":           edgetest.Capture(t, c.NS, "eth0"),
		"outside":     edgetest.Capture(t, rig.Outside, "eth0"),
		"node's link": edgetest.Capture(t, one.NS, "h-"+n.Spec.ID),
		"a":           edgetest.Capture(t, a.NS, "eth0"),
	}
	for _, f := range frames {
		edgetest.Inject(t, a.NS, f.b)
	}
	// These are a's own, so capturing works and what came before has been handled.
	edgetest.Inject(t, a.NS, v4(udp(at(a4), at(b4), []byte("genuine"))))
	edgetest.Inject(t, a.NS, v4(ip4(a4, c4, 17, 0x2000, udpHeader(9999, 9999, append([]byte("genuine"), long[:505]...)))))
	edgetest.Inject(t, a.NS, v4(ip4(a4, c4, 17, 65, long[:495])))
	edgetest.Expect(t, a.NS, "tcp", "192.168.0.6:80", "b 192.168.0.5")
	edgetest.Expect(t, a.NS, "tcp", "[fd00:1::7]:80", "c fd00:1::5")
	captured := map[string][][]byte{}
	for where, stop := range stops {
		captured[where] = stop()
		for _, f := range captured[where] {
			if where != "a" && bytes.Contains(f, mark) {
				t.Errorf("%s saw a forged frame: %x", where, f)
			}
			if len(f) > 14 && f[12] == 8 && f[13] == 6 && where != "outside" && where != "a" {
				t.Errorf("%s saw ARP: %x", where, f)
			}
		}
	}
	genuine := func(where string) bool {
		for _, f := range captured[where] {
			if bytes.Contains(f, []byte("genuine")) {
				return true
			}
		}
		return false
	}
	if !genuine("b") {
		t.Error("b did not see the genuine packet")
	}
	if after := run(t, n.Edges[one].NS(), "sh", "-c", "ip neigh show nud permanent; ip -6 neigh show nud permanent"); after != before {
		t.Errorf("the edge's neighbours changed from\n%s to\n%s", before, after)
	}
	if all := run(t, n.Edges[one].NS(), "sh", "-c", "ip neigh; ip -6 neigh"); strings.Contains(all, "192.168.0.88") || strings.Contains(all, "fd00:1::88") {
		t.Errorf("the edge learned a forged neighbour:\n%s", all)
	}
	// The edge answers ARP for itself alone.
	for _, f := range captured["a"] {
		if len(f) >= 42 && f[12] == 8 && f[13] == 6 && bytes.Equal(f[28:32], b4.AsSlice()) {
			t.Error("the edge answered ARP for a neighbour's address")
		}
	}
}

// A guest that knows no neighbours may ask for its gateway.
func TestResolveGateway(t *testing.T) {
	t.Parallel()
	rig := edgetest.New(t, 1)
	n := rig.Network("red", 4097)
	p := n.Pod(rig.Nodes[0], "p", "192.168.0.5", "fd00:1::5")
	run(t, p.NS, "ip", "neigh", "flush", "dev", "eth0", "nud", "permanent")
	run(t, p.NS, "ip", "-6", "neigh", "flush", "dev", "eth0", "nud", "permanent")
	for _, g := range []string{"192.168.0.1", "fd00:1::1"} {
		if err := edgetest.Ping(p.NS, g); err != nil {
			t.Errorf("ping %s: %v", g, err)
		}
	}
}

// One Pod's connections are bounded and others' are not touched.
func TestFlows(t *testing.T) {
	t.Parallel()
	rig := edgetest.New(t, 1)
	n := rig.Network("red", 4097)
	n.Spec.Flows = 50
	a := n.Pod(rig.Nodes[0], "a", "192.168.0.5")
	b := n.Pod(rig.Nodes[0], "b", "192.168.0.6")
	c := n.Pod(rig.Nodes[0], "c", "192.168.0.7")
	edgetest.Echo(t, c.NS, "c", "[::]:80")
	stop := edgetest.Capture(t, c.NS, "eth0")
	for i := range 200 {
		from := netip.AddrPortFrom(addrOf("192.168.0.5"), uint16(10000+i))
		edgetest.Inject(t, a.NS, eth(mac("0a:68:38:73:00:01"), a.Attachment.MAC, 0x0800, udp(from, netip.MustParseAddrPort("192.168.0.7:9"), []byte("flood"))))
	}
	edgetest.Expect(t, b.NS, "tcp", "192.168.0.7:80", "c 192.168.0.6")
	edgetest.Refuse(t, a.NS, "tcp", "192.168.0.7:80")
	arrived := 0
	for _, f := range stop() {
		if bytes.Contains(f, []byte("flood")) {
			arrived++
		}
	}
	if arrived < 45 || arrived > 51 {
		t.Errorf("%d of 200 connections went through, want 50", arrived)
	}
}
