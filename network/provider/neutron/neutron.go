// Package neutron owns the provider whose Networks are OpenStack's: a Network is a Neutron
// network with subnets, a router and a security group, a Port is a port, a FloatingIP is a
// floating IP, all of the tenant's project.
//
// What is ours. The ID written in an object's status names its resource. Only where none
// is written, because a controller died between the creation and the writing, it is looked
// for: by the mark in its description, which is there from the moment it is made, and in
// the tenant's project only; of several the oldest. Names and tags find nothing: tags are
// there for people. A tenant's user who copies a mark onto a resource of their own project
// gains what editing our resources there would gain, which is put right; marks in other
// projects are not looked at. A port counts only if its network and its device_owner are
// ours too.
//
// Drift. Every call compares what there is with what there should be (package-private
// plan, which is pure) and does the difference. It must not know nodes or how a port is
// plugged in.
package neutron

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"k8s.io/apimachinery/pkg/types"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/controller"
	"github.com/hypernetes/hypernetes/network/openstack"
	"github.com/hypernetes/hypernetes/network/provider"
	"github.com/hypernetes/hypernetes/network/subnet"
)

var (
	_ controller.Provider        = (*Provider)(nil)
	_ controller.PortProvider    = (*Provider)(nil)
	_ controller.StrayProvider   = (*Provider)(nil)
	_ controller.AddressProvider = (*Provider)(nil)
	_ controller.Collector       = (*Provider)(nil)
	_ controller.Balancer        = (*Provider)(nil)
)

// Options of a Provider.
type Options struct {
	Cloud *openstack.Cloud
	// Cluster tells this cluster's resources from others': the UID of kube-system.
	Cluster string
	// Projects finds the project of a tenant. errdefs.ErrNotFound says that it has none.
	Projects func(ctx context.Context, tenant string) (string, error)
	// External network, by name or ID, of routers and floating IPs; the only one if empty.
	External string
	// Limits that the ranges of an adopted network must keep.
	Limits subnet.Limits
}

// Provider is Neutron.
type Provider struct {
	o Options

	mu         sync.Mutex
	external   network
	externalAt time.Time
	// extensions of the cloud, nil until asked.
	extensions map[string]bool
}

// New makes the provider. It asks nothing of the cloud.
func New(o Options) *Provider { return &Provider{o: o} }

// Name implements controller.Provider.
func (p *Provider) Name() string { return provider.Neutron }

// Reasons of what is refused.
const (
	noProject    = "NoProject"
	quota        = "QuotaExceeded"
	refused      = "ProviderRefused"
	forbidden    = "ProviderForbids"
	credential   = "CredentialRefused"
	unavailable  = "ProviderUnavailable"
	wrongProject = "WrongProject"
	// rounds bounds how often is looked whether all is done.
	rounds = 8
)

