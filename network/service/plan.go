package service

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Bounds of one table: kernel memory is the tenant's to spend only so far.
const (
	maxEndpoints = 1<<12 - 1 // per front, what a class can say
	maxFronts    = 1 << 17
	maxElements  = 1 << 20
	maxAffinity  = 1<<17 - 1 // seconds, what a class can say
	maxRanges    = 1 << 14
)

// front is what clients connect to. inside is the variant for clients of the Network
// where theirs differs.
type front struct {
	addr   netip.Addr
	proto  uint8
	port   uint16
	inside bool
}

func (f front) compare(g front) int {
	if c := f.addr.Compare(g.addr); c != 0 {
		return c
	}
	if c := cmp.Compare(f.proto, g.proto); c != 0 {
		return c
	}
	if c := cmp.Compare(f.port, g.port); c != 0 {
		return c
	}
	if f.inside == g.inside {
		return 0
	}
	if g.inside {
		return -1
	}
	return 1
}

// class is everything the rules know of a front, and the value of its map element: 1 bit
// source ranges, 1 bit inside, 1 bit silence, 17 bits affinity in seconds, 12 bits number
// of endpoints.
type class uint32

const (
	ranged class = 1 << 31
	inside class = 1 << 30
	// refuse and silent are the classes without endpoints.
	refuse class = 0
	silent class = 1 << 29
	// absent is the class of a front whose endpoints are in the kernel without it.
	absent class = 1<<32 - 1
)

func makeClass(endpoints int, affinity time.Duration, flags class) class {
	s := min((affinity+time.Second-1)/time.Second, maxAffinity)
	return flags | class(s)<<12 | class(endpoints)
}

func (c class) endpoints() int          { return int(c & maxEndpoints) }
func (c class) affinity() time.Duration { return time.Duration(c>>12&maxAffinity) * time.Second }

// base is the first index of the front's endpoints: the two variants share a map.
func (f front) base() int {
	if f.inside {
		return 1 << 16
	}
	return 0
}

// entry is what is at a front: endpoints by index; invalid ones are missing in the kernel.
type entry struct {
	class  class
	eps    []netip.AddrPort
	ranges []netip.Prefix
}

// state is the content of a table.
type state struct {
	fronts map[front]entry
	// addrs are all addresses of Services, external those from outside, local the
	// addresses of endpoints on this node, hairpins the same again.
	addrs, external, local, hairpins map[netip.Addr]struct{}
	// classes that have a chain.
	classes map[classKey]struct{}
	// strays are elements which no Service can lead to.
	strays []op
}

type classKey struct {
	v6    bool
	class class
}

func newState() *state {
	return &state{
		fronts: map[front]entry{}, classes: map[classKey]struct{}{},
		addrs: map[netip.Addr]struct{}{}, external: map[netip.Addr]struct{}{},
		local: map[netip.Addr]struct{}{}, hairpins: map[netip.Addr]struct{}{},
	}
}

