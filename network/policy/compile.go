package policy

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// Bounds. A policy beyond maxPolicyRules denies everything; a State beyond the others is refused.
const (
	maxPolicyRules = 4096
	maxRules       = 1 << 16
	maxElements    = 1 << 19
	maxLink        = unix.IFNAMSIZ - 1
)

type direction string

const (
	ingress direction = "ingress"
	egress  direction = "egress"
)

// A setKind is what the elements of a set are.
type setKind uint8

const (
	addrs4 setKind = iota // addresses of Pods
	addrs6
	block4 // ranges of addresses
	block6
	ports  // protocol . range of ports
	named4 // address . protocol . port
	named6
)

// set is a set of the compiled form. Sets of Pods are named after what selects them and
// change their elements; the others are named after their content.
type set struct {
	kind    setKind
	comment string
	addrs   map[netip.Addr]bool
	blocks  []addrRange
	ports   []portRange
	named   map[namedAddr]bool
}

type addrRange struct{ from, to netip.Addr }

type portRange struct {
	protocol uint8
	from, to uint16
}

type namedAddr struct {
	addr     netip.Addr
	protocol uint8
	port     uint16
}

func (s *set) size() int { return len(s.addrs) + len(s.blocks) + len(s.ports) + len(s.named) }

// rule accepts what all of its sets contain; an empty name is no condition. The peer is
// the source for ingress, the destination for egress.
type rule struct {
	family             uint8 // 4, 6 or 0 for both
	peer, ports, named string
	// number of the rule in the policy, from 1.
	number int
}

// chain is one direction of one policy.
type chain struct {
	name   string // of the nftables chain
	policy string // namespace/name
	rules  []rule
}

// compiledPolicy is a policy and whom it selects.
type compiledPolicy struct {
	name      string // namespace/name
	namespace string
	selector  labels.Selector
	// ingress and egress are nil if the policy does not isolate that direction.
	ingress, egress *chain
}

// program is the compiled form of a State.
type program struct {
	sets     map[string]*set
	policies []*compiledPolicy
	// byNamespace are indices of the same.
	byNamespace map[string][]*compiledPolicy
	problems    []Problem
	rules       int

	pods       map[string][]*Pod // by namespace
	all        []*Pod
	namespaces map[string]labels.Set
}

func hash(parts ...string) string {
	h := sha256.New()
	for _, p := range parts {
		_ = binary.Write(h, binary.BigEndian, uint32(len(p))) // a hash does not fail
		h.Write([]byte(p))
	}
	return hex.EncodeToString(h.Sum(nil)[:10])
}

