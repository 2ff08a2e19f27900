package service

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime/debug"
	"time"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/status"

	volumeapi "github.com/hypernetes/hypernetes/api/volume/v1"
	"github.com/hypernetes/hypernetes/runtime/sandbox"
)

// Service answers containerd for one sandbox.
type Service struct {
	sandbox *sandbox.Sandbox
	version string
	// ended is closed once, when the shim shall exit.
	ended chan struct{}
}

// New serves s; version is the shim's.
func New(s *sandbox.Sandbox, version string) *Service {
	return &Service{sandbox: s, version: version, ended: make(chan struct{}, 1)}
}

// replyTime is how long containerd may take to read its last answer and hang up.
const replyTime = time.Second

// Serve answers on l until containerd shuts the sandbox down, or ctx ends.
func (s *Service) Serve(ctx context.Context, l net.Listener) error {
	peers := &conns{}
	rpc, err := ttrpc.NewServer(ttrpc.WithServerHandshaker(peers), ttrpc.WithUnaryServerInterceptor(guard))
	if err != nil {
		return fmt.Errorf("serve: %w", err)
	}
	sandboxapi.RegisterTTRPCSandboxService(rpc, &sandboxService{s})
	taskapi.RegisterTTRPCTaskService(rpc, &taskService{s})
	volumeapi.RegisterVolumesService(rpc, &volumeService{s})
	served := make(chan error, 1)
	go func() { served <- rpc.Serve(ctx, l) }()
	select {
	case err := <-served:
		return fmt.Errorf("serve: %w", err)
	case <-ctx.Done():
	case <-s.ended:
	}
	// The answer first, then the end.
	rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), replyTime)
	defer cancel()
	peers.wait(rctx)
	err = rpc.Close()
	<-served
	return err
}

// exit has Serve return after the present answer.
func (s *Service) exit() {
	select {
	case s.ended <- struct{}{}:
	default:
	}
}

// guard gives errors their wire form and keeps a handler's panic from ending the VM.
func guard(ctx context.Context, unmarshal ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, method ttrpc.Method) (out any, err error) {
	defer func() {
		if p := recover(); p != nil {
			log.G(ctx).WithField("method", info.FullMethod).Errorf("panic: %v\n%s", p, debug.Stack())
			out, err = nil, errgrpc.ToGRPC(fmt.Errorf("%s: internal error: %v: %w", info.FullMethod, p, errdefs.ErrInternal))
		}
	}()
	began := time.Now()
	out, err = method(ctx, unmarshal)
	e := log.G(ctx).WithField("method", info.FullMethod).WithField("milliseconds", time.Since(began).Milliseconds())
	if err != nil {
		e = e.WithError(err)
	}
	e.Debug("call")
	return out, wire(classify(err))
}

// wire gives an error its code and text and no details: of an error that wraps several,
// errgrpc makes a detail of each but the first, which users would read line by line.
func wire(err error) error {
	st, ok := status.FromError(errgrpc.ToGRPC(err))
	if err == nil || !ok {
		return err
	}
	return status.Error(st.Code(), st.Message())
}

// classify gives what has no class one that tells the caller whether to try again.
func classify(err error) error {
	switch {
	case err == nil, errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errdefs.IsNotFound(err), errdefs.IsAlreadyExists(err), errdefs.IsInvalidArgument(err), errdefs.IsFailedPrecondition(err),
		errdefs.IsUnavailable(err), errdefs.IsNotImplemented(err), errdefs.IsResourceExhausted(err), errdefs.IsDataLoss(err),
		errdefs.IsAborted(err), errdefs.IsPermissionDenied(err), errdefs.IsInternal(err), errdefs.IsOutOfRange(err), errdefs.IsUnauthorized(err), errdefs.IsUnknown(err):
		return err
	}
	return fmt.Errorf("%w: %w", err, errdefs.ErrUnknown)
}
