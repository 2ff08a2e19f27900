package edge_test

import (
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/network/edge"
	"github.com/hypernetes/hypernetes/network/edge/edgetest"
	"github.com/hypernetes/hypernetes/network/netns"
)

// Two Networks that somebody else carries, with the same subnets and addresses, on two
// nodes.
func TestUplinkReach(t *testing.T) {
	t.Parallel()
	rig := edgetest.New(t, 2)
	one, two := rig.Nodes[0], rig.Nodes[1]
	edgetest.Echo(t, rig.Outside, "outside", "[::]:80")
	for i, name := range []string{"red", "blue"} {
		n := rig.Carried(name, i+1)
		a := n.Pod(one, "a", "192.168.0.5", "fd00:1::5")
		b := n.Pod(one, "b", "192.168.0.6", "fd00:1::6")
		c := n.Pod(two, "c", "192.168.0.7", "fd00:1::7")
		for _, p := range n.Pods {
			edgetest.Echo(t, p.NS, name+"-"+p.Name, "[::]:80")
		}
		edgetest.Echo(t, n.Carrier.Host, name+"-host", "[::]:80")
		edgetest.Echo(t, n.Carrier.Router, name+"-router", "[::]:80")
		t.Run(name, func(t *testing.T) {
			for _, proto := range []string{"tcp", "udp"} {
				// On one node, across nodes.
				edgetest.Expect(t, a.NS, proto, "192.168.0.6:80", name+"-b 192.168.0.5")
				edgetest.Expect(t, b.NS, proto, "[fd00:1::5]:80", name+"-a fd00:1::6")
				edgetest.Expect(t, a.NS, proto, "192.168.0.7:80", name+"-c 192.168.0.5")
				edgetest.Expect(t, c.NS, proto, "192.168.0.5:80", name+"-a 192.168.0.7")
				edgetest.Expect(t, b.NS, proto, "[fd00:1::7]:80", name+"-c fd00:1::6")
				// The router, and outside by its address.
				edgetest.Expect(t, a.NS, proto, "192.168.0.1:80", name+"-router 192.168.0.5")
				edgetest.Expect(t, a.NS, proto, "[fd00:1::1]:80", name+"-router fd00:1::5")
				edgetest.Expect(t, a.NS, proto, "100.64.0.200:80", "outside "+n.Carrier.External4.String())
				edgetest.Expect(t, c.NS, proto, "[fd00:64::200]:80", "outside "+n.Carrier.External6.String())
				// What is no Pod, both ways.
				edgetest.Expect(t, a.NS, proto, "192.168.0.200:80", name+"-host 192.168.0.5")
				edgetest.Expect(t, c.NS, proto, "[fd00:1::200]:80", name+"-host fd00:1::7")
				edgetest.Expect(t, n.Carrier.Host, proto, "192.168.0.5:80", name+"-a 192.168.0.200")
				edgetest.Expect(t, n.Carrier.Host, proto, "192.168.0.6:80", name+"-b 192.168.0.200")
				edgetest.Expect(t, n.Carrier.Host, proto, "[fd00:1::7]:80", name+"-c fd00:1::200")
				edgetest.Expect(t, n.Carrier.Router, proto, "[fd00:1::5]:80", name+"-a fd00:1::1")
			}
			for _, node := range rig.Nodes {
				if got := n.Carrier.Refused(node); got != "0" {
					t.Errorf("%s: the agent refused %s frames of uplinks", node.Name, got)
				}
			}
		})
	}
}

