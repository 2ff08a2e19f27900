package edge

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/network/netns"
)

// What follows compares what a namespace has with what it should have and changes the
// difference.

func setLink(h *netlink.Handle, l netlink.Link, mac net.HardwareAddr, mtu int) error {
	if mac != nil && l.Attrs().HardwareAddr.String() != mac.String() {
		if err := h.LinkSetHardwareAddr(l, mac); err != nil {
			return fmt.Errorf("address of %s: %w", l.Attrs().Name, err)
		}
	}
	if mtu != 0 && l.Attrs().MTU != mtu {
		if err := h.LinkSetMTU(l, mtu); err != nil {
			return fmt.Errorf("MTU %d of %s: %w", mtu, l.Attrs().Name, err)
		}
	}
	return nil
}

func isUp(l netlink.Link) bool { return l.Attrs().Flags&net.FlagUp != 0 }

func setUp(h *netlink.Handle, l netlink.Link) error {
	if isUp(l) {
		return nil
	}
	if err := h.LinkSetUp(l); err != nil {
		return fmt.Errorf("set %s up: %w", l.Attrs().Name, err)
	}
	return nil
}

// settle makes a veth that was set up pass packets at once: the kernel gives either end
// its queue a moment after the carrier, and drops what is sent before, unless somebody
// asks for the link meanwhile. It asks for the end that is not in ns, too.
func settle(ns *netns.NS, h *netlink.Handle, name string) error {
	l, err := h.LinkByName(name)
	if err != nil || l.Attrs().NetNsID < 0 || l.Attrs().ParentIndex == 0 {
		return err
	}
	return ns.Do(func() error {
		req := nl.NewNetlinkRequest(unix.RTM_GETLINK, 0)
		msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
		msg.Index = int32(l.Attrs().ParentIndex)
		req.AddData(msg)
		req.AddData(nl.NewRtAttr(unix.IFLA_TARGET_NETNSID, nl.Uint32Attr(uint32(l.Attrs().NetNsID))))
		if _, err := req.Execute(unix.NETLINK_ROUTE, 0); err != nil && !missing(err) {
			return fmt.Errorf("other end of %s: %w", name, err)
		}
		return nil
	})
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// prefix is the inverse; invalid for what is none.
func prefix(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.Prefix{}
	}
	a, ok := netip.AddrFromSlice(n.IP)
	if !ok {
		return netip.Prefix{}
	}
	ones, bits := n.Mask.Size()
	if bits == 32 {
		a = a.Unmap()
	}
	return netip.PrefixFrom(a, ones)
}

