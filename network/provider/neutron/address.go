package neutron

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/openstack"
	"github.com/hypernetes/hypernetes/network/provider"
)

type metaCondition = metav1.Condition

// poolPrefix begins the name of the pool that an external network is.
const poolPrefix = "openstack/"

// EnsureAddress implements controller.AddressProvider.
func (p *Provider) EnsureAddress(ctx context.Context, f *v1alpha1.FloatingIP, target *v1alpha1.Port) (provider.AddressState, error) {
	st, err := p.ensureAddress(ctx, f, target)
	return st, explain(err, "FloatingIP "+f.Name+" at Neutron")
}

func tenantOf(o metav1.Object) string {
	return strings.TrimPrefix(o.GetNamespace(), v1alpha1.HomePrefix)
}

func (p *Provider) ensureAddress(ctx context.Context, f *v1alpha1.FloatingIP, target *v1alpha1.Port) (provider.AddressState, error) {
	c, project, err := p.client(ctx, tenantOf(f))
	if err != nil {
		return provider.AddressState{}, err
	}
	x, err := p.externalNetwork(ctx, c)
	if err != nil {
		return provider.AddressState{}, err
	}
	if f.Spec.Pool != "" && f.Spec.Pool != x.Name && f.Spec.Pool != x.ID {
		return provider.AddressState{}, provider.Faultf("NoPool", "pool: %q: addresses of Networks of provider %s are of the external network %s: leave pool out: %w",
			f.Spec.Pool, provider.Neutron, x.Name, errdefs.ErrInvalidArgument)
	}
	w, err := wishFor(f, target)
	if err != nil {
		return provider.AddressState{}, err
	}
	mark := p.mark(f.UID)
	var h *floatingIP
	if id := f.Status.ProviderID; id != "" {
		if h, err = get[floatingIP](ctx, c, floatingIPs, id); err != nil {
			return provider.AddressState{}, err
		}
		if h != nil && h.Project != project {
			h = nil // the tenant has another project by now
		}
	}
	var repaired []string
	if h == nil {
		all, err := owned[floatingIP](ctx, c, floatingIPs, project, mark, nil)
		if err != nil {
			return provider.AddressState{}, err
		}
		if len(all) > 0 {
			h = &all[0]
		}
	}
	if h == nil {
		b := map[string]any{"floating_network_id": x.ID, "project_id": project, "description": mark}
		for k, v := range w.body {
			b[k] = v
		}
		address := f.Spec.Address
		if f.Status.ProviderID != "" {
			// Others may know it by its address.
			address = f.Status.Address
			repaired = append(repaired, fmt.Sprintf("floating IP %s was deleted", f.Status.ProviderID))
		}
		if address != "" {
			b["floating_ip_address"] = address
		}
		atOnce, err := p.tagsAtOnce(ctx, c, floatingIPs)
		if err != nil {
			return provider.AddressState{}, err
		}
		if atOnce {
			b["tags"] = p.tags(f.UID)
		}
		if h, err = put[floatingIP](ctx, c, floatingIPs, "", b); err != nil {
			return provider.AddressState{}, refusedAddress(err, address, x.Name)
		}
	}
	st := provider.AddressState{ID: h.ID, Pool: poolPrefix + x.Name, Address: h.Address}
	if !w.holds(h) {
		if f.Status.Target != "" && f.Status.Target == w.address {
			repaired = append(repaired, fmt.Sprintf("floating IP %s led elsewhere", h.Address))
		}
		if h, err = put[floatingIP](ctx, c, floatingIPs, h.ID, w.update()); err != nil {
			return st, refusedAddress(err, h0(h), x.Name)
		}
	}
	if !sameSet(h.Tags, p.tags(f.UID)) {
		if err := tag(ctx, c, floatingIPs, h.ID, p.tags(f.UID)); err != nil {
			return st, err
		}
	}
	st.Repaired = strings.Join(repaired, "; ")
	return st, nil
}

