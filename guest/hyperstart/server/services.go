package server

import (
	"context"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
	"github.com/hypernetes/hypernetes/guest/hyperstart/container"
	"github.com/hypernetes/hypernetes/guest/hyperstart/sandbox"
)

// killTimeout bounds what Shutdown waits for after SIGKILL.
const killTimeout = 20 * time.Second

// flushTimeout bounds writing back and unmounting volumes.
const flushTimeout = 30 * time.Second

var empty = &emptypb.Empty{}

type sandboxService struct{ *Server }

func (s *sandboxService) Hello(_ context.Context, in *hyperstart.HelloRequest) (*hyperstart.HelloResponse, error) {
	out := proto.Clone(s.cfg.Hello).(*hyperstart.HelloResponse)
	out.ProtocolMinor = min(out.ProtocolMinor, max(in.GetProtocolMinor(), 1))
	return out, nil
}

// ready waits until the guest can work.
func (s *Server) ready(ctx context.Context) error {
	select {
	case <-s.cfg.Ready:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *sandboxService) Configure(ctx context.Context, in *hyperstart.ConfigureRequest) (*emptypb.Empty, error) {
	if err := s.ready(ctx); err != nil {
		return nil, err
	}
	for _, v := range in.Volumes {
		if err := s.cfg.Volumes.Begin(v); err != nil {
			return nil, err
		}
	}
	return empty, s.cfg.Sandbox.Configure(ctx, in)
}

func (s *sandboxService) PutFiles(_ context.Context, in *hyperstart.PutFilesRequest) (*emptypb.Empty, error) {
	return empty, s.cfg.Volumes.Put(in.Volume, in.Tree, in.More)
}

func (s *sandboxService) ReadFile(_ context.Context, in *hyperstart.ReadFileRequest) (*hyperstart.ReadFileResponse, error) {
	data, size, err := s.cfg.Volumes.ReadTail(in.Volume, in.Path, in.Limit)
	if err != nil {
		return nil, err
	}
	return &hyperstart.ReadFileResponse{Data: data, Size: size}, nil
}

func (s *sandboxService) Ping(context.Context, *emptypb.Empty) (*emptypb.Empty, error) {
	return empty, nil
}

func (s *sandboxService) Stats(context.Context, *hyperstart.SandboxStatsRequest) (*hyperstart.SandboxStatsResponse, error) {
	total, available, err := sandbox.Memory()
	if err != nil {
		return nil, err
	}
	return &hyperstart.SandboxStatsResponse{
		MemoryTotal: total, MemoryAvailable: available, Volumes: s.cfg.Volumes.Usage(),
	}, nil
}

func (s *sandboxService) VolumeStats(ctx context.Context, in *hyperstart.VolumeStatsRequest) (*hyperstart.VolumeStatsResponse, error) {
	return s.cfg.Volumes.DiskStats(ctx, in.Serial)
}

func (s *sandboxService) GrowVolume(ctx context.Context, in *hyperstart.GrowVolumeRequest) (*hyperstart.GrowVolumeResponse, error) {
	return s.cfg.Volumes.Grow(ctx, in.Serial, in.SizeBytes)
}

func (s *sandboxService) Events(ctx context.Context, in *hyperstart.EventsRequest, out hyperstart.Sandbox_EventsServer) error {
	return errgrpc.ToGRPC(s.cfg.Events.Follow(ctx, in.After, out.Send))
}

func (s *sandboxService) Shutdown(ctx context.Context, in *hyperstart.ShutdownRequest) (*emptypb.Empty, error) {
	grace := time.Duration(min(in.GraceSeconds, 3600)) * time.Second
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- s.cfg.Containers.Shutdown(stop) }()
	limit := time.NewTimer(grace + killTimeout)
	defer limit.Stop()
	select {
	case err := <-ended:
		if err != nil {
			// The VM goes anyway; nobody but the log can use this.
			log.G(ctx).WithError(err).Warn("containers did not end cleanly")
		}
	case <-limit.C:
		log.G(ctx).Warn("containers did not end in time")
	}
	flush, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushTimeout)
	defer cancel()
	if err := s.cfg.Volumes.Close(flush); err != nil {
		log.G(ctx).WithError(err).Warn("volumes were not unmounted cleanly")
	}
	s.off.Do(func() { go s.cfg.PowerOff() })
	return empty, nil
}

