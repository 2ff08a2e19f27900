package neutron

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
)

// Verbs of a step.
const (
	create = "create"
	update = "update"
	retag  = "tag"
	attach = "attach"
	drop   = "delete"
)

// step is one thing to do at Neutron. Why says what differed, of what was in order before;
// it is empty for what is made the first time.
type step struct {
	Verb, Kind, ID string
	Body           map[string]any
	Why            string
}

// wish is what a Network should be at Neutron.
type wish struct {
	Mark    string
	Tags    []string
	Name    string
	Project string
	// MTU asked for; Neutron's own if 0.
	MTU int32
	// External network of the router's gateway; none if empty.
	External string
	// Adopted networks are somebody else's: only the group is ours.
	Adopted bool
	Subnets []v1alpha1.SubnetStatus
	// Known are the IDs written down before.
	Known known
	// TagsAtOnce says that tags may go with a creation.
	TagsAtOnce bool
}

type known struct{ Network, Router, Group string }

// sight is what there is of a Network at Neutron.
type sight struct {
	Network *network
	Subnets []subnetwork
	Router  *router
	// Interfaces are the subnets the router is in.
	Interfaces []string
	Group      *group
}

// families of rules a group has: everything, both ways. What Pods may say to each other is
// NetworkPolicy's to decide, on the nodes; port security keeps them to their own address.
var families = []rule{
	{Direction: "ingress", Family: "IPv4"}, {Direction: "ingress", Family: "IPv6"},
	{Direction: "egress", Family: "IPv4"}, {Direction: "egress", Family: "IPv6"},
}

// plan says what to do next that w becomes true. Steps do not need one another; what can
// be done only after them is planned when they are done.
func plan(w wish, s sight) []step {
	var out []step
	body := func(more map[string]any) map[string]any {
		b := map[string]any{"name": w.Name, "project_id": w.Project, "description": w.Mark}
		if w.TagsAtOnce {
			b["tags"] = w.Tags
		}
		for k, v := range more {
			b[k] = v
		}
		return b
	}
	missing := func(kind, id string) string {
		if id == "" {
			return ""
		}
		return fmt.Sprintf("%s %s was deleted", single(kind), id)
	}
	tagged := func(kind string, o object, was string) {
		if !sameSet(o.Tags, w.Tags) {
			why := ""
			if was == o.ID {
				why = single(kind) + " had other tags"
			}
			out = append(out, step{Verb: retag, Kind: kind, ID: o.ID, Body: map[string]any{"tags": w.Tags}, Why: why})
		}
	}
	if !w.Adopted {
		switch n := s.Network; {
		case n == nil:
			b := body(map[string]any{"admin_state_up": true})
			if w.MTU > 0 {
				b["mtu"] = w.MTU
			}
			out = append(out, step{Verb: create, Kind: networks, Body: b, Why: missing(networks, w.Known.Network)})
		default:
			out = append(out, differ(networks, n.ID, []difference{
				{down(n.AdminUp), "admin_state_up", true, "network was down"},
				{n.PortSecurity != nil && !*n.PortSecurity, "port_security_enabled", true, "network had no port security"},
				{w.MTU > 0 && n.MTU != w.MTU, "mtu", w.MTU, fmt.Sprintf("network had MTU %d", n.MTU)},
				{n.Description != w.Mark, "description", w.Mark, "network had another description"},
			})...)
			tagged(networks, n.object, w.Known.Network)
			out = append(out, planSubnets(w, s, body, tagged)...)
		}
		out = append(out, planRouter(w, s, body, missing, tagged)...)
	}
	if g := s.Group; g == nil {
		out = append(out, step{Verb: create, Kind: groups, Body: body(nil), Why: missing(groups, w.Known.Group)})
	} else {
		for _, r := range families {
			if slices.ContainsFunc(g.Rules, func(h rule) bool { return h.Direction == r.Direction && h.Family == r.Family && h.whole() }) {
				continue
			}
			why := ""
			if w.Known.Group == g.ID {
				why = fmt.Sprintf("security group lacked the rule for %s %s", r.Direction, r.Family)
			}
			out = append(out, step{Verb: create, Kind: rules, Why: why, Body: map[string]any{
				"security_group_id": g.ID, "direction": r.Direction, "ethertype": r.Family, "project_id": w.Project,
			}})
		}
		tagged(groups, g.object, w.Known.Group)
	}
	return out
}