// Until Up nothing passes; what nobody has wired leads nowhere, not even to the node; and
// what is gone is gone.
func TestUplinkLife(t *testing.T) {
	t.Parallel()
	rig := edgetest.New(t, 1)
	one := rig.Nodes[0]
	edgetest.Echo(t, rig.Outside, "outside", "[::]:80")
	edgetest.Echo(t, one.NS, "node", "[::]:80")
	n := rig.Carried("red", 1)
	q := n.Pod(one, "q", "192.168.0.6")
	p := n.NewPod(one, "p", "192.168.0.5", "fd00:1::5")
	e := n.Edges[one]
	if err := e.Attach(t.Context(), p.Attachment); err != nil {
		t.Fatal(err)
	}
	n.Pods = append(n.Pods, p)
	n.Ensure()
	n.Carrier.Wire(p)
	edgetest.Echo(t, p.NS, "p", "[::]:80")
	var wait sync.WaitGroup
	wait.Go(func() { edgetest.Refuse(t, p.NS, "tcp", "100.64.0.200:80", "192.168.0.200:80") })
	wait.Go(func() { edgetest.Refuse(t, q.NS, "tcp", "192.168.0.5:80") })
	wait.Go(func() { edgetest.Refuse(t, n.Carrier.Host, "tcp", "192.168.0.5:80", "[fd00:1::5]:80") })
	wait.Wait()
	if err := e.Check(t.Context(), p.Attachment); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("check of a link that is down: %v", err)
	}
	up := func() {
		t.Helper()
		for range 2 {
			if err := e.Attach(t.Context(), p.Attachment); err != nil {
				t.Fatal(err)
			}
			if err := e.Up(t.Context(), p.Attachment.Link); err != nil {
				t.Fatal(err)
			}
			if err := e.Announce(t.Context(), p.Attachment); err != nil {
				t.Fatal(err)
			}
		}
		if err := e.Check(t.Context(), p.Attachment); err != nil {
			t.Error(err)
		}
	}
	up()
	reached := func() {
		t.Helper()
		edgetest.Expect(t, q.NS, "tcp", "192.168.0.5:80", "p 192.168.0.6")
		edgetest.Expect(t, p.NS, "tcp", "100.64.0.200:80", "outside 100.64.0.101")
		edgetest.Expect(t, p.NS, "tcp", "[fd00:64::200]:80", "outside fd00:64::101")
		edgetest.Expect(t, n.Carrier.Host, "tcp", "[fd00:1::5]:80", "p fd00:1::200")
	}
	reached()

	// The agent has taken its bridge away: the node is deaf.
	tap := p.Attachment.Uplink
	run(t, one.NS, "ip", "link", "set", tap, "nomaster")
	run(t, one.NS, "ip", "addr", "add", "192.168.0.1/24", "dev", tap)
	edgetest.Refuse(t, p.NS, "tcp", "192.168.0.1:80", "100.64.0.1:80")
	run(t, one.NS, "ip", "addr", "del", "192.168.0.1/24", "dev", tap)
	run(t, one.NS, "ip", "link", "set", tap, "master", "brq1")
	reached()

	// Whatever is missing comes back.
	inner := "n" + p.Attachment.Link[1:]
	for _, c := range []struct {
		ns      *netns.NS
		command string
	}{
		{one.NS, "ip link del " + tap},
		{one.NS, "ip link set " + tap + " down"},
		{one.NS, "ip link set " + tap + " down; ip link set " + tap + " name tapx"},
		{e.NS(), "ip link set " + inner + " address 02:00:00:00:00:01"},
		{e.NS(), "ip link set " + inner + " down"},
		{e.NS(), "ip link del " + inner},
		{p.NS, "ip link del eth0"},
	} {
		run(t, c.ns, "sh", "-c", c.command)
		if err := e.Check(t.Context(), p.Attachment); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s: check says %v", c.command, err)
		}
		up()
		run(t, one.NS, "ip", "link", "set", tap, "master", "brq1")
		reached()
	}

	// A link of somebody else's is not taken; one that a former attachment left is.
	if err := e.Detach(t.Context(), p.Attachment.Link); err != nil {
		t.Fatal(err)
	}
	run(t, one.NS, "ip", "link", "add", tap, "type", "veth", "peer", "name", "x")
	if err := e.Attach(t.Context(), p.Attachment); !errdefs.IsAlreadyExists(err) {
		t.Errorf("attach with another's %s: %v", tap, err)
	}
	run(t, one.NS, "ip", "link", "del", tap)
	up()
	run(t, e.NS(), "ip", "link", "del", p.Attachment.Link)
	run(t, e.NS(), "ip", "link", "set", inner, "down")
	run(t, e.NS(), "ip", "link", "set", inner, "name", "n00000000000000")
	up()
	run(t, one.NS, "ip", "link", "set", tap, "master", "brq1")
	reached()

	for range 2 {
		if err := e.Detach(t.Context(), p.Attachment.Link); err != nil {
			t.Fatal(err)
		}
	}
	n.Pods = n.Pods[:1]
	if out := run(t, one.NS, "ip", "-br", "link"); strings.Contains(out, tap) {
		t.Errorf("the uplink is left: %s", out)
	}
	if out := run(t, e.NS(), "sh", "-c", "nft flush set inet h8s_edge flows; ip rule; ip route show table all; ip -6 rule; ip -6 route show table all; nft list table inet h8s_edge"); strings.Contains(out, p.Attachment.Link) || strings.Contains(out, inner) {
		t.Errorf("left in the edge: %s", out)
	}
	edgetest.Expect(t, q.NS, "tcp", "100.64.0.200:80", "outside 100.64.0.101")
	n.Ensure()
	if out := run(t, one.NS, "nft", "list", "set", "inet", "h8s_host", "wires"); strings.Contains(out, tap) {
		t.Errorf("left in the node: %s", out)
	}
	if err := one.Manager.Remove(t.Context(), n.Spec.ID); err != nil {
		t.Fatal(err)
	}
	if out := run(t, one.NS, "sh", "-c", "ip -br link; nft list table inet h8s_host"); strings.Contains(out, "tap") || strings.Contains(out, n.Spec.ID) {
		t.Errorf("left on the node: %s", out)
	}
}

