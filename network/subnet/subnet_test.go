package subnet

import (
	"math"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
)

var limits = Limits{
	Services:  []netip.Prefix{netip.MustParsePrefix("10.96.0.0/12"), netip.MustParsePrefix("fd00:10:96::/108")},
	Reserved:  []netip.Prefix{netip.MustParsePrefix("100.64.0.0/24")},
	FabricMTU: 1500,
}

func one(cidr, gateway string) v1alpha1.NetworkSpec {
	return v1alpha1.NetworkSpec{Subnets: map[string]v1alpha1.Subnet{"a": {CIDR: cidr, Gateway: gateway}}}
}

func TestValidateNetwork(t *testing.T) {
	with := func(s v1alpha1.NetworkSpec, f func(*v1alpha1.NetworkSpec)) v1alpha1.NetworkSpec { f(&s); return s }
	for name, c := range map[string]struct {
		spec v1alpha1.NetworkSpec
		want string // part of the only error; none if empty
	}{
		"ipv4":              {one("192.168.0.0/24", ""), ""},
		"gateway":           {one("192.168.0.0/24", "192.168.0.254"), ""},
		"ipv6":              {one("fd01::/64", ""), ""},
		"smallest":          {one("192.168.0.0/29", ""), ""},
		"nothing":           {v1alpha1.NetworkSpec{}, "spec.subnets: Required value"},
		"no cidr":           {one("elsewhere", ""), `spec.subnets[a].cidr: Invalid value: "elsewhere": want a network like`},
		"empty cidr":        {one("", ""), `spec.subnets[a].cidr: Invalid value: "": want a network`},
		"host bits":         {one("192.168.0.7/24", ""), "want 192.168.0.0/24"},
		"too small":         {one("192.168.0.0/30", ""), "from /8 to /29"},
		"too big":           {one("192.0.0.0/7", ""), "from /8 to /29"},
		"ipv6 too small":    {one("fd01::/120", ""), "from /48 to /112"},
		"mapped":            {one("::ffff:10.0.0.0/112", ""), "want a network"},
		"zone":              {one("fe80::%eth0/64", ""), "want a network"},
		"service range":     {one("10.100.0.0/16", ""), "overlaps with 10.96.0.0/12 (the cluster's Service range)"},
		"around services":   {one("10.0.0.0/8", ""), "10.96.0.0/12"},
		"ipv6 services":     {one("fd00:10:96::/64", ""), "fd00:10:96::/108"},
		"nodes":             {one("100.64.0.0/16", ""), "reserved by the cluster's operator"},
		"loopback":          {one("127.0.0.0/16", ""), "loopback"},
		"metadata":          {one("169.254.169.0/24", ""), "metadata"},
		"multicast":         {one("224.0.0.0/24", ""), "multicast"},
		"link-local ipv6":   {one("fe80::/64", ""), "link-local"},
		"gateway elsewhere": {one("192.168.0.0/24", "192.168.1.1"), `spec.subnets[a].gateway: Invalid value: "192.168.1.1": want an address inside 192.168.0.0/24`},
		"gateway nonsense":  {one("192.168.0.0/24", "x"), "want an address inside"},
		"gateway network":   {one("192.168.0.0/24", "192.168.0.0"), "broadcast"},
		"gateway broadcast": {one("192.168.0.0/24", "192.168.0.255"), "broadcast"},
		"gateway family":    {one("192.168.0.0/24", "fd01::1"), "want an address inside"},
		"overlap": {v1alpha1.NetworkSpec{Subnets: map[string]v1alpha1.Subnet{
			"a": {CIDR: "192.168.0.0/16"}, "b": {CIDR: "192.168.4.0/24"}}}, "overlaps with subnet a (192.168.0.0/16)"},
		"name": {v1alpha1.NetworkSpec{Subnets: map[string]v1alpha1.Subnet{
			"A_b": {CIDR: "192.168.0.0/16"}}}, "name of the subnet"},
		"mtu":        {with(one("192.168.0.0/24", ""), func(s *v1alpha1.NetworkSpec) { s.MTU = 1451 }), "carries 1450"},
		"mtu fits":   {with(one("192.168.0.0/24", ""), func(s *v1alpha1.NetworkSpec) { s.MTU = 1450 }), ""},
		"small mtu":  {with(one("192.168.0.0/24", ""), func(s *v1alpha1.NetworkSpec) { s.MTU = 68 }), "at least 576"},
		"mtu ipv6":   {with(one("fd01::/64", ""), func(s *v1alpha1.NetworkSpec) { s.MTU = 1000 }), "at least 1280"},
		"dns":        {with(one("192.168.0.0/24", ""), func(s *v1alpha1.NetworkSpec) { s.DNSServers = []string{"192.0.2.1"} }), ""},
		"dns name":   {with(one("192.168.0.0/24", ""), func(s *v1alpha1.NetworkSpec) { s.DNSServers = []string{"ns1"} }), "spec.dnsServers[0]"},
		"dns local":  {with(one("192.168.0.0/24", ""), func(s *v1alpha1.NetworkSpec) { s.DNSServers = []string{"127.0.0.53"} }), "cannot|not an address"},
		"adopt both": {with(one("192.168.0.0/24", ""), func(s *v1alpha1.NetworkSpec) { s.Provider, s.ProviderNetworkID = "neutron", "x" }), "leave out spec.subnets"},
		"adopt":      {v1alpha1.NetworkSpec{Provider: "neutron", ProviderNetworkID: "x"}, ""},
		"adopt ours": {v1alpha1.NetworkSpec{ProviderNetworkID: "x"}, "no networks to adopt"},
	} {
		t.Run(name, func(t *testing.T) {
			errs := ValidateNetwork(c.spec, limits)
			if c.want == "" {
				if len(errs) > 0 {
					t.Fatal(errs.ToAggregate())
				}
				return
			}
			if len(errs) != 1 {
				t.Fatalf("want one error, got %v", errs)
			}
			for _, part := range strings.Split(c.want, "|") {
				if strings.Contains(errs[0].Error(), part) {
					return
				}
			}
			t.Errorf("%v does not say %q", errs[0], c.want)
		})
	}
}

