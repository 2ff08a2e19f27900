package driver

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"unicode/utf8"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	volumev1 "github.com/hypernetes/hypernetes/api/volume/v1"
	"github.com/hypernetes/hypernetes/volume/backend"
	"github.com/hypernetes/hypernetes/volume/placeholder"
	"github.com/hypernetes/hypernetes/volume/record"
	"github.com/hypernetes/hypernetes/volume/sealed"
)

// MaxNodeName is how long a node's name may be for its CSI ID to fit into a CSINode.
const MaxNodeName = 192 - 1 - 43

// What the kubelet says of a Pod because the CSIDriver asks for it (podInfoOnMount).
const (
	podUID       = sidecarPrefix + "pod.uid"
	podNamespace = sidecarPrefix + "pod.namespace"
	podName      = sidecarPrefix + "pod.name"
	podEphemeral = sidecarPrefix + "ephemeral"
)

// Owners tells whose a namespace is.
type Owners interface {
	// OwnerOf returns the project of the tenant that a namespace is bound to, "" for a
	// namespace of no tenant. The error is errdefs.ErrFailedPrecondition for a tenant without
	// a project.
	OwnerOf(ctx context.Context, namespace string) (project string, err error)
}

// Machines asks the VMs that have volumes. The errors are errdefs.ErrNotFound if the Pod
// has no VM, errdefs.ErrUnavailable if it does not answer now.
type Machines interface {
	Stats(ctx context.Context, podUID, key string) (*volumev1.StatsResponse, error)
	// Grow returns the size that the VM sees.
	Grow(ctx context.Context, podUID, key string, bytes int64) (int64, error)
	// Throttle bounds a volume's I/O as its record says; errdefs.ErrNotImplemented of a shim
	// that cannot.
	Throttle(ctx context.Context, podUID, key string) error
}

// Places makes placeholders.
type Places interface {
	Directory(key, target string) (device uint64, err error)
	Device(key, target string) (device uint64, err error)
	Remove(key, target string) error
	Stands(placeholder.Placeholder) bool
	List() ([]placeholder.Placeholder, error)
	Collect(key string) error
}

var _ Places = placeholder.Places{}

// Node is the CSI node service.
type Node struct {
	csi.UnimplementedNodeServer
	// Driver is the CSI driver's name, Name the node's.
	Driver, Name string
	// Key opens what is sealed to this node.
	Key      *sealed.Key
	Store    record.Store
	Places   Places
	Machines Machines
	// Files connects volumes that nobody attaches; nil, and connections come sealed.
	Files backend.Files
	// Roots are where files and devices of attached volumes may be.
	Roots []string
	// Owners decides which Pod may have which volume; nil if that needs no decision because
	// only PersistentVolumes lead to a volume.
	Owners Owners
	// FSTypes that guests mount; DefaultFSTypes if nil.
	FSTypes []string
	// Topology are the node's segments.
	Topology map[string]string
	// MaxVolumes is how many volumes the scheduler puts here; 0 is no bound.
	MaxVolumes int64
	// Locks are shared with the node's other drivers and its Collector.
	Locks *Locks
}

var _ csi.NodeServer = (*Node)(nil)

func (n *Node) rules() rules {
	r := rules{driver: n.Driver, fsTypes: n.FSTypes, multiNode: n.Files == nil}
	if r.fsTypes == nil {
		r.fsTypes = DefaultFSTypes
	}
	return r
}

// NodeGetCapabilities implements csi.NodeServer.
func (n *Node) NodeGetCapabilities(context.Context, *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	resp := &csi.NodeGetCapabilitiesResponse{}
	for _, t := range []csi.NodeServiceCapability_RPC_Type{
		csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME,
		csi.NodeServiceCapability_RPC_GET_VOLUME_STATS,
		csi.NodeServiceCapability_RPC_EXPAND_VOLUME,
		csi.NodeServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
		csi.NodeServiceCapability_RPC_VOLUME_MOUNT_GROUP,
		csi.NodeServiceCapability_RPC_GET_VOLUME_HEALTH,
		capabilityCondition,
	} {
		resp.Capabilities = append(resp.Capabilities, &csi.NodeServiceCapability{
			Type: &csi.NodeServiceCapability_Rpc{Rpc: &csi.NodeServiceCapability_RPC{Type: t}},
		})
	}
	return resp, nil
}

