// Package settings owns what an operator can choose for a node and the fixed
// numbers of its network. The choices are kept in <state>/node.json so that a
// second `h8s up`, `h8s down` and `h8s reset` work from what was really started.
package settings

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/atomicfile"
)

// The node's own network. It exists only inside the node's network namespace.
const (
	PodCIDR     = "10.244.0.0/16"
	NodePodCIDR = "10.244.0.0/24"
	// NodeCIDR is the network of the nodes in namespaces of their own.
	NodeCIDR      = "100.64.0.0/24"
	ServiceCIDR   = "10.96.0.0/12"
	ServiceCIDR6  = "fd00:10:96::/108"
	ServiceCIDRs  = ServiceCIDR + "," + ServiceCIDR6
	ServiceIP     = "10.96.0.1"
	DNSServiceIP  = "10.96.0.10"
	ClusterDomain = "cluster.local"
	IsolatedIP    = "100.64.0.1"
	APIPort       = 6443
	// VXLANPort carries the tenants' Networks between nodes.
	VXLANPort = 8473
	// RegistryPort is where the images that came along are served on the node's loopback,
	// and HostRegistryPort the same on a machine's own, where 5000 is often taken.
	RegistryPort     = 5000
	HostRegistryPort = 15000
)

// Ports of our own components on the node's loopback.
const (
	WebhookPort          = 9643
	ControllerHealthPort = 9644
	KubestackHealthPort  = 9645
	KeystonePort         = 9646
	CSINodePort          = 9647
	CSIControllerPort    = 9648
	CSICinderPort        = 9649
)

// The link and the resolver slirp4netns gives a node with egress; their network is
// between it and the node only.
const (
	EgressLink     = "tap0"
	EgressResolver = "10.0.2.3"
)

// Role says what of a cluster a node runs.
type Role string

// Roles of a node. One without a role is a Server.
const (
	// Server runs the control plane and Pods.
	Server Role = "server"
	// Agent runs Pods and has joined a Server's cluster.
	Agent Role = "agent"
)

// Node is one node's settings.
type Node struct {
	Name string `json:"name"`
	Role Role   `json:"role,omitempty"`
	// Server is the URL of the API server an agent joined.
	Server string `json:"server,omitempty"`
	// Of names the node of this machine to whose network a further node, made by
	// `h8s dev nodes`, is attached.
	Of string `json:"of,omitempty"`
	// APIPort is the loopback port of the host on which the API server is published.
	APIPort int `json:"apiPort"`
	// Publish lists host loopback ports forwarded to ports of the node.
	Publish []Publish `json:"publish,omitempty"`
	// RuntimeOnly leaves Kubernetes out: containerd alone, for hyperctl.
	RuntimeOnly bool `json:"runtimeOnly,omitempty"`
	// Egress connects Pods to the outside through slirp4netns.
	Egress bool `json:"egress,omitempty"`
	// HostNetwork puts the node on the host's own network (h8s server).
	HostNetwork bool `json:"hostNetwork,omitempty"`
	// NodeIP is the node's address: IsolatedIP unless HostNetwork.
	NodeIP string `json:"nodeIP"`
	// OpenStack is the cloud the cluster belongs to, if any.
	OpenStack *OpenStack `json:"openStack,omitempty"`
	// Reserved are further ranges that no tenant's Network may overlap: networks that the
	// nodes reach things in, such as OpenStack's APIs.
	Reserved []string `json:"reserved,omitempty"`
	// CinderConfig is a file that says of Cinder's storage what Cinder does not, where NFS
	// exports are mounted for one; none if empty. It is not copied.
	CinderConfig string `json:"cinderConfig,omitempty"`
}

