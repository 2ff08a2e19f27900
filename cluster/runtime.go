package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

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

// Import lets ctr import and unpack an archive: the client library would bring half
// of containerd into h8s.
func (i images) Import(ctx context.Context, archive string) error {
	cmd := exec.CommandContext(ctx, i.artifacts.Bin("containerd"))
	cmd.Args = []string{"ctr", "--address", i.node.ContainerdSocket(), "--namespace", "k8s.io", "images", "import", "--snapshotter", "erofs", archive}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%w: %s", err, strings.TrimSpace(stderr.String()))
	}
	return nil
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
