package cluster

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
)

// HostIP is the address of the interface the machine's default route leaves by.
func HostIP() (string, error) {
	routes, err := netlink.RouteList(nil, netlink.FAMILY_V4)
	if err != nil {
		return "", fmt.Errorf("routes: %w", err)
	}
	for _, r := range routes {
		if r.Dst != nil && !r.Dst.IP.IsUnspecified() {
			continue
		}
		l, err := netlink.LinkByIndex(r.LinkIndex)
		if err != nil {
			continue
		}
		addrs, err := netlink.AddrList(l, netlink.FAMILY_V4)
		if err == nil && len(addrs) > 0 {
			return addrs[0].IP.String(), nil
		}
	}
	return "", errors.New("no default route, so no address for the node: give one with --node-ip")
}