// NodeGetInfo implements csi.NodeServer.
func (n *Node) NodeGetInfo(context.Context, *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	resp := &csi.NodeGetInfoResponse{NodeId: NodeID(n.Name, n.Key.Public()), MaxVolumesPerNode: n.MaxVolumes}
	if n.Topology != nil {
		resp.AccessibleTopology = &csi.Topology{Segments: n.Topology}
	}
	return resp, nil
}

// begin checks what every request has and locks the volume.
func (n *Node) begin(id string) (key string, unlock func(), err error) {
	known, err := handle("volume_id", id)
	if err != nil {
		return "", nil, err
	}
	if !known {
		return "", nil, fmt.Errorf("volume %q: %w", bounded(id), errdefs.ErrNotFound)
	}
	key = record.Key(n.Driver, id)
	unlock, err = n.Locks.Try(key)
	if err != nil {
		return "", nil, fmt.Errorf("volume %s: %w", id, err)
	}
	return key, unlock, nil
}

func pathField(field, path string) error {
	switch {
	case path == "":
		return fmt.Errorf("%s is missing: set it: %w", field, errdefs.ErrInvalidArgument)
	case len(path) > 4095 || !filepath.IsAbs(path) || filepath.Clean(path) != path || path == "/" || !utf8.ValidString(path) || strings.ContainsAny(path, "\x00\n"):
		return bad(field, path, "must be absolute and clean", errdefs.ErrInvalidArgument)
	}
	return nil
}

// connection is how this node reaches a volume.
func (n *Node) connection(ctx context.Context, id string, publish map[string]string) (backend.Connection, error) {
	var c backend.Connection
	if n.Files != nil {
		return n.Files.Connect(ctx, id)
	}
	box := publish[publishSealed]
	if box == "" {
		return c, fmt.Errorf("publish_context.%s is missing: volumes of driver %s are attached first (CSIDriver attachRequired: true): %w", publishSealed, n.Driver, errdefs.ErrInvalidArgument)
	}
	if err := n.Key.Open(box, sealed.For{Driver: n.Driver, Volume: id, Node: n.Name}, &c); err != nil {
		return backend.Connection{}, fmt.Errorf("volume %s: publish_context.%s: %w", id, publishSealed, err)
	}
	if c.Source.File != nil {
		if err := n.below(c.Source.File.Path); err != nil {
			return backend.Connection{}, fmt.Errorf("volume %s: %w", id, err)
		}
	}
	return c, nil
}

// below checks that a file or device that the controller names is where such may be: a box
// does not say who sealed it.
func (n *Node) below(path string) error {
	if err := pathField("file", path); err != nil {
		return err
	}
	dir, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		return bad("file", path, "this node does not have its directory: "+err.Error()+"; mount the share there", errdefs.ErrFailedPrecondition)
	}
	for _, root := range n.Roots {
		real, err := filepath.EvalSymlinks(root)
		if err != nil {
			continue
		}
		rel, err := filepath.Rel(real, dir)
		if err != nil || rel != "." && !filepath.IsLocal(rel) {
			continue
		}
		info, err := os.Lstat(path)
		if err != nil {
			return bad("file", path, "this node does not have it: "+err.Error(), errdefs.ErrFailedPrecondition)
		}
		if t := info.Mode().Type(); t != 0 && t != fs.ModeDevice {
			return bad("file", path, "is neither a file nor a block device", errdefs.ErrFailedPrecondition)
		}
		return nil
	}
	return bad("file", path, fmt.Sprintf("is below none of the directories that may hold volumes, %q", n.Roots), errdefs.ErrPermissionDenied)
}

