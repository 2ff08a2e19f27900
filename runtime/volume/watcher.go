package volume

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/fsnotify/fsnotify"
)

// Pauses of the watcher; variables so that tests need not wait.
var (
	settle     = 20 * time.Millisecond
	resync     = time.Minute
	poll       = 5 * time.Second
	retryFirst = time.Second
	retryMost  = 30 * time.Second
)

// newNotifier is a variable so that a test can do without the kernel's.
var newNotifier = func() (*fsnotify.Watcher, error) { return fsnotify.NewBufferedWatcher(64) }

type watcher struct {
	push Push
	// notify is nil where the kernel has no more instances: then volumes are polled.
	notify *fsnotify.Watcher
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
	// due is when to look again; zero is not before the next event or resync.
	due   time.Time
	pause time.Duration
}

func newWatcher(ctx context.Context, push Push) (*Watcher, error) {
	n, every := (*fsnotify.Watcher)(nil), resync
	if made, err := newNotifier(); err == nil {
		n = made
	} else {
		// A machine's root may have 128 of them by default: with more Pods than that, changes
		// are seen later, but no Pod is refused.
		log.G(ctx).WithError(err).WithField("interval", poll).Warn("volumes are looked at instead of watched; see sysctl fs.inotify.max_user_instances")
		every = poll
	}
	ctx, cancel := context.WithCancel(ctx)
	w := &Watcher{watcher{
		push: push, notify: n, cancel: cancel, done: make(chan struct{}),
		kick: make(chan struct{}, 1), byPath: map[string]*watched{},
	}}
	go func() {
		defer close(w.done)
		w.run(ctx, every)
		if n != nil {
			_ = n.Close()
		}
	}()
	return w, nil
}

// watch has the kernel tell of changes in dir, if it does at all.
func (w *watcher) watch(dir string) error {
	if w.notify == nil {
		return nil
	}
	return w.notify.Add(dir)
}

func (w *watcher) add(p *Plan) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	var errs []error
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
		if err := w.watch(v.dir); err != nil && !errors.Is(err, fsnotify.ErrClosed) {
			errs = append(errs, fmt.Errorf("watch %s (updates will take up to %v; see sysctl fs.inotify.max_user_watches): %w", v.dir, resync, err))
		}
	}
	select {
	case w.kick <- struct{}{}:
	default:
	}
	return errors.Join(errs...)
}

func (w *watcher) run(ctx context.Context, every time.Duration) {
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	var events chan fsnotify.Event
	var failures chan error
	if w.notify != nil {
		events, failures = w.notify.Events, w.notify.Errors
	}
	for {
		select {
		case <-ctx.Done():
			return
		case e, ok := <-events:
			if !ok {
				return
			}
			if filepath.Base(e.Name) == dataLink && e.Op.Has(fsnotify.Create) {
				w.touch(filepath.Dir(e.Name))
			}
		case err, ok := <-failures:
			if !ok {
				return
			}
			// Usually an overflow of the kernel's queue: compare everything.
			log.G(ctx).WithError(err).Warn("lost events of volumes")
			w.touchAll()
		case <-ticker.C:
			w.touchAll()
		case <-w.kick:
		case <-timer.C:
			w.pushDue(ctx)
		}
		timer.Reset(w.untilDue())
	}
}

// touch makes a volume due after a burst of events has settled.
func (w *watcher) touch(dir string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if v := w.byPath[dir]; v != nil {
		v.due, v.pause = time.Now().Add(settle), 0
	}
}

// touchAll makes every volume due that does not wait for a retry, and renews the
// watches of directories that were replaced.
func (w *watcher) touchAll() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for dir, v := range w.byPath {
		// A failure shows when the volume is read.
		_ = w.watch(dir)
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
			// Gone is what the end of a Pod looks like; a resync finds it if it returns.
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

func (w *watcher) close() error {
	w.cancel()
	<-w.done
	return nil
}
