package edge_test

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/network/edge"
	"github.com/hypernetes/hypernetes/network/edge/edgetest"
	"github.com/hypernetes/hypernetes/network/netns"
)

// state is everything an edge consists of, for comparison. Links' elements that count
// connections, a line each, are not of it: the kernel adds and collects them.
func state(t *testing.T, node *edgetest.Node, e *edge.Edge) string {
	t.Helper()
	in := run(t, e.NS(), "sh", "-c", "ip -o addr | grep -v fe80 | sed 's/@[^:]*//; s/^[0-9]*: //'; ip -br link | sed 's/@[^ ]*//'; ip route; ip -6 route; ip neigh show nud permanent; ip -6 neigh show nud permanent;"+
		" bridge fdb; nft list table inet h8s_edge | grep -v '\" ct count' | sed 's/packets [0-9]* bytes [0-9]*//'")
	return in + run(t, node.NS, "sh", "-c", "ip -o addr show | grep h- | sed 's/@[^:]*//; s/^[0-9]*: //'; ip route; ip neigh show nud permanent; ip neigh show proxy; nft list table inet h8s_host | sed 's/packets [0-9]* bytes [0-9]*//'")
}

// Somebody else changed things; Ensure puts them right.
func TestDrift(t *testing.T) {
	t.Parallel()
	rig := edgetest.New(t, 2)
	one := rig.Nodes[0]
	edgetest.Echo(t, rig.Outside, "outside", "[::]:80")
	n := rig.Network("red", 4097)
	a := n.Pod(one, "a", "192.168.0.5", "fd00:1::5")
	b := n.Pod(rig.Nodes[1], "b", "192.168.0.6", "fd00:1::6")
	edgetest.Echo(t, b.NS, "b", "[::]:80")
	n.External[one] = []edge.External{{Address: addrOf("100.64.0.91"), Announce: true}}
	n.Ensure()
	e := n.Edges[one]
	want := state(t, one, e)
	vx, h := "vx-"+n.Spec.ID, "h-"+n.Spec.ID
	for _, c := range []struct {
		node    bool
		command string
	}{
		{false, "nft delete table inet h8s_edge"},
		{false, "nft flush chain inet h8s_edge forward"},
		{false, "nft 'flush set inet h8s_edge pods4'"},
		{false, "nft 'add chain inet h8s_edge forward { policy accept; }'"},
		{false, "nft 'add element inet h8s_edge remote4 { 1.2.3.4 }'"},
		{false, "ip route del 192.168.0.6"},
		{false, "ip route del 192.168.0.5"},
		{false, "ip -6 route del fd00:1::5"},
		{false, "ip route replace 192.168.0.6/32 via 169.254.1.1 dev up0 onlink"},
		{false, "ip route add 192.168.0.77/32 dev up0"},
		{false, "ip route del default"},
		{false, "ip route flush table main"},
		{false, "ip -6 route flush table main"},
		{false, "ip neigh flush all nud permanent"},
		{false, "ip neigh replace 192.168.0.5 lladdr 02:00:00:00:00:01 nud permanent dev " + a.Attachment.Link},
		{false, "ip addr del 192.168.0.1/32 dev lo"},
		{false, "ip addr add 192.168.0.99/32 dev lo"},
		{false, "ip link set up0 down"},
		{false, "ip link del up0"},
		{false, "ip link del " + vx},
		{false, "ip link set " + vx + " mtu 1300"},
		{false, "ip link set lo down"},
		{true, "ip link del " + h},
		{true, "ip addr flush dev " + h},
		{true, "ip route del 100.64.0.91"},
		{true, "ip neigh del proxy 100.64.0.91 dev eth0"},
		{true, "nft delete table inet h8s_host"},
		{true, "nft flush chain inet h8s_host from_edges"},
	} {
		ns := e.NS()
		if c.node {
			ns = one.NS
		}
		run(t, ns, "sh", "-c", c.command)
		if err := one.Manager.SetHost(t.Context(), one.Host); err != nil {
			t.Fatal(err)
		}
		n.Ensure()
		if d := difference(want, state(t, one, e)); d != "" {
			t.Fatalf("%s: not repaired:%s", c.command, d)
		}
		edgetest.Expect(t, a.NS, "tcp", "192.168.0.6:80", "b 192.168.0.5")
		edgetest.Expect(t, a.NS, "tcp", "[fd00:1::6]:80", "b fd00:1::5")
		edgetest.Expect(t, a.NS, "tcp", "100.64.0.200:80", "outside 100.64.0.1")
	}
	before := run(t, e.NS(), "cat", "/proc/sys/net/ipv4/conf/all/rp_filter")
	run(t, e.NS(), "sh", "-c", "echo 0 > /proc/sys/net/ipv4/conf/all/rp_filter")
	n.Ensure()
	if after := run(t, e.NS(), "cat", "/proc/sys/net/ipv4/conf/all/rp_filter"); after != before {
		t.Errorf("rp_filter %q, want %q", after, before)
	}
}

