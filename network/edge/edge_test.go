package edge_test

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/network/edge"
	"github.com/hypernetes/hypernetes/network/edge/edgetest"
	"github.com/hypernetes/hypernetes/network/netns"
)

// Two Networks with the same subnets and the same Pod addresses, on two nodes.
func TestReach(t *testing.T) {
	t.Parallel()
	rig := edgetest.New(t, 2)
	one, two := rig.Nodes[0], rig.Nodes[1]
	edgetest.Echo(t, one.NS, "api", "[::]:6443")
	edgetest.Echo(t, rig.Outside, "outside", "[::]:80")
	for i, name := range []string{"red", "blue"} {
		n := rig.Network(name, uint32(4097+i))
		a := n.Pod(one, "a", "192.168.0.5", "fd00:1::5")
		b := n.Pod(one, "b", "192.168.0.6", "fd00:1::6")
		c := n.Pod(two, "c", "192.168.0.7", "fd00:1::7")
		for _, p := range n.Pods {
			edgetest.Echo(t, p.NS, name+"-"+p.Name, "[::]:80")
		}
		t.Run(name, func(t *testing.T) {
			for _, proto := range []string{"tcp", "udp"} {
				edgetest.Expect(t, a.NS, proto, "192.168.0.6:80", name+"-b 192.168.0.5")
				edgetest.Expect(t, a.NS, proto, "192.168.0.7:80", name+"-c 192.168.0.5")
				edgetest.Expect(t, c.NS, proto, "192.168.0.5:80", name+"-a 192.168.0.7")
				edgetest.Expect(t, b.NS, proto, "[fd00:1::5]:80", name+"-a fd00:1::6")
				edgetest.Expect(t, b.NS, proto, "[fd00:1::7]:80", name+"-c fd00:1::6")
				// Outside by the node's address.
				edgetest.Expect(t, a.NS, proto, "100.64.0.200:80", "outside 100.64.0.1")
				edgetest.Expect(t, c.NS, proto, "100.64.0.200:80", "outside 100.64.0.2")
				edgetest.Expect(t, a.NS, proto, "[fd00:64::200]:80", "outside fd00:64::1")
			}
		})
	}
}

func TestAPIServer(t *testing.T) {
	t.Parallel()
	rig := edgetest.New(t, 2)
	edgetest.Echo(t, rig.Nodes[0].NS, "api", "[::]:6443")
	for _, node := range rig.Nodes {
		n := rig.Network("net-"+node.Name, 4097+uint32(node.Address.As4()[3]), func(s *edge.Spec) { s.Egress = false })
		p := n.Pod(node, "p", "192.168.0.5")
		_, at := n.Edges[node].Transit()
		// As package service translates the Service kubernetes.
		translate(t, n.Edges[node].NS(), "10.96.0.1", 443, netip.AddrPortFrom(at, 6443))
		want := "api 100.64.0.2" // from another node by its address
		if node == rig.Nodes[0] {
			here, _ := n.Edges[node].Transit()
			want = "api " + here.String()
		}
		edgetest.Expect(t, p.NS, "tcp", "10.96.0.1:443", want)
		// Nothing else of the node, by any of its addresses.
		edgetest.Echo(t, node.NS, "node", "[::]:10250")
		var ports []string
		for _, a := range []string{at.String(), "100.64.0.1", "100.64.0.2"} {
			ports = append(ports, a+":10250", a+":6443")
		}
		edgetest.Refuse(t, p.NS, "tcp", ports...)
		edgetest.Refuse(t, p.NS, "udp", ports...)
	}
}

// translate adds what package service would.
func translate(t *testing.T, ns *netns.NS, vip string, port uint16, to netip.AddrPort) {
	t.Helper()
	family, bits := "ip", to.Addr().String()
	if to.Addr().Is6() {
		family, bits = "ip6", "["+bits+"]"
	}
	run(t, ns, "nft", "add table inet test; add chain inet test pre { type nat hook prerouting priority -100; }; add chain inet test out { type nat hook output priority -100; };"+
		fmt.Sprintf(" add rule inet test pre %s daddr %s tcp dport %d dnat %s to %s:%d", family, vip, port, family, bits, to.Port()))
}

