package driver

import (
	"cmp"
	"context"
	"encoding/base64"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/volume/backend"
	"github.com/hypernetes/hypernetes/volume/sealed"
)

const (
	// DefaultBytes is what a volume has if nobody says; it is also the least.
	DefaultBytes = 1 << 30
	// minXFS is what mkfs.xfs wants (xfsprogs 5.19).
	minXFS = 300 << 20
	// maxPage bounds a list, and so a message.
	maxPage = 1000
)

// Keys of a publish context.
const (
	publishAttachment = "attachment"
	publishSealed     = "sealed"
)

// ParameterFSGroup is the StorageClass's parameter that says whether a Pod's fsGroup is
// applied to every file at each start (Always) or, as by default, if the volume's root
// does not have it (OnRootMismatch). The kubelet does not hand the Pod's own policy to
// drivers.
const ParameterFSGroup = "fsGroupChangePolicy"

// sidecarPrefix begins the parameters that are for or from the provisioner.
const sidecarPrefix = "csi.storage.k8s.io/"

// Nodes finds a node's CSI ID by its name, "" if it has none.
type Nodes interface {
	NodeID(ctx context.Context, driver, node string) (string, error)
}

// Controller is the CSI controller service over a backend.
type Controller struct {
	csi.UnimplementedControllerServer
	// Driver is the CSI driver's name.
	Driver string
	// Volumes keeps them; what else of package backend it implements is offered.
	Volumes backend.Volumes
	// FSTypes that guests mount; DefaultFSTypes if nil.
	FSTypes []string
	// MultiNode: a volume may be attached to several nodes.
	MultiNode bool
	// TopologyKeys are the segments that say where a volume is; others are not passed on.
	TopologyKeys []string
	// Nodes tells where volumes are published; nil, and that is not offered.
	Nodes Nodes

	locks Locks
}

var _ csi.ControllerServer = (*Controller)(nil)

func (c *Controller) rules() rules {
	if c.FSTypes == nil {
		return rules{c.Driver, DefaultFSTypes, c.MultiNode}
	}
	return rules{c.Driver, c.FSTypes, c.MultiNode}
}

// ControllerGetCapabilities implements csi.ControllerServer.
func (c *Controller) ControllerGetCapabilities(context.Context, *csi.ControllerGetCapabilitiesRequest) (*csi.ControllerGetCapabilitiesResponse, error) {
	types := []csi.ControllerServiceCapability_RPC_Type{
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME,
		csi.ControllerServiceCapability_RPC_LIST_VOLUMES,
		csi.ControllerServiceCapability_RPC_CLONE_VOLUME,
		csi.ControllerServiceCapability_RPC_EXPAND_VOLUME,
		csi.ControllerServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
	}
	if _, ok := c.Volumes.(backend.Capacity); ok {
		types = append(types, csi.ControllerServiceCapability_RPC_GET_CAPACITY)
	}
	if _, ok := c.Volumes.(backend.Snapshots); ok {
		types = append(types, csi.ControllerServiceCapability_RPC_CREATE_DELETE_SNAPSHOT,
			csi.ControllerServiceCapability_RPC_LIST_SNAPSHOTS, csi.ControllerServiceCapability_RPC_GET_SNAPSHOT)
	}
	if _, ok := c.Volumes.(backend.Attachments); ok {
		types = append(types, csi.ControllerServiceCapability_RPC_PUBLISH_UNPUBLISH_VOLUME, csi.ControllerServiceCapability_RPC_PUBLISH_READONLY)
		if c.Nodes != nil {
			types = append(types, csi.ControllerServiceCapability_RPC_LIST_VOLUMES_PUBLISHED_NODES)
		}
	}
	if _, ok := c.Volumes.(backend.Mutable); ok {
		types = append(types, csi.ControllerServiceCapability_RPC_MODIFY_VOLUME)
	}
	resp := &csi.ControllerGetCapabilitiesResponse{}
	for _, t := range types {
		resp.Capabilities = append(resp.Capabilities, &csi.ControllerServiceCapability{
			Type: &csi.ControllerServiceCapability_Rpc{Rpc: &csi.ControllerServiceCapability_RPC{Type: t}},
		})
	}
	return resp, nil
}