func difference(want, got string) string {
	lines := func(s string) map[string]int {
		m := map[string]int{}
		for l := range strings.Lines(s) {
			m[l]++
		}
		return m
	}
	w, g, out := lines(want), lines(got), ""
	for l := range w {
		if g[l] < w[l] {
			out += "\n- " + strings.TrimSpace(l)
		}
	}
	for l := range g {
		if w[l] < g[l] {
			out += "\n+ " + strings.TrimSpace(l)
		}
	}
	return out
}

// A new process takes over; connections live on, and nothing is changed needlessly.
func TestAdoption(t *testing.T) {
	t.Parallel()
	rig := edgetest.New(t, 2)
	one := rig.Nodes[0]
	edgetest.Echo(t, rig.Outside, "outside", "[::]:80")
	n := rig.Network("red", 4097)
	a := n.Pod(one, "a", "192.168.0.5")
	b := n.Pod(rig.Nodes[1], "b", "192.168.0.6")
	edgetest.Echo(t, b.NS, "b", "[::]:80")
	var asks []func() (string, error)
	for _, to := range []string{"192.168.0.6:80", "100.64.0.200:80"} {
		c, err := a.NS.DialContext(t.Context(), "tcp", to)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		asks = append(asks, func() (string, error) { return edgetest.Again(c) })
	}
	// Attached, but not in any Spec yet.
	late := n.NewPod(one, "late", "192.168.0.9")
	if err := n.Edges[one].Attach(t.Context(), late.Attachment); err != nil {
		t.Fatal(err)
	}
	if err := n.Edges[one].Up(t.Context(), late.Attachment.Link); err != nil {
		t.Fatal(err)
	}
	edgetest.Expect(t, late.NS, "tcp", "100.64.0.200:80", "outside 100.64.0.1")
	want := state(t, one, n.Edges[one])
	handles := nftHandles(t, n.Edges[one].NS())
	// As the kernel does about a second after a link's last connection.
	run(t, n.Edges[one].NS(), "nft", "flush", "set", "inet", "h8s_edge", "flows")
	here, at := n.Edges[one].Transit()

	one.Manager = rig.NewManager(one)
	ids, err := one.Manager.List()
	if err != nil || len(ids) != 1 || ids[0] != n.Spec.ID {
		t.Fatalf("edges %v, %v", ids, err)
	}
	e, err := one.Manager.Get(n.Spec.ID)
	if err != nil {
		t.Fatal(err)
	}
	if h, a := e.Transit(); h != here || a != at {
		t.Errorf("transit %s %s, want %s %s", h, a, here, at)
	}
	if err := one.Manager.SetHost(t.Context(), one.Host); err != nil {
		t.Fatal(err)
	}
	n.Ensure()
	if d := difference(want, state(t, one, n.Edges[one])); d != "" {
		t.Errorf("changed: %s", d)
	}
	if h := nftHandles(t, n.Edges[one].NS()); h != handles {
		t.Errorf("the edge's rules were written again: %s, were %s", h, handles)
	}
	for _, ask := range asks {
		if _, err := ask(); err != nil {
			t.Errorf("a connection from before: %v", err)
		}
	}
	edgetest.Expect(t, late.NS, "tcp", "100.64.0.200:80", "outside 100.64.0.1")
	if err := n.Edges[one].Check(t.Context(), late.Attachment); err != nil {
		t.Error(err)
	}
}

// nftHandles are those of the edge's sets, chains and rules: what is made anew has others.
func nftHandles(t *testing.T, ns *netns.NS) string {
	t.Helper()
	return strings.Join(regexp.MustCompile(`handle \d+`).FindAllString(run(t, ns, "nft", "-a", "list", "table", "inet", "h8s_edge"), -1), " ")
}

