package dns

import (
	"math/rand/v2"
	"net"
	"net/netip"

	"github.com/miekg/dns"
)

// ttl of every record made here, in seconds: as short as CoreDNS's default.
const ttl = 5

const (
	// maxAnswers bounds the records of one answer; more do not fit into a message over TCP,
	// and over UDP far fewer.
	maxAnswers, maxAnswersUDP = 2000, 280
	// maxChase bounds how many ExternalNames lead to each other.
	maxChase = 8
)

// reply is what the index says to a question.
type reply struct {
	rcode             int
	answer, ns, extra []dns.RR
	// chase is a name outside the index that the answer's last CNAME leads to.
	chase string
}

// answer resolves a name that is local. owner is the name as it was asked.
func (x *index) answer(owner, name string, qtype uint16, limit int) reply {
	var r reply
	for range maxChase {
		n, exists := x.find(name)
		if !exists {
			r.rcode = dns.RcodeNameError
			r.ns = []dns.RR{x.soa(name)}
			return r
		}
		if n.cname == "" {
			r.answer = append(r.answer, x.records(n, owner, qtype, limit)...)
			if len(r.answer) == 0 || r.answer[len(r.answer)-1].Header().Rrtype == dns.TypeCNAME {
				r.ns = []dns.RR{x.soa(name)}
			}
			if qtype == dns.TypeSRV {
				r.extra = x.targets(n, limit)
			}
			return r
		}
		r.answer = append(r.answer, &dns.CNAME{Hdr: header(owner, dns.TypeCNAME), Target: n.cname})
		if qtype == dns.TypeCNAME {
			return r
		}
		owner, name = n.cname, n.cname
		if !x.local(name) {
			r.chase = name
			return r
		}
	}
	return reply{rcode: dns.RcodeServerFailure} // they lead to each other
}

// find returns what a local name has.
func (x *index) find(name string) (*node, bool) {
	if n := x.nodes[name]; n != nil {
		return n, true
	}
	if a, ok := x.pod(name); ok {
		return &node{addresses: []netip.Addr{a}}, true
	}
	p, whole, ok := arpa(name)
	if !ok {
		return nil, false
	}
	if whole {
		if len(x.ptr[p.Addr()]) > 0 {
			return &node{}, true // records takes it from there
		}
		return nil, false
	}
	// A name above addresses exists; one below or beside them does not.
	labels := dns.CountLabel(name) - 2
	return &node{}, p.Addr().Is4() && labels == p.Bits()/8 || p.Addr().Is6() && labels == p.Bits()/4
}

func header(name string, t uint16) dns.RR_Header {
	return dns.RR_Header{Name: name, Rrtype: t, Class: dns.ClassINET, Ttl: ttl}
}

func (x *index) records(n *node, owner string, qtype uint16, limit int) []dns.RR {
	switch qtype {
	case dns.TypeA, dns.TypeAAAA:
		return addresses(n.addresses, owner, qtype, limit)
	case dns.TypeSRV:
		out := make([]dns.RR, 0, min(len(n.srv), limit))
		for _, s := range rotated(n.srv, limit) {
			out = append(out, &dns.SRV{Hdr: header(owner, qtype), Weight: uint16(max(1, 100/len(n.srv))), Port: s.port, Target: s.target})
		}
		return out
	case dns.TypePTR:
		p, whole, ok := arpa(dns.CanonicalName(owner))
		if !ok || !whole {
			return nil
		}
		var out []dns.RR
		for _, name := range x.ptr[p.Addr()] {
			out = append(out, &dns.PTR{Hdr: header(owner, qtype), Ptr: name})
		}
		return out
	case dns.TypeTXT:
		if n.txt != "" {
			return []dns.RR{&dns.TXT{Hdr: header(owner, qtype), Txt: []string{n.txt}}}
		}
	case dns.TypeNS:
		if n.ns != "" {
			return []dns.RR{&dns.NS{Hdr: header(owner, qtype), Ns: n.ns}}
		}
	case dns.TypeSOA:
		if n.soa {
			return []dns.RR{x.soa(owner)}
		}
	}
	return nil
}

func addresses(all []netip.Addr, owner string, qtype uint16, limit int) []dns.RR {
	var out []dns.RR
	for _, a := range rotated(all, len(all)) {
		if a.Is4() != (qtype == dns.TypeA) {
			continue
		}
		if len(out) == limit {
			break
		}
		if a.Is4() {
			out = append(out, &dns.A{Hdr: header(owner, qtype), A: net.IP(a.AsSlice())})
		} else {
			out = append(out, &dns.AAAA{Hdr: header(owner, qtype), AAAA: net.IP(a.AsSlice())})
		}
	}
	return out
}

// rotated begins anywhere, so that clients that take the first spread.
func rotated[T any](all []T, limit int) []T {
	if len(all) < 2 {
		return all
	}
	at := rand.IntN(len(all))
	out := make([]T, 0, len(all))
	out = append(append(out, all[at:]...), all[:at]...)
	return out[:min(len(out), limit)]
}

// targets are the addresses of an SRV's names.
func (x *index) targets(n *node, limit int) []dns.RR {
	var out []dns.RR
	seen := map[string]bool{}
	for _, s := range n.srv {
		t := x.nodes[s.target]
		if t == nil || seen[s.target] || len(out) >= limit {
			continue
		}
		seen[s.target] = true
		out = append(out, addresses(t.addresses, s.target, dns.TypeA, limit)...)
		out = append(out, addresses(t.addresses, s.target, dns.TypeAAAA, limit)...)
	}
	return out
}

// soa is the record of the zone a name is in. It is the same in every Network and at any
// time: it tells nothing.
func (x *index) soa(name string) dns.RR {
	zone := x.zone
	if p, _, ok := arpa(dns.CanonicalName(name)); ok {
		zone = "in-addr.arpa."
		if p.Addr().Is6() {
			zone = "ip6.arpa."
		}
	}
	return &dns.SOA{
		Hdr: header(zone, dns.TypeSOA), Ns: "ns.dns." + x.zone, Mbox: "hostmaster." + x.zone,
		Serial: 1, Refresh: 7200, Retry: 1800, Expire: 86400, Minttl: ttl,
	}
}
