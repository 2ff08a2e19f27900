package ipam

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"

	"github.com/containerd/errdefs"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
)

// ErrQuota says that the tenant may not have another Port.
var ErrQuota = errors.New("quota exceeded")

// Ports is what claims are made with; reads must come from the API server itself.
type Ports interface {
	Get(ctx context.Context, key client.ObjectKey, obj client.Object, opts ...client.GetOption) error
	Create(ctx context.Context, obj client.Object, opts ...client.CreateOption) error
	Update(ctx context.Context, obj client.Object, opts ...client.UpdateOption) error
}

// Claimer makes Ports.
type Claimer struct {
	Ports Ports
	// Node that plugs them.
	Node string
	// Attempts bounds how often another address is tried; 64 if 0.
	Attempts int
}

// Claim asks for a Port.
type Claim struct {
	Network *v1alpha1.Network
	// Pod's NIC it is for.
	Pod v1alpha1.PodRef
	// Addresses asked for; any if empty. Port names one claimed beforehand instead.
	Addresses []netip.Addr
	Port      string
	// Taken tells of addresses known to be in use; it may be behind.
	Taken func(netip.Addr) bool
	// Provider says that the Network's provider has a port of its own for each Port: it
	// chooses the MAC, and the Port goes after its port.
	Provider bool
}

// Claim creates the Port, or takes the one that was claimed beforehand or that the same
// Pod has already. It fails with ErrExhausted if no address is left, with ErrQuota if the
// API server forbids another Port, with errdefs.ErrAlreadyExists if somebody else has the
// address asked for, and with errdefs.ErrInvalidArgument if it cannot be had at all.
func (c Claimer) Claim(ctx context.Context, want Claim) (*v1alpha1.Port, error) {
	if want.Port != "" {
		return c.take(ctx, want, want.Port)
	}
	subnets, err := Subnets(want.Network)
	if err != nil {
		return nil, err
	}
	if len(want.Addresses) > 0 {
		addresses, err := Request(subnets, want.Addresses)
		if err != nil {
			return nil, err
		}
		name := v1alpha1.PortName(want.Network.Name, addresses[0].String())
		// Kubernetes counts a creation that fails against the quota for minutes: what is
		// there already is not asked for again at each try.
		err = c.Ports.Get(ctx, client.ObjectKey{Namespace: want.Network.Namespace, Name: name}, &v1alpha1.Port{})
		if err == nil {
			return c.take(ctx, want, name)
		} else if !apierrors.IsNotFound(err) {
			return nil, fmt.Errorf("port %s: %w", name, err)
		}
		port, err := c.create(ctx, want, addresses)
		if apierrors.IsAlreadyExists(err) {
			return c.take(ctx, want, name)
		}
		return port, err
	}
	lost := map[netip.Addr]bool{}
	taken := func(a netip.Addr) bool { return lost[a] || want.Taken != nil && want.Taken(a) }
	r := rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64()))
	attempts := c.Attempts
	if attempts == 0 {
		attempts = 64
	}
	for range attempts {
		addresses, err := Choose(subnets, taken, r)
		if err != nil {
			return nil, err
		}
		port, err := c.create(ctx, want, addresses)
		if !apierrors.IsAlreadyExists(err) {
			return port, err
		}
		lost[addresses[0]] = true
	}
	return nil, fmt.Errorf("%d addresses were taken by others before they could be claimed: %w", attempts, errdefs.ErrUnavailable)
}

func (c Claimer) create(ctx context.Context, want Claim, addresses []netip.Addr) (*v1alpha1.Port, error) {
	n := want.Network
	pod := want.Pod
	port := &v1alpha1.Port{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: n.Namespace, Name: v1alpha1.PortName(n.Name, addresses[0].String()),
			Labels: map[string]string{v1alpha1.LabelNetwork: n.Name},
		},
		Spec: v1alpha1.PortSpec{
			Network: n.Name, NetworkUID: string(n.UID),
			MAC: MAC(n.Namespace+"/"+n.Name, addresses[0]).String(), Node: c.Node, Pod: &pod,
		},
	}
	if want.Provider {
		port.Spec.MAC, port.Finalizers = "", []string{v1alpha1.FinalizerProvider}
	}
	for _, a := range addresses {
		port.Spec.Addresses = append(port.Spec.Addresses, a.String())
	}
	switch err := c.Ports.Create(ctx, port); {
	case err == nil:
		return port, nil
	case apierrors.IsForbidden(err):
		return nil, fmt.Errorf("claim %s: %w: delete Pods or claimed Ports, or ask the operator to raise spec.quota.ports of the Tenant: %w", port.Name, ErrQuota, err)
	default:
		return nil, fmt.Errorf("claim %s: %w", port.Name, err)
	}
}

