package edge

import (
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

const (
	edgeTable = "h8s_edge"
	// defaultFlows is how many connections one link may have at once: the table is bounded
	// for all of the machine together.
	defaultFlows = 16384
	// maxLinks is how many links are counted: some times what a node's Pods can have, as the
	// kernel forgets those that are gone only after a while. It makes buckets for all of them
	// at once; 65535 would take two megabytes of every edge. Its garbage collection takes
	// elements without connections out about a second later, though nothing has a time-out:
	// what is in the set is never compared or written.
	maxLinks = 4096
)

var (
	linkLocal4 = netip.MustParsePrefix("169.254.0.0/16")
	linkLocal6 = netip.MustParsePrefix("fe80::/10")
	// nowhere are destinations that are never forwarded.
	nowhere = []netip.Prefix{
		netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("127.0.0.0/8"), linkLocal4,
		netip.MustParsePrefix("224.0.0.0/3"), linkLocal6, netip.MustParsePrefix("ff00::/8"),
		netip.MustParsePrefix("::/128"), netip.MustParsePrefix("::1/128"),
	}
)

// ICMP types that have nothing to do on a Pod's link.
const (
	icmpRedirect, icmpRouterAdvertisement             = 5, 9
	icmp6RouterSolicitation, icmp6RouterAdvertisement = 133, 134
	icmp6NeighbourSolicitation                        = 135
	icmp6NeighbourAdvertisement, icmp6Redirect        = 136, 137
	icmpEcho, icmp6Echo                               = 8, 128
)

// attachedSets are those that Attach and Detach write.
func attachedSets() []set {
	return []set{
		{name: "pods4", key: []nftables.SetDatatype{tIf, tEther, t4}},
		{name: "pods6", key: []nftables.SetDatatype{tIf, tEther, t6}},
	}
}

// edgeRules is the table of an edge. Nothing passes that no rule lets pass. Sets:
//
//	pods4, pods6      link . MAC . source a Pod may use
//	remote4, remote6  sources that may come in from the overlay
//	local4, local6    gateways and the edge's own services
//	dns4, dns6        the services alone
//	inbound4, ...6    destinations that may come in from the node, if translated
//	floating4, ...6   address from outside : Pod's, and the other way round
func edgeRules(s Spec, t transit, overlay4, overlay6 netip.Addr) ruleset {
	limit := uint32(defaultFlows)
	if s.Flows > 0 {
		limit = uint32(s.Flows)
	}
	r := ruleset{table: edgeTable, sets: append(attachedSets(), []set{
		{name: "remote4", key: []nftables.SetDatatype{t4}},
		{name: "remote6", key: []nftables.SetDatatype{t6}},
		{name: "local4", key: []nftables.SetDatatype{t4}},
		{name: "local6", key: []nftables.SetDatatype{t6}},
		{name: "dns4", key: []nftables.SetDatatype{t4}},
		{name: "dns6", key: []nftables.SetDatatype{t6}},
		{name: "inbound4", key: []nftables.SetDatatype{t4}},
		{name: "inbound6", key: []nftables.SetDatatype{t6}},
		{name: "floating4", key: []nftables.SetDatatype{t4}, data: &t4},
		{name: "floating6", key: []nftables.SetDatatype{t6}, data: &t6},
		{name: "floated4", key: []nftables.SetDatatype{t4}, data: &t4},
		{name: "floated6", key: []nftables.SetDatatype{t6}, data: &t6},
		{name: "flows", key: []nftables.SetDatatype{tIf}, dynamic: true, size: maxLinks},
	}...)}

	// Before defragmentation: every fragment shows its own source.
	spoof := chain{name: "spoof", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookPrerouting, priority: -450, rules: [][]expr.Any{
		rule(iif("lo"), accept()),
		rule(iif(uplinkName), accept()),
		rule(iif(overlayLinks+"*"), v4(), notInSet("remote4", source4), drop()),
		rule(iif(overlayLinks+"*"), v6(), notInSet("remote6", source6), drop()),
		rule(iif(overlayLinks+"*"), accept()),
		rule(v4(), notInSet("pods4", inLink, ether, source4), drop()),
		rule(v6(), notInSet("pods6", inLink, ether, source6), drop()),
	}}
	pods := chain{name: "pods", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookPrerouting, priority: -300, rules: [][]expr.Any{
		rule(iifNot(podLinks+"*"), accept()),
	}}
	for _, t := range []byte{icmp6RouterSolicitation, icmp6RouterAdvertisement, icmp6Redirect} {
		pods.rules = append(pods.rules, rule(v6(), l4(unix.IPPROTO_ICMPV6), icmpType(t), drop()))
	}
	for _, t := range []byte{icmpRedirect, icmpRouterAdvertisement} {
		pods.rules = append(pods.rules, rule(v4(), l4(unix.IPPROTO_ICMP), icmpType(t), drop()))
	}
	for _, t := range []byte{icmp6NeighbourSolicitation, icmp6NeighbourAdvertisement} {
		pods.rules = append(pods.rules, rule(v6(), l4(unix.IPPROTO_ICMPV6), icmpType(t), accept()))
	}
	for _, p := range []uint16{67, 68, 546, 547} { // DHCP
		pods.rules = append(pods.rules, rule(l4(unix.IPPROTO_UDP), dport(p), drop()))
	}
	pods.rules = append(pods.rules,
		rule(from(linkLocal6), drop()))

	// From the node, before translation: what may come in at all.
	doors := chain{name: "doors", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookPrerouting, priority: -150, rules: [][]expr.Any{
		rule(iifNot(uplinkName), accept()),
		rule(state(ctEstablished|ctRelated), accept()),
		// An address may have been another's: what is left of the old owner's connections is
		// not for the new one, and whoever still has them should know.
		rule(v4(), inSet("inbound4", dest4), midway(), reset()),
		rule(v6(), inSet("inbound6", dest6), midway(), reset()),
		rule(v4(), inSet("inbound4", dest4), accept()),
		rule(v6(), inSet("inbound6", dest6), accept()),
	}}
	if s.Routed {
		for _, p := range s.Subnets {
			doors.rules = append(doors.rules, rule(to(p), accept()))
		}
	}
	doors.rules = append(doors.rules, rule(drop()))

	dnat := chain{name: "floating_in", kind: nftables.ChainTypeNAT, hook: nftables.ChainHookPrerouting, priority: -110, rules: [][]expr.Any{
		rule(v4(), natByMap(expr.NATTypeDestNAT, "floating4", dest4)),
		rule(v6(), natByMap(expr.NATTypeDestNAT, "floating6", dest6)),
	}}

	input := chain{name: "input", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookInput, drop: true, rules: [][]expr.Any{
		rule(state(ctEstablished|ctRelated), accept()),
		rule(iif("lo"), accept()),
		rule(iifNot(podLinks+"*"), drop()),
		rule(v6(), l4(unix.IPPROTO_ICMPV6), icmpType(icmp6NeighbourSolicitation), accept()),
		rule(v6(), l4(unix.IPPROTO_ICMPV6), icmpType(icmp6NeighbourAdvertisement), accept()),
		rule(flows("flows", limit), drop()),
		rule(v4(), l4(unix.IPPROTO_ICMP), icmpType(icmpEcho), inSet("local4", dest4), accept()),
		rule(v6(), l4(unix.IPPROTO_ICMPV6), icmpType(icmp6Echo), inSet("local6", dest6), accept()),
	}}
	for _, proto := range []byte{unix.IPPROTO_UDP, unix.IPPROTO_TCP} {
		input.rules = append(input.rules,
			rule(v4(), l4(proto), dport(53), inSet("dns4", dest4), accept()),
			rule(v6(), l4(proto), dport(53), inSet("dns6", dest6), accept()))
	}
	input.rules = append(input.rules, rule(drop()))

	mss := chain{name: "mss", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookForward, priority: -150, rules: [][]expr.Any{
		rule(v4(), clamp(uint16(s.MTU-40))),
		rule(v6(), clamp(uint16(s.MTU-60))),
	}}

	forward := chain{name: "forward", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookForward, drop: true, rules: [][]expr.Any{
		rule(v6(), l4(unix.IPPROTO_ICMPV6), icmpType(icmp6NeighbourSolicitation), drop()),
		rule(v6(), l4(unix.IPPROTO_ICMPV6), icmpType(icmp6NeighbourAdvertisement), drop()),
		rule(state(ctEstablished|ctRelated), accept()),
		rule(state(ctInvalid), drop()),
		// From the overlay to Pods here, and nowhere else.
		rule(iif(overlayLinks+"*"), oif(podLinks+"*"), accept()),
		rule(iif(overlayLinks+"*"), drop()),
		// From the node what an address of this edge was translated for.
		rule(iif(uplinkName), oif(uplinkName), drop()),
		rule(iif(uplinkName), status(statusDNAT), accept()),
	}}
	if s.Routed {
		for _, p := range s.Subnets {
			forward.rules = append(forward.rules, rule(iif(uplinkName), to(p), accept()))
		}
	}
	forward.rules = append(forward.rules,
		rule(iif(uplinkName), drop()),
		// From Pods.
		rule(iifNot(podLinks+"*"), drop()),
		rule(flows("flows", limit), drop()),
		rule(oif(podLinks+"*"), accept()),
		rule(oif(overlayLinks+"*"), accept()),
		rule(oifNot(uplinkName), drop()),
		rule(status(statusDNAT), to(host(t.node4)), l4(unix.IPPROTO_TCP), dport(apiPort), accept()),
		rule(status(statusDNAT), to(host(t.node6)), l4(unix.IPPROTO_TCP), dport(apiPort), accept()))
	for _, p := range nowhere {
		forward.rules = append(forward.rules, rule(to(p), drop()))
	}
	if s.Egress {
		forward.rules = append(forward.rules, rule(accept()))
	} else {
		forward.rules = append(forward.rules, rule(reject()))
	}

	snat := chain{name: "egress", kind: nftables.ChainTypeNAT, hook: nftables.ChainHookPostrouting, priority: 100, rules: [][]expr.Any{
		rule(oif(uplinkName), to(host(t.node4)), nat(expr.NATTypeSourceNAT, netip.AddrPortFrom(t.here4, 0))),
		rule(oif(uplinkName), to(host(t.node6)), nat(expr.NATTypeSourceNAT, netip.AddrPortFrom(t.here6, 0))),
		rule(oif(uplinkName), v4(), natByMap(expr.NATTypeSourceNAT, "floated4", source4)),
		rule(oif(uplinkName), v6(), natByMap(expr.NATTypeSourceNAT, "floated6", source6)),
		rule(oif(uplinkName), v4(), nat(expr.NATTypeSourceNAT, netip.AddrPortFrom(t.here4, 0))),
		rule(oif(uplinkName), v6(), nat(expr.NATTypeSourceNAT, netip.AddrPortFrom(t.here6, 0))),
	}}
	// What others know only this node's overlay address for.
	if overlay4.IsValid() {
		snat.rules = append(snat.rules, rule(iif(uplinkName), oif(overlayLinks+"*"), v4(), nat(expr.NATTypeSourceNAT, netip.AddrPortFrom(overlay4, 0))))
	}
	if overlay6.IsValid() {
		snat.rules = append(snat.rules, rule(iif(uplinkName), oif(overlayLinks+"*"), v6(), nat(expr.NATTypeSourceNAT, netip.AddrPortFrom(overlay6, 0))))
	}

	r.chains = []chain{spoof, pods, doors, dnat, input, mss, forward, snat}
	return r
}