// desired is the state the Services ask for, endpoints sorted. Where two ask for one
// front, ClusterIPs go before External and then the lower key wins.
func desired(services []Service) (*state, error) {
	s := newState()
	s.fronts = make(map[front]entry, len(services)*2)
	elements, ranges := 0, 0
	order := make([]*Service, len(services))
	for i := range services {
		order[i] = &services[i]
	}
	byKey := func(a, b *Service) int { return cmp.Compare(a.Key, b.Key) }
	if !slices.IsSortedFunc(order, byKey) {
		slices.SortStableFunc(order, byKey)
	}
	add := func(svc *Service, f front, eps []Endpoint, flags class, elsewhere bool, from []netip.Prefix) error {
		if _, taken := s.fronts[f]; taken {
			return nil
		}
		e := entry{eps: make([]netip.AddrPort, 0, len(eps))}
		for _, ep := range eps {
			a := ep.Address
			if !a.IsValid() || a.Addr().Is4() != f.addr.Is4() || a.Port() == 0 {
				continue
			}
			e.eps = append(e.eps, a)
			if ep.Local {
				s.local[a.Addr()] = struct{}{}
			}
		}
		slices.SortFunc(e.eps, netip.AddrPort.Compare)
		e.eps = slices.Compact(e.eps)
		if len(e.eps) > maxEndpoints {
			e.eps = e.eps[:maxEndpoints]
		}
		switch {
		case len(e.eps) > 0:
			if len(from) > 0 {
				flags |= ranged
			}
			e.class = makeClass(len(e.eps), svc.Affinity, flags)
		case elsewhere:
			e.class = silent
		}
		if len(from) > 0 && !f.inside { // the variants share them
			e.ranges = reduce(from, f.addr.Is4())
		}
		s.fronts[f] = e
		s.classes[classKey{f.addr.Is6(), e.class}] = struct{}{}
		elements += 1 + len(e.eps)
		ranges += len(e.ranges)
		if len(s.fronts) > maxFronts || elements > maxElements || ranges > maxRanges {
			return fmt.Errorf("service %s: more than %d service ports, %d elements or %d source ranges in one network; remove services: %w",
				svc.Key, maxFronts, maxElements, maxRanges, errdefs.ErrResourceExhausted)
		}
		return nil
	}
	for _, svc := range order {
		if svc.Affinity < 0 {
			return nil, fmt.Errorf("service %s: affinity %s must not be negative: %w", svc.Key, svc.Affinity, errdefs.ErrInvalidArgument)
		}
		for _, a := range svc.ClusterIPs {
			if !a.IsValid() {
				continue
			}
			a = a.Unmap()
			s.addrs[a] = struct{}{}
			for _, p := range svc.Ports {
				if err := add(svc, front{a, p.Protocol, p.Port, false}, p.Internal, 0, p.Elsewhere, nil); err != nil {
					return nil, err
				}
			}
		}
	}
	for _, svc := range order {
		for _, a := range svc.External {
			if !a.IsValid() {
				continue
			}
			a = a.Unmap()
			s.addrs[a] = struct{}{}
			s.external[a] = struct{}{}
			for _, p := range svc.Ports {
				if err := add(svc, front{a, p.Protocol, p.Port, false}, p.External, 0, p.Elsewhere, svc.SourceRanges); err != nil {
					return nil, err
				}
				if !svc.ExternalLocal {
					continue
				}
				if err := add(svc, front{a, p.Protocol, p.Port, true}, p.Internal, inside, p.Elsewhere, svc.SourceRanges); err != nil {
					return nil, err
				}
			}
		}
	}
	s.hairpins = s.local
	return s, nil
}

// reduce gives the ranges of one family without those inside others, which interval maps
// do not take. The result is not nil.
func reduce(from []netip.Prefix, v4 bool) []netip.Prefix {
	out := make([]netip.Prefix, 0, len(from))
	for _, p := range from {
		if p.IsValid() && p.Addr().Is4() == v4 {
			out = append(out, p.Masked())
		}
	}
	slices.SortFunc(out, func(a, b netip.Prefix) int {
		return cmp.Or(cmp.Compare(a.Bits(), b.Bits()), a.Addr().Compare(b.Addr()))
	})
	kept := out[:0]
	for _, p := range out {
		if !slices.ContainsFunc(kept, func(k netip.Prefix) bool { return k.Contains(p.Addr()) }) {
			kept = append(kept, p)
		}
	}
	return kept
}

// op adds or deletes one element.
type op struct {
	del bool
	set setID
	v6  bool
	key string
	// val is a map's value when adding, end the end of an interval.
	val, end string
}

func (o op) String() string {
	sign := "+"
	if o.del {
		sign = "-"
	}
	s := fmt.Sprintf("%s %s %x", sign, o.set.name(o.v6), o.key)
	if o.val != "" {
		s += fmt.Sprintf(" : %x", o.val)
	}
	return s
}

// change is a plan: units are each to be applied within one transaction, those of prelude
// before them and those of epilogue after, so that every state between is right.
type change struct {
	prelude  []op
	units    [][]op
	epilogue []op
	// classes to make before, and those that are not used any more.
	classes, unused []classKey
	// moved are fronts from which endpoints went or that are new, with what is there now.
	moved map[front]entry
}

func (c *change) empty() bool {
	return len(c.prelude)+len(c.units)+len(c.epilogue)+len(c.classes) == 0
}

