package service

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func eps(list ...string) (out []Endpoint) {
	for _, s := range list {
		out = append(out, Endpoint{Address: netip.MustParseAddrPort(s)})
	}
	return out
}

// readable spells an op out: numbers for what people write as numbers.
func readable(o op) string {
	sign := "+"
	if o.del {
		sign = "-"
	}
	n := addrLen(o.v6)
	s := sign + o.set.name(o.v6)
	if o.set == setAddrs || o.set == setExternal || o.set == setLocal || o.set == setHairpins {
		a, _ := netip.AddrFromSlice([]byte(o.key[:n]))
		return s + " " + a.String()
	}
	f, _ := parseFront([]byte(o.key), o.v6)
	s += fmt.Sprintf(" %s/%d/%d", f.addr, f.proto, f.port)
	switch o.set {
	case setEndpoints:
		s += fmt.Sprintf("#%d", uint8(o.key[n+8])|uint8(o.key[n+11]))
		if o.key[n+10] == 1 || o.key[n+9] == 1 {
			s += "in"
		}
		if !o.del {
			ep, _ := parseAddrPort([]byte(o.val), o.v6)
			s += " " + ep.String()
		}
	case setRanges:
		from, _ := netip.AddrFromSlice([]byte(o.key[n+8:]))
		to, _ := netip.AddrFromSlice([]byte(o.end[n+8:]))
		s += fmt.Sprintf(" %s-%s", from, to)
	case setServices, setInsideServices:
		if !o.del {
			s += fmt.Sprintf(" %x", []byte(o.val))
		}
	}
	return s
}

func TestPlan(t *testing.T) {
	one := func(change func(*Service), list ...string) []Service {
		s := Service{Key: "ns/a", ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.0.9")},
			Ports: []Port{{Protocol: unix.IPPROTO_TCP, Port: 80, Internal: eps(list...), External: eps(list...)}}}
		if change != nil {
			change(&s)
		}
		return []Service{s}
	}
	v := func(c class) string { return fmt.Sprintf("%x", hostVal(uint32(c))) }
	a, b, c, d := "192.168.0.1:80", "192.168.0.2:80", "192.168.0.3:80", "192.168.0.4:80"
	external := func(s *Service) {
		s.External, s.ExternalLocal = []netip.Addr{netip.MustParseAddr("2.2.2.2")}, true
		s.SourceRanges = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("fd00::/8")}
		s.Ports[0].External = nil
		s.Ports[0].Elsewhere = true
	}
	for _, tc := range []struct {
		name     string
		from, to []Service
		want     []string
	}{
		{"nothing", nil, nil, nil},
		{"same", one(nil, a, b), one(nil, b, a), nil},
		{"first", nil, one(nil, a, b), []string{
			"+addr4 10.96.0.9",
			"+ep4 10.96.0.9/6/80#0 " + a, "+ep4 10.96.0.9/6/80#1 " + b, "+svc4 10.96.0.9/6/80 " + v(2)}},
		{"one more", one(nil, a, b), one(nil, a, b, c), []string{
			"-svc4 10.96.0.9/6/80", "+ep4 10.96.0.9/6/80#2 " + c, "+svc4 10.96.0.9/6/80 " + v(3)}},
		{"one less: the last takes its place", one(nil, a, b, c), one(nil, b, c), []string{
			"-svc4 10.96.0.9/6/80", "-ep4 10.96.0.9/6/80#0", "-ep4 10.96.0.9/6/80#2",
			"+ep4 10.96.0.9/6/80#0 " + c, "+svc4 10.96.0.9/6/80 " + v(2)}},
		{"one replaced", one(nil, a, b, c), one(nil, a, c, d), []string{
			"-ep4 10.96.0.9/6/80#1", "+ep4 10.96.0.9/6/80#1 " + d}},
		{"none left", one(nil, a), one(nil), []string{
			"-svc4 10.96.0.9/6/80", "-ep4 10.96.0.9/6/80#0", "+svc4 10.96.0.9/6/80 " + v(refuse)}},
		{"affinity", one(nil, a), one(func(s *Service) { s.Affinity = 10 * time.Second }, a), []string{
			"-svc4 10.96.0.9/6/80", "+svc4 10.96.0.9/6/80 " + v(1|10<<12)}},
		{"gone", one(nil, a), nil, []string{
			"-svc4 10.96.0.9/6/80", "-ep4 10.96.0.9/6/80#0", "-addr4 10.96.0.9"}},
		{"becomes local", one(nil, a), one(func(s *Service) { s.Ports[0].Internal[0].Local = true }, a), []string{
			"+local4 192.168.0.1", "+hairpin4 192.168.0.1"}},
		{"external, policy local, none here", one(nil, a), one(external, a), []string{
			"+addr4 2.2.2.2", "+external4 2.2.2.2",
			"+range4 2.2.2.2/6/80 10.0.0.0-10.255.255.255", "+svc4 2.2.2.2/6/80 " + v(silent),
			"+ep4 2.2.2.2/6/80#0in " + a, "+svcin4 2.2.2.2/6/80 " + v(1|inside|ranged)}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			from, err := desired(tc.from)
			check(t, err)
			plan(newState(), from)
			to, err := desired(tc.to)
			check(t, err)
			p := plan(from, to)
			var got []string
			for _, u := range slices.Concat([][]op{p.prelude}, p.units, [][]op{p.epilogue}) {
				for _, o := range u {
					got = append(got, readable(o))
				}
			}
			if !slices.Equal(got, tc.want) {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(tc.want, "\n"))
			}
		})
	}
}

