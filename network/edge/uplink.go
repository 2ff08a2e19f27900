package edge

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A Network that somebody else carries (Spec.Uplinks; OpenStack's Neutron) is a layer 2
// that knows one port for each Pod, by MAC and addresses, and believes nothing else. The
// edge therefore has an uplink for every local Pod: a link pair whose one end, with the
// port's MAC, is in the edge, and whose other end is in the node's namespace under the
// name that the carrier's agent looks for.
//
//	Pod ── p<x> ──▶ rule iif p<x> ▸ table of its own: subnets and default dev n<x>
//	Pod ◀─ p<x> ─── rule before the local table ▸ table of local Pods
//	                n<x>: the Pod's addresses, as what asks for neighbours
//
// The Pod's addresses are n<x>'s, so that the edge's questions for neighbours come from
// where the port's must come from; but what is for them is looked up in the table of local
// Pods first, and so goes to the Pod and never to the edge. Questions for them are answered
// on n<x> alone, by proxy entries. Local Pods of a Network talk straight through the edge.
// What the edge itself has to say outside leaves by one Pod's uplink, translated to that
// Pod's address, and so does what came from the node for a Pod elsewhere. Answers to the
// node, by the connection's mark, go back there.

const (
	// portLinks are the edge's ends of uplinks; the rest of the name is the Pod's link's.
	portLinks = "n"

	// podsTable leads to local Pods; ownTables, plus the index of its link, to where a Pod
	// may go.
	podsTable = 100
	ownTables = 1000
	// nodeTable leads to the node: where what came from there is answered.
	nodeTable = 101

	prefPods, prefLocal, prefNode, prefBack, prefFront, prefOwn, prefMain = 10, 20, 30, 40, 50, 100, 32766

	// fromNode marks connections that came from the node; others' marks are below.
	fromNode = 1 << 16
	// Connections that came in by a front have a mark in the bits of frontMask that says by
	// which.
	frontShift = 17
	frontMask  = uint32(0xffffffff >> frontShift << frontShift)
	// maxFronts is how many an edge has.
	maxFronts = 1024

	// reachRate is how many addresses on the link an edge's Pods may begin to talk to, each
	// second, that are no Pods': every one costs an entry of the neighbour table, which is one
	// for all of the machine and which the kernel keeps for seconds though nobody answers.
	reachRate  = 100
	reachBurst = 200
	// reachFor is how long such an address is known after it was reached first, reachSize how
	// many are.
	reachFor  = 30 * time.Second
	reachSize = 4096
)

// uplinkOf is the uplink's end in the edge for a Pod's link.
func uplinkOf(link string) string { return portLinks + link[len(podLinks):] }

func podOf(uplink string) string { return podLinks + uplink[len(portLinks):] }

// outerMAC is that of the node's end: another than the port's, as both are seen by one
// bridge.
func outerMAC(mac net.HardwareAddr) net.HardwareAddr {
	out := slices.Clone(mac)
	if out[0] = 0xfe; mac[0] == 0xfe {
		out[0] = 0xfa
	}
	return out
}

// inUplinkEdge are the sysctls that differ where there are uplinks. The Pod's address on
// an uplink is routed to by another link; what may come in by it is for nftables to say.
var inUplinkEdge = map[string]string{
	"net/ipv4/conf/all/rp_filter":  "0",
	"net/ipv4/conf/all/arp_ignore": "1",
}

// carried are the sets of an edge with uplinks that follow from what is attached:
//
//	pods4, pods6    link . MAC . source a Pod may use
//	ports4, ports6  uplink . the Pod's address
//	owner4, owner6  uplink : the Pod's address that others borrow
//	own4, own6      addresses of Pods here
//	pairs           Pod's link . its uplink
func carried() []set {
	return append(attachedSets(),
		set{name: "ports4", key: []nftables.SetDatatype{tIf, t4}},
		set{name: "ports6", key: []nftables.SetDatatype{tIf, t6}},
		set{name: "owner4", key: []nftables.SetDatatype{tIf}, data: &t4},
		set{name: "owner6", key: []nftables.SetDatatype{tIf}, data: &t6},
		set{name: "own4", key: []nftables.SetDatatype{t4}},
		set{name: "own6", key: []nftables.SetDatatype{t6}},
		set{name: "pairs", key: []nftables.SetDatatype{tIf, tIf}},
	)
}

// addPorts adds what follows from a link's sources to carried's sets.
func addPorts(want map[string]elements, link string, ss []source) {
	uplink := ifname(uplinkOf(link))
	if len(ss) > 0 {
		want["pairs"][key(ifname(link), uplink)] = ""
	}
	for _, s := range ss {
		if s.addr.Is6() && s.addr.IsLinkLocalUnicast() {
			continue
		}
		f := family(s.addr)
		want["ports"+f][key(uplink, s.addr.AsSlice())] = ""
		want["own"+f][key(s.addr.AsSlice())] = ""
		// The lowest, whatever the order.
		if a := key(s.addr.AsSlice()); want["owner"+f][key(uplink)] == "" || a < want["owner"+f][key(uplink)] {
			want["owner"+f][key(uplink)] = a
		}
	}
}

// uplinkRules is the table of an edge with uplinks. Further sets:
//
//	remote4, remote6  addresses on the link that are known: Pods elsewhere, gateways
//	nodes4, nodes6    the nodes, which no Pod reaches
//	seen4, seen6      addresses on the link that somebody began to talk to lately
//	marks             uplink of a front : mark of its connections
func uplinkRules(s Spec, t transit, reserved []netip.Prefix) ruleset {
	r := edgeRules(s, t, netip.Addr{}, netip.Addr{})
	r.sets = append(r.sets, carried()[2:]...)
	r.sets = append(r.sets,
		set{name: "nodes4", key: []nftables.SetDatatype{t4}},
		set{name: "nodes6", key: []nftables.SetDatatype{t6}},
		set{name: "seen4", key: []nftables.SetDatatype{t4}, dynamic: true, size: reachSize, timeout: reachFor},
		set{name: "seen6", key: []nftables.SetDatatype{t6}, dynamic: true, size: reachSize, timeout: reachFor},
		set{name: "marks", key: []nftables.SetDatatype{tIf}, data: &tMark},
	)
	r.sets = append(r.sets, fronts()...)
	uplinks := iif(portLinks + "*")
	neighbours := func(verdict []expr.Any, match ...expr.Any) [][]expr.Any {
		var out [][]expr.Any
		for _, t := range []byte{icmp6NeighbourSolicitation, icmp6NeighbourAdvertisement} {
			out = append(out, rule(match, v6(), l4(unix.IPPROTO_ICMPV6), icmpType(t), verdict))
		}
		return out
	}
	at := func(name string) *chain {
		return &r.chains[slices.IndexFunc(r.chains, func(c chain) bool { return c.name == name })]
	}

	// By its uplink comes what is for the Pod and from elsewhere.
	spoof := at("spoof")
	spoof.rules = [][]expr.Any{rule(iif("lo"), accept()), rule(iif(uplinkName), accept())}
	spoof.rules = append(spoof.rules, neighbours(accept(), uplinks...)...)
	spoof.rules = append(spoof.rules,
		rule(uplinks, v4(), inSet("own4", source4), drop()),
		rule(uplinks, v6(), inSet("own6", source6), drop()))
	for _, p := range nowhere {
		spoof.rules = append(spoof.rules, rule(uplinks, from(p), drop()))
	}
	for _, p := range []netip.Prefix{transit6, overlay6} {
		spoof.rules = append(spoof.rules, rule(uplinks, from(p), drop()))
	}
	for _, a := range s.Local {
		spoof.rules = append(spoof.rules, rule(uplinks, from(host(a)), drop()))
	}
	spoof.rules = append(spoof.rules,
		rule(uplinks, v4(), notInSet("ports4", inLink, dest4), drop()),
		rule(uplinks, v6(), notInSet("ports6", inLink, dest6), drop()),
		rule(uplinks, v4(), l4(unix.IPPROTO_ICMP), icmpType(icmpRedirect), drop()),
		rule(uplinks, v6(), l4(unix.IPPROTO_ICMPV6), icmpType(icmp6RouterAdvertisement), drop()),
		rule(uplinks, v6(), l4(unix.IPPROTO_ICMPV6), icmpType(icmp6Redirect), drop()),
		rule(uplinks, accept()),
		rule(v4(), notInSet("pods4", inLink, ether, source4), drop()),
		rule(v6(), notInSet("pods6", inLink, ether, source6), drop()))

	back := chain{name: "back", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookPrerouting, priority: -140, rules: [][]expr.Any{
		rule(iif(uplinkName), state(ctNew), markConnection(fromNode)),
		rule(iifNot(uplinkName), marked(fromNode), markPacket(fromNode)),
		// What came in by a front leaves by it, whoever answers.
		rule(uplinks, state(ctNew), markFront()),
		rule(markAsFront()),
	}}

	input := at("input")
	input.rules = slices.Insert(input.rules, 2, neighbours(accept(), uplinks...)...)

	limit := uint32(defaultFlows)
	if s.Flows > 0 {
		limit = uint32(s.Flows)
	}
	forward := at("forward")
	forward.rules = neighbours(drop())
	forward.rules = append(forward.rules,
		rule(state(ctEstablished|ctRelated), accept()),
		rule(state(ctInvalid), drop()),
		// From outside to the Pod it is for.
		rule(uplinks, oif(podLinks+"*"), accept()))
	for _, p := range s.Subnets {
		// By a front, and on to a Pod elsewhere.
		forward.rules = append(forward.rules, rule(uplinks, inSet("pairs", inLink, outLink), status(statusDNAT), to(p), accept()))
	}
	forward.rules = append(forward.rules,
		rule(uplinks, drop()),
		// From the node what an address of this edge was translated for.
		rule(iif(uplinkName), oif(uplinkName), drop()),
		rule(iif(uplinkName), status(statusDNAT), accept()),
		rule(iif(uplinkName), drop()),
		// From Pods.
		rule(iifNot(podLinks+"*"), drop()),
		rule(flows("flows", limit), drop()),
		rule(oif(podLinks+"*"), accept()),
		rule(oif(uplinkName), status(statusDNAT), to(host(t.node4)), l4(unix.IPPROTO_TCP), dport(apiPort), accept()),
		rule(oif(uplinkName), status(statusDNAT), to(host(t.node6)), l4(unix.IPPROTO_TCP), dport(apiPort), accept()),
		rule(oifNot(portLinks+"*"), drop()),
		rule(notInSet("pairs", inLink, outLink), drop()))
	for _, p := range append(append(slices.Clone(nowhere), transit6, overlay6), reserved...) {
		forward.rules = append(forward.rules, rule(to(p), drop()))
	}
	for _, p := range s.Subnets {
		l, f := dest4, "4"
		if p.Addr().Is6() {
			l, f = dest6, "6"
		}
		forward.rules = append(forward.rules,
			rule(to(p), inSet("remote"+f, l), accept()),
			rule(to(p), inSet("seen"+f, l), accept()),
			rule(to(p), reaching(), drop()),
			rule(to(p), keep("seen"+f, l)),
			rule(to(p), accept()))
	}
	forward.rules = append(forward.rules,
		rule(v4(), inSet("nodes4", dest4), drop()),
		rule(v6(), inSet("nodes6", dest6), drop()))
	if s.Egress {
		forward.rules = append(forward.rules, rule(accept()))
	} else {
		forward.rules = append(forward.rules, rule(reject()))
	}

	egress := at("egress")
	for _, g := range onePerFamily(s.Gateways) {
		// What the edge dials comes from the gateway, as everywhere, though it is not here.
		here := t.here4
		if g.Is6() {
			here = t.here6
		}
		egress.rules = append(egress.rules, rule(oif(podLinks+"*"), from(host(here)), nat(expr.NATTypeSourceNAT, netip.AddrPortFrom(g, 0))))
	}
	egress.rules = append(egress.rules,
		rule(oif(portLinks+"*"), v4(), notInSet("ports4", outLink, source4), natByMap(expr.NATTypeSourceNAT, "owner4", outLink)),
		rule(oif(portLinks+"*"), v6(), notInSet("ports6", outLink, source6), natByMap(expr.NATTypeSourceNAT, "owner6", outLink)))

	// The carrier would not take it, and nobody should have to rely on that.
	leave := chain{name: "leave", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookPostrouting, priority: 150, rules: [][]expr.Any{
		rule(oifNot(portLinks+"*"), accept()),
		rule(v4(), notInSet("ports4", outLink, source4), drop()),
		rule(from(netip.PrefixFrom(netip.IPv6Unspecified(), 128)), l4(unix.IPPROTO_ICMPV6), icmpType(icmp6MulticastReport), accept()),
		rule(v6(), notInSet("ports6", outLink, source6), drop()),
	}}
	r.chains = append(r.chains, back, leave)
	return r
}

// icmp6MulticastReport says which groups a link is in: bridges listen to it.
const icmp6MulticastReport = 143

// reaching matches what is over the limit.
func reaching() []expr.Any {
	return []expr.Any{&expr.Limit{Type: expr.LimitTypePkts, Rate: reachRate, Unit: expr.LimitTimeSecond, Burst: reachBurst, Over: true}}
}

// keep adds a value to a dynamic set.
func keep(name string, l load) []expr.Any {
	return append(loads([]load{l}), &expr.Dynset{SrcRegKey: reg, SetName: name, Operation: unix.NFT_DYNSET_OP_ADD})
}

func onePerFamily(all []netip.Addr) []netip.Addr {
	var out []netip.Addr
	for _, a := range all {
		if !slices.ContainsFunc(out, func(b netip.Addr) bool { return a.BitLen() == b.BitLen() }) {
			out = append(out, a)
		}
	}
	return out
}

// hasUplinks tells what kind of edge this is.
func (e *Edge) hasUplinks() (bool, error) {
	if e.spec != nil {
		return e.spec.Uplinks, nil
	}
	names, err := e.uplinks()
	return len(names) > 0, err
}

// uplinks are the edge's ends there are.
func (e *Edge) uplinks() ([]netlink.Link, error) {
	links, err := e.nl.LinkList()
	if err != nil {
		return nil, fmt.Errorf("edge %s: %w", e.id, err)
	}
	return slices.DeleteFunc(links, func(l netlink.Link) bool { return !strings.HasPrefix(l.Attrs().Name, portLinks) }), nil
}

// wire makes a Pod's uplink or changes what differs.
func (e *Edge) wire(link, name string, mac net.HardwareAddr, mtu int, addrs []netip.Addr) error {
	m := e.m
	m.node.Lock()
	defer m.node.Unlock()
	inner := uplinkOf(link)
	here, outer, err := e.wireEnds(inner, name)
	if err != nil {
		return err
	}
	if here == nil {
		// What nobody has wired yet leads to the node. (Of those there are Ensure knows.)
		if err := m.shut(e.id, name); err != nil {
			return err
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.HardwareAddr, attrs.MTU = inner, mac, mtu
		v := netlink.NewVeth(attrs)
		v.PeerName, v.PeerHardwareAddr, v.PeerNamespace, v.PeerMTU = name, outerMAC(mac), netlink.NsFd(m.ns.FD()), uint32(mtu)
		if err := e.nl.LinkAdd(v); err != nil {
			if errors.Is(err, unix.EEXIST) {
				err = fmt.Errorf("the node has a link %s already that is not this attachment's: %w", name, errdefs.ErrAlreadyExists)
			}
			return fmt.Errorf("uplink %s: %w", name, err)
		}
		if here, outer, err = e.wireEnds(inner, name); err != nil {
			return err
		}
		if here == nil {
			return fmt.Errorf("uplink %s vanished: %w", name, errdefs.ErrUnavailable)
		}
	}
	if err := setLink(e.nl, here, mac, mtu); err != nil {
		return err
	}
	if err := setLink(m.nl, outer, outerMAC(mac), mtu); err != nil {
		return err
	}
	if err := e.ns.Do(func() error { return setSysctls(innerValues(inner)) }); err != nil {
		return err
	}
	if err := m.ns.Do(func() error { return setSysctls(outerValues(name)) }); err != nil {
		return err
	}
	var own []netip.Prefix
	for _, a := range addrs {
		if a.Is4() || m.ipv6 {
			own = append(own, host(a))
		}
	}
	if err := syncAddresses(e.nl, here, own); err != nil {
		return err
	}
	if err := syncProxies(e.nl, here.Attrs().Index, addrs, m.ipv6); err != nil {
		return err
	}
	up := isUp(here) && isUp(outer)
	if err := setUp(e.nl, here); err != nil {
		return err
	}
	if err := setUp(m.nl, outer); err != nil || up {
		return err
	}
	return settle(e.ns, e.nl, inner)
}

// syncProxies makes a link answer for these addresses and no others.
func syncProxies(h *netlink.Handle, index int, want []netip.Addr, ipv6 bool) error {
	have := map[netip.Addr]bool{}
	for _, f := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		if f == netlink.FAMILY_V6 && !ipv6 {
			continue
		}
		list, err := h.NeighProxyList(index, f)
		if err != nil {
			return fmt.Errorf("proxied addresses: %w", err)
		}
		for _, n := range list {
			a := addr(n.IP)
			if n.LinkIndex != index {
				continue
			}
			have[a] = true
			if !slices.Contains(want, a) {
				if err := h.NeighDel(proxy(index, a)); err != nil && !missing(err) {
					return fmt.Errorf("stop answering for %s: %w", a, err)
				}
			}
		}
	}
	for _, a := range want {
		if have[a] || a.Is6() && !ipv6 {
			continue
		}
		if err := h.NeighSet(proxy(index, a)); err != nil {
			return fmt.Errorf("answer for %s: %w", a, err)
		}
	}
	return nil
}

// wireEnds are an uplink's two ends, nil both if there are none. Half of one, and one under
// another name, is removed; so is one of another Pod's under the name: the port is this
// one's now, and the other's attachment is about to go or has gone.
func (e *Edge) wireEnds(inner, name string) (here, outer netlink.Link, err error) {
	if here, err = linkByName(e.nl, inner); err != nil {
		return nil, nil, err
	}
	if outer, err = linkByName(e.m.nl, name); err != nil {
		return nil, nil, err
	}
	if here != nil && outer != nil && here.Type() == "veth" && outer.Type() == "veth" &&
		here.Attrs().ParentIndex == outer.Attrs().Index && outer.Attrs().ParentIndex == here.Attrs().Index {
		return here, outer, nil
	}
	if here != nil {
		if err := e.nl.LinkDel(here); err != nil && !missing(err) {
			return nil, nil, err
		}
	}
	if outer == nil || outer.Type() != "veth" {
		return nil, nil, nil
	}
	stale, err := e.nl.LinkByIndex(outer.Attrs().ParentIndex)
	if err != nil || !strings.HasPrefix(stale.Attrs().Name, portLinks) || stale.Attrs().ParentIndex != outer.Attrs().Index {
		return nil, nil, nil // another's
	}
	if err := e.nl.LinkDel(stale); err != nil && !missing(err) {
		return nil, nil, err
	}
	return nil, nil, nil
}

// syncUplinks brings the uplinks of the Spec's Pods that are attached up to date, and
// removes those of Pods that are not.
func (e *Edge) syncUplinks(s Spec) error {
	links, err := e.Links()
	if err != nil {
		return err
	}
	have, err := e.uplinks()
	if err != nil {
		return err
	}
	for _, l := range have {
		if slices.Contains(links, podOf(l.Attrs().Name)) || s.front(podOf(l.Attrs().Name)) != nil {
			continue
		}
		if err := e.nl.LinkDel(l); err != nil && !missing(err) {
			return fmt.Errorf("remove uplink %s: %w", l.Attrs().Name, err)
		}
	}
	seen, err := e.survey()
	if err != nil {
		return err
	}
	for _, p := range s.Ports {
		if p.Node != e.m.cfg.Node || p.Link == "" || !slices.Contains(links, p.Link) || seen.inOrder(p, s.MTU) {
			continue
		}
		if err := e.wire(p.Link, p.Uplink, p.MAC, s.MTU, p.Addresses); err != nil {
			return err
		}
	}
	for _, f := range s.Fronts {
		if seen.inOrder(Port{Addresses: f.Addresses, MAC: f.MAC, Link: f.Link, Uplink: f.Uplink}, s.MTU) {
			continue
		}
		if err := e.wire(f.Link, f.Uplink, f.MAC, s.MTU, f.Addresses); err != nil {
			return err
		}
	}
	return nil
}

// survey is what there is of all uplinks, read at once: reading each by itself takes a
// millisecond.
type survey struct {
	ipv6        bool
	here, outer map[string]netlink.Link
	addrs       map[int][]netip.Prefix
	proxied     map[int][]netip.Addr
	// values are sysctls of either namespace, by file.
	valuesHere, valuesOuter map[string]string
}

func (e *Edge) survey() (*survey, error) {
	m := e.m
	m.node.Lock()
	defer m.node.Unlock()
	s := &survey{ipv6: m.ipv6, here: map[string]netlink.Link{}, outer: map[string]netlink.Link{}, addrs: map[int][]netip.Prefix{}, proxied: map[int][]netip.Addr{},
		valuesHere: map[string]string{}, valuesOuter: map[string]string{}}
	have, err := e.uplinks()
	if err != nil {
		return nil, err
	}
	for _, l := range have {
		s.here[l.Attrs().Name] = l
	}
	all, err := m.nl.LinkList()
	if err != nil {
		return nil, fmt.Errorf("node's links: %w", err)
	}
	for _, l := range all {
		s.outer[l.Attrs().Name] = l
	}
	addrs, err := e.nl.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("addresses: %w", err)
	}
	for _, a := range addrs {
		s.addrs[a.LinkIndex] = append(s.addrs[a.LinkIndex], prefix(a.IPNet))
	}
	for _, f := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		if f == netlink.FAMILY_V6 && !m.ipv6 {
			continue
		}
		list, err := e.nl.NeighProxyList(0, f)
		if err != nil {
			return nil, fmt.Errorf("proxied addresses: %w", err)
		}
		for _, n := range list {
			s.proxied[n.LinkIndex] = append(s.proxied[n.LinkIndex], addr(n.IP))
		}
	}
	read := func(into map[string]string, values map[string]string) {
		for name := range values {
			if v, err := sysctl(name); err == nil || strings.HasPrefix(name, "net/ipv6/") {
				into[name] = v
			}
		}
	}
	if err := e.ns.Do(func() error {
		for name := range s.here {
			read(s.valuesHere, innerValues(name))
		}
		return nil
	}); err != nil {
		return nil, err
	}
	return s, m.ns.Do(func() error {
		for _, l := range s.here {
			for name, o := range s.outer {
				if o.Attrs().Index == l.Attrs().ParentIndex {
					read(s.valuesOuter, outerValues(name))
				}
			}
		}
		return nil
	})
}

