package edge

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/network/netns"
)

// Attach makes the Pod's link, addresses and routes, and the edge's side with its
// anti-spoofing, but leaves the link down in the edge until Up. Idempotent.
func (e *Edge) Attach(ctx context.Context, a Attachment) error {
	if err := a.validate(); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.gone {
		return fmt.Errorf("edge %s was removed: %w", e.id, errdefs.ErrNotFound)
	}
	if err := e.attach(ctx, a); err != nil {
		return fmt.Errorf("attach %s in %s: %w", a.Interface, a.NetNS, err)
	}
	return nil
}

func (e *Edge) attach(ctx context.Context, a Attachment) error {
	pod, err := netns.Open(a.NetNS)
	if err != nil {
		return err
	}
	defer func() { _ = pod.Close() }()
	nl, err := pod.Netlink()
	if err != nil {
		return err
	}
	defer nl.Close()
	if e.spec != nil && e.spec.Uplinks != (a.Uplink != "") {
		return invalid("uplink %q: the edge has uplinks: %v", a.Uplink, e.spec.Uplinks)
	}
	here, inside, err := e.ends(nl, a)
	if err != nil {
		return err
	}
	if here == nil {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.HardwareAddr, attrs.MTU = a.Link, gatewayMAC, a.MTU
		v := netlink.NewVeth(attrs)
		v.PeerName, v.PeerHardwareAddr, v.PeerNamespace, v.PeerMTU = a.Interface, a.MAC, netlink.NsFd(pod.FD()), uint32(a.MTU)
		if err := e.nl.LinkAdd(v); err != nil {
			if errors.Is(err, unix.EEXIST) {
				err = fmt.Errorf("there is a link %s already that is not this attachment's: %w", a.Interface, errdefs.ErrAlreadyExists)
			}
			return err
		}
		if here, inside, err = e.ends(nl, a); err != nil {
			return err
		}
		if here == nil {
			return fmt.Errorf("link %s vanished: %w", a.Link, errdefs.ErrUnavailable)
		}
	}
	if err := setLink(e.nl, here, gatewayMAC, a.MTU); err != nil {
		return err
	}
	if err := e.allow(a.Link, sourcesOf(a.MAC, a.Addresses), a.Uplink != ""); err != nil {
		return err
	}
	if a.Uplink != "" {
		if err := e.wire(a.Link, a.Uplink, a.MAC, a.MTU, a.Addresses); err != nil {
			return err
		}
		if err := e.ns.Do(func() error { return setSysctl("net/ipv4/neigh/"+a.Link+"/proxy_delay", "0") }); err != nil {
			return err
		}
	}
	// Its gateway answers neighbour solicitations, in case the Pod asks; one that is not here
	// answers ARP no more than them by itself.
	for _, g := range a.Gateways {
		if g.Is6() && e.m.ipv6 || g.Is4() && a.Uplink != "" {
			if err := e.nl.NeighSet(proxy(here.Attrs().Index, g)); err != nil {
				return fmt.Errorf("answer for gateway %s: %w", g, err)
			}
		}
	}
	if err := e.inside(pod, nl, inside, a); err != nil {
		return err
	}
	if isUp(here) && e.spec != nil { // again, after Up
		return e.reach()
	}
	return nil
}

// ends are the attachment's two links, nil both if there are none. Half of one is removed.
func (e *Edge) ends(pod *netlink.Handle, a Attachment) (here, inside netlink.Link, err error) {
	if here, err = linkByName(e.nl, a.Link); err != nil || here == nil {
		return nil, nil, err
	}
	if inside, err = linkByName(pod, a.Interface); err != nil {
		return nil, nil, err
	}
	if inside != nil && here.Type() == "veth" && inside.Type() == "veth" &&
		here.Attrs().ParentIndex == inside.Attrs().Index && inside.Attrs().ParentIndex == here.Attrs().Index {
		return here, inside, nil
	}
	if err := e.nl.LinkDel(here); err != nil && !missing(err) {
		return nil, nil, err
	}
	return nil, nil, nil
}