// OpenStack says where the cluster's credentials are and how the cloud's users are let in.
type OpenStack struct {
	// CloudConfig is the path of a clouds.yaml, Cloud which of its clouds. The file is not
	// copied: the controllers read it again when they need another token.
	CloudConfig string `json:"cloudConfig"`
	Cloud       string `json:"cloud"`
	// KeystoneCloud is the cloud of the file that tokens are checked with; Cloud if empty.
	KeystoneCloud string `json:"keystoneCloud,omitempty"`
	// KeystoneRoles and KeystoneTenants are h8s-controller's flags of those names.
	KeystoneRoles   string `json:"keystoneRoles,omitempty"`
	KeystoneTenants string `json:"keystoneTenants,omitempty"`
	// Networks says who carries Networks that name nobody: Builtin, also if empty, or Neutron.
	Networks string `json:"networks,omitempty"`
	// External, Profile and Octavia are h8s-controller's --openstack-external-network,
	// --openstack-profile and --octavia-provider.
	External string `json:"external,omitempty"`
	Profile  string `json:"profile,omitempty"`
	Octavia  string `json:"octavia,omitempty"`
}

// Providers of Networks, as h8s-controller calls them.
const (
	Builtin = "builtin"
	Neutron = "neutron"
)

// validate checks what can be told without reading the file.
func (o OpenStack) validate() error {
	switch {
	case o.CloudConfig == "" || o.Cloud == "":
		return fmt.Errorf("openstack-cloud-config %q, openstack-cloud %q: want both, or neither for a cluster without OpenStack: %w", o.CloudConfig, o.Cloud, errdefs.ErrInvalidArgument)
	case !filepath.IsAbs(o.CloudConfig):
		return fmt.Errorf("openstack-cloud-config %q: want an absolute path: %w", o.CloudConfig, errdefs.ErrInvalidArgument)
	case strings.HasPrefix(filepath.Clean(o.CloudConfig)+"/", "/run/"):
		return fmt.Errorf("openstack-cloud-config %q: a node has a /run of its own: put the file elsewhere, for example into /etc/openstack: %w", o.CloudConfig, errdefs.ErrInvalidArgument)
	case o.Networks != "" && o.Networks != Builtin && o.Networks != Neutron:
		return fmt.Errorf("network-provider %q: want %s or %s: %w", o.Networks, Builtin, Neutron, errdefs.ErrInvalidArgument)
	case o.Profile != "" && o.Profile != "full" && o.Profile != "least":
		return fmt.Errorf("openstack-profile %q: want full or least: %w", o.Profile, errdefs.ErrInvalidArgument)
	case strings.ContainsFunc(o.Octavia, func(r rune) bool { return r <= ' ' || r > '~' }):
		return fmt.Errorf("octavia-provider %q: want the name of a provider, as `openstack loadbalancer provider list` has it: %w", o.Octavia, errdefs.ErrInvalidArgument)
	}
	return nil
}

// Publish forwards 127.0.0.1:Host to Node on the node's address.
type Publish struct {
	Host int `json:"host"`
	Node int `json:"node"`
}

// IsAgent reports whether the control plane is elsewhere.
func (n Node) IsAgent() bool { return n.Role == Agent }

// APIServer is the URL of the API server as this node reaches it.
func (n Node) APIServer() string {
	if n.IsAgent() {
		return n.Server
	}
	return fmt.Sprintf("https://%s:%d", n.NodeIP, APIPort)
}

// ParseServer checks the URL of an API server: https, an address, and perhaps a port. It
// returns it with its port. A name is not taken: the node would depend on its resolver
// for every Pod, and the server's certificate holds its addresses.
func ParseServer(text string) (string, error) {
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "https" || (u.Path != "" && u.Path != "/") || u.RawQuery != "" || u.User != nil {
		return "", fmt.Errorf("server %q: want https://ADDRESS:PORT: %w", text, errdefs.ErrInvalidArgument)
	}
	if _, err := netip.ParseAddr(u.Hostname()); err != nil {
		return "", fmt.Errorf("server %q: want an IP address instead of %q, as the server's own --node-ip: %w", text, u.Hostname(), errdefs.ErrInvalidArgument)
	}
	p := APIPort
	if u.Port() != "" {
		if p, err = port(u.Port()); err != nil {
			return "", fmt.Errorf("server %q: %w", text, err)
		}
	}
	return "https://" + net.JoinHostPort(u.Hostname(), strconv.Itoa(p)), nil
}

// RegistryAddress is where the node's containerd asks for images first.
func (n Node) RegistryAddress() string {
	port := RegistryPort
	if n.HostNetwork {
		port = HostRegistryPort
	}
	return fmt.Sprintf("127.0.0.1:%d", port)
}