// compile translates a State. It fails only on States beyond the bounds or that
// contradict themselves; mistakes in policies are problems, and close.
func compile(s State) (*program, error) {
	p := &program{
		sets: map[string]*set{}, byNamespace: map[string][]*compiledPolicy{},
		pods: map[string][]*Pod{}, namespaces: make(map[string]labels.Set, len(s.Namespaces)),
	}
	for name, l := range s.Namespaces {
		if l[corev1.LabelMetadataName] != name {
			l = maps.Clone(l)
			if l == nil {
				l = map[string]string{}
			}
			l[corev1.LabelMetadataName] = name
		}
		p.namespaces[name] = l
	}
	links := map[string]string{}
	for i := range s.Pods {
		pod := &s.Pods[i]
		p.pods[pod.Namespace] = append(p.pods[pod.Namespace], pod)
		p.all = append(p.all, pod)
		for _, l := range pod.Links {
			key := pod.Namespace + "/" + pod.Name
			if l == "" || len(l) > maxLink {
				return nil, fmt.Errorf("pod %s: link %q: want a name of 1 to %d characters: %w", key, l, maxLink, errdefs.ErrInvalidArgument)
			}
			if other, ok := links[l]; ok {
				return nil, fmt.Errorf("link %s belongs to pods %s and %s: %w", l, other, key, errdefs.ErrInvalidArgument)
			}
			links[l] = key
		}
	}
	policies := slices.DeleteFunc(slices.Clone(s.Policies), func(np *networkingv1.NetworkPolicy) bool { return np == nil })
	slices.SortFunc(policies, func(a, b *networkingv1.NetworkPolicy) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	for _, np := range policies {
		c := p.policy(np)
		p.policies = append(p.policies, c)
		p.byNamespace[c.namespace] = append(p.byNamespace[c.namespace], c)
	}
	elements := 0
	for _, set := range p.sets {
		elements += set.size()
	}
	if p.rules > maxRules || elements > maxElements {
		return nil, fmt.Errorf("the Network's %d policies make %d rules and %d set elements, at most %d and %d are carried; use fewer ports and peers per policy: %w",
			len(policies), p.rules, elements, maxRules, maxElements, errdefs.ErrResourceExhausted)
	}
	return p, nil
}

// Problems are the mistakes in the policies of a State, in a stable order.
func Problems(s State) ([]Problem, error) {
	p, err := compile(s)
	if err != nil {
		return nil, err
	}
	return p.problems, nil
}

func (p *program) problem(policy, format string, args ...any) {
	p.problems = append(p.problems, Problem{policy, fmt.Sprintf(format, args...)})
}

// policy translates one policy.
func (p *program) policy(np *networkingv1.NetworkPolicy) *compiledPolicy {
	c := &compiledPolicy{name: np.Namespace + "/" + np.Name, namespace: np.Namespace}
	closed := false
	var err error
	if c.selector, err = metav1.LabelSelectorAsSelector(&np.Spec.PodSelector); err != nil {
		// Whom it selects is unknown, so it is everybody it could be.
		p.problem(c.name, "spec.podSelector: %v; every Pod of the namespace is isolated until it is corrected", err)
		c.selector, closed = labels.Everything(), true
	}
	in, out := np.Spec.PolicyTypes == nil, np.Spec.PolicyTypes == nil && len(np.Spec.Egress) > 0
	for i, t := range np.Spec.PolicyTypes {
		switch t {
		case networkingv1.PolicyTypeIngress:
			in = true
		case networkingv1.PolicyTypeEgress:
			out = true
		default:
			p.problem(c.name, "spec.policyTypes[%d] %q: want Ingress or Egress; both are isolated until it is corrected", i, t)
			in, out = true, true
		}
	}
	if !in && !out { // an empty list is defaulted like none
		in, out = true, len(np.Spec.Egress) > 0
	}
	if in {
		var rules []rule
		for i, r := range np.Spec.Ingress {
			field := fmt.Sprintf("spec.ingress[%d]", i)
			rules = append(rules, p.rule(c, field, i+1, "from", r.From, r.Ports)...)
		}
		c.ingress = p.chain(c, ingress, rules, closed)
	}
	if out {
		var rules []rule
		for i, r := range np.Spec.Egress {
			field := fmt.Sprintf("spec.egress[%d]", i)
			rules = append(rules, p.rule(c, field, i+1, "to", r.To, r.Ports)...)
		}
		c.egress = p.chain(c, egress, rules, closed)
	}
	return c
}

// chain names the rules of one direction after their content.
func (p *program) chain(c *compiledPolicy, d direction, rules []rule, closed bool) *chain {
	if len(rules) > maxPolicyRules {
		p.problem(c.name, "spec.%s: %d combinations of peers and ports, at most %d are carried; nothing is allowed until there are fewer", d, len(rules), maxPolicyRules)
		closed = true
	}
	if closed {
		rules = nil
	}
	p.rules += len(rules)
	parts := []string{"chain", string(d), c.name}
	for _, r := range rules {
		parts = append(parts, fmt.Sprintf("%d,%s,%s,%s", r.family, r.peer, r.ports, r.named))
	}
	name := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '-' || r == '/' || r == '.' {
			return r
		}
		return '_' // names come from the API server, but this one goes to the kernel
	}, c.name)
	return &chain{name: string(d) + "/" + name[:min(len(name), 80)] + "/" + hash(parts...), policy: c.name, rules: rules}
}