// inside makes the Pod's end.
func (e *Edge) inside(pod *netns.NS, nl *netlink.Handle, l netlink.Link, a Attachment) error {
	v6 := slices.ContainsFunc(a.Addresses, netip.Addr.Is6)
	err := pod.Do(func() error {
		base := "net/ipv6/conf/" + a.Interface + "/"
		off := "1"
		if v6 {
			off = "0"
		}
		return setSysctls(map[string]string{base + "disable_ipv6": off, base + "accept_ra": "0", base + "accept_dad": "0"})
	})
	if err != nil {
		return err
	}
	if lo, err := nl.LinkByName("lo"); err == nil {
		if err := setUp(nl, lo); err != nil {
			return err
		}
	}
	if err := setLink(nl, l, a.MAC, a.MTU); err != nil {
		return err
	}
	var addrs []netip.Prefix
	for _, x := range a.Addresses {
		addrs = append(addrs, host(x))
	}
	if err := syncAddresses(nl, l, addrs); err != nil {
		return err
	}
	if err := setUp(nl, l); err != nil {
		return err
	}
	var neighs []neighbour
	for _, g := range a.Gateways {
		neighs = append(neighs, neighbour{l.Attrs().Index, g, gatewayMAC})
	}
	if err := syncNeighbours(nl, l.Attrs().Index, neighs); err != nil {
		return err
	}
	return syncRoutes(nl, l.Attrs().Index, podRoutes(a, l.Attrs().Index))
}

// podRoutes are the routes of a Pod's link: through the gateway, which is on the link
// whatever its prefix.
func podRoutes(a Attachment, index int) []route {
	var out []route
	for _, g := range a.Gateways {
		zero := netip.IPv4Unspecified()
		if g.Is6() {
			zero = netip.IPv6Unspecified()
		}
		if a.Default {
			out = append(out, route{dst: netip.PrefixFrom(zero, 0), gw: g, link: index})
			continue
		}
		for _, p := range a.Subnets {
			if p.Addr().BitLen() == g.BitLen() {
				out = append(out, route{dst: p.Masked(), gw: g, link: index})
			}
		}
	}
	return out
}

// allow sets what a link may send as.
func (e *Edge) allow(link string, ss []source, uplinks bool) error {
	r := ruleset{table: edgeTable, sets: attachedSets()}
	if uplinks {
		r.sets = append(carried(), fronts()...)
	}
	return r.sync(e.ns, func(have map[string]elements) map[string]elements {
		want := map[string]elements{}
		for _, s := range r.sets {
			want[s.name] = elements{}
		}
		if uplinks {
			keepFronts(want, have)
		}
		all := sources(have)
		all[link] = ss
		for l, ss := range all {
			addSources(want, l, ss)
			if uplinks {
				addPorts(want, l, ss)
			}
		}
		return want
	})
}

// reach brings routes up to date after a link came or went.
func (e *Edge) reach() error {
	if e.spec == nil {
		return fmt.Errorf("edge %s is not ensured: %w", e.id, errdefs.ErrUnavailable)
	}
	if e.spec.Uplinks {
		return e.syncUplinkReach()
	}
	vx, err := linkByName(e.nl, overlayLinks+e.id)
	if err != nil {
		return err
	}
	if vx == nil {
		return fmt.Errorf("edge %s has no overlay: %w", e.id, errdefs.ErrUnavailable)
	}
	return e.syncReach(vx)
}

// Up lets traffic through.
func (e *Edge) Up(ctx context.Context, link string) error {
	if err := validLink(link); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	l, err := linkByName(e.nl, link)
	if err != nil {
		return err
	}
	if l == nil {
		return fmt.Errorf("edge %s: link %s: %w", e.id, link, errdefs.ErrNotFound)
	}
	was := isUp(l)
	if err := setUp(e.nl, l); err != nil {
		return fmt.Errorf("edge %s: %w", e.id, err)
	}
	uplinks, err := e.hasUplinks()
	if err != nil {
		return err
	}
	if uplinks {
		err = e.reach()
	} else {
		var attached map[string][]source
		if attached, err = e.attached(); err == nil {
			err = e.lead(l, attached[link])
		}
	}
	if err != nil || was {
		return err
	}
	return settle(e.ns, e.nl, link)
}

// lead routes to a link's addresses.
func (e *Edge) lead(l netlink.Link, ss []source) error {
	var neighs []neighbour
	for _, x := range ss {
		if x.addr.Is6() && x.addr.IsLinkLocalUnicast() {
			continue
		}
		neighs = append(neighs, neighbour{l.Attrs().Index, x.addr, x.mac})
	}
	if err := syncNeighbours(e.nl, l.Attrs().Index, neighs); err != nil {
		return err
	}
	for _, n := range neighs {
		if err := e.nl.RouteReplace(route{dst: host(n.ip), link: n.link}.netlink()); err != nil {
			return fmt.Errorf("route to %s: %w", n.ip, err)
		}
	}
	return nil
}