// CreateVolume implements csi.ControllerServer.
func (c *Controller) CreateVolume(ctx context.Context, r *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	if err := required("name", r.GetName()); err != nil {
		return nil, err
	}
	if len(r.GetVolumeCapabilities()) == 0 {
		return nil, fmt.Errorf("volume_capabilities are missing: set one at least: %w", errdefs.ErrInvalidArgument)
	}
	ask, xfs := backend.Create{Name: r.GetName()}, false
	for _, vc := range r.GetVolumeCapabilities() {
		u, err := c.rules().read(vc)
		if err != nil {
			return nil, err
		}
		ask.MultiAttach = ask.MultiAttach || u.nodes
		xfs = xfs || u.fsType == "xfs"
	}
	volumeContext, err := c.parameters(r, &ask)
	if err != nil {
		return nil, err
	}
	if ask.MinBytes, ask.MaxBytes, err = size(r.GetCapacityRange()); err != nil {
		return nil, err
	}
	unlock, err := c.locks.Try("volume " + ask.Name)
	if err != nil {
		return nil, err
	}
	defer unlock()
	source, err := c.source(ctx, r.GetVolumeContentSource(), &ask)
	if err != nil {
		return nil, err
	}
	ask.MinBytes = max(ask.MinBytes, source)
	if ask.MinBytes == 0 {
		ask.MinBytes = DefaultBytes
		if ask.MaxBytes != 0 {
			ask.MinBytes = min(ask.MinBytes, ask.MaxBytes)
		}
	}
	if xfs && ask.MinBytes < minXFS {
		return nil, bad("capacity_range.required_bytes", ask.MinBytes, fmt.Sprintf("xfs needs %d: ask for as many at least, or use ext4", minXFS), errdefs.ErrOutOfRange)
	}
	ask.Topologies = c.topologies(r.GetAccessibilityRequirements())
	v, err := c.Volumes.Create(ctx, ask)
	if err != nil {
		return nil, err
	}
	return &csi.CreateVolumeResponse{Volume: &csi.Volume{
		VolumeId: v.ID, CapacityBytes: v.SizeBytes, VolumeContext: volumeContext,
		ContentSource: r.GetVolumeContentSource(), AccessibleTopology: topology(v.Topology),
	}}, nil
}

// parameters splits a StorageClass's parameters into what the provisioner adds, what this
// driver knows, which goes into the volume's context, and what the backend knows.
func (c *Controller) parameters(r *csi.CreateVolumeRequest, ask *backend.Create) (map[string]string, error) {
	if err := checkMap("parameters", r.GetParameters()); err != nil {
		return nil, err
	}
	if err := checkMap("mutable_parameters", r.GetMutableParameters()); err != nil {
		return nil, err
	}
	ask.Parameters = map[string]string{}
	var volumeContext map[string]string
	for k, v := range r.GetParameters() {
		switch {
		case k == sidecarPrefix+"pvc/namespace":
			ask.Namespace = v
		case k == sidecarPrefix+"pvc/name":
			ask.Claim = v
		case strings.HasPrefix(k, sidecarPrefix):
		case k == ParameterFSGroup:
			if v != "Always" && v != "OnRootMismatch" {
				return nil, bad("parameter "+k, v, "use Always or OnRootMismatch", errdefs.ErrInvalidArgument)
			}
			volumeContext = map[string]string{k: v}
		default:
			ask.Parameters[k] = v
		}
	}
	if ask.Mutable = r.GetMutableParameters(); len(ask.Mutable) > 0 {
		if _, ok := c.Volumes.(backend.Mutable); !ok {
			return nil, bad("mutable_parameters", slices.Sorted(maps.Keys(ask.Mutable)), "volumes of driver "+c.Driver+" have none: leave out the VolumeAttributesClass", errdefs.ErrInvalidArgument)
		}
	}
	return volumeContext, nil
}

