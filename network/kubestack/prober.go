package kubestack

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"

	api "github.com/hypernetes/hypernetes/api/probe/v1"
	"github.com/hypernetes/hypernetes/network/probe"
)

// Prober carries probes out (package probe).
type Prober func(ctx context.Context, d probe.Dialer, pod netip.Addr, r probe.Request) (code int32, output string)

// prober serves the shim.
type prober struct{ d *Daemon }

var _ api.ProberService = (*prober)(nil)

// Probe dials the Pod from its edge. Which Pod, the shim says; where it is, only we know.
func (p *prober) Probe(ctx context.Context, q *api.ProbeRequest) (*api.ProbeResponse, error) {
	out, err := p.probe(ctx, q)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return out, nil
}

func (p *prober) probe(ctx context.Context, q *api.ProbeRequest) (*api.ProbeResponse, error) {
	if len(q.Probe) > api.MaxArgument {
		return nil, fmt.Errorf("probe: %d bytes, at most %d: %w", len(q.Probe), api.MaxArgument, errdefs.ErrInvalidArgument)
	}
	r, err := probe.Decode(q.Probe)
	if err != nil {
		return nil, err
	}
	for _, a := range p.d.records.list() {
		if a.PodUID != q.PodUid || q.PodUid == "" {
			continue
		}
		for _, n := range a.NICs {
			if !n.Default || len(n.Addresses) == 0 {
				continue
			}
			e, err := p.d.edges.Get(n.Edge)
			if err != nil {
				return nil, err
			}
			code, text := p.d.prober(ctx, e.NS(), n.Addresses[0], r)
			if len(text) > api.MaxOutput {
				text = text[:api.MaxOutput]
			}
			return &api.ProbeResponse{ExitCode: code, Output: text}, nil
		}
	}
	return nil, fmt.Errorf("pod %s/%s (%s) has no interface on this node: %w", q.PodNamespace, q.PodName, q.PodUid, errdefs.ErrNotFound)
}
