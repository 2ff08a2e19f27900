package edge

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const hostTable = "h8s_host"

// overlayPorts are UDP ports by which overlays are reached, this cluster's and others'.
var overlayPorts = []uint16{4789, 6081, 8472, 8473}

// hostRules is the table of the node's namespace; it only ever judges what comes from or
// goes to an edge, and who may speak to the overlay's port. Sets:
//
//	nodes4, nodes6        the nodes
//	sources4, sources6    link of an edge . source it may use
//	inbound4, inbound6    link of an edge . destination that may come in there from outside
//	external4, external6  destinations of all inbound
//	exported4, exported6  link of an edge . ClusterIP that the node itself may dial there
//	uplinks               link of an edge . the node's end of an uplink of it
//	wires                 all of those ends
func hostRules(h Host, vxlan uint16) ruleset {
	r := ruleset{table: hostTable, sets: []set{
		{name: "nodes4", key: []nftables.SetDatatype{t4}},
		{name: "nodes6", key: []nftables.SetDatatype{t6}},
		{name: "sources4", key: []nftables.SetDatatype{tIf, t4}},
		{name: "sources6", key: []nftables.SetDatatype{tIf, t6}},
		{name: "inbound4", key: []nftables.SetDatatype{tIf, t4}},
		{name: "inbound6", key: []nftables.SetDatatype{tIf, t6}},
		{name: "external4", key: []nftables.SetDatatype{t4}},
		{name: "external6", key: []nftables.SetDatatype{t6}},
		{name: "exported4", key: []nftables.SetDatatype{tIf, t4}},
		{name: "exported6", key: []nftables.SetDatatype{tIf, t6}},
		{name: "uplinks", key: []nftables.SetDatatype{tIf, tIf}},
		{name: "wires", key: []nftables.SetDatatype{tIf}},
	}}
	ports := slices.Clone(overlayPorts)
	if !slices.Contains(ports, vxlan) {
		ports = append(ports, vxlan)
	}
	edges := iif(nodeLinks + "*")

	// What comes in by an uplink is for who wires it, and is the node's only if nobody has.
	wires := chain{name: "wires", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookPrerouting, priority: -450, rules: [][]expr.Any{
		rule(inSet("wires", inLink), drop()),
	}}

	// kube-proxy drops new connections to ClusterIPs it does not know, and tenants' are not
	// for it. What the node exchanges with them is therefore no connection here; that of
	// the edge is, which translates it. TCP only, which is what the API server speaks.
	dial := chain{name: "dial", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookOutput, priority: -300, rules: [][]expr.Any{
		rule(oifNot(nodeLinks+"*"), accept()),
		rule(v4(), l4(unix.IPPROTO_TCP), inSet("exported4", outLink, dest4), untrack()),
		rule(v6(), l4(unix.IPPROTO_TCP), inSet("exported6", outLink, dest6), untrack()),
	}}
	dialled := chain{name: "dialled", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookPrerouting, priority: -300, rules: [][]expr.Any{
		rule(iifNot(nodeLinks+"*"), accept()),
		rule(to(transit4), reply(), inSet("exported4", inLink, source4), local(), untrack()),
		rule(to(transit6), reply(), inSet("exported6", inLink, source6), local(), untrack()),
	}}

	// Destinations are judged before anybody translates them: kube-proxy would take a
	// Pod's packet to a Service of the default network.
	out := chain{name: "from_edges", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookPrerouting, priority: -150, rules: [][]expr.Any{
		rule(iifNot(nodeLinks+"*"), accept()),
		rule(v4(), notInSet("sources4", inLink, source4), drop()),
		rule(v6(), notInSet("sources6", inLink, source6), drop()),
		rule(state(ctEstablished|ctRelated), accept()),
		rule(v4(), state(ctUntracked), inSet("exported4", inLink, source4), accept()),
		rule(v6(), state(ctUntracked), inSet("exported6", inLink, source6), accept()),
		rule(state(ctInvalid), drop()),
		rule(to(transit4), l4(unix.IPPROTO_TCP), dport(apiPort), accept()),
		rule(to(transit6), l4(unix.IPPROTO_TCP), dport(apiPort), accept()),
		rule(v4(), inSet("external4", dest4), accept()),
		rule(v6(), inSet("external6", dest6), accept()),
	}}
	for _, p := range ports {
		out.rules = append(out.rules, rule(l4(unix.IPPROTO_UDP), dport(p), drop()))
	}
	out.rules = append(out.rules,
		rule(v4(), inSet("nodes4", dest4), drop()),
		rule(v6(), inSet("nodes6", dest6), drop()))
	for _, p := range append(append(slices.Clone(nowhere), transit6, overlay6), h.Reserved...) {
		out.rules = append(out.rules, rule(to(p), drop()))
	}
	out.rules = append(out.rules, rule(local(), drop()))

	api := chain{name: "api", kind: nftables.ChainTypeNAT, hook: nftables.ChainHookPrerouting, priority: -110}
	for _, family := range []netip.Prefix{transit4, transit6} {
		var servers []netip.AddrPort
		for _, a := range h.APIServers {
			if a.Addr().BitLen() == family.Addr().BitLen() {
				servers = append(servers, a)
			}
		}
		for i, a := range servers {
			api.rules = append(api.rules, rule(edges, to(family), l4(unix.IPPROTO_TCP), dport(apiPort), oneOf(uint32(len(servers)-i)), nat(expr.NATTypeDestNAT, a)))
		}
	}

	input := chain{name: "input", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookInput, rules: [][]expr.Any{
		rule(iif("lo"), accept()),
		rule(iifNot(nodeLinks+"*"), v4(), l4(unix.IPPROTO_UDP), dport(vxlan), notInSet("nodes4", source4), drop()),
		rule(iifNot(nodeLinks+"*"), v6(), l4(unix.IPPROTO_UDP), dport(vxlan), notInSet("nodes6", source6), drop()),
		rule(iifNot(nodeLinks+"*"), accept()),
		rule(state(ctEstablished|ctRelated), accept()),
		rule(v4(), state(ctUntracked), inSet("exported4", inLink, source4), accept()),
		rule(v6(), state(ctUntracked), inSet("exported6", inLink, source6), accept()),
	}}
	for _, a := range h.APIServers {
		input.rules = append(input.rules, rule(status(statusDNAT), to(host(a.Addr())), l4(unix.IPPROTO_TCP), dport(a.Port()), accept()))
	}
	input.rules = append(input.rules, rule(drop()))

	forward := chain{name: "forward", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookForward, rules: [][]expr.Any{
		rule(iifNot(nodeLinks+"*"), oifNot(nodeLinks+"*"), accept()),
		rule(state(ctEstablished|ctRelated), accept()),
		rule(state(ctInvalid), drop()),
		rule(oif(nodeLinks+"*"), v4(), inSet("inbound4", outLink, dest4), accept()),
		rule(oif(nodeLinks+"*"), v6(), inSet("inbound6", outLink, dest6), accept()),
		rule(oif(nodeLinks+"*"), drop()),
	}}
	// Again after translation, whoever did it: no edge reaches a node but for the API.
	for _, a := range h.APIServers {
		forward.rules = append(forward.rules, rule(status(statusDNAT), to(host(a.Addr())), l4(unix.IPPROTO_TCP), dport(a.Port()), accept()))
	}
	forward.rules = append(forward.rules,
		rule(v4(), inSet("nodes4", dest4), drop()),
		rule(v6(), inSet("nodes6", dest6), drop()))
	for _, p := range ports {
		forward.rules = append(forward.rules, rule(l4(unix.IPPROTO_UDP), dport(p), drop()))
	}

	snat := chain{name: "egress", kind: nftables.ChainTypeNAT, hook: nftables.ChainHookPostrouting, priority: 95, rules: [][]expr.Any{
		// Only theirs: what the node's bridges pass on may be seen here, too.
		rule(edges, oifNot(nodeLinks+"*"), from(transit4), []expr.Any{&expr.Masq{}}),
		rule(edges, oifNot(nodeLinks+"*"), from(transit6), []expr.Any{&expr.Masq{}}),
		// In an edge the nodes' addresses are those of the overlay.
		rule(oif(nodeLinks+"*"), v4(), inSet("nodes4", source4), []expr.Any{&expr.Masq{}}),
		rule(oif(nodeLinks+"*"), v6(), inSet("nodes6", source6), []expr.Any{&expr.Masq{}}),
	}}
	r.chains = []chain{wires, dial, dialled, out, api, input, forward, snat}
	return r
}

