package edge

import (
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
)

// ownLink holds the external addresses of the node's own Services: a bridge without ports,
// so that they are told from everybody else's by where they are.
const ownLink = "h8s-own"

// answer has the node be where these addresses are, and no others of a time before. They
// are the node's while it announces them: Linux answers ARP for an address of any link, and
// neighbour solicitations for those that are proxied. m.node is held.
func (m *Manager) answer(want []netip.Addr) error {
	link, err := m.nl.LinkByName(ownLink)
	if missing(err) && len(want) == 0 {
		return nil
	}
	if missing(err) {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = ownLink
		if err := m.nl.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
			return fmt.Errorf("make %s: %w", ownLink, err)
		}
		link, err = m.nl.LinkByName(ownLink)
	}
	if err != nil {
		return fmt.Errorf("link %s: %w", ownLink, err)
	}
	have, err := m.nl.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("addresses of %s: %w", ownLink, err)
	}
	var before []netip.Addr
	for _, a := range have {
		if p := prefix(a.IPNet); !p.Addr().IsLinkLocalUnicast() {
			before = append(before, p.Addr())
		}
	}
	var hosts []netip.Prefix
	announced := map[netip.Addr]bool{}
	for _, a := range want {
		if a.Is4() || m.ipv6 {
			hosts = append(hosts, host(a))
			announced[a] = true
		}
	}
	// Who is told of an address finds it here already.
	if err := setUp(m.nl, link); err != nil {
		return err
	}
	if err := syncAddresses(m.nl, link, hosts); err != nil {
		return err
	}
	if err := m.announce(before, announced); err != nil {
		return err
	}
	if len(want) > 0 {
		return nil
	}
	if err := m.nl.LinkDel(link); err != nil && !missing(err) {
		return fmt.Errorf("remove %s: %w", ownLink, err)
	}
	return nil
}