func planSubnets(w wish, s sight, body func(map[string]any) map[string]any, tagged func(string, object, string)) []step {
	var out []step
	for _, want := range w.Subnets {
		have := s.subnet(want.CIDR)
		if have == nil {
			why := ""
			if want.ProviderSubnetID != "" {
				why = fmt.Sprintf("subnet %s was deleted", want.CIDR)
			}
			version := 4
			if p, err := netip.ParsePrefix(want.CIDR); err == nil && p.Addr().Is6() {
				version = 6
			}
			out = append(out, step{Verb: create, Kind: subnets, Why: why, Body: body(map[string]any{
				"name": w.Name + "-" + want.Name, "network_id": s.Network.ID, "cidr": want.CIDR, "gateway_ip": want.Gateway,
				// Addresses are given by the node, so no server needs one of them.
				"ip_version": version, "enable_dhcp": false,
			})})
			continue
		}
		out = append(out, differ(subnets, have.ID, []difference{
			{have.DHCP, "enable_dhcp", false, fmt.Sprintf("subnet %s had DHCP", want.CIDR)},
			{have.Gateway == nil || !sameAddress(*have.Gateway, want.Gateway), "gateway_ip", want.Gateway, fmt.Sprintf("subnet %s had another gateway", want.CIDR)},
		})...)
		tagged(subnets, have.object, want.ProviderSubnetID)
	}
	return out
}

func planRouter(w wish, s sight, body func(map[string]any) map[string]any, missing func(kind, id string) string, tagged func(string, object, string)) []step {
	r := s.Router
	info := map[string]any{}
	if w.External != "" {
		info["network_id"] = w.External
	}
	if r == nil {
		b := body(map[string]any{"admin_state_up": true})
		if w.External != "" {
			b["external_gateway_info"] = info
		}
		return []step{{Verb: create, Kind: routers, Body: b, Why: missing(routers, w.Known.Router)}}
	}
	at := ""
	if r.Gateway != nil {
		at = r.Gateway.Network
	}
	why := "router had no external gateway"
	if at != "" {
		why = "router had another external gateway"
	}
	out := differ(routers, r.ID, []difference{
		{down(r.AdminUp), "admin_state_up", true, "router was down"},
		{at != w.External, "external_gateway_info", info, why},
		{r.Description != w.Mark, "description", w.Mark, "router had another description"},
	})
	tagged(routers, r.object, w.Known.Router)
	if s.Network == nil {
		return out
	}
	for _, want := range w.Subnets {
		if have := s.subnet(want.CIDR); have != nil && have.Gateway != nil && !slices.Contains(s.Interfaces, have.ID) {
			why := ""
			if w.Known.Router == r.ID && want.ProviderSubnetID == have.ID {
				why = fmt.Sprintf("router was not in subnet %s", want.CIDR)
			}
			out = append(out, step{Verb: attach, Kind: routers, ID: r.ID, Body: map[string]any{"subnet_id": have.ID}, Why: why})
		}
	}
	return out
}

// subnet is the one of a range.
func (s sight) subnet(cidr string) *subnetwork {
	want, err := netip.ParsePrefix(cidr)
	if err != nil {
		return nil
	}
	for i := range s.Subnets {
		if p, err := netip.ParsePrefix(s.Subnets[i].CIDR); err == nil && p.Masked() == want.Masked() {
			return &s.Subnets[i]
		}
	}
	return nil
}

// difference is a field that is not as it should be.
type difference struct {
	is    bool
	field string
	want  any
	why   string
}

// differ is the step that mends all differences of one resource.
func differ(kind, id string, all []difference) []step {
	b := map[string]any{}
	var why []string
	for _, d := range all {
		if d.is {
			b[d.field] = d.want
			why = append(why, d.why)
		}
	}
	if len(b) == 0 {
		return nil
	}
	return []step{{Verb: update, Kind: kind, ID: id, Body: b, Why: strings.Join(why, ", ")}}
}

func down(up *bool) bool { return up != nil && !*up }

// sameSet compares lists whose order says nothing.
func sameSet(a, b []string) bool {
	x, y := slices.Clone(a), slices.Clone(b)
	slices.Sort(x)
	slices.Sort(y)
	return slices.Equal(x, y)
}