// SetHost applies what the node's own namespace needs; level-triggered. Edges that exist
// learn of changed nodes, too.
func (m *Manager) SetHost(ctx context.Context, h Host) error {
	for _, a := range h.APIServers {
		if !a.IsValid() || a.Port() == 0 {
			return invalid("API server %s: not an address with a port", a)
		}
	}
	for _, a := range h.Nodes {
		if !a.IsValid() || a.Is4In6() {
			return invalid("node address %s", a)
		}
	}
	for _, p := range h.Reserved {
		if !p.IsValid() {
			return invalid("reserved range %s", p)
		}
	}
	for _, a := range h.Announced {
		if !a.IsValid() || a.Is4In6() || a.Zone() != "" {
			return invalid("announced address %s", a)
		}
	}
	h = Host{Nodes: slices.Clone(h.Nodes), APIServers: slices.Clone(h.APIServers), Reserved: slices.Clone(h.Reserved), Announced: slices.Clone(h.Announced)}
	if !slices.Contains(h.Nodes, m.cfg.Node) {
		h.Nodes = append(h.Nodes, m.cfg.Node)
	}
	slices.SortFunc(h.Nodes, netip.Addr.Compare)
	h.Nodes = slices.Compact(h.Nodes)

	m.node.Lock()
	changed := !slices.Equal(m.host.Nodes, h.Nodes) || !slices.Equal(m.host.Reserved, h.Reserved)
	m.host, m.known = h, true
	err := m.prepareNode()
	if err == nil {
		err = m.syncHost("", nil)
	}
	if err == nil {
		err = m.answer(h.Announced)
	}
	m.node.Unlock()
	if err != nil || !changed {
		return err
	}
	m.mu.Lock()
	edges := make([]*Edge, 0, len(m.edges))
	for _, e := range m.edges {
		edges = append(edges, e)
	}
	m.mu.Unlock()
	var errs []error
	for _, e := range edges {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		e.mu.Lock()
		if e.spec != nil && !e.gone {
			errs = append(errs, e.ensure(ctx, *e.spec))
		}
		e.mu.Unlock()
	}
	return errors.Join(errs...)
}

