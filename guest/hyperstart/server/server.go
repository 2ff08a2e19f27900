// Package server answers the shim: the ttrpc services of hyperstart.v1 and the
// streams of the channel.
//
// It owns the translation between messages and the packages that do the work, and
// keeps a bad message from harming PID 1. It must not do any of that work itself.
package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime/debug"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
	"github.com/hypernetes/hypernetes/guest/channel"
	"github.com/hypernetes/hypernetes/guest/hyperstart/container"
	"github.com/hypernetes/hypernetes/guest/hyperstart/events"
	"github.com/hypernetes/hypernetes/guest/hyperstart/sandbox"
	"github.com/hypernetes/hypernetes/guest/hyperstart/stdio"
	"github.com/hypernetes/hypernetes/guest/hyperstart/volume"
)

// Config is what the server works with.
type Config struct {
	Sandbox    *sandbox.Sandbox
	Containers *container.Manager
	Volumes    *volume.Set
	Streams    *stdio.Registry
	Events     *events.Log
	// Hello is the answer to Hello but for the times of the channel.
	Hello *hyperstart.HelloResponse
	// Ready is closed when the guest can do more than say Hello (kernel modules are
	// loaded); ReadyErr is read after that.
	Ready <-chan struct{}
	// PowerOff ends the VM; called once, after Shutdown has been answered.
	PowerOff func()
}

// Server serves channels, one after the other or several at once.
type Server struct {
	cfg      Config
	rpc      *ttrpc.Server
	listener *listener
	serving  sync.WaitGroup
	off      sync.Once
}

// New registers the services.
func New(cfg Config) (*Server, error) {
	rpc, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(guard))
	if err != nil {
		return nil, fmt.Errorf("make server: %w", err)
	}
	s := &Server{cfg: cfg, rpc: rpc, listener: newListener()}
	hyperstart.RegisterSandboxService(rpc, &sandboxService{s})
	hyperstart.RegisterContainersService(rpc, &containersService{s})
	s.serving.Add(1)
	go func() {
		defer s.serving.Done()
		if err := rpc.Serve(context.Background(), s.listener); err != nil && !errors.Is(err, ttrpc.ErrServerClosed) {
			log.L.WithError(err).Error("rpc server stopped")
		}
	}()
	return s, nil
}

// guard keeps a handler's panic from taking PID 1, and so the Pod, down, and gives
// errors their wire form.
func guard(ctx context.Context, unmarshal ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, method ttrpc.Method) (out any, err error) {
	defer func() {
		if p := recover(); p != nil {
			log.G(ctx).WithField("method", info.FullMethod).Errorf("panic: %v\n%s", p, debug.Stack())
			out, err = nil, errgrpc.ToGRPC(fmt.Errorf("%s: internal error: %v: %w", info.FullMethod, p, errdefs.ErrInternal))
		}
	}()
	out, err = method(ctx, unmarshal)
	return out, errgrpc.ToGRPC(err)
}

// Serve serves one channel until it is gone, and waits for its streams' handlers.
func (s *Server) Serve(ctx context.Context, conn io.ReadWriteCloser) error {
	guest, err := channel.NewGuest(conn)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = guest.Close() })
	defer stop()
	var streams sync.WaitGroup
	defer streams.Wait()
	defer guest.Close()
	for {
		stream, err := guest.Accept()
		if err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return fmt.Errorf("accept stream: %w", err)
		}
		streams.Add(1)
		go func() {
			defer streams.Done()
			s.stream(stream)
		}()
	}
}

// Close ends the rpc server.
func (s *Server) Close() error {
	err := s.rpc.Close()
	s.serving.Wait()
	return err
}

// stream reads what a stream is for and hands it over.
func (s *Server) stream(conn net.Conn) {
	head, err := readHeader(conn)
	if err != nil {
		_ = conn.Close()
		return
	}
	switch k := head.GetKind().(type) {
	case *hyperstart.StreamHeader_Rpc:
		if channel.Reply(conn, nil) != nil || !s.listener.hand(conn) {
			_ = conn.Close()
		}
	case *hyperstart.StreamHeader_Stdio:
		s.stdio(conn, k.Stdio)
	case *hyperstart.StreamHeader_Dial:
		dial(conn, k.Dial)
	default:
		refuse(conn, fmt.Errorf("unknown kind of stream: %w", errdefs.ErrNotImplemented))
	}
}

func (s *Server) stdio(conn net.Conn, k *hyperstart.Stdio) {
	// The answer goes first: once registered, output may follow at once.
	if k.GetFd() > 2 {
		refuse(conn, fmt.Errorf("stream for file descriptor %d: must be 0 to 2: %w", k.GetFd(), errdefs.ErrInvalidArgument))
		return
	}
	key := stdio.Key{Container: k.GetContainerId(), Exec: k.GetExecId(), FD: k.GetFd()}
	g := &gated{Conn: conn, open: make(chan struct{})}
	if err := s.cfg.Streams.Register(key, g); err != nil {
		refuse(conn, err)
		return
	}
	if err := channel.Reply(conn, nil); err != nil {
		_ = conn.Close()
	}
	close(g.open)
}

// gated is a stream that carries data only after its header has been answered, and
// is registered before: the shim may rely on the answer meaning registered.
type gated struct {
	net.Conn
	open chan struct{}
}

func (g *gated) Read(p []byte) (int, error) {
	<-g.open
	return g.Conn.Read(p)
}

func (g *gated) Write(p []byte) (int, error) {
	<-g.open
	return g.Conn.Write(p)
}

func refuse(conn net.Conn, err error) {
	_ = channel.Reply(conn, err)
	_ = conn.Close()
}
