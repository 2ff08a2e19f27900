package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"sort"
	"strings"

	"github.com/containerd/errdefs"
)

// Verdict is an answer to Evaluate.
type Verdict struct {
	Allowed bool
	// Egress and Ingress name the deciding rule of each side, in words: "no policy selects
	// it", "policy ns/name, ingress rule 2", "isolated by ns/name, ns/other: no rule allows it".
	Egress, Ingress string
}

// Evaluate tells whether from may open a connection to a port of to. It shares its
// compiler with Sync. A Pod without a namespace is an address outside the Network. Where
// both have IPv4 and IPv6 addresses and the answers differ, one that allows is enough, and the
// words tell both.
func Evaluate(s State, from, to Pod, protocol uint8, port uint16) (Verdict, error) {
	p, err := compile(s)
	if err != nil {
		return Verdict{}, err
	}
	if from.Namespace != "" && from.Namespace == to.Namespace && from.Name == to.Name {
		return Verdict{true, "a Pod may always reach itself", "a Pod may always reach itself"}, nil
	}
	var answers []Verdict
	var families []string
	for _, src := range from.Addresses {
		i := slices.IndexFunc(to.Addresses, func(dst netip.Addr) bool { return dst.Unmap().Is4() == src.Unmap().Is4() })
		if i < 0 {
			continue
		}
		family := "IPv4"
		if !src.Unmap().Is4() {
			family = "IPv6"
		}
		if slices.Contains(families, family) {
			continue
		}
		answers = append(answers, p.evaluate(packet{src.Unmap().WithZone(""), to.Addresses[i].Unmap().WithZone(""), protocol, port}, &from, &to, s.Hosts))
		families = append(families, family)
	}
	if len(answers) == 0 {
		return Verdict{}, fmt.Errorf("%s and %s have no addresses of one family: %w", podName(from), podName(to), errdefs.ErrFailedPrecondition)
	}
	if len(answers) == 1 || answers[0] == answers[1] {
		return answers[0], nil
	}
	join := func(a, b string) string {
		if a == b {
			return a
		}
		return fmt.Sprintf("%s: %s; %s: %s", families[0], a, families[1], b)
	}
	return Verdict{
		Allowed: answers[0].Allowed || answers[1].Allowed,
		Egress:  join(answers[0].Egress, answers[1].Egress),
		Ingress: join(answers[0].Ingress, answers[1].Ingress),
	}, nil
}

func podName(p Pod) string {
	if p.Namespace == "" {
		return fmt.Sprint(p.Addresses)
	}
	return p.Namespace + "/" + p.Name
}

// packet is the first of a connection.
type packet struct {
	src, dst netip.Addr
	protocol uint8
	port     uint16
}

func (p *program) evaluate(k packet, from, to *Pod, hosts []netip.Addr) Verdict {
	var v Verdict
	var out, in bool
	out, v.Egress = p.side(k, from, egress)
	if slices.Contains(hosts, k.src) {
		in, v.Ingress = true, "from the Pod's own node, which policies do not bind"
	} else {
		in, v.Ingress = p.side(k, to, ingress)
	}
	v.Allowed = out && in
	return v
}

// side decides one direction.
func (p *program) side(k packet, pod *Pod, d direction) (bool, string) {
	if pod.Namespace == "" {
		return true, "outside the Network"
	}
	chains := p.selecting(pod, d)
	if len(chains) == 0 {
		return true, "no policy selects it"
	}
	var names []string
	for _, c := range chains {
		for _, r := range c.rules {
			if p.matches(k, r, d) {
				return true, fmt.Sprintf("policy %s, %s rule %d", c.policy, d, r.number)
			}
		}
		names = append(names, c.policy)
	}
	return false, fmt.Sprintf("isolated by %s: no rule allows it", strings.Join(names, ", "))
}

func (p *program) matches(k packet, r rule, d direction) bool {
	peer := k.src
	if d == egress {
		peer = k.dst
	}
	if r.family == 4 && !peer.Is4() || r.family == 6 && !peer.Is6() {
		return false
	}
	if r.peer != "" && !p.sets[r.peer].hasAddr(peer) {
		return false
	}
	if r.ports != "" && !p.sets[r.ports].hasPort(k.protocol, k.port) {
		return false
	}
	return r.named == "" || p.sets[r.named].named[namedAddr{k.dst, k.protocol, k.port}]
}

func (s *set) hasAddr(a netip.Addr) bool {
	if s.kind != block4 && s.kind != block6 {
		return s.addrs[a]
	}
	i := sort.Search(len(s.blocks), func(i int) bool { return a.Compare(s.blocks[i].to) <= 0 })
	return i < len(s.blocks) && s.blocks[i].from.Compare(a) <= 0
}

func (s *set) hasPort(protocol uint8, port uint16) bool {
	return slices.ContainsFunc(s.ports, func(r portRange) bool {
		return r.protocol == protocol && r.from <= port && port <= r.to
	})
}
