package volume

import (
	"context"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
)

// Push sends a new version of a volume's tree to the guest, in order.
type Push func(ctx context.Context, puts []*hyperstart.PutFilesRequest) error

// Watcher keeps the live volumes of one Pod up to date in the guest: one goroutine,
// which compares every two seconds and pushes one volume at a time; a failed push is
// tried again with growing pauses. Its methods may be called concurrently.
type Watcher struct{ watcher }

// NewWatcher starts a watcher; it ends with Close or ctx.
func NewWatcher(ctx context.Context, push Push) *Watcher { return newWatcher(ctx, push) }

// Add watches the live volumes of a plan; call it once the guest has the plan's
// requests. Every container's plan is added: a volume that is watched already is
// pushed again if the plan had another version of it.
func (w *Watcher) Add(p *Plan) { w.add(p) }

// Close stops the goroutine, cancelling a push under way, and waits for it.
func (w *Watcher) Close() { w.close() }
