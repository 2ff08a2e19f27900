package kubestack

import (
	"context"

	"github.com/hypernetes/hypernetes/network/dns"
	"github.com/hypernetes/hypernetes/network/edge"
	"github.com/hypernetes/hypernetes/network/netns"
	"github.com/hypernetes/hypernetes/network/policy"
	"github.com/hypernetes/hypernetes/network/service"
)

var (
	_ Edges = edges{}
	_ Edge  = (*edge.Edge)(nil)
	_ Plane = plane{}
)

// edges gives out *edge.Edge as an Edge.
type edges struct{ *edge.Manager }

func (e edges) Ensure(ctx context.Context, s edge.Spec) (Edge, error) {
	return some(e.Manager.Ensure(ctx, s))
}

func (e edges) Get(id string) (Edge, error) { return some(e.Manager.Get(id)) }

// some keeps a nil pointer from becoming an interface that is not nil.
func some(e *edge.Edge, err error) (Edge, error) {
	if err != nil {
		return nil, err
	}
	return e, nil
}

// plane is the kernel's.
type plane struct{}

func (plane) Services(ns *netns.NS, o service.Options) (Services, error) { return service.Open(ns, o) }

func (plane) Policies(ns *netns.NS) (Policies, error) { return policy.Open(ns) }

func (plane) Resolver(ctx context.Context, c dns.Config) (Resolver, error) { return dns.Serve(ctx, c) }
