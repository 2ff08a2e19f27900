package neutron

import (
	"context"
	"net/url"
	"strings"

	"k8s.io/apimachinery/pkg/types"

	"github.com/hypernetes/hypernetes/network/openstack"
	"github.com/hypernetes/hypernetes/network/provider"
)

// Made implements controller.Collector. What carries our mark is ours; in the tenant's
// project it is found by that alone, elsewhere by the tag first, as Neutron finds no
// beginnings of descriptions.
func (p *Provider) Made(ctx context.Context, tenant string) ([]provider.Resource, error) {
	all, err := p.made(ctx, tenant)
	return all, explain(err, "look for what is left over at Neutron")
}

func (p *Provider) made(ctx context.Context, tenant string) ([]provider.Resource, error) {
	c, project, err := p.collecting(ctx, tenant)
	if c == nil || err != nil {
		return nil, err
	}
	q := url.Values{"project_id": {project}}
	if tenant == "" {
		q = url.Values{"tags": {p.tags("")[1]}}
	}
	var out []provider.Resource
	for _, kind := range []string{floatingIPs, ports, routers, networks, groups} {
		all, err := list[made](ctx, c, kind, q)
		if err != nil {
			return nil, err
		}
		for _, x := range all {
			if uid, ok := p.ownerOf(kind, x); ok && (tenant == "" || x.Project == project) {
				out = append(out, provider.Resource{Kind: kind, ID: x.ID, Project: x.Project, Owner: uid})
			}
		}
	}
	return out, nil
}

// collecting is a client for a tenant's project, or for all: there is none where a token is
// of one project.
func (p *Provider) collecting(ctx context.Context, tenant string) (*openstack.Client, string, error) {
	switch {
	case tenant != "":
		return p.client(ctx, tenant)
	case p.o.Cloud.Profile() != openstack.Full:
		return nil, "", nil
	}
	c, err := p.o.Cloud.Client(ctx, openstack.Network, "")
	return c, "", err
}

// made is a resource of any kind. Only ports have a device_owner.
type made struct {
	object
	DeviceOwner string `json:"device_owner"`
}

// ownerOf reads whom a resource was made for, if it was made by this cluster.
func (p *Provider) ownerOf(kind string, x made) (types.UID, bool) {
	uid, ours := strings.CutPrefix(x.Description, p.mark(""))
	if kind == ports && x.DeviceOwner != deviceOwner && x.DeviceOwner != frontOwner {
		return "", false
	}
	return types.UID(uid), ours && uid != ""
}

// Unmake implements controller.Collector.
func (p *Provider) Unmake(ctx context.Context, tenant string, x provider.Resource) error {
	return explain(p.unmake(ctx, tenant, x), "remove "+single(x.Kind)+" "+x.ID+", which is left over at Neutron")
}

func (p *Provider) unmake(ctx context.Context, tenant string, x provider.Resource) error {
	c, _, err := p.collecting(ctx, tenant)
	if c == nil || err != nil {
		return err
	}
	h, err := get[made](ctx, c, x.Kind, x.ID)
	if err != nil || h == nil {
		return err
	}
	if uid, ok := p.ownerOf(x.Kind, *h); !ok || uid != x.Owner || h.Project != x.Project {
		return nil // somebody has it for something else
	}
	switch x.Kind {
	case routers:
		return releaseRouter(ctx, c, x.ID)
	case networks:
		return releaseNetwork(ctx, c, x.ID)
	}
	return remove(ctx, c, x.Kind, x.ID)
}
