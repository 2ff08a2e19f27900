package agent

import (
	"context"
	"errors"
	"net"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
)

// TestGuestThatStopsReading: neither the call whose request cannot be sent nor those
// that queue behind it outlive their contexts.
func TestGuestThatStopsReading(t *testing.T) {
	a, b := net.Pipe() // a write waits for its reader, who never comes
	defer b.Close()
	c := newClient(nil, a)
	defer c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	ended := make(chan error)
	for _, call := range []func() error{
		func() error { return c.PutFiles(ctx, []*hyperstart.PutFilesRequest{{Volume: "v"}}) },
		func() error { return c.Signal(ctx, "c", "", 9, false) },
		func() error { return c.Shutdown(ctx, time.Second) },
		func() error { return c.Delete(ctx, "c", "") },
	} {
		go func() { ended <- call() }()
	}
	for range 4 {
		select {
		case err := <-ended:
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("got %v", err)
			}
		case <-time.After(30 * time.Second):
			t.Fatal("a call outlives its context")
		}
	}
	if err := c.Ping(t.Context(), 50*time.Millisecond); !errdefs.IsAborted(err) {
		t.Errorf("ping: %v", err)
	}
}

func TestErrorTextsOfTheGuestAreBounded(t *testing.T) {
	evil := status.Error(codes.NotFound, strings.Repeat("\x1b[31mx\xff\r", 1<<20))
	err := native(evil)
	if !errdefs.IsNotFound(err) {
		t.Errorf("class is lost: %.100v", err)
	}
	if text := err.Error(); len(text) > 2*maxText || strings.ContainsAny(text, "\x1b\r") || !utf8.ValidString(text) {
		t.Errorf("%d bytes: %.100q", len(text), text)
	}
}