type containersService struct{ *Server }

func (s *containersService) get(id string) (*container.Container, error) {
	return s.cfg.Containers.Get(id)
}

func (s *containersService) Create(ctx context.Context, in *hyperstart.CreateRequest) (*hyperstart.CreateResponse, error) {
	if err := s.ready(ctx); err != nil {
		return nil, err
	}
	pid, err := s.cfg.Containers.Create(ctx, in)
	if err != nil {
		return nil, err
	}
	return &hyperstart.CreateResponse{Pid: pid}, nil
}

func (s *containersService) Start(ctx context.Context, in *hyperstart.ProcessRequest) (*hyperstart.StartResponse, error) {
	c, err := s.get(in.ContainerId)
	if err != nil {
		return nil, err
	}
	var pid uint32
	if in.ExecId == "" {
		pid, err = c.Start(ctx)
	} else {
		pid, err = c.StartExec(ctx, in.ExecId)
	}
	if err != nil {
		return nil, err
	}
	return &hyperstart.StartResponse{Pid: pid}, nil
}

func (s *containersService) Exec(_ context.Context, in *hyperstart.ExecRequest) (*emptypb.Empty, error) {
	c, err := s.get(in.ContainerId)
	if err != nil {
		return nil, err
	}
	return empty, c.Exec(in)
}

func (s *containersService) Signal(_ context.Context, in *hyperstart.SignalRequest) (*emptypb.Empty, error) {
	c, err := s.get(in.ContainerId)
	if err != nil {
		return nil, err
	}
	return empty, c.Signal(in.ExecId, in.Signal, in.All)
}

func (s *containersService) Resize(_ context.Context, in *hyperstart.ResizeRequest) (*emptypb.Empty, error) {
	c, err := s.get(in.ContainerId)
	if err != nil {
		return nil, err
	}
	return empty, c.Resize(in.ExecId, in.Width, in.Height)
}

func (s *containersService) CloseStdin(_ context.Context, in *hyperstart.ProcessRequest) (*emptypb.Empty, error) {
	c, err := s.get(in.ContainerId)
	if err != nil {
		return nil, err
	}
	return empty, c.CloseStdin(in.ExecId)
}

func (s *containersService) Delete(ctx context.Context, in *hyperstart.ProcessRequest) (*hyperstart.DeleteResponse, error) {
	st, err := s.cfg.Containers.Delete(ctx, in.ContainerId, in.ExecId)
	if err != nil {
		return nil, err
	}
	return &hyperstart.DeleteResponse{ExitStatus: st.Code, ExitedAt: timestamppb.New(st.At)}, nil
}

func (s *containersService) Pids(_ context.Context, in *hyperstart.ContainerRequest) (*hyperstart.PidsResponse, error) {
	c, err := s.get(in.ContainerId)
	if err != nil {
		return nil, err
	}
	pids, err := c.Pids()
	if err != nil {
		return nil, err
	}
	return &hyperstart.PidsResponse{Pids: pids}, nil
}

func (s *containersService) Stats(_ context.Context, in *hyperstart.ContainerRequest) (*hyperstart.StatsResponse, error) {
	c, err := s.get(in.ContainerId)
	if err != nil {
		return nil, err
	}
	return c.Stats()
}

func (s *containersService) Update(ctx context.Context, in *hyperstart.UpdateRequest) (*emptypb.Empty, error) {
	c, err := s.get(in.ContainerId)
	if err != nil {
		return nil, err
	}
	return empty, c.Update(ctx, in.Resources)
}

func (s *containersService) Pause(ctx context.Context, in *hyperstart.ContainerRequest) (*emptypb.Empty, error) {
	return s.freeze(ctx, in, true)
}

func (s *containersService) Resume(ctx context.Context, in *hyperstart.ContainerRequest) (*emptypb.Empty, error) {
	return s.freeze(ctx, in, false)
}

func (s *containersService) freeze(ctx context.Context, in *hyperstart.ContainerRequest, frozen bool) (*emptypb.Empty, error) {
	c, err := s.get(in.ContainerId)
	if err != nil {
		return nil, err
	}
	return empty, c.Freeze(ctx, frozen)
}
