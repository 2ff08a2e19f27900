package service

import (
	"encoding/json"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// endpoint is written "address[@node][ flags]": flags are notready, serving, leaving,
// z=zone, n=node hints.
func endpoint(s string) discoveryv1.Endpoint {
	f := strings.Fields(s)
	addr, node, _ := strings.Cut(f[0], "@")
	e := discoveryv1.Endpoint{Addresses: []string{addr}, NodeName: &node}
	yes, no := true, false
	for _, flag := range f[1:] {
		name, value, _ := strings.Cut(flag, "=")
		if e.Hints == nil && value != "" {
			e.Hints = &discoveryv1.EndpointHints{}
		}
		switch name {
		case "notready":
			e.Conditions.Ready, e.Conditions.Serving = &no, &no
		case "leaving":
			e.Conditions = discoveryv1.EndpointConditions{Ready: &no, Serving: &yes, Terminating: &yes}
		case "dying":
			e.Conditions = discoveryv1.EndpointConditions{Ready: &no, Serving: &no, Terminating: &yes}
		case "z":
			e.Hints.ForZones = append(e.Hints.ForZones, discoveryv1.ForZone{Name: value})
		case "n":
			e.Hints.ForNodes = append(e.Hints.ForNodes, discoveryv1.ForNode{Name: value})
		default:
			panic(flag)
		}
	}
	return e
}

func slice(port int32, list ...string) *discoveryv1.EndpointSlice {
	name, proto := "http", corev1.ProtocolTCP
	s := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Labels: map[string]string{discoveryv1.LabelServiceName: "web"}},
		AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Name: &name, Protocol: &proto, Port: &port}}}
	for _, e := range list {
		s.Endpoints = append(s.Endpoints, endpoint(e))
		if strings.Contains(strings.Fields(e)[0], ":") {
			s.AddressType = discoveryv1.AddressTypeIPv6
		}
	}
	return s
}

func show(list []Endpoint) string {
	var out []string
	for _, e := range list {
		s := e.Address.String()
		if e.Local {
			s += "*"
		}
		out = append(out, s)
	}
	return strings.Join(out, " ")
}

