package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hypernetes/hypernetes/cluster/layout"
)

// busybox is the image of measured Pods, testbox of those that serve; `make images` builds
// them.
const (
	busybox = "h8s.local/busybox:1"
	testbox = "h8s.local/testbox:1"
)

// runtimeService is the CRI of the node that is measured.
type runtimeService struct {
	node layout.Node
	conn *grpc.ClientConn
	cri  cri.RuntimeServiceClient
}

func connect(node layout.Node) (*runtimeService, error) {
	conn, err := grpc.NewClient("unix://"+node.ContainerdSocket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	return &runtimeService{node: node, conn: conn, cri: cri.NewRuntimeServiceClient(conn)}, nil
}

// pod is a Pod that was started for measuring.
type pod struct {
	ID, container string
	// Sandbox, Create, Start and Output are how long RunPodSandbox, CreateContainer and
	// StartContainer took and when, after StartContainer, the first line was in the log.
	Sandbox, Create, Start, Output time.Duration
}

// Total is RunPodSandbox to first output of the first container.
func (p pod) Total() time.Duration { return p.Sandbox + p.Create + p.Start + p.Output }

// start starts a Pod with one container that does nothing.
func (r *runtimeService) start(ctx context.Context, handler, name string) (pod, error) {
	return r.run(ctx, handler, name, busybox, "sh", "-c", "echo started; exec sleep 3600")
}

// run starts a Pod with one container and waits for its first line. What was started is
// returned also with an error, to be removed. The Pod's UID is its name.
func (r *runtimeService) run(ctx context.Context, handler, name, image string, command ...string) (pod, error) {
	return r.runWith(ctx, handler, name, image, nil, command...)
}

// runWith is run with devices in the container.
func (r *runtimeService) runWith(ctx context.Context, handler, name, image string, devices []*cri.Device, command ...string) (p pod, err error) {
	logDir := filepath.Join("/var/log/pods", "bench_"+name+"_"+name)
	sandbox := &cri.PodSandboxConfig{
		Metadata: &cri.PodSandboxMetadata{Name: name, Namespace: "bench", Uid: name},
		Hostname: name, LogDirectory: logDir, DnsConfig: &cri.DNSConfig{},
		Linux: &cri.LinuxPodSandboxConfig{CgroupParent: r.node.Cgroup() + "/bench/" + name},
	}
	container := &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: "first"},
		Image:    &cri.ImageSpec{Image: image},
		Command:  command,
		Devices:  devices,
		LogPath:  "first.log", Linux: &cri.LinuxContainerConfig{},
	}
	step := func(d *time.Duration, f func() error) {
		if err != nil {
			return
		}
		began := time.Now()
		err = f()
		*d = time.Since(began)
	}
	step(&p.Sandbox, func() error {
		resp, err := r.cri.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: sandbox, RuntimeHandler: handler})
		p.ID = resp.GetPodSandboxId()
		return err
	})
	step(&p.Create, func() error {
		resp, err := r.cri.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: p.ID, Config: container, SandboxConfig: sandbox})
		p.container = resp.GetContainerId()
		return err
	})
	step(&p.Start, func() error {
		_, err := r.cri.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: p.container})
		return err
	})
	step(&p.Output, func() error {
		return awaitLine(ctx, r.node.StatePath("log", "pods", filepath.Base(logDir), "first.log"))
	})
	if err != nil {
		err = fmt.Errorf("%s pod %s: %w", handler, name, err)
	}
	return p, err
}

// awaitLine waits for the first line of a container log, written by containerd.
func awaitLine(ctx context.Context, path string) error {
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		b, err := os.ReadFile(path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if bytes.IndexByte(b, '\n') >= 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("no output in %s: %w", path, ctx.Err())
		case <-tick.C:
		}
	}
}

// address is a Pod's.
func (r *runtimeService) address(ctx context.Context, p pod) (netip.Addr, error) {
	resp, err := r.cri.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: p.ID})
	if err != nil {
		return netip.Addr{}, fmt.Errorf("pod status: %w", err)
	}
	return netip.ParseAddr(resp.GetStatus().GetNetwork().GetIp())
}

// remove stops and removes a Pod.
func (r *runtimeService) remove(ctx context.Context, p pod) error {
	if p.ID == "" {
		return nil
	}
	if _, err := r.cri.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: p.ID}); err != nil {
		return fmt.Errorf("stop pod: %w", err)
	}
	if _, err := r.cri.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: p.ID}); err != nil {
		return fmt.Errorf("remove pod: %w", err)
	}
	return nil
}

// output runs a command in the Pod's container.
func (r *runtimeService) output(ctx context.Context, p pod, command ...string) ([]byte, error) {
	resp, err := r.cri.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: p.container, Cmd: command, Timeout: 60})
	if err != nil {
		return nil, err
	}
	if resp.ExitCode != 0 {
		return nil, fmt.Errorf("%q exited with %d: %s", command, resp.ExitCode, resp.Stderr)
	}
	return resp.Stdout, nil
}