// plan tells how to get from cur to want. It orders want's endpoints: those that stay
// keep their index.
func plan(cur, want *state) *change {
	c := &change{moved: map[front]entry{}}
	var names []front
	for f := range want.fronts {
		names = append(names, f)
	}
	for f := range cur.fronts {
		if _, ok := want.fronts[f]; !ok {
			names = append(names, f)
		}
	}
	var changed []front
	for _, f := range names {
		old, had := cur.fronts[f]
		now, has := want.fronts[f]
		if has {
			now.eps = arrange(old.eps, now.eps)
			want.fronts[f] = now
		}
		if had && has && old.class == now.class && slices.Equal(old.eps, now.eps) && slices.Equal(old.ranges, now.ranges) {
			continue
		}
		changed = append(changed, f)
	}
	slices.SortFunc(changed, front.compare)
	for _, f := range changed {
		old, had := cur.fronts[f]
		now, has := want.fronts[f]
		if unit := diff(f, old, had, now, has); len(unit) > 0 {
			c.units = append(c.units, unit)
		}
		gone := slices.ContainsFunc(old.eps, func(a netip.AddrPort) bool { return a.IsValid() && !slices.Contains(now.eps, a) })
		// TCP that found nothing there was refused; UDP may have been sent all the same.
		born := f.proto != unix.IPPROTO_TCP && (!had || len(old.eps) == 0)
		if gone || born || !has || old.class.affinity() != 0 && now.class.affinity() == 0 {
			c.moved[f] = now
		}
	}
	for k := range want.classes {
		if _, ok := cur.classes[k]; !ok {
			c.classes = append(c.classes, k)
		}
	}
	for k := range cur.classes {
		if _, ok := want.classes[k]; !ok {
			c.unused = append(c.unused, k)
		}
	}
	byClass := func(a, b classKey) int {
		if a.v6 != b.v6 {
			if b.v6 {
				return -1
			}
			return 1
		}
		return cmp.Compare(a.class, b.class)
	}
	slices.SortFunc(c.classes, byClass)
	slices.SortFunc(c.unused, byClass)
	for _, s := range []struct {
		set       setID
		cur, want map[netip.Addr]struct{}
		key       func(netip.Addr) string
	}{
		{setAddrs, cur.addrs, want.addrs, addrKey},
		{setExternal, cur.external, want.external, addrKey},
		{setLocal, cur.local, want.local, addrKey},
		{setHairpins, cur.hairpins, want.hairpins, func(a netip.Addr) string { return addrKey(a) + addrKey(a) }},
	} {
		start, end := len(c.prelude), len(c.epilogue)
		for a := range s.want {
			if _, ok := s.cur[a]; !ok {
				c.prelude = append(c.prelude, op{set: s.set, v6: a.Is6(), key: s.key(a)})
			}
		}
		for a := range s.cur {
			if _, ok := s.want[a]; !ok {
				c.epilogue = append(c.epilogue, op{del: true, set: s.set, v6: a.Is6(), key: s.key(a)})
			}
		}
		slices.SortFunc(c.prelude[start:], compareOps)
		slices.SortFunc(c.epilogue[end:], compareOps)
	}
	c.prelude = append(c.prelude, cur.strays...)
	return c
}

func compareOps(a, b op) int { return cmp.Compare(a.key, b.key) }

// arrange gives now in such an order that what is in old keeps its index where possible.
func arrange(old, now []netip.AddrPort) []netip.AddrPort {
	if slices.Equal(old, now) {
		return now
	}
	var index map[netip.AddrPort]int
	if len(now) > 16 {
		index = make(map[netip.AddrPort]int, len(now))
		for i, a := range now {
			index[a] = i
		}
	}
	find := func(a netip.AddrPort) int {
		if index == nil {
			return slices.Index(now, a)
		}
		if i, ok := index[a]; ok {
			return i
		}
		return -1
	}
	out, used := make([]netip.AddrPort, len(now)), make([]bool, len(now))
	for i := range min(len(old), len(now)) {
		if j := find(old[i]); j >= 0 && !used[j] {
			out[i], used[j] = old[i], true
		}
	}
	next := 0
	for i := range out {
		if out[i].IsValid() {
			continue
		}
		for used[next] {
			next++
		}
		out[i], used[next] = now[next], true
	}
	return out
}