// source looks at what a volume begins as a copy of, and returns its size.
func (c *Controller) source(ctx context.Context, s *csi.VolumeContentSource, ask *backend.Create) (int64, error) {
	var bytes int64
	switch t := s.GetType().(type) {
	case nil:
		if s != nil {
			return 0, fmt.Errorf("volume_content_source.type is missing: set snapshot or volume: %w", errdefs.ErrInvalidArgument)
		}
		return 0, nil
	case *csi.VolumeContentSource_Snapshot:
		snaps, ok := c.Volumes.(backend.Snapshots)
		if !ok {
			return 0, fmt.Errorf("volume_content_source.snapshot: driver %s has no snapshots: %w", c.Driver, errdefs.ErrInvalidArgument)
		}
		id := t.Snapshot.GetSnapshotId()
		if known, err := handle("volume_content_source.snapshot.snapshot_id", id); err != nil {
			return 0, err
		} else if !known {
			return 0, fmt.Errorf("snapshot %q: %w", bounded(id), errdefs.ErrNotFound)
		}
		shot, err := snaps.GetSnapshot(ctx, id)
		if err != nil {
			return 0, err
		}
		if !shot.Ready {
			return 0, fmt.Errorf("snapshot %s is not ready yet: %w", id, errdefs.ErrUnavailable)
		}
		ask.Snapshot, bytes = id, shot.SizeBytes
	case *csi.VolumeContentSource_Volume:
		id := t.Volume.GetVolumeId()
		if known, err := handle("volume_content_source.volume.volume_id", id); err != nil {
			return 0, err
		} else if !known {
			return 0, fmt.Errorf("volume %q: %w", bounded(id), errdefs.ErrNotFound)
		}
		v, err := c.Volumes.Get(ctx, id)
		if err != nil {
			return 0, err
		}
		ask.Parent, bytes = id, v.SizeBytes
	default:
		return 0, fmt.Errorf("volume_content_source.type %T is none that this driver knows: %w", t, errdefs.ErrInvalidArgument)
	}
	switch {
	case ask.MinBytes != 0 && ask.MinBytes < bytes:
		return 0, bad("capacity_range.required_bytes", ask.MinBytes, fmt.Sprintf("the source has %d bytes: ask for as many at least", bytes), errdefs.ErrOutOfRange)
	case ask.MaxBytes != 0 && ask.MaxBytes < bytes:
		return 0, bad("capacity_range.limit_bytes", ask.MaxBytes, fmt.Sprintf("the source has %d bytes: allow as many at least", bytes), errdefs.ErrOutOfRange)
	}
	return bytes, nil
}

// topologies are the places to choose from: the preferred first, then the others.
func (c *Controller) topologies(r *csi.TopologyRequirement) []map[string]string {
	var out []map[string]string
	for _, t := range slices.Concat(r.GetPreferred(), r.GetRequisite()) {
		segments := map[string]string{}
		for _, k := range c.TopologyKeys {
			if v, ok := t.GetSegments()[k]; ok {
				segments[k] = v
			}
		}
		if len(segments) > 0 && !slices.ContainsFunc(out, func(m map[string]string) bool { return maps.Equal(m, segments) }) {
			out = append(out, segments)
		}
	}
	return out
}

func topology(segments map[string]string) []*csi.Topology {
	if segments == nil {
		return nil
	}
	return []*csi.Topology{{Segments: segments}}
}

// volume locks a volume by its handle.
func (c *Controller) lock(id string) (func(), error) { return c.locks.Try("volume " + id) }

// find gets a volume whose handle came in a request.
func (c *Controller) find(ctx context.Context, id string) (backend.Volume, error) {
	known, err := handle("volume_id", id)
	if err != nil {
		return backend.Volume{}, err
	}
	if !known {
		return backend.Volume{}, fmt.Errorf("volume %q: %w", bounded(id), errdefs.ErrNotFound)
	}
	return c.Volumes.Get(ctx, id)
}

