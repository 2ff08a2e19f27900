package octavia

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
)

// wish is what a Service should be at Octavia.
type wish struct {
	Mark, Name, Project string
	Tags                []string
	// Provider of Octavia; its default if empty.
	Provider  string
	VIPSubnet string
	Listeners []listenerWish
	// Stepwise makes the load balancer bare and everything else after it.
	Stepwise bool
}

type listenerWish struct {
	Name     string
	Protocol string
	Port     int32
	// Sources that may come in; everybody if empty.
	Sources []string
	// Sticky sends a client to the same member.
	Sticky  bool
	Members []member
}

// member is where a pool sends to.
type member struct {
	Address string `json:"address"`
	Port    int32  `json:"protocol_port"`
	Subnet  string `json:"subnet_id,omitempty"`
}

// desire works out what a Service asks for. Members are the Pods themselves: they are on
// the same network as the load balancer.
func desire(s *corev1.Service, slices_ []discoveryv1.EndpointSlice, n *v1alpha1.Network) (wish, error) {
	w := wish{Name: "h8s." + n.Status.Tenant + "." + s.Namespace + "." + s.Name}
	w.Name = w.Name[:min(len(w.Name), 240)]
	v6 := len(s.Spec.IPFamilies) > 0 && s.Spec.IPFamilies[0] == corev1.IPv6Protocol
	for _, x := range n.Status.Subnets {
		if p, err := netip.ParsePrefix(x.CIDR); err == nil && p.Addr().Is6() == v6 && w.VIPSubnet == "" {
			w.VIPSubnet = x.ProviderSubnetID
		}
	}
	if w.VIPSubnet == "" {
		return w, refuse("NoFamily", "spec.ipFamilies: Network %s has no subnet of family %v", n.Name, s.Spec.IPFamilies)
	}
	sources, err := ranges(s, v6)
	if err != nil {
		return w, err
	}
	for _, p := range s.Spec.Ports {
		l := listenerWish{Name: name(p), Protocol: string(p.Protocol), Port: p.Port, Sources: sources, Sticky: s.Spec.SessionAffinity == corev1.ServiceAffinityClientIP}
		if l.Protocol == "" {
			l.Protocol = string(corev1.ProtocolTCP)
		}
		l.Members = members(p, slices_, n, v6)
		w.Listeners = append(w.Listeners, l)
	}
	return w, nil
}

func name(p corev1.ServicePort) string {
	return strings.ToLower(string(p.Protocol)) + "-" + fmt.Sprint(p.Port)
}

