// Package dns answers names inside a Network: one resolver per edge namespace, which
// knows the Namespaces bound to that Network and nothing else of the cluster.
//
// It owns the records, made as the Kubernetes DNS specification says, the questions it
// passes on and their cache. Names of the cluster's domain and addresses of the Network
// are answered here or not at all. It must not know where its view comes from.
package dns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"github.com/miekg/dns"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/hypernetes/hypernetes/network/netns"
)

// Config is what a resolver is made with.
type Config struct {
	// NS and Address are where it listens, UDP and TCP port 53. Without NS it is the
	// process's own namespace.
	NS      *netns.NS
	Address netip.Addr
	// Domain of the cluster, "cluster.local".
	Domain string
	// Upstreams answer other names. UpstreamDial dials them: from the node for the node's
	// resolvers, from the edge for a Network's own.
	Upstreams    []netip.AddrPort
	UpstreamDial func(ctx context.Context, network, address string) (net.Conn, error)
	// Rate bounds upstream questions per second (burst twice that), CacheEntries the cache.
	// 0 is 500 and 2000.
	Rate, CacheEntries int
}

const (
	defaultRate, defaultCache = 500, 2000
	port                      = 53
)

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

// Server is a running resolver. Serve makes it; its methods may be called concurrently.
type Server struct {
	zone    string
	address netip.Addr
	index   atomic.Pointer[index]
	forward *forwarder
	counts  counts

	ctx    context.Context
	cancel context.CancelFunc
	packet *net.UDPConn
	listen net.Listener
	wg     sync.WaitGroup
	close  sync.Once
	closed error

	mu    sync.Mutex
	conns map[net.Conn]struct{}
}

// Stats count since Serve.
type Stats struct {
	// Queries were read. Local of them were answered from the view, Cached and Forwarded
	// by an upstream's earlier and new answer; Refused were one too many; Failed got none.
	Queries, Local, Cached, Forwarded, Refused, Failed uint64
}

type counts struct{ queries, local, cached, forwarded, refused, failed atomic.Uint64 }

// Stats tells how much it has done.
func (s *Server) Stats() Stats {
	c := &s.counts
	return Stats{
		Queries: c.queries.Load(), Local: c.local.Load(), Cached: c.cached.Load(),
		Forwarded: c.forwarded.Load(), Refused: c.refused.Load(), Failed: c.failed.Load(),
	}
}

// Serve starts it. It serves until Close; ctx bounds the start. Until the first Update it
// answers names of the cluster with SERVFAIL, which clients do not keep.
//
// Errors: errdefs.ErrInvalidArgument naming the field.
func Serve(ctx context.Context, c Config) (*Server, error) {
	if !c.Address.IsValid() {
		return nil, fmt.Errorf("dns: Address is not set: %w", errdefs.ErrInvalidArgument)
	}
	ns := c.NS
	if ns == nil {
		own, err := netns.Current()
		if err != nil {
			return nil, err
		}
		defer own.Close()
		ns = own
	}
	at := netip.AddrPortFrom(c.Address, port).String()
	p, err := ns.ListenPacket(ctx, "udp", at)
	if err != nil {
		return nil, fmt.Errorf("dns: %w", err)
	}
	l, err := ns.Listen(ctx, "tcp", at)
	if err != nil {
		_ = p.Close()
		return nil, fmt.Errorf("dns: %w", err)
	}
	s, err := newServer(c)
	if err != nil {
		_ = p.Close()
		_ = l.Close()
		return nil, err
	}
	s.serve(p.(*net.UDPConn), l)
	return s, nil
}

func newServer(c Config) (*Server, error) {
	zone := dns.CanonicalName(c.Domain)
	if _, ok := dns.IsDomainName(zone); !ok || zone == "." || len(zone) > 100 {
		return nil, fmt.Errorf("dns: Domain %.200q: must be a domain name of at most 100 characters: %w", c.Domain, errdefs.ErrInvalidArgument)
	}
	if len(c.Upstreams) > 0 && c.UpstreamDial == nil {
		return nil, fmt.Errorf("dns: UpstreamDial is not set, Upstreams are: %w", errdefs.ErrInvalidArgument)
	}
	if c.Rate <= 0 {
		c.Rate = defaultRate
	}
	if c.CacheEntries <= 0 {
		c.CacheEntries = defaultCache
	}
	s := &Server{zone: zone, address: c.Address.Unmap(), conns: map[net.Conn]struct{}{}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.forward = newForwarder(c)
	return s, nil
}

// readers is how many goroutines read UDP; each answers what it can at once.
var readers = max(2, min(8, runtime.GOMAXPROCS(0)))

func (s *Server) serve(p *net.UDPConn, l net.Listener) {
	s.packet, s.listen = p, l
	_ = p.SetReadBuffer(1 << 20) // a burst waits rather than is lost
	for range readers {
		s.wg.Add(1)
		go s.serveUDP()
	}
	s.wg.Add(1)
	go s.serveTCP()
}

// Update replaces what it knows, at once for every question that follows.
func (s *Server) Update(v View) {
	s.index.Store(newIndex(s.zone, s.address, v))
}

// Close stops it and waits.
func (s *Server) Close() error {
	s.close.Do(func() {
		s.cancel()
		s.closed = errors.Join(s.packet.Close(), s.listen.Close())
		s.mu.Lock()
		for c := range s.conns {
			_ = c.Close()
		}
		s.mu.Unlock()
		s.wg.Wait()
		s.forward.close()
	})
	return s.closed
}