// inOrder tells whether nothing is to be done for a Port's uplink.
func (s *survey) inOrder(p Port, mtu int) bool {
	inner := uplinkOf(p.Link)
	here, outer := s.here[inner], s.outer[p.Uplink]
	if here == nil || outer == nil || here.Type() != "veth" || outer.Type() != "veth" || !isUp(here) || !isUp(outer) ||
		here.Attrs().ParentIndex != outer.Attrs().Index || outer.Attrs().ParentIndex != here.Attrs().Index ||
		here.Attrs().MTU != mtu || outer.Attrs().MTU != mtu ||
		here.Attrs().HardwareAddr.String() != p.MAC.String() || outer.Attrs().HardwareAddr.String() != outerMAC(p.MAC).String() {
		return false
	}
	var own []netip.Prefix
	var answered []netip.Addr
	for _, a := range p.Addresses {
		if a.Is4() || s.ipv6 {
			own, answered = append(own, host(a)), append(answered, a)
		}
	}
	addrs := slices.DeleteFunc(slices.Clone(s.addrs[here.Attrs().Index]), func(p netip.Prefix) bool { return p.Addr().Is6() && p.Addr().IsLinkLocalUnicast() })
	return same(addrs, own) && same(s.proxied[here.Attrs().Index], answered) && holds(s.valuesHere, innerValues(inner)) && holds(s.valuesOuter, outerValues(p.Uplink))
}

