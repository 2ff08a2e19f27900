// Package edge makes edge namespaces: one network namespace per (Network, node), owned
// by the host, that holds everything between the Pods' links and the fabric. See
// DESIGN §3 and reference/tenancy-network.md §2.6.
package edge

import (
	"context"
	"net"
	"net/netip"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/network/netns"
)

// Config is what all edges of a node have in common.
type Config struct {
	// Dir holds the namespaces, one file each.
	Dir string
	// Node is this node's address on the fabric, the VTEP's.
	Node netip.Addr
	// VXLANPort is the cluster's own UDP port for its overlay.
	VXLANPort uint16
	// NS is the node's own namespace, the calling process's in production.
	NS *netns.NS
}

// Host is what the node's own namespace is told.
type Host struct {
	// Nodes are all nodes' addresses: Pods reach none of them, and the overlay is
	// accepted from them only.
	Nodes []netip.Addr
	// APIServers are where the API server can be reached.
	APIServers []netip.AddrPort
	// Reserved are further ranges Pods must not reach through the node.
	Reserved []netip.Prefix
}

// Spec is one edge as it should be.
type Spec struct {
	// ID is 8 hexadecimal characters; links are named h-<ID>, vx-<ID>.
	ID string
	// Name for logs, tenant/network.
	Name string
	VNI  uint32
	MTU  int
	// Subnets and Gateways, index by index.
	Subnets  []netip.Prefix
	Gateways []netip.Addr
	// Local are addresses of services of the edge itself, such as its resolver's.
	Local []netip.Addr
	// Egress lets Pods out, Routed gives the node routes to Pods here.
	Egress, Routed bool
	// Ports are all of the Network's, on every node.
	Ports []Port
	// External are addresses from outside that lead here.
	External []External
	// Exported are ClusterIPs the node itself may dial through this edge.
	Exported []netip.Addr
}

// Port is a NIC of the Network.
type Port struct {
	Addresses []netip.Addr
	MAC       net.HardwareAddr
	// Node where it is plugged. On this node Link is the host end's name in the edge.
	Node netip.Addr
	Link string
}

// External is an address that comes in from the fabric.
type External struct {
	Address netip.Addr
	// Announce answers ARP and neighbour solicitations for it on this node.
	Announce bool
	// Target, if valid, is the one local Pod address it stands for, both ways (floating
	// IP); otherwise package service translates it.
	Target netip.Addr
}

// Attachment is a Pod's NIC to be plugged in.
type Attachment struct {
	// Link is the host end's name in the edge, from LinkName.
	Link string
	// NetNS and Interface are the Pod's end.
	NetNS, Interface string
	MAC              net.HardwareAddr
	MTU              int
	Addresses        []netip.Addr
	// Gateways, one per family of Addresses.
	Gateways []netip.Addr
	// Default gives the Pod its default routes here; otherwise Subnets are routed.
	Default bool
	Subnets []netip.Prefix
}

// Manager makes and keeps the edges of a node. Its methods may be called concurrently;
// calls for one edge are serialised.
type Manager struct{ cfg Config }

// Edge is one edge that exists.
type Edge struct{}

// New finds the edges there are.
func New(cfg Config) (*Manager, error) { return nil, errdefs.ErrNotImplemented }

// SetHost applies what the node's own namespace needs; level-triggered.
func (m *Manager) SetHost(ctx context.Context, h Host) error { return errdefs.ErrNotImplemented }

// Ensure makes the edge or changes what differs, drift by others included, and leaves
// the rest alone: established connections live on.
func (m *Manager) Ensure(ctx context.Context, s Spec) (*Edge, error) {
	return nil, errdefs.ErrNotImplemented
}

// Get returns an edge; errdefs.ErrNotFound if there is none.
func (m *Manager) Get(id string) (*Edge, error) { return nil, errdefs.ErrNotImplemented }

// List returns the IDs of the edges there are, also of those a former process made.
func (m *Manager) List() ([]string, error) { return nil, errdefs.ErrNotImplemented }

// Remove removes an edge and everything of it in the node's namespace. It succeeds if
// there is none.
func (m *Manager) Remove(ctx context.Context, id string) error { return errdefs.ErrNotImplemented }

// LinkName is the host end's name for a CNI attachment: stable, at most 15 characters.
func LinkName(containerID, iface string) string { return "" }

// Overlay are a node's addresses inside every overlay: sources of what the edges send
// on behalf of others. v4 is the node's own.
func Overlay(node netip.Addr) (v4, v6 netip.Addr) { return }

// NS is the edge's namespace.
func (e *Edge) NS() *netns.NS { return nil }

// Transit are the two ends of the link to the node: the edge's and the node's address.
// The API server is reached at the node's, port 6443.
func (e *Edge) Transit() (here, node netip.Addr) { return }

// Attach makes the Pod's link, addresses and routes, and the edge's side with its
// anti-spoofing, but leaves the link down in the edge until Up. Idempotent.
func (e *Edge) Attach(ctx context.Context, a Attachment) error { return errdefs.ErrNotImplemented }

// Up lets traffic through.
func (e *Edge) Up(ctx context.Context, link string) error { return errdefs.ErrNotImplemented }

// Check tells what of an attachment is not as it should be (CNI CHECK).
func (e *Edge) Check(ctx context.Context, a Attachment) error { return errdefs.ErrNotImplemented }

// Detach removes a link and what belongs to it. It succeeds if there is none.
func (e *Edge) Detach(ctx context.Context, link string) error { return errdefs.ErrNotImplemented }

// Links are the host ends there are.
func (e *Edge) Links() ([]string, error) { return nil, errdefs.ErrNotImplemented }
