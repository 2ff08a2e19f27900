// Package edge makes edge namespaces: one network namespace per (Network, node), owned
// by the host, that holds everything between the Pods' links and the fabric. See
// DESIGN §3 and reference/tenancy-network.md §2.6.
package edge

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

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
	// Announced are external addresses of the node's own Services, those of no tenant: the
	// node answers for them, and what it does with what comes in is kube-proxy's.
	Announced []netip.Addr
}

// Spec is one edge as it should be.
type Spec struct {
	// ID is 8 hexadecimal characters; links are named h-<ID>, vx-<ID>.
	ID string
	// Name for logs, tenant/network.
	Name string
	// VNI of the overlay; none with Uplinks.
	VNI uint32
	MTU int
	// Uplinks says that somebody else carries the Network, on whose layer 2 each local Pod
	// has a link of its own: no overlay, and Gateways are others' (see uplink.go).
	Uplinks bool
	// Subnets and Gateways, index by index.
	Subnets  []netip.Prefix
	Gateways []netip.Addr
	// Local are addresses of services of the edge itself, such as its resolver's.
	Local []netip.Addr
	// Egress lets Pods out, Routed gives the node routes to Pods here.
	Egress, Routed bool
	// Ports are all of the Network's, on every node.
	Ports []Port
	// Fronts are what clients of Services come in by on this node, with Uplinks.
	Fronts []Front
	// External are addresses from outside that lead here.
	External []External
	// Exported are ClusterIPs the node itself may dial through this edge, by TCP.
	Exported []netip.Addr
	// Flows is how many connections one Pod's link may have at once; 0 is 16384.
	Flows int
}

// Port is a NIC of the Network.
type Port struct {
	Addresses []netip.Addr
	MAC       net.HardwareAddr
	// Node where it is plugged. On this node Link is the host end's name in the edge, and
	// Uplink that of its uplink in the node's namespace.
	Node   netip.Addr
	Link   string
	Uplink string
}

// Front is a port on the carrier's layer 2 that no Pod has: what comes for its addresses is
// package service's to translate, and goes on to Pods here, or back out by it to Pods
// elsewhere, whom the front's address asks then.
type Front struct {
	// Link is a name from LinkName that no attachment has.
	Link string
	// Uplink is the link's name in the node's namespace.
	Uplink string
	MAC    net.HardwareAddr
	// Addresses, one of each family at most.
	Addresses []netip.Addr
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
	// Uplink is the name that the Pod's uplink has in the node's namespace, where somebody
	// else wires it. It has the same MAC. Empty if the edge's Spec is not for Uplinks.
	Uplink string
}

// Manager makes and keeps the edges of a node. Its methods may be called concurrently;
// calls for one edge are serialised.
type Manager struct {
	cfg  Config
	ns   *netns.NS
	ipv6 bool

	mu    sync.Mutex // guards edges
	edges map[string]*Edge

	// node guards everything in the node's namespace, which all edges share.
	node  sync.Mutex
	nl    *netlink.Handle
	host  Host
	known bool           // SetHost was called
	taken map[int]string // uplinks given to edges that may not have them yet
}

// Edge is one edge that exists.
type Edge struct {
	m  *Manager
	id string

	mu      sync.Mutex // serialises what is done to it
	ns      *netns.NS
	nl      *netlink.Handle
	transit transit
	spec    *Spec // what Ensure last got
	gone    bool
}

// New finds the edges there are.
func New(cfg Config) (*Manager, error) {
	if !filepath.IsAbs(cfg.Dir) {
		return nil, invalid("directory of edges %q is not an absolute path", cfg.Dir)
	}
	if !cfg.Node.IsValid() || cfg.Node.IsUnspecified() || cfg.Node.Is4In6() {
		return nil, invalid("node address %q is no address", cfg.Node)
	}
	if cfg.VXLANPort == 0 {
		return nil, invalid("VXLAN port 0")
	}
	if err := os.MkdirAll(cfg.Dir, 0o755); err != nil {
		return nil, err
	}
	m := &Manager{cfg: cfg, ns: cfg.NS, edges: map[string]*Edge{}, taken: map[int]string{}}
	if m.ns == nil {
		ns, err := netns.Current()
		if err != nil {
			return nil, err
		}
		m.ns = ns
	}
	if _, err := os.Stat("/proc/sys/net/ipv6"); err == nil {
		m.ipv6 = true
	}
	nl, err := m.ns.Netlink()
	if err != nil {
		return nil, fmt.Errorf("node's namespace: %w", err)
	}
	m.nl = nl
	ids, err := m.List()
	if err != nil {
		nl.Close()
		return nil, err
	}
	for _, id := range ids {
		if _, err := m.Get(id); err != nil {
			nl.Close()
			return nil, err
		}
	}
	return m, nil
}

// Get returns an edge; errdefs.ErrNotFound if there is none.
func (m *Manager) Get(id string) (*Edge, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if e, ok := m.edges[id]; ok {
		return e, nil
	}
	if err := validID(id); err != nil {
		return nil, err
	}
	ns, err := netns.Open(m.path(id))
	if err != nil {
		return nil, fmt.Errorf("edge %s: %w", id, err)
	}
	return m.adopt(id, ns)
}

