package service

import (
	"context"
	"fmt"
	"os"
	"time"

	api "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/hypernetes/hypernetes/runtime/sandbox"
	"github.com/hypernetes/hypernetes/runtime/stdio"
)

var empty = &emptypb.Empty{}

// statsTimeout bounds measuring a container: containerd asks for all of a node in turn.
const statsTimeout = 5 * time.Second

type taskService struct{ *Service }

func (s *taskService) Create(ctx context.Context, r *api.CreateTaskRequest) (*api.CreateTaskResponse, error) {
	if r.Checkpoint != "" {
		return nil, fmt.Errorf("restore from a checkpoint: %w", errdefs.ErrNotImplemented)
	}
	pid, err := s.sandbox.CreateContainer(ctx, sandbox.CreateRequest{
		ID: r.ID, Bundle: r.Bundle, RootFS: r.Rootfs,
		Stdio: stdio.Config{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal},
	})
	if err != nil {
		return nil, err
	}
	return &api.CreateTaskResponse{Pid: pid}, nil
}

func (s *taskService) Start(ctx context.Context, r *api.StartRequest) (*api.StartResponse, error) {
	c, err := s.sandbox.Container(r.ID)
	if err != nil {
		return nil, err
	}
	pid, err := c.Start(ctx, r.ExecID)
	if err != nil {
		return nil, err
	}
	return &api.StartResponse{Pid: pid}, nil
}

func (s *taskService) Delete(ctx context.Context, r *api.DeleteRequest) (*api.DeleteResponse, error) {
	c, err := s.sandbox.Container(r.ID)
	if err != nil {
		return nil, err
	}
	e, err := c.Delete(ctx, r.ExecID)
	if err != nil {
		return nil, err
	}
	return &api.DeleteResponse{Pid: e.PID, ExitStatus: e.Status, ExitedAt: timestamppb.New(e.At)}, nil
}

func (s *taskService) Exec(_ context.Context, r *api.ExecProcessRequest) (*emptypb.Empty, error) {
	c, err := s.sandbox.Container(r.ID)
	if err != nil {
		return nil, err
	}
	cfg := stdio.Config{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal}
	return empty, c.Exec(r.ExecID, r.GetSpec().GetValue(), cfg)
}

var statuses = map[sandbox.Status]tasktypes.Status{
	sandbox.StatusCreated: tasktypes.Status_CREATED, sandbox.StatusRunning: tasktypes.Status_RUNNING,
	sandbox.StatusPaused: tasktypes.Status_PAUSED, sandbox.StatusStopped: tasktypes.Status_STOPPED,
}

func (s *taskService) State(_ context.Context, r *api.StateRequest) (*api.StateResponse, error) {
	if r.ID == s.sandbox.ID() && r.ExecID == "" {
		return s.sandboxState()
	}
	c, err := s.sandbox.Container(r.ID)
	if err != nil {
		return nil, err
	}
	st, err := c.State(r.ExecID)
	if err != nil {
		return nil, err
	}
	out := &api.StateResponse{
		ID: r.ID, ExecID: r.ExecID, Bundle: st.Bundle, Pid: st.Exit.PID, Status: statuses[st.Status],
		Stdin: st.Stdio.Stdin, Stdout: st.Stdio.Stdout, Stderr: st.Stdio.Stderr, Terminal: st.Stdio.Terminal,
	}
	if st.Status == sandbox.StatusStopped {
		out.ExitStatus, out.ExitedAt = st.Exit.Status, timestamppb.New(st.Exit.At)
	}
	return out, nil
}

// sandboxState answers for the sandbox where containerd takes it for a task.
func (s *taskService) sandboxState() (*api.StateResponse, error) {
	c := s.sandbox.Condition()
	if !c.Created {
		return nil, fmt.Errorf("sandbox %s has not been created: %w", s.sandbox.ID(), errdefs.ErrNotFound)
	}
	out := &api.StateResponse{ID: s.sandbox.ID(), Pid: c.PID, Status: tasktypes.Status_STOPPED}
	if c.PID != 0 {
		out.Status = tasktypes.Status_RUNNING
	}
	return out, nil
}

// Pids lists reported pids, from memory: containerd asks at its restart and gives all of
// a shim five seconds.
func (s *taskService) Pids(_ context.Context, r *api.PidsRequest) (*api.PidsResponse, error) {
	if r.ID == s.sandbox.ID() {
		c := s.sandbox.Condition()
		if !c.Created {
			return nil, fmt.Errorf("sandbox %s has not been created: %w", r.ID, errdefs.ErrNotFound)
		}
		return &api.PidsResponse{Processes: []*tasktypes.ProcessInfo{{Pid: c.PID}}}, nil
	}
	c, err := s.sandbox.Container(r.ID)
	if err != nil {
		return nil, err
	}
	out := &api.PidsResponse{}
	for exec, pid := range c.Processes() {
		info := &tasktypes.ProcessInfo{Pid: pid}
		if exec != "" {
			if info.Info, err = marshalExec(exec); err != nil {
				return nil, err
			}
		}
		out.Processes = append(out.Processes, info)
	}
	return out, nil
}

