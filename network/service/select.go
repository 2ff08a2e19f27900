package service

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// Bounds of what one Service may ask for; more is left out, the same on every node.
const (
	maxPorts        = 1024
	maxAddresses    = 64
	maxSourceRanges = 1024
	defaultAffinity = 3 * time.Hour
	longestAffinity = 24 * time.Hour
)

// Select is the choice of endpoints: readiness and termination, traffic policies and
// topology hints as kube-proxy's (KEP-1669, KEP-2086, KEP-4444).
type Select struct {
	Node, Zone string
	// External are the load-balancer addresses given to the Service.
	External []netip.Addr
}

// From translates a Service and its slices; ok is false for Services without a data
// plane (headless, ExternalName, no address). spec.externalIPs is never looked at.
func (s Select) From(svc *corev1.Service, eps []*discoveryv1.EndpointSlice) (out Service, ok bool) {
	if svc == nil || svc.Spec.Type == corev1.ServiceTypeExternalName || svc.Spec.ClusterIP == corev1.ClusterIPNone {
		return Service{}, false
	}
	out.Key = svc.Namespace + "/" + svc.Name
	ips := svc.Spec.ClusterIPs
	if len(ips) == 0 {
		ips = []string{svc.Spec.ClusterIP}
	}
	for _, ip := range ips {
		if a, err := netip.ParseAddr(ip); err == nil && usable(a) && len(out.ClusterIPs) < maxAddresses {
			out.ClusterIPs = append(out.ClusterIPs, a)
		}
	}
	for _, a := range s.External {
		if a = a.Unmap(); usable(a) && len(out.External) < maxAddresses {
			out.External = append(out.External, a)
		}
	}
	if len(out.ClusterIPs)+len(out.External) == 0 {
		return Service{}, false
	}
	out.SourceRanges = sourceRanges(svc.Spec.LoadBalancerSourceRanges)
	out.ExternalLocal = svc.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal
	internalLocal := svc.Spec.InternalTrafficPolicy != nil && *svc.Spec.InternalTrafficPolicy == corev1.ServiceInternalTrafficPolicyLocal
	if svc.Spec.SessionAffinity == corev1.ServiceAffinityClientIP {
		out.Affinity = defaultAffinity
		if c := svc.Spec.SessionAffinityConfig; c != nil && c.ClientIP != nil && c.ClientIP.TimeoutSeconds != nil {
			out.Affinity = time.Duration(min(max(int64(*c.ClientIP.TimeoutSeconds), 1), int64(longestAffinity/time.Second))) * time.Second
		}
	}
	for i := range svc.Spec.Ports {
		p := &svc.Spec.Ports[i]
		proto, known := protocol(p.Protocol)
		if !known || p.Port < 1 || p.Port > 65535 || len(out.Ports) == maxPorts {
			continue
		}
		port := Port{Protocol: proto, Port: uint16(p.Port)}
		for _, v6 := range []bool{false, true} {
			c := s.candidates(svc, p, eps, v6)
			cluster, local := s.choose(c)
			in, ex := cluster, cluster
			if internalLocal {
				in = local
			}
			if out.ExternalLocal {
				ex = local
			}
			port.Internal = append(port.Internal, in...)
			port.External = append(port.External, ex...)
			if len(cluster) > 0 && (len(in) == 0 || len(ex) == 0) {
				port.Elsewhere = true
			}
		}
		out.Ports = append(out.Ports, port)
	}
	return out, true
}

func protocol(p corev1.Protocol) (uint8, bool) {
	switch p {
	case corev1.ProtocolTCP, "":
		return unix.IPPROTO_TCP, true
	case corev1.ProtocolUDP:
		return unix.IPPROTO_UDP, true
	case corev1.ProtocolSCTP:
		return unix.IPPROTO_SCTP, true
	}
	return 0, false
}

