package server

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
	"github.com/hypernetes/hypernetes/guest/channel"
	"github.com/hypernetes/hypernetes/guest/hyperstart/block"
	"github.com/hypernetes/hypernetes/guest/hyperstart/container"
	"github.com/hypernetes/hypernetes/guest/hyperstart/events"
	"github.com/hypernetes/hypernetes/guest/hyperstart/sandbox"
	"github.com/hypernetes/hypernetes/guest/hyperstart/stdio"
	"github.com/hypernetes/hypernetes/guest/hyperstart/volume"
)

// serve runs the real server over a pipe, with what needs no kernel.
func serve(t *testing.T) *channel.Host {
	t.Helper()
	sb := sandbox.New(t.TempDir(), nil)
	ready := make(chan struct{})
	close(ready)
	log := events.New()
	log.OOM("x")
	s, err := New(Config{
		Sandbox: sb, Volumes: volume.New(t.TempDir(), sb.Scratch, block.Host{}), Streams: stdio.NewRegistry(), Events: log, Ready: ready,
		Containers: container.New(container.Config{}),
		Hello:      &hyperstart.HelloResponse{ProtocolMinor: 1, AgentVersion: "test"}, PowerOff: func() {},
	})
	if err != nil {
		t.Fatal(err)
	}
	hostEnd, guestEnd := net.Pipe()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, guestEnd) }()
	h, err := channel.NewHost(hostEnd)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		h.Close()
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return h
}

func open(t *testing.T, h *channel.Host, head *hyperstart.StreamHeader) (net.Conn, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	return h.Open(ctx, head)
}

func TestRPC(t *testing.T) {
	h := serve(t)
	conn, err := open(t, h, &hyperstart.StreamHeader{Kind: &hyperstart.StreamHeader_Rpc{Rpc: true}})
	if err != nil {
		t.Fatal(err)
	}
	c := ttrpc.NewClient(conn)
	defer c.Close()
	sb, ctrs := hyperstart.NewSandboxClient(c), hyperstart.NewContainersClient(c)
	hello, err := sb.Hello(t.Context(), &hyperstart.HelloRequest{ProtocolMinor: 9})
	if err != nil || hello.AgentVersion != "test" || hello.ProtocolMinor != 1 {
		t.Fatalf("hello: %v %v", hello, err)
	}
	if _, err := sb.Ping(t.Context(), &emptypb.Empty{}); err != nil {
		t.Fatal(err)
	}
	es, err := sb.Events(t.Context(), &hyperstart.EventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if e, err := es.Recv(); err != nil || e.GetOom().GetContainerId() != "x" {
		t.Fatalf("event: %v %v", e, err)
	}
	// Half-made messages must come back as errors.
	for name, call := range map[string]func() error{
		"delete": func() error { _, err := ctrs.Delete(t.Context(), &hyperstart.ProcessRequest{}); return err },
		"signal": func() error {
			_, err := ctrs.Signal(t.Context(), &hyperstart.SignalRequest{Signal: 1 << 31})
			return err
		},
		"volume": func() error {
			_, err := sb.PutFiles(t.Context(), &hyperstart.PutFilesRequest{Volume: "../x"})
			return err
		},
		"no tree": func() error { _, err := sb.PutFiles(t.Context(), &hyperstart.PutFilesRequest{Volume: "x"}); return err },
		"create": func() error {
			_, err := ctrs.Create(t.Context(), &hyperstart.CreateRequest{ContainerId: "a/b"})
			return err
		},
	} {
		err := errgrpc.ToNative(call())
		if !errors.Is(err, errdefs.ErrNotFound) && !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A handler that panics (no manager's paths, no disks) must not end the server.
	if _, err := ctrs.Create(t.Context(), &hyperstart.CreateRequest{ContainerId: "boom"}); err == nil {
		t.Error("created a container out of nothing")
	}
	if _, err := sb.Ping(t.Context(), &emptypb.Empty{}); err != nil {
		t.Fatalf("server is gone after a panic: %v", err)
	}
}

func TestStreams(t *testing.T) {
	h := serve(t)
	for name, head := range map[string]*hyperstart.StreamHeader{
		"unknown":    {},
		"descriptor": {Kind: &hyperstart.StreamHeader_Stdio{Stdio: &hyperstart.Stdio{Fd: 7}}},
		"no stdio":   {Kind: &hyperstart.StreamHeader_Dial{Dial: &hyperstart.Dial{Port: 70000}}},
	} {
		if _, err := open(t, h, head); err == nil || !strings.Contains(err.Error(), "guest refused") {
			t.Errorf("%s: %v", name, err)
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		b, _ := io.ReadAll(c) // ends by the half close
		_, _ = c.Write(append([]byte("got "), b...))
	}()
	conn, err := open(t, h, &hyperstart.StreamHeader{Kind: &hyperstart.StreamHeader_Dial{
		Dial: &hyperstart.Dial{Port: uint32(l.Addr().(*net.TCPAddr).Port)}}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if b, err := io.ReadAll(conn); err != nil || string(b) != "got x" {
		t.Fatalf("%q %v", b, err)
	}
}