// rule translates one ingress or egress rule.
func (p *program) rule(c *compiledPolicy, field string, number int, peers string, from []networkingv1.NetworkPolicyPeer, on []networkingv1.NetworkPolicyPort) []rule {
	type port struct{ ports, named string }
	choices := []port{{}}
	if len(on) > 0 {
		choices = nil
		ranges, names := p.ports(c, field, on)
		if len(ranges) > 0 {
			choices = append(choices, port{ports: p.portSet(ranges)})
		}
		if len(names) > 0 {
			choices = append(choices, port{named: p.namedSets(names)})
		}
	}
	type peer struct {
		family uint8
		set    string
	}
	var sets []peer
	if len(from) == 0 {
		sets = []peer{{}}
	}
	var blocks [2][]addrRange
	for i, f := range from {
		where := fmt.Sprintf("%s.%s[%d]", field, peers, i)
		switch {
		case f.IPBlock != nil && (f.PodSelector != nil || f.NamespaceSelector != nil):
			p.problem(c.name, "%s: ipBlock beside a selector; the peer is left out: make two of it", where)
		case f.IPBlock != nil:
			v4, v6 := p.block(c, where, f.IPBlock)
			blocks[0], blocks[1] = append(blocks[0], v4...), append(blocks[1], v6...)
		case f.PodSelector == nil && f.NamespaceSelector == nil:
			p.problem(c.name, "%s: empty; the peer is left out: give podSelector, namespaceSelector or ipBlock", where)
		default:
			if name := p.podSets(c, where, f.NamespaceSelector, f.PodSelector); name != "" {
				sets = append(sets, peer{4, "pods4/" + name}, peer{6, "pods6/" + name})
			}
		}
	}
	for i, family := range []uint8{4, 6} {
		if name := p.blockSet(family, blocks[i]); name != "" {
			sets = append(sets, peer{family, name})
		}
	}
	var out []rule
	seen := map[rule]bool{}
	add := func(r rule) {
		if !seen[r] {
			seen[r] = true
			out = append(out, r)
		}
	}
	for _, s := range sets {
		for _, c := range choices {
			switch {
			case c.named == "":
				add(rule{family: s.family, peer: s.set, ports: c.ports, number: number})
			default:
				for _, family := range []uint8{4, 6} {
					if s.family == 0 || s.family == family {
						add(rule{family: family, peer: s.set, named: fmt.Sprintf("named%d/%s", family, c.named), number: number})
					}
				}
			}
		}
	}
	return out
}

func protocolOf(p *corev1.Protocol) (uint8, bool) {
	if p == nil {
		return unix.IPPROTO_TCP, true
	}
	switch *p {
	case corev1.ProtocolTCP:
		return unix.IPPROTO_TCP, true
	case corev1.ProtocolUDP:
		return unix.IPPROTO_UDP, true
	case corev1.ProtocolSCTP:
		return unix.IPPROTO_SCTP, true
	}
	return 0, false
}

type portName struct {
	protocol uint8
	name     string
}

// ports sorts the ports of a rule into ranges and names. What means nothing is left out:
// callers must not take an empty answer for "all ports".
func (p *program) ports(c *compiledPolicy, field string, on []networkingv1.NetworkPolicyPort) (ranges []portRange, names []portName) {
	for i, o := range on {
		where := fmt.Sprintf("%s.ports[%d]", field, i)
		protocol, ok := protocolOf(o.Protocol)
		switch {
		case !ok:
			p.problem(c.name, "%s.protocol %q: want TCP, UDP or SCTP; the port is left out", where, *o.Protocol)
		case o.Port == nil && o.EndPort != nil:
			p.problem(c.name, "%s.endPort %d: without port; the port is left out", where, *o.EndPort)
		case o.Port == nil:
			ranges = append(ranges, portRange{protocol, 0, 65535})
		case o.Port.Type == intstr.String && o.EndPort != nil:
			p.problem(c.name, "%s.endPort %d: beside port name %q; the port is left out: give a number", where, *o.EndPort, o.Port.StrVal)
		case o.Port.Type == intstr.String && o.Port.StrVal == "":
			p.problem(c.name, "%s.port: an empty name; the port is left out", where)
		case o.Port.Type == intstr.String:
			names = append(names, portName{protocol, o.Port.StrVal})
		case o.Port.IntVal < 1 || o.Port.IntVal > 65535:
			p.problem(c.name, "%s.port %d: want 1 to 65535; the port is left out", where, o.Port.IntVal)
		case o.EndPort != nil && (*o.EndPort < o.Port.IntVal || *o.EndPort > 65535):
			p.problem(c.name, "%s.endPort %d: want %d to 65535; the port is left out", where, *o.EndPort, o.Port.IntVal)
		default:
			to := o.Port.IntVal
			if o.EndPort != nil {
				to = *o.EndPort
			}
			ranges = append(ranges, portRange{protocol, uint16(o.Port.IntVal), uint16(to)})
		}
	}
	return mergePorts(ranges), names
}