func sameAddress(a, b string) bool {
	x, err := netip.ParseAddr(a)
	y, err2 := netip.ParseAddr(b)
	return err == nil && err2 == nil && x == y
}

// portWish is what a Port should be at Neutron.
type portWish struct {
	Mark, Name, Project string
	Tags                []string
	Network, Group      string
	// MAC asked for or had before; Neutron's choice if empty.
	MAC   string
	Fixed []fixedIP
	// Owner is the device_owner: of a Pod if empty.
	Owner string
	// Host and Device where it is plugged; empty while it is claimed only.
	Host, Device string
	// Known is the ID written down before.
	Known      string
	TagsAtOnce bool
}

func (w portWish) owner() string { return cmp.Or(w.Owner, deviceOwner) }

// planPort says what to do next that w becomes true.
func planPort(w portWish, h *port) []step {
	if h == nil {
		why := ""
		if w.Known != "" {
			why = fmt.Sprintf("port %s was deleted", w.Known)
		}
		b := map[string]any{
			"name": w.Name, "project_id": w.Project, "description": w.Mark, "network_id": w.Network, "admin_state_up": true,
			"fixed_ips": w.Fixed, "device_owner": w.owner(), "device_id": w.Device, "security_groups": []string{w.Group},
			"binding:vnic_type": "normal",
		}
		if w.TagsAtOnce {
			b["tags"] = w.Tags
		}
		if w.MAC != "" {
			b["mac_address"] = w.MAC
		}
		if w.Host != "" {
			b["binding:host_id"] = w.Host
		}
		return []step{{Verb: create, Kind: ports, Body: b, Why: why}}
	}
	why := func(s string) string {
		if w.Known != h.ID {
			return "" // it is only being taken over
		}
		return s
	}
	if w.MAC != "" && !strings.EqualFold(w.MAC, h.MAC) || h.Network != w.Network {
		// Neutron changes neither of a port that is plugged.
		return []step{{Verb: drop, Kind: ports, ID: h.ID, Why: why("port had another MAC address or network")}}
	}
	host, vif := "", ""
	if h.Host != nil {
		host = *h.Host
	}
	if h.VIFType != nil {
		vif = *h.VIFType
	}
	moved := host != w.Host
	// A new try: Neutron binds again whatever is not bound when it is updated.
	failed := w.Host != "" && (vif == bindingFailed || vif == unbound)
	text := ""
	if moved && host != "" && w.Host != "" {
		text = fmt.Sprintf("port was bound to host %s", host)
	}
	var out []step
	for _, s := range differ(ports, h.ID, []difference{
		{down(h.AdminUp), "admin_state_up", true, "port was down"},
		{!sameFixed(h.Fixed, w.Fixed), "fixed_ips", w.Fixed, "port had other addresses"},
		{!sameSet(h.Groups, []string{w.Group}), "security_groups", []string{w.Group}, "port had other security groups"},
		{len(h.Pairs) > 0, "allowed_address_pairs", []string{}, "port had allowed_address_pairs"},
		{h.PortSecurity != nil && !*h.PortSecurity, "port_security_enabled", true, "port had no port security"},
		{h.DeviceOwner != w.owner(), "device_owner", w.owner(), "port had another device_owner"},
		{h.DeviceID != w.Device, "device_id", w.Device, ""},
		{moved || failed, "binding:host_id", w.Host, text},
		{h.Description != w.Mark, "description", w.Mark, "port had another description"},
	}) {
		s.Why = why(strings.Trim(s.Why, ", "))
		out = append(out, s)
	}
	if !sameSet(h.Tags, w.Tags) {
		out = append(out, step{Verb: retag, Kind: ports, ID: h.ID, Body: map[string]any{"tags": w.Tags}})
	}
	return out
}

// sameFixed compares addresses, in any order. Of a port of ours Neutron fills in subnets.
func sameFixed(a, b []fixedIP) bool {
	texts := func(all []fixedIP) []string {
		var out []string
		for _, f := range all {
			if x, err := netip.ParseAddr(f.Address); err == nil {
				out = append(out, x.String())
			} else {
				out = append(out, f.Address)
			}
		}
		return out
	}
	return sameSet(texts(a), texts(b))
}
