package kubestack

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/containerd/log"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/network/netns"
)

// Route leads to another node's Pods on the default network.
type Route struct {
	To  netip.Prefix
	Via netip.Addr
}

// routesTo are the routes a node needs.
func routesTo(nodes map[string]node, self string) []Route {
	var out []Route
	for name, n := range nodes {
		if name == self {
			continue
		}
		for _, p := range n.PodCIDRs {
			for _, via := range n.Addresses {
				if via.BitLen() == p.Addr().BitLen() && !via.IsLinkLocalUnicast() {
					out = append(out, Route{To: p.Masked(), Via: via})
					break
				}
			}
		}
	}
	slices.SortFunc(out, func(a, b Route) int { return a.To.Addr().Compare(b.To.Addr()) })
	return out
}

// hostRoutes writes routes in the node's namespace.
type hostRoutes struct{ ns *netns.NS }

// routeProtocol marks our routes.
const routeProtocol = 105

// Sync makes our routes just these. A node that is not on a link of ours is somebody
// else's business: what carries packets there must know the way.
func (h hostRoutes) Sync(ctx context.Context, want []Route) error {
	nl, err := h.ns.Netlink()
	if err != nil {
		return err
	}
	defer nl.Close()
	have, err := nl.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Protocol: routeProtocol}, netlink.RT_FILTER_PROTOCOL)
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	var errs []error
	wanted := map[string]bool{}
	for _, r := range want {
		links, err := nl.RouteGet(net.IP(r.Via.AsSlice()))
		if err != nil || len(links) == 0 || links[0].Gw != nil {
			log.G(ctx).WithField("to", r.To).WithField("via", r.Via).Debug("node is not on a link of this one: no route")
			continue
		}
		route := &netlink.Route{
			Dst: &net.IPNet{IP: r.To.Addr().AsSlice(), Mask: net.CIDRMask(r.To.Bits(), r.To.Addr().BitLen())},
			Gw:  r.Via.AsSlice(), LinkIndex: links[0].LinkIndex, Protocol: routeProtocol,
		}
		if err := nl.RouteReplace(route); err != nil {
			errs = append(errs, fmt.Errorf("route to %s via %s: %w", r.To, r.Via, err))
		}
		wanted[route.Dst.String()] = true
	}
	for _, r := range have {
		if r.Dst == nil || wanted[r.Dst.String()] {
			continue
		}
		if err := nl.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("remove route to %s: %w", r.Dst, err))
		}
	}
	return errors.Join(errs...)
}