// Whatever follows whatever, element by element the plan leads there, every transaction
// leaves each front with as many endpoints as its class says, and what stays is not moved.
func TestPlanProperty(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	random := func() (out []Service) {
		for i := range rnd.IntN(6) {
			s := Service{Key: fmt.Sprint("ns/", i), ClusterIPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 96, 0, byte(rnd.IntN(4))})},
				ExternalLocal: rnd.IntN(2) == 0, Affinity: time.Duration(rnd.IntN(2)) * time.Hour}
			if rnd.IntN(2) == 0 {
				s.External = []netip.Addr{netip.AddrFrom4([4]byte{10, 96, 0, byte(rnd.IntN(6))}), vip6}
			}
			if rnd.IntN(2) == 0 {
				s.SourceRanges = []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(rnd.IntN(3)), 0, 0}), 8+8*rnd.IntN(2))}
			}
			for range rnd.IntN(3) {
				p := Port{Protocol: unix.IPPROTO_UDP, Port: uint16(1 + rnd.IntN(2)), Elsewhere: rnd.IntN(2) == 0}
				for range rnd.IntN(40) {
					p.Internal = append(p.Internal, Endpoint{netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 168, 0, byte(rnd.IntN(40))}), 80), rnd.IntN(2) == 0})
				}
				p.External = p.Internal[:len(p.Internal)/2]
				s.Ports = append(s.Ports, p)
			}
			out = append(out, s)
		}
		return out
	}
	kernel := map[string]string{} // set, key and end: value
	do := func(o op) {
		k := o.set.name(o.v6) + " " + o.key + o.end
		if _, there := kernel[k]; there != o.del {
			t.Fatalf("%v: there is %t", o, there)
		}
		if o.del {
			delete(kernel, k)
		} else {
			kernel[k] = o.val
		}
	}
	cur := newState()
	for range 2000 {
		want, err := desired(random())
		check(t, err)
		old := cur
		p := plan(cur, want)
		for _, u := range slices.Concat([][]op{p.prelude}, p.units, [][]op{p.epilogue}) {
			for _, o := range u {
				do(o)
			}
		}
		cur = want
		for f, e := range cur.fronts {
			if e.class.endpoints() != len(e.eps) {
				t.Fatalf("%v: class says %d, there are %d", f, e.class.endpoints(), len(e.eps))
			}
			for i, ep := range e.eps {
				if kernel["ep"+suffix(f.addr.Is6())+" "+f.indexKey(i)] != addrPortVal(ep) {
					t.Fatalf("%v %d", f, i)
				}
				if j := slices.Index(old.fronts[f].eps, ep); j >= 0 && j < len(e.eps) && i != j {
					t.Fatalf("%v: %v moved from %d to %d", f, ep, j, i)
				}
			}
			if len(e.ranges) == 0 && !f.inside && e.class&ranged != 0 && f.addr.Is4() {
				t.Fatalf("%v has no ranges", f)
			}
		}
		elements := len(cur.addrs) + len(cur.external) + len(cur.local) + len(cur.hairpins)
		for _, e := range cur.fronts {
			elements += 1 + len(e.eps) + len(e.ranges)
		}
		if elements != len(kernel) {
			t.Fatalf("%d elements, want %d", len(kernel), elements)
		}
	}
}

func TestBounds(t *testing.T) {
	var many []Endpoint
	for i := range 5000 {
		many = append(many, Endpoint{Address: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}), 80)})
	}
	s, err := desired([]Service{{Key: "a", ClusterIPs: []netip.Addr{clusterIP4}, Ports: []Port{{Protocol: 6, Port: 1, Internal: many}}}})
	check(t, err)
	if e := s.fronts[front{clusterIP4, 6, 1, false}]; len(e.eps) != maxEndpoints || e.class.endpoints() != maxEndpoints {
		t.Errorf("%d endpoints", len(e.eps))
	}
	var ports []Port
	for i := range 400 {
		ports = append(ports, Port{Protocol: 6, Port: uint16(i + 1), Internal: many})
	}
	if _, err := desired([]Service{{Key: "a", ClusterIPs: []netip.Addr{clusterIP4}, Ports: ports}}); err == nil {
		t.Error("no bound")
	} else {
		t.Log(err)
	}
	if c := makeClass(3, 100*time.Hour*24*365, ranged); c.endpoints() != 3 || c&(inside|silent) != 0 {
		t.Errorf("%x", c)
	}
}