// adopt takes an existing namespace over. m.mu is held.
func (m *Manager) adopt(id string, ns *netns.NS) (*Edge, error) {
	nl, err := ns.Netlink()
	if err != nil {
		_ = ns.Close()
		return nil, fmt.Errorf("edge %s: %w", id, err)
	}
	e := &Edge{m: m, id: id, ns: ns, nl: nl}
	if t, ok := m.transitOf(e); ok {
		e.transit = t
	}
	m.edges[id] = e
	return e, nil
}

func (m *Manager) path(id string) string { return filepath.Join(m.cfg.Dir, id) }

// List returns the IDs of the edges there are, also of those a former process made.
func (m *Manager) List() ([]string, error) {
	entries, err := os.ReadDir(m.cfg.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, e := range entries {
		if validID(e.Name()) != nil {
			continue
		}
		var st unix.Statfs_t
		if unix.Statfs(m.path(e.Name()), &st) == nil && st.Type == unix.NSFS_MAGIC {
			ids = append(ids, e.Name())
		}
	}
	return ids, nil
}

// create returns the edge, made if need be, without anything in it.
func (m *Manager) create(id string) (*Edge, error) {
	if e, err := m.Get(id); err == nil || !errdefs.IsNotFound(err) {
		return e, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if e, ok := m.edges[id]; ok {
		return e, nil
	}
	ns, err := netns.Create(m.path(id))
	if errdefs.IsAlreadyExists(err) {
		ns, err = netns.Open(m.path(id))
	}
	if err != nil {
		return nil, err
	}
	return m.adopt(id, ns)
}

// Ensure makes the edge or changes what differs, drift by others included, and leaves
// the rest alone: established connections live on. It fails with errdefs.ErrUnavailable
// before the first SetHost: what guards the node comes before links that lead to it.
func (m *Manager) Ensure(ctx context.Context, s Spec) (*Edge, error) {
	if err := s.validate(); err != nil {
		return nil, err
	}
	m.node.Lock()
	known := m.known
	m.node.Unlock()
	if !known {
		return nil, fmt.Errorf("edge %s: the node's own rules are not set yet: %w", s.Name, errdefs.ErrUnavailable)
	}
	for {
		e, err := m.create(s.ID)
		if err != nil {
			return nil, fmt.Errorf("edge %s: %w", s.Name, err)
		}
		e.mu.Lock()
		if e.gone { // removed since
			e.mu.Unlock()
			continue
		}
		err = e.ensure(ctx, s)
		e.mu.Unlock()
		if err != nil {
			return nil, fmt.Errorf("edge %s: %w", s.Name, err)
		}
		return e, nil
	}
}

// Remove removes an edge and everything of it in the node's namespace. It succeeds if
// there is none.
func (m *Manager) Remove(ctx context.Context, id string) error {
	if err := validID(id); err != nil {
		return err
	}
	e, err := m.Get(id)
	switch {
	case errdefs.IsNotFound(err):
	case err != nil:
		return err
	default:
		e.mu.Lock()
		defer e.mu.Unlock()
	}
	if err := m.forget(id); err != nil {
		return fmt.Errorf("edge %s: %w", id, err)
	}
	// A namespace that something still holds would keep its links.
	if e != nil && !e.gone {
		if err := e.clear(); err != nil {
			return fmt.Errorf("edge %s: %w", id, err)
		}
	}
	if err := netns.Remove(m.path(id)); err != nil {
		return fmt.Errorf("edge %s: %w", id, err)
	}
	if e != nil && !e.gone {
		e.gone = true
		e.nl.Close()
		_ = e.ns.Close()
		m.mu.Lock()
		delete(m.edges, id)
		m.mu.Unlock()
	}
	return nil
}

// clear removes the links.
func (e *Edge) clear() error {
	links, err := e.nl.LinkList()
	if err != nil {
		return err
	}
	for _, l := range links {
		if l.Attrs().Name == "lo" {
			continue
		}
		if err := e.nl.LinkDel(l); err != nil && !missing(err) && !errors.Is(err, unix.EOPNOTSUPP) {
			return fmt.Errorf("remove link %s: %w", l.Attrs().Name, err)
		}
	}
	return nil
}

// missing tells that what was to be removed is not there.
func missing(err error) bool {
	var none netlink.LinkNotFoundError
	return errors.As(err, &none) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) ||
		errors.Is(err, unix.EADDRNOTAVAIL)
}

// NS is the edge's namespace.
func (e *Edge) NS() *netns.NS { return e.ns }

// Transit are the two ends of the link to the node: the edge's and the node's address.
// The API server is reached at the node's, port 6443.
func (e *Edge) Transit() (here, node netip.Addr) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.transit.here4, e.transit.node4
}

// Links are the host ends there are.
func (e *Edge) Links() ([]string, error) {
	links, err := e.nl.LinkList()
	if err != nil {
		return nil, fmt.Errorf("edge %s: %w", e.id, err)
	}
	var out []string
	for _, l := range links {
		if strings.HasPrefix(l.Attrs().Name, podLinks) {
			out = append(out, l.Attrs().Name)
		}
	}
	return out, nil
}
