package kubestack

import (
	"crypto/sha256"
	"encoding/binary"
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// winner is the node that announces an address: rendezvous hashing, so that every node
// comes to the same answer alone, and an address moves only when its own node goes.
func winner(address netip.Addr, nodes []string) string {
	var best string
	var highest uint64
	for _, n := range nodes {
		sum := sha256.Sum256([]byte(address.String() + "\x00" + n))
		if h := binary.BigEndian.Uint64(sum[:]); best == "" || h > highest || h == highest && n < best {
			best, highest = n, h
		}
	}
	return best
}

// announcers are the nodes that may announce a Service's address: all that are ready, or
// for externalTrafficPolicy Local those with an endpoint that is.
func announcers(svc *corev1.Service, slices []*discoveryv1.EndpointSlice, ready []string) []string {
	if svc.Spec.ExternalTrafficPolicy != corev1.ServiceExternalTrafficPolicyLocal {
		return ready
	}
	has := map[string]bool{}
	for _, s := range slices {
		for _, e := range s.Endpoints {
			if e.NodeName != nil && (e.Conditions.Ready == nil || *e.Conditions.Ready) {
				has[*e.NodeName] = true
			}
		}
	}
	var out []string
	for _, n := range ready {
		if has[n] {
			out = append(out, n)
		}
	}
	return out
}