func run(t testing.TB, ns *netns.NS, command ...string) string {
	t.Helper()
	out, err := exec.Command("nsenter", append([]string{"--net=" + ns.Path()}, command...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v: %s", command, err, out)
	}
	return string(out)
}

func TestNoEgress(t *testing.T) {
	t.Parallel()
	rig := edgetest.New(t, 1)
	edgetest.Echo(t, rig.Outside, "outside", "[::]:80")
	n := rig.Network("red", 4097, func(s *edge.Spec) { s.Egress = false })
	p := n.Pod(rig.Nodes[0], "p", "192.168.0.5", "fd00:1::5")
	edgetest.Refuse(t, p.NS, "tcp", "100.64.0.200:80")
	edgetest.Refuse(t, p.NS, "tcp", "[fd00:64::200]:80")
	n.Spec.Egress = true
	n.Ensure()
	edgetest.Expect(t, p.NS, "tcp", "100.64.0.200:80", "outside 100.64.0.1")
	edgetest.Expect(t, p.NS, "tcp", "[fd00:64::200]:80", "outside fd00:64::1")
}

// What no Pod may reach although it may leave the Network.
func TestForbidden(t *testing.T) {
	t.Parallel()
	rig := edgetest.New(t, 2)
	one := rig.Nodes[0]
	n := rig.Network("red", 4097)
	p := n.Pod(one, "p", "192.168.0.5", "fd00:1::5")
	other := rig.Network("blue", 4098)
	q := other.Pod(one, "q", "192.168.0.9")
	edgetest.Echo(t, q.NS, "q", "[::]:80")
	// Everything forbidden leads to the outside machine, which would answer.
	edgetest.Echo(t, rig.Outside, "outside", "[::]:80")
	for _, a := range []string{"169.254.169.254/32", "10.96.0.77/32", "10.255.1.1/32"} {
		run(t, rig.Outside, "ip", "addr", "add", a, "dev", "eth0")
		run(t, one.NS, "ip", "route", "replace", a, "via", "100.64.0.200")
	}
	edgetest.Echo(t, one.NS, "node", "[::]:80")
	edgetest.Expect(t, p.NS, "tcp", "100.64.0.200:80", "outside 100.64.0.1")
	here, at := other.Edges[one].Transit()
	_, mine := n.Edges[one].Transit()
	var forbidden []string
	for _, a := range []string{
		"169.254.169.254", "10.96.0.77", "10.255.1.1", "100.64.0.1", "100.64.0.2", "127.0.0.1", "192.168.0.9", "10.96.0.10",
		here.String(), at.String(), mine.String(), "[fd00:64::1]", "[fd00:64::2]", "[fd00:1::1]", "192.168.0.1",
	} {
		forbidden = append(forbidden, a+":80")
	}
	edgetest.Refuse(t, p.NS, "tcp", forbidden...)
	edgetest.Refuse(t, p.NS, "udp", forbidden...)
	for _, port := range []string{"4789", "6081", "8472", "8473"} {
		edgetest.Echo(t, rig.Outside, "outside", "[::]:"+port)
	}
	edgetest.Refuse(t, p.NS, "udp", "100.64.0.200:4789", "100.64.0.200:6081", "100.64.0.200:8472", "100.64.0.200:8473")
	for _, port := range []string{"4789", "6081", "8472", "8473"} {
		edgetest.Expect(t, p.NS, "tcp", "100.64.0.200:"+port, "outside 100.64.0.1")
	}
	// The edge's resolver and its gateway's ping.
	edgetest.Echo(t, n.Edges[one].NS(), "dns", "10.96.0.10:53")
	edgetest.Expect(t, p.NS, "udp", "10.96.0.10:53", "dns 192.168.0.5")
	edgetest.Expect(t, p.NS, "tcp", "10.96.0.10:53", "dns 192.168.0.5")
	for _, g := range []string{"192.168.0.1", "fd00:1::1"} {
		if err := edgetest.Ping(p.NS, g); err != nil {
			t.Errorf("ping %s: %v", g, err)
		}
	}
}

// The overlay's port is the nodes' alone.
func TestOverlayPort(t *testing.T) {
	t.Parallel()
	rig := edgetest.New(t, 2)
	n := rig.Network("red", 4097)
	a := n.Pod(rig.Nodes[0], "a", "192.168.0.5")
	b := n.Pod(rig.Nodes[1], "b", "192.168.0.6")
	frame := udp(netip.MustParseAddrPort("192.168.0.6:9"), netip.MustParseAddrPort("192.168.0.5:9"), nil)
	inner := append(append(mac("0a:69:64:40:00:01"), mac("0a:69:64:40:00:02")...), 8, 0)
	payload := append(append([]byte{8, 0, 0, 0, 0, 0x10, 1, 0}, inner...), frame...)
	seen := func(send func()) bool {
		stop := edgetest.Capture(t, a.NS, "eth0")
		send()
		edgetest.Expect(t, b.NS, "udp", "192.168.0.5:7", "a 192.168.0.6") // afterwards
		for _, f := range stop() {
			if bytes.Contains(f, frame[20:28]) {
				return true
			}
		}
		return false
	}
	edgetest.Echo(t, a.NS, "a", "192.168.0.5:7")
	send := func(ns *netns.NS) func() {
		return func() {
			c, err := ns.DialContext(t.Context(), "udp", "100.64.0.1:8473")
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = c.Close() }()
			if _, err := c.Write(payload); err != nil && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.ECONNREFUSED) {
				t.Fatal(err)
			}
		}
	}
	if !seen(send(rig.Nodes[1].NS)) {
		t.Error("a packet of a node did not arrive: the test proves nothing")
	}
	if seen(send(rig.Outside)) {
		t.Error("a packet from outside the cluster got into the overlay")
	}
	// A Pod of another Network, out through its node's egress.
	other := rig.Network("blue", 4098).Pod(rig.Nodes[1], "x", "192.168.0.8")
	if seen(send(other.NS)) {
		t.Error("another Network's Pod's packet got into the overlay")
	}
	if seen(send(b.NS)) {
		t.Error("a Pod's packet got into the overlay")
	}
}

func mac(s string) []byte {
	m, err := net.ParseMAC(s)
	if err != nil {
		panic(err)
	}
	return m
}
