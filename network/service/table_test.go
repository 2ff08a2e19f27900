package service

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestClusterIP(t *testing.T) {
	r := newRig(t)
	c := r.host("client", "192.168.0.10", "fd00:1::10")
	a := r.host("a", "192.168.0.20", "fd00:1::20").serve()
	b := r.host("b", "192.168.0.21", "fd00:1::21").serve()
	r.sync(web(true, a, b))
	for _, network := range []string{"tcp", "udp"} {
		c.want(network, clusterIP4, 80, "", "192.168.0.10")
		c.want(network, clusterIP6, 80, "", "fd00:1::10")
		c.refused(network, clusterIP4, 81)
		c.refused(network, clusterIP6, 81)
		// Hairpin: whoever asks and serves, itself seen as the gateway, the other as it is.
		seen := map[string]string{}
		for range 200 {
			server, from, err := a.ask(network, clusterIP4, 80, patience)
			check(t, err)
			seen[server] = from
			if len(seen) == 2 {
				break
			}
		}
		if seen["a"] != gateway4.String() || seen["b"] != "192.168.0.20" {
			t.Errorf("%s hairpin: servers saw %v", network, seen)
		}
	}
	r.sync(web(true, a))
	a.want("tcp", clusterIP6, 80, "a", gateway6.String())
	// The edge itself, whatever source it picks for a route it will not take.
	h := must(r.edge.Netlink())(t)
	defer h.Close()
	check(t, h.RouteAdd(&netlink.Route{LinkIndex: must(h.LinkByName("lo"))(t).Attrs().Index, Dst: ipnet(clusterIP4), Scope: netlink.SCOPE_LINK}))
	(&host{rig: r, name: "edge", ns: r.edge}).want("tcp", clusterIP4, 80, "a", "")
	r.sync(web(false, b))
	(&host{rig: r, name: "edge", ns: r.edge}).want("udp", clusterIP4, 80, "b", overlay4.String())
	r.sync(web(true))
	for _, network := range []string{"tcp", "udp"} {
		c.refused(network, clusterIP4, 80)
		c.refused(network, clusterIP6, 80)
	}
	svc := web(true)
	svc.Ports[0].Elsewhere, svc.Ports[1].Elsewhere = true, true
	r.sync(svc)
	c.silent("tcp", clusterIP4, 80)
	c.silent("udp", clusterIP6, 80)
}

func TestDistribution(t *testing.T) {
	r := newRig(t)
	c := r.host("client", "192.168.0.10", "fd00:1::10")
	var hosts []*host
	for i := range 3 {
		hosts = append(hosts, r.host(fmt.Sprintf("s%d", i), fmt.Sprintf("192.168.0.%d", 20+i), fmt.Sprintf("fd00:1::%d", 20+i)).serve())
	}
	r.sync(web(true, hosts...))
	got := map[string]int{}
	for range 300 {
		s, _, err := c.ask("udp", clusterIP4, 80, patience)
		check(t, err)
		got[s]++
	}
	// 100 each; 50 would be six standard deviations away.
	for _, x := range hosts {
		if got[x.name] < 50 {
			t.Errorf("distribution %v", got)
		}
	}
}

