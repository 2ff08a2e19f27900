// Package service turns Services into nftables maps of an edge namespace. See DESIGN §3
// and reference/tenancy-network.md §2.5.
//
// It owns the table h8s_svc of each edge, and the conntrack entries its translations
// leave. It must not know Pods, Networks or the API server: Select takes API objects and
// everything else takes addresses.
//
// One map leads from (address, protocol, port) to a class, which is all a chain needs to
// know: how many endpoints there are and what to do besides. A second one leads from
// (address, protocol, port, index) to an endpoint. There is one chain per class, so a
// change of a Service changes elements and hardly ever rules.
package service

import (
	"net/netip"
	"time"
)

// Service is one Service as the data plane sees it: endpoints are chosen already.
type Service struct {
	// Key is namespace/name.
	Key string
	// ClusterIPs, and External addresses with the sources that may use them (all if none).
	ClusterIPs   []netip.Addr
	External     []netip.Addr
	SourceRanges []netip.Prefix
	// ExternalLocal keeps the client's address for External (externalTrafficPolicy Local).
	ExternalLocal bool
	// Affinity keeps a client on an endpoint for this long; 0 is none.
	Affinity time.Duration
	Ports    []Port
}

// Port is one port of a Service.
type Port struct {
	// Protocol is unix.IPPROTO_TCP, UDP or SCTP.
	Protocol uint8
	Port     uint16
	// Internal are the endpoints for ClusterIPs, External those for External addresses.
	// Clients inside the Network use Internal for External too if ExternalLocal is set.
	Internal, External []Endpoint
	// Elsewhere tells that there are endpoints a traffic policy keeps from this node:
	// an empty list is then answered by silence, so that clients try elsewhere, rather
	// than by a refusal.
	Elsewhere bool
}

// Endpoint is where a connection may go.
type Endpoint struct {
	Address netip.AddrPort
	// Local is on this node.
	Local bool
}

// Options are addresses of the edge.
type Options struct {
	// Gateways are the sources of hairpins, Overlay those of what goes to other nodes on
	// behalf of clients from outside; at most one of each family.
	Gateways, Overlay []netip.Addr
	// Inside are the Network's subnets. Clients there keep their address whatever they
	// use, and may use External addresses wherever the endpoints are; all others come to
	// other nodes' endpoints from Overlay. Without it only External addresses do that.
	Inside []netip.Prefix
}

// Stats is what a Sync did.
type Stats struct {
	// Added and Deleted count set elements, Flows the conntrack entries removed.
	Added, Deleted, Flows int
}
