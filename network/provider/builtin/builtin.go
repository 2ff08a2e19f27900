// Package builtin owns the provider that needs no other software: the nodes' own overlay,
// for which a Network needs a number only. It must not know how the nodes build it.
package builtin

import (
	"context"
	"fmt"
	"math/rand/v2"

	"github.com/containerd/errdefs"
	"sigs.k8s.io/controller-runtime/pkg/log"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/claim"
	"github.com/hypernetes/hypernetes/network/controller"
	"github.com/hypernetes/hypernetes/network/provider"
	"github.com/hypernetes/hypernetes/network/subnet"
)

var _ controller.Provider = (*Provider)(nil)

// VNIs are taken at random, so that one that was given back is not met again soon by who
// still has packets for it. The lowest 4096 are left to others on the same fabric.
const (
	minVNI   = 4097
	maxVNI   = 1<<24 - 1
	attempts = 16
)

// Provider claims VNIs.
type Provider struct {
	Claims claim.Store
	// MaxMTU of Pods' NICs.
	MaxMTU int32
	// Random is a number below n; math/rand's if nil.
	Random func(n int32) int32
}

// New makes the provider for a fabric.
func New(claims claim.Store, limits subnet.Limits) *Provider {
	return &Provider{Claims: claims, MaxMTU: limits.MaxMTU()}
}

// Name implements controller.Provider.
func (p *Provider) Name() string { return provider.Builtin }

// Ensure implements controller.Provider.
func (p *Provider) Ensure(ctx context.Context, n *v1alpha1.Network, subnets []v1alpha1.SubnetStatus) (provider.State, error) {
	if n.Spec.ProviderNetworkID != "" {
		return provider.State{}, fmt.Errorf("the built-in provider has no networks to adopt: %w", errdefs.ErrInvalidArgument)
	}
	st := provider.State{MTU: p.MaxMTU, Subnets: subnets}
	if n.Spec.MTU > 0 && (st.MTU == 0 || n.Spec.MTU < st.MTU) {
		st.MTU = n.Spec.MTU
	}
	var err error
	st.VNI, st.Repaired, err = p.vni(ctx, n)
	return st, err
}

func (p *Provider) vni(ctx context.Context, n *v1alpha1.Network) (int32, string, error) {
	req := claim.Request{Owner: claim.OwnerOf(claim.KindNetwork, n), Tenant: n.Status.Tenant}
	repaired := ""
	if was := n.Status.VNI; was != 0 {
		again := req
		again.Explicit = true
		switch err := p.Claims.ClaimVNI(ctx, was, again); {
		case err == nil:
			return was, "", nil
		case !errdefs.IsAlreadyExists(err):
			return 0, "", err
		}
		// Two Networks must not meet, whatever it costs this one.
		repaired = fmt.Sprintf("VNI %d belongs to another Network", was)
	}
	// One that was claimed by a controller that died before it wrote it down.
	owned, err := p.Claims.Owned(ctx, claim.VNI, req.Owner)
	if err != nil {
		return 0, "", err
	}
	if len(owned) > 0 {
		return owned[0].VNI, repaired, nil
	}
	random := p.Random
	if random == nil {
		random = rand.Int32N
	}
	for range attempts {
		vni := minVNI + random(maxVNI-minVNI+1)
		err := p.Claims.ClaimVNI(ctx, vni, req)
		if err == nil {
			log.FromContext(ctx).Info("claimed VNI", "vni", vni)
			return vni, repaired, nil
		}
		if !errdefs.IsAlreadyExists(err) && !errdefs.IsUnavailable(err) {
			return 0, "", err
		}
	}
	return 0, "", fmt.Errorf("no free VNI found in %d attempts: %w", attempts, errdefs.ErrUnavailable)
}

// Release implements controller.Provider.
func (p *Provider) Release(ctx context.Context, n *v1alpha1.Network) error {
	owned, err := p.Claims.Owned(ctx, claim.VNI, claim.OwnerOf(claim.KindNetwork, n))
	if err != nil {
		return err
	}
	for _, c := range owned {
		if err := p.Claims.Release(ctx, c, 0); err != nil {
			return err
		}
	}
	return nil
}