// Whatever step a killed process got to, the next call finishes the work.
func TestInterrupted(t *testing.T) {
	t.Parallel()
	rig := edgetest.New(t, 1)
	one := rig.Nodes[0]
	edgetest.Echo(t, rig.Outside, "outside", "[::]:80")
	// A namespace's file without the namespace, an overlay that was not moved.
	if err := os.WriteFile(filepath.Join(one.Dir, "00001001"), nil, 0o444); err != nil {
		t.Fatal(err)
	}
	run(t, one.NS, "ip", "link", "add", "vx-00001001", "type", "vxlan", "id", "4097", "dstport", "8473", "dev", "eth0", "nolearning")
	n := rig.Network("red", 4097)
	if n.Spec.ID != "00001001" {
		t.Fatal(n.Spec.ID)
	}
	p := n.NewPod(one, "p", "192.168.0.5", "fd00:1::5")
	e := n.Edges[one]
	attach := func() {
		t.Helper()
		for range 2 {
			if err := e.Attach(t.Context(), p.Attachment); err != nil {
				t.Fatal(err)
			}
			if err := e.Up(t.Context(), p.Attachment.Link); err != nil {
				t.Fatal(err)
			}
		}
		if err := e.Check(t.Context(), p.Attachment); err != nil {
			t.Error(err)
		}
		edgetest.Expect(t, p.NS, "tcp", "100.64.0.200:80", "outside 100.64.0.1")
		edgetest.Expect(t, p.NS, "tcp", "[fd00:64::200]:80", "outside fd00:64::1")
	}
	link := p.Attachment.Link
	// Half a link.
	run(t, e.NS(), "ip", "link", "add", link, "type", "veth", "peer", "name", "x")
	attach()
	n.Pods = append(n.Pods, p)
	n.Ensure()
	for _, c := range []string{"ip link set eth0 down", "ip addr flush dev eth0", "ip route del default", "ip link set eth0 address 02:00:00:00:00:01", "ip link del eth0"} {
		run(t, p.NS, "sh", "-c", c)
		if err := e.Check(t.Context(), p.Attachment); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s: check says %v", c, err)
		}
		attach()
	}
	run(t, e.NS(), "ip", "link", "set", link, "down")
	if err := e.Check(t.Context(), p.Attachment); err == nil {
		t.Error("check does not see that the link is down")
	}
	attach()
	// Another's link in the Pod is not taken.
	if err := e.Detach(t.Context(), link); err != nil {
		t.Fatal(err)
	}
	run(t, p.NS, "ip", "link", "add", "eth0", "type", "veth", "peer", "name", "y")
	if err := e.Attach(t.Context(), p.Attachment); !errdefs.IsAlreadyExists(err) {
		t.Errorf("attach with another's eth0: %v", err)
	}
	run(t, p.NS, "ip", "link", "del", "eth0")
	attach()
	// Twice gone, and nothing is left of it.
	for range 2 {
		if err := e.Detach(t.Context(), link); err != nil {
			t.Fatal(err)
		}
	}
	if links, err := e.Links(); err != nil || len(links) != 0 {
		t.Errorf("links %v, %v", links, err)
	}
	if out := run(t, e.NS(), "nft", "list", "set", "inet", "h8s_edge", "pods4"); strings.Contains(out, "192.168.0.5") {
		t.Error(out)
	}
}

// Until Up nothing passes, in either direction.
func TestDownUntilUp(t *testing.T) {
	t.Parallel()
	rig := edgetest.New(t, 1)
	one := rig.Nodes[0]
	edgetest.Echo(t, rig.Outside, "outside", "[::]:80")
	n := rig.Network("red", 4097)
	p := n.NewPod(one, "p", "192.168.0.5")
	q := n.Pod(one, "q", "192.168.0.6")
	if err := n.Edges[one].Attach(t.Context(), p.Attachment); err != nil {
		t.Fatal(err)
	}
	n.Pods = append(n.Pods, p)
	n.Ensure()
	edgetest.Echo(t, p.NS, "p", "[::]:80")
	edgetest.Refuse(t, p.NS, "tcp", "100.64.0.200:80", "192.168.0.1:53")
	edgetest.Refuse(t, q.NS, "tcp", "192.168.0.5:80")
	if err := n.Edges[one].Up(t.Context(), p.Attachment.Link); err != nil {
		t.Fatal(err)
	}
	edgetest.Expect(t, q.NS, "tcp", "192.168.0.5:80", "p 192.168.0.6")
	p.Delete()
	edgetest.Refuse(t, q.NS, "tcp", "192.168.0.5:80")
}

