// Package subnet owns the rules for the subnets of a Network: what is accepted, which
// gateway and index each gets, how many addresses there are. It is pure; admission asks it
// before an object is stored and the controller asks it again. It must not know the API
// server.
package subnet

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
)

// Bounds of a subnet's prefix length: room for a gateway and some Pods, and no more
// addresses than anybody can use.
const (
	minBits4, maxBits4 = 8, 29
	minBits6, maxBits6 = 48, 112
	maxSubnets         = 16
	minMTU             = 576
	// minMTU6 is what IPv6 demands of every link.
	minMTU6 = 1280
	// Overhead is what the overlay takes of the fabric's MTU.
	Overhead = 50
)

// never are ranges no Network may have, whatever the cluster: hosts treat them specially.
var never = []reserved{
	{netip.MustParsePrefix("0.0.0.0/8"), "\"this host\""},
	{netip.MustParsePrefix("127.0.0.0/8"), "loopback"},
	{netip.MustParsePrefix("169.254.0.0/16"), "link-local, where cloud metadata and the edges' own links are"},
	{netip.MustParsePrefix("224.0.0.0/4"), "multicast"},
	{netip.MustParsePrefix("240.0.0.0/4"), "reserved by the IETF"},
	{netip.MustParsePrefix("::/16"), "loopback and mapped addresses"},
	{netip.MustParsePrefix("64:ff9b::/96"), "address translation"},
	{netip.MustParsePrefix("64:ff9b:1::/48"), "address translation"},
	{netip.MustParsePrefix("fe80::/10"), "link-local"},
	{netip.MustParsePrefix("fec0::/10"), "deprecated by the IETF"},
	{netip.MustParsePrefix("ff00::/8"), "multicast"},
}

type reserved struct {
	prefix netip.Prefix
	why    string
}

// Limits are the cluster's.
type Limits struct {
	// Services are the ranges of ClusterIPs: the same in every Network.
	Services []netip.Prefix
	// Reserved are ranges of the cluster's own: nodes, Pods of no tenant, management.
	Reserved []netip.Prefix
	// FabricMTU is what links between nodes carry; 0 leaves MTUs unbounded.
	FabricMTU int32
	// DefaultProvider is who carries Networks that name nobody; the built-in one if empty.
	DefaultProvider string
}

// MaxMTU is the most a Pod's NIC may have; 0 if unbounded.
func (l Limits) MaxMTU() int32 {
	if l.FabricMTU == 0 {
		return 0
	}
	return l.FabricMTU - Overhead
}

func (l Limits) reserved() []reserved {
	all := slices.Clone(never)
	for _, p := range l.Services {
		all = append(all, reserved{p.Masked(), "the cluster's Service range"})
	}
	for _, p := range l.Reserved {
		all = append(all, reserved{p.Masked(), "reserved by the cluster's operator"})
	}
	return all
}

