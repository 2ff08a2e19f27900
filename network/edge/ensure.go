package edge

import (
	"context"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/containerd/log"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// inEdge are an edge's sysctls; links made later inherit the defaults.
var inEdge = map[string]string{
	"net/ipv4/ip_forward":                       "1",
	"net/ipv4/conf/all/rp_filter":               "1",
	"net/ipv4/conf/default/rp_filter":           "1",
	"net/ipv4/conf/all/accept_redirects":        "0",
	"net/ipv4/conf/default/accept_redirects":    "0",
	"net/ipv4/conf/all/send_redirects":          "0",
	"net/ipv4/conf/default/send_redirects":      "0",
	"net/ipv4/conf/all/accept_source_route":     "0",
	"net/ipv4/conf/default/accept_source_route": "0",
	"net/ipv4/conf/all/arp_announce":            "2",
	"net/ipv4/conf/default/arp_accept":          "0",
	"net/ipv4/conf/all/route_localnet":          "0",
	"net/ipv4/icmp_errors_use_inbound_ifaddr":   "0",
	"net/ipv6/conf/all/disable_ipv6":            "0",
	"net/ipv6/conf/default/disable_ipv6":        "0",
	"net/ipv6/conf/all/forwarding":              "1",
	"net/ipv6/conf/default/forwarding":          "1",
	"net/ipv6/conf/all/accept_ra":               "0",
	"net/ipv6/conf/default/accept_ra":           "0",
	"net/ipv6/conf/all/accept_redirects":        "0",
	"net/ipv6/conf/default/accept_redirects":    "0",
	"net/ipv6/conf/default/accept_dad":          "0",
	"net/ipv6/conf/default/addr_gen_mode":       "1",
	"net/ipv6/conf/all/proxy_ndp":               "1",
	"net/ipv6/conf/default/proxy_ndp":           "1",
}

// ensure does the work of Ensure; e.mu is held.
func (e *Edge) ensure(ctx context.Context, s Spec) error {
	values := inEdge
	if s.Uplinks {
		values = maps.Clone(inEdge)
		maps.Copy(values, inUplinkEdge)
	}
	if err := e.ns.Do(func() error { return setSysctls(values) }); err != nil {
		return err
	}
	lo, err := e.nl.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := setUp(e.nl, lo); err != nil {
		return err
	}
	// The address of the uplink is part of the rules, and the rules come before the links.
	if !e.transit.node4.IsValid() {
		t, err := e.m.takeTransit(e.id)
		if err != nil {
			return err
		}
		e.transit = t
	}
	if err := e.syncTable(s); err != nil {
		return err
	}
	if err := e.uplink(); err != nil {
		return err
	}
	var vx netlink.Link
	if s.Uplinks {
		// Clients from outside come by it, and the way back is not the main table's.
		if err := e.ns.Do(func() error { return setSysctl("net/ipv4/conf/"+uplinkName+"/rp_filter", "0") }); err != nil {
			return err
		}
		err = e.syncUplinks(s)
	} else {
		vx, err = e.overlay(ctx, s)
	}
	if err != nil {
		return err
	}
	own := []netip.Prefix{netip.MustParsePrefix("127.0.0.1/8")}
	if e.m.ipv6 {
		own = append(own, netip.MustParsePrefix("::1/128"))
	}
	for _, a := range s.local() {
		if p := host(a); (a.Is4() || e.m.ipv6) && !slices.Contains(own, p) {
			own = append(own, p)
		}
	}
	if err := syncAddresses(e.nl, lo, own); err != nil {
		return err
	}
	copied := s
	e.spec = &copied
	if s.Uplinks {
		err = e.syncUplinkReach()
	} else {
		err = e.syncReach(vx)
	}
	if err != nil {
		return err
	}
	return e.expose(s)
}

// local are the addresses the edge has for Pods.
func (s Spec) local() []netip.Addr {
	if s.Uplinks {
		return s.Local
	}
	return append(slices.Clone(s.Gateways), s.Local...)
}

// source is what a link may send as.
type source struct {
	mac  net.HardwareAddr
	addr netip.Addr
}

// sources decodes the table's elements of Pods' links.
func sources(have map[string]elements) map[string][]source {
	out := map[string][]source{}
	for _, name := range []string{"pods4", "pods6"} {
		for k := range have[name] {
			if len(k) < unix.IFNAMSIZ+8+4 {
				continue
			}
			link := strings.TrimRight(k[:unix.IFNAMSIZ], "\x00")
			a, ok := netip.AddrFromSlice([]byte(k[unix.IFNAMSIZ+8:]))
			if ok {
				out[link] = append(out[link], source{mac: net.HardwareAddr(k[unix.IFNAMSIZ : unix.IFNAMSIZ+6]), addr: a})
			}
		}
	}
	return out
}

func sourcesOf(mac net.HardwareAddr, addrs []netip.Addr) []source {
	var out []source
	v6 := false
	for _, a := range addrs {
		out = append(out, source{mac, a})
		v6 = v6 || a.Is6()
	}
	if v6 {
		out = append(out, source{mac, linkLocal(mac)})
	}
	return out
}

func addSources(want map[string]elements, link string, ss []source) {
	for _, s := range ss {
		want["pods"+family(s.addr)][key(ifname(link), s.mac, s.addr.AsSlice())] = ""
	}
}

// peers are the other nodes there may be traffic with.
func (e *Edge) peers(s Spec) []netip.Addr {
	e.m.node.Lock()
	nodes := slices.Clone(e.m.host.Nodes)
	e.m.node.Unlock()
	for _, p := range s.Ports {
		if p.Node.IsValid() {
			nodes = append(nodes, p.Node)
		}
	}
	slices.SortFunc(nodes, netip.Addr.Compare)
	nodes = slices.Compact(nodes)
	return slices.DeleteFunc(nodes, func(a netip.Addr) bool { return a == e.m.cfg.Node || a.BitLen() != e.m.cfg.Node.BitLen() })
}

// syncTable brings the edge's table up to date. What a link that exists may send as is
// what the Spec says or, if it does not know the link yet, what Attach said.
func (e *Edge) syncTable(s Spec) error {
	links, err := e.Links()
	if err != nil {
		return err
	}
	overlay4, overlay6 := Overlay(e.m.cfg.Node)
	want := map[string]elements{}
	for _, name := range []string{"pods", "remote", "local", "dns", "inbound", "floating", "floated"} {
		want[name+"4"], want[name+"6"] = elements{}, elements{}
	}
	for _, a := range s.local() {
		want["local"+family(a)][key(a.AsSlice())] = ""
	}
	for _, a := range s.Local {
		want["dns"+family(a)][key(a.AsSlice())] = ""
	}
	rules := edgeRules(s, e.transit, overlay4, overlay6)
	if s.Uplinks {
		for _, c := range carried() {
			want[c.name] = elements{}
		}
		want["nodes4"], want["nodes6"] = elements{}, elements{}
		want["marks"] = elements{}
		want["fronts4"], want["fronts6"] = elements{}, elements{}
		addFronts(want, s)
		e.m.node.Lock()
		nodes, reserved := slices.Clone(e.m.host.Nodes), slices.Clone(e.m.host.Reserved)
		e.m.node.Unlock()
		for _, a := range append(nodes, e.m.cfg.Node) {
			want["nodes"+family(a)][key(a.AsSlice())] = ""
		}
		for _, a := range s.Gateways {
			want["remote"+family(a)][key(a.AsSlice())] = ""
		}
		rules = uplinkRules(s, e.transit, reserved)
	}
	for _, n := range e.peers(s) {
		if s.Uplinks {
			break
		}
		a, b := Overlay(n)
		if a.IsValid() {
			want["remote4"][key(a.AsSlice())] = ""
		}
		want["remote6"][key(b.AsSlice())] = ""
	}
	known := map[string]Port{}
	for _, p := range s.Ports {
		if p.Node == e.m.cfg.Node {
			if p.Link != "" {
				known[p.Link] = p
			}
			continue
		}
		for _, a := range p.Addresses {
			want["remote"+family(a)][key(a.AsSlice())] = ""
		}
	}
	for _, x := range s.External {
		if x.Target.IsValid() && !x.Announce {
			continue
		}
		want["inbound"+family(x.Address)][key(x.Address.AsSlice())] = ""
		if x.Target.IsValid() && x.Target.BitLen() == x.Address.BitLen() {
			f := family(x.Address)
			want["floating"+f][key(x.Address.AsSlice())] = key(x.Target.AsSlice())
			want["floated"+f][key(x.Target.AsSlice())] = key(x.Address.AsSlice())
		}
	}
	for _, a := range s.Exported {
		want["inbound"+family(a)][key(a.AsSlice())] = ""
	}
	return rules.sync(e.ns, func(have map[string]elements) map[string]elements {
		attached := sources(have)
		for _, link := range links {
			ss := attached[link]
			if p, ok := known[link]; ok {
				ss = sourcesOf(p.MAC, p.Addresses)
			}
			addSources(want, link, ss)
			if s.Uplinks {
				addPorts(want, link, ss)
			}
		}
		return want
	})
}

// attached reads back what Pods' links may send as.
func (e *Edge) attached() (map[string][]source, error) {
	c, err := openNFT(e.ns)
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.CloseLasting() }()
	r := ruleset{table: edgeTable, sets: attachedSets()}
	have, err := r.read(e.ns, c)
	if err != nil {
		return nil, fmt.Errorf("table %s: %w", edgeTable, err)
	}
	return sources(have.elements), nil
}

