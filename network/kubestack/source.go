package kubestack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/containerd/log"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// group runs watches and waits for them.
type group struct {
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	synced []cache.InformerSynced
}

func newGroup(ctx context.Context) *group {
	g := &group{}
	g.ctx, g.cancel = context.WithCancel(ctx)
	return g
}

func (g *group) stop() {
	g.cancel()
	g.wg.Wait()
}

// hasSynced tells whether every watch has begun with all there was.
func (g *group) hasSynced() bool {
	for _, f := range g.synced {
		if !f() {
			return false
		}
	}
	return true
}

// source is what is known of one kind of object. What it gives out must not be changed.
type source[T client.Object] struct{ informer cache.SharedIndexInformer }

// watchAll begins to watch the objects list is a list of. changed is told what an object
// was (the zero T if new) and is (the zero T if gone).
func watchAll[T client.Object](g *group, c client.WithWatch, example T, list client.ObjectList, changed func(was, is T), opts ...client.ListOption) *source[T] {
	options := func(raw metav1.ListOptions) *client.ListOptions {
		lo := &client.ListOptions{Raw: &raw}
		for _, o := range opts {
			o.ApplyToList(lo)
		}
		return lo
	}
	lw := cache.ToListWatcherWithWatchListSemantics(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, raw metav1.ListOptions) (runtime.Object, error) {
			l := list.DeepCopyObject().(client.ObjectList)
			return l, c.List(ctx, l, options(raw))
		},
		WatchFuncWithContext: func(ctx context.Context, raw metav1.ListOptions) (watch.Interface, error) {
			return c.Watch(ctx, list.DeepCopyObject().(client.ObjectList), options(raw))
		},
	}, c)
	informer := cache.NewSharedIndexInformer(lw, example, 0, cache.Indexers{})
	// What nobody here reads would be most of the memory.
	_ = informer.SetTransform(func(o any) (any, error) {
		if m, err := meta.Accessor(o); err == nil {
			m.SetManagedFields(nil)
		}
		return o, nil
	})
	// What it logs itself is switched off; without its rights it would wait in silence.
	_ = informer.SetWatchErrorHandlerWithContext(func(ctx context.Context, _ *cache.Reflector, err error) {
		if ctx.Err() == nil && !apierrors.IsResourceExpired(err) && !errors.Is(err, io.EOF) {
			log.G(ctx).WithError(err).WithField("kind", fmt.Sprintf("%T", example)).Warn("watch")
		}
	})
	var none T
	registration, _ := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(o any) { changed(none, o.(T)) },
		UpdateFunc: func(was, is any) { changed(was.(T), is.(T)) },
		DeleteFunc: func(o any) {
			if d, ok := o.(cache.DeletedFinalStateUnknown); ok {
				o = d.Obj
			}
			if was, ok := o.(T); ok {
				changed(was, none)
			}
		},
	})
	g.synced = append(g.synced, registration.HasSynced)
	g.wg.Go(func() { informer.RunWithContext(g.ctx) })
	return &source[T]{informer}
}

func (s *source[T]) list() []T {
	all := s.informer.GetStore().List()
	out := make([]T, 0, len(all))
	for _, o := range all {
		out = append(out, o.(T))
	}
	return out
}

// get returns an object by namespace/name, or name.
func (s *source[T]) get(key string) (t T, ok bool) {
	o, ok, err := s.informer.GetStore().GetByKey(key)
	if err != nil || !ok {
		return t, false
	}
	return o.(T), true
}
