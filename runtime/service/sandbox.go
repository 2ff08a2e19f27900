package service

import (
	"context"
	"encoding/json"
	"fmt"
	"runtime"
	"time"

	api "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// The states CRI knows; any other string means not ready.
const (
	stateReady    = "SANDBOX_READY"
	stateNotReady = "SANDBOX_NOTREADY"
)

// specType is how containerd names an OCI spec in an Any.
const specType = "types.containerd.io/opencontainers/runtime-spec/1/Spec"

type sandboxService struct{ *Service }

// named refuses calls for another sandbox than this shim's.
func (s *Service) named(id string) error {
	if id != s.sandbox.ID() {
		return fmt.Errorf("sandbox %.200q, this shim is of %s: %w", id, s.sandbox.ID(), errdefs.ErrNotFound)
	}
	return nil
}

func (s *sandboxService) CreateSandbox(ctx context.Context, r *api.CreateSandboxRequest) (*api.CreateSandboxResponse, error) {
	if err := s.named(r.SandboxID); err != nil {
		return nil, err
	}
	if err := s.sandbox.Create(ctx, r.Options, r.NetnsPath); err != nil {
		return nil, err
	}
	return &api.CreateSandboxResponse{}, nil
}

func (s *sandboxService) StartSandbox(ctx context.Context, r *api.StartSandboxRequest) (*api.StartSandboxResponse, error) {
	if err := s.named(r.SandboxID); err != nil {
		return nil, err
	}
	pid, createdAt, err := s.sandbox.Start(ctx)
	if err != nil {
		return nil, err
	}
	// containerd keeps a sandbox's spec and reads namespaces of it; a VM has none there.
	spec := []byte(`{"ociVersion":"1.3.0","linux":{}}`)
	return &api.StartSandboxResponse{Pid: pid, CreatedAt: timestamppb.New(createdAt), Spec: &anypb.Any{TypeUrl: specType, Value: spec}}, nil
}

func (s *sandboxService) Platform(_ context.Context, r *api.PlatformRequest) (*api.PlatformResponse, error) {
	if err := s.named(r.SandboxID); err != nil {
		return nil, err
	}
	return &api.PlatformResponse{Platform: &types.Platform{OS: "linux", Architecture: runtime.GOARCH}}, nil
}

func (s *sandboxService) StopSandbox(ctx context.Context, r *api.StopSandboxRequest) (*api.StopSandboxResponse, error) {
	if err := s.named(r.SandboxID); err != nil {
		return nil, err
	}
	if err := s.sandbox.Stop(ctx, time.Duration(r.TimeoutSecs)*time.Second); err != nil {
		return nil, err
	}
	return &api.StopSandboxResponse{}, nil
}

func (s *sandboxService) WaitSandbox(ctx context.Context, r *api.WaitSandboxRequest) (*api.WaitSandboxResponse, error) {
	if err := s.named(r.SandboxID); err != nil {
		return nil, err
	}
	at, err := s.sandbox.Wait(ctx)
	if err != nil {
		return nil, err
	}
	return &api.WaitSandboxResponse{ExitedAt: timestamppb.New(at)}, nil
}

func (s *sandboxService) SandboxStatus(_ context.Context, r *api.SandboxStatusRequest) (*api.SandboxStatusResponse, error) {
	if err := s.named(r.SandboxID); err != nil {
		return nil, err
	}
	c := s.sandbox.Condition()
	if !c.Created {
		return nil, fmt.Errorf("sandbox %s has not been created: %w", r.SandboxID, errdefs.ErrNotFound)
	}
	out := &api.SandboxStatusResponse{SandboxID: r.SandboxID, Pid: c.PID, State: stateNotReady, CreatedAt: timestamppb.New(c.CreatedAt)}
	if c.Ready {
		out.State = stateReady
	}
	if !c.ExitedAt.IsZero() {
		out.ExitedAt = timestamppb.New(c.ExitedAt)
	}
	if r.Verbose {
		info, err := json.Marshal(s.sandbox.Info())
		if err != nil {
			return nil, err
		}
		// containerd's CRI keeps of "info" only the keys it knows, and others as they are.
		out.Info = map[string]string{"info": string(info), "vm": string(info)}
	}
	return out, nil
}

func (s *sandboxService) PingSandbox(ctx context.Context, r *api.PingRequest) (*api.PingResponse, error) {
	if err := s.named(r.SandboxID); err != nil {
		return nil, err
	}
	if err := s.sandbox.Ping(ctx); err != nil {
		return nil, err
	}
	return &api.PingResponse{}, nil
}

func (s *sandboxService) ShutdownSandbox(ctx context.Context, r *api.ShutdownSandboxRequest) (*api.ShutdownSandboxResponse, error) {
	if err := s.named(r.SandboxID); err != nil {
		return nil, err
	}
	if err := s.sandbox.Close(ctx); err != nil {
		return nil, err
	}
	s.exit()
	return &api.ShutdownSandboxResponse{}, nil
}

func (s *sandboxService) SandboxMetrics(_ context.Context, r *api.SandboxMetricsRequest) (*api.SandboxMetricsResponse, error) {
	if err := s.named(r.SandboxID); err != nil {
		return nil, err
	}
	m, err := s.sandbox.Metrics()
	if err != nil {
		return nil, err
	}
	data, err := marshal(m)
	if err != nil {
		return nil, err
	}
	return &api.SandboxMetricsResponse{Metrics: &types.Metric{Timestamp: timestamppb.Now(), ID: r.SandboxID, Data: data}}, nil
}

// updatedResources is where CRI puts a Pod's new resources.
const updatedResources = "updated-resources"

// UpdateSandbox hears of a Pod's new resources. The kubelet changes the Pod's cgroup
// itself; a VM's memory and processors cannot grow while it runs, which containerd
// tolerates when it is told so.
func (s *sandboxService) UpdateSandbox(_ context.Context, r *api.UpdateSandboxRequest) (*api.UpdateSandboxResponse, error) {
	if err := s.named(r.SandboxID); err != nil {
		return nil, err
	}
	if ext := r.GetSandbox().GetExtensions()[updatedResources]; ext != nil {
		grows, err := s.sandbox.Exceeds(ext.Value)
		if err != nil {
			return nil, err
		}
		if grows {
			return nil, fmt.Errorf("sandbox %s: more memory or processors than its vm has; remedy: recreate the pod: %w", r.SandboxID, errdefs.ErrNotImplemented)
		}
	}
	return &api.UpdateSandboxResponse{}, nil
}

// marshal names types as containerd does, without a prefix.
func marshal(m proto.Message) (*anypb.Any, error) {
	b, err := proto.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("marshal %s: %w", m.ProtoReflect().Descriptor().FullName(), err)
	}
	return &anypb.Any{TypeUrl: string(m.ProtoReflect().Descriptor().FullName()), Value: b}, nil
}