func (s *taskService) Connect(_ context.Context, r *api.ConnectRequest) (*api.ConnectResponse, error) {
	out := &api.ConnectResponse{ShimPid: uint32(os.Getpid()), Version: s.version}
	if r.ID == s.sandbox.ID() {
		out.TaskPid = s.sandbox.Condition().PID
		return out, nil
	}
	c, err := s.sandbox.Container(r.ID)
	if err != nil {
		return nil, err
	}
	out.TaskPid = c.Processes()[""]
	return out, nil
}

// Shutdown follows every Delete of a container: the shim ends with its sandbox only. A
// shim whose sandbox was never created, as containerd died, ends now.
func (s *taskService) Shutdown(_ context.Context, r *api.ShutdownRequest) (*emptypb.Empty, error) {
	if r.ID == s.sandbox.ID() && !s.sandbox.Condition().Created {
		s.exit()
	}
	return empty, nil
}

func (s *taskService) Kill(ctx context.Context, r *api.KillRequest) (*emptypb.Empty, error) {
	c, err := s.sandbox.Container(r.ID)
	if err != nil {
		return nil, err
	}
	return empty, c.Kill(ctx, r.ExecID, r.Signal, r.All)
}

func (s *taskService) Pause(ctx context.Context, r *api.PauseRequest) (*emptypb.Empty, error) {
	c, err := s.sandbox.Container(r.ID)
	if err != nil {
		return nil, err
	}
	return empty, c.Pause(ctx)
}

func (s *taskService) Resume(ctx context.Context, r *api.ResumeRequest) (*emptypb.Empty, error) {
	c, err := s.sandbox.Container(r.ID)
	if err != nil {
		return nil, err
	}
	return empty, c.Resume(ctx)
}

func (s *taskService) Checkpoint(context.Context, *api.CheckpointTaskRequest) (*emptypb.Empty, error) {
	return nil, fmt.Errorf("checkpoint of a container in a vm: %w", errdefs.ErrNotImplemented)
}

func (s *taskService) ResizePty(ctx context.Context, r *api.ResizePtyRequest) (*emptypb.Empty, error) {
	c, err := s.sandbox.Container(r.ID)
	if err != nil {
		return nil, err
	}
	return empty, c.Resize(ctx, r.ExecID, r.Width, r.Height)
}

func (s *taskService) CloseIO(_ context.Context, r *api.CloseIORequest) (*emptypb.Empty, error) {
	c, err := s.sandbox.Container(r.ID)
	if err != nil {
		return nil, err
	}
	if !r.Stdin {
		return empty, nil
	}
	return empty, c.CloseStdin(r.ExecID)
}

func (s *taskService) Update(ctx context.Context, r *api.UpdateTaskRequest) (*emptypb.Empty, error) {
	c, err := s.sandbox.Container(r.ID)
	if err != nil {
		return nil, err
	}
	if len(r.GetResources().GetValue()) == 0 {
		return nil, fmt.Errorf("update of container %s without resources: %w", r.ID, errdefs.ErrInvalidArgument)
	}
	return empty, c.Update(ctx, r.Resources.Value)
}

func (s *taskService) Wait(ctx context.Context, r *api.WaitRequest) (*api.WaitResponse, error) {
	c, err := s.sandbox.Container(r.ID)
	if err != nil {
		return nil, err
	}
	e, err := c.Wait(ctx, r.ExecID)
	if err != nil {
		return nil, err
	}
	return &api.WaitResponse{ExitStatus: e.Status, ExitedAt: timestamppb.New(e.At)}, nil
}

func (s *taskService) Stats(ctx context.Context, r *api.StatsRequest) (*api.StatsResponse, error) {
	c, err := s.sandbox.Container(r.ID)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, statsTimeout)
	defer cancel()
	m, err := c.Stats(ctx)
	if err != nil {
		return nil, err
	}
	data, err := marshal(m)
	if err != nil {
		return nil, err
	}
	return &api.StatsResponse{Stats: data}, nil
}

// marshalExec says which exec a process is, in the message other shims use for it.
func marshalExec(exec string) (*anypb.Any, error) {
	return marshal(&options.ProcessDetails{ExecID: exec})
}
