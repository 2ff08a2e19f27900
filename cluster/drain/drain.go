// Package drain owns taking a node out of service: no new Pods, those there evicted as
// their PodDisruptionBudgets allow, and its object deleted. It must not know whether the
// node runs.
package drain

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/cluster/apiclient"
)

// API is the little of the API server that is needed.
type API interface {
	Get(ctx context.Context, path string, out any) error
	Create(ctx context.Context, path string, object, out any) error
	Merge(ctx context.Context, path string, patch any) error
	Delete(ctx context.Context, path string) error
}

const pause = time.Second

// Cordon keeps new Pods off the node, or lets them on again.
func Cordon(ctx context.Context, api API, node string, keepOff bool) error {
	return api.Merge(ctx, "/api/v1/nodes/"+node, map[string]any{"spec": map[string]any{"unschedulable": keepOff}})
}

// Remove deletes the node's object; Kubernetes then forgets its Pods.
func Remove(ctx context.Context, api API, node string) error {
	return api.Delete(ctx, "/api/v1/nodes/"+node)
}

// pod is the part of a Pod that matters here.
type pod struct {
	Metadata struct {
		Name, Namespace, UID string
		Annotations          map[string]string
		OwnerReferences      []struct {
			Kind       string
			Controller bool
		}
		DeletionTimestamp *time.Time
	}
	Status struct{ Phase string }
}

func (p pod) name() string { return p.Metadata.Namespace + "/" + p.Metadata.Name }

// stays reports whether a Pod is not evicted: a DaemonSet's would come back at once, and
// a mirror Pod is the node's own.
func (p pod) stays() bool {
	_, mirror := p.Metadata.Annotations["kubernetes.io/config.mirror"]
	return mirror || slices.ContainsFunc(p.Metadata.OwnerReferences, func(o struct {
		Kind       string
		Controller bool
	}) bool {
		return o.Controller && o.Kind == "DaemonSet"
	})
}

// bare reports whether nobody will make the Pod anew elsewhere.
func (p pod) bare() bool {
	return len(p.Metadata.OwnerReferences) == 0 && p.Status.Phase != "Succeeded" && p.Status.Phase != "Failed"
}

// BlockedError lists what keeps a node from being drained.
type BlockedError struct {
	Node string
	// Why is the reason by Pod.
	Why map[string]string
}

func (e *BlockedError) Error() string {
	lines := make([]string, 0, len(e.Why))
	for p, why := range e.Why {
		lines = append(lines, p+": "+why)
	}
	slices.Sort(lines)
	return fmt.Sprintf("node %s is not drained; %d Pods are in the way:\n  %s", e.Node, len(lines), strings.Join(lines, "\n  "))
}

// Unwrap classes it.
func (e *BlockedError) Unwrap() error { return errdefs.ErrFailedPrecondition }

// Drain evicts the node's Pods and waits until they are gone. It asks again for what a
// budget forbids until ctx ends, and returns a *BlockedError then. Pods that nobody would
// make anew are only evicted with force. Report is told of each Pod that has gone.
func Drain(ctx context.Context, api API, node string, force bool, report func(pod string)) error {
	tick := time.NewTicker(pause)
	defer tick.Stop()
	seen := map[string]string{} // name by UID
	var last error
	for {
		pods, err := list(ctx, api, node)
		if err == nil {
			why := step(ctx, api, pods, force)
			for uid, name := range seen {
				if !slices.ContainsFunc(pods, func(p pod) bool { return p.Metadata.UID == uid }) {
					report(name)
					delete(seen, uid)
				}
			}
			for _, p := range pods {
				seen[p.Metadata.UID] = p.name()
			}
			if len(pods) == 0 {
				return nil
			}
			err = &BlockedError{node, why}
			if onlyBare(pods) && !force {
				return err
			}
		}
		if last == nil || ctx.Err() == nil {
			last = err // not that time was up while it was asked
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return last
		}
	}
}

func onlyBare(pods []pod) bool {
	return !slices.ContainsFunc(pods, func(p pod) bool { return !p.bare() || p.Metadata.DeletionTimestamp != nil })
}

func list(ctx context.Context, api API, node string) ([]pod, error) {
	var all struct{ Items []pod }
	if err := api.Get(ctx, "/api/v1/pods?fieldSelector=spec.nodeName%3D"+node, &all); err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all.Items, pod.stays), nil
}

// step evicts what may be evicted now and returns what is in the way of the rest.
func step(ctx context.Context, api API, pods []pod, force bool) map[string]string {
	why := map[string]string{}
	for _, p := range pods {
		switch {
		case p.Metadata.DeletionTimestamp != nil:
			why[p.name()] = "is ending"
			continue
		case p.bare() && !force:
			why[p.name()] = "nobody makes it anew elsewhere; --force evicts it all the same"
			continue
		}
		err := api.Create(ctx, "/api/v1/namespaces/"+p.Metadata.Namespace+"/pods/"+p.Metadata.Name+"/eviction", map[string]any{
			"apiVersion": "policy/v1", "kind": "Eviction",
			"metadata": map[string]any{"name": p.Metadata.Name, "namespace": p.Metadata.Namespace},
		}, nil)
		var status *apiclient.StatusError
		switch {
		case err == nil:
			why[p.name()] = "is ending"
		case errdefs.IsNotFound(err):
		case errors.As(err, &status) && status.Code == http.StatusTooManyRequests:
			why[p.name()] = "its PodDisruptionBudget allows no eviction now (" + status.Message + ")"
		default:
			why[p.name()] = err.Error()
		}
	}
	return why
}