// DeleteVolume implements csi.ControllerServer.
func (c *Controller) DeleteVolume(ctx context.Context, r *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	known, err := handle("volume_id", r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	if known {
		unlock, err := c.lock(r.GetVolumeId())
		if err != nil {
			return nil, err
		}
		defer unlock()
		if err := c.Volumes.Delete(ctx, r.GetVolumeId()); err != nil && !errdefs.IsNotFound(err) {
			return nil, err
		}
	}
	return &csi.DeleteVolumeResponse{}, nil
}

// NodeID joins a node's name and its key to its CSI ID.
func NodeID(node string, key sealed.Public) string { return node + "/" + key.String() }

// ParseNodeID reads what NodeID returned.
func ParseNodeID(id string) (node string, key sealed.Public, err error) {
	node, text, ok := strings.Cut(id, "/")
	if !ok || node == "" {
		return "", key, fmt.Errorf("node_id %.200q is not NODE/KEY: %w", id, errdefs.ErrInvalidArgument)
	}
	key, err = sealed.ParsePublic(text)
	return node, key, err
}

// ControllerPublishVolume implements csi.ControllerServer.
func (c *Controller) ControllerPublishVolume(ctx context.Context, r *csi.ControllerPublishVolumeRequest) (*csi.ControllerPublishVolumeResponse, error) {
	a, ok := c.Volumes.(backend.Attachments)
	if !ok {
		return nil, c.not("ControllerPublishVolume")
	}
	if _, err := handle("volume_id", r.GetVolumeId()); err != nil {
		return nil, err
	}
	if r.GetNodeId() == "" {
		return nil, fmt.Errorf("node_id is missing: set it: %w", errdefs.ErrInvalidArgument)
	}
	u, err := c.rules().read(r.GetVolumeCapability())
	if err != nil {
		return nil, err
	}
	unlock, err := c.lock(r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	defer unlock()
	if _, err := c.find(ctx, r.GetVolumeId()); err != nil {
		return nil, err
	}
	node, key, err := ParseNodeID(r.GetNodeId())
	if err != nil {
		return nil, fmt.Errorf("%v: no plugin of driver %s registered such a node; look at its CSINode: %w", err, c.Driver, errdefs.ErrNotFound)
	}
	conn, err := a.Attach(ctx, backend.Attach{Volume: r.GetVolumeId(), Node: node, ReadOnly: r.GetReadonly() || u.readOnly, Shared: u.nodes})
	if err != nil {
		return nil, err
	}
	box, err := sealed.Seal(key, sealed.For{Driver: c.Driver, Volume: r.GetVolumeId(), Node: node}, conn)
	if err != nil {
		return nil, err
	}
	// Nothing else about the connection leaves: who may list VolumeAttachments reads this.
	return &csi.ControllerPublishVolumeResponse{PublishContext: map[string]string{publishAttachment: conn.Attachment, publishSealed: box}}, nil
}

// ControllerUnpublishVolume implements csi.ControllerServer.
func (c *Controller) ControllerUnpublishVolume(ctx context.Context, r *csi.ControllerUnpublishVolumeRequest) (*csi.ControllerUnpublishVolumeResponse, error) {
	a, ok := c.Volumes.(backend.Attachments)
	if !ok {
		return nil, c.not("ControllerUnpublishVolume")
	}
	known, err := handle("volume_id", r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	resp := &csi.ControllerUnpublishVolumeResponse{}
	if !known {
		return resp, nil
	}
	unlock, err := c.lock(r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	defer unlock()
	// The node may have another key by now, or be no more: its name is enough.
	node, _, _ := strings.Cut(r.GetNodeId(), "/")
	if node == "" && r.GetNodeId() != "" {
		return resp, nil
	}
	if err := a.Detach(ctx, r.GetVolumeId(), node); err != nil && !errdefs.IsNotFound(err) {
		return nil, err
	}
	return resp, nil
}

func (c *Controller) not(call string) error {
	return fmt.Errorf("driver %s has no %s: %w", c.Driver, call, errdefs.ErrNotImplemented)
}

// ValidateVolumeCapabilities implements csi.ControllerServer.
func (c *Controller) ValidateVolumeCapabilities(ctx context.Context, r *csi.ValidateVolumeCapabilitiesRequest) (*csi.ValidateVolumeCapabilitiesResponse, error) {
	if _, err := handle("volume_id", r.GetVolumeId()); err != nil {
		return nil, err
	}
	if len(r.GetVolumeCapabilities()) == 0 {
		return nil, fmt.Errorf("volume_capabilities are missing: set one at least: %w", errdefs.ErrInvalidArgument)
	}
	if _, err := c.find(ctx, r.GetVolumeId()); err != nil {
		return nil, err
	}
	for _, vc := range r.GetVolumeCapabilities() {
		if _, err := c.rules().read(vc); err != nil {
			return &csi.ValidateVolumeCapabilitiesResponse{Message: err.Error()}, nil
		}
	}
	return &csi.ValidateVolumeCapabilitiesResponse{Confirmed: &csi.ValidateVolumeCapabilitiesResponse_Confirmed{
		VolumeContext: r.GetVolumeContext(), VolumeCapabilities: r.GetVolumeCapabilities(),
		Parameters: r.GetParameters(), MutableParameters: r.GetMutableParameters(),
	}}, nil
}

// A list's token is the ID that came last, so that what is deleted or added meanwhile
// moves nothing.
const tokenPrefix = "after:"

func token(id string) string { return tokenPrefix + base64.RawURLEncoding.EncodeToString([]byte(id)) }

func after(token string) (string, error) {
	if token == "" {
		return "", nil
	}
	text, ok := strings.CutPrefix(token, tokenPrefix)
	id, err := base64.RawURLEncoding.Strict().DecodeString(text)
	if !ok || err != nil || len(id) == 0 || len(id) > maxID {
		return "", bad("starting_token", token, "is none of this driver: begin without one", errdefs.ErrAborted)
	}
	return string(id), nil
}

func page(max int32) (int, error) {
	if max < 0 {
		return 0, bad("max_entries", max, "must not be negative", errdefs.ErrInvalidArgument)
	}
	return min(cmp.Or(int(max), maxPage), maxPage), nil
}

// ListVolumes implements csi.ControllerServer.
func (c *Controller) ListVolumes(ctx context.Context, r *csi.ListVolumesRequest) (*csi.ListVolumesResponse, error) {
	limit, err := page(r.GetMaxEntries())
	if err != nil {
		return nil, err
	}
	last, err := after(r.GetStartingToken())
	if err != nil {
		return nil, err
	}
	list, err := c.Volumes.List(ctx, last, limit+1)
	if err != nil {
		return nil, err
	}
	resp := &csi.ListVolumesResponse{}
	if len(list) > limit {
		list = list[:limit]
		resp.NextToken = token(list[limit-1].ID)
	}
	for _, v := range list {
		e := &csi.ListVolumesResponse_Entry{Volume: &csi.Volume{
			VolumeId: v.ID, CapacityBytes: v.SizeBytes, ContentSource: contentSource(v), AccessibleTopology: topology(v.Topology),
		}, Status: &csi.ListVolumesResponse_VolumeStatus{}}
		if c.Nodes != nil && v.Node != "" {
			for _, node := range append([]string{v.Node}, v.Others...) {
				id, err := c.Nodes.NodeID(ctx, c.Driver, node)
				if err != nil {
					return nil, err
				}
				// A node that is gone still has the volume; under a name that is no ID.
				e.Status.PublishedNodeIds = append(e.Status.PublishedNodeIds, cmp.Or(id, node))
			}
		}
		resp.Entries = append(resp.Entries, e)
	}
	return resp, nil
}

func contentSource(v backend.Volume) *csi.VolumeContentSource {
	switch {
	case v.Snapshot != "":
		return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: v.Snapshot}}}
	case v.Parent != "":
		return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: v.Parent}}}
	}
	return nil
}