// uplinkState is what an edge with uplinks consists of besides state.
func uplinkState(t *testing.T, node *edgetest.Node, e *edge.Edge) string {
	return state(t, node, e) + run(t, e.NS(), "sh", "-c", "ip rule; ip -6 rule; ip route show table all proto 104; ip -6 route show table all proto 104; ip neigh show proxy; ip -6 neigh show proxy; "+
		"for f in /proc/sys/net/ipv4/conf/*/rp_filter /proc/sys/net/ipv4/neigh/*/proxy_delay; do echo $f $(cat $f); done") +
		run(t, node.NS, "sh", "-c", "ip -o link show | grep ': tap' | sed 's/^[0-9]*: //; s/@[^:]*//; s/master [^ ]* //'")
}

// Somebody else changed things; Ensure puts them right, and a new process finds nothing to
// do. Connections live on.
func TestUplinkDriftAndAdoption(t *testing.T) {
	t.Parallel()
	rig := edgetest.New(t, 2)
	one := rig.Nodes[0]
	edgetest.Echo(t, rig.Outside, "outside", "[::]:80")
	n := rig.Carried("red", 1)
	a := n.Pod(one, "a", "192.168.0.5", "fd00:1::5")
	b := n.Pod(one, "b", "192.168.0.6", "fd00:1::6")
	c := n.Pod(rig.Nodes[1], "c", "192.168.0.7", "fd00:1::7")
	for _, p := range n.Pods {
		edgetest.Echo(t, p.NS, p.Name, "[::]:80")
	}
	n.Ensure()
	e := n.Edges[one]
	var asks []func() (string, error)
	for _, to := range []string{"192.168.0.6:80", "192.168.0.7:80", "[fd00:1::7]:80", "100.64.0.200:80", "[fd00:64::200]:80"} {
		conn, err := a.NS.DialContext(t.Context(), "tcp", to)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		asks = append(asks, func() (string, error) { return edgetest.Again(conn) })
	}
	quiet := func() {
		run(t, e.NS(), "sh", "-c", "for s in flows seen4 seen6; do nft flush set inet h8s_edge $s; done")
	}
	quiet()
	want := uplinkState(t, one, e)
	link := a.Attachment.Link
	inner := "n" + link[1:]
	for _, c := range []struct {
		node    bool
		command string
	}{
		{false, "nft delete table inet h8s_edge"},
		{false, "nft flush chain inet h8s_edge leave"},
		{false, "nft flush set inet h8s_edge ports4"},
		{false, "nft 'add element inet h8s_edge own4 { 1.2.3.4 }'"},
		{false, "nft flush set inet h8s_edge pairs; nft flush map inet h8s_edge owner4"},
		{false, "ip rule del pref 10; ip -6 rule del pref 10"},
		{false, "ip rule del pref 20"},
		{false, "ip rule add pref 0 lookup local; ip -6 rule add pref 0 lookup local"},
		{false, "ip rule del iif " + link},
		{false, "ip -6 rule add pref 5 iif " + link + " lookup main"},
		{false, "ip rule add pref 90 fwmark 1 lookup main"},
		{false, "ip route flush table 100; ip -6 route flush table 100"},
		{false, "ip route flush table main"},
		{false, "ip route add default via 192.168.0.77 dev " + inner + " onlink table 100"},
		{false, "ip route flush proto 104 table all; ip -6 route flush proto 104 table all"},
		{false, "ip addr flush dev " + inner},
		{false, "ip addr add 192.168.0.99/32 dev " + inner},
		{false, "ip neigh del proxy 192.168.0.5 dev " + inner},
		{false, "ip neigh add proxy 192.168.0.6 dev " + inner},
		{false, "ip -6 neigh del proxy fd00:1::5 dev " + inner},
		{false, "ip link set " + inner + " address 02:00:00:00:00:01"},
		{false, "echo 1 > /proc/sys/net/ipv4/conf/" + inner + "/rp_filter"},
		{false, "ip link set up0 down"},
		{false, "ip link del up0"},
		{true, "nft delete table inet h8s_host"},
		{true, "nft flush set inet h8s_host wires"},
		{true, "ip link set " + a.Attachment.Uplink + " down"},
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
		quiet()
		if d := difference(want, uplinkState(t, one, e)); d != "" {
			t.Fatalf("%s: not repaired:%s", c.command, d)
		}
		edgetest.Expect(t, a.NS, "tcp", "192.168.0.7:80", "c 192.168.0.5")
		edgetest.Expect(t, a.NS, "tcp", "[fd00:64::200]:80", "outside fd00:64::101")
	}
	for _, ask := range asks {
		if got, err := ask(); err != nil {
			t.Errorf("a connection from before: %q, %v", got, err)
		}
	}
	edgetest.Expect(t, c.NS, "tcp", "192.168.0.5:80", "a 192.168.0.7")

	// A new process. One Pod is in no Spec yet.
	late := n.NewPod(one, "late", "192.168.0.9")
	if err := e.Attach(t.Context(), late.Attachment); err != nil {
		t.Fatal(err)
	}
	n.Carrier.Wire(late)
	if err := e.Up(t.Context(), late.Attachment.Link); err != nil {
		t.Fatal(err)
	}
	edgetest.Expect(t, late.NS, "tcp", "100.64.0.200:80", "outside 100.64.0.101")
	quiet()
	want = uplinkState(t, one, e)
	handles := nftHandles(t, e.NS())
	one.Manager = rig.NewManager(one)
	if err := one.Manager.SetHost(t.Context(), one.Host); err != nil {
		t.Fatal(err)
	}
	// Before the Network is known again a Pod can go.
	again, err := one.Manager.Get(n.Spec.ID)
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Check(t.Context(), a.Attachment); err != nil {
		t.Error(err)
	}
	n.Ensure()
	if d := difference(want, uplinkState(t, one, n.Edges[one])); d != "" {
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
	edgetest.Expect(t, late.NS, "tcp", "100.64.0.200:80", "outside 100.64.0.101")

	one.Manager = rig.NewManager(one)
	if again, err = one.Manager.Get(n.Spec.ID); err != nil {
		t.Fatal(err)
	}
	if err := again.Detach(t.Context(), b.Attachment.Link); err != nil {
		t.Fatal(err)
	}
	if out := run(t, one.NS, "ip", "-br", "link"); strings.Contains(out, b.Attachment.Uplink) {
		t.Errorf("the uplink is left: %s", out)
	}
	if err := one.Manager.SetHost(t.Context(), one.Host); err != nil {
		t.Fatal(err)
	}
	n.Pods = slices.DeleteFunc(n.Pods, func(p *edgetest.Pod) bool { return p == b })
	n.Ensure()
	edgetest.Expect(t, a.NS, "tcp", "192.168.0.7:80", "c 192.168.0.5")
}

// Without egress the Network's own link is all there is; a second NIC has no more.
func TestUplinkNoEgress(t *testing.T) {
	t.Parallel()
	rig := edgetest.New(t, 1)
	one := rig.Nodes[0]
	edgetest.Echo(t, rig.Outside, "outside", "[::]:80")
	red := rig.Network("red", 4097, func(s *edge.Spec) {
		s.Subnets, s.Gateways = []netip.Prefix{netip.MustParsePrefix("192.168.5.0/24")}, []netip.Addr{addrOf("192.168.5.1")}
	})
	p := red.Pod(one, "p", "192.168.5.5")
	n := rig.Carried("blue", 1, func(s *edge.Spec) { s.Egress = false })
	edgetest.Echo(t, n.Carrier.Host, "host", "[::]:80")
	q := n.Pod(one, "q", "192.168.0.6", "fd00:1::6")
	edgetest.Echo(t, q.NS, "q", "[::]:80")
	second := n.NewPod(one, "second", "192.168.0.7").Attachment
	second.NetNS, second.Interface, second.Default, second.Subnets = p.NS.Path(), "eth1", false, n.Spec.Subnets
	e := n.Edges[one]
	if err := e.Attach(t.Context(), second); err != nil {
		t.Fatal(err)
	}
	if err := n.Carrier.Plug(one, second.Uplink, second.MAC, second.Addresses); err != nil {
		t.Fatal(err)
	}
	if err := e.Up(t.Context(), second.Link); err != nil {
		t.Fatal(err)
	}
	edgetest.Expect(t, p.NS, "tcp", "192.168.0.200:80", "host 192.168.0.7")
	edgetest.Expect(t, p.NS, "tcp", "192.168.0.6:80", "q 192.168.0.7")
	edgetest.Expect(t, p.NS, "tcp", "100.64.0.200:80", "outside 100.64.0.1") // by the first
	edgetest.Expect(t, q.NS, "tcp", "[fd00:1::200]:80", "host fd00:1::6")
	edgetest.Refuse(t, q.NS, "tcp", "100.64.0.200:80", "[fd00:64::200]:80")
	n.Spec.Egress = true
	n.Ensure()
	edgetest.Expect(t, q.NS, "tcp", "100.64.0.200:80", "outside 100.64.0.101")
	edgetest.Expect(t, q.NS, "tcp", "[fd00:64::200]:80", "outside fd00:64::101")

	// An edge is of one kind, and so is what is plugged into it.
	wrong := second
	wrong.Uplink = ""
	if err := e.Attach(t.Context(), wrong); !errdefs.IsInvalidArgument(err) {
		t.Errorf("attach without an uplink: %v", err)
	}
	for name, change := range map[string]func(*edge.Spec){
		"routed": func(s *edge.Spec) { s.Routed = true },
		"uplink": func(s *edge.Spec) { s.Ports[0].Uplink = "" },
		"ours":   func(s *edge.Spec) { s.Ports[0].Uplink = "h-" + s.ID },
		"path":   func(s *edge.Spec) { s.Ports[0].Uplink = "../x" },
	} {
		s := n.SpecFor(one)
		change(&s)
		if _, err := one.Manager.Ensure(t.Context(), s); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
