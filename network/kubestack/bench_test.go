package kubestack

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hypernetes/hypernetes/network/service"
)

// BenchmarkServices is what a change of one Service costs before anything reaches the kernel.
func BenchmarkServices(b *testing.B) {
	for _, n := range []int{100, 1000, 5000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			s := fleet(n)
			var known selections
			b.ReportAllocs()
			for b.Loop() {
				rand.Shuffle(n, func(i, j int) { s.Services[i], s.Services[j] = s.Services[j], s.Services[i] })
				rand.Shuffle(n, func(i, j int) { s.Slices[i], s.Slices[j] = s.Slices[j], s.Slices[i] })
				s.sort()
				changed := *s.Slices[0]
				s.Slices[0] = &changed
				if _, known = s.services(netip.Addr{}, known); len(known) != n {
					b.Fatal(len(known))
				}
			}
		})
	}
}

// TestServicesAnew takes from the last time just what has not changed.
func TestServicesAnew(t *testing.T) {
	s := fleet(4)
	all, known := s.services(netip.Addr{}, nil)
	if len(all) != 4 || len(known) != 4 {
		t.Fatal(len(all), len(known))
	}
	same := func(a, b service.Service) bool {
		return a.Key == b.Key && &a.Ports[0] == &b.Ports[0] // the same memory
	}
	for _, c := range []struct {
		name   string
		change func(s *snapshot)
		anew   []int
		want   int
	}{
		{"nothing", func(*snapshot) {}, nil, 4},
		{"a slice", func(s *snapshot) { e := *s.Slices[1]; s.Slices[1] = &e }, []int{1}, 4},
		{"a Service", func(s *snapshot) { v := *s.Services[2]; s.Services[2] = &v }, []int{2}, 4},
		{"one slice more", func(s *snapshot) { e := *s.Slices[0]; s.Slices = append(s.Slices, &e) }, []int{0}, 4},
		{"one slice less", func(s *snapshot) { s.Slices = s.Slices[1:] }, []int{0}, 4},
		{"one Service less", func(s *snapshot) { s.Services = s.Services[:3] }, nil, 3},
		{"the node's name", func(s *snapshot) { s.Self = "m" }, []int{0, 1, 2, 3}, 4},
		{"the node's zone", func(s *snapshot) { s.Nodes = map[string]node{"n": {Zone: "z"}} }, []int{0, 1, 2, 3}, 4},
		{"an address", func(s *snapshot) {
			v := *s.Services[3]
			v.Spec.Type = corev1.ServiceTypeLoadBalancer
			s.Services[3] = &v
			s.VIPs = map[string][]vip{"app/s00003": {{Address: netip.MustParseAddr("198.51.100.1")}}}
		}, []int{3}, 4},
	} {
		t.Run(c.name, func(t *testing.T) {
			now := *s
			now.Services, now.Slices = slices.Clone(s.Services), slices.Clone(s.Slices)
			c.change(&now)
			got, kept := now.services(netip.Addr{}, known)
			if len(got) != c.want || len(kept) != c.want {
				t.Fatalf("%d Services, %d selections; want %d", len(got), len(kept), c.want)
			}
			for i := range got {
				if anew := slices.Contains(c.anew, i); same(got[i], all[i]) == anew {
					t.Errorf("%s: made anew: %v, want %v", got[i].Key, !anew, anew)
				}
			}
			// An address that goes is gone, though the object is the same.
			now.VIPs = nil
			if got, _ := now.services(netip.Addr{}, kept); len(got) > 3 && len(got[3].External) > 0 {
				t.Errorf("kept %v", got[3].External)
			}
		})
	}
}

// fleet are n Services with five endpoints each.
func fleet(n int) *snapshot {
	s := &snapshot{Self: "n"}
	name, port, tcp, yes := "p", int32(80), corev1.ProtocolTCP, true
	for i := range n {
		meta := metav1.ObjectMeta{Namespace: "app", Name: fmt.Sprintf("s%05d", i), Labels: map[string]string{discoveryv1.LabelServiceName: fmt.Sprintf("s%05d", i)}}
		s.Services = append(s.Services, &corev1.Service{ObjectMeta: meta, Spec: corev1.ServiceSpec{
			ClusterIP: fmt.Sprintf("10.97.%d.%d", i/250, i%250), Ports: []corev1.ServicePort{{Name: name, Port: port, Protocol: tcp}},
		}})
		e := &discoveryv1.EndpointSlice{ObjectMeta: meta, AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Name: &name, Port: &port, Protocol: &tcp}}}
		for j := range 5 {
			e.Endpoints = append(e.Endpoints, discoveryv1.Endpoint{Addresses: []string{fmt.Sprintf("10.0.%d.%d", (5*i+j)/250%250, (5*i+j)%250)}, Conditions: discoveryv1.EndpointConditions{Ready: &yes}})
		}
		s.Slices = append(s.Slices, e)
	}
	return s
}
