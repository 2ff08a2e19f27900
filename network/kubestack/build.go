package kubestack

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/types"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/announcer"
	"github.com/hypernetes/hypernetes/network/dns"
	"github.com/hypernetes/hypernetes/network/edge"
	"github.com/hypernetes/hypernetes/network/ipam"
	"github.com/hypernetes/hypernetes/network/policy"
	"github.com/hypernetes/hypernetes/network/provider"
	"github.com/hypernetes/hypernetes/network/service"
)

// edgeID names a Network's edge: the same on every start, another for another Network of
// the same name.
func edgeID(uid types.UID) string {
	sum := sha256.Sum256([]byte(uid))
	return hex.EncodeToString(sum[:4])
}

// node is what is known of a node.
type node struct {
	Name           string
	Address        netip.Addr
	Addresses      []netip.Addr
	PodCIDRs       []netip.Prefix
	Zone           string
	Ready          bool
	ControlPlane   bool
	ExcludedFromLB bool
}

// vip is an external address that a Service has claimed.
type vip struct {
	Address netip.Addr
	UID     types.UID
}

// floating is an external address that a FloatingIP has claimed.
type floating struct {
	Address, Target netip.Addr
}

// snapshot is everything the state of one Network on this node follows from.
type snapshot struct {
	Network *v1alpha1.Network
	// Namespaces bound to it, with their labels.
	Namespaces map[string]map[string]string
	Ports      []*v1alpha1.Port
	// Links of the Ports plugged here, and their uplinks where they have such.
	Links map[string]string
	VIFs  map[string]VIF
	Pods  map[types.UID]*corev1.Pod
	// Records stand in for Pods here whose objects are not known.
	Records    map[types.UID]*record
	Services   []*corev1.Service
	Slices     []*discoveryv1.EndpointSlice
	Policies   []*networkingv1.NetworkPolicy
	Kubernetes *corev1.Service
	Nodes      map[string]node
	// Self is this node's name.
	Self string
	// VIPs by the Service's namespace/name.
	VIPs map[string][]vip
	// Fronts are Ports that Services have, on any node.
	Fronts   []*v1alpha1.Port
	Floating []floating
	// Exported are Services the API server here needs, by namespace/name.
	Exported map[string]bool
	// DNS are the addresses of its resolvers, Ranges those of ClusterIPs.
	DNS    []netip.Addr
	Ranges []netip.Prefix
}

// errNotAccepted says that a Network's controller has work to do before anybody else.
var errNotAccepted = errdefs.ErrUnavailable.WithMessage("not accepted yet")

// accepted tells whether a Network can be carried. One that was Active once can be,
// whatever became of it since: its Pods live.
func accepted(n *v1alpha1.Network) error {
	switch {
	case n.Status.VNI <= 0 && !wiredElsewhere(n) || len(n.Status.Subnets) == 0:
		return fmt.Errorf("network %s/%s is %s, not Active: %s: %w", n.Namespace, n.Name, cmp.Or(n.Status.Phase, v1alpha1.NetworkInitializing), why(n), errNotAccepted)
	case n.Status.Provider != "" && n.Status.Provider != provider.Builtin && !wiredElsewhere(n):
		return fmt.Errorf("network %s/%s: provider %q is not one this node can plug: %w", n.Namespace, n.Name, n.Status.Provider, errdefs.ErrNotImplemented)
	}
	return nil
}

// active tells whether a Network takes new Pods.
func active(n *v1alpha1.Network) error {
	if err := accepted(n); err != nil {
		return err
	}
	if n.Status.Phase != v1alpha1.NetworkActive {
		return fmt.Errorf("network %s/%s is %s, not Active: %s: %w", n.Namespace, n.Name, n.Status.Phase, why(n), errdefs.ErrUnavailable)
	}
	return nil
}

func why(n *v1alpha1.Network) string {
	for _, c := range n.Status.Conditions {
		if c.Type == v1alpha1.ConditionReady && c.Message != "" {
			return c.Message
		}
	}
	return "its controller has not accepted it yet"
}