// same tells whether two lists without repetitions have the same members.
func same[T comparable](a, b []T) bool {
	return len(a) == len(b) && !slices.ContainsFunc(a, func(x T) bool { return !slices.Contains(b, x) })
}

func holds(have, want map[string]string) bool {
	for name, v := range want {
		if is, ok := have[name]; !ok || is != v && !(is == "" && strings.HasPrefix(name, "net/ipv6/")) {
			return false
		}
	}
	return true
}

// innerValues are the sysctls of an uplink's end in the edge.
func innerValues(name string) map[string]string {
	return map[string]string{
		"net/ipv4/conf/" + name + "/rp_filter":    "0",
		"net/ipv4/neigh/" + name + "/proxy_delay": "0",
	}
}

// outerValues are those of the node's end: as long as nobody has wired it, the node must
// not take part.
func outerValues(name string) map[string]string {
	return map[string]string{
		"net/ipv4/conf/" + name + "/arp_ignore":   "8",
		"net/ipv6/conf/" + name + "/disable_ipv6": "1",
	}
}

// gatewayOf is the gateway of the subnet an address is in.
func (s Spec) gatewayOf(a netip.Addr) netip.Addr {
	for i, p := range s.Subnets {
		if p.Contains(a) {
			return s.Gateways[i]
		}
	}
	return netip.Addr{}
}