// A second NIC has routes to its Network alone.
func TestSecondNIC(t *testing.T) {
	t.Parallel()
	rig := edgetest.New(t, 1)
	one := rig.Nodes[0]
	edgetest.Echo(t, rig.Outside, "outside", "[::]:80")
	red := rig.Network("red", 4097)
	blue := rig.Network("blue", 4098, func(s *edge.Spec) {
		s.Subnets, s.Gateways = []netip.Prefix{netip.MustParsePrefix("192.168.5.0/24")}, []netip.Addr{addrOf("192.168.5.1")}
	})
	p := red.Pod(one, "p", "192.168.0.5")
	q := blue.Pod(one, "q", "192.168.5.6")
	edgetest.Echo(t, q.NS, "q", "[::]:80")
	a := edge.Attachment{
		Link: edge.LinkName("p", "eth1"), NetNS: p.NS.Path(), Interface: "eth1", MAC: mac("0a:58:c0:a8:05:05"), MTU: edgetest.MTU,
		Addresses: []netip.Addr{addrOf("192.168.5.5")}, Gateways: []netip.Addr{addrOf("192.168.5.1")}, Subnets: blue.Spec.Subnets,
	}
	if err := blue.Edges[one].Attach(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	if err := blue.Edges[one].Up(t.Context(), a.Link); err != nil {
		t.Fatal(err)
	}
	edgetest.Expect(t, p.NS, "tcp", "192.168.5.6:80", "q 192.168.5.5")
	edgetest.Expect(t, p.NS, "tcp", "100.64.0.200:80", "outside 100.64.0.1")
	if got := run(t, p.NS, "ip", "route", "show", "dev", "eth1"); strings.TrimSpace(strings.Join(strings.Fields(got), " ")) != "192.168.5.0/24 via 192.168.5.1 proto 104 onlink" {
		t.Errorf("routes of eth1: %s", got)
	}
}

// Full packets cross the overlay, in one piece.
func TestMTU(t *testing.T) {
	t.Parallel()
	rig := edgetest.New(t, 2)
	n := rig.Network("red", 4097)
	a := n.Pod(rig.Nodes[0], "a", "192.168.0.5", "fd00:1::5")
	b := n.Pod(rig.Nodes[1], "b", "192.168.0.6", "fd00:1::6")
	for _, c := range []struct {
		to   string
		size int
	}{{"192.168.0.6:9", edgetest.MTU - 28}, {"[fd00:1::6]:9", edgetest.MTU - 48}} {
		u, err := b.NS.ListenPacket(t.Context(), "udp", c.to)
		if err != nil {
			t.Fatal(err)
		}
		stop := edgetest.Capture(t, rig.Nodes[1].NS, "eth0")
		s, err := a.NS.DialContext(t.Context(), "udp", c.to)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Write(make([]byte, c.size)); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 1<<16)
		if k, _, err := u.ReadFrom(buf); err != nil || k != c.size {
			t.Errorf("%s: %d bytes, %v", c.to, k, err)
		}
		largest := 0
		for _, f := range stop() {
			largest = max(largest, len(f))
		}
		if largest != edgetest.MTU+50+14 {
			t.Errorf("%s: largest frame on the fabric %d, want %d", c.to, largest, edgetest.MTU+50+14)
		}
		_, _ = s.Close(), u.Close()
	}
}

// After Remove the node is as it was.
func TestRemove(t *testing.T) {
	t.Parallel()
	rig := edgetest.New(t, 1)
	one := rig.Nodes[0]
	look := func() string {
		return run(t, one.NS, "sh", "-c", "ip -o link | sed 's/^[0-9]*: //'; ip route; ip -6 route; ip neigh show proxy; nft list ruleset | sed 's/packets [0-9]* bytes [0-9]*//'")
	}
	before := look()
	n := rig.Network("red", 4097)
	n.Spec.External = []edge.External{{Address: addrOf("100.64.0.91"), Announce: true}}
	n.Spec.Exported = []netip.Addr{addrOf("10.96.7.7")}
	n.Spec.Routed = true
	p := n.Pod(one, "p", "192.168.0.5")
	held, err := netns.Open(filepath.Join(one.Dir, n.Spec.ID)) // somebody holds it
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = held.Close() }()
	for range 2 {
		if err := one.Manager.Remove(t.Context(), n.Spec.ID); err != nil {
			t.Fatal(err)
		}
	}
	if d := difference(before, look()); d != "" {
		t.Errorf("left: %s", d)
	}
	if entries, err := os.ReadDir(one.Dir); err != nil || len(entries) != 0 {
		t.Errorf("left in %s: %v, %v", one.Dir, entries, err)
	}
	if _, err := one.Manager.Get(n.Spec.ID); !errdefs.IsNotFound(err) {
		t.Errorf("get after remove: %v", err)
	}
	if out := run(t, p.NS, "ip", "-br", "link"); strings.Contains(out, "eth0") {
		t.Errorf("the Pod's link is left: %s", out)
	}
	// Again, in its place.
	n.Pods, n.Spec.External, n.Spec.Exported = nil, nil, nil
	n.Ensure()
}