func addr(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

// syncAddresses gives a link these addresses; loopback's own and link-local ones stay.
func syncAddresses(h *netlink.Handle, l netlink.Link, want []netip.Prefix) error {
	have, err := h.AddrList(l, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("addresses of %s: %w", l.Attrs().Name, err)
	}
	missingOnes := map[netip.Prefix]bool{}
	for _, p := range want {
		missingOnes[p] = true
	}
	for _, a := range have {
		p := prefix(a.IPNet)
		if missingOnes[p] {
			delete(missingOnes, p)
			continue
		}
		if p.Addr().IsLoopback() || p.Addr().Is6() && p.Addr().IsLinkLocalUnicast() {
			continue
		}
		if err := h.AddrDel(l, &netlink.Addr{IPNet: a.IPNet}); err != nil && !missing(err) {
			return fmt.Errorf("remove %s from %s: %w", p, l.Attrs().Name, err)
		}
	}
	for _, p := range want {
		if !missingOnes[p] {
			continue
		}
		// Routes are ours to make, so that they can be repaired.
		a := &netlink.Addr{IPNet: ipNet(p), Flags: unix.IFA_F_NOPREFIXROUTE}
		if p.Addr().Is6() {
			a.Flags |= unix.IFA_F_NODAD
		}
		if p.Addr().IsLoopback() { // as the kernel made them
			a.Flags, a.Scope = 0, int(netlink.SCOPE_HOST)
		}
		if err := h.AddrReplace(l, a); err != nil {
			return fmt.Errorf("give %s to %s: %w", p, l.Attrs().Name, err)
		}
	}
	return nil
}

// route is one of a table, the main one if 0.
type route struct {
	table int
	dst   netip.Prefix
	gw    netip.Addr // on the link, whatever the routes say
	link  int
	// src is what the namespace's own packets come from.
	src netip.Addr
	// unreachable has neither.
	unreachable bool
}

func (r route) netlink() *netlink.Route {
	out := &netlink.Route{Dst: ipNet(r.dst), Protocol: protocol, Table: cmp.Or(r.table, unix.RT_TABLE_MAIN), Family: netlink.FAMILY_V4}
	if r.dst.Addr().Is6() {
		out.Family = netlink.FAMILY_V6
	}
	if r.unreachable {
		out.Type = unix.RTN_UNREACHABLE
		return out
	}
	out.Type, out.LinkIndex = unix.RTN_UNICAST, r.link
	if r.src.IsValid() {
		out.Src = r.src.AsSlice()
	}
	if r.gw.IsValid() {
		out.Gw = r.gw.AsSlice()
		// IPv6 asks the main table for a gateway that is said to be on the link; that of
		// another is found there by its own routes.
		if r.table == 0 || r.gw.Is4() {
			out.Flags = unix.RTNH_F_ONLINK
		}
	} else if r.dst.Addr().Is4() {
		out.Scope = netlink.SCOPE_LINK
	}
	return out
}

// plain is what the kernel told of a route; ok is false for what we never make.
func plain(r netlink.Route) (out route, ok bool) {
	out.dst = prefix(r.Dst)
	if r.Table != unix.RT_TABLE_MAIN {
		out.table = r.Table
	}
	if r.Dst == nil {
		zero := netip.IPv4Unspecified()
		if r.Family == netlink.FAMILY_V6 {
			zero = netip.IPv6Unspecified()
		}
		out.dst = netip.PrefixFrom(zero, 0)
	}
	if r.Type == unix.RTN_UNREACHABLE {
		out.unreachable = true
		return out, true
	}
	out.link = r.LinkIndex
	if len(r.Gw) != 0 {
		out.gw = addr(r.Gw)
	}
	if len(r.Src) != 0 {
		out.src = addr(r.Src)
	}
	return out, r.Type == unix.RTN_UNICAST && len(r.MultiPath) == 0 && r.Via == nil && r.Encap == nil && r.Tos == 0
}

// syncRoutes makes the namespace have these routes: on one link, ours alone and of the main
// table, if link is not 0, else everywhere and all but the kernel's.
func syncRoutes(h *netlink.Handle, link int, want []route) error {
	type at struct {
		table int
		dst   netip.Prefix
	}
	todo := make(map[at]route, len(want))
	for _, r := range want {
		r.dst = r.dst.Masked()
		todo[at{r.table, r.dst}] = r
	}
	filter := netlink.Route{Table: unix.RT_TABLE_MAIN}
	if link == 0 {
		filter.Table = unix.RT_TABLE_UNSPEC
	}
	have, err := h.RouteListFiltered(netlink.FAMILY_ALL, &filter, netlink.RT_FILTER_TABLE)
	if err != nil {
		return fmt.Errorf("routes: %w", err)
	}
	for i := range have {
		r := have[i]
		if link != 0 && (r.LinkIndex != link || r.Protocol != protocol) || link == 0 && (r.Protocol == unix.RTPROT_KERNEL || r.Table == unix.RT_TABLE_LOCAL) {
			continue
		}
		p, ok := plain(r)
		k := at{p.table, p.dst}
		if w, wanted := todo[k]; ok && wanted && w == p && r.Protocol == protocol {
			delete(todo, k)
			continue
		}
		if err := h.RouteDel(&r); err != nil && !missing(err) {
			return fmt.Errorf("remove route to %s: %w", p.dst, err)
		}
	}
	for _, r := range want {
		r.dst = r.dst.Masked()
		k := at{r.table, r.dst}
		if todo[k] != r {
			continue
		}
		if err := h.RouteReplace(r.netlink()); err != nil {
			return fmt.Errorf("route to %s: %w", r.dst, err)
		}
		delete(todo, k)
	}
	return nil
}

// lookup is a rule of routing: what comes in by a link, or goes to or comes from an address, or has a
// mark, or everything, is looked up in a table.
type lookup struct {
	pref int
	iif  string
	to   netip.Prefix
	from netip.Prefix
	mark uint32
	// mask of the mark; the mark itself if 0.
	mask  uint32
	table int
}

// syncRules makes a family's rules these and the kernel's last one.
func syncRules(h *netlink.Handle, family int, want []lookup) error {
	const last = 32767 // an empty table's
	have, err := h.RuleList(family)
	if err != nil {
		return fmt.Errorf("rules of routing: %w", err)
	}
	todo := make(map[lookup]bool, len(want))
	for _, w := range want {
		todo[w] = true
	}
	var extra []netlink.Rule
	for _, r := range have {
		l := lookup{pref: max(r.Priority, 0), iif: r.IifName, to: prefix(r.Dst), from: prefix(r.Src), mark: r.Mark, table: r.Table}
		if r.Mask != nil && *r.Mask != r.Mark {
			l.mask = *r.Mask
		}
		switch {
		case plainRule(r) && todo[l]:
			delete(todo, l)
		case l.pref != last:
			extra = append(extra, r)
		}
	}
	// Never without the table of local addresses: first what is new.
	for _, w := range want {
		if !todo[w] {
			continue
		}
		delete(todo, w)
		r := netlink.NewRule()
		r.Family, r.Priority, r.IifName, r.Table = family, w.pref, w.iif, w.table
		if w.to.IsValid() {
			r.Dst = ipNet(w.to)
		}
		if w.from.IsValid() {
			r.Src = ipNet(w.from)
		}
		if w.mark != 0 {
			r.Mark, r.Mask = w.mark, &w.mark
			if w.mask != 0 {
				r.Mask = &w.mask
			}
		}
		if err := h.RuleAdd(r); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("rule of routing %d: %w", w.pref, err)
		}
	}
	for i := range extra {
		r := extra[i]
		r.Family, r.Priority = family, max(r.Priority, 0)
		if err := h.RuleDel(&r); err != nil && !missing(err) {
			return fmt.Errorf("remove rule of routing %d: %w", r.Priority, err)
		}
	}
	return nil
}

