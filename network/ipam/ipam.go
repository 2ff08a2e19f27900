// Package ipam chooses the address of a Port. The choice is a suggestion: the claim is the
// creation of the Port in the API server. It also owns ranges of external addresses.
//
// First family. A Port of a Network with IPv4 subnets is claimed by its IPv4 address, one
// of a Network without by its IPv6 address.
//
// Second family. The IPv6 address of a dual-stack Port is not claimed but computed, so
// that one claim decides both: in the first IPv6 subnet, in order of names, with h host
// bits, its host part is Index<<s | offset, where Index is the IPv4 subnet's, offset the
// IPv4 address's place in it, and s the smaller of 24 and h-4. So 10.0.0.5 of
// 10.0.0.0/16, Index 0, is fd00::5 of fd00::/64. IPv4 addresses whose offset does not fit
// (IPv6 subnets smaller than /100) or whose IPv6 address is reserved are passed over.
//
// Choice. A random place, and the next free address after it: nodes that choose at the
// same time seldom choose alike, and an address just given up seldom comes back at once.
package ipam

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"

	"github.com/containerd/errdefs"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
)

// Subnet is an accepted subnet of a Network.
type Subnet struct {
	// Index is stable for the life of the Network, and at most 15.
	Index   int
	Prefix  netip.Prefix
	Gateway netip.Addr
}

// ErrExhausted says that no address is left.
type ErrExhausted struct{ Subnets []netip.Prefix }

// Error implements error.
func (e ErrExhausted) Error() string {
	names := make([]string, len(e.Subnets))
	for i, p := range e.Subnets {
		names[i] = p.String()
	}
	return fmt.Sprintf("no address is left in %s: add a subnet to the Network, or delete Pods or Ports", strings.Join(names, ", "))
}

// Is makes it an errdefs.ErrResourceExhausted.
func (e ErrExhausted) Is(target error) bool { return target == errdefs.ErrResourceExhausted }

// MAC derives a locally administered MAC address from an address of a Network
// (namespace/name): the same claim has the same MAC wherever it is plugged.
func MAC(network string, address netip.Addr) net.HardwareAddr {
	sum := sha256.Sum256([]byte(network + "\x00" + address.String()))
	mac := net.HardwareAddr(sum[:6])
	mac[0] = mac[0]&^0x01 | 0x02
	return mac
}

// Subnets reads the accepted subnets of a Network, in the order addresses are taken from.
func Subnets(n *v1alpha1.Network) ([]Subnet, error) {
	out := make([]Subnet, 0, len(n.Status.Subnets))
	for i, s := range n.Status.Subnets {
		prefix, err := netip.ParsePrefix(s.CIDR)
		if err != nil {
			return nil, fmt.Errorf("network %s/%s: status.subnets[%d].cidr: %w", n.Namespace, n.Name, i, err)
		}
		gateway, err := netip.ParseAddr(s.Gateway)
		if err != nil {
			return nil, fmt.Errorf("network %s/%s: status.subnets[%d].gateway: %w", n.Namespace, n.Name, i, err)
		}
		if !prefix.Contains(gateway) || s.Index < 0 || s.Index > maxIndex {
			return nil, fmt.Errorf("network %s/%s: status.subnets[%d]: gateway %s of %s, index %d: %w", n.Namespace, n.Name, i, s.Gateway, s.CIDR, s.Index, errdefs.ErrInvalidArgument)
		}
		out = append(out, Subnet{Index: int(s.Index), Prefix: prefix.Masked(), Gateway: gateway})
	}
	return out, nil
}

const (
	maxIndex = 15
	// The low bits of an address that are chosen; wider IPv6 subnets are not used beyond,
	// unless a Pod asks for such an address.
	chosenBits = 24
)