func h0(h *floatingIP) string {
	if h == nil {
		return ""
	}
	return h.Address
}

// leadWish is where a floating IP should lead.
type leadWish struct {
	port, address string
	body          map[string]any
}

func wishFor(f *v1alpha1.FloatingIP, target *v1alpha1.Port) (leadWish, error) {
	if target == nil {
		return leadWish{}, nil
	}
	a, ok := ipv4(target.Spec.Addresses)
	if !ok {
		return leadWish{}, provider.Faultf("NoFamily", "Port %s has no address of IPv4, which floating IPs of Neutron are: %w", target.Name, errdefs.ErrInvalidArgument)
	}
	if target.Status.ProviderPortID == "" {
		return leadWish{}, provider.Faultf("NotPlugged", "Port %s is not at Neutron yet: %w", target.Name, errdefs.ErrFailedPrecondition)
	}
	w := leadWish{port: target.Status.ProviderPortID, address: a.String()}
	w.body = map[string]any{"port_id": w.port, "fixed_ip_address": w.address}
	return w, nil
}

func (w leadWish) holds(h *floatingIP) bool {
	if w.port == "" {
		return h.Port == nil || *h.Port == ""
	}
	return h.Port != nil && *h.Port == w.port && h.Fixed != nil && *h.Fixed == w.address
}

func (w leadWish) update() map[string]any {
	if w.port == "" {
		return map[string]any{"port_id": nil}
	}
	return w.body
}

// refusedAddress says what a tenant can do about it.
func refusedAddress(err error, address, external string) error {
	kind := openstack.TypeOf(err)
	switch {
	case kind == "ExternalGatewayForFloatingIPNotFound":
		return provider.Faultf("NoRouter", "the target's Network has no router to the external network %s: give the Network spec.egress: SNAT: %w", external, err)
	case kind == "FloatingIPPortAlreadyAssociated", kind == "FloatingIpPortAlreadyAssociated":
		return provider.Faultf("TargetTaken", "the target has another floating IP at Neutron: take that away, or choose another target: %w", err)
	case kind == "OverQuota":
		return err
	case errdefs.IsAlreadyExists(err), errdefs.IsConflict(err) && address != "":
		return provider.Faultf("AddressInUse", "address: %s is taken at Neutron: ask for another, or for none: %w", address, err)
	case kind == "InvalidIpForNetwork", kind == "InvalidIpForSubnet":
		return provider.Faultf("AddressNotInPool", "address: %s is not in the external network %s: %w", address, external, err)
	case errdefs.IsResourceExhausted(err):
		return provider.Faultf("PoolExhausted", "the external network %s has no free address: release one, or ask the cloud's operator for more: %w", external, err)
	}
	return err
}

// ReleaseAddress implements controller.AddressProvider.
func (p *Provider) ReleaseAddress(ctx context.Context, f *v1alpha1.FloatingIP) error {
	return explain(p.releaseAddress(ctx, f), "release FloatingIP "+f.Name+" at Neutron")
}

func (p *Provider) releaseAddress(ctx context.Context, f *v1alpha1.FloatingIP) error {
	c, project, err := p.client(ctx, tenantOf(f))
	if provider.Reason(err, "") == noProject && f.Status.ProviderID == "" {
		return nil
	} else if err != nil {
		return err
	}
	if id := f.Status.ProviderID; id != "" {
		h, err := get[floatingIP](ctx, c, floatingIPs, id)
		if err != nil {
			return err
		}
		if h != nil && h.Project == project {
			if err := remove(ctx, c, floatingIPs, id); err != nil {
				return err
			}
		}
	}
	all, err := owned[floatingIP](ctx, c, floatingIPs, project, p.mark(f.UID), nil)
	if err != nil {
		return err
	}
	for _, h := range all {
		if err := remove(ctx, c, floatingIPs, h.ID); err != nil {
			return err
		}
	}
	return nil
}