// overlay makes the VXLAN link, in the node's namespace so that its packets go there.
func (e *Edge) overlay(ctx context.Context, s Spec) (netlink.Link, error) {
	m := e.m
	name := overlayLinks + e.id
	m.node.Lock()
	defer m.node.Unlock()
	fabric, err := m.fabric()
	if err != nil {
		return nil, err
	}
	l, err := linkByName(e.nl, name)
	if err != nil {
		return nil, err
	}
	if l != nil && !sameOverlay(l, s.VNI, m.cfg, fabric.Attrs().Index) {
		log.G(ctx).WithField("network", s.Name).WithField("link", name).Warn("the overlay's link is not as it should be: making it again")
		if err := e.nl.LinkDel(l); err != nil && !missing(err) {
			return nil, err
		}
		l = nil
	}
	if l == nil {
		// One that was not moved by a call that was interrupted.
		stale, err := linkByName(m.nl, name)
		if err != nil {
			return nil, err
		}
		if stale != nil {
			if err := m.nl.LinkDel(stale); err != nil && !missing(err) {
				return nil, err
			}
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.HardwareAddr, attrs.MTU = name, overlayMAC(m.cfg.Node), s.MTU
		vx := &netlink.Vxlan{LinkAttrs: attrs, VxlanId: int(s.VNI), VtepDevIndex: fabric.Attrs().Index, SrcAddr: m.cfg.Node.AsSlice(), Port: int(m.cfg.VXLANPort)}
		if err := m.nl.LinkAdd(vx); err != nil {
			return nil, fmt.Errorf("make %s (VNI %d): %w", name, s.VNI, err)
		}
		if l, err = m.nl.LinkByName(name); err != nil {
			return nil, err
		}
		if err := m.nl.LinkSetNsFd(l, e.ns.FD()); err != nil {
			_ = m.nl.LinkDel(l)
			return nil, fmt.Errorf("move %s into the edge: %w", name, err)
		}
		if l, err = e.nl.LinkByName(name); err != nil {
			return nil, err
		}
	}
	if err := setLink(e.nl, l, overlayMAC(m.cfg.Node), s.MTU); err != nil {
		return nil, err
	}
	var own []netip.Prefix
	a, b := Overlay(m.cfg.Node)
	if a.IsValid() {
		own = append(own, host(a))
	}
	if m.ipv6 {
		own = append(own, host(b))
	}
	if err := syncAddresses(e.nl, l, own); err != nil {
		return nil, err
	}
	return l, setUp(e.nl, l)
}

func sameOverlay(l netlink.Link, vni uint32, cfg Config, fabric int) bool {
	vx, ok := l.(*netlink.Vxlan)
	return ok && vx.VxlanId == int(vni) && vx.Port == int(cfg.VXLANPort) && addr(vx.SrcAddr) == cfg.Node && vx.VtepDevIndex == fabric && !vx.Learning
}

// syncReach brings routes and neighbours up to date: what Pods can reach.
func (e *Edge) syncReach(vx netlink.Link) error {
	s := *e.spec
	links, err := e.nl.LinkList()
	if err != nil {
		return err
	}
	up, err := e.nl.LinkByName(uplinkName)
	if err != nil {
		return err
	}
	attached, err := e.attached()
	if err != nil {
		return err
	}
	var routes []route
	var neighs []neighbour
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
	t := e.transit
	add(route{dst: host(t.node4), link: up.Attrs().Index})
	add(route{dst: host(t.node6), link: up.Attrs().Index})
	add(route{dst: netip.PrefixFrom(netip.IPv4Unspecified(), 0), gw: t.node4, link: up.Attrs().Index})
	add(route{dst: netip.PrefixFrom(netip.IPv6Unspecified(), 0), gw: t.node6, link: up.Attrs().Index})
	near(neighbour{up.Attrs().Index, t.node4, nodeMAC})
	near(neighbour{up.Attrs().Index, t.node6, nodeMAC})
	for _, p := range s.Subnets {
		add(route{dst: p, unreachable: true})
	}

	// Other nodes and what is there.
	index := vx.Attrs().Index
	fdb := map[string]netip.Addr{}
	for _, n := range e.peers(s) {
		a, b := Overlay(n)
		mac := overlayMAC(n)
		fdb[mac.String()] = n
		if a.IsValid() {
			add(route{dst: host(a), link: index})
			near(neighbour{index, a, mac})
		}
		add(route{dst: host(b), link: index})
		near(neighbour{index, b, mac})
	}
	for _, p := range s.Ports {
		if p.Node == e.m.cfg.Node || !p.Node.IsValid() {
			continue
		}
		gw4, gw6 := Overlay(p.Node)
		for _, a := range p.Addresses {
			if a.Is6() {
				add(route{dst: host(a), gw: gw6, link: index})
			} else if gw4.IsValid() {
				add(route{dst: host(a), gw: gw4, link: index})
			}
		}
	}

	// Pods here.
	for _, l := range links {
		if !strings.HasPrefix(l.Attrs().Name, podLinks) || !isUp(l) {
			continue
		}
		for _, x := range attached[l.Attrs().Name] {
			if x.addr.IsLinkLocalUnicast() && x.addr.Is6() {
				continue
			}
			add(route{dst: host(x.addr), link: l.Attrs().Index})
			near(neighbour{l.Attrs().Index, x.addr, x.mac})
		}
	}
	have, err := e.nl.NeighList(0, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("neighbours: %w", err)
	}
	// Neighbours first: a route must not lead to a question nobody answers.
	if err := changeNeighbours(e.nl, have, neighs); err != nil {
		return err
	}
	if err := syncForwarding(e.nl, index, fdb); err != nil {
		return err
	}
	return syncRoutes(e.nl, 0, routes)
}
