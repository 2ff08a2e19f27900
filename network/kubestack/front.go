package kubestack

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/edge"
	"github.com/hypernetes/hypernetes/network/ipam"
)

// A Service of type LoadBalancer in a Network that Neutron carries may have a Port: the
// controller claims it, has it bound to a node and leads a floating IP to it. On that node
// it is a front of the edge (package edge), Pods or none, and its addresses are external
// ones of the Service everywhere.

// front is a Port of a Service on this node.
type front struct {
	edge.Front
	vif  VIF
	port *v1alpha1.Port
}

// plugged is a front as it was plugged in.
type plugged struct {
	vif VIF
	// told is what was announced: the Port's UID, generation and provider's port.
	told string
}

// frontPort tells whether a Port may be one of a Service here, and its addresses.
func (s *snapshot) frontPort(p *v1alpha1.Port) ([]netip.Addr, bool) {
	if !wiredElsewhere(s.Network) || p.Spec.Service == nil || p.Spec.Network != s.Network.Name || p.Spec.NetworkUID != string(s.Network.UID) {
		return nil, false
	}
	if _, bound := s.Namespaces[p.Spec.Service.Namespace]; !bound {
		return nil, false
	}
	subnets, err := ipam.Subnets(s.Network)
	if err != nil {
		return nil, false
	}
	addrs, err := ipam.Addresses(p)
	return addrs, err == nil && claimed(p, addrs) && !slices.ContainsFunc(addrs, func(a netip.Addr) bool { return !within(subnets, a) })
}

// fronts are those of this node that the provider has ports for, in order of their names.
func (s *snapshot) fronts() []front {
	var out []front
	for _, p := range s.Fronts {
		addrs, ok := s.frontPort(p)
		if !ok || p.Spec.Node != s.Self {
			continue
		}
		mac := macOf(s.Network, p, addrs[0])
		vif, err := vifOf(p)
		if mac == nil || err != nil {
			continue // not made yet, or nothing this node can plug: its status says so
		}
		out = append(out, front{
			Front: edge.Front{Link: edge.LinkName(string(p.UID), "front"), Uplink: vif.Name, MAC: mac, Addresses: addrs},
			vif:   *vif, port: p,
		})
	}
	slices.SortFunc(out, func(a, b front) int { return cmp.Compare(a.port.Name, b.port.Name) })
	return out
}

// fronted are the addresses of a Service's Ports, of its families.
func (s *snapshot) fronted(svc *corev1.Service) []netip.Addr {
	if svc.Spec.Type != corev1.ServiceTypeLoadBalancer {
		return nil
	}
	var out []netip.Addr
	for _, p := range s.Fronts {
		addrs, ok := s.frontPort(p)
		if r := p.Spec.Service; !ok || r.Namespace != svc.Namespace || r.Name != svc.Name || r.UID != string(svc.UID) {
			continue
		}
		for _, a := range addrs {
			family := corev1.IPv4Protocol
			if a.Is6() {
				family = corev1.IPv6Protocol
			}
			if slices.Contains(svc.Spec.IPFamilies, family) || len(svc.Spec.IPFamilies) == 0 && a.Is4() {
				out = append(out, a)
			}
		}
	}
	return out
}

// plugFronts connects fronts to what no agent finds by itself. The edge has their links.
func (n *network) plugFronts(ctx context.Context, s *snapshot) error {
	now := map[string]VIF{}
	for _, f := range s.fronts() {
		now[f.Link] = f.vif
	}
	for link, was := range n.fronts {
		if is, ok := now[link]; ok && is.Name == was.vif.Name {
			continue
		}
		if err := n.d.wirer.Unplug(ctx, was.vif); err != nil {
			return fmt.Errorf("network %s: %w", n.key, err)
		}
		delete(n.fronts, link)
	}
	for link, is := range now {
		was, ok := n.fronts[link]
		if ok && was.vif == is {
			continue
		}
		if err := n.d.wirer.Plug(ctx, is); err != nil {
			return fmt.Errorf("network %s: %w", n.key, err)
		}
		if n.fronts == nil {
			n.fronts = map[string]plugged{}
		}
		was.vif = is
		n.fronts[link] = was
	}
	return nil
}

// unplugFronts is for a Network that leaves the node: the edge goes, and links with it.
func (n *network) unplugFronts(ctx context.Context) {
	n.sync.Lock()
	defer n.sync.Unlock()
	for _, f := range n.fronts {
		if err := n.d.wirer.Unplug(ctx, f.vif); err != nil {
			log.G(ctx).WithError(err).WithField("network", n.key.String()).Warn("unplug")
		}
	}
	n.fronts = nil
}

// announceFronts tells others on the layer 2 where fronts are that have just been wired
// here, as is done for Pods.
func (n *network) announceFronts(ctx context.Context, s *snapshot) {
	for _, f := range s.fronts() {
		c := current(f.port, v1alpha1.ConditionWired, f.port.Generation)
		if c == nil || c.Status != metav1.ConditionTrue {
			continue
		}
		text := fmt.Sprint(f.port.UID, f.port.Generation, f.port.Status.ProviderPortID)
		p, ok := n.fronts[f.Link]
		if !ok || p.told == text {
			continue
		}
		p.told = text
		n.fronts[f.Link] = p
		e, link := n.edge, f.Link
		say := func(ctx context.Context) bool {
			err := e.AnnounceFront(ctx, link)
			if err != nil {
				log.G(ctx).WithError(err).WithField("network", n.key.String()).Debug("announce a front")
			}
			return !errdefs.IsNotFound(err)
		}
		if !say(ctx) {
			continue
		}
		n.d.later.Go(func() {
			for _, wait := range []time.Duration{time.Second, 3 * time.Second, 10 * time.Second} {
				select {
				case <-n.d.ctx.Done():
					return
				case <-time.After(wait):
				}
				if !say(n.d.ctx) {
					return
				}
			}
		})
	}
}