// ValidateNetwork says all that is wrong with spec. Paths begin with "spec".
func ValidateNetwork(spec v1alpha1.NetworkSpec, o Limits) field.ErrorList {
	var errs field.ErrorList
	path := field.NewPath("spec")
	subnets := path.Child("subnets")
	switch {
	case spec.ProviderNetworkID != "" && len(spec.Subnets) > 0:
		errs = append(errs, field.Invalid(path.Child("providerNetworkID"), spec.ProviderNetworkID,
			"an adopted network has its provider's subnets: leave out spec.subnets, or providerNetworkID"))
	case spec.ProviderNetworkID == "" && len(spec.Subnets) == 0:
		errs = append(errs, field.Required(subnets, "give at least one, for example {default: {cidr: 192.168.0.0/24}}"))
	}
	if len(spec.Subnets) > maxSubnets {
		errs = append(errs, field.TooMany(subnets, len(spec.Subnets), maxSubnets))
		return errs
	}
	if spec.ProviderNetworkID != "" && cmp.Or(spec.Provider, o.DefaultProvider, "builtin") == "builtin" {
		errs = append(errs, field.Invalid(path.Child("providerNetworkID"), spec.ProviderNetworkID,
			"the built-in provider has no networks to adopt: give spec.subnets, or another spec.provider"))
	}
	type accepted struct {
		name   string
		prefix netip.Prefix
	}
	var have []accepted
	for _, name := range slices.Sorted(maps.Keys(spec.Subnets)) {
		at := subnets.Key(name)
		if msgs := validation.IsDNS1123Label(name); len(msgs) > 0 {
			errs = append(errs, field.Invalid(at, name, "name of the subnet: "+strings.Join(msgs, ", ")))
		}
		prefix, es := validateSubnet(at, spec.Subnets[name], o)
		errs = append(errs, es...)
		if !prefix.IsValid() {
			continue
		}
		for _, other := range have {
			if other.prefix.Overlaps(prefix) {
				errs = append(errs, field.Invalid(at.Child("cidr"), prefix.String(),
					fmt.Sprintf("overlaps with subnet %s (%s): choose ranges that do not", other.name, other.prefix)))
			}
		}
		have = append(have, accepted{name, prefix})
	}
	v6 := slices.ContainsFunc(have, func(a accepted) bool { return a.prefix.Addr().Is6() })
	errs = append(errs, validateMTU(path.Child("mtu"), spec.MTU, v6, o)...)
	errs = append(errs, validateDNS(path.Child("dnsServers"), spec.DNSServers)...)
	return errs
}

func validateSubnet(at *field.Path, s v1alpha1.Subnet, o Limits) (netip.Prefix, field.ErrorList) {
	at4 := at.Child("cidr")
	p, err := netip.ParsePrefix(s.CIDR)
	if err != nil || p.Addr().Is4In6() || p.Addr().Zone() != "" {
		return netip.Prefix{}, field.ErrorList{field.Invalid(at4, s.CIDR, "want a network like 192.168.0.0/24")}
	}
	if p != p.Masked() {
		return netip.Prefix{}, field.ErrorList{field.Invalid(at4, s.CIDR, fmt.Sprintf("has host bits: want %s", p.Masked()))}
	}
	low, high := minBits4, maxBits4
	if p.Addr().Is6() {
		low, high = minBits6, maxBits6
	}
	if p.Bits() < low || p.Bits() > high {
		return netip.Prefix{}, field.ErrorList{field.Invalid(at4, s.CIDR,
			fmt.Sprintf("want a prefix length from /%d to /%d", low, high))}
	}
	var errs field.ErrorList
	for _, r := range o.reserved() {
		if r.prefix.Overlaps(p) {
			errs = append(errs, field.Invalid(at4, s.CIDR,
				fmt.Sprintf("overlaps with %s (%s): choose another range", r.prefix, r.why)))
			break
		}
	}
	if s.Gateway != "" {
		gw, err := netip.ParseAddr(s.Gateway)
		switch {
		case err != nil || gw.Zone() != "" || !p.Contains(gw):
			errs = append(errs, field.Invalid(at.Child("gateway"), s.Gateway,
				fmt.Sprintf("want an address inside %s, or nothing for %s", p, p.Addr().Next())))
		case gw == p.Addr() || (gw.Is4() && gw == last(p)):
			errs = append(errs, field.Invalid(at.Child("gateway"), s.Gateway,
				fmt.Sprintf("is the network's own or broadcast address: want a host address of %s, or nothing for %s", p, p.Addr().Next())))
		}
	}
	return p, errs
}

func validateMTU(at *field.Path, mtu int32, v6 bool, o Limits) field.ErrorList {
	if mtu == 0 {
		return nil
	}
	low := int32(minMTU)
	if v6 {
		low = minMTU6
	}
	switch most := o.MaxMTU(); {
	case mtu < low:
		return field.ErrorList{field.Invalid(at, mtu, fmt.Sprintf("want at least %d", low))}
	case most > 0 && mtu > most:
		return field.ErrorList{field.Invalid(at, mtu,
			fmt.Sprintf("the fabric carries %d after the overlay's %d bytes: want at most that, or nothing", most, Overhead))}
	}
	return nil
}

