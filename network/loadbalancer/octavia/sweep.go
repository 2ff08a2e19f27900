package octavia

import (
	"context"
	"net/url"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"sigs.k8s.io/controller-runtime/pkg/log"
	"sigs.k8s.io/controller-runtime/pkg/manager"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/openstack"
)

var (
	_ manager.Runnable               = (*reconciler)(nil)
	_ manager.LeaderElectionRunnable = (*reconciler)(nil)
)

// sweepEvery is how many resyncs pass between two sweeps.
const sweepEvery = 5

// NeedLeaderElection implements manager.LeaderElectionRunnable.
func (r *reconciler) NeedLeaderElection() bool { return true }

// Start implements manager.Runnable: it looks for load balancers of Services that are gone
// and told nobody, as who may edit a Service may take its finalizer away. It removes those
// that it finds for the second time.
func (r *reconciler) Start(ctx context.Context) error {
	seen := map[string]bool{}
	for {
		list := &v1alpha1.TenantList{}
		now := map[string]bool{}
		if err := r.client.List(ctx, list); err != nil {
			now = seen
		}
		for i := range list.Items {
			if t := &list.Items[i]; t.Spec.Keystone != nil {
				if err := r.sweep(ctx, t.Name, seen, now); err != nil && ctx.Err() == nil {
					log.FromContext(ctx).V(1).Info("load balancers that are left over could not be looked for", "tenant", t.Name, "reason", err.Error())
				}
			}
		}
		seen = now
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait.Jitter(sweepEvery*r.o.Resync, 0.2)):
		}
	}
}

// sweep looks at one tenant's. seen are those found the last time, now becomes those found
// this time.
func (r *reconciler) sweep(ctx context.Context, tenant string, seen, now map[string]bool) error {
	c, project, err := r.cloud(ctx, tenant)
	if err != nil {
		return err
	}
	all, err := openstack.List[balancer](ctx, c, of(balancers), url.Values{"project_id": {project}})
	if err != nil {
		return err
	}
	all = slices.DeleteFunc(all, func(b balancer) bool {
		return b.Project != project || !strings.HasPrefix(b.Description, r.mark("")) || strings.HasPrefix(b.Provisioning, "PENDING_")
	})
	if len(all) == 0 {
		return nil
	}
	// Asked after the load balancers were: none of those is of a Service that came later.
	services := &corev1.ServiceList{}
	if err := r.live.List(ctx, services); err != nil {
		return err
	}
	for _, b := range all {
		uid := types.UID(strings.TrimPrefix(b.Description, r.mark("")))
		if slices.ContainsFunc(services.Items, func(s corev1.Service) bool { return s.UID == uid }) {
			continue
		}
		if now[b.ID] = true; !seen[b.ID] {
			continue
		}
		log.FromContext(ctx).Info("load balancer of a Service that is gone", "tenant", tenant, "loadbalancer", b.ID)
		gone := &corev1.Service{}
		gone.Name, gone.UID = "gone", uid
		f, _ := r.floating(gone, tenant, nil)
		if err := r.o.Addresses.ReleaseAddress(ctx, f); err != nil {
			return err
		}
		if err := openstack.Remove(ctx, c, of(balancers), b.ID, url.Values{"cascade": {"true"}}); err != nil {
			return err
		}
	}
	return nil
}
