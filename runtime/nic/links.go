package nic

import (
	"fmt"
	"net"
	"sort"
	"strconv"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
)

// configured is a link as the CNI plugin left it.
type configured struct {
	name   string
	index  int
	mac    net.HardwareAddr
	mtu    int
	addrs  []netlink.Addr
	routes []netlink.Route
	neighs []netlink.Neigh
}

// description is the guest's side of configured links.
type description struct {
	interfaces []*hyperstart.Interface
	routes     []*hyperstart.Route
	neighbors  []*hyperstart.Neighbor
}

// tapName is the tap's for a link: readable, unique in the namespace and at most 15
// characters, the kernel's limit.
func tapName(link string, index int) string {
	if name := tapPrefix + link; len(name) < unix.IFNAMSIZ {
		return name
	}
	return tapPrefix + "i" + strconv.Itoa(index)
}

// describe turns links into what the guest is told.
func describe(links []configured) (description, error) {
	var d description
	for _, l := range links {
		if len(l.mac) != 6 {
			return description{}, fmt.Errorf("link %s has no Ethernet address (%q): use a CNI plugin that makes Ethernet links (veth, macvlan): %w", l.name, l.mac, errdefs.ErrNotImplemented)
		}
		i := &hyperstart.Interface{Mac: l.mac.String(), Name: l.name, Mtu: uint32(l.mtu)}
		for _, a := range l.addrs {
			if usable(a) {
				i.Addresses = append(i.Addresses, guestAddress(a, l.routes))
			}
		}
		d.interfaces = append(d.interfaces, i)
		for _, r := range l.routes {
			if skipRoute(r, l.addrs) {
				continue
			}
			g, err := guestRoute(r, l.name)
			if err != nil {
				return description{}, err
			}
			d.routes = append(d.routes, g)
		}
		for _, n := range l.neighs {
			if n.State&netlink.NUD_PERMANENT != 0 && n.IP != nil && !n.IP.IsMulticast() && len(n.HardwareAddr) == 6 {
				d.neighbors = append(d.neighbors, &hyperstart.Neighbor{Address: n.IP.String(), Mac: n.HardwareAddr.String(), Device: l.name})
			}
		}
	}
	sort.SliceStable(d.routes, func(a, b int) bool { return rank(d.routes[a]) < rank(d.routes[b]) })
	return d, nil
}

func usable(a netlink.Addr) bool {
	return a.IPNet != nil && !a.IP.IsLinkLocalUnicast() || a.IPNet != nil && a.IP.To4() != nil
}

// guestAddress is the address with its prefix only if the namespace has the prefix's
// on-link route. Plugins like ptp delete that route, because neighbours of the same
// subnet are behind the gateway; a guest given the prefix would make it again.
func guestAddress(a netlink.Addr, routes []netlink.Route) string {
	for _, r := range routes {
		if connected(r, a) {
			return a.IPNet.String()
		}
	}
	return hostNet(a.IP).String()
}

// connected tells whether r is the on-link route of a's own prefix.
func connected(r netlink.Route, a netlink.Addr) bool {
	if r.Dst == nil || len(r.Gw) != 0 || r.Via != nil || a.IPNet == nil {
		return false
	}
	prefix := net.IPNet{IP: a.IP.Mask(a.Mask), Mask: a.Mask}
	return r.Dst.String() == prefix.String()
}

func hostNet(ip net.IP) *net.IPNet {
	if v4 := ip.To4(); v4 != nil {
		return &net.IPNet{IP: v4, Mask: net.CIDRMask(32, 32)}
	}
	return &net.IPNet{IP: ip, Mask: net.CIDRMask(128, 128)}
}

// skipRoute tells which routes the guest's kernel makes by itself: those of its
// addresses' prefixes, link-local and multicast ones.
func skipRoute(r netlink.Route, addrs []netlink.Addr) bool {
	if r.Type != unix.RTN_UNICAST {
		return true
	}
	if r.Dst != nil && (r.Dst.IP.IsMulticast() || r.Dst.IP.To4() == nil && r.Dst.IP.IsLinkLocalUnicast()) {
		return true
	}
	if r.Protocol != unix.RTPROT_KERNEL {
		return false
	}
	for _, a := range addrs {
		if connected(r, a) {
			return true
		}
	}
	return false
}

func guestRoute(r netlink.Route, device string) (*hyperstart.Route, error) {
	if len(r.MultiPath) != 0 || r.Via != nil || r.Encap != nil || r.MPLSDst != nil {
		return nil, fmt.Errorf("route %s on link %s has several next hops or an encapsulation: a guest can only have plain routes: %w", r.Dst, device, errdefs.ErrNotImplemented)
	}
	g := &hyperstart.Route{
		Device:   device,
		Scope:    uint32(r.Scope),
		Onlink:   r.Flags&unix.RTNH_F_ONLINK != 0,
		Mtu:      uint32(max(r.MTU, 0)),
		Priority: uint32(max(r.Priority, 0)),
	}
	if len(r.Gw) != 0 {
		g.Gateway = r.Gw.String()
	}
	if len(r.Src) != 0 {
		g.Source = r.Src.String()
	}
	dst := r.Dst
	if dst == nil {
		dst = defaultNet(r.Family)
	}
	// "" takes its family from the gateway; without one it must be spelled out.
	if ones, _ := dst.Mask.Size(); ones != 0 || g.Gateway == "" {
		g.Destination = dst.String()
	}
	return g, nil
}

func defaultNet(family int) *net.IPNet {
	if family == unix.AF_INET6 {
		return &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
	}
	return &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
}

// rank orders routes so that each one's gateway is reachable when it is added: those
// without a gateway, then those through one, default routes last.
func rank(r *hyperstart.Route) int {
	switch {
	case r.Gateway == "":
		return 0
	case r.Destination != "":
		return 1
	default:
		return 2
	}
}