func TestExternal(t *testing.T) {
	r := newRig(t)
	in := r.host("in", "192.168.0.10", "fd00:1::10")
	out := r.host("out", "203.0.113.2", "2001:db8::2")
	near := r.host("near", "192.168.0.20", "fd00:1::20").serve()
	far := r.host("far", "192.168.0.21", "fd00:1::21").serve()
	svc := Service{Key: "ns/lb", ClusterIPs: []netip.Addr{clusterIP4}, External: []netip.Addr{vip4, vip6}}
	for _, port := range []uint16{80, 8080} {
		for _, proto := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
			eps := []Endpoint{far.ep(false, false), far.ep(false, true)}
			svc.Ports = append(svc.Ports, Port{Protocol: proto, Port: port, Internal: eps, External: eps})
		}
	}
	r.sync(svc)
	for _, network := range []string{"tcp", "udp"} {
		for _, port := range []uint16{80, 8080} {
			out.want(network, vip4, port, "far", overlay4.String())
			out.want(network, vip6, port, "far", overlay6.String())
			in.want(network, vip4, port, "far", "192.168.0.10")
			in.want(network, vip6, port, "far", "fd00:1::10")
		}
		// A client the node lets in by the ClusterIP gets its answers as well.
		out.want(network, clusterIP4, 80, "far", overlay4.String())
		out.refused(network, vip4, 81)
	}
	// The endpoint on this node sees the client.
	for i := range svc.Ports {
		eps := []Endpoint{near.ep(true, false), near.ep(true, true)}
		svc.Ports[i].External = eps
	}
	r.sync(svc)
	out.want("tcp", vip4, 80, "near", "203.0.113.2")
	out.want("udp", vip6, 80, "near", "2001:db8::2")
	// Policy Local: outside only what is here, inside everything.
	svc.ExternalLocal = true
	r.sync(svc)
	out.want("tcp", vip4, 80, "near", "203.0.113.2")
	in.want("tcp", vip4, 80, "far", "192.168.0.10")
	in.want("udp", vip6, 80, "far", "fd00:1::10")
	for i := range svc.Ports {
		svc.Ports[i].External, svc.Ports[i].Elsewhere = nil, true
	}
	r.sync(svc)
	out.silent("tcp", vip4, 80)
	in.want("tcp", vip4, 80, "far", "192.168.0.10")
	for i := range svc.Ports {
		svc.Ports[i].Internal, svc.Ports[i].Elsewhere = nil, false
	}
	r.sync(svc)
	out.refused("tcp", vip4, 80)
	in.refused("udp", vip6, 80)
}

func TestSourceRanges(t *testing.T) {
	r := newRig(t)
	out := r.host("out", "203.0.113.2", "2001:db8::2")
	other := r.host("other", "203.0.114.2", "2001:db9::2")
	s := r.host("s", "192.168.0.20", "fd00:1::20").serve()
	svc := web(true, s)
	svc.External = []netip.Addr{vip4, vip6}
	set := func(p ...string) {
		svc.SourceRanges = nil
		for _, p := range p {
			svc.SourceRanges = append(svc.SourceRanges, netip.MustParsePrefix(p))
		}
		r.sync(svc)
	}
	set("203.0.113.0/24", "203.0.113.2/32", "2001:db8::/32")
	out.want("tcp", vip4, 80, "s", "203.0.113.2")
	out.want("udp", vip6, 80, "s", "2001:db8::2")
	other.silent("tcp", vip4, 80)
	other.silent("udp", vip6, 80)
	other.want("tcp", clusterIP4, 80, "s", "") // not an external address: none of its business
	set("203.0.112.0/20")
	other.want("tcp", vip4, 80, "s", "203.0.114.2")
	out.want("tcp", vip4, 80, "s", "203.0.113.2")
	out.silent("tcp", vip6, 80) // ranges of one family let in nobody of the other
	set("203.0.113.0/24")
	other.silent("tcp", vip4, 80)
	set()
	other.want("tcp", vip6, 80, "s", "2001:db9::2")
}

func TestAffinity(t *testing.T) {
	r := newRig(t)
	var hosts []*host
	for i := range 4 {
		hosts = append(hosts, r.host(fmt.Sprintf("s%d", i), fmt.Sprintf("192.168.0.%d", 20+i), fmt.Sprintf("fd00:1::%d", 20+i)).serve())
	}
	c := r.host("client", "192.168.0.10", "fd00:1::10")
	svc := web(true, hosts...)
	svc.Affinity = time.Hour
	r.sync(svc)
	stays := func(to netip.Addr) string {
		t.Helper()
		first, _, err := c.ask("tcp", to, 80, patience)
		check(t, err)
		for range 20 {
			c.want("tcp", to, 80, first, "")
		}
		return first
	}
	first, first6 := stays(clusterIP4), stays(clusterIP6)
	// It survives a Sync that changes the number of endpoints, and another process.
	var kept, removed []*host
	for _, x := range hosts {
		if x.name == first || x.name == first6 || len(kept) < 2 {
			kept = append(kept, x)
		}
	}
	svc = web(true, kept...)
	svc.Affinity = time.Hour
	r.sync(svc)
	r.table = must(Open(r.edge, options))(t)
	r.sync(svc)
	c.want("tcp", clusterIP4, 80, first, "")
	c.want("tcp", clusterIP6, 80, first6, "")
	// Without the endpoint the client goes to another, and stays there.
	for _, x := range hosts {
		if x.name != first {
			removed = append(removed, x)
		}
	}
	svc = web(true, removed...)
	svc.Affinity = time.Hour
	r.sync(svc)
	if now := stays(clusterIP4); now == first {
		t.Errorf("client is still at %s", first)
	}
	// It runs out.
	svc.Affinity = time.Second
	r.sync(web(true, removed...)) // forgets
	r.sync(svc)
	first, _, err := c.ask("tcp", clusterIP4, 80, patience)
	check(t, err)
	for deadline := time.Now().Add(patience); ; {
		conn := must(r.edge.NFTables())(t)
		if len(must(conn.GetSetElements(setAffinity.definition(false)))(t)) == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("client is kept at %s for longer than it should", first)
		}
	}
	r.sync()
}