// usable are addresses a connection may be led to: not the edge's own loopback, not what
// is one link's own, as the API's validation has it for endpoints.
func usable(a netip.Addr) bool {
	return a.IsValid() && a.Zone() == "" && !a.Is4In6() && !a.IsUnspecified() && !a.IsLoopback() && !a.IsMulticast() &&
		!a.IsLinkLocalUnicast() && a != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

// sourceRanges parses; if there are any but none can be understood, nobody is let in.
func sourceRanges(in []string) []netip.Prefix {
	var out []netip.Prefix
	for _, r := range in[:min(len(in), maxSourceRanges)] {
		if p, err := netip.ParsePrefix(strings.TrimSpace(r)); err == nil {
			out = append(out, p.Masked())
		}
	}
	if len(in) > 0 && len(out) == 0 {
		out = []netip.Prefix{netip.PrefixFrom(netip.IPv4Unspecified(), 32)}
	}
	return out
}

// candidate is an endpoint with what the choice depends on.
type candidate struct {
	Endpoint
	ready, serving, terminating bool
	nodes, zones                []string
}

// candidates are the endpoints of one port and family, sorted and without repetition: an
// endpoint may be in two slices while it moves.
func (s Select) candidates(svc *corev1.Service, p *corev1.ServicePort, all []*discoveryv1.EndpointSlice, v6 bool) []candidate {
	var out []candidate
	family := discoveryv1.AddressTypeIPv4
	if v6 {
		family = discoveryv1.AddressTypeIPv6
	}
	for _, slice := range all {
		if slice == nil || slice.AddressType != family || slice.Namespace != svc.Namespace {
			continue
		}
		if name, labelled := slice.Labels[discoveryv1.LabelServiceName]; labelled && name != svc.Name {
			continue
		}
		for _, port := range portsOf(slice, p) {
			for i := range slice.Endpoints {
				e := &slice.Endpoints[i]
				// All addresses of one endpoint are the same Pod: the first is taken.
				if len(e.Addresses) == 0 {
					continue
				}
				a, err := netip.ParseAddr(e.Addresses[0])
				if err != nil || !usable(a) || a.Is6() != v6 {
					continue
				}
				c := candidate{
					Endpoint:    Endpoint{Address: netip.AddrPortFrom(a, port), Local: s.Node != "" && e.NodeName != nil && *e.NodeName == s.Node},
					ready:       e.Conditions.Ready == nil || *e.Conditions.Ready,
					serving:     e.Conditions.Serving == nil || *e.Conditions.Serving,
					terminating: e.Conditions.Terminating != nil && *e.Conditions.Terminating,
				}
				if e.Hints != nil {
					for _, h := range e.Hints.ForNodes {
						c.nodes = append(c.nodes, h.Name)
					}
					for _, h := range e.Hints.ForZones {
						c.zones = append(c.zones, h.Name)
					}
				}
				out = append(out, c)
			}
		}
	}
	// Of the same endpoint the ready one, then the serving one counts.
	rank := func(c candidate) int {
		switch {
		case c.ready:
			return 0
		case c.serving:
			return 1
		}
		return 2
	}
	slices.SortStableFunc(out, func(a, b candidate) int {
		return cmp.Or(a.Address.Compare(b.Address), rank(a)-rank(b))
	})
	return slices.CompactFunc(out, func(a, b candidate) bool { return a.Address == b.Address })
}

// portsOf are the slice's numbers for a Service's port: names may mean other numbers in
// other slices.
func portsOf(slice *discoveryv1.EndpointSlice, p *corev1.ServicePort) []uint16 {
	want, _ := protocol(p.Protocol)
	for _, sp := range slice.Ports {
		name, proto := "", corev1.ProtocolTCP
		if sp.Name != nil {
			name = *sp.Name
		}
		if sp.Protocol != nil {
			proto = *sp.Protocol
		}
		have, known := protocol(proto)
		if name == p.Name && known && have == want && sp.Port != nil && *sp.Port > 0 && *sp.Port <= 65535 {
			return []uint16{uint16(*sp.Port)}
		}
	}
	return nil
}

// choose gives the endpoints for policy Cluster and those for policy Local.
func (s Select) choose(all []candidate) (cluster, local []Endpoint) {
	hinted := s.hinted(all)
	pick := func(f func(candidate) bool) []Endpoint {
		var out []Endpoint
		for _, c := range all {
			if len(out) < maxEndpoints && f(c) {
				out = append(out, c.Endpoint)
			}
		}
		return out
	}
	leaving := func(c candidate) bool { return c.serving && c.terminating }
	if cluster = pick(func(c candidate) bool { return c.ready && hinted(c) }); len(cluster) == 0 {
		cluster = pick(leaving)
	}
	if local = pick(func(c candidate) bool { return c.Local && c.ready }); len(local) == 0 {
		local = pick(func(c candidate) bool { return c.Local && leaving(c) })
	}
	return cluster, local
}

// hinted is the filter topology hints make. They count only if every ready endpoint has
// some and one is for this node or zone: half-written hints must not concentrate traffic.
func (s Select) hinted(all []candidate) func(candidate) bool {
	nodes, zones, node, zone := true, true, false, false
	for _, c := range all {
		if !c.ready {
			continue
		}
		nodes, zones = nodes && len(c.nodes) > 0, zones && len(c.zones) > 0
		node = node || slices.Contains(c.nodes, s.Node)
		zone = zone || slices.Contains(c.zones, s.Zone)
	}
	switch {
	case nodes && node && s.Node != "":
		return func(c candidate) bool { return slices.Contains(c.nodes, s.Node) }
	case zones && zone && s.Zone != "":
		return func(c candidate) bool { return slices.Contains(c.zones, s.Zone) }
	}
	return func(candidate) bool { return true }
}