// prepareNode makes the node forward. m.node is held.
func (m *Manager) prepareNode() error {
	fabric, err := m.fabric()
	if err != nil {
		return err
	}
	return m.ns.Do(func() error {
		if err := setSysctl("net/ipv4/ip_forward", "1"); err != nil {
			return err
		}
		if !m.ipv6 {
			return nil
		}
		// A node that forwards ignores router advertisements unless told otherwise.
		if v, err := sysctl("net/ipv6/conf/" + fabric.Attrs().Name + "/accept_ra"); err == nil && v == "1" {
			if err := setSysctl("net/ipv6/conf/"+fabric.Attrs().Name+"/accept_ra", "2"); err != nil {
				return err
			}
		}
		return setSysctl("net/ipv6/conf/all/forwarding", "1")
	})
}

// fabric is the link that holds the node's address.
func (m *Manager) fabric() (netlink.Link, error) {
	addrs, err := m.nl.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("node's addresses: %w", err)
	}
	for _, a := range addrs {
		if ip, ok := netip.AddrFromSlice(a.IP); ok && ip.Unmap() == m.cfg.Node {
			return m.nl.LinkByIndex(a.LinkIndex)
		}
	}
	return nil, fmt.Errorf("node address %s is on no link of the node: %w", m.cfg.Node, errdefs.ErrFailedPrecondition)
}

// doors are an edge's elements of the node's table.
type doors struct {
	sources, inbound, exported []netip.Addr
	uplinks                    []string
}