// Choose suggests the addresses of a new Port, its claim first. taken tells of addresses
// known to be in use, of either family.
func Choose(subnets []Subnet, taken func(netip.Addr) bool, r *rand.Rand) ([]netip.Addr, error) {
	if len(subnets) == 0 {
		return nil, fmt.Errorf("the network has no subnet: %w", errdefs.ErrFailedPrecondition)
	}
	first, second := families(subnets)
	for _, s := range first {
		size := uint64(1) << min(hostBits(s.Prefix), chosenBits)
		if limit := derivable(second); limit < size {
			size = limit
		}
		start := r.Uint64N(size)
		// Every step but the last passes over an address that is taken or reserved.
		for i := range size {
			addresses, ok := complete(s, second, add(s.Prefix.Addr(), (start+i)%size))
			if ok && !anyOf(addresses, taken) {
				return addresses, nil
			}
		}
	}
	e := ErrExhausted{}
	for _, s := range first {
		e.Subnets = append(e.Subnets, s.Prefix)
	}
	return nil, e
}

// Request completes addresses a Pod or a tenant asks for, at most one of each family, to
// those of a Port; the error says what is wrong with them. Whether they are free is for
// the claim to find out.
func Request(subnets []Subnet, want []netip.Addr) ([]netip.Addr, error) {
	first, second := families(subnets)
	var claim, derived netip.Addr
	for _, a := range want {
		s, ok := find(subnets, a)
		switch {
		case !ok:
			return nil, fmt.Errorf("address %s: not in a subnet of the network (%s): %w", a, prefixes(subnets), errdefs.ErrInvalidArgument)
		case a == s.Gateway:
			return nil, fmt.Errorf("address %s: is the gateway of %s: %w", a, s.Prefix, errdefs.ErrInvalidArgument)
		case reserved(s, a):
			return nil, fmt.Errorf("address %s: is reserved in %s: %w", a, s.Prefix, errdefs.ErrInvalidArgument)
		}
		slot := &claim
		if len(second) > 0 && a.Is6() {
			slot = &derived
		}
		if slot.IsValid() {
			return nil, fmt.Errorf("addresses %s and %s: at most one of each family: %w", *slot, a, errdefs.ErrInvalidArgument)
		}
		*slot = a
	}
	if !claim.IsValid() && derived.IsValid() {
		if claim = origin(first, second, derived); !claim.IsValid() {
			return nil, fmt.Errorf("address %s: in a dual-stack network the IPv6 address follows from the IPv4 address, and this one follows from none: ask for the IPv4 address: %w", derived, errdefs.ErrInvalidArgument)
		}
	}
	if !claim.IsValid() {
		return nil, fmt.Errorf("no address asked for: %w", errdefs.ErrInvalidArgument)
	}
	s, _ := find(first, claim)
	addresses, ok := complete(s, second, claim)
	if !ok {
		return nil, fmt.Errorf("address %s: no IPv6 address follows from it: %w", claim, errdefs.ErrInvalidArgument)
	}
	if derived.IsValid() && addresses[1] != derived {
		return nil, fmt.Errorf("address %s: goes with %s, not with %s: %w", claim, addresses[1], derived, errdefs.ErrInvalidArgument)
	}
	return addresses, nil
}

// Capacity is how many Ports a Network can have, at most 2^31-1: those whose addresses
// Choose may suggest.
func Capacity(subnets []Subnet) int {
	first, second := families(subnets)
	total := uint64(0)
	for _, s := range first {
		size := min(uint64(1)<<min(hostBits(s.Prefix), chosenBits), derivable(second))
		n := size
		// Network, broadcast, gateway and the IPv6 gateways are all that Choose passes over.
		out := map[netip.Addr]bool{s.Prefix.Addr(): true, s.Gateway: true}
		if s.Prefix.Addr().Is4() {
			out[lastOf(s.Prefix)] = true
		}
		if len(second) == 1 {
			if o := origin([]Subnet{s}, second, second[0].Gateway); o.IsValid() {
				out[o] = true
			}
		}
		for a := range out {
			if o, ok := offset(s.Prefix, a); ok && o < size {
				n--
			}
		}
		total += n
	}
	return int(min(total, 1<<31-1))
}

// families parts subnets into those of the claim and those of the second family.
func families(subnets []Subnet) (first, second []Subnet) {
	for _, s := range subnets {
		if s.Prefix.Addr().Is4() {
			first = append(first, s)
		} else {
			second = append(second, s)
		}
	}
	if len(first) == 0 {
		return second, nil
	}
	return first, second
}

