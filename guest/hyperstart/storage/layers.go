package storage

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"
)

// maxLayers is overlayfs' own limit of lower directories is 500; mount data of one
// page holds this many of our short names.
const maxLayers = 128

// Layers mounts image layers, each once however many containers use it. It may be
// used concurrently.
type Layers struct {
	dir  string
	mu   sync.Mutex
	next int
	used map[string]*layer
}

type layer struct {
	dir   string
	users int
	// ready is closed when mounted or failed with err.
	ready chan struct{}
	err   error
}

// NewLayers mounts layers below dir, whose name should be short.
func NewLayers(dir string) *Layers { return &Layers{dir: dir, used: map[string]*layer{}} }

// Acquire mounts the layer on the disk with that serial read-only, if it is not yet,
// and returns its directory. Each success needs one Release.
func (l *Layers) Acquire(ctx context.Context, serial string) (string, error) {
	l.mu.Lock()
	y, ok := l.used[serial]
	if !ok {
		l.next++
		y = &layer{dir: filepath.Join(l.dir, strconv.Itoa(l.next)), ready: make(chan struct{})}
		l.used[serial] = y
	}
	y.users++
	l.mu.Unlock()
	if ok {
		<-y.ready
	} else {
		y.err = mountLayer(ctx, serial, y.dir)
		close(y.ready)
	}
	if y.err != nil {
		l.drop(serial, y)
		return "", y.err
	}
	return y.dir, nil
}

func mountLayer(ctx context.Context, serial, dir string) error {
	dev, err := Find(ctx, serial)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make layer directory: %w", err)
	}
	if err := unix.Mount(dev, dir, "erofs", unix.MS_RDONLY|unix.MS_NODEV, ""); err != nil {
		_ = os.Remove(dir)
		return fmt.Errorf("mount layer %s (%s) as erofs: %w", serial, dev, err)
	}
	return nil
}

// Release gives a layer back; after its last user it is unmounted.
func (l *Layers) Release(serial string) error {
	l.mu.Lock()
	y := l.used[serial]
	l.mu.Unlock()
	if y == nil {
		return nil
	}
	if !l.drop(serial, y) {
		return nil
	}
	if err := unix.Unmount(y.dir, 0); err != nil {
		return fmt.Errorf("unmount layer %s: %w", serial, err)
	}
	return os.Remove(y.dir)
}

// drop takes one user off and reports whether it was the last.
func (l *Layers) drop(serial string, y *layer) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	y.users--
	if y.users > 0 {
		return false
	}
	if l.used[serial] == y {
		delete(l.used, serial)
	}
	return true
}

// Overlay is a container's root file system.
type Overlay struct {
	layers  *Layers
	serials []string
	target  string
	// Writable is the directory holding upper and work.
	Writable string
}

// Mount stacks the layers (lowest first) below writable/upper at target.
func (l *Layers) Mount(ctx context.Context, serials []string, writable, target string) (*Overlay, error) {
	if len(serials) > maxLayers {
		return nil, fmt.Errorf("root file system of %d layers: more than %d: %w", len(serials), maxLayers, errdefs.ErrInvalidArgument)
	}
	o := &Overlay{layers: l, target: target, Writable: writable}
	lower := make([]string, len(serials))
	for i, s := range serials {
		dir, err := l.Acquire(ctx, s)
		if err != nil {
			return nil, errors.Join(err, o.Unmount())
		}
		o.serials = append(o.serials, s)
		lower[len(serials)-1-i] = dir
	}
	if err := o.mount(lower); err != nil {
		return nil, errors.Join(err, o.Unmount())
	}
	return o, nil
}

func (o *Overlay) mount(lower []string) error {
	if len(lower) == 0 {
		empty := filepath.Join(o.Writable, "lower")
		if err := os.MkdirAll(empty, 0o755); err != nil {
			return fmt.Errorf("make empty layer: %w", err)
		}
		lower = []string{empty}
	}
	upper, work := filepath.Join(o.Writable, "upper"), filepath.Join(o.Writable, "work")
	for _, d := range []string{upper, work, o.target} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return fmt.Errorf("make root file system: %w", err)
		}
	}
	// volatile: the writable layer ends with the VM, so syncing it is wasted work.
	data := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s,volatile", strings.Join(lower, ":"), upper, work)
	if err := unix.Mount("overlay", o.target, "overlay", 0, data); err != nil {
		return fmt.Errorf("mount root file system: %w", err)
	}
	return nil
}

// Unmount takes the root file system apart and removes the writable layer. What does
// not go is reported; the rest goes nevertheless.
func (o *Overlay) Unmount() error {
	var errs []error
	if err := unix.Unmount(o.target, unix.MNT_DETACH); err != nil && err != unix.EINVAL && err != unix.ENOENT {
		errs = append(errs, fmt.Errorf("unmount root file system: %w", err))
	}
	for _, s := range o.serials {
		if err := o.layers.Release(s); err != nil {
			errs = append(errs, err)
		}
	}
	o.serials = nil
	if err := os.RemoveAll(o.Writable); err != nil {
		errs = append(errs, fmt.Errorf("remove writable layer: %w", err))
	}
	return errors.Join(errs...)
}
