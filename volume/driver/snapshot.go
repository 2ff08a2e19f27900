package driver

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/hypernetes/hypernetes/volume/backend"
)

func int64Value(n int64) *wrapperspb.Int64Value { return wrapperspb.Int64(n) }

func snapshot(s backend.Snapshot) *csi.Snapshot {
	return &csi.Snapshot{
		SnapshotId: s.ID, SourceVolumeId: s.Volume, SizeBytes: s.SizeBytes,
		CreationTime: timestamppb.New(time.Unix(s.CreatedAt, 0)), ReadyToUse: s.Ready,
	}
}

// CreateSnapshot implements csi.ControllerServer.
func (c *Controller) CreateSnapshot(ctx context.Context, r *csi.CreateSnapshotRequest) (*csi.CreateSnapshotResponse, error) {
	snaps, ok := c.Volumes.(backend.Snapshots)
	if !ok {
		return nil, c.not("CreateSnapshot")
	}
	if err := required("name", r.GetName()); err != nil {
		return nil, err
	}
	known, err := handle("source_volume_id", r.GetSourceVolumeId())
	if err != nil {
		return nil, err
	}
	if !known {
		return nil, fmt.Errorf("volume %q: %w", bounded(r.GetSourceVolumeId()), errdefs.ErrNotFound)
	}
	if err := checkMap("parameters", r.GetParameters()); err != nil {
		return nil, err
	}
	parameters := map[string]string{}
	for k, v := range r.GetParameters() {
		if !strings.HasPrefix(k, sidecarPrefix) {
			parameters[k] = v
		}
	}
	unlock, err := c.locks.Try("snapshot " + r.GetName())
	if err != nil {
		return nil, err
	}
	defer unlock()
	s, err := snaps.CreateSnapshot(ctx, r.GetName(), r.GetSourceVolumeId(), parameters)
	if err != nil {
		return nil, err
	}
	return &csi.CreateSnapshotResponse{Snapshot: snapshot(s)}, nil
}

// DeleteSnapshot implements csi.ControllerServer.
func (c *Controller) DeleteSnapshot(ctx context.Context, r *csi.DeleteSnapshotRequest) (*csi.DeleteSnapshotResponse, error) {
	snaps, ok := c.Volumes.(backend.Snapshots)
	if !ok {
		return nil, c.not("DeleteSnapshot")
	}
	known, err := handle("snapshot_id", r.GetSnapshotId())
	if err != nil {
		return nil, err
	}
	if known {
		unlock, err := c.locks.Try("snapshot " + r.GetSnapshotId())
		if err != nil {
			return nil, err
		}
		defer unlock()
		if err := snaps.DeleteSnapshot(ctx, r.GetSnapshotId()); err != nil && !errdefs.IsNotFound(err) {
			return nil, err
		}
	}
	return &csi.DeleteSnapshotResponse{}, nil
}

// GetSnapshot implements csi.ControllerServer.
func (c *Controller) GetSnapshot(ctx context.Context, r *csi.GetSnapshotRequest) (*csi.GetSnapshotResponse, error) {
	snaps, ok := c.Volumes.(backend.Snapshots)
	if !ok {
		return nil, c.not("GetSnapshot")
	}
	known, err := handle("snapshot_id", r.GetSnapshotId())
	if err != nil {
		return nil, err
	}
	if !known {
		return nil, fmt.Errorf("snapshot %q: %w", bounded(r.GetSnapshotId()), errdefs.ErrNotFound)
	}
	s, err := snaps.GetSnapshot(ctx, r.GetSnapshotId())
	if err != nil {
		return nil, err
	}
	return &csi.GetSnapshotResponse{Snapshot: snapshot(s)}, nil
}

// ListSnapshots implements csi.ControllerServer.
func (c *Controller) ListSnapshots(ctx context.Context, r *csi.ListSnapshotsRequest) (*csi.ListSnapshotsResponse, error) {
	snaps, ok := c.Volumes.(backend.Snapshots)
	if !ok {
		return nil, c.not("ListSnapshots")
	}
	limit, err := page(r.GetMaxEntries())
	if err != nil {
		return nil, err
	}
	last, err := after(r.GetStartingToken())
	if err != nil {
		return nil, err
	}
	resp := &csi.ListSnapshotsResponse{}
	if id := r.GetSnapshotId(); id != "" {
		if known, _ := handle("snapshot_id", id); !known {
			return resp, nil
		}
		s, err := snaps.GetSnapshot(ctx, id)
		switch {
		case errdefs.IsNotFound(err), err == nil && r.GetSourceVolumeId() != "" && s.Volume != r.GetSourceVolumeId():
			return resp, nil
		case err != nil:
			return nil, err
		}
		resp.Entries = []*csi.ListSnapshotsResponse_Entry{{Snapshot: snapshot(s)}}
		return resp, nil
	}
	if id := r.GetSourceVolumeId(); id != "" {
		if known, _ := handle("source_volume_id", id); !known {
			return resp, nil
		}
	}
	list, err := snaps.ListSnapshots(ctx, r.GetSourceVolumeId(), last, limit+1)
	if errdefs.IsNotFound(err) {
		return resp, nil
	}
	if err != nil {
		return nil, err
	}
	if len(list) > limit {
		list = list[:limit]
		resp.NextToken = token(list[limit-1].ID)
	}
	for _, s := range list {
		resp.Entries = append(resp.Entries, &csi.ListSnapshotsResponse_Entry{Snapshot: snapshot(s)})
	}
	return resp, nil
}
