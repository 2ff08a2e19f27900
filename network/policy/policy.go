// Package policy enforces NetworkPolicy in an edge namespace and answers whether two
// Pods may talk.
//
// It owns the nftables table h8s_policy of that namespace: two chains on the forward
// path, one for each side of a connection, and one on the input path for what Pods send
// to the edge itself, its resolver above all. Policies are compiled into rules that both
// Sync (for the kernel) and Evaluate (for people) use. It must not know how addresses
// are given, how Services are translated (packets come here with real endpoints) or
// where State comes from.
//
// A connection that is established goes on when a policy begins to deny it; the first
// packet of the next one is dropped. Upstream leaves this to implementations, and the
// alternative would cut what a policy that is edited in two steps still means to allow.
package policy

import (
	"net/netip"

	networkingv1 "k8s.io/api/networking/v1"
)

// Pod is a Pod of the Network, on any node, as policies see it.
type Pod struct {
	Namespace, Name string
	Labels          map[string]string
	Addresses       []netip.Addr
	// Ports by name, of its containers.
	Ports []NamedPort
	// Links are its host ends in this edge; empty on other nodes. Enforcement is at the
	// Pod's own node, for both directions.
	Links []string
}

// NamedPort is a named container port.
type NamedPort struct {
	Name string
	// Protocol is unix.IPPROTO_TCP, UDP or SCTP.
	Protocol uint8
	Port     uint16
}

// State is everything policies depend on. It is not changed by this package, and parts of
// it may be shared with the caller's caches.
type State struct {
	// Namespaces bound to the Network, with their labels. The caller adds kube-system with
	// a Pod that stands for the edge's resolver (labels k8s-app: kube-dns, the DNS
	// address, no links), so that policies that allow DNS mean it.
	Namespaces map[string]map[string]string
	Pods       []Pod
	Policies   []*networkingv1.NetworkPolicy
	// Hosts are addresses from which the node itself reaches Pods (webhooks behind an
	// exported Service, say). Ingress policies do not apply to them: upstream, too, lets a
	// Pod's own node reach it always. Only addresses nobody else can send from belong here.
	Hosts []netip.Addr
}

// Problem is something in a policy that cannot mean anything. The API server refuses
// most of it; what comes through is left out of the policy, which then allows less, never more.
type Problem struct {
	// Policy is namespace/name.
	Policy string
	// Field within the object, value and why.
	Message string
}
