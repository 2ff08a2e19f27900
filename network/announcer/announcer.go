// Package announcer owns the choice of the node by which an external address is reached. It
// must not know who asks, nor how a node announces: kubestack decides so for addresses of
// AddressPools, each node for itself, and the controller for Ports of Services.
package announcer

import (
	"crypto/sha256"
	"encoding/binary"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// Grace is how long a node that was ready and says that it is not, which is not silence,
// keeps the addresses it announces: what its kubelet misses, a container runtime that
// restarts, say, does not end what passes through its edges, and moving an address does.
const Grace = 2 * time.Minute

// Readiness is what a Node says of itself; Unknown is what is said of it when it is silent.
func Readiness(n *corev1.Node) corev1.NodeCondition {
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady {
			return c
		}
	}
	return corev1.NodeCondition{Type: corev1.NodeReady, Status: corev1.ConditionUnknown}
}

// Excluded tells whether the operator wants no external address on a node.
func Excluded(n *corev1.Node) bool {
	_, ok := n.Labels[corev1.LabelNodeExcludeBalancers]
	return ok
}

// Winner is the node that announces an address, given as netip.Addr's String: rendezvous
// hashing, so that everybody comes to the same answer alone, and an address moves only when
// its own node goes. It is empty if there are no nodes.
func Winner(address string, nodes []string) string {
	var best string
	var highest uint64
	for _, n := range nodes {
		sum := sha256.Sum256([]byte(address + "\x00" + n))
		if h := binary.BigEndian.Uint64(sum[:]); best == "" || h > highest || h == highest && n < best {
			best, highest = n, h
		}
	}
	return best
}

// Candidates are the nodes that may announce a Service's address: all that are ready, or
// for externalTrafficPolicy Local those with an endpoint that is.
func Candidates(svc *corev1.Service, slices []*discoveryv1.EndpointSlice, ready []string) []string {
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