// syncHost brings the node's table up to date, with these elements for the edge id, none
// if d is nil. Elements of links without an edge are removed. m.node is held.
func (m *Manager) syncHost(id string, d *doors) error {
	ids, err := m.List()
	if err != nil {
		return err
	}
	live := map[string]bool{}
	for _, x := range ids {
		live[nodeLinks+x] = x != id
	}
	nodes := map[string]elements{"nodes4": {}, "nodes6": {}}
	all := m.host.Nodes
	if !slices.Contains(all, m.cfg.Node) {
		all = append(slices.Clone(all), m.cfg.Node)
	}
	for _, a := range all {
		nodes["nodes"+family(a)][key(a.AsSlice())] = ""
	}
	rules := hostRules(m.host, m.cfg.VXLANPort)
	if !m.known {
		rules.chains = nil // a former process' rules stand until we know better
	}
	return rules.sync(m.ns, func(have map[string]elements) map[string]elements {
		want := map[string]elements{"external4": {}, "external6": {}, "wires": {}}
		if m.known {
			want["nodes4"], want["nodes6"] = nodes["nodes4"], nodes["nodes6"]
		}
		for _, name := range []string{"sources4", "sources6", "inbound4", "inbound6", "exported4", "exported6", "uplinks"} {
			e := elements{}
			for k := range have[name] {
				if live[strings.TrimRight(k[:unix.IFNAMSIZ], "\x00")] {
					e[k] = ""
				}
			}
			want[name] = e
		}
		if d != nil {
			link := ifname(nodeLinks + id)
			for _, a := range d.sources {
				want["sources"+family(a)][key(link, a.AsSlice())] = ""
			}
			for _, a := range d.inbound {
				want["inbound"+family(a)][key(link, a.AsSlice())] = ""
			}
			for _, a := range d.exported {
				want["exported"+family(a)][key(link, a.AsSlice())] = ""
			}
			for _, name := range d.uplinks {
				want["uplinks"][key(link, ifname(name))] = ""
			}
		}
		for k := range want["uplinks"] {
			want["wires"][k[unix.IFNAMSIZ:]] = ""
		}
		for _, f := range []string{"4", "6"} {
			for k := range want["inbound"+f] {
				want["external"+f][k[unix.IFNAMSIZ:]] = ""
			}
		}
		return want
	})
}

func family(a netip.Addr) string {
	if a.Is4() {
		return "4"
	}
	return "6"
}

// transitOf is the uplink an edge has, by the address of either end.
func (m *Manager) transitOf(e *Edge) (transit, bool) {
	m.node.Lock()
	defer m.node.Unlock()
	for _, x := range []struct {
		h    *netlink.Handle
		name string
	}{{m.nl, nodeLinks + e.id}, {e.nl, uplinkName}} {
		l, err := x.h.LinkByName(x.name)
		if err != nil {
			continue
		}
		addrs, err := x.h.AddrList(l, netlink.FAMILY_V4)
		if err != nil {
			continue
		}
		for _, a := range addrs {
			if i, ok := transitIndex(addr(a.IP)); ok {
				m.taken[i] = e.id
				return transitAt(i), true
			}
		}
	}
	return transit{}, false
}

// takeTransit finds an uplink nobody has.
func (m *Manager) takeTransit(id string) (transit, error) {
	m.node.Lock()
	defer m.node.Unlock()
	addrs, err := m.nl.AddrList(nil, netlink.FAMILY_V4)
	if err != nil {
		return transit{}, fmt.Errorf("node's addresses: %w", err)
	}
	used := map[int]bool{}
	for _, a := range addrs {
		if i, ok := transitIndex(addr(a.IP)); ok {
			used[i] = true
		}
	}
	for n := range transits {
		i := (transitStart(id) + n) % transits
		if owner, ok := m.taken[i]; !used[i] && (!ok || owner == id) {
			m.taken[i] = id
			return transitAt(i), nil
		}
	}
	return transit{}, fmt.Errorf("all %s addresses for uplinks are taken: %w", transit4, errdefs.ErrResourceExhausted)
}