func TestConnectionsSurvive(t *testing.T) {
	r := newRig(t)
	c := r.host("client", "192.168.0.10", "fd00:1::10")
	a := r.host("a", "192.168.0.20", "fd00:1::20").serve()
	b := r.host("b", "192.168.0.21", "fd00:1::21").serve()
	r.sync(web(true, a))
	conn := must(c.ns.DialContext(t.Context(), "tcp", netip.AddrPortFrom(clusterIP4, 80).String()))(t)
	defer conn.Close()
	in := bufio.NewReader(conn)
	must(in.ReadString('\n'))(t)
	alive := func(when string) {
		t.Helper()
		_ = conn.SetDeadline(time.Now().Add(patience))
		if _, err := fmt.Fprintf(conn, "%s\n", when); err != nil {
			t.Fatalf("after %s: %v", when, err)
		}
		if s, err := in.ReadString('\n'); err != nil || s != when+"\n" {
			t.Fatalf("after %s: %q, %v", when, s, err)
		}
	}
	udp := must(c.ns.DialContext(t.Context(), "udp", netip.AddrPortFrom(clusterIP4, 80).String()))(t)
	defer udp.Close()
	if s, _, err := hear(udp, "udp", patience); s != "a" || err != nil {
		t.Fatalf("%s, %v", s, err)
	}
	r.sync(web(true, a, b))
	alive("an endpoint more")
	if s, _, err := hear(udp, "udp", patience); s != "a" || err != nil {
		t.Fatalf("UDP flow moved without need: %s, %v", s, err)
	}
	if st := r.sync(web(true, b)); st.Flows == 0 {
		t.Errorf("no flow removed: %+v", st)
	}
	alive("its endpoint's end")
	if s, _, err := hear(udp, "udp", patience); s != "b" || err != nil {
		t.Errorf("UDP flow still at the endpoint that is gone: %q, %v", s, err)
	}
	// A process that was killed before it could delete flows: the next one does.
	nft := must(r.edge.NFTables())(t)
	key := []byte(front{addr: clusterIP4, proto: unix.IPPROTO_UDP, port: 80}.indexKey(0))
	check(t, nft.SetDeleteElements(setEndpoints.definition(false), []nftables.SetElement{{Key: key}}))
	check(t, nft.SetAddElements(setEndpoints.definition(false), []nftables.SetElement{{Key: key, Val: []byte(addrPortVal(netip.AddrPortFrom(a.v4, 80)))}}))
	check(t, nft.Flush())
	r.table = must(Open(r.edge, options))(t)
	if st := r.sync(web(true, a)); st.Flows == 0 {
		t.Errorf("no flow removed: %+v", st)
	}
	if s, _, err := hear(udp, "udp", patience); s != "a" || err != nil {
		t.Errorf("UDP flow still at the endpoint that is gone: %q, %v", s, err)
	}
	alive("another process")
	r.sync()
	alive("its Service's end")
	r.sync(web(true, a, b))
	alive("its Service's return")
}