// syncUplinkReach brings routes, rules and neighbours of an edge with uplinks up to date.
func (e *Edge) syncUplinkReach() error {
	s, t := *e.spec, e.transit
	links, err := e.nl.LinkList()
	if err != nil {
		return err
	}
	byName := map[string]netlink.Link{}
	for _, l := range links {
		byName[l.Attrs().Name] = l
	}
	up, ok := byName[uplinkName]
	if !ok {
		return fmt.Errorf("edge %s has no link %s: %w", e.id, uplinkName, errdefs.ErrUnavailable)
	}
	attached, err := e.attached()
	if err != nil {
		return err
	}
	var routes []route
	var neighs []neighbour
	rules := map[int][]lookup{}
	families := []int{netlink.FAMILY_V4}
	if e.m.ipv6 {
		families = append(families, netlink.FAMILY_V6)
	}
	add := func(r route) {
		if r.dst.Addr().Is4() || e.m.ipv6 {
			routes = append(routes, r)
		}
	}
	near := func(n neighbour) {
		if n.ip.Is4() || e.m.ipv6 {
			neighs = append(neighs, n)
		}
	}
	here := func(a netip.Addr) netip.Addr {
		if a.Is4() {
			return t.here4
		}
		return t.here6
	}
	// ways leads from a table out by an uplink, as a Pod with that address; without one
	// nothing in it leads anywhere.
	ways := func(table int, zero netip.Prefix, uplink netlink.Link, a, src netip.Addr) {
		if uplink == nil {
			add(route{table: table, dst: zero, unreachable: true})
			return
		}
		for _, p := range s.Subnets {
			if p.Addr().BitLen() == zero.Addr().BitLen() {
				add(route{table: table, dst: p, link: uplink.Attrs().Index, src: src})
			}
		}
		if g := s.gatewayOf(a); s.Egress && g.IsValid() {
			add(route{table: table, dst: zero, gw: g, link: uplink.Attrs().Index, src: src})
		} else {
			add(route{table: table, dst: zero, unreachable: true})
		}
	}
	for i, f := range families {
		node := netip.PrefixFrom(t.node4, t.node4.BitLen()-1)
		if i == 1 {
			node = netip.PrefixFrom(t.node6, t.node6.BitLen()-1)
		}
		rules[f] = []lookup{
			{pref: prefPods, table: podsTable},
			{pref: prefLocal, table: unix.RT_TABLE_LOCAL},
			{pref: prefNode, to: node, table: unix.RT_TABLE_MAIN},
			{pref: prefBack, mark: fromNode, table: nodeTable},
			{pref: prefMain, table: unix.RT_TABLE_MAIN},
		}
	}
	// Of two with one address the later is the one who has it.
	names := make([]string, 0, len(attached))
	for _, l := range links {
		if len(attached[l.Attrs().Name]) > 0 {
			names = append(names, l.Attrs().Name)
		}
	}
	slices.SortFunc(names, func(a, b string) int { return byName[a].Attrs().Index - byName[b].Attrs().Index })
	zeros := map[bool]netip.Prefix{true: netip.PrefixFrom(netip.IPv4Unspecified(), 0), false: netip.PrefixFrom(netip.IPv6Unspecified(), 0)}
	borrowed := map[bool]bool{}
	for _, name := range names {
		l := byName[name]
		if l == nil || !isUp(l) {
			continue
		}
		uplink := byName[uplinkOf(name)]
		if uplink != nil && !isUp(uplink) {
			uplink = nil
		}
		table := ownTables + l.Attrs().Index
		for _, f := range families {
			rules[f] = append(rules[f], lookup{pref: prefOwn, iif: name, table: table})
		}
		// The lowest address of a family says which gateway, as it does for others' packets.
		first := map[bool]netip.Addr{}
		for _, x := range attached[name] {
			if x.addr.Is6() && x.addr.IsLinkLocalUnicast() {
				continue
			}
			add(route{table: podsTable, dst: host(x.addr), link: l.Attrs().Index, src: here(x.addr)})
			near(neighbour{l.Attrs().Index, x.addr, x.mac})
			if a := first[x.addr.Is4()]; !a.IsValid() || x.addr.Less(a) {
				first[x.addr.Is4()] = x.addr
			}
		}
		for v4, zero := range zeros {
			a := first[v4]
			if !a.IsValid() {
				continue
			}
			ways(table, zero, uplink, a, netip.Addr{})
			if uplink != nil && !borrowed[v4] {
				borrowed[v4] = true
				ways(0, zero, uplink, a, here(a))
			}
		}
	}
	slots := s.slots()
	for _, x := range s.Fronts {
		uplink := byName[uplinkOf(x.Link)]
		if uplink == nil || !isUp(uplink) {
			continue
		}
		table := ownTables + uplink.Attrs().Index
		for _, a := range x.Addresses {
			if a.Is6() && !e.m.ipv6 {
				continue
			}
			f := netlink.FAMILY_V4
			if a.Is6() {
				f = netlink.FAMILY_V6
			}
			rules[f] = append(rules[f],
				lookup{pref: prefFront, mark: slots[x.Link], mask: frontMask, table: table},
				lookup{pref: prefFront, from: host(a), table: table})
			ways(table, zeros[a.Is4()], uplink, a, netip.Addr{})
		}
	}
	for v4, zero := range zeros {
		if !borrowed[v4] {
			ways(0, zero, nil, netip.Addr{}, netip.Addr{})
		}
	}
	for _, a := range []netip.Addr{t.node4, t.node6} {
		add(route{dst: host(a), link: up.Attrs().Index})
		add(route{table: nodeTable, dst: host(a), link: up.Attrs().Index})
		add(route{table: nodeTable, dst: zeros[a.Is4()], gw: a, link: up.Attrs().Index})
	}
	near(neighbour{up.Attrs().Index, t.node4, nodeMAC})
	near(neighbour{up.Attrs().Index, t.node6, nodeMAC})

	have, err := e.nl.NeighList(0, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("neighbours: %w", err)
	}
	if err := changeNeighbours(e.nl, have, neighs); err != nil {
		return err
	}
	// Routes first: a Pod's rule must not lead to a table that is empty, and so on to
	// another's.
	if err := syncRoutes(e.nl, 0, routes); err != nil {
		return err
	}
	for _, f := range families {
		if err := syncRules(e.nl, f, rules[f]); err != nil {
			return err
		}
	}
	return nil
}

