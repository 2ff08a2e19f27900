package ipam

import (
	"cmp"
	"fmt"
	"iter"
	"math"
	"math/big"
	"net/netip"
	"slices"
	"strings"
)

// Range is addresses of one family, both ends included.
type Range struct{ First, Last netip.Addr }

// Contains says whether a is in r.
func (r Range) Contains(a netip.Addr) bool {
	return a.BitLen() == r.First.BitLen() && r.First.Compare(a) <= 0 && a.Compare(r.Last) <= 0
}

// String is the range as ParseRange reads it.
func (r Range) String() string { return r.First.String() + "-" + r.Last.String() }

// ParseRange reads a network ("192.0.2.0/24"), an address or a range
// ("192.0.2.10-192.0.2.20"). Of a network that has them, its own and its broadcast address
// are left out: write a range to have these.
func ParseRange(s string) (Range, error) {
	if first, last, ok := strings.Cut(s, "-"); ok {
		a, err1 := parseAddr(first)
		b, err2 := parseAddr(last)
		switch {
		case err1 != nil || err2 != nil:
			return Range{}, fmt.Errorf("%q: want a range like 192.0.2.10-192.0.2.20", s)
		case a.BitLen() != b.BitLen():
			return Range{}, fmt.Errorf("%q: both ends must be of one family", s)
		case a.Compare(b) > 0:
			return Range{}, fmt.Errorf("%q: ends before it begins", s)
		}
		return Range{a, b}, nil
	}
	if !strings.Contains(s, "/") {
		a, err := parseAddr(s)
		if err != nil {
			return Range{}, fmt.Errorf("%q: want a network, an address, or a range like 192.0.2.10-192.0.2.20", s)
		}
		return Range{a, a}, nil
	}
	p, err := netip.ParsePrefix(s)
	if err != nil || p.Addr().Is4In6() {
		return Range{}, fmt.Errorf("%q: want a network like 192.0.2.0/24", s)
	}
	if p != p.Masked() {
		return Range{}, fmt.Errorf("%q: has host bits: want %s", s, p.Masked())
	}
	r := Range{p.Addr(), lastOf(p)}
	if host := p.Addr().BitLen() - p.Bits(); host >= 2 {
		r.First = r.First.Next()
		if p.Addr().Is4() {
			r.Last = r.Last.Prev()
		}
	}
	return r, nil
}

func parseAddr(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(strings.TrimSpace(s))
	if err != nil {
		return a, err
	}
	if a.Zone() != "" || a.Is4In6() {
		return a, fmt.Errorf("%q: want a plain address", s)
	}
	return a, nil
}

func lastOf(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// Pool is a set of addresses.
type Pool struct{ ranges []Range }

// ParsePool reads ranges, which may overlap.
func ParsePool(ranges []string) (Pool, error) {
	var all []Range
	for _, s := range ranges {
		r, err := ParseRange(s)
		if err != nil {
			return Pool{}, err
		}
		all = append(all, r)
	}
	slices.SortFunc(all, func(a, b Range) int {
		return cmp.Or(cmp.Compare(a.First.BitLen(), b.First.BitLen()), a.First.Compare(b.First))
	})
	var p Pool
	for _, r := range all {
		if n := len(p.ranges); n > 0 && p.ranges[n-1].Contains(r.First) {
			if r.Last.Compare(p.ranges[n-1].Last) > 0 {
				p.ranges[n-1].Last = r.Last
			}
			continue
		}
		p.ranges = append(p.ranges, r)
	}
	return p, nil
}

// Ranges are the pool's, in order, without overlaps.
func (p Pool) Ranges() []Range { return slices.Clone(p.ranges) }

// Contains says whether a is in the pool.
func (p Pool) Contains(a netip.Addr) bool {
	return slices.ContainsFunc(p.ranges, func(r Range) bool { return r.Contains(a) })
}

// Family is the part of the pool that is of one family.
func (p Pool) Family(v6 bool) Pool {
	var f Pool
	for _, r := range p.ranges {
		if r.First.Is6() == v6 {
			f.ranges = append(f.ranges, r)
		}
	}
	return f
}

// Overlaps says whether any address of prefix is in the pool.
func (p Pool) Overlaps(prefix netip.Prefix) bool {
	first, last := prefix.Masked().Addr(), lastOf(prefix)
	return slices.ContainsFunc(p.ranges, func(r Range) bool {
		return r.First.BitLen() == first.BitLen() && r.First.Compare(last) <= 0 && first.Compare(r.Last) <= 0
	})
}

// Size is how many addresses there are, at most 2^31-1.
func (p Pool) Size() int32 {
	sum := new(big.Int)
	for _, r := range p.ranges {
		n := new(big.Int).Sub(new(big.Int).SetBytes(r.Last.AsSlice()), new(big.Int).SetBytes(r.First.AsSlice()))
		sum.Add(sum, n.Add(n, big.NewInt(1)))
	}
	if !sum.IsInt64() || sum.Int64() > math.MaxInt32 {
		return math.MaxInt32
	}
	return int32(sum.Int64())
}

// Addresses yields them in order, IPv4 first.
func (p Pool) Addresses() iter.Seq[netip.Addr] {
	return func(yield func(netip.Addr) bool) {
		for _, r := range p.ranges {
			for a := r.First; a.IsValid() && r.Contains(a); a = a.Next() {
				if !yield(a) {
					return
				}
			}
		}
	}
}
