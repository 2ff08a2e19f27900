package cinder

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/network/openstack"
	"github.com/hypernetes/hypernetes/volume/backend"
)

// soon is how long a snapshot is waited for; after that it is said not to be ready.
const soon = 10 * time.Second

// CreateSnapshot implements backend.Snapshots.
func (b *Backend) CreateSnapshot(ctx context.Context, name, of string, params map[string]string) (backend.Snapshot, error) {
	none := backend.Snapshot{}
	if len(params) > 0 {
		for k := range params {
			return none, fmt.Errorf("parameter %.128q is not known: a VolumeSnapshotClass of Cinder's has none: %w", k, errdefs.ErrInvalidArgument)
		}
	}
	release, err := b.busy.take(ctx, "snapshot "+name)
	if err != nil {
		return none, err
	}
	defer release()
	// A name is one snapshot's, whatever it is of.
	s, err := b.snapshotNamed(ctx, name)
	if err != nil {
		return none, err
	}
	if s != nil && s.Volume != of {
		return none, fmt.Errorf("snapshot %s is called %q already and is of volume %s: ask by another name: %w", s.ID, name, s.Volume, errdefs.ErrAlreadyExists)
	}
	var c *openstack.Client
	if s == nil {
		v, _, err := b.find(ctx, of)
		if err != nil {
			return none, err
		}
		// With a token of the volume's project, whose the snapshot is then.
		if c, err = b.maker(ctx, v.Project); err != nil {
			return none, err
		}
		s, err = openstack.Put[snapshot](ctx, c, snaps, "", map[string]any{
			"volume_id": v.ID, "name": name, "force": true,
			"metadata": map[string]string{metaCluster: b.o.Cluster, metaName: name},
		})
		if err != nil {
			return none, explain(state(err), fmt.Sprintf("make snapshot %s of volume %s, which is %s", name, v.ID, v.Status))
		}
	} else if s, c, err = b.findSnapshot(ctx, s.ID); err != nil {
		return none, err
	}
	brief, cancel := context.WithTimeout(ctx, soon)
	defer cancel()
	err = b.poll(brief, "snapshot "+s.ID, func(ctx context.Context) (bool, error) {
		now, err := openstack.Get[snapshot](ctx, c, snaps, s.ID)
		switch {
		case err != nil:
			return false, explain(err, "snapshot "+s.ID)
		case now == nil:
			return false, fmt.Errorf("snapshot %s was deleted while it was made: %w", s.ID, errdefs.ErrUnavailable)
		case now.Status == "error":
			text := why(ctx, c, s.ID)
			return false, errors.Join(fmt.Errorf("snapshot %s of volume %s could not be made: %s: %w", s.ID, of, text, errdefs.ErrFailedPrecondition), b.removeSnapshot(ctx, c, s.ID))
		}
		s = now
		return s.Status == available, nil
	})
	if err != nil && (brief.Err() == nil || ctx.Err() != nil) {
		return none, err
	}
	return seenSnapshot(s), nil
}

func (b *Backend) snapshotNamed(ctx context.Context, name string) (*snapshot, error) {
	all, err := everywhere[snapshot](ctx, b, snapsFull, query("name", name))
	if err != nil {
		return nil, err
	}
	all = slices.DeleteFunc(all, func(s snapshot) bool {
		return s.Metadata[metaCluster] != b.o.Cluster || s.Metadata[metaName] != name || s.Status == deleting
	})
	if len(all) == 0 {
		return nil, nil
	}
	s := slices.MinFunc(all, func(x, y snapshot) int {
		return cmp.Or(cmp.Compare(x.CreatedAt, y.CreatedAt), cmp.Compare(x.ID, y.ID))
	})
	return &s, nil
}

func seenSnapshot(s *snapshot) backend.Snapshot {
	return backend.Snapshot{
		ID: s.ID, Name: s.Metadata[metaName], Volume: s.Volume, SizeBytes: s.Size * gib, CreatedAt: when(s.CreatedAt), Ready: s.Status == available,
	}
}

// DeleteSnapshot implements backend.Snapshots.
func (b *Backend) DeleteSnapshot(ctx context.Context, id string) error {
	release, err := b.busy.take(ctx, id)
	if err != nil {
		return err
	}
	defer release()
	_, c, err := b.findSnapshot(ctx, id)
	if errdefs.IsNotFound(err) {
		return nil
	} else if err != nil {
		return err
	}
	return b.removeSnapshot(ctx, c, id)
}

func (b *Backend) removeSnapshot(ctx context.Context, c *openstack.Client, id string) error {
	asked := false
	return b.poll(ctx, "delete snapshot "+id, func(ctx context.Context) (bool, error) {
		s, err := openstack.Get[snapshot](ctx, c, snaps, id)
		switch {
		case err != nil:
			return false, explain(err, "snapshot "+id)
		case s == nil:
			return true, nil
		case s.Status == deleting:
			asked = true
			return false, nil
		case asked:
			return false, fmt.Errorf("snapshot %s was not deleted, its status is %s: %s: %w", id, s.Status, why(ctx, c, id), errdefs.ErrFailedPrecondition)
		}
		asked = true
		return false, explain(state(openstack.Remove(ctx, c, snaps, id, nil)), "delete snapshot "+id)
	})
}

// GetSnapshot implements backend.Snapshots.
func (b *Backend) GetSnapshot(ctx context.Context, id string) (backend.Snapshot, error) {
	s, _, err := b.findSnapshot(ctx, id)
	if err != nil {
		return backend.Snapshot{}, err
	}
	return seenSnapshot(s), nil
}

// ListSnapshots implements backend.Snapshots: those that the cluster made.
func (b *Backend) ListSnapshots(ctx context.Context, of, after string, limit int) ([]backend.Snapshot, error) {
	q := query()
	if of != "" {
		if !idPattern.MatchString(of) {
			return nil, nil
		}
		q.Set("volume_id", of)
	}
	all, err := everywhere[snapshot](ctx, b, snapsFull, q)
	if err != nil {
		return nil, err
	}
	var out []backend.Snapshot
	for i := range all {
		s := &all[i]
		if s.Metadata[metaCluster] == b.o.Cluster && s.Status != deleting && s.ID > after && (of == "" || s.Volume == of) {
			out = append(out, seenSnapshot(s))
		}
	}
	slices.SortFunc(out, func(x, y backend.Snapshot) int { return strings.Compare(x.ID, y.ID) })
	if limit > 0 && len(out) > limit {
		out = out[:limit]
	}
	return out, nil
}