// take makes an existing Port this Pod's, if nobody else has it.
func (c Claimer) take(ctx context.Context, want Claim, name string) (*v1alpha1.Port, error) {
	port := &v1alpha1.Port{}
	if err := c.Ports.Get(ctx, client.ObjectKey{Namespace: want.Network.Namespace, Name: name}, port); err != nil {
		if apierrors.IsNotFound(err) && want.Port != "" {
			return nil, fmt.Errorf("port %s: there is none in %s: %w", name, want.Network.Namespace, errdefs.ErrInvalidArgument)
		}
		return nil, fmt.Errorf("port %s: %w", name, err)
	}
	switch {
	case port.Spec.Network != want.Network.Name:
		return nil, fmt.Errorf("port %s: belongs to network %s, not %s: %w", name, port.Spec.Network, want.Network.Name, errdefs.ErrInvalidArgument)
	case port.Spec.NetworkUID != "" && port.Spec.NetworkUID != string(want.Network.UID):
		return nil, fmt.Errorf("port %s: belongs to a former network of that name: delete it: %w", name, errdefs.ErrInvalidArgument)
	case port.DeletionTimestamp != nil:
		return nil, fmt.Errorf("port %s: is being deleted: %w", name, errdefs.ErrAlreadyExists)
	case port.Spec.Pod == nil && !port.Spec.Retain:
		return nil, fmt.Errorf("port %s: address %s is claimed by a Port without retain: set its spec.retain, or choose another: %w", name, port.Spec.Addresses[0], errdefs.ErrAlreadyExists)
	case port.Spec.Pod != nil && (port.Spec.Pod.UID != want.Pod.UID || port.Spec.Pod.Interface != want.Pod.Interface):
		return nil, fmt.Errorf("port %s: address %s is in use by Pod %s/%s: choose another, or delete that Pod: %w", name, port.Spec.Addresses[0], port.Spec.Pod.Namespace, port.Spec.Pod.Name, errdefs.ErrAlreadyExists)
	}
	// A claim made by hand need not say what we can work out; its addresses are what a
	// tenant wrote.
	if err := check(want.Network, port); err != nil {
		return nil, err
	}
	pod := want.Pod
	port.Spec.Pod, port.Spec.Node = &pod, c.Node
	if port.Spec.NetworkUID == "" {
		port.Spec.NetworkUID = string(want.Network.UID)
	}
	if port.Labels[v1alpha1.LabelNetwork] != want.Network.Name {
		if port.Labels == nil {
			port.Labels = map[string]string{}
		}
		port.Labels[v1alpha1.LabelNetwork] = want.Network.Name
	}
	// The version read goes along: who comes second is refused.
	if err := c.Ports.Update(ctx, port); err != nil {
		if apierrors.IsConflict(err) {
			return nil, fmt.Errorf("port %s: somebody else changed it meanwhile: %w: %w", name, errdefs.ErrAlreadyExists, err)
		}
		return nil, fmt.Errorf("port %s: %w", name, err)
	}
	return port, nil
}

// check tells whether a Port's addresses are those of a claim in the Network.
func check(n *v1alpha1.Network, port *v1alpha1.Port) error {
	subnets, err := Subnets(n)
	if err != nil {
		return err
	}
	addresses, err := Addresses(port)
	if err != nil {
		return err
	}
	full, err := Request(subnets, addresses[:1])
	if err != nil {
		return fmt.Errorf("port %s: %w", port.Name, err)
	}
	for i, a := range addresses {
		if i >= len(full) || full[i] != a {
			return fmt.Errorf("port %s: addresses %v: %s goes with %v: %w", port.Name, port.Spec.Addresses, addresses[0], full, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// Addresses reads a Port's addresses.
func Addresses(port *v1alpha1.Port) ([]netip.Addr, error) {
	out := make([]netip.Addr, 0, len(port.Spec.Addresses))
	for i, s := range port.Spec.Addresses {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return nil, fmt.Errorf("port %s/%s: addresses[%d]: %w: %w", port.Namespace, port.Name, i, err, errdefs.ErrInvalidArgument)
		}
		out = append(out, a)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("port %s/%s: no address: %w", port.Namespace, port.Name, errdefs.ErrInvalidArgument)
	}
	return out, nil
}
