package announcer

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// An address moves only when its own node goes, and every node is used.
func TestWinner(t *testing.T) {
	nodes := []string{"a", "b", "c", "d"}
	count := map[string]int{}
	for i := range 400 {
		address := netip.AddrFrom4([4]byte{192, 0, byte(i >> 8), byte(i)}).String()
		w := Winner(address, nodes)
		count[w]++
		if w != Winner(address, []string{"d", "c", "b", "a"}) {
			t.Fatalf("%s depends on the order", address)
		}
		if w != "a" && Winner(address, nodes[1:]) != w {
			t.Fatalf("%s moved though its node is there", address)
		}
	}
	for _, n := range nodes {
		if count[n] < 50 {
			t.Errorf("%s announces %d of 400", n, count[n])
		}
	}
	if Winner("192.0.2.1", nil) != "" {
		t.Error("somebody of nobody")
	}
}

func TestCandidates(t *testing.T) {
	a, b, no := "a", "b", false
	slices := []*discoveryv1.EndpointSlice{{Endpoints: []discoveryv1.Endpoint{{NodeName: &a}, {NodeName: &b, Conditions: discoveryv1.EndpointConditions{Ready: &no}}}}}
	svc := &corev1.Service{}
	if got := Candidates(svc, slices, []string{"a", "b", "c"}); len(got) != 3 {
		t.Errorf("Cluster: %v", got)
	}
	svc.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
	if got := Candidates(svc, slices, []string{"a", "b", "c"}); !cmp.Equal(got, []string{"a"}) {
		t.Errorf("Local: %v", got)
	}
}
