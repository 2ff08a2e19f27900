package driver

import (
	"context"
	"fmt"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/hypernetes/hypernetes/volume/backend"
	"github.com/hypernetes/hypernetes/volume/record"
)

// pod is who wants a volume.
type pod struct{ uid, namespace, name string }

// podOf reads what the kubelet says of the Pod.
func podOf(volumeContext map[string]string) (pod, error) {
	p := pod{volumeContext[podUID], volumeContext[podNamespace], volumeContext[podName]}
	switch {
	case p.uid == "" || p.namespace == "":
		return p, fmt.Errorf("volume_context has no %s or %s: set podInfoOnMount: true in the CSIDriver: %w", podUID, podNamespace, errdefs.ErrInvalidArgument)
	case !record.ValidPod(p.uid):
		return p, bad("volume_context "+podUID, p.uid, "must be a Pod's UID", errdefs.ErrInvalidArgument)
	}
	return p, nil
}

// NodePublishVolume implements csi.NodeServer.
func (n *Node) NodePublishVolume(ctx context.Context, r *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	if err := required("volume_id", r.GetVolumeId()); err != nil {
		return nil, err
	}
	if err := pathField("target_path", r.GetTargetPath()); err != nil {
		return nil, err
	}
	u, err := n.rules().read(r.GetVolumeCapability())
	if err != nil {
		return nil, err
	}
	inline := r.GetVolumeContext()[podEphemeral] == "true"
	if r.GetStagingTargetPath() == "" && !inline {
		return nil, fmt.Errorf("staging_target_path is missing: stage the volume first: %w", errdefs.ErrFailedPrecondition)
	}
	who, err := podOf(r.GetVolumeContext())
	if err != nil {
		return nil, err
	}
	key, unlock, err := n.begin(r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	defer unlock()
	var st record.Staged
	if inline {
		st, err = n.inline(ctx, key, r, u)
	} else {
		st, err = n.staged(ctx, key, r, who)
	}
	if err != nil {
		return nil, err
	}
	want := record.Publication{
		Version: record.Version, PodUID: who.uid, Target: r.GetTargetPath(), Mode: u.mode, ReadOnly: r.GetReadonly() || u.readOnly,
	}
	if u.mode == record.Filesystem {
		want.FSType, want.Options = u.fsType, u.flags
		if want.FSType == "" {
			want.FSType = n.rules().fsTypes[0]
		}
		// Nothing of a volume that is not written can be given to a group.
		if !want.ReadOnly && !st.ReadOnly {
			want.FSGroup = u.group
			want.FSGroupAlways = u.group != nil && r.GetVolumeContext()[ParameterFSGroup] == "Always"
		}
	}
	if err := forget(n.Store, n.Places, key, who.uid); err != nil {
		return nil, err
	}
	was, err := n.admit(r.GetVolumeId(), record.Attachment{Key: key, Staged: st, Publication: want}, u)
	if err != nil {
		return nil, err
	}
	// The placeholder comes first: one without a record is an error to the shim, a record
	// without a placeholder would be to nobody.
	if u.mode == record.Block {
		want.Device, err = n.Places.Device(key, want.Target)
	} else {
		want.Device, err = n.Places.Directory(key, want.Target)
	}
	if err == nil {
		err = n.Store.Publish(key, want)
	}
	if err != nil {
		if !was {
			// The kubelet may forget a Pod whose publish failed for good.
			if err := n.Places.Remove(key, want.Target); err != nil {
				log.G(ctx).WithError(err).WithField("volume", r.GetVolumeId()).Warn("placeholder stays until it is collected")
			}
		}
		return nil, fmt.Errorf("volume %s: %w", r.GetVolumeId(), err)
	}
	if !was {
		log.G(ctx).WithFields(log.Fields{"volume": r.GetVolumeId(), "pod": who.uid, "namespace": who.namespace}).Info("volume published")
	}
	return &csi.NodePublishVolumeResponse{}, nil
}

// staged returns the record of the volume, after the Pod was found to be allowed to have
// it. Records that are lost, as after a reboot, are made again.
func (n *Node) staged(ctx context.Context, key string, r *csi.NodePublishVolumeRequest, who pod) (record.Staged, error) {
	st, err := n.Store.Staged(key)
	if err != nil && !errdefs.IsNotFound(err) {
		return st, err
	}
	if err == nil && n.Owners == nil {
		return st, nil
	}
	c, connErr := n.connection(ctx, r.GetVolumeId(), r.GetPublishContext())
	if connErr != nil {
		return st, connErr
	}
	if err := n.allow(ctx, r.GetVolumeId(), c, who); err != nil {
		return st, err
	}
	if err == nil {
		return st, nil
	}
	if err := n.stage(r.GetVolumeId(), c); err != nil {
		return st, err
	}
	return n.Store.Staged(key)
}

// allow decides by whose the volume is. Only here is a Pod known together with what the
// provider says; everything before is early feedback. The error goes to the Pod's events
// and so tells nothing of other projects.
func (n *Node) allow(ctx context.Context, id string, c backend.Connection, who pod) error {
	if n.Owners == nil {
		return nil
	}
	project, err := n.Owners.OwnerOf(ctx, who.namespace)
	if err != nil {
		return fmt.Errorf("volume %s: whose is namespace %s: %w", id, who.namespace, err)
	}
	switch {
	case project == "" && c.OperatorOwned:
		return nil
	case project == "":
		return fmt.Errorf("volume %s is a tenant's, and namespace %s is none's: use it in a namespace of that tenant, or a volume of the operator's project: %w", id, who.namespace, errdefs.ErrPermissionDenied)
	case c.Owner != project:
		return fmt.Errorf("volume %s is not of project %s, whose namespace %s is: use a volume of that project: %w", id, project, who.namespace, errdefs.ErrPermissionDenied)
	}
	return nil
}

// admit refuses what would let two kernels write one disk that are not prepared for it.
// was tells whether the Pod has the volume already.
func (n *Node) admit(id string, want record.Attachment, u use) (was bool, err error) {
	pubs, err := n.Store.Publications(want.Key)
	if err != nil {
		return false, err
	}
	for _, p := range pubs {
		if p.PodUID == want.Publication.PodUID {
			if p.Target != want.Publication.Target {
				return true, fmt.Errorf("volume %s: pod %s has it at %s already: name a volume once in a Pod and mount it as often as you like: %w", id, p.PodUID, p.Target, errdefs.ErrFailedPrecondition)
			}
			was = true
			continue
		}
		other := record.Attachment{Key: want.Key, Staged: want.Staged, Publication: p}
		if u.one || want.Exclusive() || other.Exclusive() {
			return was, fmt.Errorf("volume %s is in use by pod %s on node %s: one Pod at a time can have a volume that it writes, for it is a disk of the Pod's own VM; wait for that Pod's end, mount the volume read-only in both, or use ReadWriteMany with volumeMode: Block: %w", id, p.PodUID, n.Name, errdefs.ErrFailedPrecondition)
		}
	}
	return was, nil
}

// NodeUnpublishVolume implements csi.NodeServer.
func (n *Node) NodeUnpublishVolume(ctx context.Context, r *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	if err := required("volume_id", r.GetVolumeId()); err != nil {
		return nil, err
	}
	if err := pathField("target_path", r.GetTargetPath()); err != nil {
		return nil, err
	}
	key, unlock, err := n.begin(r.GetVolumeId())
	if errdefs.IsNotFound(err) {
		return &csi.NodeUnpublishVolumeResponse{}, nil
	} else if err != nil {
		return nil, err
	}
	defer unlock()
	p, err := n.publication(key, func(p record.Publication) bool { return p.Target == r.GetTargetPath() })
	switch {
	case errdefs.IsNotFound(err):
	case err != nil:
		return nil, err
	default:
		// Fails while the Pod's VM has the disk: that orders the VM's end before the detach.
		if err := n.Store.Unpublish(key, p.PodUID); err != nil {
			return nil, fmt.Errorf("volume %s: %w", r.GetVolumeId(), err)
		}
		log.G(ctx).WithFields(log.Fields{"volume": r.GetVolumeId(), "pod": p.PodUID}).Info("volume unpublished")
	}
	if err := n.Places.Remove(key, r.GetTargetPath()); err != nil {
		return nil, fmt.Errorf("volume %s: %w", r.GetVolumeId(), err)
	}
	if err := n.endInline(ctx, key, r.GetVolumeId()); err != nil {
		return nil, fmt.Errorf("volume %s: %w", r.GetVolumeId(), err)
	}
	return &csi.NodeUnpublishVolumeResponse{}, nil
}
