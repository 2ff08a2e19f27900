package cluster

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hypernetes/hypernetes/cluster/image"
	"github.com/hypernetes/hypernetes/cluster/layout"
)

// images is containerd's image store; it implements preload.Store.
type images struct {
	artifacts layout.Artifacts
	node      layout.Node
	conn      *grpc.ClientConn
}

func (i images) Has(ctx context.Context, tag string) (bool, error) {
	resp, err := cri.NewImageServiceClient(i.conn).ImageStatus(ctx, &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: tag}})
	return err == nil && resp.Image != nil, err
}

// Import loads an archive as `h8s image load` does.
func (i images) Import(ctx context.Context, archive string) error {
	store := image.Store{Socket: i.node.ContainerdSocket(), Containerd: i.artifacts.Bin("containerd"), Snapshotter: "erofs"}
	_, err := store.Load(ctx, archive)
	return err
}

// drain stops and removes every Pod sandbox through CRI, so that virtual machines
// end in order and CNI releases what it gave.
func drain(ctx context.Context, n layout.Node) (int, error) {
	conn, err := dialCRI(n)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	rt := cri.NewRuntimeServiceClient(conn)
	list, err := rt.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	if err != nil {
		return 0, fmt.Errorf("list pods: %w", err)
	}
	var g errgroup.Group
	g.SetLimit(8)
	var mu sync.Mutex
	var failed error
	for _, item := range list.Items {
		g.Go(func() error {
			_, err := rt.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: item.Id})
			if err == nil {
				_, err = rt.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: item.Id})
			}
			if err != nil {
				mu.Lock()
				defer mu.Unlock()
				failed = errors.Join(failed, fmt.Errorf("pod %s/%s: %w", item.Metadata.GetNamespace(), item.Metadata.GetName(), err))
			}
			return nil
		})
	}
	return len(list.Items), errors.Join(g.Wait(), failed)
}

// Console returns the end of what a Pod's virtual machine wrote to its console, as its
// shim kept it: printable text of a few KiB, empty if the guest had nothing to say.
//
// Errors: errdefs.ErrNotFound if the node has no such Pod in a machine of its own,
// errdefs.ErrUnavailable if no container runtime answers.
func Console(ctx context.Context, l layout.Node, namespace, pod string) (string, error) {
	conn, err := dialCRI(l)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	rt := cri.NewRuntimeServiceClient(conn)
	list, err := rt.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{Filter: &cri.PodSandboxFilter{
		LabelSelector: map[string]string{"io.kubernetes.pod.namespace": namespace, "io.kubernetes.pod.name": pod},
	}})
	if err != nil {
		return "", fmt.Errorf("list pods: %w: %w", err, errdefs.ErrUnavailable)
	}
	if len(list.Items) == 0 {
		return "", fmt.Errorf("pod %s/%s: node %s does not run it: %w", namespace, pod, l.Name, errdefs.ErrNotFound)
	}
	newest := slices.MaxFunc(list.Items, func(a, b *cri.PodSandbox) int { return cmp.Compare(a.CreatedAt, b.CreatedAt) })
	st, err := rt.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: newest.Id, Verbose: true})
	if err != nil {
		return "", fmt.Errorf("pod %s/%s: %w", namespace, pod, err)
	}
	var info struct {
		VMM     int `json:"vmmPid"`
		Console string
	}
	if err := json.Unmarshal([]byte(st.Info["vm"]), &info); err != nil || (info.VMM == 0 && info.Console == "") {
		return "", fmt.Errorf("pod %s/%s has no virtual machine now: %w", namespace, pod, errdefs.ErrNotFound)
	}
	return info.Console, nil
}