// uplink makes the link between node and edge.
func (e *Edge) uplink() error {
	m := e.m
	m.node.Lock()
	defer m.node.Unlock()
	name := nodeLinks + e.id
	node, err := m.nl.LinkByName(name)
	here, err2 := e.nl.LinkByName(uplinkName)
	if err != nil && !missing(err) || err2 != nil && !missing(err2) {
		return errors.Join(err, err2)
	}
	if (err != nil) != (err2 != nil) || err == nil && node.Attrs().ParentIndex != here.Attrs().Index {
		// One end was replaced or moved away.
		for _, x := range []struct {
			h *netlink.Handle
			l netlink.Link
		}{{m.nl, node}, {e.nl, here}} {
			if x.l == nil {
				continue
			}
			if err := x.h.LinkDel(x.l); err != nil && !missing(err) {
				return err
			}
		}
		err = unix.ENODEV
	}
	fabric, ferr := m.fabric()
	if ferr != nil {
		return ferr
	}
	mtu := fabric.Attrs().MTU
	if err != nil {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.HardwareAddr, attrs.MTU = name, nodeMAC, mtu
		v := netlink.NewVeth(attrs)
		v.PeerName, v.PeerHardwareAddr, v.PeerNamespace, v.PeerMTU = uplinkName, uplinkMAC, netlink.NsFd(e.ns.FD()), uint32(mtu)
		if err := m.nl.LinkAdd(v); err != nil {
			return fmt.Errorf("make %s: %w", name, err)
		}
		if node, err = m.nl.LinkByName(name); err != nil {
			return err
		}
		if here, err = e.nl.LinkByName(uplinkName); err != nil {
			return err
		}
	}
	err = m.ns.Do(func() error {
		return setSysctls(map[string]string{
			"net/ipv4/conf/" + name + "/forwarding":       "1",
			"net/ipv4/conf/" + name + "/rp_filter":        "1",
			"net/ipv4/conf/" + name + "/send_redirects":   "0",
			"net/ipv4/conf/" + name + "/arp_ignore":       "1",
			"net/ipv6/conf/" + name + "/disable_ipv6":     "0",
			"net/ipv6/conf/" + name + "/accept_ra":        "0",
			"net/ipv6/conf/" + name + "/addr_gen_mode":    "1",
			"net/ipv6/conf/" + name + "/accept_redirects": "0",
		})
	})
	if err != nil {
		return err
	}
	t := e.transit
	for _, x := range []struct {
		h          *netlink.Handle
		l          netlink.Link
		mac, other net.HardwareAddr
		here, peer [2]netip.Addr
	}{
		{m.nl, node, nodeMAC, uplinkMAC, [2]netip.Addr{t.node4, t.node6}, [2]netip.Addr{t.here4, t.here6}},
		{e.nl, here, uplinkMAC, nodeMAC, [2]netip.Addr{t.here4, t.here6}, [2]netip.Addr{t.node4, t.node6}},
	} {
		if err := setLink(x.h, x.l, x.mac, mtu); err != nil {
			return err
		}
		var want []netip.Prefix
		var neighs []neighbour
		for i := range x.here {
			if i == 1 && !m.ipv6 {
				continue
			}
			want = append(want, netip.PrefixFrom(x.here[i], x.here[i].BitLen()-1))
			neighs = append(neighs, neighbour{link: x.l.Attrs().Index, ip: x.peer[i], mac: x.other})
		}
		if err := syncAddresses(x.h, x.l, want); err != nil {
			return err
		}
		if err := setUp(x.h, x.l); err != nil {
			return err
		}
		if err := syncNeighbours(x.h, x.l.Attrs().Index, neighs); err != nil {
			return err
		}
	}
	return settle(e.ns, e.nl, uplinkName)
}

// expose makes the node route and announce what leads to the edge.
func (e *Edge) expose(s Spec) error {
	m := e.m
	m.node.Lock()
	defer m.node.Unlock()
	link, err := m.nl.LinkByName(nodeLinks + e.id)
	if err != nil {
		return err
	}
	t := e.transit
	d := &doors{sources: []netip.Addr{t.here4, t.here6}}
	var want []route
	via := func(p netip.Prefix) {
		gw := t.here4
		if p.Addr().Is6() {
			gw = t.here6
		}
		if p.Addr().Is4() || m.ipv6 {
			want = append(want, route{dst: p, gw: gw, link: link.Attrs().Index})
		}
	}
	want = append(want, route{dst: host(t.here4), link: link.Attrs().Index})
	if m.ipv6 {
		want = append(want, route{dst: host(t.here6), link: link.Attrs().Index})
	}
	announce := map[netip.Addr]bool{}
	for _, x := range s.External {
		if x.Target.IsValid() && !x.Announce {
			continue // another node's
		}
		via(host(x.Address))
		d.inbound = append(d.inbound, x.Address)
		d.sources = append(d.sources, x.Address)
		if x.Announce {
			announce[x.Address] = true
		}
	}
	for _, a := range s.Exported {
		via(host(a))
		d.sources = append(d.sources, a)
		d.exported = append(d.exported, a)
	}
	if s.Routed {
		for _, p := range s.Ports {
			for _, a := range p.Addresses {
				via(host(a))
				d.sources = append(d.sources, a)
			}
		}
	}
	if d.uplinks, err = e.outers(); err != nil {
		return err
	}
	before, err := m.inbound(e.id)
	if err != nil {
		return err
	}
	if err := m.syncHost(e.id, d); err != nil {
		return err
	}
	if err := syncRoutes(m.nl, link.Attrs().Index, want); err != nil {
		return err
	}
	// Their old owner does not go on under addresses that may be another's next.
	var lost []source
	for _, a := range before {
		if !slices.Contains(d.inbound, a) {
			lost = append(lost, source{addr: a})
		}
	}
	return errors.Join(m.announce(before, announce), e.forgetFlows(lost))
}

