package status

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

func TestSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	if err := os.WriteFile(path, nil, 0o600); err != nil { // as a crash leaves it
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var kept bool
	served := make(chan error, 1)
	go func() {
		served <- Serve(ctx, path, Handler{
			Status: func() Node { return Node{Name: "x", Phase: Running} },
			Down: func(_ context.Context, keep bool, report func(Event)) Event {
				kept = keep
				report(Event{Kind: Step, Name: "one"})
				return Event{Kind: Done}
			},
		})
	}()
	c := NewClient(path)
	var st Node
	deadline, tick := time.After(10*time.Second), time.NewTicker(5*time.Millisecond)
	defer tick.Stop()
	for {
		var err error
		if st, err = c.Status(t.Context()); err == nil {
			break
		}
		select {
		case <-deadline:
			t.Fatal(err)
		case <-tick.C:
		}
	}
	if st.Name != "x" || st.Phase != Running {
		t.Errorf("%+v", st)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", info.Mode(), err)
	}
	var steps []string
	last, err := c.Down(t.Context(), true, func(e Event) { steps = append(steps, e.Name) })
	if err != nil || last.Kind != Done || !kept || len(steps) != 1 {
		t.Errorf("%+v %v %t %v", last, err, kept, steps)
	}
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
	if _, err := c.Status(t.Context()); !errdefs.IsUnavailable(err) {
		t.Errorf("after the end: %v", err)
	}
}

func TestReadEvents(t *testing.T) {
	last, err := ReadEvents(strings.NewReader(`{"kind":"step","name":"a"}{"kind":"fail","message":"why"}`), func(Event) {})
	if err != nil || last.Message != "why" {
		t.Errorf("%+v %v", last, err)
	}
	if _, err := ReadEvents(strings.NewReader(`{"kind":"step","name":"a"}`), func(Event) {}); !errdefs.IsUnavailable(err) {
		t.Errorf("a daemon that dies: %v", err)
	}
	if _, err := ReadEvents(strings.NewReader(`nonsense`), func(Event) {}); err == nil || errors.Is(err, context.Canceled) {
		t.Errorf("nonsense: %v", err)
	}
}