func TestBadInput(t *testing.T) {
	t.Parallel()
	rig := edgetest.New(t, 1)
	m := rig.Nodes[0].Manager
	good := rig.Network("red", 4097).Spec
	for name, change := range map[string]func(*edge.Spec){
		"id":      func(s *edge.Spec) { s.ID = "../../etc" },
		"vni":     func(s *edge.Spec) { s.VNI = 1 << 24 },
		"mtu":     func(s *edge.Spec) { s.MTU = 100 },
		"gateway": func(s *edge.Spec) { s.Gateways = s.Gateways[:1] },
		"subnet":  func(s *edge.Spec) { s.Subnets = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), s.Subnets[1]} },
		"port": func(s *edge.Spec) {
			s.Ports = []edge.Port{{Addresses: []netip.Addr{addrOf("8.8.8.8")}, MAC: mac("02:00:00:00:00:01")}}
		},
	} {
		s := good
		change(&s)
		if _, err := m.Ensure(context.Background(), s); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, a := range map[string]edge.Attachment{
		"link": {Link: "eth0"}, "interface": {Link: "p1", Interface: "../x", MAC: mac("02:00:00:00:00:01"), MTU: 1450},
	} {
		e, err := m.Get(good.ID)
		if err != nil {
			t.Fatal(err)
		}
		if err := e.Attach(context.Background(), a); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func BenchmarkEnsureNew(b *testing.B) {
	rig := edgetest.New(b, 1)
	m := rig.Nodes[0].Manager
	spec := rig.Network("seed", 1).Spec
	vni := uint32(5000)
	for b.Loop() {
		vni++
		spec.VNI, spec.ID = vni, fmt.Sprintf("%08x", vni)
		if _, err := m.Ensure(b.Context(), spec); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := m.Remove(b.Context(), spec.ID); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}

// BenchmarkEnsure is the cost of finding nothing to do.
func BenchmarkEnsure(b *testing.B) {
	for _, ports := range []int{0, 100, 5000} {
		b.Run(fmt.Sprintf("ports=%d", ports), func(b *testing.B) {
			rig := edgetest.New(b, 1)
			n := rig.Network("red", 4097, wide)
			n.Spec.Ports = many(ports)
			n.Ensure()
			for b.Loop() {
				n.Ensure()
			}
		})
	}
}

// BenchmarkEnsurePorts is the cost of learning that many Ports on other nodes at once.
func BenchmarkEnsurePorts(b *testing.B) {
	rig := edgetest.New(b, 1)
	n := rig.Network("red", 4097, wide)
	ports := many(5000)
	for b.Loop() {
		n.Spec.Ports = ports
		n.Ensure()
		b.StopTimer()
		n.Spec.Ports = nil
		n.Ensure()
		b.StartTimer()
	}
}

func wide(s *edge.Spec) {
	s.Subnets, s.Gateways = []netip.Prefix{netip.MustParsePrefix("10.128.0.0/16")}, []netip.Addr{addrOf("10.128.0.1")}
}

func many(n int) []edge.Port {
	var out []edge.Port
	for i := range n {
		a := netip.AddrFrom4([4]byte{10, 128, byte(1 + i/250), byte(1 + i%250)})
		out = append(out, edge.Port{Addresses: []netip.Addr{a}, MAC: append(mac("0a:58:00:00:00:00")[:2], a.AsSlice()...), Node: netip.AddrFrom4([4]byte{100, 64, 1, byte(1 + i%200)})})
	}
	return out
}

// BenchmarkAttach is Attach and Up.
func BenchmarkAttach(b *testing.B) {
	rig := edgetest.New(b, 1)
	n := rig.Network("red", 4097)
	p := n.NewPod(rig.Nodes[0], "p", "192.168.0.5", "fd00:1::5")
	e := n.Edges[rig.Nodes[0]]
	for b.Loop() {
		if err := e.Attach(b.Context(), p.Attachment); err != nil {
			b.Fatal(err)
		}
		if err := e.Up(b.Context(), p.Attachment.Link); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := e.Detach(b.Context(), p.Attachment.Link); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}

// Many edges at once, made and removed; every one has an uplink of its own.
func TestMany(t *testing.T) {
	t.Parallel()
	rig := edgetest.New(t, 1)
	m := rig.Nodes[0].Manager
	before := run(t, rig.Nodes[0].NS, "sh", "-c", "ip -o link | sed 's/^[0-9]*: //'; nft list table inet h8s_host | sed 's/packets [0-9]* bytes [0-9]*//'")
	spec := rig.Network("seed", 1).Spec
	if err := m.Remove(t.Context(), spec.ID); err != nil {
		t.Fatal(err)
	}
	const n = 24
	edges := make([]*edge.Edge, n)
	all := func(f func(i int, s edge.Spec) error) {
		var wait sync.WaitGroup
		for i := range n {
			wait.Go(func() {
				s := spec
				s.VNI, s.ID = uint32(100+i), fmt.Sprintf("%08x", 100+i)
				if err := f(i, s); err != nil {
					t.Error(err)
				}
			})
		}
		wait.Wait()
	}
	all(func(i int, s edge.Spec) (err error) { edges[i], err = m.Ensure(t.Context(), s); return err })
	if t.Failed() {
		return
	}
	seen := map[netip.Addr]bool{}
	for _, e := range edges {
		here, _ := e.Transit()
		if seen[here] {
			t.Errorf("two edges have %s", here)
		}
		seen[here] = true
	}
	all(func(_ int, s edge.Spec) error { return m.Remove(t.Context(), s.ID) })
	after := run(t, rig.Nodes[0].NS, "sh", "-c", "ip -o link | sed 's/^[0-9]*: //'; nft list table inet h8s_host | sed 's/packets [0-9]* bytes [0-9]*//'")
	if d := difference(before, after); d != "" {
		t.Errorf("left: %s", d)
	}
}

// An address's next owner does not get the last one's connections.
func TestAddressReused(t *testing.T) {
	t.Parallel()
	rig := edgetest.New(t, 1)
	one := rig.Nodes[0]
	edgetest.Echo(t, rig.Outside, "outside", "[::]:80")
	n := rig.Network("red", 4097)
	old := n.Pod(one, "old", "192.168.0.5")
	edgetest.Expect(t, old.NS, "udp", "100.64.0.200:80", "outside 100.64.0.1")
	old.Delete()
	if out := run(t, n.Edges[one].NS(), "cat", "/proc/net/nf_conntrack"); strings.Contains(out, "192.168.0.5") {
		t.Errorf("connections of the old owner: %s", out)
	}
	next := n.Pod(one, "next", "192.168.0.5")
	edgetest.Expect(t, next.NS, "udp", "100.64.0.200:80", "outside 100.64.0.1")
}

// What the edge itself dials, such as probes, comes from the gateway.
func TestFromEdge(t *testing.T) {
	t.Parallel()
	rig := edgetest.New(t, 2)
	n := rig.Network("red", 4097)
	for i, c := range []struct{ v4, v6 string }{{"192.168.0.5", "fd00:1::5"}, {"192.168.0.6", "fd00:1::6"}} {
		p := n.Pod(rig.Nodes[i], fmt.Sprintf("p%d", i), c.v4, c.v6)
		edgetest.Echo(t, p.NS, p.Name, "[::]:80")
	}
	ns := n.Edges[rig.Nodes[0]].NS()
	edgetest.Expect(t, ns, "tcp", "192.168.0.5:80", "p0 192.168.0.1")
	edgetest.Expect(t, ns, "tcp", "[fd00:1::5]:80", "p0 fd00:1::1")
	edgetest.Expect(t, ns, "tcp", "192.168.0.6:80", "p1 100.64.0.1")
	edgetest.Expect(t, ns, "tcp", "[fd00:1::6]:80", "p1 fd68:3873:2::6440:1")
}
