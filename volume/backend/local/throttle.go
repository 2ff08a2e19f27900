package local

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/containerd/errdefs"
	"k8s.io/apimachinery/pkg/api/resource"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/volume/backend"
	"github.com/hypernetes/hypernetes/volume/record"
)

// Bounds of limits: with less a guest does not mount its file system in time, and more is
// none.
const (
	minIOPS           = 10
	minBytesPerSecond = 64 << 10
	maxLimit          = 1e12
)

var (
	_ backend.Mutable = (*Keeper)(nil)
	_ backend.Limited = (*Node)(nil)
)

// limit is a parameter of a StorageClass or VolumeAttributesClass.
type limit struct {
	least int64
	field func(*v1alpha1.LocalThrottle) *int64
}

var limits = map[string]limit{
	"iops":                {minIOPS, func(t *v1alpha1.LocalThrottle) *int64 { return &t.IOPS }},
	"readIOPS":            {minIOPS, func(t *v1alpha1.LocalThrottle) *int64 { return &t.ReadIOPS }},
	"writeIOPS":           {minIOPS, func(t *v1alpha1.LocalThrottle) *int64 { return &t.WriteIOPS }},
	"bytesPerSecond":      {minBytesPerSecond, func(t *v1alpha1.LocalThrottle) *int64 { return &t.BytesPerSecond }},
	"readBytesPerSecond":  {minBytesPerSecond, func(t *v1alpha1.LocalThrottle) *int64 { return &t.ReadBytesPerSecond }},
	"writeBytesPerSecond": {minBytesPerSecond, func(t *v1alpha1.LocalThrottle) *int64 { return &t.WriteBytesPerSecond }},
}

// throttle reads parameters; nil is no limit.
func throttle(what string, parameters map[string]string) (*v1alpha1.LocalThrottle, error) {
	if len(parameters) == 0 {
		return nil, nil
	}
	t := &v1alpha1.LocalThrottle{}
	for _, name := range slices.Sorted(maps.Keys(parameters)) {
		l, ok := limits[name]
		if !ok {
			return nil, fmt.Errorf("%s: %.100q: local volumes have none of that name, but %v: %w", what, name, slices.Sorted(maps.Keys(limits)), errdefs.ErrInvalidArgument)
		}
		q, err := resource.ParseQuantity(parameters[name])
		if err != nil || q.CmpInt64(l.least) < 0 || q.CmpInt64(maxLimit) > 0 {
			return nil, fmt.Errorf("%s: %s %.100q: want a quantity from %d to %d, such as %d; leave it out for no limit: %w",
				what, name, parameters[name], l.least, int64(maxLimit), 100*l.least, errdefs.ErrInvalidArgument)
		}
		*l.field(t) = q.Value()
	}
	if t.IOPS > 0 && t.ReadIOPS+t.WriteIOPS > 0 {
		return nil, fmt.Errorf("%s: iops bounds reads and writes together: leave it out, or readIOPS and writeIOPS: %w", what, errdefs.ErrInvalidArgument)
	}
	if t.BytesPerSecond > 0 && t.ReadBytesPerSecond+t.WriteBytesPerSecond > 0 {
		return nil, fmt.Errorf("%s: bytesPerSecond bounds reads and writes together: leave it out, or readBytesPerSecond and writeBytesPerSecond: %w", what, errdefs.ErrInvalidArgument)
	}
	return t, nil
}

// chosen are a new volume's limits: its VolumeAttributesClass's, or its StorageClass's.
func chosen(c backend.Create) (*v1alpha1.LocalThrottle, error) {
	t, err := throttle("parameters", c.Parameters)
	if err != nil || len(c.Mutable) == 0 {
		return t, err
	}
	return throttle("mutable parameters", c.Mutable)
}

func recordThrottle(t *v1alpha1.LocalThrottle) *record.Throttle {
	if t == nil || *t == (v1alpha1.LocalThrottle{}) {
		return nil
	}
	return &record.Throttle{
		IOPS: t.IOPS, ReadIOPS: t.ReadIOPS, WriteIOPS: t.WriteIOPS,
		BPS: t.BytesPerSecond, ReadBPS: t.ReadBytesPerSecond, WriteBPS: t.WriteBytesPerSecond,
	}
}

// Modify implements backend.Mutable. A class says all limits: there are no others then. It
// returns when they are in effect.
func (k *Keeper) Modify(ctx context.Context, id string, parameters map[string]string) error {
	want, err := throttle("mutable parameters", parameters)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	v, err := k.volume(ctx, id)
	if err != nil {
		return err
	}
	before := v.DeepCopy()
	v.Spec.Throttle = want
	if err := k.client.Patch(ctx, v, client.MergeFrom(before)); err != nil {
		return apiError(err)
	}
	generation := v.Generation
	for v.Status.ObservedGeneration < generation {
		if v.Status.Phase == v1alpha1.LocalFailed {
			return failure(v.Spec.Node, v.Status.Reason, v.Status.Message)
		}
		if err := wait(ctx, v.Spec.Node, "has not put the limits into effect yet"); err != nil {
			return err
		}
		if v, err = k.volume(ctx, id); err != nil {
			return err
		}
	}
	return nil
}

// Tell implements backend.Limited.
func (n *Node) Tell(l backend.Limits) { n.tell = l }

// limit has a volume's limits be these: of the next VM by the file, of the one that runs by
// telling whom it concerns.
func (n *Node) limit(ctx context.Context, id string, want *record.Throttle) error {
	if err := n.store.LimitVolume(id, want); err != nil {
		return err
	}
	if n.tell == nil {
		return nil
	}
	return n.tell(ctx, id, want)
}
