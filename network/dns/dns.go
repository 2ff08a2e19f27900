// Package dns answers names inside a Network: one resolver per edge namespace, which
// knows the Namespaces bound to that Network and nothing else of the cluster.
package dns

import (
	"context"
	"net"
	"net/netip"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/hypernetes/hypernetes/network/netns"
)

// Config is what a resolver is made with.
type Config struct {
	// NS and Address are where it listens, UDP and TCP port 53.
	NS      *netns.NS
	Address netip.Addr
	// Domain of the cluster, "cluster.local".
	Domain string
	// Upstreams answer other names. UpstreamDial dials them: from the node for the node's
	// resolvers, from the edge for a Network's own.
	Upstreams    []netip.AddrPort
	UpstreamDial func(ctx context.Context, network, address string) (net.Conn, error)
	// Rate bounds upstream questions per second (burst twice that), CacheEntries the cache.
	Rate, CacheEntries int
}

// View is what it knows. It is not changed after Update.
type View struct {
	// Namespaces bound to the Network.
	Namespaces []string
	// Services of these Namespaces, and default/kubernetes.
	Services []*corev1.Service
	Slices   []*discoveryv1.EndpointSlice
	// Reverse are the ranges whose PTR questions are ours to answer (subnets of the
	// Network, the Service range).
	Reverse []netip.Prefix
}

// Server is a running resolver.
type Server struct{}

// Serve starts it. It serves until Close.
func Serve(ctx context.Context, c Config) (*Server, error) { return nil, errdefs.ErrNotImplemented }

// Update replaces what it knows.
func (s *Server) Update(v View) {}

// Close stops it and waits.
func (s *Server) Close() error { return nil }