// Check tells what of an attachment is not as it should be (CNI CHECK).
func (e *Edge) Check(ctx context.Context, a Attachment) error {
	if err := a.validate(); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	pod, err := netns.Open(a.NetNS)
	if err != nil {
		return err
	}
	defer func() { _ = pod.Close() }()
	nl, err := pod.Netlink()
	if err != nil {
		return err
	}
	defer nl.Close()
	var wrong []string
	here, err := linkByName(e.nl, a.Link)
	if err != nil {
		return err
	}
	inside, err := linkByName(nl, a.Interface)
	if err != nil {
		return err
	}
	if here == nil {
		wrong = append(wrong, "link "+a.Link+" is missing in the edge")
	} else if !isUp(here) {
		wrong = append(wrong, "link "+a.Link+" is down")
	}
	if inside == nil {
		wrong = append(wrong, "link "+a.Interface+" is missing in the Pod")
	} else {
		if here != nil && here.Attrs().ParentIndex != inside.Attrs().Index {
			wrong = append(wrong, a.Link+" and "+a.Interface+" are not two ends of one link")
		}
		if inside.Attrs().HardwareAddr.String() != a.MAC.String() {
			wrong = append(wrong, fmt.Sprintf("%s has MAC %s, not %s", a.Interface, inside.Attrs().HardwareAddr, a.MAC))
		}
		if inside.Attrs().MTU != a.MTU {
			wrong = append(wrong, fmt.Sprintf("%s has MTU %d, not %d", a.Interface, inside.Attrs().MTU, a.MTU))
		}
		have, err := nl.AddrList(inside, netlink.FAMILY_ALL)
		if err != nil {
			return err
		}
		for _, x := range a.Addresses {
			if !slices.ContainsFunc(have, func(h netlink.Addr) bool { return addr(h.IP) == x }) {
				wrong = append(wrong, fmt.Sprintf("%s lacks address %s", a.Interface, x))
			}
		}
		routes, err := nl.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{LinkIndex: inside.Attrs().Index}, netlink.RT_FILTER_OIF)
		if err != nil {
			return err
		}
		for _, w := range podRoutes(a, inside.Attrs().Index) {
			if !slices.ContainsFunc(routes, func(h netlink.Route) bool { p, ok := plain(h); return ok && p == w }) {
				wrong = append(wrong, fmt.Sprintf("%s lacks the route to %s through %s", a.Interface, w.dst, w.gw))
			}
		}
	}
	if a.Uplink != "" {
		more, err := e.checkUplink(a)
		if err != nil {
			return err
		}
		wrong = append(wrong, more...)
	}
	attached, err := e.attached()
	if err != nil {
		return err
	}
	for _, w := range sourcesOf(a.MAC, a.Addresses) {
		if !slices.ContainsFunc(attached[a.Link], func(s source) bool { return s.addr == w.addr && s.mac.String() == w.mac.String() }) {
			wrong = append(wrong, fmt.Sprintf("the edge does not let %s send as %s", a.Link, w.addr))
		}
	}
	if len(wrong) != 0 {
		return fmt.Errorf("attachment %s: %s: %w", a.Link, strings.Join(wrong, "; "), errdefs.ErrFailedPrecondition)
	}
	return nil
}

// Detach removes a link and what belongs to it. It succeeds if there is none.
func (e *Edge) Detach(ctx context.Context, link string) error {
	if err := validLink(link); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.gone {
		return nil
	}
	l, err := linkByName(e.nl, link)
	if err != nil {
		return err
	}
	uplinks, err := e.hasUplinks()
	if err != nil {
		return err
	}
	if l != nil {
		if err := e.nl.LinkDel(l); err != nil && !missing(err) {
			return fmt.Errorf("edge %s: remove %s: %w", e.id, link, err)
		}
	}
	if uplinks {
		if err := e.unplug(link); err != nil {
			return err
		}
	}
	attached, err := e.attached()
	if err != nil {
		return err
	}
	if len(attached[link]) == 0 {
		return nil
	}
	if err := e.allow(link, nil, uplinks); err != nil {
		return err
	}
	return e.forgetFlows(attached[link])
}

// forgetFlows removes the connections of addresses that may be another Pod's next.
func (e *Edge) forgetFlows(ss []source) error {
	gone := flowsOf{}
	families := map[netlink.InetFamily]bool{}
	for _, s := range ss {
		gone[s.addr] = true
		if s.addr.Is4() {
			families[unix.AF_INET] = true
		} else if e.m.ipv6 {
			families[unix.AF_INET6] = true
		}
	}
	return e.ns.Do(func() error {
		for f := range families {
			if _, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, f, gone); err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("forget connections: %w", err)
			}
		}
		return nil
	})
}

// flowsOf matches connections from or to addresses, before or after translation.
type flowsOf map[netip.Addr]bool

var _ netlink.CustomConntrackFilter = flowsOf(nil)

// MatchConntrackFlow implements netlink.CustomConntrackFilter.
func (f flowsOf) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	return f[addr(flow.Forward.SrcIP)] || f[addr(flow.Forward.DstIP)] || f[addr(flow.Reverse.SrcIP)] || f[addr(flow.Reverse.DstIP)]
}
