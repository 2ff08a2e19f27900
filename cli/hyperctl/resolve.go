package hyperctl

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// named is anything a user can mean by an id, the beginning of one, or a name.
type named struct{ id, name string }

// pick finds what ref means: an exact id or name first, then a prefix of
// exactly one id. The index is into list.
func pick(kind, ref string, list []named) (int, error) {
	if ref == "" {
		return 0, fmt.Errorf("%s: the id is empty: %w", kind, errdefs.ErrInvalidArgument)
	}
	var found []int
	for i, n := range list {
		if n.id == ref || n.name == ref {
			found = append(found, i)
		}
	}
	if len(found) == 0 {
		for i, n := range list {
			if strings.HasPrefix(n.id, ref) {
				found = append(found, i)
			}
		}
	}
	switch len(found) {
	case 0:
		return 0, fmt.Errorf("no %s %q; `hyperctl ps -a` lists them: %w", kind, ref, errdefs.ErrNotFound)
	case 1:
		return found[0], nil
	}
	var all []string
	for _, i := range found {
		all = append(all, shortID(list[i].id)+" ("+list[i].name+")")
	}
	return 0, fmt.Errorf("%s %q could be any of %s; give more of the id: %w", kind, ref, strings.Join(all, ", "), errdefs.ErrInvalidArgument)
}

// shortID is what tables show.
func shortID(id string) string { return id[:min(12, len(id))] }

// findPod finds a Pod by id, prefix or name.
func (h *hyper) findPod(ctx context.Context, ref string) (*cri.PodSandbox, error) {
	resp, err := h.pods.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	if err != nil {
		return nil, h.explain("list Pods", err)
	}
	list := make([]named, len(resp.Items))
	for i, p := range resp.Items {
		list[i] = named{p.Id, p.Metadata.Name}
	}
	i, err := pick("Pod", ref, list)
	if err != nil {
		return nil, err
	}
	return resp.Items[i], nil
}

// findContainer finds a container by its own id, or the container of a Pod,
// the one called container if the Pod has several.
func (h *hyper) findContainer(ctx context.Context, ref, container string) (*cri.Container, error) {
	resp, err := h.pods.ListContainers(ctx, &cri.ListContainersRequest{})
	if err != nil {
		return nil, h.explain("list containers", err)
	}
	if pod, err := h.findPod(ctx, ref); err == nil {
		return containerOf(pod, resp.Containers, container)
	}
	list := make([]named, len(resp.Containers))
	for i, c := range resp.Containers {
		list[i] = named{id: c.Id}
	}
	i, err := pick("Pod or container", ref, list)
	if err != nil {
		return nil, err
	}
	return resp.Containers[i], nil
}

func containerOf(pod *cri.PodSandbox, all []*cri.Container, name string) (*cri.Container, error) {
	var mine []*cri.Container
	var names []string
	for _, c := range all {
		if c.PodSandboxId == pod.Id && (name == "" || c.Metadata.Name == name) {
			mine = append(mine, c)
			names = append(names, c.Metadata.Name)
		}
	}
	switch {
	case len(mine) == 1:
		return mine[0], nil
	case len(mine) == 0:
		return nil, fmt.Errorf("pod %s has no such container: %w", pod.Metadata.Name, errdefs.ErrNotFound)
	}
	return nil, fmt.Errorf("pod %s has several containers (%s); choose one with --container: %w", pod.Metadata.Name, strings.Join(names, ", "), errdefs.ErrInvalidArgument)
}