// plainRule tells that a rule has nothing that a lookup has not.
func plainRule(r netlink.Rule) bool {
	return r.OifName == "" && !r.Invert && r.Goto <= 0 && r.SuppressPrefixlen <= 0 && r.SuppressIfgroup <= 0 &&
		r.IPProto == 0 && r.Dport == nil && r.Sport == nil && r.Tos == 0 && r.TunID == 0 && r.UIDRange == nil
}

// neighbour is a permanent one.
type neighbour struct {
	link int
	ip   netip.Addr
	mac  net.HardwareAddr
}

// syncNeighbours gives a link these permanent neighbours.
func syncNeighbours(h *netlink.Handle, link int, want []neighbour) error {
	have, err := h.NeighList(link, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("neighbours: %w", err)
	}
	return changeNeighbours(h, have, want)
}

func changeNeighbours(h *netlink.Handle, have []netlink.Neigh, want []neighbour) error {
	type at struct {
		link int
		ip   netip.Addr
	}
	todo := make(map[at]neighbour, len(want))
	for _, n := range want {
		todo[at{n.link, n.ip}] = n
	}
	for i := range have {
		n := have[i]
		if n.State&netlink.NUD_PERMANENT == 0 || n.Family != netlink.FAMILY_V4 && n.Family != netlink.FAMILY_V6 {
			continue
		}
		k := at{n.LinkIndex, addr(n.IP)}
		if w, ok := todo[k]; ok && w.mac.String() == n.HardwareAddr.String() {
			delete(todo, k)
		} else if !ok {
			if err := h.NeighDel(&n); err != nil && !missing(err) {
				return fmt.Errorf("remove neighbour %s: %w", n.IP, err)
			}
		}
	}
	for _, n := range want {
		if _, ok := todo[at{n.link, n.ip}]; !ok {
			continue
		}
		f := netlink.FAMILY_V4
		if n.ip.Is6() {
			f = netlink.FAMILY_V6
		}
		if err := h.NeighSet(&netlink.Neigh{LinkIndex: n.link, Family: f, State: netlink.NUD_PERMANENT, IP: n.ip.AsSlice(), HardwareAddr: n.mac}); err != nil {
			return fmt.Errorf("neighbour %s: %w", n.ip, err)
		}
	}
	return nil
}

// syncForwarding fills a VXLAN link's table: MAC to node.
func syncForwarding(h *netlink.Handle, link int, want map[string]netip.Addr) error {
	have, err := h.NeighList(link, unix.AF_BRIDGE)
	if err != nil {
		return fmt.Errorf("forwarding table: %w", err)
	}
	seen := map[string]bool{}
	for i := range have {
		n := have[i]
		mac := n.HardwareAddr.String()
		if want[mac] == addr(n.IP) && want[mac].IsValid() && !seen[mac] {
			seen[mac] = true
			continue
		}
		n.Family, n.Flags = unix.AF_BRIDGE, netlink.NTF_SELF
		if err := h.NeighDel(&n); err != nil && !missing(err) {
			return fmt.Errorf("remove forwarding entry %s: %w", mac, err)
		}
	}
	for mac, node := range want {
		if seen[mac] {
			continue
		}
		hw, err := net.ParseMAC(mac)
		if err != nil {
			return err
		}
		if err := h.NeighSet(&netlink.Neigh{
			LinkIndex: link, Family: unix.AF_BRIDGE, Flags: netlink.NTF_SELF, State: netlink.NUD_PERMANENT | netlink.NUD_NOARP,
			IP: node.AsSlice(), HardwareAddr: hw,
		}); err != nil {
			return fmt.Errorf("forwarding entry %s: %w", mac, err)
		}
	}
	return nil
}

// linkByName returns nil if there is none.
func linkByName(h *netlink.Handle, name string) (netlink.Link, error) {
	l, err := h.LinkByName(name)
	if err == nil {
		return l, nil
	}
	if missing(err) {
		return nil, nil
	}
	return nil, errors.Join(fmt.Errorf("link %s", name), err)
}