func (p Publish) String() string { return fmt.Sprintf("127.0.0.1:%d -> node:%d", p.Host, p.Node) }

// ParsePublish reads PORT or HOSTPORT:NODEPORT.
func ParsePublish(s string) (Publish, error) {
	host, node, two := strings.Cut(s, ":")
	if !two {
		node = host
	}
	h, err := port(host)
	n, nodeErr := port(node)
	if err == nil {
		err = nodeErr
	}
	if err != nil {
		return Publish{}, fmt.Errorf("publish %q: want PORT or HOSTPORT:NODEPORT: %w", s, err)
	}
	return Publish{Host: h, Node: n}, nil
}

func port(s string) (int, error) {
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 || n > 65535 {
		return 0, fmt.Errorf("port %q: want 1 to 65535: %w", s, errdefs.ErrInvalidArgument)
	}
	return n, nil
}

// Validate checks the settings against each other.
func (n Node) Validate() error {
	switch n.Role {
	case "", Server:
		if n.Of != "" || n.Server != "" {
			return fmt.Errorf("server %q: only an agent joins another node's cluster: %w", n.Server+n.Of, errdefs.ErrInvalidArgument)
		}
	case Agent:
		if _, err := ParseServer(n.Server); err != nil {
			return err
		}
		if n.RuntimeOnly {
			return fmt.Errorf("runtime-only: an agent is a node of a cluster: %w", errdefs.ErrInvalidArgument)
		}
	default:
		return fmt.Errorf("role %q: want server or agent: %w", n.Role, errdefs.ErrInvalidArgument)
	}
	if n.APIPort < 1 || n.APIPort > 65535 {
		return fmt.Errorf("api port %d: want 1 to 65535: %w", n.APIPort, errdefs.ErrInvalidArgument)
	}
	seen := map[int]bool{n.APIPort: true}
	for _, p := range n.Publish {
		if seen[p.Host] {
			return fmt.Errorf("publish: host port %d is used twice: %w", p.Host, errdefs.ErrInvalidArgument)
		}
		seen[p.Host] = true
	}
	if n.OpenStack != nil {
		if n.IsAgent() || n.RuntimeOnly {
			return fmt.Errorf("openstack-cloud: only a server talks to OpenStack: leave it out here: %w", errdefs.ErrInvalidArgument)
		}
		if err := n.OpenStack.validate(); err != nil {
			return err
		}
	}
	if c := n.CinderConfig; c != "" && (!filepath.IsAbs(c) || n.RuntimeOnly) {
		return fmt.Errorf("cinder-config %q: want an absolute path, on a node with Kubernetes: %w", c, errdefs.ErrInvalidArgument)
	} else if strings.HasPrefix(filepath.Clean(c)+"/", "/run/") {
		return fmt.Errorf("cinder-config %q: a node has a /run of its own: put the file elsewhere, for example into /etc/openstack: %w", c, errdefs.ErrInvalidArgument)
	}
	for _, text := range n.Reserved {
		if p, err := netip.ParsePrefix(text); err != nil || p != p.Masked() {
			return fmt.Errorf("reserve-cidr %q: want a network like 10.250.0.0/24: %w", text, errdefs.ErrInvalidArgument)
		}
	}
	if len(n.Reserved) > 0 && (n.IsAgent() || n.RuntimeOnly) {
		return fmt.Errorf("reserve-cidr: only a server knows tenants: leave it out here: %w", errdefs.ErrInvalidArgument)
	}
	if n.Egress && n.HostNetwork {
		return fmt.Errorf("egress: a node on the host network needs none: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

// Load reads settings; it fails with errdefs.ErrNotFound if the node was never made.
func Load(path string) (Node, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Node{}, fmt.Errorf("settings %s: %w", path, errdefs.ErrNotFound)
	}
	if err != nil {
		return Node{}, err
	}
	var n Node
	if err := json.Unmarshal(b, &n); err != nil {
		return Node{}, fmt.Errorf("settings %s: %w", path, err)
	}
	return n, nil
}

// Save writes settings atomically.
func (n Node) Save(path string) error {
	b, err := json.MarshalIndent(n, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return atomicfile.Write(path, append(b, '\n'), 0o600)
}