// complete adds the second family's address; false if one of them may not be given out.
func complete(s Subnet, second []Subnet, claim netip.Addr) ([]netip.Addr, bool) {
	if reserved(s, claim) || claim == s.Gateway {
		return nil, false
	}
	if len(second) == 0 {
		return []netip.Addr{claim}, true
	}
	o, _ := offset(s.Prefix, claim)
	for _, six := range second {
		shift := shift(six.Prefix)
		if o >= 1<<shift {
			continue
		}
		a := add(six.Prefix.Addr(), uint64(s.Index)<<shift|o)
		if a != six.Gateway && !reserved(six, a) {
			return []netip.Addr{claim, a}, true
		}
	}
	return nil, false
}

// origin is the claim a derived address belongs to.
func origin(first, second []Subnet, derived netip.Addr) netip.Addr {
	six, ok := find(second, derived)
	if !ok {
		return netip.Addr{}
	}
	host, ok := offset(six.Prefix, derived)
	if !ok {
		return netip.Addr{}
	}
	shift := shift(six.Prefix)
	for _, s := range first {
		if uint64(s.Index) == host>>shift {
			if a := add(s.Prefix.Addr(), host&(1<<shift-1)); s.Prefix.Contains(a) {
				return a
			}
		}
	}
	return netip.Addr{}
}

func shift(six netip.Prefix) int { return min(chosenBits, hostBits(six)-4) }

// derivable is how many addresses of an IPv4 subnet can have one of the second family.
func derivable(second []Subnet) uint64 {
	if len(second) == 0 {
		return 1 << 62
	}
	best := 0
	for _, s := range second {
		best = max(best, shift(s.Prefix))
	}
	return 1 << best
}

// reserved are a subnet's first address and, of IPv4, its last.
func reserved(s Subnet, a netip.Addr) bool {
	return a == s.Prefix.Addr() || a.Is4() && a == lastOf(s.Prefix)
}

func find(subnets []Subnet, a netip.Addr) (Subnet, bool) {
	for _, s := range subnets {
		if s.Prefix.Contains(a) {
			return s, true
		}
	}
	return Subnet{}, false
}

func prefixes(subnets []Subnet) string {
	var out []string
	for _, s := range subnets {
		out = append(out, s.Prefix.String())
	}
	return strings.Join(out, ", ")
}

func anyOf(addresses []netip.Addr, f func(netip.Addr) bool) bool {
	for _, a := range addresses {
		if f(a) {
			return true
		}
	}
	return false
}

func hostBits(p netip.Prefix) int { return p.Addr().BitLen() - p.Bits() }

// add is the n-th address after a.
func add(a netip.Addr, n uint64) netip.Addr {
	if a.Is4() {
		b := a.As4()
		binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])+uint32(n))
		return netip.AddrFrom4(b)
	}
	b := a.As16()
	low := binary.BigEndian.Uint64(b[8:])
	binary.BigEndian.PutUint64(b[8:], low+n)
	if low+n < low {
		binary.BigEndian.PutUint64(b[:8], binary.BigEndian.Uint64(b[:8])+1)
	}
	return netip.AddrFrom16(b)
}

// distance is how many addresses b comes after a; false if that is no uint64.
func distance(a, b netip.Addr) (uint64, bool) {
	if a.BitLen() != b.BitLen() || b.Less(a) {
		return 0, false
	}
	if a.Is4() {
		x, y := a.As4(), b.As4()
		return uint64(binary.BigEndian.Uint32(y[:]) - binary.BigEndian.Uint32(x[:])), true
	}
	x, y := a.As16(), b.As16()
	high := binary.BigEndian.Uint64(y[:8]) - binary.BigEndian.Uint64(x[:8])
	xl, yl := binary.BigEndian.Uint64(x[8:]), binary.BigEndian.Uint64(y[8:])
	if yl < xl {
		high--
	}
	return yl - xl, high == 0
}

func offset(p netip.Prefix, a netip.Addr) (uint64, bool) {
	if !p.Contains(a) {
		return 0, false
	}
	return distance(p.Addr(), a)
}
