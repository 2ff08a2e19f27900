package events

import (
	"context"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	api "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
)

// daemon is containerd's event service.
type daemon struct {
	mu     sync.Mutex
	topics []string
	got    chan struct{}
	spaces []string
}

func (d *daemon) Forward(ctx context.Context, r *api.ForwardRequest) (*emptypb.Empty, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	ns, _ := ttrpc.GetMetadataValue(ctx, namespaceHeader)
	d.spaces = append(d.spaces, ns)
	var e eventsapi.TaskOOM
	if r.Envelope.Event.TypeUrl != "containerd.events.TaskOOM" || proto.Unmarshal(r.Envelope.Event.Value, &e) != nil {
		d.topics = append(d.topics, "bad "+r.Envelope.Event.TypeUrl)
	} else {
		d.topics = append(d.topics, r.Envelope.Topic+e.ContainerID)
	}
	d.got <- struct{}{}
	return &emptypb.Empty{}, nil
}

func (d *daemon) serve(t *testing.T, path string) (stop func()) {
	t.Helper()
	s, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	api.RegisterTTRPCEventsService(s, d)
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(context.Background(), l)
	}()
	return func() {
		_ = s.Close()
		<-done
	}
}

// TestPublishAcrossRestarts: events published while containerd is away arrive, in order.
func TestPublishAcrossRestarts(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	d := &daemon{got: make(chan struct{}, 16)}
	p := New("unix://"+path, "k8s.io")
	p.Publish("/a/", &eventsapi.TaskOOM{ContainerID: "1"}) // before containerd listens
	stop := d.serve(t, path)
	wait := func(n int) {
		t.Helper()
		for range n {
			select {
			case <-d.got:
			case <-time.After(20 * time.Second):
				t.Fatalf("events are missing, got %v", d.topics)
			}
		}
	}
	wait(1)
	stop()
	p.Publish("/a/", &eventsapi.TaskOOM{ContainerID: "2"})
	p.Publish("/b/", &eventsapi.TaskOOM{ContainerID: "3"})
	stop = d.serve(t, path)
	defer stop()
	wait(2)
	p.Publish("/c/", &eventsapi.TaskOOM{ContainerID: "4"})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	p.Close(ctx) // sends what is queued
	d.mu.Lock()
	defer d.mu.Unlock()
	want := []string{"/a/1", "/a/2", "/b/3", "/c/4"}
	if len(d.topics) != 4 {
		t.Fatalf("got %v", d.topics)
	}
	for i, w := range want {
		if d.topics[i] != w || d.spaces[i] != "k8s.io" {
			t.Errorf("event %d is %q of %q, want %q", i, d.topics[i], d.spaces[i], w)
		}
	}
}

func TestCloseWithoutContainerd(t *testing.T) {
	p := New(filepath.Join(t.TempDir(), "none"), "k8s.io")
	for range keep + 10 {
		p.Publish("/a", &eventsapi.TaskOOM{})
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	p.Close(ctx)
	p.Publish("/a", &eventsapi.TaskOOM{})
}