// No connection fails while a Service changes its endpoints all the time.
func TestNoWindow(t *testing.T) {
	r := newRig(t)
	c := r.host("client", "192.168.0.10", "fd00:1::10")
	var hosts []*host
	for i := range 3 {
		hosts = append(hosts, r.host(fmt.Sprintf("s%d", i), fmt.Sprintf("192.168.0.%d", 20+i), fmt.Sprintf("fd00:1::%d", 20+i)).serve())
	}
	r.sync(web(true, hosts...))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		for i := 0; ctx.Err() == nil; i++ {
			// Servers go on answering: what fails is the translation's fault.
			if _, err := r.table.Sync(context.Background(), []Service{web(true, hosts[:1+i%3]...)}); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	for i := range 1000 {
		to := clusterIP4
		if i%2 == 1 {
			to = clusterIP6
		}
		c.want("tcp", to, 80, "", "")
	}
	cancel()
	check(t, <-done)
}

func TestAdoptionAndDrift(t *testing.T) {
	r := newRig(t)
	c := r.host("client", "192.168.0.10", "fd00:1::10")
	a := r.host("a", "192.168.0.20", "fd00:1::20").serve()
	b := r.host("b", "192.168.0.21", "fd00:1::21").serve()
	svc := web(true, a, b)
	svc.External, svc.SourceRanges, svc.ExternalLocal = []netip.Addr{vip4}, []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}, true
	if st := r.sync(svc); st.Added == 0 || st.Deleted != 0 {
		t.Errorf("first: %+v", st)
	}
	idle := func(when string) {
		t.Helper()
		if st := r.sync(svc); st != (Stats{}) {
			t.Errorf("%s: %+v, want nothing to do", when, st)
		}
	}
	idle("again")
	r.table.Resync()
	idle("after reading")
	r.table = must(Open(r.edge, options))(t)
	idle("another process")
	nft := must(r.edge.NFTables())(t)
	for s := range setCount {
		if s == setInside || s == setClasses || s == setAffinity {
			continue
		}
		for _, v6 := range []bool{false, true} {
			set := s.definition(v6)
			elements := must(nft.GetSetElements(set))(t)
			if len(elements) == 0 {
				continue
			}
			check(t, nft.SetDeleteElements(set, elements[:1]))
			check(t, nft.Flush())
			r.table.Resync()
			if st := r.sync(svc); st.Added < 1 {
				t.Errorf("%s: an element lost was not put back: %+v", set.Name, st)
			}
			idle(set.Name)
		}
	}
	// Wrong elements, also such as no Service could have made.
	f := front{addr: clusterIP4, proto: unix.IPPROTO_TCP, port: 80}
	g := front{addr: netip.MustParseAddr("10.96.9.9"), proto: 99, port: 80}
	check(t, nft.SetDeleteElements(setEndpoints.definition(false), []nftables.SetElement{{Key: []byte(f.indexKey(0))}}))
	check(t, nft.SetAddElements(setEndpoints.definition(false), []nftables.SetElement{
		{Key: []byte(f.indexKey(0)), Val: []byte(addrPortVal(netip.MustParseAddrPort("192.168.0.99:1")))},
		{Key: []byte(g.indexKey(0)), Val: []byte(addrPortVal(netip.MustParseAddrPort("192.168.0.99:1")))},
		{Key: []byte(f.indexKey(77)), Val: []byte(addrPortVal(netip.MustParseAddrPort("192.168.0.99:1")))},
	}))
	check(t, nft.Flush())
	r.table.Resync()
	if st := r.sync(svc); st.Deleted != 3 || st.Added != 1 {
		t.Errorf("wrong elements: %+v", st)
	}
	// A rule too many, a chain emptied, a class lost, subnets lost.
	nft.FlushChain(&nftables.Chain{Table: table(), Name: "prerouting"})
	nft.FlushChain(&nftables.Chain{Table: table(), Name: classKey{false, makeClass(2, 0, 0)}.name()})
	nft.FlushSet(setInside.definition(false))
	check(t, nft.Flush())
	r.table.Resync()
	r.sync(svc)
	c.want("tcp", clusterIP4, 80, "", "192.168.0.10")
	c.want("tcp", vip4, 80, "", "192.168.0.10")
	// Without being told, a change that does not fit is found out and repaired.
	nft.DelTable(table())
	check(t, nft.Flush())
	svc.Ports = svc.Ports[:1]
	r.sync(svc)
	c.want("tcp", clusterIP6, 80, "", "fd00:1::10")
	r.table.Resync()
	idle("after all")
	// Other options change the rules in place.
	o := options
	o.Inside = nil
	r.table = must(Open(r.edge, o))(t)
	idle("other options")
	r.table.Resync()
	idle("other options, read")
	c.want("tcp", clusterIP4, 80, "", "192.168.0.10")
}