// inbound are an edge's addresses from outside as the node's table has them.
func (m *Manager) inbound(id string) ([]netip.Addr, error) {
	var out []netip.Addr
	c, err := openNFT(m.ns)
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.CloseLasting() }()
	r := ruleset{table: hostTable, sets: hostRules(Host{}, m.cfg.VXLANPort).sets}
	have, err := r.read(m.ns, c)
	if err != nil {
		return nil, err
	}
	for _, f := range []string{"4", "6"} {
		for k := range have.elements["inbound"+f] {
			if strings.TrimRight(k[:unix.IFNAMSIZ], "\x00") == nodeLinks+id {
				if a, ok := netip.AddrFromSlice([]byte(k[unix.IFNAMSIZ:])); ok {
					out = append(out, a)
				}
			}
		}
	}
	return out, nil
}

// announce answers for the addresses in want on the fabric and no longer for the others
// of before. m.node is held.
func (m *Manager) announce(before []netip.Addr, want map[netip.Addr]bool) error {
	if len(before) == 0 && len(want) == 0 {
		return nil
	}
	fabric, err := m.fabric()
	if err != nil {
		return err
	}
	index := fabric.Attrs().Index
	have := map[netip.Addr]bool{}
	for _, f := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		if f == netlink.FAMILY_V6 && !m.ipv6 {
			continue
		}
		list, err := m.nl.NeighProxyList(index, f)
		if err != nil {
			return fmt.Errorf("proxied addresses: %w", err)
		}
		for _, n := range list {
			if a, ok := netip.AddrFromSlice(n.IP); ok && n.LinkIndex == index {
				have[a.Unmap()] = true
			}
		}
	}
	for _, a := range before {
		if have[a] && !want[a] {
			if err := m.nl.NeighDel(proxy(index, a)); err != nil && !missing(err) {
				return fmt.Errorf("stop answering for %s: %w", a, err)
			}
		}
	}
	var errs []error
	for a := range want {
		if have[a] {
			continue
		}
		if a.Is6() {
			if err := m.ns.Do(func() error {
				return setSysctl("net/ipv6/conf/"+fabric.Attrs().Name+"/proxy_ndp", "1")
			}); err != nil {
				return err
			}
		}
		if err := m.nl.NeighSet(proxy(index, a)); err != nil {
			return fmt.Errorf("answer for %s: %w", a, err)
		}
		// Others may still know where it was.
		if err := gratuitous(m.ns, fabric, a); err != nil {
			errs = append(errs, fmt.Errorf("announce %s: %w", a, err))
		}
	}
	return errors.Join(errs...)
}

func proxy(index int, a netip.Addr) *netlink.Neigh {
	f := netlink.FAMILY_V4
	if a.Is6() {
		f = netlink.FAMILY_V6
	}
	return &netlink.Neigh{LinkIndex: index, Family: f, Flags: netlink.NTF_PROXY, IP: a.AsSlice()}
}

// forget removes what the node has of an edge.
func (m *Manager) forget(id string) error {
	m.node.Lock()
	defer m.node.Unlock()
	before, err := m.inbound(id)
	if err != nil {
		return err
	}
	if err := m.announce(before, nil); err != nil && !errdefs.IsFailedPrecondition(err) {
		return err
	}
	if l, err := m.nl.LinkByName(nodeLinks + id); err == nil {
		if err := m.nl.LinkDel(l); err != nil && !missing(err) {
			return fmt.Errorf("remove %s: %w", l.Attrs().Name, err)
		}
	} else if !missing(err) {
		return err
	}
	for i, owner := range m.taken {
		if owner == id {
			delete(m.taken, i)
		}
	}
	return m.syncHost(id, nil)
}

// RemoveHost removes the node's table, for a node that leaves; edges are removed by Remove.
func (m *Manager) RemoveHost() error {
	m.node.Lock()
	defer m.node.Unlock()
	return errors.Join(m.answer(nil), removeTable(m.ns, hostTable))
}