// spec is the edge as it should be. External addresses are decided by announced.
func (s *snapshot) spec() (edge.Spec, error) {
	n := s.Network
	if err := accepted(n); err != nil {
		return edge.Spec{}, err
	}
	subnets, err := ipam.Subnets(n)
	if err != nil {
		return edge.Spec{}, err
	}
	out := edge.Spec{
		ID: edgeID(n.UID), Name: n.Namespace + "/" + n.Name, VNI: uint32(n.Status.VNI), MTU: int(n.Status.MTU), Local: s.DNS,
		Egress: n.Spec.Egress != v1alpha1.EgressNone, Routed: n.Status.HostAccess == v1alpha1.HostRouted,
	}
	if wiredElsewhere(n) {
		out.Uplinks, out.VNI, out.Routed = true, 0, false
	}
	for _, sub := range subnets {
		out.Subnets = append(out.Subnets, sub.Prefix)
		out.Gateways = append(out.Gateways, sub.Gateway)
	}
	homes := map[string]bool{} // nodes that have a port in the Network
	for _, p := range s.ports() {
		homes[p.node] = true
		if p.node == s.Self && p.link == "" {
			continue // claimed, not plugged
		}
		at, ok := s.Nodes[p.node]
		if !ok || !at.Address.IsValid() {
			continue // a node that has gone
		}
		q := edge.Port{Addresses: p.addresses, MAC: p.mac, Node: at.Address, Link: p.link}
		if p.vif != nil {
			q.Uplink = p.vif.Name
		}
		out.Ports = append(out.Ports, q)
	}
	ready := s.ready()
	if wiredElsewhere(n) {
		// From the edge of a node that has no port there nothing leads to the Pods.
		ready = slices.DeleteFunc(ready, func(name string) bool { return !homes[name] })
	}
	byService := s.slicesByService()
	for _, svc := range s.Services {
		key := svc.Namespace + "/" + svc.Name
		if s.Exported[key] {
			out.Exported = append(out.Exported, addresses(svc.Spec.ClusterIPs)...)
		}
		for _, a := range s.leased(svc) {
			may := announcer.Candidates(svc, byService[key], ready)
			here := announcer.Winner(a.String(), may) == s.Self
			// A Service that wants its clients' addresses can answer only where it has
			// endpoints; others on this node find it over the fabric.
			if here || svc.Spec.ExternalTrafficPolicy != corev1.ServiceExternalTrafficPolicyLocal || slices.Contains(may, s.Self) {
				out.External = append(out.External, edge.External{Address: a, Announce: here})
			}
		}
	}
	local := map[netip.Addr]bool{}
	for _, p := range out.Ports {
		for _, a := range p.Addresses {
			local[a] = local[a] || p.Link != ""
		}
	}
	for _, f := range s.Floating {
		if local[f.Target] {
			out.External = append(out.External, edge.External{Address: f.Address, Announce: true, Target: f.Target})
		}
	}
	for _, f := range s.fronts() {
		out.Fronts = append(out.Fronts, f.Front)
	}
	slices.SortFunc(out.External, func(a, b edge.External) int { return a.Address.Compare(b.Address) })
	slices.SortFunc(out.Exported, netip.Addr.Compare)
	return out, nil
}

// port is a Port that was read.
type port struct {
	name, node, link string
	addresses        []netip.Addr
	mac              net.HardwareAddr
	pod              *v1alpha1.PodRef
	// vif is the uplink of one plugged here, where the provider wires one.
	vif *VIF
}

// ports are the Network's Ports that have a node, in order of their names. What does not
// belong is left out: one bad object must not keep the others from being served.
func (s *snapshot) ports() []port {
	subnets, err := ipam.Subnets(s.Network)
	if err != nil {
		return nil
	}
	var out []port
	for _, p := range s.Ports {
		if p.Spec.Network != s.Network.Name || p.Spec.NetworkUID != "" && p.Spec.NetworkUID != string(s.Network.UID) || p.Spec.Node == "" || p.Spec.Pod == nil {
			continue
		}
		addrs, err := ipam.Addresses(p)
		if err != nil || slices.ContainsFunc(addrs, func(a netip.Addr) bool { return !within(subnets, a) }) || !claimed(p, addrs) {
			continue
		}
		mac := macOf(s.Network, p, addrs[0])
		was, plugged := s.VIFs[p.Name]
		if plugged = plugged && p.Spec.Node == s.Self; mac == nil && plugged {
			mac, _ = net.ParseMAC(was.MAC) // whatever became of its status since
		}
		if mac == nil {
			continue
		}
		q := port{name: p.Name, node: p.Spec.Node, addresses: addrs, mac: mac, pod: p.Spec.Pod}
		if p.Spec.Node == s.Self {
			q.link = s.Links[p.Name]
		}
		if q.link != "" && wiredElsewhere(s.Network) {
			if q.vif, err = vifOf(p); err != nil && !plugged {
				continue
			} else if err != nil {
				q.vif = &was
			}
		}
		out = append(out, q)
	}
	slices.SortFunc(out, func(a, b port) int { return cmp.Compare(a.name, b.name) })
	return out
}

