// Package controller owns the cluster's side of Networks: the reconcilers of Network,
// Port, FloatingIP, AddressPool and of the external addresses of Services. All are
// level-triggered: what they find decides, not what happened. It must not know nodes'
// links, rules or daemons.
package controller

import (
	"context"
	"fmt"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/manager"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/claim"
	"github.com/hypernetes/hypernetes/network/provider"
	"github.com/hypernetes/hypernetes/network/subnet"
)

// Provider carries Networks. Every method may be called again after it succeeded, and
// after a controller that called it died.
type Provider interface {
	// Name is what spec.provider says.
	Name() string
	// Ensure makes the provider's side of n as n says, and puts right what differs. An error
	// of class errdefs.ErrInvalidArgument is the tenant's to mend, errdefs.ErrUnavailable
	// passes by itself.
	Ensure(ctx context.Context, n *v1alpha1.Network, subnets []v1alpha1.SubnetStatus) (provider.State, error)
	// Release removes all of n there is at the provider, if anything.
	Release(ctx context.Context, n *v1alpha1.Network) error
}

// PortProvider is a Provider that has ports of its own. Errors are as Ensure's; a
// provider.Fault among them tells its reason.
type PortProvider interface {
	Provider
	// EnsurePort makes the provider's port of x, in a Network that Ensure made, with just
	// its addresses, plugged where it says, and puts right what differs.
	EnsurePort(ctx context.Context, n *v1alpha1.Network, x *v1alpha1.Port) (provider.PortState, error)
	// ReleasePort removes it, if there is one.
	ReleasePort(ctx context.Context, x *v1alpha1.Port) error
	// Drifted names those of a Network's Ports for which EnsurePort has something to do or
	// to tell.
	Drifted(ctx context.Context, n *v1alpha1.Network, all []v1alpha1.Port) ([]string, error)
}

// StrayProvider is a PortProvider that finds ports again which nobody here knows: of a
// request that was carried out long after it had been given up, when its Port was gone.
type StrayProvider interface {
	PortProvider
	// Strays are the ports of a Network, by ID, that were made for Ports which are none of
	// all, with these Ports' UIDs.
	Strays(ctx context.Context, n *v1alpha1.Network, all []v1alpha1.Port) (map[string]types.UID, error)
	// RemoveStray removes one.
	RemoveStray(ctx context.Context, n *v1alpha1.Network, id string) error
}

// AddressProvider is a Provider that has external addresses of its own, for Networks that
// it carries.
type AddressProvider interface {
	Provider
	// EnsureAddress gives f an address, if it has none, and leads it to target, or nowhere.
	// f's status is what came of it the last time.
	EnsureAddress(ctx context.Context, f *v1alpha1.FloatingIP, target *v1alpha1.Port) (provider.AddressState, error)
	// ReleaseAddress gives it up, if there is one.
	ReleaseAddress(ctx context.Context, f *v1alpha1.FloatingIP) error
}

// Collector is a Provider that finds again what it made, whatever has become of whom it
// made it for.
type Collector interface {
	Provider
	// Made lists what this cluster made in a tenant's project, in the order in which it can
	// be removed. Of no tenant ("") it lists what the cloud tells of all projects, which may
	// be nothing.
	Made(ctx context.Context, tenant string) ([]provider.Resource, error)
	// Unmake removes one, if it still is what Made said; of the same tenant.
	Unmake(ctx context.Context, tenant string, x provider.Resource) error
}

// Balancer is a Provider that knows whether its cloud has load balancers of its own.
type Balancer interface {
	Balances(ctx context.Context, tenant string) (bool, error)
}

// Options of the reconcilers.
type Options struct {
	Limits subnet.Limits
	// Providers, the first of which is the default.
	Providers []Provider
	Claims    claim.Store
	// PortGrace is how long a Port outlives its Pod before it is taken for forgotten.
	PortGrace time.Duration
	// Retry is after how long what could not be done is tried again unasked.
	Retry time.Duration
	// Sweep is how often claims of objects that are gone are looked for.
	Sweep time.Duration
	// Resync is how often what others may change at a provider is compared.
	Resync time.Duration
	// Leftovers is how often what providers made for objects that are gone is looked for. It
	// is removed when it is found for the second time.
	Leftovers time.Duration
	// Poll is how often a Port that is about to be wired is looked at.
	Poll time.Duration
}

