package volume

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
)

// Pauses of the watcher; variables so that tests need not wait.
var (
	// interval between looks. The kubelet itself takes a minute or so to write what changed.
	interval   = 2 * time.Second
	retryFirst = time.Second
	retryMost  = 30 * time.Second
)

// watcher looks at what the kubelet's atomic writer replaces: one link per volume. It does
// not use inotify, of which root has 128 instances on the whole machine by default: with
// one per Pod a node could not even start its own components.
type watcher struct {
	push   Push
	cancel context.CancelFunc
	done   chan struct{}
	kick   chan struct{}

	mu     sync.Mutex
	byPath map[string]*watched
}

// watched is a live volume; what changes is guarded by the watcher's mu.
type watched struct {
	name, dir string
	// version is the guest's; "" if that is not certain.
	version string
	// doubts counts how often add has found the version uncertain.
	doubts int
	// due is when to look again; zero is not before the next interval.
	due   time.Time
	pause time.Duration
}

func newWatcher(ctx context.Context, push Push) *Watcher {
	ctx, cancel := context.WithCancel(ctx)
	w := &Watcher{watcher{
		push: push, cancel: cancel, done: make(chan struct{}),
		kick: make(chan struct{}, 1), byPath: map[string]*watched{},
	}}
	go func() {
		defer close(w.done)
		w.run(ctx)
	}()
	return w
}

func (w *watcher) add(p *Plan) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, d := range p.Decisions {
		if !d.Live {
			continue
		}
		if v := w.byPath[d.HostPath]; v != nil {
			// The plan's files may have been sent after a newer version was pushed.
			if v.version != d.Parts[0].Version {
				v.version, v.due = "", time.Now()
				v.doubts++
			}
			continue
		}
		// Looked at once soon: the kubelet may have written since the plan was made.
		v := &watched{name: d.Volume.Name, dir: d.HostPath, version: d.Parts[0].Version, due: time.Now()}
		w.byPath[v.dir] = v
	}
	select {
	case w.kick <- struct{}{}:
	default:
	}
}

func (w *watcher) run(ctx context.Context) {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			w.touchAll()
		case <-w.kick:
		case <-timer.C:
			w.pushDue(ctx)
		}
		timer.Reset(w.untilDue())
	}
}

// touchAll makes every volume due that does not wait for a retry.
func (w *watcher) touchAll() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, v := range w.byPath {
		if v.due.IsZero() {
			v.due = time.Now()
		}
	}
}

func (w *watcher) untilDue() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	wait := time.Hour
	for _, v := range w.byPath {
		if !v.due.IsZero() {
			wait = min(wait, max(0, time.Until(v.due)))
		}
	}
	return wait
}

func (w *watcher) pushDue(ctx context.Context) {
	w.mu.Lock()
	var due []*watched
	for _, v := range w.byPath {
		if !v.due.IsZero() && !v.due.After(time.Now()) {
			due = append(due, v)
			v.due = time.Time{}
		}
	}
	w.mu.Unlock()
	for _, v := range due {
		err := w.update(ctx, v)
		if ctx.Err() != nil {
			return
		}
		w.mu.Lock()
		switch {
		case err == nil, errdefs.IsNotFound(err):
			// Gone is what the end of a Pod looks like; the next look finds it if it returns.
			v.pause = 0
		default:
			v.pause = min(max(2*v.pause, retryFirst), retryMost)
			v.due = time.Now().Add(v.pause)
			log.G(ctx).WithError(err).WithField("volume", v.name).WithField("retry", v.pause).Warn("volume in the guest is not up to date")
		}
		w.mu.Unlock()
	}
}

func (w *watcher) update(ctx context.Context, v *watched) error {
	w.mu.Lock()
	have, doubts := v.version, v.doubts
	w.mu.Unlock()
	if now, err := currentVersion(v.dir); err != nil || now == have {
		return err
	}
	tree, err := packVersioned(v.dir)
	if err != nil {
		return err
	}
	if err := w.push(ctx, putRequests(v.name, split(tree))); err != nil {
		return fmt.Errorf("push version %s: %w", tree.Version, err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if v.doubts == doubts {
		v.version = tree.Version
	}
	return nil
}

func (w *watcher) close() {
	w.cancel()
	<-w.done
}