func validateDNS(at *field.Path, servers []string) field.ErrorList {
	var errs field.ErrorList
	for i, s := range servers {
		a, err := netip.ParseAddr(s)
		switch {
		case err != nil || a.Zone() != "":
			errs = append(errs, field.Invalid(at.Index(i), s, "want an IP address"))
		case a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() || a.IsLinkLocalUnicast():
			errs = append(errs, field.Invalid(at.Index(i), s, "is not an address a server can have in a Network"))
		}
	}
	return errs
}

// Normalise is what a valid spec becomes: gateways filled in, in the order of names. Those
// in old keep their index; new ones get the numbers after the highest ever used.
func Normalise(spec v1alpha1.NetworkSpec, old []v1alpha1.SubnetStatus) []v1alpha1.SubnetStatus {
	had := map[string]v1alpha1.SubnetStatus{}
	next := int32(0)
	for _, s := range old {
		had[s.Name] = s
		next = max(next, s.Index+1)
	}
	var out []v1alpha1.SubnetStatus
	for _, name := range slices.Sorted(maps.Keys(spec.Subnets)) {
		s := spec.Subnets[name]
		p, err := netip.ParsePrefix(s.CIDR)
		if err != nil {
			continue
		}
		st := v1alpha1.SubnetStatus{Name: name, CIDR: p.Masked().String(), Gateway: p.Masked().Addr().Next().String()}
		if gw, err := netip.ParseAddr(s.Gateway); err == nil {
			st.Gateway = gw.String()
		}
		if o, ok := had[name]; ok {
			st.Index, st.ProviderSubnetID = o.Index, o.ProviderSubnetID
		} else {
			st.Index = next
			next++
		}
		out = append(out, st)
	}
	return out
}

// Free is how many more Ports fit beside those there are, by the smallest family: a Port
// takes one address of each family the Network has.
func Free(subnets []v1alpha1.SubnetStatus, ports int) int32 {
	var room [2]float64
	var has [2]bool
	for _, s := range subnets {
		p, err := netip.ParsePrefix(s.CIDR)
		if err != nil {
			continue
		}
		f := 0
		// Network, broadcast and gateway; IPv6 has no broadcast.
		taken := 3.0
		if p.Addr().Is6() {
			f, taken = 1, 2
		}
		has[f] = true
		room[f] += math.Exp2(float64(p.Addr().BitLen()-p.Bits())) - taken
	}
	free := math.Inf(1)
	for f := range room {
		if has[f] {
			free = min(free, room[f])
		}
	}
	if math.IsInf(free, 1) {
		return 0
	}
	return int32(max(0, min(free-float64(ports), math.MaxInt32)))
}

// Overlap returns the first two ranges of a and b that meet.
func Overlap(a, b []v1alpha1.SubnetStatus) (netip.Prefix, netip.Prefix, bool) {
	for _, x := range a {
		p, err := netip.ParsePrefix(x.CIDR)
		if err != nil {
			continue
		}
		for _, y := range b {
			if q, err := netip.ParsePrefix(y.CIDR); err == nil && p.Overlaps(q) {
				return p, q, true
			}
		}
	}
	return netip.Prefix{}, netip.Prefix{}, false
}

// ParsePrefixes reads a list of CIDRs separated by commas, as flags have it.
func ParsePrefixes(s string) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for _, part := range strings.Split(s, ",") {
		part = strings.TrimSpace(part)
		if part == "" {
			continue
		}
		p, err := netip.ParsePrefix(part)
		if err != nil {
			return nil, fmt.Errorf("%q: want a list of networks like 10.96.0.0/12,fd00:10:96::/108", part)
		}
		out = append(out, p.Masked())
	}
	slices.SortStableFunc(out, func(a, b netip.Prefix) int {
		return cmp.Compare(a.Addr().BitLen(), b.Addr().BitLen())
	})
	return out, nil
}

// last is the highest address of p.
func last(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}
