package edge

import (
	"encoding/hex"
	"net/netip"
	"testing"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

func TestNames(t *testing.T) {
	a, b := LinkName("0123456789abcdef", "eth0"), LinkName("0123456789abcdef", "eth1")
	if len(a) > 15 || a == b || a != LinkName("0123456789abcdef", "eth0") || validLink(a) != nil {
		t.Errorf("link names %q, %q", a, b)
	}
	v4, v6 := Overlay(netip.MustParseAddr("100.64.0.2"))
	if v4.String() != "100.64.0.2" || v6.String() != "fd68:3873:2::6440:2" {
		t.Errorf("overlay addresses %s, %s", v4, v6)
	}
	if v4, v6 := Overlay(netip.MustParseAddr("fd00:64::2")); v4.IsValid() || !overlay6.Contains(v6) {
		t.Errorf("overlay addresses %s, %s", v4, v6)
	}
	if m := overlayMAC(netip.MustParseAddr("100.64.0.2")); m.String() != "0a:69:64:40:00:02" {
		t.Errorf("overlay MAC %s", m)
	}
	if l := linkLocal([]byte{0x0a, 0x58, 0xc0, 0xa8, 0, 5}); l.String() != "fe80::858:c0ff:fea8:5" {
		t.Errorf("link-local %s", l)
	}
}

func TestTransit(t *testing.T) {
	seen := map[netip.Addr]bool{}
	for i := range transits {
		tr := transitAt(i)
		for _, a := range []netip.Addr{tr.here4, tr.node4, tr.here6, tr.node6} {
			if seen[a] || !transit4.Contains(a) && !transit6.Contains(a) || a.String() == "169.254.169.254" {
				t.Fatalf("transit %d: %s is taken or outside", i, a)
			}
			seen[a] = true
		}
		if netip.PrefixFrom(tr.node4, 31).Masked() != netip.PrefixFrom(tr.here4, 31).Masked() {
			t.Fatalf("transit %d: %s and %s are no pair", i, tr.node4, tr.here4)
		}
		for _, a := range []netip.Addr{tr.here4, tr.node4} {
			if j, ok := transitIndex(a); !ok || j != i {
				t.Fatalf("transit %d: index of %s is %d, %v", i, a, j, ok)
			}
		}
	}
}

// Every rule can be encoded, which fingerprint relies on, and no two of a chain are the same.
func TestRulesEncode(t *testing.T) {
	s := Spec{MTU: 1450, Routed: true, Egress: true, Subnets: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00:1::/64")}}
	h := Host{
		APIServers: []netip.AddrPort{netip.MustParseAddrPort("100.64.0.1:6443"), netip.MustParseAddrPort("100.64.0.2:6443"), netip.MustParseAddrPort("[fd00::1]:6443")},
		Reserved:   []netip.Prefix{netip.MustParsePrefix("10.96.0.0/12"), netip.MustParsePrefix("fd00:10:96::/108")},
	}
	v4, v6 := Overlay(netip.MustParseAddr("100.64.0.1"))
	for _, r := range []ruleset{edgeRules(s, transitAt(5), v4, v6), edgeRules(Spec{MTU: 1280}, transitAt(0), netip.Addr{}, v6), hostRules(h, 8473), hostRules(Host{}, 1)} {
		for _, c := range r.chains {
			seen := map[string]bool{}
			for i, rule := range c.rules {
				for _, e := range rule {
					if _, err := expr.Marshal(unix.NFPROTO_INET, e); err != nil {
						t.Fatalf("%s %s rule %d: %v", r.table, c.name, i, err)
					}
				}
				f := fingerprint(rule)
				if seen[f] {
					t.Errorf("%s %s: rule %d is there twice", r.table, c.name, i)
				}
				seen[f] = true
			}
		}
	}
}

func TestFrames(t *testing.T) {
	mac := []byte{2, 0, 0, 0, 0, 1}
	if got := hex.EncodeToString(gratuitousARP(mac, netip.MustParseAddr("100.64.0.9"))); got !=
		"ffffffffffff0200000000010806"+"0001080006040001"+"020000000001"+"64400009"+"000000000000"+"64400009" {
		t.Errorf("gratuitous ARP %s", got)
	}
	na := unsolicitedNA(mac, netip.MustParseAddr("fd00:64::9"))
	if len(na) != 14+40+32 || na[54] != 136 || na[21] != 255 {
		t.Errorf("neighbour advertisement %x", na)
	}
}