// explain gives an error its reason and, where somebody can do something, says who.
func explain(err error, what string) error {
	var f *provider.Fault
	switch {
	case err == nil || errors.As(err, &f) || errors.Is(err, context.Canceled):
		return err
	case openstack.TypeOf(err) == "OverQuota":
		return provider.Faultf(quota, "%s: the project's quota at Neutron is used up: delete what is not needed, or ask the cloud's operator for more: %w", what, err)
	case errdefs.IsResourceExhausted(err):
		return provider.Faultf(quota, "%s: %w", what, err)
	case errdefs.IsUnauthorized(err):
		return provider.Faultf(credential, "%s: the cloud refuses the controller's credential: the operator must mend --openstack-cloud-config: %w", what, err)
	case errdefs.IsPermissionDenied(err):
		return provider.Faultf(forbidden, "%s: the cloud's policy forbids it to the controller's account (see docs/openstack.md, Credentials): %w", what, err)
	case errdefs.IsUnavailable(err), errors.Is(err, context.DeadlineExceeded):
		return provider.Faultf(unavailable, "%s: %w", what, err)
	case errdefs.IsInvalidArgument(err):
		return provider.Faultf(refused, "%s: %w", what, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// client returns one for a tenant's project, and the project.
func (p *Provider) client(ctx context.Context, tenant string) (*openstack.Client, string, error) {
	project, err := p.o.Projects(ctx, tenant)
	if errdefs.IsNotFound(err) {
		return nil, "", provider.Faultf(noProject, "tenant %s has no OpenStack project: the operator sets spec.keystone.projectID of the Tenant, or the Network says spec.provider: %s: %w",
			tenant, provider.Builtin, errdefs.ErrInvalidArgument)
	} else if err != nil {
		return nil, "", err
	}
	c, err := p.o.Cloud.Client(ctx, openstack.Network, project)
	if errdefs.IsUnauthorized(err) && p.o.Cloud.Profile() == openstack.Least {
		return nil, "", provider.Faultf(credential, "the controller's account gets no token for project %s of tenant %s: the operator gives it its role there, or mends --openstack-cloud-config: %w", project, tenant, err)
	}
	return c, project, err
}

// Balances implements controller.Balancer: whether the cloud has load balancers of its own.
func (p *Provider) Balances(ctx context.Context, tenant string) (bool, error) {
	project, err := p.o.Projects(ctx, tenant)
	if err == nil {
		_, err = p.o.Cloud.Client(ctx, openstack.LoadBalancer, project)
	}
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	return err == nil, explain(err, "load balancers of the cloud")
}

// mark is what the description of a resource says, of the moment it is made.
func (p *Provider) mark(uid types.UID) string {
	return "hypernetes cluster=" + p.o.Cluster + " uid=" + string(uid)
}

// tags of a resource, for people who look for them.
func (p *Provider) tags(uid types.UID, more ...string) []string {
	return append([]string{"hypernetes", "h8s-cluster=" + p.o.Cluster, "h8s-uid=" + string(uid)}, more...)
}

// name of a resource, for people.
func name(parts ...string) string {
	s := strings.Join(parts, ".")
	return "h8s." + s[:min(len(s), 240)]
}

// tagsAtOnce says whether tags may go with the creation of a resource.
func (p *Provider) tagsAtOnce(ctx context.Context, c *openstack.Client, kind string) (bool, error) {
	p.mu.Lock()
	have := p.extensions
	p.mu.Unlock()
	if have == nil {
		all, err := list[struct{ Alias string }](ctx, c, "extensions", url.Values{"fields": {"alias"}})
		if err != nil {
			return false, err
		}
		have = map[string]bool{}
		for _, e := range all {
			have[e.Alias] = true
		}
		p.mu.Lock()
		p.extensions = have
		p.mu.Unlock()
	}
	return have["tag-creation"] || kind == ports && have["tag-ports-during-bulk-creation"], nil
}

// externalNetwork is where routers lead to. It is asked for now and then only.
func (p *Provider) externalNetwork(ctx context.Context, c *openstack.Client) (network, error) {
	p.mu.Lock()
	have, at := p.external, p.externalAt
	p.mu.Unlock()
	if have.ID != "" && time.Since(at) < time.Minute {
		return have, nil
	}
	all, err := list[network](ctx, c, networks, url.Values{"router:external": {"true"}})
	if err != nil {
		return network{}, err
	}
	all = slices.DeleteFunc(all, func(n network) bool {
		return !n.External || p.o.External != "" && n.ID != p.o.External && n.Name != p.o.External
	})
	// An ID is one network's; a name may be several's.
	if i := slices.IndexFunc(all, func(n network) bool { return n.ID == p.o.External }); i >= 0 {
		all = all[i : i+1]
	}
	if len(all) != 1 {
		return network{}, fmt.Errorf("%d external networks fit --openstack-external-network %q: the operator names one, by ID: %w", len(all), p.o.External, errdefs.ErrUnavailable)
	}
	p.mu.Lock()
	p.external, p.externalAt = all[0], time.Now()
	p.mu.Unlock()
	return all[0], nil
}

// Ensure implements controller.Provider.
func (p *Provider) Ensure(ctx context.Context, n *v1alpha1.Network, subnets []v1alpha1.SubnetStatus) (provider.State, error) {
	st, err := p.ensure(ctx, n, subnets)
	return st, explain(err, "Network "+n.Name+" at Neutron")
}

func (p *Provider) ensure(ctx context.Context, n *v1alpha1.Network, accepted []v1alpha1.SubnetStatus) (provider.State, error) {
	if err := ctx.Err(); err != nil {
		return provider.State{}, err
	}
	c, project, err := p.client(ctx, n.Status.Tenant)
	if err != nil {
		return provider.State{}, err
	}
	w := wish{
		Mark: p.mark(n.UID), Tags: p.tags(n.UID), Name: name(n.Status.Tenant, n.Name), Project: project,
		MTU: n.Spec.MTU, Adopted: n.Spec.ProviderNetworkID != "", Subnets: accepted,
		Known: known{n.Status.ProviderNetworkID, n.Status.ProviderRouterID, n.Status.ProviderGroupID},
	}
	if w.TagsAtOnce, err = p.tagsAtOnce(ctx, c, networks); err != nil {
		return provider.State{}, err
	}
	if !w.Adopted && n.Spec.Egress != v1alpha1.EgressNone {
		x, err := p.externalNetwork(ctx, c)
		if err != nil {
			return provider.State{}, err
		}
		w.External = x.ID
	}
	s, err := p.look(ctx, c, w, n)
	if err != nil {
		return provider.State{}, err
	}
	var repaired []string
	for round := 0; ; round++ {
		steps := plan(w, s)
		if len(steps) == 0 {
			break
		}
		if round == rounds {
			return provider.State{}, fmt.Errorf("%s %s differs again after each change: somebody else changes it too: %w", steps[0].Verb, single(steps[0].Kind), errdefs.ErrUnavailable)
		}
		for _, x := range steps {
			if err := do(ctx, c, x, &s); err != nil {
				return provider.State{}, err
			}
			if x.Why != "" {
				repaired = append(repaired, x.Why)
			}
		}
	}
	st := provider.State{NetworkID: s.Network.ID, GroupID: s.Group.ID, MTU: s.Network.MTU}
	if s.Router != nil {
		st.RouterID = s.Router.ID
	}
	if w.Adopted {
		if st.Subnets, err = p.adopted(n, s.Subnets); err != nil {
			return provider.State{}, err
		}
		if n.Spec.MTU > 0 && n.Spec.MTU < st.MTU {
			st.MTU = n.Spec.MTU
		}
	} else {
		for _, a := range accepted {
			a.ProviderSubnetID = s.subnet(a.CIDR).ID
			st.Subnets = append(st.Subnets, a)
		}
	}
	// What somebody has just asked for is no drift.
	if n.Generation == n.Status.ObservedGeneration {
		st.Repaired = strings.Join(repaired, "; ")
	}
	return st, nil
}

// look finds what there is of a Network.
func (p *Provider) look(ctx context.Context, c *openstack.Client, w wish, n *v1alpha1.Network) (sight, error) {
	var s sight
	var err error
	if w.Adopted {
		if s.Network, err = get[network](ctx, c, networks, n.Spec.ProviderNetworkID); err != nil {
			return s, err
		}
		// Whether others have such a network is not told.
		if s.Network == nil || s.Network.Project != w.Project || s.Network.External {
			return s, provider.Faultf(wrongProject, "spec.providerNetworkID: project %s of the tenant has no network %s: %w", w.Project, n.Spec.ProviderNetworkID, errdefs.ErrInvalidArgument)
		}
	} else if s.Network, err = find[network](ctx, c, networks, w, w.Known.Network); err != nil {
		return s, err
	}
	if s.Network != nil {
		if s.Subnets, err = list[subnetwork](ctx, c, subnets, url.Values{"network_id": {s.Network.ID}}); err != nil {
			return s, err
		}
		s.Subnets = slices.DeleteFunc(s.Subnets, func(x subnetwork) bool { return x.Network != s.Network.ID })
	}
	if !w.Adopted {
		if s.Router, err = find[router](ctx, c, routers, w, w.Known.Router); err != nil {
			return s, err
		}
		if s.Router != nil {
			in, err := interfaces(ctx, c, s.Router.ID)
			if err != nil {
				return s, err
			}
			for _, x := range in {
				for _, f := range x.Fixed {
					s.Interfaces = append(s.Interfaces, f.Subnet)
				}
			}
		}
	}
	s.Group, err = find[group](ctx, c, groups, w, w.Known.Group)
	return s, err
}

// find returns a resource of a Network: the one written down, or one that carries the mark.
func find[T resource](ctx context.Context, c *openstack.Client, kind string, w wish, id string) (*T, error) {
	if id != "" {
		x, err := get[T](ctx, c, kind, id)
		if err != nil || x != nil && (*x).base().Project == w.Project {
			return x, err
		}
		if x != nil {
			return nil, provider.Faultf(wrongProject, "%s %s belongs to project %s and the tenant to %s: make a new Network, or give the tenant its project back: %w",
				single(kind), id, (*x).base().Project, w.Project, errdefs.ErrInvalidArgument)
		}
	}
	all, err := owned[T](ctx, c, kind, w.Project, w.Mark, nil)
	if err != nil || len(all) == 0 {
		return nil, err
	}
	return &all[0], nil
}

// interfaces are a router's ports in tenants' networks.
func interfaces(ctx context.Context, c *openstack.Client, router string) ([]port, error) {
	all, err := list[port](ctx, c, ports, url.Values{"device_id": {router}})
	return slices.DeleteFunc(all, func(x port) bool {
		return x.DeviceID != router || !strings.HasPrefix(x.DeviceOwner, "network:") || x.DeviceOwner == "network:router_gateway" ||
			!(strings.Contains(x.DeviceOwner, "router_interface") || strings.Contains(x.DeviceOwner, "ha_router_replicated"))
	}), err
}

// do takes one step and notes in s what came of it.
func do(ctx context.Context, c *openstack.Client, x step, s *sight) error {
	fail := func(err error) error {
		if err == nil {
			return nil
		}
		return fmt.Errorf("%s %s: %w", x.Verb, single(x.Kind), err)
	}
	switch x.Verb {
	case retag:
		if err := tag(ctx, c, x.Kind, x.ID, x.Body["tags"].([]string)); err != nil {
			return fail(err)
		}
		s.tagged(x)
		return nil
	case attach:
		err := c.Do(ctx, http.MethodPut, routers+"/"+url.PathEscape(x.ID)+"/add_router_interface", nil, x.Body, nil)
		if err != nil {
			return fail(err)
		}
		s.Interfaces = append(s.Interfaces, x.Body["subnet_id"].(string))
		return nil
	}
	var err error
	switch x.Kind {
	case networks:
		var n *network
		if n, err = put[network](ctx, c, x.Kind, x.ID, x.Body); err == nil {
			s.Network = n
		}
	case subnets:
		var n *subnetwork
		if n, err = put[subnetwork](ctx, c, x.Kind, x.ID, x.Body); err == nil {
			s.Subnets = append(slices.DeleteFunc(s.Subnets, func(o subnetwork) bool { return o.ID == n.ID }), *n)
		}
	case routers:
		var n *router
		if n, err = put[router](ctx, c, x.Kind, x.ID, x.Body); err == nil {
			s.Router = n
		}
	case groups:
		var n *group
		if n, err = put[group](ctx, c, x.Kind, x.ID, x.Body); err == nil {
			s.Group = n
		}
	case rules:
		var n *rule
		n, err = put[rule](ctx, c, x.Kind, "", x.Body)
		if openstack.TypeOf(err) == "SecurityGroupRuleExists" {
			n, err = &rule{Direction: x.Body["direction"].(string), Family: x.Body["ethertype"].(string)}, nil
		}
		if err == nil {
			s.Group.Rules = append(s.Group.Rules, *n)
		}
	default:
		err = fmt.Errorf("no such step: %w", errdefs.ErrNotImplemented)
	}
	return fail(err)
}

func (s *sight) tagged(x step) {
	tags := x.Body["tags"].([]string)
	switch x.Kind {
	case networks:
		s.Network.Tags = tags
	case routers:
		s.Router.Tags = tags
	case groups:
		s.Group.Tags = tags
	case subnets:
		for i := range s.Subnets {
			if s.Subnets[i].ID == x.ID {
				s.Subnets[i].Tags = tags
			}
		}
	}
}

// adopted reads the subnets of somebody else's network. They keep the rules of our own.
func (p *Provider) adopted(n *v1alpha1.Network, have []subnetwork) ([]v1alpha1.SubnetStatus, error) {
	spec := v1alpha1.NetworkSpec{Subnets: map[string]v1alpha1.Subnet{}}
	ids := map[string]string{}
	slices.SortFunc(have, func(a, b subnetwork) int { return cmp.Compare(a.ID, b.ID) })
	for _, s := range have {
		if s.Gateway == nil || *s.Gateway == "" {
			return nil, provider.Faultf(refused, "spec.providerNetworkID: subnet %s (%s) has no gateway: give it one: %w", s.ID, s.CIDR, errdefs.ErrInvalidArgument)
		}
		key := "s-" + s.ID[:min(len(s.ID), 8)]
		for _, old := range n.Status.Subnets {
			if old.ProviderSubnetID == s.ID {
				key = old.Name
			}
		}
		spec.Subnets[key] = v1alpha1.Subnet{CIDR: s.CIDR, Gateway: *s.Gateway}
		ids[key] = s.ID
	}
	if len(spec.Subnets) == 0 {
		return nil, provider.Faultf(refused, "spec.providerNetworkID: network %s has no subnet: give it one: %w", n.Spec.ProviderNetworkID, errdefs.ErrInvalidArgument)
	}
	if errs := subnet.ValidateNetwork(spec, p.o.Limits); len(errs) > 0 {
		return nil, provider.Faultf(refused, "spec.providerNetworkID: a subnet of network %s cannot be used: %w: %w", n.Spec.ProviderNetworkID, errs.ToAggregate(), errdefs.ErrInvalidArgument)
	}
	out := subnet.Normalise(spec, n.Status.Subnets)
	for i := range out {
		out[i].ProviderSubnetID = ids[out[i].Name]
	}
	return out, nil
}

// Release implements controller.Provider.
func (p *Provider) Release(ctx context.Context, n *v1alpha1.Network) error {
	return explain(p.release(ctx, n), "remove Network "+n.Name+" at Neutron")
}

func (p *Provider) release(ctx context.Context, n *v1alpha1.Network) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	c, project, err := p.client(ctx, n.Status.Tenant)
	if provider.Reason(err, "") == noProject && n.Status.ProviderNetworkID == "" {
		return nil // there never was one
	} else if err != nil {
		return err
	}
	w := wish{Mark: p.mark(n.UID), Project: project, Known: known{n.Status.ProviderNetworkID, n.Status.ProviderRouterID, n.Status.ProviderGroupID}}
	adopted := n.Spec.ProviderNetworkID != ""
	var net *network
	if !adopted {
		if net, err = find[network](ctx, c, networks, w, w.Known.Network); err != nil {
			return err
		}
	} else if net, err = get[network](ctx, c, networks, n.Spec.ProviderNetworkID); err != nil {
		return err
	}
	if net != nil && net.Project == project {
		if err := p.releasePorts(ctx, c, net.ID); err != nil {
			return err
		}
	}
	if !adopted {
		r, err := find[router](ctx, c, routers, w, w.Known.Router)
		if err != nil {
			return err
		}
		if r != nil {
			if err := releaseRouter(ctx, c, r.ID); err != nil {
				return err
			}
		}
		if net != nil {
			if err := releaseNetwork(ctx, c, net.ID); err != nil {
				return err
			}
		}
	}
	g, err := find[group](ctx, c, groups, w, w.Known.Group)
	if err != nil || g == nil {
		return err
	}
	return remove(ctx, c, groups, g.ID)
}

// releasePorts deletes this cluster's ports of a network, of whatever Port they were.
func (p *Provider) releasePorts(ctx context.Context, c *openstack.Client, id string) error {
	left, err := list[port](ctx, c, ports, url.Values{"network_id": {id}, "device_owner": {deviceOwner}})
	if err != nil {
		return err
	}
	for _, x := range left {
		if x.Network == id && x.DeviceOwner == deviceOwner && strings.HasPrefix(x.Description, p.mark("")) {
			if err := remove(ctx, c, ports, x.ID); err != nil {
				return err
			}
		}
	}
	return nil
}

func releaseRouter(ctx context.Context, c *openstack.Client, id string) error {
	in, err := interfaces(ctx, c, id)
	if err != nil {
		return err
	}
	for _, x := range in {
		err := c.Do(ctx, http.MethodPut, routers+"/"+url.PathEscape(id)+"/remove_router_interface", nil, map[string]any{"port_id": x.ID}, nil)
		if err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	return remove(ctx, c, routers, id)
}

func releaseNetwork(ctx context.Context, c *openstack.Client, id string) error {
	err := remove(ctx, c, networks, id) // with its subnets
	if !errdefs.IsFailedPrecondition(err) && !errdefs.IsConflict(err) {
		return err
	}
	left, lerr := list[port](ctx, c, ports, url.Values{"network_id": {id}})
	if lerr != nil {
		return errors.Join(err, lerr)
	}
	var users []string
	for _, x := range left {
		if x.Network == id && len(users) < 8 {
			users = append(users, fmt.Sprintf("port %s (%s of %q)", x.ID, cmp.Or(x.DeviceOwner, "nobody"), x.DeviceID))
		}
	}
	if len(users) == 0 {
		return err // gone meanwhile, or something else is in the way
	}
	return provider.Faultf("NetworkInUse", "others use the network: %s: delete these first: %w", strings.Join(users, ", "), err)
}

// address returns the one of the list that is IPv4.
func ipv4(addresses []string) (netip.Addr, bool) {
	for _, s := range addresses {
		if a, err := netip.ParseAddr(s); err == nil && a.Is4() {
			return a, true
		}
	}
	return netip.Addr{}, false
}
