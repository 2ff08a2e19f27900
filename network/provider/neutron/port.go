package neutron

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"k8s.io/apimachinery/pkg/types"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/openstack"
	"github.com/hypernetes/hypernetes/network/provider"
)

// EnsurePort implements controller.PortProvider.
func (p *Provider) EnsurePort(ctx context.Context, n *v1alpha1.Network, x *v1alpha1.Port) (provider.PortState, error) {
	st, err := p.ensurePort(ctx, n, x)
	return st, explain(err, "Port "+x.Name+" at Neutron")
}

func (p *Provider) ensurePort(ctx context.Context, n *v1alpha1.Network, x *v1alpha1.Port) (provider.PortState, error) {
	c, project, err := p.client(ctx, n.Status.Tenant)
	if err != nil {
		return provider.PortState{}, err
	}
	w, err := p.portWish(n, x, project)
	if err != nil {
		return provider.PortState{}, err
	}
	if w.TagsAtOnce, err = p.tagsAtOnce(ctx, c, ports); err != nil {
		return provider.PortState{}, err
	}
	var h *port
	if w.Known != "" {
		if h, err = p.portOf(ctx, c, project, w.Known, n); err != nil {
			return provider.PortState{}, err
		}
	}
	var repaired []string
	tried := false // to bind it
	for round := 0; ; round++ {
		steps := planPort(w, h)
		if len(steps) == 0 || tried && rebinds(steps) {
			break
		}
		if round == rounds {
			return provider.PortState{}, fmt.Errorf("%s port differs again after each change: somebody else changes it too: %w", steps[0].Verb, errdefs.ErrUnavailable)
		}
		for _, s := range steps {
			var adopted bool
			if h, adopted, err = p.doPort(ctx, c, s, h, w); err != nil {
				return provider.PortState{}, err
			}
			tried = tried || !adopted && s.Body["binding:host_id"] != nil
			if s.Why != "" {
				repaired = append(repaired, s.Why)
			}
		}
	}
	st := provider.PortState{ID: h.ID, MAC: h.MAC, Repaired: strings.Join(repaired, "; ")}
	if w.Host == "" {
		st.Why = "it belongs to no node"
		return st, nil
	}
	switch {
	case h.VIFType == nil:
		return st, provider.Faultf(forbidden, "the controller's account may not read binding:vif_type of port %s: give it the role its profile needs (docs/openstack.md, Credentials): %w", h.ID, errdefs.ErrPermissionDenied)
	case *h.VIFType == bindingFailed, *h.VIFType == unbound:
		return st, provider.Faultf(v1alpha1.ReasonBindingFailed, "Neutron cannot bind port %s to host %s (%s): %s: %w", h.ID, w.Host, *h.VIFType, p.agentsOf(ctx, c, w.Host), errdefs.ErrFailedPrecondition)
	}
	st.VIFType = *h.VIFType
	st.Wired = h.Status == statusActive
	if !st.Wired {
		st.Why = fmt.Sprintf("Neutron says %s: the L2 agent of host %s has not wired port %s yet", h.Status, w.Host, h.ID)
	}
	return st, nil
}

// rebinds says that nothing is left to do but another try to bind.
func rebinds(steps []step) bool {
	return len(steps) == 1 && steps[0].Verb == update && len(steps[0].Body) == 1 && steps[0].Body["binding:host_id"] != nil
}

// portWish works out what x should be.
func (p *Provider) portWish(n *v1alpha1.Network, x *v1alpha1.Port, project string) (portWish, error) {
	w := portWish{
		Mark: p.mark(x.UID), Tags: p.tags(x.UID), Name: name(n.Status.Tenant, x.Name), Project: project,
		Network: n.Status.ProviderNetworkID, Group: n.Status.ProviderGroupID,
		MAC: x.Status.MAC, Host: x.Spec.Node, Known: x.Status.ProviderPortID,
	}
	if w.Network == "" || w.Group == "" {
		return w, provider.Faultf(unavailable, "Network %s is not at Neutron yet: %w", n.Name, errdefs.ErrUnavailable)
	}
	// What is asked for goes before what there was; a Port that was plugged keeps what it has.
	if x.Spec.MAC != "" {
		w.MAC = x.Spec.MAC
	}
	if x.Spec.Pod != nil {
		w.Device = x.Spec.Pod.UID
		w.Name = name(n.Status.Tenant, x.Spec.Pod.Namespace, x.Spec.Pod.Name, x.Spec.Pod.Interface)
		w.Tags = append(w.Tags, "h8s-pod="+x.Spec.Pod.UID)
	} else if s := x.Spec.Service; s != nil {
		w.Owner, w.Device = frontOwner, s.UID
		w.Name = name(n.Status.Tenant, s.Namespace, s.Name)
		w.Tags = append(w.Tags, "h8s-service="+s.UID)
	}
	for _, s := range x.Spec.Addresses {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return w, provider.Faultf("Invalid", "spec.addresses: %q is not an address: %w", s, errdefs.ErrInvalidArgument)
		}
		i := slices.IndexFunc(n.Status.Subnets, func(s v1alpha1.SubnetStatus) bool {
			q, err := netip.ParsePrefix(s.CIDR)
			return err == nil && q.Contains(a)
		})
		if i < 0 || n.Status.Subnets[i].ProviderSubnetID == "" {
			return w, provider.Faultf("Invalid", "spec.addresses: %s is in no subnet of Network %s: %w", a, n.Name, errdefs.ErrInvalidArgument)
		}
		w.Fixed = append(w.Fixed, fixedIP{n.Status.Subnets[i].ProviderSubnetID, a.String()})
	}
	return w, nil
}

