package octavia

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/utils/ptr"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/provider"
)

var network = &v1alpha1.Network{Status: v1alpha1.NetworkStatus{Tenant: "blue", Subnets: []v1alpha1.SubnetStatus{
	{Name: "a", CIDR: "10.0.0.0/24", ProviderSubnetID: "s4"}, {Name: "b", CIDR: "fd00::/64", ProviderSubnetID: "s6"},
}}}

func service(ports ...corev1.ServicePort) *corev1.Service {
	s := &corev1.Service{Spec: corev1.ServiceSpec{Ports: ports}}
	s.Namespace, s.Name = "web", "s"
	return s
}

func TestDesire(t *testing.T) {
	udp := corev1.ProtocolUDP
	s := service(corev1.ServicePort{Name: "a", Port: 80, Protocol: corev1.ProtocolTCP}, corev1.ServicePort{Name: "d", Port: 53, Protocol: udp})
	s.Spec.LoadBalancerSourceRanges = []string{"198.51.100.0/24", " 192.0.2.7/24 ", "2001:db8::/32"}
	all := []discoveryv1.EndpointSlice{
		{AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Name: ptr.To("a"), Port: ptr.To(int32(8080))}, {Name: ptr.To("d"), Port: ptr.To(int32(5353)), Protocol: &udp}, {Name: ptr.To("x")}},
			Endpoints: []discoveryv1.Endpoint{{Addresses: []string{"10.0.0.6"}}, {Addresses: []string{"10.0.0.5"}}, {Addresses: []string{"10.0.1.5", "nonsense"}}, {Addresses: []string{"10.0.0.7"}, Conditions: discoveryv1.EndpointConditions{Ready: ptr.To(false)}}}},
		{AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Name: ptr.To("a"), Port: ptr.To(int32(8080))}}, Endpoints: []discoveryv1.Endpoint{{Addresses: []string{"10.0.0.5"}}}},
		{AddressType: discoveryv1.AddressTypeIPv6, Ports: []discoveryv1.EndpointPort{{Name: ptr.To("a"), Port: ptr.To(int32(8080))}}, Endpoints: []discoveryv1.Endpoint{{Addresses: []string{"fd00::5"}}}},
	}
	w, err := desire(s, all, network)
	if err != nil {
		t.Fatal(err)
	}
	sources := []string{"192.0.2.0/24", "198.51.100.0/24"}
	want := wish{Name: "h8s.blue.web.s", VIPSubnet: "s4", Listeners: []listenerWish{
		{Name: "tcp-80", Protocol: "TCP", Port: 80, Sources: sources, Members: []member{{"10.0.0.5", 8080, "s4"}, {"10.0.0.6", 8080, "s4"}}},
		{Name: "udp-53", Protocol: "UDP", Port: 53, Sources: sources, Members: []member{{"10.0.0.5", 5353, "s4"}, {"10.0.0.6", 5353, "s4"}}},
	}}
	if d := cmp.Diff(want, w); d != "" {
		t.Error(d)
	}
	s.Spec.IPFamilies = []corev1.IPFamily{corev1.IPv6Protocol}
	if w, err := desire(s, all, network); err != nil || w.VIPSubnet != "s6" || len(w.Listeners[0].Members) != 1 || len(w.Listeners[0].Sources) != 1 {
		t.Errorf("%+v %v", w, err)
	}
	for text, change := range map[string]func(*corev1.Service){
		"Invalid":  func(s *corev1.Service) { s.Spec.LoadBalancerSourceRanges = []string{"x"} },
		"NoFamily": func(s *corev1.Service) { s.Spec.IPFamilies = []corev1.IPFamily{corev1.IPv6Protocol} },
	} {
		s := service()
		change(s)
		n := network.DeepCopy()
		n.Status.Subnets = n.Status.Subnets[:1]
		if _, err := desire(s, nil, n); provider.Reason(err, "") != text {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func TestPlan(t *testing.T) {
	w := wish{Mark: "m", Name: "n", Project: "p", VIPSubnet: "s4", Listeners: []listenerWish{
		{Name: "tcp-80", Protocol: "TCP", Port: 80, Sources: []string{"192.0.2.0/24"}, Members: []member{{"10.0.0.5", 8080, "s4"}}},
		{Name: "udp-53", Protocol: "UDP", Port: 53, Sticky: true},
	}}
	whole := func(f func(*sight)) sight {
		sticky := pool{ID: "p2"}
		if err := json.Unmarshal([]byte(`{"session_persistence": {"type": "SOURCE_IP"}}`), &sticky); err != nil {
			t.Fatal(err)
		}
		s := sight{
			Balancer:  &balancer{ID: "b"},
			Listeners: []listener{{ID: "l1", Protocol: "TCP", Port: 80, Sources: []string{"192.0.2.0/24"}, Pool: "p1"}, {ID: "l2", Protocol: "UDP", Port: 53, Pool: "p2"}},
			Pools:     []pool{{ID: "p1"}, sticky}, Members: map[string][]member{"p1": {{"10.0.0.5", 8080, ""}}},
		}
		if f != nil {
			f(&s)
		}
		return s
	}
	stepwise, ovn := w, w
	stepwise.Stepwise, ovn.Provider = true, "ovn"
	for name, x := range map[string]struct {
		w    wish
		s    sight
		want string // parts of the step; "" is none
	}{
		"nothing":   {w, sight{}, `create lbaas/loadbalancers |"listeners":[|"members":[{"address":"10.0.0.5"|"allowed_cidrs":["192.0.2.0/24"]|"session_persistence":{"type":"SOURCE_IP"}`},
		"stepwise":  {stepwise, sight{}, `create lbaas/loadbalancers |"vip_subnet_id":"s4"`},
		"ovn":       {ovn, sight{}, `"provider":"ovn"|SOURCE_IP_PORT`},
		"whole":     {w, whole(nil), ""},
		"members":   {w, whole(func(s *sight) { s.Members["p1"] = nil }), `update members p1|10.0.0.5`},
		"listener":  {w, whole(func(s *sight) { s.Listeners = s.Listeners[:1] }), `create lbaas/listeners |"loadbalancer_id":"b"|UDP`},
		"surplus":   {w, whole(func(s *sight) { s.Listeners[1].Port = 54 }), `delete lbaas/listeners l2`},
		"open":      {w, whole(func(s *sight) { s.Listeners[0].Sources = nil }), `update lbaas/listeners l1|192.0.2.0/24`},
		"closed":    {w, whole(func(s *sight) { s.Listeners[1].Sources = []string{"192.0.2.0/24"} }), `update lbaas/listeners l2|"allowed_cidrs":null`},
		"no pool":   {w, whole(func(s *sight) { s.Listeners[0].Pool = "" }), `create lbaas/pools |"listener_id":"l1"`},
		"sticky":    {w, whole(func(s *sight) { s.Pools[1].Persistence = nil }), `update lbaas/pools p2|SOURCE_IP`},
		"left pool": {w, whole(func(s *sight) { s.Pools = append(s.Pools, pool{ID: "p3"}) }), `delete lbaas/pools p3`},
	} {
		got := ""
		if step, ok := plan(x.w, x.s); ok {
			b, err := json.Marshal(step.Body)
			if err != nil {
				t.Fatal(err)
			}
			got = step.Verb + " " + step.Kind + " " + step.ID + string(b)
		}
		if x.want == "" && got != "" {
			t.Errorf("%s: %s", name, got)
		}
		for _, part := range strings.Split(x.want, "|") {
			if !strings.Contains(got, part) {
				t.Errorf("%s: %q lacks %q", name, got, part)
			}
		}
		if name == "stepwise" && strings.Contains(got, "listeners\":") {
			t.Errorf("%s: %s", name, got)
		}
	}
}