// claimed tells whether a Port's addresses are those its name claims: the name is what
// makes an address one Port's only, and what somebody wrote into the Port later is not.
func claimed(p *v1alpha1.Port, addrs []netip.Addr) bool {
	if p.Name != v1alpha1.PortName(p.Spec.Network, addrs[0].String()) && p.Name != v1alpha1.PortName(p.Spec.Network, p.Spec.Addresses[0]) {
		return false
	}
	return len(addrs) == 1 || len(addrs) == 2 && addrs[0].BitLen() != addrs[1].BitLen()
}

func within(subnets []ipam.Subnet, a netip.Addr) bool {
	return slices.ContainsFunc(subnets, func(s ipam.Subnet) bool { return s.Prefix.Contains(a) && s.Gateway != a })
}

// macOf is a Port's MAC address; nil if it is none.
func macOf(n *v1alpha1.Network, p *v1alpha1.Port, first netip.Addr) net.HardwareAddr {
	text := p.Spec.MAC
	if wiredElsewhere(n) {
		text = p.Status.MAC // what the provider made of it
	} else if text == "" {
		return ipam.MAC(n.Namespace+"/"+n.Name, first)
	}
	mac, err := net.ParseMAC(text)
	if err != nil || len(mac) != 6 || mac[0]&1 != 0 {
		return nil
	}
	return mac
}

// ready are the nodes that may announce.
func (s *snapshot) ready() []string { return readyNodes(s.Nodes) }