// portOf returns a port that was written down, nil if there is none.
func (p *Provider) portOf(ctx context.Context, c *openstack.Client, project, id string, n *v1alpha1.Network) (*port, error) {
	h, err := get[port](ctx, c, ports, id)
	if err != nil || h == nil {
		return nil, err
	}
	// Neutron asks the network's owner only for a port of another project.
	if h.Project != project {
		return nil, provider.Faultf(wrongProject, "port %s belongs to project %s and the tenant to %s: delete the Port: %w", id, h.Project, project, errdefs.ErrInvalidArgument)
	}
	return h, nil
}

// doPort takes one step and returns the port as it is then; adopted says that it was there
// already.
func (p *Provider) doPort(ctx context.Context, c *openstack.Client, s step, h *port, w portWish) (is *port, adopted bool, err error) {
	switch s.Verb {
	case drop:
		return nil, false, remove(ctx, c, ports, s.ID)
	case retag:
		if err := tag(ctx, c, ports, s.ID, w.Tags); err != nil {
			return h, false, err
		}
		h.Tags = w.Tags
		return h, false, nil
	}
	made, err := put[port](ctx, c, ports, s.ID, s.Body)
	switch {
	case err == nil:
		return made, false, nil
	case s.Verb == update && errdefs.IsNotFound(err):
		return nil, false, nil // gone meanwhile: it is made anew
	case !errdefs.IsAlreadyExists(err):
		return h, false, err
	}
	// Perhaps it is ours, of a controller that died before it wrote it down.
	if s.Verb == create {
		if again, aerr := p.ownPort(ctx, c, w); aerr != nil || again != nil {
			return again, true, aerr
		}
	}
	if openstack.TypeOf(err) == "MacAddressInUse" {
		return h, false, provider.Faultf("MACInUse", "spec.mac: another port of the network has %s: choose another, or none: %w", w.MAC, err)
	}
	var texts []string
	for _, f := range w.Fixed {
		texts = append(texts, f.Address)
	}
	return h, false, provider.Faultf(v1alpha1.ReasonAddressInUse, "another port of the network at Neutron has %s: choose another address: %w", strings.Join(texts, " or "), err)
}

// ownPort finds a port by its mark.
func (p *Provider) ownPort(ctx context.Context, c *openstack.Client, w portWish) (*port, error) {
	all, err := owned[port](ctx, c, ports, w.Project, w.Mark, url.Values{"network_id": {w.Network}})
	if err != nil {
		return nil, err
	}
	for i := range all {
		if all[i].Network == w.Network && all[i].DeviceOwner == w.owner() {
			return &all[i], nil
		}
	}
	return nil, nil
}

// agentsOf says what is known of a host's agents, for a message.
func (p *Provider) agentsOf(ctx context.Context, c *openstack.Client, host string) string {
	all, err := list[agent](ctx, c, agents, url.Values{"host": {host}})
	// To other accounts Neutron says that there is none.
	if err != nil || p.o.Cloud.Profile() != openstack.Full {
		return "see `openstack network agent list --host " + host + "`"
	}
	var dead []string
	for _, a := range all {
		if a.Host != host || strings.Contains(a.Type, "DHCP") || strings.Contains(a.Type, "Metadata") || strings.Contains(a.Type, "L3") {
			continue
		}
		if a.Alive {
			return fmt.Sprintf("its %s is alive, so no mechanism driver of Neutron fits the network: ask the cloud's operator", a.Type)
		}
		dead = append(dead, a.Type)
	}
	if len(dead) > 0 {
		return "its " + strings.Join(dead, ", ") + " does not answer: start it again"
	}
	return "Neutron knows no L2 agent on a host of that name: start one there, under the node's name"
}