// diff is what changes at one front, deletions first.
func diff(f front, old entry, had bool, now entry, has bool) []op {
	v6 := f.addr.Is6()
	svc := setServices
	if f.inside {
		svc = setInsideServices
	}
	var dels, adds []op
	if had && old.class != absent && (!has || old.class != now.class) {
		dels = append(dels, op{del: true, set: svc, v6: v6, key: f.key()})
	}
	for i := range max(len(old.eps), len(now.eps)) {
		var a, b netip.AddrPort
		if i < len(old.eps) {
			a = old.eps[i]
		}
		if i < len(now.eps) {
			b = now.eps[i]
		}
		if a == b {
			continue
		}
		if a.IsValid() {
			dels = append(dels, op{del: true, set: setEndpoints, v6: v6, key: f.indexKey(i)})
		}
		if b.IsValid() {
			adds = append(adds, op{set: setEndpoints, v6: v6, key: f.indexKey(i), val: addrPortVal(b)})
		}
	}
	for _, p := range old.ranges {
		if !slices.Contains(now.ranges, p) {
			from, to := f.rangeKey(p)
			dels = append(dels, op{del: true, set: setRanges, v6: v6, key: from, end: to})
		}
	}
	for _, p := range now.ranges {
		if !slices.Contains(old.ranges, p) {
			from, to := f.rangeKey(p)
			adds = append(adds, op{set: setRanges, v6: v6, key: from, end: to})
		}
	}
	if has && (!had || old.class != now.class) {
		adds = append(adds, op{set: svc, v6: v6, key: f.key(), val: hostVal(uint32(now.class))})
	}
	return append(dels, adds...)
}

func addrKey(a netip.Addr) string { return string(a.AsSlice()) }

// key is the front's in maps: each field filled to 4 bytes.
func (f front) key() string {
	b := append(make([]byte, 0, 32), f.addr.AsSlice()...)
	b = append(b, f.proto, 0, 0, 0)
	return string(append(binary.BigEndian.AppendUint16(b, f.port), 0, 0))
}

func (f front) indexKey(i int) string { return f.key() + hostVal(uint32(f.base()+i)) }

func (f front) rangeKey(p netip.Prefix) (from, to string) {
	return f.key() + addrKey(p.Addr()), f.key() + addrKey(last(p))
}

// last is the highest address of a prefix.
func last(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

func addrPortVal(a netip.AddrPort) string {
	b := append(make([]byte, 0, 20), a.Addr().AsSlice()...)
	return string(append(binary.BigEndian.AppendUint16(b, a.Port()), 0, 0))
}

func hostVal(v uint32) string { return string(binary.NativeEndian.AppendUint32(nil, v)) }

// addrLen is the length of a family's addresses.
func addrLen(v6 bool) int {
	if v6 {
		return 16
	}
	return 4
}

func parseFront(b []byte, v6 bool) (f front, ok bool) {
	n := addrLen(v6)
	if len(b) < n+8 {
		return f, false
	}
	f.addr, _ = netip.AddrFromSlice(b[:n])
	f.proto, f.port = b[n], binary.BigEndian.Uint16(b[n+4:])
	switch f.proto {
	case unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_SCTP:
		return f, f.key() == string(b[:n+8])
	}
	return f, false
}

func parseAddrPort(b []byte, v6 bool) (netip.AddrPort, bool) {
	n := addrLen(v6)
	if len(b) < n+2 {
		return netip.AddrPort{}, false
	}
	a, _ := netip.AddrFromSlice(b[:n])
	return netip.AddrPortFrom(a, binary.BigEndian.Uint16(b[n:])), true
}

// prefix finds the prefix from..to is.
func prefix(from, to netip.Addr) (netip.Prefix, bool) {
	for bits := range from.BitLen() + 1 {
		if p := netip.PrefixFrom(from, bits); p.Masked() == p && last(p) == to {
			return p, true
		}
	}
	return netip.Prefix{}, false
}
