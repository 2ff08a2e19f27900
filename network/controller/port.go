package controller

import (
	"context"
	"fmt"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/log"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
)

var _ reconcile.Reconciler = (*ports)(nil)

// ports takes back Ports whose Pod, node or Network is gone and whose node did not say so:
// ordinarily kubestack does at the Pod's end.
type ports struct {
	base
	mu sync.Mutex
	// since is when a Port was first seen without what it belongs to. A controller that
	// restarts begins to wait anew.
	since map[types.UID]time.Time
}

func (r *ports) setup(m manager.Manager) error {
	r.since = map[types.UID]time.Time{}
	pods, nodes := partial("Pod"), partial("Node")
	return ctrl.NewControllerManagedBy(m).Named("port").
		For(&v1alpha1.Port{}).
		WatchesMetadata(pods, handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) []reconcile.Request {
			return r.portsOf(ctx, client.MatchingFields{indexPod: o.GetNamespace() + "/" + o.GetName()})
		}), builder.WithPredicates(lifeOnly)).
		WatchesMetadata(nodes, handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) []reconcile.Request {
			return r.portsOf(ctx, client.MatchingFields{indexNode: o.GetName()})
		}), builder.WithPredicates(lifeOnly)).
		Watches(&v1alpha1.Network{}, handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) []reconcile.Request {
			return r.portsOf(ctx, client.InNamespace(o.GetNamespace()), client.MatchingFields{indexNetwork: o.GetName()})
		}), builder.WithPredicates(lifeOnly)).
		Complete(r)
}

func partial(kind string) *metav1.PartialObjectMetadata {
	o := &metav1.PartialObjectMetadata{}
	o.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind(kind))
	return o
}

// portsOf asks for the Ports that are found.
func (b base) portsOf(ctx context.Context, opts ...client.ListOption) []reconcile.Request {
	list := &v1alpha1.PortList{}
	if err := b.client.List(ctx, list, opts...); err != nil {
		return nil
	}
	var all []reconcile.Request
	for i := range list.Items {
		all = append(all, one(list.Items[i].Namespace, list.Items[i].Name)...)
	}
	return all
}

// Reconcile implements reconcile.Reconciler.
func (r *ports) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	p := &v1alpha1.Port{}
	if err := r.client.Get(ctx, req.NamespacedName, p); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	if !p.DeletionTimestamp.IsZero() {
		return reconcile.Result{}, nil // on its way
	}
	why, _, err := r.orphaned(ctx, r.client, p)
	if err != nil {
		return reconcile.Result{}, err
	}
	if wait := r.waited(p, why != ""); why == "" {
		return reconcile.Result{}, nil
	} else if wait > 0 {
		return reconcile.Result{RequeueAfter: wait}, nil
	}
	// The cache may be behind: a Pod that it does not know yet must keep its address.
	if err := r.live.Get(ctx, req.NamespacedName, p); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	why, whole, err := r.orphaned(ctx, r.live, p)
	if err != nil || why == "" {
		return reconcile.Result{}, err
	}
	logger := log.FromContext(ctx).WithValues("network", p.Spec.Network, "reason", why)
	if p.Spec.Retain && !whole {
		p.Spec.Node, p.Spec.Pod = "", nil
		if err := r.client.Update(ctx, p); err != nil {
			return reconcile.Result{}, ignoreLost(err)
		}
		logger.Info("port is free again")
		r.note(p, corev1.EventTypeNormal, "Freed", "Collect", "%s: the claimed Port is free again", why)
		return reconcile.Result{}, nil
	}
	uid, version := p.UID, p.ResourceVersion
	if err := r.client.Delete(ctx, p, client.Preconditions{UID: &uid, ResourceVersion: &version}); err != nil {
		return reconcile.Result{}, ignoreLost(err)
	}
	logger.Info("port deleted")
	r.note(p, corev1.EventTypeNormal, "Collected", "Collect", "%s: the Port was left over", why)
	return reconcile.Result{}, nil
}

// ignoreLost forgets that somebody else was faster: there will be an event of it.
func ignoreLost(err error) error {
	if apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// waited says how long is still to wait for a Port that belongs to nothing.
func (r *ports) waited(p *v1alpha1.Port, orphan bool) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !orphan {
		delete(r.since, p.UID)
		return 0
	}
	since, ok := r.since[p.UID]
	if !ok {
		// Those that went another way leave their entry: forget what is old.
		for uid, t := range r.since {
			if time.Since(t) > 10*r.o.PortGrace+time.Hour {
				delete(r.since, uid)
			}
		}
		since = time.Now()
		r.since[p.UID] = since
	}
	if wait := r.o.PortGrace - time.Since(since); wait > 0 {
		return wait
	}
	delete(r.since, p.UID)
	return 0
}

// orphaned says why a Port belongs to nothing, or nothing; whole that not even its
// Network is there.
func (r *ports) orphaned(ctx context.Context, from client.Reader, p *v1alpha1.Port) (why string, whole bool, err error) {
	n := &v1alpha1.Network{}
	err = from.Get(ctx, client.ObjectKey{Namespace: p.Namespace, Name: p.Spec.Network}, n)
	switch {
	case apierrors.IsNotFound(err):
		return fmt.Sprintf("Network %s is gone", p.Spec.Network), true, nil
	case err != nil:
		return "", false, err
	case p.Spec.NetworkUID != "" && p.Spec.NetworkUID != string(n.UID):
		return fmt.Sprintf("Network %s was made anew", p.Spec.Network), true, nil
	}
	if p.Spec.Pod == nil {
		return "", false, nil
	}
	pod := partial("Pod")
	err = from.Get(ctx, client.ObjectKey{Namespace: p.Spec.Pod.Namespace, Name: p.Spec.Pod.Name}, pod)
	name := p.Spec.Pod.Namespace + "/" + p.Spec.Pod.Name
	switch {
	case apierrors.IsNotFound(err):
		return fmt.Sprintf("Pod %s is gone", name), false, nil
	case err != nil:
		return "", false, err
	case string(pod.UID) != p.Spec.Pod.UID:
		return fmt.Sprintf("Pod %s was made anew", name), false, nil
	}
	if p.Spec.Node == "" {
		return "", false, nil
	}
	// A node that is not ready keeps its Ports: its Pods may well run.
	if err := from.Get(ctx, client.ObjectKey{Name: p.Spec.Node}, partial("Node")); apierrors.IsNotFound(err) {
		return fmt.Sprintf("Node %s is gone", p.Spec.Node), false, nil
	} else if err != nil {
		return "", false, err
	}
	return "", false, nil
}
