package ipam

import (
	"math"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func TestParseRange(t *testing.T) {
	for in, want := range map[string]string{
		"192.0.2.10-192.0.2.20": "192.0.2.10-192.0.2.20",
		"192.0.2.0/30":          "192.0.2.1-192.0.2.2",
		"192.0.2.0/31":          "192.0.2.0-192.0.2.1",
		"192.0.2.7/32":          "192.0.2.7-192.0.2.7",
		"192.0.2.7":             "192.0.2.7-192.0.2.7",
		"2001:db8::/126":        "2001:db8::1-2001:db8::3",
		"192.0.2.20-192.0.2.10": "error: ends before it begins",
		"192.0.2.20-2001:db8::": "error: one family",
		"192.0.2.7/24":          "error: want 192.0.2.0/24",
		"::ffff:192.0.2.1":      "error: want a network",
		"fe80::1%eth0":          "error: want a network",
		"":                      "error: want a network",
		"a-b":                   "error: want a range",
		"192.0.2.0/33":          "error: want a network",
		"1-2-3":                 "error: want a range",
	} {
		r, err := ParseRange(in)
		if text, bad := strings.CutPrefix(want, "error: "); bad {
			if err == nil || !strings.Contains(err.Error(), text) {
				t.Errorf("%q: %v, %v", in, r, err)
			}
			continue
		}
		if err != nil || r.String() != want {
			t.Errorf("%q: %v, %v; want %s", in, r, err, want)
		}
	}
}

func TestPool(t *testing.T) {
	p, err := ParsePool([]string{"2001:db8::5", "192.0.2.3-192.0.2.5", "192.0.2.0/30", "192.0.2.5-192.0.2.6"})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for a := range p.Addresses() {
		got = append(got, a.String())
	}
	want := []string{"192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.4", "192.0.2.5", "192.0.2.6", "2001:db8::5"}
	if !slices.Equal(got, want) || int(p.Size()) != len(want) {
		t.Errorf("%v, %d", got, p.Size())
	}
	if p.Contains(netip.MustParseAddr("192.0.2.7")) || !p.Overlaps(netip.MustParsePrefix("192.0.2.6/31")) || p.Overlaps(netip.MustParsePrefix("192.0.2.8/29")) {
		t.Error("what is inside and outside")
	}
	big, err := ParsePool([]string{"2001:db8::/32", "255.255.255.255-255.255.255.255", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"})
	if err != nil || big.Size() != math.MaxInt32 {
		t.Error(big.Size(), err)
	}
	if next, stop := 0, false; !stop {
		for range big.Addresses() {
			if next++; next == 3 {
				break
			}
		}
	}
}

func FuzzParseRange(f *testing.F) {
	f.Add("192.0.2.10-192.0.2.20")
	f.Add("2001:db8::/64")
	f.Fuzz(func(t *testing.T, s string) {
		r, err := ParseRange(s)
		if err != nil {
			return
		}
		again, err := ParseRange(r.String())
		if err != nil || again != r || !r.Contains(r.First) || !r.Contains(r.Last) {
			t.Fatalf("%q: %v, %v, %v", s, r, again, err)
		}
	})
}