// outers are the names of the uplinks' ends on the node.
func (e *Edge) outers() ([]string, error) {
	have, err := e.uplinks()
	if err != nil {
		return nil, err
	}
	var out []string
	for _, l := range have {
		o, err := e.m.nl.LinkByIndex(l.Attrs().ParentIndex)
		if err != nil {
			if missing(err) {
				continue
			}
			return nil, err
		}
		if o.Attrs().ParentIndex == l.Attrs().Index {
			out = append(out, o.Attrs().Name)
		}
	}
	return out, nil
}

// shut makes the node deaf to an uplink before there is one. m.node is held.
func (m *Manager) shut(id, name string) error {
	r := ruleset{table: hostTable, sets: hostRules(Host{}, m.cfg.VXLANPort).sets}
	r.sets = slices.DeleteFunc(slices.Clone(r.sets), func(s set) bool { return s.name != "uplinks" && s.name != "wires" })
	return r.sync(m.ns, func(have map[string]elements) map[string]elements {
		want := map[string]elements{"uplinks": {}, "wires": {}}
		for n := range want {
			for k := range have[n] {
				want[n][k] = ""
			}
		}
		want["uplinks"][key(ifname(nodeLinks+id), ifname(name))] = ""
		want["wires"][key(ifname(name))] = ""
		return want
	})
}

