// Package service turns Services into nftables maps of an edge namespace. See DESIGN §3
// and reference/tenancy-network.md §2.5.
package service

import (
	"context"
	"net/netip"
	"time"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/hypernetes/hypernetes/network/netns"
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
	Internal, External []Endpoint
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
}

// Table is the table of one edge. Sync calls must not overlap.
type Table struct{}

// Open prepares a table; what a former process left there is adopted, not flushed.
func Open(ns *netns.NS, o Options) (*Table, error) { return nil, errdefs.ErrNotImplemented }

// Stats is what a Sync did.
type Stats struct {
	// Added and Deleted count set elements, Flows the conntrack entries removed.
	Added, Deleted, Flows int
}

// Sync makes the table hold just these Services: element by element, in one
// transaction, without touching what stays.
func (t *Table) Sync(ctx context.Context, services []Service) (Stats, error) {
	return Stats{}, errdefs.ErrNotImplemented
}

// Select is the choice of endpoints: readiness and termination, traffic policies and
// topology hints as kube-proxy's (KEP-1669, KEP-2086, KEP-4444).
type Select struct {
	Node, Zone string
	// External are the load-balancer addresses given to the Service.
	External []netip.Addr
}

// From translates a Service and its slices; ok is false for Services without a data
// plane (headless, ExternalName, no address). spec.externalIPs is never looked at.
func (s Select) From(svc *corev1.Service, slices []*discoveryv1.EndpointSlice) (out Service, ok bool) {
	return Service{}, false
}
