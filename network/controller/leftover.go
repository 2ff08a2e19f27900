package controller

import (
	"context"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/log"
	"sigs.k8s.io/controller-runtime/pkg/manager"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/provider"
)

var (
	_ manager.Runnable               = (*leftovers)(nil)
	_ manager.LeaderElectionRunnable = (*leftovers)(nil)
)

// leftovers removes what providers made for objects that are gone and were not there to be
// released: somebody took their finalizers away while no controller ran.
type leftovers struct {
	base
	// seen are those found the last time, by ID.
	seen map[string]bool
}

// NeedLeaderElection implements manager.LeaderElectionRunnable.
func (r *leftovers) NeedLeaderElection() bool { return true }

// Start implements manager.Runnable.
func (r *leftovers) Start(ctx context.Context) error {
	if !slices.ContainsFunc(r.o.Providers, func(p Provider) bool { _, ok := p.(Collector); return ok }) {
		return nil
	}
	for {
		if err := r.collect(ctx); err != nil && ctx.Err() == nil {
			log.FromContext(ctx).Error(err, "look for leftovers at providers")
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait.Jitter(r.o.Leftovers, 0.2)):
		}
	}
}

// leftover is one with who can remove it.
type leftover struct {
	provider.Resource
	from   Collector
	tenant *v1alpha1.Tenant
}

func (r *leftovers) collect(ctx context.Context) error {
	found, whole, err := r.made(ctx)
	if err != nil {
		return err
	}
	// What the cache knows whom it is for is most of it; the API server is asked about the
	// rest, after the provider was: what was made before that is for somebody it knows.
	for _, from := range []client.Reader{r.client, r.live} {
		if len(found) == 0 {
			break
		}
		u, err := r.users(ctx, from)
		if err != nil {
			return err
		}
		found = slices.DeleteFunc(found, func(x leftover) bool { return u.owners[x.Owner] || u.ids[x.ID] })
	}
	seen := map[string]bool{}
	if !whole { // what was not looked at was seen all the same
		for id := range r.seen {
			seen[id] = true
		}
	}
	for _, x := range found {
		if seen[x.ID] = true; !r.seen[x.ID] {
			continue
		}
		logger := log.FromContext(ctx).WithValues("provider", x.from.Name(), "kind", x.Kind, "id", x.ID, "project", x.Project, "owner", x.Owner)
		if err := x.from.Unmake(ctx, x.name(), x.Resource); err != nil {
			logger.Info("leftover could not be removed", "reason", err.Error())
			continue
		}
		delete(seen, x.ID)
		logger.Info("leftover removed")
		if x.tenant != nil {
			r.note(x.tenant, corev1.EventTypeWarning, "Collected", "Collect", "%s %s at provider %s was made for an object that is gone (UID %s): removed",
				strings.TrimSuffix(x.Kind, "s"), x.ID, x.from.Name(), x.Owner)
		}
	}
	r.seen = seen
	return nil
}

func (x leftover) name() string {
	if x.tenant == nil {
		return ""
	}
	return x.tenant.Name
}

// made lists what providers made; whole says that all of them told.
func (r *leftovers) made(ctx context.Context) (all []leftover, whole bool, err error) {
	list := &v1alpha1.TenantList{}
	if err := r.client.List(ctx, list); err != nil {
		return nil, false, err
	}
	var tenants []*v1alpha1.Tenant
	for i := range list.Items {
		if list.Items[i].Spec.Keystone != nil {
			tenants = append(tenants, &list.Items[i])
		}
	}
	whole = true
	told := map[string]bool{}
	// The last one is what is in the projects of nobody.
	for _, t := range append(tenants, nil) {
		for _, p := range r.o.Providers {
			c, ok := p.(Collector)
			if !ok {
				continue
			}
			x := leftover{from: c, tenant: t}
			made, err := c.Made(ctx, x.name())
			if err != nil {
				whole = false
				log.FromContext(ctx).V(1).Info("leftovers could not be looked for", "provider", p.Name(), "tenant", x.name(), "reason", err.Error())
			}
			for _, x.Resource = range made {
				if !told[x.ID] {
					told[x.ID] = true
					all = append(all, x)
				}
			}
		}
	}
	return all, whole, ctx.Err()
}

// users are the objects that something may have been made for: owners those that it was
// made for, ids what they name, which may be another's, as a Network that adopts one does.
type users struct {
	owners map[types.UID]bool
	ids    map[string]bool
}

func (r *leftovers) users(ctx context.Context, from client.Reader) (users, error) {
	u := users{map[types.UID]bool{}, map[string]bool{}}
	networks, ports, floating, services := &v1alpha1.NetworkList{}, &v1alpha1.PortList{}, &v1alpha1.FloatingIPList{}, &corev1.ServiceList{}
	for _, l := range []client.ObjectList{networks, ports, floating, services} {
		if err := from.List(ctx, l); err != nil {
			return u, err
		}
	}
	for i := range networks.Items {
		n := &networks.Items[i]
		u.owners[n.UID] = true
		for _, id := range []string{n.Spec.ProviderNetworkID, n.Status.ProviderNetworkID, n.Status.ProviderRouterID, n.Status.ProviderGroupID} {
			u.ids[id] = true
		}
	}
	for i := range ports.Items {
		u.owners[ports.Items[i].UID], u.ids[ports.Items[i].Status.ProviderPortID] = true, true
	}
	for i := range floating.Items {
		u.owners[floating.Items[i].UID], u.ids[floating.Items[i].Status.ProviderID] = true, true
	}
	for i := range services.Items {
		// One that is no load balancer any more, and was none that is being taken away, has none.
		if s := &services.Items[i]; s.Spec.Type == corev1.ServiceTypeLoadBalancer ||
			slices.ContainsFunc(s.Finalizers, func(f string) bool { return strings.HasPrefix(f, "hypernetes.io/") }) {
			u.owners[s.UID] = true
		}
	}
	return u, nil
}