func TestKilledBetweenBatches(t *testing.T) {
	r := newRig(t)
	c := r.host("client", "192.168.0.10", "fd00:1::10")
	a := r.host("a", "192.168.0.20", "fd00:1::20").serve()
	b := r.host("b", "192.168.0.21", "fd00:1::21").serve()
	many := func(hosts ...*host) []Service {
		var out []Service
		for i := range 30 {
			s := web(true, hosts...)
			s.Key = fmt.Sprintf("ns/s%02d", i)
			s.ClusterIPs = []netip.Addr{netip.AddrFrom4([4]byte{10, 96, 1, byte(i + 1)})}
			out = append(out, s)
		}
		return out
	}
	r.sync(many(a)...)
	target := many(a, b)
	for n := 1; ; n++ {
		tab := must(Open(r.edge, options))(t)
		ctx, kill := context.WithCancel(t.Context())
		tab.batch = 12
		left := 1
		tab.committed = func() {
			if left--; left == 0 {
				kill()
			}
		}
		_, err := tab.Sync(ctx, target)
		kill()
		check(t, tab.Close())
		for i := range 30 {
			c.want("tcp", netip.AddrFrom4([4]byte{10, 96, 1, byte(i + 1)}), 80, "", "192.168.0.10")
		}
		if err == nil {
			t.Logf("done after %d lives", n)
			break
		}
		if !errors.Is(err, context.Canceled) || n > 100 {
			t.Fatal(n, err)
		}
	}
	r.table.Resync()
	if st := r.sync(target...); st.Added+st.Deleted != 0 {
		t.Errorf("still something to do: %+v", st)
	}
}

func TestClassesAreCollected(t *testing.T) {
	r := newRig(t)
	for n := range 60 {
		var eps []Endpoint
		for i := range n {
			eps = append(eps, Endpoint{Address: netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 168, 0, byte(i + 2)}), 80)})
		}
		r.sync(simple(eps, nil))
	}
	nft := must(r.edge.NFTables())(t)
	if n := len(must(nft.GetSetElements(setClasses.definition(false)))(t)); n > keptClasses+2 {
		t.Errorf("%d classes are kept", n)
	}
	r.table.Resync()
	if st := r.sync(); st.Deleted == 0 {
		t.Errorf("%+v", st)
	}
}

func TestOpenChecksOptions(t *testing.T) {
	if _, err := Open(nil, Options{Gateways: []netip.Addr{gateway4, overlay4}}); err == nil {
		t.Error("two gateways of a family are accepted")
	}
}

// A client that waits for an endpoint which is gone gets to another by its next packet.
func TestHalfOpen(t *testing.T) {
	r := newRig(t)
	c := r.host("client", "192.168.0.10", "fd00:1::10")
	a := r.host("a", "192.168.0.20", "fd00:1::20")
	b := r.host("b", "192.168.0.21", "fd00:1::21").serve()
	h := must(a.ns.Netlink())(t)
	check(t, h.LinkSetDown(must(h.LinkByName("eth0"))(t)))
	h.Close()
	r.sync(web(true, a))
	type answer struct {
		server string
		err    error
	}
	got := make(chan answer, 1)
	go func() {
		s, _, err := c.ask("tcp", clusterIP4, 80, patience)
		got <- answer{s, err}
	}()
	ct := must(r.table.conntrack())(t)
	for deadline := time.Now().Add(patience); ; {
		flows := must(ct.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET))(t)
		if slices.ContainsFunc(flows, func(f *netlink.ConntrackFlow) bool { return address(f.Reverse.SrcIP) == a.v4 }) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("no connection attempt")
		}
	}
	if st := r.sync(web(true, b)); st.Flows != 1 {
		t.Errorf("%+v", st)
	}
	if g := <-got; g.server != "b" || g.err != nil {
		t.Errorf("%+v", g)
	}
}