// stage writes the record of a volume.
func (n *Node) stage(id string, c backend.Connection) error {
	st := record.Staged{
		Version: record.Version, Driver: n.Driver, Volume: id, Attachment: c.Attachment, Serial: record.Serial(n.Driver, id),
		SizeBytes: c.SizeBytes, ReadOnly: c.ReadOnly, Shared: c.Shared, Format: c.Format, Source: c.Source, Throttle: c.Throttle,
	}
	return n.Store.Stage(st, c.Secrets)
}

// NodeStageVolume implements csi.NodeServer.
func (n *Node) NodeStageVolume(ctx context.Context, r *csi.NodeStageVolumeRequest) (*csi.NodeStageVolumeResponse, error) {
	if err := required("volume_id", r.GetVolumeId()); err != nil {
		return nil, err
	}
	if err := pathField("staging_target_path", r.GetStagingTargetPath()); err != nil {
		return nil, err
	}
	if _, err := n.rules().read(r.GetVolumeCapability()); err != nil {
		return nil, err
	}
	_, unlock, err := n.begin(r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	defer unlock()
	c, err := n.connection(ctx, r.GetVolumeId(), r.GetPublishContext())
	if err != nil {
		return nil, err
	}
	if err := n.stage(r.GetVolumeId(), c); err != nil {
		return nil, err
	}
	return &csi.NodeStageVolumeResponse{}, nil
}

// NodeUnstageVolume implements csi.NodeServer.
func (n *Node) NodeUnstageVolume(_ context.Context, r *csi.NodeUnstageVolumeRequest) (*csi.NodeUnstageVolumeResponse, error) {
	if err := required("volume_id", r.GetVolumeId()); err != nil {
		return nil, err
	}
	if r.GetStagingTargetPath() == "" {
		return nil, fmt.Errorf("staging_target_path is missing: set it: %w", errdefs.ErrInvalidArgument)
	}
	key, unlock, err := n.begin(r.GetVolumeId())
	if errdefs.IsNotFound(err) {
		return &csi.NodeUnstageVolumeResponse{}, nil
	} else if err != nil {
		return nil, err
	}
	defer unlock()
	if err := forget(n.Store, n.Places, key, ""); err != nil {
		return nil, err
	}
	if err := n.Store.Unstage(key); err != nil {
		return nil, fmt.Errorf("volume %s: %w", r.GetVolumeId(), err)
	}
	return &csi.NodeUnstageVolumeResponse{}, nil
}

// forget removes publications of a volume whose placeholder is not there any more and
// that no VM has. All but the Pod's own, if one is named, and those a VM has stay.
func forget(store record.Store, places Places, key, except string) error {
	pubs, err := store.Publications(key)
	if err != nil {
		return err
	}
	for _, p := range pubs {
		h := placeholder.Placeholder{Kind: placeholder.Directory, Key: key, Target: p.Target, Device: p.Device}
		if p.Mode == record.Block {
			h.Kind = placeholder.Device
		}
		if p.PodUID == except || places.Stands(h) {
			continue
		}
		if err := store.Unpublish(key, p.PodUID); err != nil && !errdefs.IsUnavailable(err) {
			return err
		}
	}
	return nil
}

// publication finds one; the error is errdefs.ErrNotFound if there is none.
func (n *Node) publication(key string, is func(record.Publication) bool) (record.Publication, error) {
	pubs, err := n.Store.Publications(key)
	if err != nil {
		return record.Publication{}, err
	}
	for _, p := range pubs {
		if is(p) {
			return p, nil
		}
	}
	return record.Publication{}, errdefs.ErrNotFound
}

// NodeExpandVolume implements csi.NodeServer.
func (n *Node) NodeExpandVolume(ctx context.Context, r *csi.NodeExpandVolumeRequest) (*csi.NodeExpandVolumeResponse, error) {
	if err := required("volume_id", r.GetVolumeId()); err != nil {
		return nil, err
	}
	if r.GetVolumePath() == "" {
		return nil, fmt.Errorf("volume_path is missing: set it: %w", errdefs.ErrInvalidArgument)
	}
	least, _, err := size(r.GetCapacityRange())
	if err != nil {
		return nil, err
	}
	if r.GetVolumeCapability() != nil {
		if _, err := n.rules().read(r.GetVolumeCapability()); err != nil {
			return nil, err
		}
	}
	key, unlock, err := n.begin(r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	defer unlock()
	st, err := n.Store.Staged(key)
	if err != nil {
		return nil, err
	}
	if n.Files != nil {
		// The file's own size is what there is.
		c, err := n.Files.Connect(ctx, r.GetVolumeId())
		if err != nil {
			return nil, err
		}
		if least != 0 && c.SizeBytes < least {
			return nil, bad("capacity_range.required_bytes", least, fmt.Sprintf("the volume has %d bytes: expand it first", c.SizeBytes), errdefs.ErrOutOfRange)
		}
		least = c.SizeBytes
	}
	least = max(least, st.SizeBytes)
	if least != st.SizeBytes {
		st.SizeBytes = least
		if err := n.restage(key, st); err != nil {
			return nil, err
		}
	}
	// Before a Pod has the volume, the kubelet names the staging path, and the guest will
	// grow the file system when it mounts it.
	pubs, err := n.Store.Publications(key)
	if err != nil {
		return nil, err
	}
	for _, p := range pubs {
		bytes, err := n.Machines.Grow(ctx, p.PodUID, key, least)
		if errdefs.IsNotFound(err) || errdefs.IsUnavailable(err) && n.off(key, p.PodUID) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("volume %s in the VM of pod %s: %w", r.GetVolumeId(), p.PodUID, err)
		}
		least = max(least, bytes)
	}
	return &csi.NodeExpandVolumeResponse{CapacityBytes: least}, nil
}

// Limit implements backend.Limits: of the next VM by the record, of those that run by
// telling them, even if the record says so already, for who wrote that may have been killed.
func (n *Node) Limit(ctx context.Context, id string, t *record.Throttle) error {
	key, unlock, err := n.begin(id)
	if err != nil {
		return err
	}
	defer unlock()
	st, err := n.Store.Staged(key)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if !reflect.DeepEqual(st.Throttle, t) {
		st.Throttle = t
		if err := n.restage(key, st); err != nil {
			return err
		}
		log.G(ctx).WithFields(log.Fields{"volume": id, "limits": fmt.Sprintf("%+v", t)}).Info("volume has other limits")
	}
	pubs, err := n.Store.Publications(key)
	if err != nil {
		return err
	}
	for _, p := range pubs {
		err := n.Machines.Throttle(ctx, p.PodUID, key)
		switch {
		case err == nil, errdefs.IsNotFound(err), errdefs.IsUnavailable(err) && n.off(key, p.PodUID):
		case errdefs.IsNotImplemented(err):
			log.G(ctx).WithFields(log.Fields{"volume": id, "pod": p.PodUID}).Warn("the Pod's shim is older: its limits change when the Pod is made anew")
		default:
			return fmt.Errorf("volume %s in the VM of pod %s: %w", id, p.PodUID, err)
		}
	}
	return nil
}

// restage changes a record and keeps its secrets.
func (n *Node) restage(key string, st record.Staged) error {
	secrets := map[string][]byte{}
	for _, name := range []string{record.SecretKey, record.SecretPassword} {
		b, err := n.Store.Secret(key, name)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return err
		}
		secrets[name] = b
	}
	return n.Store.Stage(st, secrets)
}

// off tells whether no VM of the Pod has the volume, whatever its shim left behind.
func (n *Node) off(key, pod string) bool {
	f, err := n.Store.PodLease(key, pod)
	if err != nil {
		return errdefs.IsNotFound(err)
	}
	_ = f.Close()
	return true
}
