// Package ipam chooses the address of a Port. The choice is a suggestion: the claim is the
// creation of the Port in the API server.
package ipam

import (
	"net"
	"net/netip"
)

// Subnet is an accepted subnet of a Network.
type Subnet struct {
	// Index is stable for the life of the Network.
	Index   int
	Prefix  netip.Prefix
	Gateway netip.Addr
}

// ErrExhausted says that no address is left.
type ErrExhausted struct{ Subnets []netip.Prefix }

// MAC derives a locally administered MAC address from an address of a Network: the same
// claim has the same MAC wherever it is plugged.
func MAC(network string, address netip.Addr) net.HardwareAddr { return nil }

// Error implements error.
func (e ErrExhausted) Error() string { return "no address left" }
