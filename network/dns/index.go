package dns

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/miekg/dns"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// index is a view made ready for questions. It is never changed.
type index struct {
	zone       string // "cluster.local."
	nodes      map[string]*node
	ptr        map[netip.Addr][]string
	reverse    []netip.Prefix
	namespaces map[string]bool
}

// node is one name. Names above others exist without records of their own.
type node struct {
	addresses []netip.Addr
	srv       []srv
	cname     string
	txt       string
	ns        string
	soa       bool
}

type srv struct {
	target string
	port   uint16
}

// kubernetes is the one Service of the namespace default that every Network sees.
const kubernetesNamespace, kubernetesService = "default", "kubernetes"

func newIndex(zone string, self netip.Addr, v View) *index {
	x := &index{
		zone: zone, nodes: make(map[string]*node, 4*len(v.Services)+8), ptr: map[netip.Addr][]string{},
		namespaces: make(map[string]bool, len(v.Namespaces)),
	}
	for _, p := range v.Reverse {
		if p.IsValid() {
			x.reverse = append(x.reverse, p.Masked())
		}
	}
	apex := x.add(zone)
	apex.soa, apex.ns = true, "ns.dns."+zone
	x.add("dns-version." + zone).txt = "1.1.0"
	x.add("svc." + zone)
	x.add("pod." + zone)
	if self.IsValid() {
		x.add(apex.ns).addresses = []netip.Addr{self}
	}
	for _, ns := range v.Namespaces {
		x.namespaces[ns] = true
		x.add(ns + ".svc." + zone)
		x.add(ns + ".pod." + zone)
	}
	type key struct{ namespace, service string }
	bySlice := make(map[key][]*discoveryv1.EndpointSlice, len(v.Services))
	for _, e := range v.Slices {
		if e == nil || e.AddressType == discoveryv1.AddressTypeFQDN {
			continue
		}
		k := key{e.Namespace, e.Labels[discoveryv1.LabelServiceName]}
		bySlice[k] = append(bySlice[k], e)
	}
	for _, s := range v.Services {
		if s == nil || !x.namespaces[s.Namespace] && (s.Namespace != kubernetesNamespace || s.Name != kubernetesService) {
			continue // not this Network's, whoever has put it here
		}
		x.addService(s, bySlice[key{s.Namespace, s.Name}])
	}
	return x
}

// add returns a name's node and makes those above it.
func (x *index) add(name string) *node {
	n := x.nodes[name]
	if n != nil {
		return n
	}
	n = &node{}
	x.nodes[name] = n
	if name != x.zone {
		x.add(name[strings.IndexByte(name, '.')+1:])
	}
	return n
}

func (x *index) addService(s *corev1.Service, slices []*discoveryv1.EndpointSlice) {
	name := s.Name + "." + s.Namespace + ".svc." + x.zone
	n := x.add(name)
	switch {
	case s.Spec.Type == corev1.ServiceTypeExternalName:
		if target := dns.CanonicalName(s.Spec.ExternalName); s.Spec.ExternalName != "" {
			if _, ok := dns.IsDomainName(target); ok {
				n.cname = target
			}
		}
	case s.Spec.ClusterIP == corev1.ClusterIPNone:
		x.addHeadless(s, n, name, slices)
	default:
		x.addClusterIP(s, n, name)
		x.addPods(s.Namespace, slices)
	}
}

func (x *index) addClusterIP(s *corev1.Service, n *node, name string) {
	ips := s.Spec.ClusterIPs
	if len(ips) == 0 {
		ips = []string{s.Spec.ClusterIP}
	}
	for _, ip := range ips {
		a, err := netip.ParseAddr(ip)
		if err != nil {
			continue
		}
		n.addresses = append(n.addresses, a.Unmap())
		x.ptr[a.Unmap()] = []string{name}
	}
	if len(n.addresses) == 0 {
		return // its address has not been given yet
	}
	for _, p := range s.Spec.Ports {
		r := srv{target: name, port: uint16(p.Port)}
		n.srv = append(n.srv, r)
		if p.Name != "" {
			q := x.add(portName(p.Name, p.Protocol, name))
			q.srv = append(q.srv, r)
		}
	}
}

func portName(port string, protocol corev1.Protocol, service string) string {
	if protocol == "" {
		protocol = corev1.ProtocolTCP
	}
	return "_" + port + "._" + strings.ToLower(string(protocol)) + "." + service
}

// ready is whether an endpoint is told of. A nil condition is unknown: taken for ready.
func ready(s *corev1.Service, e *discoveryv1.Endpoint) bool {
	return s.Spec.PublishNotReadyAddresses || e.Conditions.Ready == nil || *e.Conditions.Ready
}

