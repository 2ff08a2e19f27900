// Package policy enforces NetworkPolicy in an edge namespace and answers whether two
// Pods may talk.
package policy

import (
	"context"
	"net/netip"

	"github.com/containerd/errdefs"
	networkingv1 "k8s.io/api/networking/v1"

	"github.com/hypernetes/hypernetes/network/netns"
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

// State is everything policies depend on.
type State struct {
	// Namespaces bound to the Network, with their labels. The caller adds kube-system with
	// a Pod that stands for the edge's resolver (labels k8s-app: kube-dns, the DNS
	// address, no links), so that policies that allow DNS mean it.
	Namespaces map[string]map[string]string
	Pods       []Pod
	Policies   []*networkingv1.NetworkPolicy
}

// Table is the table of one edge. Sync calls must not overlap.
type Table struct{}

// Open prepares a table, adopting what a former process left.
func Open(ns *netns.NS) (*Table, error) { return nil, errdefs.ErrNotImplemented }

// Sync enforces the state, in one transaction. After it returns, a Pod in it may be let up.
func (t *Table) Sync(ctx context.Context, s State) error { return errdefs.ErrNotImplemented }

// Verdict is an answer to Evaluate.
type Verdict struct {
	Allowed bool
	// Egress and Ingress name the deciding rule of each side, in words: "no policy selects
	// it", "policy ns/name, ingress rule 2", "isolated by ns/name, ns/other: no rule allows it".
	Egress, Ingress string
}

// Evaluate tells whether from may open a connection to a port of to. It shares its
// compiler with Sync.
func Evaluate(s State, from, to Pod, protocol uint8, port uint16) (Verdict, error) {
	return Verdict{}, errdefs.ErrNotImplemented
}
