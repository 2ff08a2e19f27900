package edge

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

const (
	// Links of an edge: to the node, and into the overlay. Pods' links begin with "p".
	uplinkName   = "up0"
	overlayLinks = "vx-"
	// nodeLinks are the node's ends of uplinks.
	nodeLinks = "h-"
	podLinks  = "p"

	// apiPort is where an edge reaches the API server, at the node's end of its uplink.
	apiPort = 6443
	// transits is how many uplinks fit into transit4.
	transits = 8192
	// protocol marks our routes in the node's namespace.
	protocol = 104
)

var (
	transit4 = netip.MustParsePrefix("169.254.64.0/18")
	transit6 = netip.MustParsePrefix("fd68:3873:1::/112")
	overlay6 = netip.MustParsePrefix("fd68:3873:2::/96")

	// Addresses of links are the same everywhere: what a Pod or a peer was told stays
	// true when a link is made again.
	gatewayMAC = net.HardwareAddr{0x0a, 0x68, 0x38, 0x73, 0, 1}
	nodeMAC    = net.HardwareAddr{0x0a, 0x68, 0x38, 0x73, 0, 2}
	uplinkMAC  = net.HardwareAddr{0x0a, 0x68, 0x38, 0x73, 0, 3}
)

// LinkName is the host end's name for a CNI attachment: stable, at most 15 characters.
func LinkName(containerID, iface string) string {
	sum := sha256.Sum256([]byte(containerID + "/" + iface))
	return podLinks + hex.EncodeToString(sum[:7])
}

// Overlay are a node's addresses inside every overlay: sources of what the edges send
// on behalf of others. v4 is the node's own.
func Overlay(node netip.Addr) (v4, v6 netip.Addr) {
	b := overlay6.Addr().As16()
	if node.Is4() {
		a := node.As4()
		copy(b[12:], a[:])
		return node, netip.AddrFrom16(b)
	}
	a := node.As16()
	sum := sha256.Sum256(a[:])
	copy(b[12:], sum[:4])
	return netip.Addr{}, netip.AddrFrom16(b)
}

// overlayMAC is that of a node's VTEPs.
func overlayMAC(node netip.Addr) net.HardwareAddr {
	_, v6 := Overlay(node)
	b := v6.As16()
	return append(net.HardwareAddr{0x0a, 0x69}, b[12:]...)
}

// transit is one uplink's addresses.
type transit struct{ here4, node4, here6, node6 netip.Addr }

// transitAt is the i-th of them.
func transitAt(i int) transit {
	var t transit
	b4 := transit4.Addr().As4()
	n := binary.BigEndian.Uint32(b4[:]) + 2*uint32(i)
	binary.BigEndian.PutUint32(b4[:], n)
	t.node4 = netip.AddrFrom4(b4)
	t.here4 = t.node4.Next()
	b6 := transit6.Addr().As16()
	binary.BigEndian.PutUint16(b6[14:], uint16(2*i))
	t.node6 = netip.AddrFrom16(b6)
	t.here6 = t.node6.Next()
	return t
}

// transitIndex is the inverse, for either end's address.
func transitIndex(a netip.Addr) (int, bool) {
	if !transit4.Contains(a) {
		return 0, false
	}
	b, base := a.As4(), transit4.Addr().As4()
	return int(binary.BigEndian.Uint32(b[:])-binary.BigEndian.Uint32(base[:])) / 2, true
}

// transitStart is where the search for a free uplink begins: where it likely was before.
func transitStart(id string) int {
	sum := sha256.Sum256([]byte(id))
	return int(binary.BigEndian.Uint16(sum[:])) % transits
}

// linkLocal is the one link-local address a NIC may use.
func linkLocal(mac net.HardwareAddr) netip.Addr {
	if len(mac) != 6 {
		return netip.Addr{}
	}
	return netip.AddrFrom16([16]byte{0xfe, 0x80, 8: mac[0] ^ 2, 9: mac[1], 10: mac[2], 11: 0xff, 12: 0xfe, 13: mac[3], 14: mac[4], 15: mac[5]})
}

func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}

func validID(id string) error {
	if b, err := hex.DecodeString(id); err != nil || len(b) != 4 || id != strings.ToLower(id) {
		return invalid("id %q is not 8 lower-case hexadecimal characters", id)
	}
	return nil
}