func (x *index) addHeadless(s *corev1.Service, n *node, name string, all []*discoveryv1.EndpointSlice) {
	known := map[netip.Addr]bool{}
	type target struct {
		name string
		port uint16
		at   *node
	}
	srvs := map[target]bool{}
	addSRV := func(at *node, r srv) {
		if k := (target{r.target, r.port, at}); !srvs[k] {
			srvs[k] = true
			at.srv = append(at.srv, r)
		}
	}
	for _, slice := range all {
		for i := range slice.Endpoints {
			e := &slice.Endpoints[i]
			if !ready(s, e) {
				continue
			}
			for _, ip := range e.Addresses {
				a, err := netip.ParseAddr(ip)
				if err != nil {
					continue
				}
				a = a.Unmap()
				host := label(e, a) + "." + name
				at := x.add(host)
				if !slices.Contains(at.addresses, a) {
					at.addresses = append(at.addresses, a)
				}
				if !known[a] {
					known[a] = true
					n.addresses = append(n.addresses, a)
				}
				if !slices.Contains(x.ptr[a], host) && len(x.ptr[a]) < maxPTR {
					x.ptr[a] = append(x.ptr[a], host)
				}
				for _, p := range slice.Ports {
					if p.Port == nil {
						continue
					}
					r := srv{target: host, port: uint16(*p.Port)}
					addSRV(n, r)
					if p.Name != nil && *p.Name != "" {
						protocol := corev1.ProtocolTCP
						if p.Protocol != nil {
							protocol = *p.Protocol
						}
						addSRV(x.add(portName(*p.Name, protocol, name)), r)
					}
				}
				if len(slice.Ports) == 0 {
					addSRV(n, srv{target: host}) // peer finders ask for names, not ports
				}
			}
		}
	}
}

// maxPTR bounds the names of one address: a Pod may be in many Services.
const maxPTR = 16

// label names an endpoint below its Service.
func label(e *discoveryv1.Endpoint, a netip.Addr) string {
	if e.Hostname != nil && *e.Hostname != "" {
		return *e.Hostname
	}
	return dashed(a)
}

func dashed(a netip.Addr) string {
	if a.Is4() {
		return strings.ReplaceAll(a.String(), ".", "-")
	}
	return strings.ReplaceAll(a.StringExpanded(), ":", "-")
}

// addPods gives Pods behind ordinary Services their name in reverse.
func (x *index) addPods(namespace string, slices []*discoveryv1.EndpointSlice) {
	if !x.namespaces[namespace] {
		return
	}
	for _, slice := range slices {
		for i := range slice.Endpoints {
			e := &slice.Endpoints[i]
			if e.TargetRef == nil || e.TargetRef.Kind != "Pod" {
				continue
			}
			for _, ip := range e.Addresses {
				if a, err := netip.ParseAddr(ip); err == nil && len(x.ptr[a.Unmap()]) == 0 {
					x.ptr[a.Unmap()] = []string{dashed(a.Unmap()) + "." + namespace + ".pod." + x.zone}
				}
			}
		}
	}
}

// pod returns the address in a name like 10-0-0-5.<namespace>.pod.<zone>, if the
// namespace and the address are of this Network.
func (x *index) pod(name string) (netip.Addr, bool) {
	rest, ok := strings.CutSuffix(name, ".pod."+x.zone)
	if !ok {
		return netip.Addr{}, false
	}
	label, namespace, ok := strings.Cut(rest, ".")
	if !ok || !x.namespaces[namespace] || len(label) > 45 {
		return netip.Addr{}, false
	}
	a, err := netip.ParseAddr(strings.ReplaceAll(label, "-", "."))
	if err != nil {
		a, err = netip.ParseAddr(strings.ReplaceAll(label, "-", ":"))
	}
	if err != nil || a.Zone() != "" || a.Is4In6() || !x.ours(netip.PrefixFrom(a, a.BitLen())) {
		return netip.Addr{}, false
	}
	return a, true
}

// ours is whether a range and one of the Network's have addresses in common.
func (x *index) ours(p netip.Prefix) bool {
	for _, r := range x.reverse {
		if r.Overlaps(p) {
			return true
		}
	}
	return false
}

// arpa reads a name of the reverse trees: the range it stands for, which is one address
// if whole. ok is false for other names, and for the roots of the trees.
func arpa(name string) (p netip.Prefix, whole, ok bool) {
	rest, is4 := strings.CutSuffix(name, ".in-addr.arpa.")
	if is4 {
		var b [4]byte
		n := 0
		for rest != "" && n < len(b) {
			last := rest[strings.LastIndexByte(rest, '.')+1:]
			v, err := strconv.ParseUint(last, 10, 8)
			if err != nil || strconv.FormatUint(v, 10) != last {
				break
			}
			b[n] = byte(v)
			n++
			rest = strings.TrimSuffix(strings.TrimSuffix(rest, last), ".")
		}
		return netip.PrefixFrom(netip.AddrFrom4(b), 8*n), n == len(b) && rest == "", n > 0
	}
	rest, is6 := strings.CutSuffix(name, ".ip6.arpa.")
	if !is6 {
		return p, false, false
	}
	var b [16]byte
	n := 0
	for rest != "" && n < 2*len(b) {
		last := rest[strings.LastIndexByte(rest, '.')+1:]
		v, err := strconv.ParseUint(last, 16, 4)
		if err != nil || len(last) != 1 {
			break
		}
		b[n/2] |= byte(v) << (4 * (1 - n%2))
		n++
		rest = strings.TrimSuffix(strings.TrimSuffix(rest, last), ".")
	}
	return netip.PrefixFrom(netip.AddrFrom16(b), 4*n), n == 2*len(b) && rest == "", n > 0
}

// local is whether a name is answered here, if only by saying that there is none.
func (x *index) local(name string) bool {
	if name == x.zone || strings.HasSuffix(name, "."+x.zone) {
		return true
	}
	p, whole, ok := arpa(name)
	return ok && (x.ours(p) || whole && len(x.ptr[p.Addr()]) > 0)
}
