package turn

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func TestTake(t *testing.T) {
	p := Places{Group: t.Name() + t.TempDir(), Count: 3}
	var now, most atomic.Int32
	var wg sync.WaitGroup
	for range 12 {
		wg.Go(func() {
			release, err := p.Take(t.Context())
			if err != nil {
				t.Error(err)
				return
			}
			n := now.Add(1)
			for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
			}
			time.Sleep(time.Millisecond) // the work of a turn
			now.Add(-1)
			release()
			release() // a second time is nobody else's turn
		})
	}
	wg.Wait()
	if m := most.Load(); m < 1 || m > 3 {
		t.Errorf("%d turns at once, want at most 3", m)
	}
}

func TestTakeEnds(t *testing.T) {
	p := Places{Group: t.Name() + t.TempDir(), Count: 1}
	release, err := p.Take(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := p.Take(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a taken place: %v", err)
	}
	if r, err := (Places{Group: "another" + t.TempDir(), Count: 1}).Take(t.Context()); err != nil {
		t.Errorf("another group: %v", err)
	} else {
		r()
	}
	release()
	r, err := p.Take(t.Context())
	if err != nil {
		t.Fatalf("a place given back: %v", err)
	}
	r()
	if _, err := (Places{}).Take(t.Context()); err != nil {
		t.Errorf("no limit: %v", err)
	}
}