// validate checks what others made up.
func (s Spec) validate() error {
	if err := validID(s.ID); err != nil {
		return fmt.Errorf("edge %s: %w", s.Name, err)
	}
	if s.Uplinks && s.Routed {
		return invalid("edge %s: a network that others carry cannot be routed by nodes", s.Name)
	}
	if !s.Uplinks && (s.VNI == 0 || s.VNI >= 1<<24) {
		return invalid("edge %s: vni %d is not between 1 and 16777215", s.Name, s.VNI)
	}
	if s.MTU < 1280 || s.MTU > 65535 {
		return invalid("edge %s: mtu %d is not between 1280 and 65535", s.Name, s.MTU)
	}
	if len(s.Subnets) != len(s.Gateways) {
		return invalid("edge %s: %d subnets but %d gateways: each subnet needs one", s.Name, len(s.Subnets), len(s.Gateways))
	}
	for i, p := range s.Subnets {
		if !p.IsValid() || p != p.Masked() || !p.Contains(s.Gateways[i]) {
			return invalid("edge %s: subnet %s does not hold its gateway %s", s.Name, p, s.Gateways[i])
		}
	}
	for _, p := range s.Ports {
		if len(p.MAC) != 6 {
			return invalid("edge %s: port %v: mac %q is not an Ethernet address", s.Name, p.Addresses, p.MAC)
		}
		if p.Link != "" {
			if err := validLink(p.Link); err != nil {
				return fmt.Errorf("edge %s: %w", s.Name, err)
			}
			if s.Uplinks {
				if err := validUplink(p.Uplink); err != nil {
					return fmt.Errorf("edge %s: port %v: %w", s.Name, p.Addresses, err)
				}
			}
		}
		for _, a := range p.Addresses {
			if !s.contains(a) {
				return invalid("edge %s: port address %s is in none of the subnets %v", s.Name, a, s.Subnets)
			}
		}
	}
	return s.validateFronts()
}

// validateFronts tells whether there may be such fronts.
func (s Spec) validateFronts() error {
	if len(s.Fronts) > 0 && !s.Uplinks {
		return invalid("edge %s: a network that nobody else carries has no fronts", s.Name)
	}
	if len(s.Fronts) > maxFronts {
		return invalid("edge %s: %d fronts, and there may be %d", s.Name, len(s.Fronts), maxFronts)
	}
	for _, f := range s.Fronts {
		if err := errors.Join(validLink(f.Link), validUplink(f.Uplink)); err != nil {
			return fmt.Errorf("edge %s: front %v: %w", s.Name, f.Addresses, err)
		}
		if len(f.MAC) != 6 || f.MAC[0]&1 != 0 {
			return invalid("edge %s: front %v: mac %q is not an Ethernet address", s.Name, f.Addresses, f.MAC)
		}
		if len(f.Addresses) == 0 || len(onePerFamily(f.Addresses)) != len(f.Addresses) {
			return invalid("edge %s: front %v: want one address of a family", s.Name, f.Addresses)
		}
		for _, a := range f.Addresses {
			if !s.contains(a) || slices.Contains(s.Gateways, a) {
				return invalid("edge %s: front address %s is in none of the subnets %v, or a gateway", s.Name, a, s.Subnets)
			}
		}
	}
	return nil
}

func (s Spec) contains(a netip.Addr) bool {
	for _, p := range s.Subnets {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

func validLink(name string) error {
	if len(name) < 2 || len(name) > 15 || !strings.HasPrefix(name, podLinks) || strings.ContainsAny(name, "/ \t\n") {
		return invalid("link %q is not a name from LinkName", name)
	}
	return nil
}

// validUplink tells whether a link of the node's may be called that.
func validUplink(name string) error {
	if name == "" || len(name) > 15 || name == "." || name == ".." || name == "lo" || strings.ContainsAny(name, "/: \t\n%*") ||
		strings.HasPrefix(name, nodeLinks) || strings.HasPrefix(name, overlayLinks) {
		return invalid("uplink %q is no name a link of the node's can have", name)
	}
	return nil
}

func (a Attachment) validate() error {
	if err := validLink(a.Link); err != nil {
		return err
	}
	if a.Uplink != "" {
		if err := validUplink(a.Uplink); err != nil {
			return fmt.Errorf("attachment %s: %w", a.Link, err)
		}
	}
	if a.Interface == "" || len(a.Interface) > 15 || a.Interface == "." || a.Interface == ".." || strings.ContainsAny(a.Interface, "/: \t\n%") {
		return invalid("attachment %s: interface %q is no link name", a.Link, a.Interface)
	}
	if len(a.MAC) != 6 || a.MAC[0]&1 != 0 {
		return invalid("attachment %s: mac %q is not an Ethernet unicast address", a.Link, a.MAC)
	}
	if a.MTU < 1280 || a.MTU > 65535 {
		return invalid("attachment %s: mtu %d is not between 1280 and 65535", a.Link, a.MTU)
	}
	if len(a.Addresses) == 0 {
		return invalid("attachment %s: no addresses", a.Link)
	}
	for _, x := range a.Addresses {
		if !x.IsValid() || x.IsUnspecified() || x.IsMulticast() || x.IsLoopback() || x.Is4In6() {
			return invalid("attachment %s: address %s cannot be a Pod's", a.Link, x)
		}
	}
	return nil
}
