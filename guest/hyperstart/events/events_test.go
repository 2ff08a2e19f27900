package events

import (
	"context"
	"errors"
	"testing"
	"time"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
)

func TestFollow(t *testing.T) {
	l := New()
	for range Keep + 10 {
		l.OOM("a")
	}
	var seqs []uint64
	stop := errors.New("stop")
	err := l.Follow(t.Context(), 0, func(e *hyperstart.Event) error {
		seqs = append(seqs, e.Seq)
		if len(seqs) == Keep {
			return stop
		}
		return nil
	})
	if !errors.Is(err, stop) || seqs[0] != 11 || seqs[Keep-1] != Keep+10 {
		t.Fatalf("kept %d..%d: %v", seqs[0], seqs[len(seqs)-1], err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	got := make(chan *hyperstart.Event, 1)
	done := make(chan error, 1)
	go func() {
		done <- l.Follow(ctx, Keep+10, func(e *hyperstart.Event) error { got <- e; return nil })
	}()
	l.Exit(time.Now(), &hyperstart.Exit{ContainerId: "b"})
	if e := <-got; e.GetExit().GetContainerId() != "b" || e.Seq != Keep+11 || e.At == nil {
		t.Fatalf("event %v", e)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
}
