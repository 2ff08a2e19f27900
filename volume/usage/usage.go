// Package usage tells by the API server whether nodes use volumes, and which they are to
// have.
//
// It owns that reading of Nodes and VolumeAttachments, none of which tenants can write. It
// must not know what follows from it.
package usage

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/hypernetes/hypernetes/volume/backend/cinder"
)

// AnnotationOff on a VolumeAttachment, "true", says that its node is off, or may be taken
// for it: for nodes that are no Node any more and so cannot have the taint.
const AnnotationOff = "hypernetes.io/node-is-off"

const timeout = 15 * time.Second

// API asks the API server each time: what a cache says may be of before the node began.
type API struct {
	Reader client.Reader
	// Driver is the CSI driver's name.
	Driver string
}

var _ cinder.Nodes = API{}

// Use implements cinder.Nodes. A kubelet names a volume in its Node's status before it
// hands it to us the first time, and until it took it back, so what is not named there is
// not in use, even if the kubelet has not been heard of since.
func (a API) Use(ctx context.Context, volume, node string) (cinder.Use, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	n := &corev1.Node{}
	err := a.Reader.Get(ctx, client.ObjectKey{Name: node}, n)
	if err != nil && !apierrors.IsNotFound(err) {
		return cinder.InUse, fmt.Errorf("node %s: %w: %w", node, errdefs.ErrUnavailable, err)
	}
	if err == nil {
		name := corev1.UniqueVolumeName("kubernetes.io/csi/" + a.Driver + "^" + volume)
		if !slices.Contains(n.Status.VolumesInUse, name) {
			return cinder.Released, nil
		}
		if slices.ContainsFunc(n.Spec.Taints, func(t corev1.Taint) bool { return t.Key == corev1.TaintNodeOutOfService }) {
			return cinder.Off, nil
		}
	}
	list, err := a.attachments(ctx)
	if err != nil {
		return cinder.InUse, err
	}
	for i := range list {
		va := &list[i]
		if va.Spec.NodeName != node || va.Annotations[AnnotationOff] != "true" {
			continue
		}
		if handle, err := a.handle(ctx, va); err == nil && handle == volume {
			return cinder.Off, nil
		}
	}
	return cinder.InUse, nil
}

// Address implements cinder.Nodes.
func (a API) Address(ctx context.Context, node string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	n := &corev1.Node{}
	if err := a.Reader.Get(ctx, client.ObjectKey{Name: node}, n); apierrors.IsNotFound(err) {
		return "", nil
	} else if err != nil {
		return "", fmt.Errorf("node %s: %w: %w", node, errdefs.ErrUnavailable, err)
	}
	for _, x := range n.Status.Addresses {
		if x.Type == corev1.NodeInternalIP {
			return x.Address, nil
		}
	}
	return "", nil
}

// Wanted implements cinder.Nodes. An attachment whose volume is not known is an error:
// that volume must not be taken for one that nobody wants.
func (a API) Wanted(ctx context.Context) (map[cinder.Pair]bool, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	list, err := a.attachments(ctx)
	if err != nil {
		return nil, err
	}
	out := map[cinder.Pair]bool{}
	for i := range list {
		handle, err := a.handle(ctx, &list[i])
		if err != nil {
			return nil, err
		}
		out[cinder.Pair{Volume: handle, Node: list[i].Spec.NodeName}] = true
	}
	return out, nil
}

func (a API) attachments(ctx context.Context) ([]storagev1.VolumeAttachment, error) {
	all := &storagev1.VolumeAttachmentList{}
	if err := a.Reader.List(ctx, all); err != nil {
		return nil, fmt.Errorf("list VolumeAttachments: %w: %w", errdefs.ErrUnavailable, err)
	}
	return slices.DeleteFunc(all.Items, func(va storagev1.VolumeAttachment) bool { return va.Spec.Attacher != a.Driver }), nil
}

// handle is the volume that an attachment is about.
func (a API) handle(ctx context.Context, va *storagev1.VolumeAttachment) (string, error) {
	spec := va.Spec.Source.InlineVolumeSpec
	if name := va.Spec.Source.PersistentVolumeName; name != nil {
		pv := &corev1.PersistentVolume{}
		if err := a.Reader.Get(ctx, client.ObjectKey{Name: *name}, pv); err != nil {
			return "", fmt.Errorf("VolumeAttachment %s: PersistentVolume %s: %w: %w", va.Name, *name, errdefs.ErrUnavailable, err)
		}
		spec = &pv.Spec
	}
	switch {
	case spec != nil && spec.CSI != nil && spec.CSI.Driver == a.Driver:
		return spec.CSI.VolumeHandle, nil
	case spec != nil && spec.Cinder != nil:
		return spec.Cinder.VolumeID, nil
	}
	return "", fmt.Errorf("VolumeAttachment %s is about no volume of driver %s: %w", va.Name, a.Driver, errdefs.ErrUnavailable)
}
