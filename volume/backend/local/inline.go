package local

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/volume/backend"
)

// maxInline is how many volumes Pods of a node have of their own: the scheduler does not
// count them.
const maxInline = 256

var _ backend.Inlines = (*Node)(nil)

// CreateInline implements backend.Inlines.
func (n *Node) CreateInline(ctx context.Context, v backend.Inline, bytes int64) (backend.Connection, error) {
	d, err := n.store.Inline(v.ID)
	if errdefs.IsNotFound(err) {
		if err := n.makeInline(ctx, v, bytes); err != nil {
			return backend.Connection{}, err
		}
		d, err = n.store.Inline(v.ID)
	}
	if err != nil {
		return backend.Connection{}, err
	}
	return connection(d), nil
}

func (n *Node) makeInline(ctx context.Context, v backend.Inline, bytes int64) error {
	bytes, err := size(bytes, 0)
	if err != nil {
		return err
	}
	most, err := n.inlineMax(ctx)
	if err != nil {
		return err
	}
	if most.CmpInt64(bytes) < 0 {
		return fmt.Errorf("size: %d bytes: a Pod's own volume has at most %s on node %s (spec.inlineMax of its LocalStore): ask for less, or use volumes[].ephemeral: %w",
			bytes, most.String(), n.name, errdefs.ErrOutOfRange)
	}
	// Concurrent calls may be over it by their number.
	if all, err := n.store.ids(inlineDir); err != nil {
		return err
	} else if len(all) >= maxInline {
		return fmt.Errorf("node %s has %d volumes of Pods' own already: use volumes[].ephemeral, which the scheduler counts: %w", n.name, len(all), errdefs.ErrResourceExhausted)
	}
	defer n.roomChanged()
	return n.store.CreateInline(v.ID, v.Owner, bytes)
}

// inlineMax is what the operator allows here.
func (n *Node) inlineMax(ctx context.Context) (resource.Quantity, error) {
	s := &v1alpha1.LocalStore{}
	err := n.client.Get(ctx, client.ObjectKey{Name: n.name}, s)
	switch {
	case apierrors.IsNotFound(err) || err == nil && s.Spec.InlineMax == nil:
		return resource.MustParse(v1alpha1.DefaultInlineMax), nil
	case err != nil:
		return resource.Quantity{}, apiError(err)
	}
	return *s.Spec.InlineMax, nil
}

// DeleteInline implements backend.Inlines.
func (n *Node) DeleteInline(_ context.Context, id string) error {
	defer n.roomChanged()
	return n.store.DeleteInline(id)
}

// ListInline implements backend.Inlines.
func (n *Node) ListInline() ([]backend.Inline, error) {
	ids, err := n.store.ids(inlineDir)
	if err != nil {
		return nil, err
	}
	var out []backend.Inline
	for _, id := range ids {
		d, err := n.store.Inline(id)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		out = append(out, backend.Inline{ID: id, Owner: d.Owner})
	}
	return out, nil
}