// mergePorts makes ranges disjoint, as the kernel's sets want them.
func mergePorts(in []portRange) []portRange {
	slices.SortFunc(in, func(a, b portRange) int {
		return cmp.Or(cmp.Compare(a.protocol, b.protocol), cmp.Compare(a.from, b.from))
	})
	var out []portRange
	for _, r := range in {
		if n := len(out); n > 0 && out[n-1].protocol == r.protocol && int(r.from) <= int(out[n-1].to)+1 {
			out[n-1].to = max(out[n-1].to, r.to)
			continue
		}
		out = append(out, r)
	}
	return out
}

func (p *program) portSet(ranges []portRange) string {
	parts := []string{"ports"}
	for _, r := range ranges {
		parts = append(parts, fmt.Sprint(r.protocol, r.from, r.to))
	}
	name := "ports/" + hash(parts...)
	if p.sets[name] == nil {
		p.sets[name] = &set{kind: ports, ports: ranges}
	}
	return name
}

// namedSets are where in the Network, on which Pod, the named ports are. A name means
// the port of the Pod that is connected to, whichever side the policy is on.
func (p *program) namedSets(names []portName) string {
	slices.SortFunc(names, func(a, b portName) int {
		return cmp.Or(cmp.Compare(a.protocol, b.protocol), cmp.Compare(a.name, b.name))
	})
	names = slices.Compact(names)
	parts, words := []string{"named"}, []string{}
	for _, n := range names {
		parts = append(parts, fmt.Sprint(n.protocol), n.name)
		words = append(words, n.name)
	}
	name := hash(parts...)
	if p.sets["named4/"+name] != nil {
		return name
	}
	v4 := &set{kind: named4, comment: "ports called " + strings.Join(words, ", "), named: map[namedAddr]bool{}}
	v6 := &set{kind: named6, comment: v4.comment, named: map[namedAddr]bool{}}
	for _, pod := range p.all {
		for _, port := range pod.Ports {
			if !slices.Contains(names, portName{port.Protocol, port.Name}) {
				continue
			}
			for _, a := range pod.Addresses {
				a = a.Unmap().WithZone("")
				if a.Is4() {
					v4.named[namedAddr{a, port.Protocol, port.Port}] = true
				} else if a.Is6() {
					v6.named[namedAddr{a, port.Protocol, port.Port}] = true
				}
			}
		}
	}
	p.sets["named4/"+name], p.sets["named6/"+name] = v4, v6
	return name
}

// podSets are the addresses of the Pods that selectors choose.
func (p *program) podSets(c *compiledPolicy, where string, namespaces, pods *metav1.LabelSelector) string {
	byNamespace, err := selector(namespaces)
	if err != nil {
		p.problem(c.name, "%s.namespaceSelector: %v; the peer is left out", where, err)
		return ""
	}
	byLabels, err := selector(pods)
	if err != nil {
		p.problem(c.name, "%s.podSelector: %v; the peer is left out", where, err)
		return ""
	}
	scope := "namespace " + c.namespace
	if namespaces != nil {
		scope = "namespaces " + words(byNamespace)
	}
	name := hash("pods", scope, byLabels.String())
	if p.sets["pods4/"+name] != nil {
		return name
	}
	v4 := &set{kind: addrs4, comment: "pods " + words(byLabels) + ", " + scope, addrs: map[netip.Addr]bool{}}
	v6 := &set{kind: addrs6, comment: v4.comment, addrs: map[netip.Addr]bool{}}
	collect := func(namespace string) {
		for _, pod := range p.pods[namespace] {
			if !byLabels.Matches(labels.Set(pod.Labels)) {
				continue
			}
			for _, a := range pod.Addresses {
				a = a.Unmap().WithZone("")
				if a.Is4() {
					v4.addrs[a] = true
				} else if a.Is6() {
					v6.addrs[a] = true
				}
			}
		}
	}
	if namespaces == nil {
		collect(c.namespace)
	} else {
		for name, l := range p.namespaces {
			if byNamespace.Matches(l) {
				collect(name)
			}
		}
	}
	p.sets["pods4/"+name], p.sets["pods6/"+name] = v4, v6
	return name
}