// GetCapacity implements csi.ControllerServer.
func (c *Controller) GetCapacity(ctx context.Context, r *csi.GetCapacityRequest) (*csi.GetCapacityResponse, error) {
	k, ok := c.Volumes.(backend.Capacity)
	if !ok {
		return nil, c.not("GetCapacity")
	}
	for _, vc := range r.GetVolumeCapabilities() {
		if _, err := c.rules().read(vc); err != nil {
			return &csi.GetCapacityResponse{}, nil // of such volumes, none
		}
	}
	if err := checkMap("parameters", r.GetParameters()); err != nil {
		return nil, err
	}
	parameters := maps.Clone(r.GetParameters())
	maps.DeleteFunc(parameters, func(k, _ string) bool { return strings.HasPrefix(k, sidecarPrefix) || k == ParameterFSGroup })
	available, largest, err := k.Capacity(ctx, parameters, r.GetAccessibleTopology().GetSegments())
	if err != nil {
		return nil, err
	}
	resp := &csi.GetCapacityResponse{AvailableCapacity: max(available, 0)}
	if largest > 0 {
		resp.MaximumVolumeSize = int64Value(largest)
	}
	return resp, nil
}

// ControllerExpandVolume implements csi.ControllerServer.
func (c *Controller) ControllerExpandVolume(ctx context.Context, r *csi.ControllerExpandVolumeRequest) (*csi.ControllerExpandVolumeResponse, error) {
	if _, err := handle("volume_id", r.GetVolumeId()); err != nil {
		return nil, err
	}
	if r.GetCapacityRange() == nil {
		return nil, fmt.Errorf("capacity_range is missing: set it: %w", errdefs.ErrInvalidArgument)
	}
	least, most, err := size(r.GetCapacityRange())
	if err != nil {
		return nil, err
	}
	if least == 0 {
		return nil, bad("capacity_range.required_bytes", least, "say how large the volume shall be", errdefs.ErrInvalidArgument)
	}
	unlock, err := c.lock(r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	defer unlock()
	v, err := c.find(ctx, r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	if most != 0 && v.SizeBytes > most {
		return nil, bad("capacity_range.limit_bytes", most, fmt.Sprintf("the volume has %d bytes and does not shrink", v.SizeBytes), errdefs.ErrOutOfRange)
	}
	bytes := v.SizeBytes
	if bytes < least {
		if bytes, err = c.Volumes.Expand(ctx, r.GetVolumeId(), least); err != nil {
			return nil, err
		}
	}
	// A VM that has the disk must be told, whether it has a file system or not.
	return &csi.ControllerExpandVolumeResponse{CapacityBytes: bytes, NodeExpansionRequired: true}, nil
}

// ControllerModifyVolume implements csi.ControllerServer.
func (c *Controller) ControllerModifyVolume(ctx context.Context, r *csi.ControllerModifyVolumeRequest) (*csi.ControllerModifyVolumeResponse, error) {
	m, ok := c.Volumes.(backend.Mutable)
	if !ok {
		return nil, c.not("ControllerModifyVolume")
	}
	if _, err := handle("volume_id", r.GetVolumeId()); err != nil {
		return nil, err
	}
	if err := checkMap("mutable_parameters", r.GetMutableParameters()); err != nil {
		return nil, err
	}
	unlock, err := c.lock(r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	defer unlock()
	if _, err := c.find(ctx, r.GetVolumeId()); err != nil {
		return nil, err
	}
	if err := m.Modify(ctx, r.GetVolumeId(), r.GetMutableParameters()); err != nil {
		return nil, err
	}
	return &csi.ControllerModifyVolumeResponse{}, nil
}
