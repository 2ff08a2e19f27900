package driver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/hypernetes/hypernetes/volume/placeholder"
	"github.com/hypernetes/hypernetes/volume/record"
)

// Collector removes what calls left behind that were killed and never repeated: records
// of Pods without a placeholder, placeholders and loop devices without a record, volumes of
// Pods that are gone. What a VM has stays, and so does what a call is at work on.
type Collector struct {
	Store  record.Store
	Places Places
	// Nodes are the node's drivers.
	Nodes []*Node
	// Root is the kubelet's directory: placeholders elsewhere are not this node's.
	Root string
	// Locks are those of the node's drivers.
	Locks *Locks
	// Interval between two collections.
	Interval time.Duration
	// Observe is told how many publications and placeholders there are; nil for nobody.
	Observe func(publications, placeholders int)
}

// Run collects at once and then again and again until ctx ends.
func (c *Collector) Run(ctx context.Context) error {
	ticker := time.NewTicker(c.Interval)
	defer ticker.Stop()
	for {
		if err := c.Collect(ctx); err != nil {
			log.G(ctx).WithError(err).Warn("collecting what crashes left: again later")
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

// Collect does so once. An error of one volume does not keep the others.
func (c *Collector) Collect(ctx context.Context) error {
	errs := []error{c.Store.Sweep()}
	there, err := c.Places.List()
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	keys, err := c.Store.Keys()
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	all := map[string]bool{}
	for _, key := range keys {
		all[key] = true
	}
	for _, h := range there {
		all[h.Key] = true
	}
	publications := 0
	for _, key := range slices.Sorted(maps.Keys(all)) {
		if err := ctx.Err(); err != nil {
			return errors.Join(append(errs, err)...)
		}
		n, err := c.volume(key)
		publications += n
		if err != nil {
			errs = append(errs, fmt.Errorf("volume %s: %w", key, err))
		}
	}
	for _, n := range c.Nodes {
		errs = append(errs, n.collectInline(ctx, c.Root))
	}
	if c.Observe != nil {
		c.Observe(publications, len(there))
	}
	return errors.Join(errs...)
}

func (c *Collector) volume(key string) (publications int, err error) {
	unlock, err := c.Locks.Try(key)
	if errdefs.IsAborted(err) {
		return 0, nil
	} else if err != nil {
		return 0, err
	}
	defer unlock()
	if err := forget(c.Store, c.Places, key, ""); err != nil {
		return 0, err
	}
	pubs, err := c.Store.Publications(key)
	if err != nil {
		return 0, err
	}
	// Looked at again: a call may have ended since.
	there, err := c.Places.List()
	if err != nil {
		return len(pubs), err
	}
	var errs []error
	for _, h := range there {
		if h.Key != key || h.Target == "" || !strings.HasPrefix(h.Target, c.Root+"/") ||
			slices.ContainsFunc(pubs, func(p record.Publication) bool { return p.Target == h.Target }) {
			continue
		}
		errs = append(errs, c.Places.Remove(key, h.Target))
	}
	if slices.ContainsFunc(there, func(h placeholder.Placeholder) bool {
		return h.Key == key && h.Kind == placeholder.Device && h.Target == ""
	}) {
		errs = append(errs, c.Places.Collect(key))
	}
	return len(pubs), errors.Join(errs...)
}