// selector of a peer: none there means everything in the scope.
func selector(s *metav1.LabelSelector) (labels.Selector, error) {
	if s == nil {
		return labels.Everything(), nil
	}
	return metav1.LabelSelectorAsSelector(s)
}

func words(s labels.Selector) string {
	if s.Empty() {
		return "all"
	}
	return s.String()
}

// block is an ipBlock's ranges, the exceptions cut out.
func (p *program) block(c *compiledPolicy, where string, b *networkingv1.IPBlock) (v4, v6 []addrRange) {
	cidr, err := netip.ParsePrefix(b.CIDR)
	if err != nil || cidr.Addr().Is4In6() {
		p.problem(c.name, "%s.ipBlock.cidr %q: want a network like 10.0.0.0/8; the peer is left out", where, b.CIDR)
		return nil, nil
	}
	ranges := []addrRange{prefixRange(cidr)}
	for i, e := range b.Except {
		except, err := netip.ParsePrefix(e)
		if err != nil || except.Addr().Is4() != cidr.Addr().Is4() {
			p.problem(c.name, "%s.ipBlock.except[%d] %q: want a network inside %s; the peer is left out", where, i, e, b.CIDR)
			return nil, nil
		}
		if len(ranges) > maxPolicyRules {
			p.problem(c.name, "%s.ipBlock.except: more than %d; the peer is left out", where, maxPolicyRules)
			return nil, nil
		}
		ranges = cut(ranges, prefixRange(except))
	}
	if cidr.Addr().Is4() {
		return ranges, nil
	}
	return nil, ranges
}

// prefixRange is a prefix's first and last address.
func prefixRange(p netip.Prefix) addrRange {
	p = p.Masked()
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	to, _ := netip.AddrFromSlice(b) // the length is that of an address
	return addrRange{p.Addr(), to}
}

// cut takes x out of ranges.
func cut(ranges []addrRange, x addrRange) []addrRange {
	var out []addrRange
	for _, r := range ranges {
		if x.to.Less(r.from) || r.to.Less(x.from) {
			out = append(out, r)
			continue
		}
		if r.from.Less(x.from) {
			out = append(out, addrRange{r.from, x.from.Prev()})
		}
		if x.to.Less(r.to) {
			out = append(out, addrRange{x.to.Next(), r.to})
		}
	}
	return out
}

func (p *program) blockSet(family uint8, ranges []addrRange) string {
	if len(ranges) == 0 {
		return ""
	}
	slices.SortFunc(ranges, func(a, b addrRange) int { return a.from.Compare(b.from) })
	var merged []addrRange
	for _, r := range ranges {
		if n := len(merged); n > 0 {
			last := &merged[n-1]
			if next := last.to.Next(); !next.IsValid() || r.from.Compare(next) <= 0 {
				if last.to.Less(r.to) {
					last.to = r.to
				}
				continue
			}
		}
		merged = append(merged, r)
	}
	parts := []string{"block"}
	for _, r := range merged {
		parts = append(parts, r.from.String(), r.to.String())
	}
	name := fmt.Sprintf("block%d/%s", family, hash(parts...))
	if p.sets[name] == nil {
		kind := block4
		if family == 6 {
			kind = block6
		}
		p.sets[name] = &set{kind: kind, blocks: merged}
	}
	return name
}

// selecting are the chains that a Pod is isolated by in a direction, by name of policy.
func (p *program) selecting(pod *Pod, d direction) []*chain {
	var out []*chain
	for _, c := range p.byNamespace[pod.Namespace] {
		ch := c.ingress
		if d == egress {
			ch = c.egress
		}
		if ch != nil && c.selector.Matches(labels.Set(pod.Labels)) {
			out = append(out, ch)
		}
	}
	return out
}