func (o *Options) defaults(m manager.Manager) {
	if o.PortGrace == 0 {
		o.PortGrace = time.Minute
	}
	if o.Retry == 0 {
		o.Retry = 15 * time.Second
	}
	if o.Sweep == 0 {
		o.Sweep = time.Minute
	}
	if o.Resync == 0 {
		o.Resync = time.Minute
	}
	if o.Leftovers == 0 {
		o.Leftovers = 5 * o.Resync
	}
	if o.Poll == 0 {
		o.Poll = 500 * time.Millisecond
	}
	if o.Claims.Writer == nil {
		o.Claims = claim.Store{Writer: m.GetClient(), Reader: m.GetAPIReader(), Cache: m.GetClient()}
	}
}

// Setup registers the reconcilers. The index of package binding must be there.
func Setup(ctx context.Context, m manager.Manager, o Options) error {
	if len(o.Providers) == 0 {
		return fmt.Errorf("no provider of networks")
	}
	o.defaults(m)
	if err := indexes(ctx, m.GetFieldIndexer()); err != nil {
		return err
	}
	base := base{client: m.GetClient(), live: m.GetAPIReader(), events: m.GetEventRecorder("h8s-controller"), o: o}
	for _, setup := range []func(manager.Manager) error{
		(&networks{base}).setup, (&ports{base: base}).setup, (&pools{base}).setup,
		(&floatingIPs{base}).setup, (&services{base}).setup, (&fronts{base: base}).setup, (&providerPorts{base: base}).setup,
	} {
		if err := setup(m); err != nil {
			return err
		}
	}
	if err := m.Add(&leftovers{base: base}); err != nil {
		return err
	}
	return m.Add(&sweeper{base})
}

// base is what every reconciler has.
type base struct {
	client client.Client
	// live asks the API server.
	live   client.Reader
	events events.EventRecorder
	o      Options
}

// portProvider is the one that carries n, if it has ports of its own.
func (b base) portProvider(n *v1alpha1.Network) (PortProvider, bool) {
	for _, p := range b.o.Providers {
		if p.Name() == n.Status.Provider {
			pp, ok := p.(PortProvider)
			return pp, ok
		}
	}
	return nil, false
}

// Indexes of the cache.
const (
	// indexNetwork finds Ports and TenantNamespaces by their Network, within a home.
	indexNetwork = "spec.network"
	// indexPod finds Ports by "<namespace>/<name>" of their Pod.
	indexPod = "spec.pod"
	// indexService finds Ports by "<namespace>/<name>" of their Service.
	indexService = "spec.service"
	// indexNode finds Ports by node.
	indexNode = "spec.node"
)

func indexes(ctx context.Context, i client.FieldIndexer) error {
	port := func(get func(*v1alpha1.Port) string) client.IndexerFunc {
		return func(o client.Object) []string {
			if v := get(o.(*v1alpha1.Port)); v != "" {
				return []string{v}
			}
			return nil
		}
	}
	for name, f := range map[string]client.IndexerFunc{
		indexNetwork: port(func(p *v1alpha1.Port) string { return p.Spec.Network }),
		indexNode:    port(func(p *v1alpha1.Port) string { return p.Spec.Node }),
		indexService: port(func(p *v1alpha1.Port) string {
			if p.Spec.Service == nil {
				return ""
			}
			return p.Spec.Service.Namespace + "/" + p.Spec.Service.Name
		}),
		indexPod: port(func(p *v1alpha1.Port) string {
			if p.Spec.Pod == nil {
				return ""
			}
			return p.Spec.Pod.Namespace + "/" + p.Spec.Pod.Name
		}),
	} {
		if err := i.IndexField(ctx, &v1alpha1.Port{}, name, f); err != nil {
			return err
		}
	}
	return i.IndexField(ctx, &v1alpha1.TenantNamespace{}, indexNetwork, func(o client.Object) []string {
		return []string{o.(*v1alpha1.TenantNamespace).Spec.Network}
	})
}

// note makes an event, which holds 1024 bytes.
func (b base) note(obj runtime.Object, kind, reason, action, format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if len(text) > 1000 {
		text = text[:1000] + "…"
	}
	b.events.Eventf(obj, nil, kind, reason, action, "%s", text)
}

// set puts a condition and says whether its status or reason changed, which is worth an
// event.
func set(conditions *[]metav1.Condition, generation int64, kind string, status metav1.ConditionStatus, reason, message string) bool {
	was := meta.FindStatusCondition(*conditions, kind)
	news := was == nil || was.Status != status || was.Reason != reason
	meta.SetStatusCondition(conditions, metav1.Condition{
		Type: kind, Status: status, Reason: reason, Message: message, ObservedGeneration: generation,
	})
	return news
}

// listed joins names, the first few of them.
func listed(names []string) string {
	const most = 8
	text := ""
	for i, n := range names {
		if i == most {
			return fmt.Sprintf("%s and %d more", text, len(names)-most)
		}
		if i > 0 {
			text += ", "
		}
		text += n
	}
	return text
}
