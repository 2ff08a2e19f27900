package kubestack

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/metrics"

	api "github.com/hypernetes/hypernetes/api/kubestack/v1"
	proberapi "github.com/hypernetes/hypernetes/api/probe/v1"
	"github.com/hypernetes/hypernetes/network/ipam"
)

// serve serves the sockets and the health address until the context ends.
func (d *Daemon) serve(ctx context.Context) error {
	cni, err := listen(ctx, filepath.Join(d.opts.RunDir, filepath.Base(api.Socket)))
	if err != nil {
		return err
	}
	probes, err := listen(ctx, filepath.Join(d.opts.RunDir, filepath.Base(proberapi.Socket)))
	if err != nil {
		return errors.Join(err, cni.Close())
	}
	g := grpc.NewServer(grpc.MaxRecvMsgSize(4<<20), grpc.UnaryInterceptor(observe))
	api.RegisterKubestackServer(g, &server{d: d})
	t, err := ttrpc.NewServer()
	if err != nil {
		return errors.Join(err, cni.Close(), probes.Close())
	}
	proberapi.RegisterProberService(t, &prober{d: d})
	var wg sync.WaitGroup
	failed := make(chan error, 3)
	run := func(f func() error) {
		wg.Go(func() {
			if err := f(); err != nil && ctx.Err() == nil {
				failed <- err
			}
		})
	}
	run(func() error { return g.Serve(cni) })
	run(func() error { return t.Serve(ctx, probes) })
	var h *http.Server
	if d.opts.Health != "" {
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", d.opts.Health)
		if err != nil {
			failed <- fmt.Errorf("health address: %w", err)
		} else {
			h = &http.Server{Handler: d.health(), ReadHeaderTimeout: 5 * time.Second}
			run(func() error { return h.Serve(l) })
		}
	}
	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	// What is under way is short and may end; a caller that hangs may not.
	stop := time.AfterFunc(5*time.Second, g.Stop)
	g.GracefulStop()
	stop.Stop()
	_ = t.Close()
	if h != nil {
		_ = h.Close()
	}
	wg.Wait()
	return err
}

// listen listens on a socket that only root may open, and checks that it is root.
func listen(ctx context.Context, path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	// What a former process left. Two daemons at once are the supervisor's to prevent.
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return rootOnly{l}, nil
}

// rootOnly turns away whoever is not root: a descriptor may be passed on.
type rootOnly struct{ net.Listener }

func (r rootOnly) Accept() (net.Conn, error) {
	for {
		c, err := r.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if isRoot(c) {
			return c, nil
		}
		_ = c.Close()
	}
}

func isRoot(c net.Conn) bool {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return false
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return false
	}
	var cred *unix.Ucred
	var failed error
	err = raw.Control(func(fd uintptr) { cred, failed = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	return err == nil && failed == nil && int(cred.Uid) == os.Geteuid() || err == nil && failed == nil && cred.Uid == 0
}

func (d *Daemon) health() http.Handler {
	m := http.NewServeMux()
	m.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("ok")) })
	m.HandleFunc("/readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := d.Ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		_, _ = w.Write([]byte("ok"))
	})
	m.Handle("/metrics", promhttp.HandlerFor(metrics.Registry, promhttp.HandlerOpts{}))
	return m
}

// observe counts calls and classes their errors.
func observe(ctx context.Context, q any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	start := time.Now()
	out, err := handler(ctx, q)
	if err != nil {
		l := log.G(ctx).WithError(err).WithField("verb", filepath.Base(info.FullMethod))
		if a, ok := q.(*api.AttachRequest); ok {
			l = l.WithField("pod", a.PodNamespace+"/"+a.PodName)
		}
		if _, asked := q.(*api.StatusRequest); asked {
			l.Debug("call") // the runtime asks all the time
		} else {
			l.Warn("call")
		}
		err = class(err)
	}
	callSeconds.WithLabelValues(filepath.Base(info.FullMethod), status.Code(err).String()).Observe(time.Since(start).Seconds())
	return out, err
}

// class makes the error one that the plugin can tell apart.
func class(err error) error {
	switch {
	case errors.As(err, new(ipam.ErrExhausted)), errors.Is(err, ipam.ErrQuota):
		return status.Error(codes.ResourceExhausted, err.Error())
	case apierrors.IsNotFound(err):
		return status.Error(codes.NotFound, err.Error())
	case apierrors.ReasonForError(err) != "", errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return status.Error(codes.Unavailable, err.Error())
	case errdefs.IsUnavailable(err):
		return status.Error(codes.Unavailable, err.Error())
	default:
		return errgrpc.ToGRPC(err)
	}
}

// server serves the CNI plugin.
type server struct {
	api.UnimplementedKubestackServer
	d *Daemon
}

var _ api.KubestackServer = (*server)(nil)

func (s *server) Add(ctx context.Context, q *api.AttachRequest) (*api.AddResponse, error) {
	return s.d.add(ctx, q)
}

func (s *server) Del(ctx context.Context, q *api.AttachRequest) (*api.DelResponse, error) {
	return s.d.del(ctx, q)
}

func (s *server) Check(ctx context.Context, q *api.AttachRequest) (*api.CheckResponse, error) {
	return s.d.check(ctx, q)
}

func (s *server) Status(context.Context, *api.StatusRequest) (*api.StatusResponse, error) {
	return &api.StatusResponse{}, s.d.Ready()
}

func (s *server) GC(ctx context.Context, q *api.GCRequest) (*api.GCResponse, error) {
	return &api.GCResponse{}, s.d.collect(ctx, q)
}