func TestFrom(t *testing.T) {
	local, extLocal := corev1.ServiceInternalTrafficPolicyLocal, corev1.ServiceExternalTrafficPolicyLocal
	inLocal := func(s *corev1.Service) { s.Spec.InternalTrafficPolicy = &local }
	exLocal := func(s *corev1.Service) { s.Spec.ExternalTrafficPolicy = extLocal }
	for _, tc := range []struct {
		name      string
		change    func(*corev1.Service)
		slices    []*discoveryv1.EndpointSlice
		in, ex    string
		elsewhere bool
	}{
		{name: "none"},
		{name: "ready only", slices: []*discoveryv1.EndpointSlice{slice(80, "10.0.0.1@me", "10.0.0.2@you notready", "10.0.0.3@you", "10.0.0.4 leaving")},
			in: "10.0.0.1:80* 10.0.0.3:80"},
		{name: "terminating but serving when nothing else", slices: []*discoveryv1.EndpointSlice{slice(80, "10.0.0.1@me dying", "10.0.0.2@you leaving", "10.0.0.3@you notready")},
			in: "10.0.0.2:80"},
		{name: "internal Local", change: inLocal, slices: []*discoveryv1.EndpointSlice{slice(80, "10.0.0.1@me", "10.0.0.3@you")},
			in: "10.0.0.1:80*", ex: "10.0.0.1:80* 10.0.0.3:80"},
		{name: "internal Local falls back to serving here", change: inLocal, slices: []*discoveryv1.EndpointSlice{slice(80, "10.0.0.1@me leaving", "10.0.0.3@you")},
			in: "10.0.0.1:80*", ex: "10.0.0.3:80"},
		{name: "internal Local, none here", change: inLocal, slices: []*discoveryv1.EndpointSlice{slice(80, "10.0.0.3@you")},
			in: "-", ex: "10.0.0.3:80", elsewhere: true},
		{name: "external Local", change: exLocal, slices: []*discoveryv1.EndpointSlice{slice(80, "10.0.0.1@me", "10.0.0.3@you")},
			in: "10.0.0.1:80* 10.0.0.3:80", ex: "10.0.0.1:80*"},
		{name: "external Local, none here", change: exLocal, slices: []*discoveryv1.EndpointSlice{slice(80, "10.0.0.3@you")},
			in: "10.0.0.3:80", ex: "-", elsewhere: true},
		{name: "zone hints", slices: []*discoveryv1.EndpointSlice{slice(80, "10.0.0.1@you z=east", "10.0.0.2@you z=west", "10.0.0.3@you z=west z=east")},
			in: "10.0.0.1:80 10.0.0.3:80"},
		{name: "zone hints not on all", slices: []*discoveryv1.EndpointSlice{slice(80, "10.0.0.1@you z=east", "10.0.0.2@you")},
			in: "10.0.0.1:80 10.0.0.2:80"},
		{name: "zone hints not on one that is not ready", slices: []*discoveryv1.EndpointSlice{slice(80, "10.0.0.1@you z=east", "10.0.0.2@you notready", "10.0.0.3 z=west")},
			in: "10.0.0.1:80"},
		{name: "zone hints for others", slices: []*discoveryv1.EndpointSlice{slice(80, "10.0.0.1@you z=west")}, in: "10.0.0.1:80"},
		{name: "node hints before zone hints", slices: []*discoveryv1.EndpointSlice{slice(80, "10.0.0.1@me n=me z=east", "10.0.0.2@you n=you z=east")},
			in: "10.0.0.1:80*"},
		{name: "node hints for others, zone hints for us", slices: []*discoveryv1.EndpointSlice{slice(80, "10.0.0.1@a n=a z=east", "10.0.0.2@you n=you z=west")},
			in: "10.0.0.1:80"},
		{name: "hints do not count for policy Local", change: inLocal, slices: []*discoveryv1.EndpointSlice{slice(80, "10.0.0.1@me z=west", "10.0.0.2@you z=east")},
			in: "10.0.0.1:80*", ex: "10.0.0.2:80"},
		{name: "hints do not count for terminating ones", slices: []*discoveryv1.EndpointSlice{slice(80, "10.0.0.1@you leaving z=west", "10.0.0.2@you leaving z=east")},
			in: "10.0.0.1:80 10.0.0.2:80"},
		{name: "a number for each slice", slices: []*discoveryv1.EndpointSlice{slice(80, "10.0.0.1@you"), slice(8080, "10.0.0.2@you")},
			in: "10.0.0.1:80 10.0.0.2:8080"},
		{name: "in two slices", slices: []*discoveryv1.EndpointSlice{slice(80, "10.0.0.1@you notready"), slice(80, "10.0.0.1@you")}, in: "10.0.0.1:80"},
		{name: "both families", slices: []*discoveryv1.EndpointSlice{slice(80, "10.0.0.1@you"), slice(80, "fd00::1@me")},
			in: "10.0.0.1:80 [fd00::1]:80*"},
		{name: "not for Pods' own addresses", slices: []*discoveryv1.EndpointSlice{slice(80, "127.0.0.1@you", "169.254.169.254@you", "224.0.0.1@you", "0.0.0.0", "x", "10.0.0.9")},
			in: "10.0.0.9:80"},
		{name: "another Service's, another namespace's", slices: func() []*discoveryv1.EndpointSlice {
			a, b := slice(80, "10.0.0.1"), slice(80, "10.0.0.2")
			a.Labels[discoveryv1.LabelServiceName], b.Namespace = "other", "other"
			return []*discoveryv1.EndpointSlice{a, b, nil}
		}()},
	} {
		t.Run(tc.name, func(t *testing.T) {
			svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web"}, Spec: corev1.ServiceSpec{
				ClusterIP: "10.96.0.9", ClusterIPs: []string{"10.96.0.9"}, Ports: []corev1.ServicePort{{Name: "http", Port: 80, Protocol: corev1.ProtocolTCP}},
				ExternalIPs: []string{"8.8.8.8"}}}
			svc.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "8.8.4.4"}}
			if tc.change != nil {
				tc.change(svc)
			}
			if tc.ex == "" {
				tc.ex = tc.in
			}
			got, ok := Select{Node: "me", Zone: "east"}.From(svc, tc.slices)
			if !ok || len(got.Ports) != 1 || len(got.External) != 0 {
				t.Fatalf("%+v, %t", got, ok)
			}
			p := got.Ports[0]
			if in, ex := show(p.Internal), show(p.External); in != strings.Trim(tc.in, "-") || ex != strings.Trim(tc.ex, "-") || p.Elsewhere != tc.elsewhere {
				t.Errorf("internal %q, external %q, elsewhere %t", in, ex, p.Elsewhere)
			}
		})
	}
}

