// Package netconf brings the guest's interfaces, routes and neighbours to the
// described state.
//
// It owns rtnetlink. It must not know where the description comes from.
package netconf

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
	"github.com/hypernetes/hypernetes/guest/hyperstart/uevent"
)

// linkTimeout is how long a hot-plugged interface may take to appear.
const linkTimeout = 20 * time.Second

// Apply configures interfaces, then routes, then neighbours, in the current network
// namespace. What is already so is left alone, so it may be repeated.
func Apply(ctx context.Context, ifs []*hyperstart.Interface, routes []*hyperstart.Route, neighbors []*hyperstart.Neighbor) error {
	if err := up("lo"); err != nil {
		return err
	}
	for _, i := range ifs {
		if err := applyInterface(ctx, i); err != nil {
			return fmt.Errorf("interface %s (%s): %w", i.GetName(), i.GetMac(), err)
		}
	}
	for _, r := range routes {
		if err := applyRoute(r); err != nil {
			return fmt.Errorf("route to %q via %q dev %q: %w", r.GetDestination(), r.GetGateway(), r.GetDevice(), err)
		}
	}
	for _, n := range neighbors {
		if err := applyNeighbor(n); err != nil {
			return fmt.Errorf("neighbor %s dev %s: %w", n.GetAddress(), n.GetDevice(), err)
		}
	}
	return nil
}

func up(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find interface %s: %w", name, err)
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return fmt.Errorf("set interface %s up: %w", name, err)
	}
	return nil
}

func applyInterface(ctx context.Context, in *hyperstart.Interface) error {
	mac, err := net.ParseMAC(in.Mac)
	if err != nil {
		return fmt.Errorf("mac: %w: %w", errdefs.ErrInvalidArgument, err)
	}
	link, err := findLink(ctx, mac)
	if err != nil {
		return err
	}
	if in.Name != "" && link.Attrs().Name != in.Name {
		// A name can only be changed while the interface is down.
		if err := netlink.LinkSetDown(link); err != nil {
			return fmt.Errorf("set down: %w", err)
		}
		if err := netlink.LinkSetName(link, in.Name); err != nil {
			return fmt.Errorf("rename: %w", err)
		}
	}
	if in.Mtu != 0 && link.Attrs().MTU != int(in.Mtu) {
		if err := netlink.LinkSetMTU(link, int(in.Mtu)); err != nil {
			return fmt.Errorf("set MTU %d: %w", in.Mtu, err)
		}
	}
	for _, a := range in.Addresses {
		if err := addAddress(link, a); err != nil {
			return err
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set up: %w", err)
	}
	return nil
}

func addAddress(link netlink.Link, cidr string) error {
	addr, err := netlink.ParseAddr(cidr)
	if err != nil {
		return fmt.Errorf("address %q: %w: %w", cidr, errdefs.ErrInvalidArgument, err)
	}
	if addr.IP.To4() == nil {
		// The network has decided who owns the address; waiting for duplicate
		// detection would only delay the first packet by a second.
		addr.Flags |= unix.IFA_F_NODAD
	}
	if err := netlink.AddrReplace(link, addr); err != nil {
		return fmt.Errorf("add address %s: %w", cidr, err)
	}
	return nil
}

func findLink(ctx context.Context, mac net.HardwareAddr) (netlink.Link, error) {
	ctx, cancel := context.WithTimeout(ctx, linkTimeout)
	defer cancel()
	var found netlink.Link
	err := uevent.Wait(ctx, func() (bool, error) {
		links, err := netlink.LinkList()
		if err != nil {
			return false, fmt.Errorf("list interfaces: %w", err)
		}
		for _, l := range links {
			if l.Attrs().HardwareAddr.String() == mac.String() {
				found = l
				return true, nil
			}
		}
		return false, nil
	})
	if err != nil {
		return nil, fmt.Errorf("has not appeared: %w: %w", errdefs.ErrNotFound, err)
	}
	return found, nil
}

func applyRoute(in *hyperstart.Route) error {
	r := netlink.Route{Scope: netlink.Scope(in.Scope), MTU: int(in.Mtu), Priority: int(in.Priority)}
	if in.Gateway != "" {
		if r.Gw = net.ParseIP(in.Gateway); r.Gw == nil {
			return fmt.Errorf("gateway %q is no address: %w", in.Gateway, errdefs.ErrInvalidArgument)
		}
	}
	if in.Source != "" {
		if r.Src = net.ParseIP(in.Source); r.Src == nil {
			return fmt.Errorf("source %q is no address: %w", in.Source, errdefs.ErrInvalidArgument)
		}
	}
	dst, err := destination(in.Destination, r.Gw)
	if err != nil {
		return err
	}
	r.Dst = dst
	if in.Device != "" {
		l, err := netlink.LinkByName(in.Device)
		if err != nil {
			return fmt.Errorf("find device: %w", err)
		}
		r.LinkIndex = l.Attrs().Index
	}
	if in.Onlink {
		r.Flags |= int(netlink.FLAG_ONLINK)
	}
	return netlink.RouteReplace(&r)
}

// destination parses CIDR; "" is everything, of the gateway's family.
func destination(cidr string, gw net.IP) (*net.IPNet, error) {
	if cidr == "" {
		if gw != nil && gw.To4() == nil {
			return &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}, nil
		}
		return &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}, nil
	}
	_, dst, err := net.ParseCIDR(cidr)
	if err != nil {
		return nil, fmt.Errorf("destination: %w: %w", errdefs.ErrInvalidArgument, err)
	}
	return dst, nil
}

func applyNeighbor(in *hyperstart.Neighbor) error {
	ip := net.ParseIP(in.Address)
	mac, err := net.ParseMAC(in.Mac)
	if ip == nil || err != nil {
		return fmt.Errorf("address or mac %q is malformed: %w", in.Mac, errors.Join(errdefs.ErrInvalidArgument, err))
	}
	l, err := netlink.LinkByName(in.Device)
	if err != nil {
		return fmt.Errorf("find device: %w", err)
	}
	return netlink.NeighSet(&netlink.Neigh{
		LinkIndex: l.Attrs().Index, IP: ip, HardwareAddr: mac, State: netlink.NUD_PERMANENT,
	})
}