func TestNormalise(t *testing.T) {
	old := Normalise(v1alpha1.NetworkSpec{Subnets: map[string]v1alpha1.Subnet{
		"b": {CIDR: "192.168.0.0/24"}, "c": {CIDR: "fd01::/64", Gateway: "fd01:0::9"}}}, nil)
	want := []v1alpha1.SubnetStatus{
		{Name: "b", Index: 0, CIDR: "192.168.0.0/24", Gateway: "192.168.0.1"},
		{Name: "c", Index: 1, CIDR: "fd01::/64", Gateway: "fd01::9"},
	}
	if d := cmp.Diff(want, old); d != "" {
		t.Error(d)
	}
	got := Normalise(v1alpha1.NetworkSpec{Subnets: map[string]v1alpha1.Subnet{
		"a": {CIDR: "10.0.0.0/24"}, "b": {CIDR: "192.168.0.0/24"}, "c": {CIDR: "fd01::/64", Gateway: "fd01::9"}}}, old)
	want = append([]v1alpha1.SubnetStatus{{Name: "a", Index: 2, CIDR: "10.0.0.0/24", Gateway: "10.0.0.1"}}, want...)
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("a subnet added to a live Network: %s", d)
	}
}

func TestFree(t *testing.T) {
	s4 := v1alpha1.SubnetStatus{CIDR: "192.168.0.0/29"}
	s6 := v1alpha1.SubnetStatus{CIDR: "fd01::/64"}
	for name, c := range map[string]struct {
		s     []v1alpha1.SubnetStatus
		ports int
		want  int32
	}{
		"none":       {nil, 0, 0},
		"ipv4":       {[]v1alpha1.SubnetStatus{s4}, 0, 5},
		"used":       {[]v1alpha1.SubnetStatus{s4}, 5, 0},
		"overused":   {[]v1alpha1.SubnetStatus{s4}, 9, 0},
		"ipv6":       {[]v1alpha1.SubnetStatus{s6}, 0, math.MaxInt32},
		"dual stack": {[]v1alpha1.SubnetStatus{s4, s6}, 1, 4},
	} {
		if got := Free(c.s, c.ports); got != c.want {
			t.Errorf("%s: %d, want %d", name, got, c.want)
		}
	}
}

func FuzzValidateNetwork(f *testing.F) {
	f.Add("192.168.0.0/24", "192.168.0.1", "192.0.2.1", int32(1400))
	f.Fuzz(func(t *testing.T, cidr, gateway, dns string, mtu int32) {
		s := one(cidr, gateway)
		s.DNSServers, s.MTU = []string{dns}, mtu
		if len(ValidateNetwork(s, limits)) > 0 {
			return
		}
		n := Normalise(s, nil)
		if len(n) != 1 {
			t.Fatalf("%v", n)
		}
		p, gw := netip.MustParsePrefix(n[0].CIDR), netip.MustParseAddr(n[0].Gateway)
		if !p.Contains(gw) || Free(n, 0) < 1 {
			t.Fatalf("%v", n)
		}
	})
}