// Announce tells the carrier's layer 2 where a Pod's addresses are: somebody may remember
// who had them before. Call it once the uplink is wired.
func (e *Edge) Announce(ctx context.Context, a Attachment) error {
	if err := a.validate(); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	l, err := linkByName(e.nl, uplinkOf(a.Link))
	if err != nil {
		return err
	}
	if l == nil {
		return fmt.Errorf("edge %s: link %s has no uplink: %w", e.id, a.Link, errdefs.ErrNotFound)
	}
	for _, x := range a.Addresses {
		if x.Is6() && !e.m.ipv6 {
			continue
		}
		if err := gratuitous(e.ns, l, x); err != nil {
			return fmt.Errorf("announce %s: %w", x, err)
		}
	}
	return nil
}

// checkUplink tells what of an uplink is not as it should be.
func (e *Edge) checkUplink(a Attachment) ([]string, error) {
	inner := uplinkOf(a.Link)
	here, err := linkByName(e.nl, inner)
	if err != nil {
		return nil, err
	}
	outer, err := linkByName(e.m.nl, a.Uplink)
	if err != nil {
		return nil, err
	}
	var wrong []string
	switch {
	case here == nil:
		return []string{"uplink " + inner + " is missing in the edge"}, nil
	case outer == nil:
		return []string{"uplink " + a.Uplink + " is missing on the node"}, nil
	case here.Attrs().ParentIndex != outer.Attrs().Index || outer.Attrs().ParentIndex != here.Attrs().Index:
		return []string{inner + " and " + a.Uplink + " are not two ends of one link"}, nil
	}
	if !isUp(here) || !isUp(outer) {
		wrong = append(wrong, "uplink "+a.Uplink+" is down")
	}
	if here.Attrs().HardwareAddr.String() != a.MAC.String() {
		wrong = append(wrong, fmt.Sprintf("uplink %s has MAC %s, not %s", a.Uplink, here.Attrs().HardwareAddr, a.MAC))
	}
	return wrong, nil
}

// unplug removes a Pod's uplink and the rules that its link is named in; the routes go
// with the links or with the next sync.
func (e *Edge) unplug(link string) error {
	l, err := linkByName(e.nl, uplinkOf(link))
	if err != nil {
		return err
	}
	if l != nil {
		if err := e.nl.LinkDel(l); err != nil && !missing(err) {
			return fmt.Errorf("edge %s: remove uplink %s: %w", e.id, l.Attrs().Name, err)
		}
	}
	if e.spec != nil {
		return e.syncUplinkReach()
	}
	return nil
}
