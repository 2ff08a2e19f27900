package machine

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"

	volumev1 "github.com/hypernetes/hypernetes/api/volume/v1"
)

type addresses map[string]string

func (a addresses) Shim(uid string) (string, error) {
	if s, ok := a[uid]; ok {
		return s, nil
	}
	return "", errdefs.ErrNotFound
}

type shim struct {
	err       error
	grown     uint64
	throttled string
}

func (s *shim) Stats(context.Context, *volumev1.StatsRequest) (*volumev1.StatsResponse, error) {
	return &volumev1.StatsResponse{DeviceBytes: 7}, errgrpc.ToGRPC(s.err)
}

func (s *shim) Grow(_ context.Context, r *volumev1.GrowRequest) (*volumev1.GrowResponse, error) {
	s.grown = r.GetSizeBytes()
	return &volumev1.GrowResponse{DeviceBytes: r.GetSizeBytes()}, errgrpc.ToGRPC(s.err)
}

func (s *shim) Throttle(_ context.Context, r *volumev1.ThrottleRequest) (*volumev1.ThrottleResponse, error) {
	s.throttled = r.GetKey()
	return &volumev1.ThrottleResponse{}, errgrpc.ToGRPC(s.err)
}

func TestMachines(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	s := &shim{}
	volumev1.RegisterVolumesService(server, s)
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(context.WithoutCancel(t.Context()), l) }()
	t.Cleanup(func() { _ = server.Close(); <-done })

	m := Machines{addresses{"pod": "unix://" + path, "gone": "unix://" + path + ".gone"}}
	if r, err := m.Stats(t.Context(), "pod", "k"); err != nil || r.GetDeviceBytes() != 7 {
		t.Errorf("%v, %v", r, err)
	}
	if n, err := m.Grow(t.Context(), "pod", "k", 42); err != nil || n != 42 || s.grown != 42 {
		t.Errorf("%d, %v", n, err)
	}
	if err := m.Throttle(t.Context(), "pod", "k"); err != nil || s.throttled != "k" {
		t.Errorf("%q, %v", s.throttled, err)
	}
	if _, err := m.Stats(t.Context(), "other", "k"); !errdefs.IsNotFound(err) {
		t.Errorf("no VM: %v", err)
	}
	if _, err := m.Stats(t.Context(), "gone", "k"); !errdefs.IsUnavailable(err) {
		t.Errorf("a shim that is gone: %v", err)
	}
	for _, c := range []struct {
		err error
		is  func(error) bool
	}{
		{errdefs.ErrNotFound, errdefs.IsFailedPrecondition},
		{errdefs.ErrUnavailable, errdefs.IsUnavailable},
		{errdefs.ErrFailedPrecondition, errdefs.IsFailedPrecondition},
	} {
		s.err = fmt.Errorf("in words: %w", c.err)
		if _, err := m.Stats(t.Context(), "pod", "k"); !c.is(err) || errdefs.IsNotFound(err) {
			t.Errorf("%v: %v", c.err, err)
		}
	}
}
