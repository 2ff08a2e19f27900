package driver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/hypernetes/hypernetes/volume/backend"
	"github.com/hypernetes/hypernetes/volume/record"
)

// attributeSize is the attribute of volumes[].csi that says how large the volume is.
const attributeSize = "size"

// inlineID is what the kubelet calls a Pod's own volumes: a hash of the Pod's UID and the
// volume's name. No volume of a backend is called so.
var inlineID = regexp.MustCompile(`^csi-[0-9a-f]{64}$`)

// inline makes the volume that a Pod has of its own, and its record: nobody stages it.
func (n *Node) inline(ctx context.Context, key string, r *csi.NodePublishVolumeRequest, u use) (record.Staged, error) {
	files, ok := n.Files.(backend.Inlines)
	if !ok {
		return record.Staged{}, fmt.Errorf("volumes[].csi in a Pod makes no volume with driver %s: use volumes[].ephemeral.volumeClaimTemplate, which lives as long: %w", n.Driver, errdefs.ErrInvalidArgument)
	}
	bytes, err := n.rules().inline(r, u)
	if err != nil {
		return record.Staged{}, err
	}
	c, err := files.CreateInline(ctx, backend.Inline{ID: r.GetVolumeId(), Owner: filepath.Dir(r.GetTargetPath())}, bytes)
	if err != nil {
		return record.Staged{}, fmt.Errorf("volumes[].csi: %w", err)
	}
	if err := n.stage(r.GetVolumeId(), c); err != nil {
		return record.Staged{}, err
	}
	return n.Store.Staged(key)
}

// inline checks what a Pod asks of a volume of its own and returns its size.
func (r rules) inline(req *csi.NodePublishVolumeRequest, u use) (int64, error) {
	switch {
	case !inlineID.MatchString(req.GetVolumeId()):
		return 0, bad("volume_id", req.GetVolumeId(), "is none that the kubelet gives a volume in a Pod", errdefs.ErrInvalidArgument)
	case u.mode != record.Filesystem:
		return 0, bad("volume_capability.access_type", u.mode, "a volume in a Pod has a file system", errdefs.ErrInvalidArgument)
	case req.GetReadonly() || u.readOnly:
		return 0, bad("volumes[].csi.readOnly", true, "the volume begins empty: leave it out, and mount it read-only where it is not written", errdefs.ErrInvalidArgument)
	case len(req.GetSecrets()) > 0:
		return 0, fmt.Errorf("volumes[].csi.nodePublishSecretRef: driver %s has no use for it: leave it out: %w", r.driver, errdefs.ErrInvalidArgument)
	}
	if err := checkMap("volumes[].csi.volumeAttributes", req.GetVolumeContext()); err != nil {
		return 0, err
	}
	bytes := int64(DefaultBytes)
	for k, v := range req.GetVolumeContext() {
		switch {
		case strings.HasPrefix(k, sidecarPrefix):
		case k == attributeSize:
			q, err := resource.ParseQuantity(v)
			if err != nil || q.Sign() <= 0 {
				return 0, bad("volumes[].csi.volumeAttributes."+k, v, "must be a quantity over 0, such as 10Gi", errdefs.ErrInvalidArgument)
			}
			bytes = q.Value() // the largest there is for what is larger
		default:
			return 0, bad("volumes[].csi.volumeAttributes", k, "is not known: there is "+attributeSize, errdefs.ErrInvalidArgument)
		}
	}
	if fsType := u.fsType; fsType == "xfs" && bytes < minXFS {
		return 0, bad("volumes[].csi.volumeAttributes."+attributeSize, bytes, fmt.Sprintf("xfs needs %d: ask for as many at least, or use ext4", minXFS), errdefs.ErrOutOfRange)
	}
	return bytes, nil
}

// endInline removes the volume that a Pod had of its own, if it is one and no Pod has it.
// The record goes first: it goes only if no VM has the disk.
func (n *Node) endInline(ctx context.Context, key, id string) error {
	files, ok := n.Files.(backend.Inlines)
	if !ok || !inlineID.MatchString(id) {
		return nil
	}
	if pubs, err := n.Store.Publications(key); err != nil || len(pubs) > 0 {
		return err
	}
	if err := n.Store.Unstage(key); err != nil {
		return err
	}
	if err := files.DeleteInline(ctx, id); err != nil {
		return err
	}
	log.G(ctx).WithField("volume", id).Info("a Pod's own volume removed")
	return nil
}

// collectInline removes the volumes whose Pod the kubelet knows no more: it forgets one
// whose publish failed for good. Root is the kubelet's directory.
func (n *Node) collectInline(ctx context.Context, root string) error {
	files, ok := n.Files.(backend.Inlines)
	if !ok {
		return nil
	}
	// Without this directory nothing is known of Pods, not that there are none.
	if _, err := os.Stat(filepath.Join(root, "pods")); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	all, err := files.ListInline()
	if err != nil {
		return err
	}
	var errs []error
	for _, v := range all {
		if ctx.Err() != nil {
			break
		}
		if err := n.collectOne(ctx, v); err != nil && !errdefs.IsUnavailable(err) && !errdefs.IsAborted(err) {
			errs = append(errs, fmt.Errorf("volume %s: %w", v.ID, err))
		}
	}
	return errors.Join(errs...)
}

func (n *Node) collectOne(ctx context.Context, v backend.Inline) error {
	key, unlock, err := n.begin(v.ID)
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := os.Lstat(v.Owner); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return n.endInline(ctx, key, v.ID)
}