func readyNodes(nodes map[string]node) []string {
	var out []string
	for name, n := range nodes {
		if n.Ready && !n.ExcludedFromLB {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

func (s *snapshot) slicesByService() map[string][]*discoveryv1.EndpointSlice {
	out := map[string][]*discoveryv1.EndpointSlice{}
	for _, e := range s.Slices {
		if name := e.Labels[discoveryv1.LabelServiceName]; name != "" {
			key := e.Namespace + "/" + name
			out[key] = append(out[key], e)
		}
	}
	return out
}

// external are the addresses claimed for a Service: what it says of itself is not asked.
func (s *snapshot) external(svc *corev1.Service) []netip.Addr {
	out := append(s.leased(svc), s.fronted(svc)...)
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}

// leased are those of AddressPools, which nodes announce.
func (s *snapshot) leased(svc *corev1.Service) []netip.Addr {
	if svc.Spec.Type != corev1.ServiceTypeLoadBalancer {
		return nil
	}
	var out []netip.Addr
	for _, v := range s.VIPs[svc.Namespace+"/"+svc.Name] {
		if v.UID == svc.UID {
			out = append(out, v.Address)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}

// selection is what was made of one Service, and of what. Objects of watches are never
// changed: another version is another object.
type selection struct {
	by     service.Select
	svc    *corev1.Service
	slices []*discoveryv1.EndpointSlice
	out    service.Service
	ok     bool
}

// of tells whether it was made of just that.
func (c *selection) of(by service.Select, svc *corev1.Service, eps []*discoveryv1.EndpointSlice) bool {
	return c.svc == svc && c.by.Node == by.Node && c.by.Zone == by.Zone && slices.Equal(c.by.External, by.External) && slices.Equal(c.slices, eps)
}

// selections by namespace/name of the Service.
type selections map[string]selection

// services are the Services of the Network; the API server's leads to transit. Of thousands
// of Services one changes at a time: what known says of the others is taken from there. The
// selections it returns are for the next time.
func (s *snapshot) services(transit netip.Addr, known selections) ([]service.Service, selections) {
	byService := s.slicesByService()
	self := s.Nodes[s.Self]
	out, now := make([]service.Service, 0, len(s.Services)+1), make(selections, len(s.Services))
	for _, svc := range s.Services {
		key := svc.Namespace + "/" + svc.Name
		eps := byService[key]
		sel := service.Select{Node: s.Self, Zone: self.Zone, External: s.external(svc)}
		c, ok := known[key]
		if !ok || !c.of(sel, svc, eps) {
			c = selection{by: sel, svc: svc, slices: eps}
			c.out, c.ok = sel.From(svc, eps)
		}
		now[key] = c
		if c.ok {
			out = append(out, c.out)
		}
	}
	if k := s.kubernetes(transit); k != nil {
		out = append(out, *k)
	}
	slices.SortFunc(out, func(a, b service.Service) int { return strings.Compare(a.Key, b.Key) })
	return out, now
}

// kubernetes is default/kubernetes, whose endpoints no Pod could reach.
func (s *snapshot) kubernetes(transit netip.Addr) *service.Service {
	if !transit.IsValid() {
		return nil
	}
	var ips []netip.Addr
	if s.Kubernetes != nil {
		ips = addresses(s.Kubernetes.Spec.ClusterIPs)
	} else {
		for _, r := range s.Ranges {
			ips = append(ips, r.Masked().Addr().Next())
		}
	}
	ips = slices.DeleteFunc(ips, func(a netip.Addr) bool { return a.BitLen() != transit.BitLen() })
	if len(ips) == 0 {
		return nil
	}
	return &service.Service{
		Key: "default/kubernetes", ClusterIPs: ips,
		Ports: []service.Port{{
			Protocol: unix.IPPROTO_TCP, Port: 443,
			Internal: []service.Endpoint{{Address: netip.AddrPortFrom(transit, apiPort), Local: true}},
		}},
	}
}

// apiPort is where an edge finds the API server, at the node's end of its link.
const apiPort = 6443

// policies is what NetworkPolicies depend on.
func (s *snapshot) policies() policy.State {
	out := policy.State{Namespaces: map[string]map[string]string{}, Policies: s.Policies}
	for name, labels := range s.Namespaces {
		out.Namespaces[name] = labels
	}
	byPod := map[string]*policy.Pod{}
	var order []string
	for _, p := range s.ports() {
		if _, bound := s.Namespaces[p.pod.Namespace]; !bound && p.link == "" {
			// A further NIC of a Pod whose namespace has another Network: here it is an
			// address no selector means.
			continue
		}
		pod := byPod[p.pod.UID]
		if pod == nil {
			pod = &policy.Pod{Namespace: p.pod.Namespace, Name: p.pod.Name}
			// Until its Pod is known it has no label: no rule that names labels allows it.
			if o := s.Pods[types.UID(p.pod.UID)]; o != nil {
				pod.Labels, pod.Ports = o.Labels, namedPorts(o)
			} else if r := s.Records[types.UID(p.pod.UID)]; r != nil {
				pod.Labels, pod.Ports = r.Labels, r.Ports
			}
			byPod[p.pod.UID] = pod
			order = append(order, p.pod.UID)
		}
		pod.Addresses = append(pod.Addresses, p.addresses...)
		if p.link != "" {
			pod.Links = append(pod.Links, p.link)
		}
	}
	for _, uid := range order {
		out.Pods = append(out.Pods, *byPod[uid])
	}
	const system = "kube-system"
	out.Namespaces[system] = map[string]string{corev1.LabelMetadataName: system}
	out.Pods = append(out.Pods, policy.Pod{
		Namespace: system, Name: "kube-dns", Labels: map[string]string{"k8s-app": "kube-dns"}, Addresses: s.DNS,
		Ports: []policy.NamedPort{{Name: "dns", Protocol: unix.IPPROTO_UDP, Port: 53}, {Name: "dns-tcp", Protocol: unix.IPPROTO_TCP, Port: 53}},
	})
	return out
}

// namedPorts are those of containers that live as long as the Pod.
func namedPorts(pod *corev1.Pod) []policy.NamedPort {
	containers := slices.Clone(pod.Spec.Containers)
	for _, c := range pod.Spec.InitContainers {
		if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			containers = append(containers, c)
		}
	}
	var out []policy.NamedPort
	for _, c := range containers {
		for _, p := range c.Ports {
			if p.Name == "" || p.ContainerPort < 1 || p.ContainerPort > 65535 {
				continue
			}
			n := policy.NamedPort{Name: p.Name, Port: uint16(p.ContainerPort), Protocol: unix.IPPROTO_TCP}
			switch p.Protocol {
			case corev1.ProtocolUDP:
				n.Protocol = unix.IPPROTO_UDP
			case corev1.ProtocolSCTP:
				n.Protocol = unix.IPPROTO_SCTP
			}
			out = append(out, n)
		}
	}
	return out
}

// view is what its resolver knows.
func (s *snapshot) view() dns.View {
	v := dns.View{Services: slices.Clone(s.Services), Slices: s.Slices, Reverse: slices.Clone(s.Ranges)}
	for name := range s.Namespaces {
		v.Namespaces = append(v.Namespaces, name)
	}
	slices.Sort(v.Namespaces)
	if s.Kubernetes != nil {
		v.Services = append(v.Services, s.Kubernetes)
	}
	if subnets, err := ipam.Subnets(s.Network); err == nil {
		for _, sub := range subnets {
			v.Reverse = append(v.Reverse, sub.Prefix)
		}
	}
	return v
}

func addresses(ss []string) []netip.Addr {
	var out []netip.Addr
	for _, s := range ss {
		if a, err := netip.ParseAddr(s); err == nil {
			out = append(out, a)
		}
	}
	return out
}