func TestFromService(t *testing.T) {
	svc := func(change func(*corev1.ServiceSpec)) *corev1.Service {
		s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web"}, Spec: corev1.ServiceSpec{ClusterIPs: []string{"10.96.0.9", "fd00::9"}}}
		change(&s.Spec)
		return s
	}
	for name, s := range map[string]*corev1.Service{
		"headless":     svc(func(s *corev1.ServiceSpec) { s.ClusterIP, s.ClusterIPs = "None", []string{"None"} }),
		"ExternalName": svc(func(s *corev1.ServiceSpec) { s.Type = corev1.ServiceTypeExternalName }),
		"no address":   svc(func(s *corev1.ServiceSpec) { s.ClusterIPs = nil }),
		"nil":          nil,
	} {
		if out, ok := (Select{}).From(s, nil); ok {
			t.Errorf("%s: %+v", name, out)
		}
	}
	short := int32(7)
	out, ok := Select{External: []netip.Addr{vip4, {}}}.From(svc(func(s *corev1.ServiceSpec) {
		s.SessionAffinity = corev1.ServiceAffinityClientIP
		s.SessionAffinityConfig = &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: &short}}
		s.LoadBalancerSourceRanges = []string{" 10.1.2.3/8 ", "nonsense"}
		s.Ports = []corev1.ServicePort{{Port: 53, Protocol: corev1.ProtocolUDP}, {Port: 5, Protocol: corev1.ProtocolSCTP}, {Port: 1, Protocol: "X"}, {Port: 70000}}
	}), nil)
	if !ok || len(out.ClusterIPs) != 2 || len(out.Ports) != 2 || out.Affinity != 7*time.Second || !slices.Equal(out.External, []netip.Addr{vip4}) ||
		!slices.Equal(out.SourceRanges, []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}) {
		t.Errorf("%+v", out)
	}
	out, _ = Select{}.From(svc(func(s *corev1.ServiceSpec) {
		s.SessionAffinity, s.LoadBalancerSourceRanges = "ClientIP", []string{"nonsense"}
	}), nil)
	if out.Affinity != 3*time.Hour || len(out.SourceRanges) != 1 || out.SourceRanges[0].Bits() != 32 {
		t.Errorf("%+v", out)
	}
}

// FuzzFrom feeds what a tenant could have written past validation, and plans with it.
func FuzzFrom(f *testing.F) {
	s := slice(80, "10.0.0.1@me z=east", "10.0.0.2 leaving", "10.0.0.3 notready n=me")
	svc := corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web"}, Spec: corev1.ServiceSpec{
		ClusterIP: "10.96.0.9", Ports: []corev1.ServicePort{{Name: "http", Port: 80}}, LoadBalancerSourceRanges: []string{"1.0.0.0/8"}, SessionAffinity: "ClientIP"}}
	a, _ := json.Marshal(svc)
	b, _ := json.Marshal([]*discoveryv1.EndpointSlice{s, slice(8080, "fd00::1")})
	f.Add(string(a), string(b), "198.51.100.1")
	f.Fuzz(func(t *testing.T, a, b, external string) {
		var svc corev1.Service
		var list []*discoveryv1.EndpointSlice
		_ = json.Unmarshal([]byte(a), &svc)
		_ = json.Unmarshal([]byte(b), &list)
		vip, _ := netip.ParseAddr(external)
		out, ok := Select{Node: "me", Zone: "east", External: []netip.Addr{vip}}.From(&svc, list)
		if !ok {
			return
		}
		sane(t, out)
	})
}