// ReleasePort implements controller.PortProvider.
func (p *Provider) ReleasePort(ctx context.Context, x *v1alpha1.Port) error {
	return explain(p.releasePort(ctx, x), "remove Port "+x.Name+" at Neutron")
}

func (p *Provider) releasePort(ctx context.Context, x *v1alpha1.Port) error {
	c, project, err := p.client(ctx, strings.TrimPrefix(x.Namespace, v1alpha1.HomePrefix))
	if provider.Reason(err, "") == noProject && x.Status.ProviderPortID == "" {
		return nil
	} else if err != nil {
		return err
	}
	id := x.Status.ProviderPortID
	if id != "" {
		h, err := get[port](ctx, c, ports, id)
		if err != nil {
			return err
		}
		if h != nil && h.Project == project {
			if err := remove(ctx, c, ports, id); err != nil {
				return err
			}
		}
	}
	// One that was not written down.
	all, err := owned[port](ctx, c, ports, project, p.mark(x.UID), nil)
	if err != nil {
		return err
	}
	var errs []error
	for _, h := range all {
		if h.DeviceOwner == deviceOwner || h.DeviceOwner == frontOwner {
			errs = append(errs, remove(ctx, c, ports, h.ID))
		}
	}
	return errors.Join(errs...)
}

// Drifted implements controller.PortProvider.
func (p *Provider) Drifted(ctx context.Context, n *v1alpha1.Network, all []v1alpha1.Port) ([]string, error) {
	names, err := p.drifted(ctx, n, all)
	return names, explain(err, "compare the Ports of Network "+n.Name+" with Neutron's")
}

func (p *Provider) drifted(ctx context.Context, n *v1alpha1.Network, all []v1alpha1.Port) ([]string, error) {
	c, project, err := p.client(ctx, n.Status.Tenant)
	if err != nil {
		return nil, err
	}
	there, err := list[port](ctx, c, ports, url.Values{"network_id": {n.Status.ProviderNetworkID}})
	if err != nil {
		return nil, err
	}
	have := map[string]*port{}
	for i := range there {
		have[there[i].ID] = &there[i]
	}
	var out []string
	for i := range all {
		x := &all[i]
		w, err := p.portWish(n, x, project)
		if err != nil || x.Status.ProviderPortID == "" || !x.DeletionTimestamp.IsZero() {
			continue // it is on its way already
		}
		h := have[x.Status.ProviderPortID]
		wired := slices.ContainsFunc(x.Status.Conditions, func(c metaCondition) bool { return c.Type == v1alpha1.ConditionWired && c.Status == "True" })
		if h == nil || len(planPort(w, h)) > 0 || x.Spec.Node != "" && wired != (h.Status == statusActive) {
			out = append(out, x.Name)
		}
	}
	return out, nil
}

// Strays implements controller.StrayProvider. Whose mark a port carries is the tenant's to
// change, and so is what becomes of a port of theirs that says it is ours.
func (p *Provider) Strays(ctx context.Context, n *v1alpha1.Network, all []v1alpha1.Port) (map[string]types.UID, error) {
	found, err := p.findStrays(ctx, n, all)
	return found, explain(err, "look for forgotten ports of Network "+n.Name+" at Neutron")
}

func (p *Provider) findStrays(ctx context.Context, n *v1alpha1.Network, all []v1alpha1.Port) (map[string]types.UID, error) {
	c, project, err := p.client(ctx, n.Status.Tenant)
	if err != nil {
		return nil, err
	}
	there, err := list[port](ctx, c, ports, url.Values{"network_id": {n.Status.ProviderNetworkID}, "project_id": {project}, "device_owner": {deviceOwner, frontOwner}})
	if err != nil {
		return nil, err
	}
	known := map[types.UID]bool{}
	for i := range all {
		known[all[i].UID] = true
	}
	out := map[string]types.UID{}
	for _, h := range there {
		uid, ours := strings.CutPrefix(h.Description, p.mark(""))
		if ours && uid != "" && !known[types.UID(uid)] && h.Network == n.Status.ProviderNetworkID && h.Project == project && (h.DeviceOwner == deviceOwner || h.DeviceOwner == frontOwner) {
			out[h.ID] = types.UID(uid)
		}
	}
	return out, nil
}

// RemoveStray implements controller.StrayProvider.
func (p *Provider) RemoveStray(ctx context.Context, n *v1alpha1.Network, id string) error {
	c, _, err := p.client(ctx, n.Status.Tenant)
	if err == nil {
		err = remove(ctx, c, ports, id)
	}
	return explain(err, "remove forgotten port "+id+" at Neutron")
}