func ranges(s *corev1.Service, v6 bool) ([]string, error) {
	var out []string
	for _, text := range s.Spec.LoadBalancerSourceRanges {
		p, err := netip.ParsePrefix(strings.TrimSpace(text))
		if err != nil {
			return nil, refuse("Invalid", "spec.loadBalancerSourceRanges: %q: want a network like 198.51.100.0/24", text)
		}
		if p.Addr().Is6() == v6 {
			out = append(out, p.Masked().String())
		}
	}
	if len(s.Spec.LoadBalancerSourceRanges) > 0 && len(out) == 0 {
		return nil, refuse("Invalid", "spec.loadBalancerSourceRanges: none is of the family the load balancer has")
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

func members(p corev1.ServicePort, all []discoveryv1.EndpointSlice, n *v1alpha1.Network, v6 bool) []member {
	var out []member
	for i := range all {
		x := &all[i]
		if (x.AddressType == discoveryv1.AddressTypeIPv6) != v6 {
			continue
		}
		for _, q := range x.Ports {
			if q.Port == nil || q.Name != nil && *q.Name != p.Name || q.Name == nil && p.Name != "" || q.Protocol != nil && p.Protocol != "" && *q.Protocol != p.Protocol {
				continue
			}
			for _, e := range x.Endpoints {
				if e.Conditions.Ready != nil && !*e.Conditions.Ready {
					continue
				}
				for _, text := range e.Addresses {
					// Only Pods of the Network: what else a tenant writes into a slice leads nowhere.
					if id := subnetOf(text, n); id != "" {
						out = append(out, member{text, *q.Port, id})
					}
				}
			}
		}
	}
	return order(out)
}

func order(all []member) []member {
	slices.SortFunc(all, func(a, b member) int {
		return strings.Compare(fmt.Sprint(a.Address, " ", a.Port), fmt.Sprint(b.Address, " ", b.Port))
	})
	return slices.Compact(all)
}

func subnetOf(text string, n *v1alpha1.Network) string {
	a, err := netip.ParseAddr(text)
	if err != nil {
		return ""
	}
	for _, s := range n.Status.Subnets {
		if p, err := netip.ParsePrefix(s.CIDR); err == nil && p.Contains(a) {
			return s.ProviderSubnetID
		}
	}
	return ""
}

// sight is what there is.
type sight struct {
	Balancer  *balancer
	Listeners []listener
	Pools     []pool
	// Members by pool.
	Members map[string][]member
}

type balancer struct {
	ID           string `json:"id"`
	Project      string `json:"project_id"`
	Description  string `json:"description"`
	Provisioning string `json:"provisioning_status"`
	VIP          string `json:"vip_address"`
	VIPPort      string `json:"vip_port_id"`
	Created      string `json:"created_at"`
}

type listener struct {
	ID       string   `json:"id"`
	Protocol string   `json:"protocol"`
	Port     int32    `json:"protocol_port"`
	Sources  []string `json:"allowed_cidrs"`
	Pool     string   `json:"default_pool_id"`
	Status   string   `json:"provisioning_status"`
}

type pool struct {
	ID          string `json:"id"`
	Status      string `json:"provisioning_status"`
	Persistence *struct {
		Type string `json:"type"`
	} `json:"session_persistence"`
}

func (p pool) sticky() bool { return p.Persistence != nil && p.Persistence.Type == "SOURCE_IP" }

// pending says whether Octavia is still at work on a part of it.
func (s sight) pending() bool {
	is := func(status string) bool { return strings.HasPrefix(status, "PENDING_") }
	return slices.ContainsFunc(s.Listeners, func(l listener) bool { return is(l.Status) }) || slices.ContainsFunc(s.Pools, func(p pool) bool { return is(p.Status) })
}

// step is one change. A load balancer takes only one at a time, and is busy after it.
type step struct {
	Verb, Kind, ID string
	Body           map[string]any
}

const (
	create = "create"
	update = "update"
	drop   = "delete"
)

// plan is the next thing to do that w becomes true, if any. Members come first: they are
// what changes most and matters at once.
func plan(w wish, s sight) (step, bool) {
	if s.Balancer == nil {
		b := map[string]any{"name": w.Name, "description": w.Mark, "project_id": w.Project, "vip_subnet_id": w.VIPSubnet, "tags": w.Tags, "admin_state_up": true}
		if w.Provider != "" {
			b["provider"] = w.Provider
		}
		var all []any
		for _, l := range w.Listeners {
			all = append(all, l.body(w))
		}
		if !w.Stepwise {
			b["listeners"] = all
		}
		return step{create, balancers, "", b}, true
	}
	find := func(p string, port int32) *listener {
		for i := range s.Listeners {
			if s.Listeners[i].Protocol == p && s.Listeners[i].Port == port {
				return &s.Listeners[i]
			}
		}
		return nil
	}
	poolOf := func(id string) *pool {
		for i := range s.Pools {
			if s.Pools[i].ID == id {
				return &s.Pools[i]
			}
		}
		return nil
	}
	for _, l := range w.Listeners {
		have := find(l.Protocol, l.Port)
		if have == nil || poolOf(have.Pool) == nil {
			continue
		}
		if !slices.Equal(order(bare(s.Members[have.Pool])), order(bare(l.Members))) {
			return step{update, members_, have.Pool, map[string]any{"members": list(l.Members)}}, true
		}
	}
	for _, have := range s.Listeners {
		if !slices.ContainsFunc(w.Listeners, func(l listenerWish) bool { return l.Protocol == have.Protocol && l.Port == have.Port }) {
			return step{drop, listeners, have.ID, nil}, true
		}
	}
	used := map[string]bool{}
	for _, l := range w.Listeners {
		have := find(l.Protocol, l.Port)
		if have == nil {
			b := l.body(w)
			b["loadbalancer_id"] = s.Balancer.ID
			delete(b, "default_pool") // comes next: not every Octavia takes it here
			return step{create, listeners, "", b}, true
		}
		sources := slices.Sorted(slices.Values(have.Sources))
		if !slices.Equal(sources, l.Sources) {
			var want any // nil opens it again
			if len(l.Sources) > 0 {
				want = l.Sources
			}
			return step{update, listeners, have.ID, map[string]any{"allowed_cidrs": want}}, true
		}
		p := poolOf(have.Pool)
		if p == nil {
			b := l.pool(w)
			b["listener_id"] = have.ID
			delete(b, "members") // come next
			return step{create, pools, "", b}, true
		}
		used[p.ID] = true
		if p.sticky() != l.Sticky {
			return step{update, pools, p.ID, map[string]any{"session_persistence": l.persistence()}}, true
		}
	}
	// Pools of listeners that went.
	for _, p := range s.Pools {
		if !used[p.ID] {
			return step{drop, pools, p.ID, nil}, true
		}
	}
	return step{}, false
}

// bare is members without what Octavia may leave out.
func bare(all []member) []member {
	out := slices.Clone(all)
	for i := range out {
		out[i].Subnet = ""
		if a, err := netip.ParseAddr(out[i].Address); err == nil {
			out[i].Address = a.String()
		}
	}
	return out
}

func list(all []member) []member {
	if all == nil {
		return []member{}
	}
	return all
}

func (l listenerWish) persistence() any {
	if !l.Sticky {
		return nil
	}
	return map[string]any{"type": "SOURCE_IP"}
}

func (l listenerWish) pool(w wish) map[string]any {
	algorithm := "ROUND_ROBIN"
	if w.Provider == "ovn" {
		algorithm = "SOURCE_IP_PORT" // the only one it has
	}
	b := map[string]any{"name": l.Name, "protocol": l.Protocol, "lb_algorithm": algorithm, "admin_state_up": true, "members": list(l.Members)}
	if l.Sticky {
		b["session_persistence"] = l.persistence()
	}
	return b
}

func (l listenerWish) body(w wish) map[string]any {
	b := map[string]any{"name": l.Name, "protocol": l.Protocol, "protocol_port": l.Port, "admin_state_up": true, "default_pool": l.pool(w)}
	if len(l.Sources) > 0 {
		b["allowed_cidrs"] = l.Sources
	}
	return b
}