// sane checks what must hold for whatever was asked for.
func sane(t *testing.T, out Service) {
	t.Helper()
	for _, p := range out.Ports {
		for _, e := range slices.Concat(p.Internal, p.External) {
			if !usable(e.Address.Addr()) || e.Address.Port() == 0 {
				t.Fatalf("endpoint %s", e.Address)
			}
		}
	}
	want, err := desired([]Service{out})
	if err != nil {
		return
	}
	c := plan(newState(), want)
	for _, u := range append(c.units, c.prelude) {
		for _, o := range u {
			if n := addrLen(o.v6); len(o.key) < n || o.set == setEndpoints && len(o.val) != n+4 {
				t.Fatal(o)
			}
		}
	}
	for k := range want.classes {
		for _, r := range k.chain().rules {
			if _, err := tag(r); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestFromRandom asks for what validation would never let through.
func TestFromRandom(t *testing.T) {
	rnd := rand.New(rand.NewPCG(3, 4))
	some := func(list ...string) string { return list[rnd.IntN(len(list))] }
	addr := func() string {
		return some("", "None", "10.0.0.1", "10.0.0.2", "fd00::1", "::ffff:10.0.0.1", "::1", "127.0.0.1", "169.254.169.254", "fe80::1%eth0", "0.0.0.0", "224.0.0.1", "300.1.1.1", "10.0.0.1/8", "01.2.3.4")
	}
	maybe := func() *bool {
		b := rnd.IntN(2) == 0
		if rnd.IntN(3) == 0 {
			return nil
		}
		return &b
	}
	number := func() int32 { return []int32{0, -1, 1, 80, 8080, 65535, 65536, 1 << 30}[rnd.IntN(8)] }
	proto := func() corev1.Protocol { return corev1.Protocol(some("", "TCP", "UDP", "SCTP", "tcp", "X")) }
	for range 5000 {
		svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: some("", "ns"), Name: some("", "web")}}
		svc.Spec.ClusterIP, svc.Spec.Type = addr(), corev1.ServiceType(some("", "ClusterIP", "LoadBalancer", "ExternalName", "X"))
		for range rnd.IntN(3) {
			svc.Spec.ClusterIPs = append(svc.Spec.ClusterIPs, addr())
		}
		for range rnd.IntN(4) {
			svc.Spec.Ports = append(svc.Spec.Ports, corev1.ServicePort{Name: some("", "a"), Port: number(), Protocol: proto()})
		}
		for range rnd.IntN(3) {
			svc.Spec.LoadBalancerSourceRanges = append(svc.Spec.LoadBalancerSourceRanges, some("", " 10.0.0.0/8", "10.1.2.3/16", "::/0", "0.0.0.0/0", "x", "1.2.3.4", "fd00::/200"))
		}
		svc.Spec.SessionAffinity = corev1.ServiceAffinity(some("", "None", "ClientIP"))
		if rnd.IntN(2) == 0 {
			n := number()
			svc.Spec.SessionAffinityConfig = &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: &n}}
		}
		svc.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicy(some("", "Local", "Cluster", "X"))
		policy := corev1.ServiceInternalTrafficPolicy(some("", "Local", "Cluster"))
		svc.Spec.InternalTrafficPolicy = &policy
		var list []*discoveryv1.EndpointSlice
		for range rnd.IntN(4) {
			sl := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Namespace: svc.Namespace}, AddressType: discoveryv1.AddressType(some("IPv4", "IPv6", "FQDN", ""))}
			for range rnd.IntN(3) {
				name, pr, n := some("", "a"), proto(), number()
				sp := discoveryv1.EndpointPort{Name: &name, Protocol: &pr, Port: &n}
				if rnd.IntN(4) == 0 {
					sp = discoveryv1.EndpointPort{}
				}
				sl.Ports = append(sl.Ports, sp)
			}
			for range rnd.IntN(5) {
				node := some("", "me", "you")
				e := discoveryv1.Endpoint{NodeName: &node, Conditions: discoveryv1.EndpointConditions{Ready: maybe(), Serving: maybe(), Terminating: maybe()}}
				for range rnd.IntN(3) {
					e.Addresses = append(e.Addresses, addr())
				}
				if rnd.IntN(2) == 0 {
					e.Hints = &discoveryv1.EndpointHints{ForZones: []discoveryv1.ForZone{{Name: some("", "east")}}}
				}
				sl.Endpoints = append(sl.Endpoints, e)
			}
			list = append(list, sl)
		}
		a, _ := netip.ParseAddr(addr())
		out, ok := Select{Node: some("", "me"), Zone: some("", "east"), External: []netip.Addr{a}}.From(svc, list)
		if ok {
			sane(t, out)
		}
	}
}
