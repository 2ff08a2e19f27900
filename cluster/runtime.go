package cluster

import (
	"context"
	"errors"
	"fmt"
	"sync"

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
