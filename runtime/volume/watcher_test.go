package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
)

func quicken(t *testing.T) {
	t.Helper()
	a, b := retryFirst, interval
	retryFirst, interval = 10*time.Millisecond, 20*time.Millisecond
	t.Cleanup(func() { retryFirst, interval = a, b })
}

// watching starts a watcher of one ConfigMap at version ..0; pushes arrive on the channel.
func watching(t *testing.T, fail func(n int) error) (dir string, w *Watcher, pushed chan *hyperstart.PutFilesRequest) {
	t.Helper()
	p, podDir := newPod(t)
	dir = mkdir(t, filepath.Join(podDir, "volumes/kubernetes.io~configmap/cm"))
	publish(t, dir, "..0", map[string]string{"k": "0"})
	pl, err := p.Plan(t.Context(), []specs.Mount{bind(dir, "/cm")})
	if err != nil {
		t.Fatal(err)
	}
	pushed = make(chan *hyperstart.PutFilesRequest, 1000)
	n := 0
	w = NewWatcher(t.Context(), func(ctx context.Context, puts []*hyperstart.PutFilesRequest) error {
		n++
		if fail != nil {
			if err := fail(n); err != nil {
				return err
			}
		}
		for _, r := range puts {
			pushed <- r
		}
		return nil
	})
	t.Cleanup(w.Close)
	w.Add(pl)
	w.Add(pl)
	return dir, w, pushed
}

func next(t *testing.T, pushed chan *hyperstart.PutFilesRequest) *hyperstart.PutFilesRequest {
	t.Helper()
	select {
	case r := <-pushed:
		return r
	case <-time.After(10 * time.Second):
		t.Fatal("no push")
		return nil
	}
}

func TestWatcher(t *testing.T) {
	quicken(t)
	dir, w, pushed := watching(t, nil)
	for i := 1; i <= 3; i++ {
		publish(t, dir, fmt.Sprintf("..%d", i), map[string]string{"k": fmt.Sprint(i)})
		start := time.Now()
		r := next(t, pushed)
		if r.Volume != "vol.cm" || r.Tree.Version != fmt.Sprintf("..%d", i) || string(r.Tree.Files[0].Data) != fmt.Sprint(i) {
			t.Fatalf("push %v", r)
		}
		t.Logf("pushed after %v", time.Since(start).Round(time.Millisecond))
	}
	// A burst: the last version arrives.
	for i := 4; i <= 60; i++ {
		publish(t, dir, fmt.Sprintf("..%d", i), map[string]string{"k": fmt.Sprint(i)})
	}
	for r := next(t, pushed); r.Tree.Version != "..60"; r = next(t, pushed) {
	}
	// The volume's removal is no reason to fail.
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	w.Close()
	w.Close()
	if len(pushed) != 0 {
		t.Errorf("%d pushes after the end", len(pushed))
	}
}

func TestWatcherRetries(t *testing.T) {
	quicken(t)
	dir, _, pushed := watching(t, func(n int) error {
		if n < 3 {
			return errors.New("guest is busy")
		}
		return nil
	})
	publish(t, dir, "..1", map[string]string{"k": "1"})
	if r := next(t, pushed); r.Tree.Version != "..1" {
		t.Errorf("push %v", r)
	}
}

// TestWatcherReplaced: the directory itself is another.
func TestWatcherReplaced(t *testing.T) {
	quicken(t)
	dir, _, pushed := watching(t, nil)
	if err := os.Rename(dir, dir+"-old"); err != nil {
		t.Fatal(err)
	}
	mkdir(t, dir)
	publish(t, dir, "..9", map[string]string{"k": "9"})
	if r := next(t, pushed); r.Tree.Version != "..9" {
		t.Errorf("push %v", r)
	}
}

// TestWatcherMissed: what changed between the plan and Add is found.
func TestWatcherMissed(t *testing.T) {
	p, podDir := newPod(t)
	dir := mkdir(t, filepath.Join(podDir, "volumes/kubernetes.io~secret/s"))
	publish(t, dir, "..0", map[string]string{"k": "0"})
	pl, err := p.Plan(t.Context(), []specs.Mount{bind(dir, "/s")})
	if err != nil {
		t.Fatal(err)
	}
	publish(t, dir, "..1", map[string]string{"k": "1"})
	pushed := make(chan *hyperstart.PutFilesRequest, 9)
	w := NewWatcher(t.Context(), func(_ context.Context, puts []*hyperstart.PutFilesRequest) error {
		pushed <- puts[0]
		return nil
	})
	defer w.Close()
	w.Add(pl)
	if r := next(t, pushed); r.Tree.Version != "..1" {
		t.Errorf("push %v", r)
	}
}

// TestCloseCancelsPush: a guest that does not answer must not keep Close waiting.
func TestCloseCancelsPush(t *testing.T) {
	p, podDir := newPod(t)
	dir := mkdir(t, filepath.Join(podDir, "volumes/kubernetes.io~secret/s"))
	publish(t, dir, "..0", map[string]string{"k": "0"})
	pl, err := p.Plan(t.Context(), []specs.Mount{bind(dir, "/s")})
	if err != nil {
		t.Fatal(err)
	}
	publish(t, dir, "..1", map[string]string{"k": "1"})
	started := make(chan struct{})
	w := NewWatcher(t.Context(), func(ctx context.Context, _ []*hyperstart.PutFilesRequest) error {
		close(started)
		<-ctx.Done()
		return ctx.Err()
	})
	w.Add(pl)
	<-started
	w.Close()
}

// TestWatcherDoubt: a later container's plan had an older version, which its requests
// may have put back in the guest.
func TestWatcherDoubt(t *testing.T) {
	p, podDir := newPod(t)
	dir := mkdir(t, filepath.Join(podDir, "volumes/kubernetes.io~configmap/cm"))
	publish(t, dir, "..0", map[string]string{"k": "0"})
	old, err := p.Plan(t.Context(), []specs.Mount{bind(dir, "/cm")})
	if err != nil {
		t.Fatal(err)
	}
	publish(t, dir, "..1", map[string]string{"k": "1"})
	now, err := p.Plan(t.Context(), []specs.Mount{bind(dir, "/cm")})
	if err != nil {
		t.Fatal(err)
	}
	pushed := make(chan *hyperstart.PutFilesRequest, 9)
	w := NewWatcher(t.Context(), func(_ context.Context, puts []*hyperstart.PutFilesRequest) error {
		pushed <- puts[0]
		return nil
	})
	defer w.Close()
	w.Add(now)
	w.Add(old)
	if r := next(t, pushed); r.Tree.Version != "..1" {
		t.Errorf("push %v", r)
	}
}
