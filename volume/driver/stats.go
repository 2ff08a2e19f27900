package driver

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"unicode"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"google.golang.org/protobuf/encoding/protowire"

	volumev1 "github.com/hypernetes/hypernetes/api/volume/v1"
	"github.com/hypernetes/hypernetes/volume/record"
)

// CSI 1.13 has no VolumeCondition any more. Kubelets of Kubernetes 1.36 speak CSI 1.9 and
// know nothing else (feature gate CSIVolumeHealth), so it goes into the numbers that are
// reserved for it.
const (
	capabilityCondition = csi.NodeServiceCapability_RPC_Type(4)

	fieldCondition = protowire.Number(2)
	fieldAbnormal  = protowire.Number(1)
	fieldMessage   = protowire.Number(2)
)

// maxAbnormal bounds what is said against a volume, in bytes: an event holds 1 KiB.
const maxAbnormal = 512

// NodeGetVolumeStats implements csi.NodeServer.
func (n *Node) NodeGetVolumeStats(ctx context.Context, r *csi.NodeGetVolumeStatsRequest) (*csi.NodeGetVolumeStatsResponse, error) {
	known, err := handle("volume_id", r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	if r.GetVolumePath() == "" {
		return nil, fmt.Errorf("volume_path is missing: set it: %w", errdefs.ErrInvalidArgument)
	}
	if !known {
		return nil, fmt.Errorf("volume %q: %w", bounded(r.GetVolumeId()), errdefs.ErrNotFound)
	}
	key := record.Key(n.Driver, r.GetVolumeId())
	// Of a raw device the kubelet names where it holds it itself: …/volumeDevices/PV/dev/POD.
	p, err := n.publication(key, func(p record.Publication) bool {
		return p.Target == r.GetVolumePath() || p.Mode == record.Block && p.PodUID == filepath.Base(r.GetVolumePath())
	})
	if errdefs.IsNotFound(err) {
		return nil, fmt.Errorf("volume %s is not published at %.200q: %w", r.GetVolumeId(), r.GetVolumePath(), err)
	} else if err != nil {
		return nil, err
	}
	s, err := n.Machines.Stats(ctx, p.PodUID, key)
	if errdefs.IsNotFound(err) {
		return nil, fmt.Errorf("volume %s: the VM of pod %s does not run yet: %w", r.GetVolumeId(), p.PodUID, errdefs.ErrUnavailable)
	} else if err != nil {
		return nil, err
	}
	if s.GetAbnormal() != "" {
		log.G(ctx).WithFields(log.Fields{"volume": r.GetVolumeId(), "pod": p.PodUID}).Warnf("volume: %.200q", s.GetAbnormal())
	}
	resp := &csi.NodeGetVolumeStatsResponse{}
	condition(resp, s)
	if p.Mode == record.Block {
		resp.Usage = []*csi.VolumeUsage{usage(csi.VolumeUsage_BYTES, s.GetDeviceBytes(), 0, 0)}
		return resp, nil
	}
	resp.Usage = []*csi.VolumeUsage{
		usage(csi.VolumeUsage_BYTES, s.GetTotalBytes(), s.GetUsedBytes(), s.GetAvailableBytes()),
		usage(csi.VolumeUsage_INODES, s.GetTotalInodes(), s.GetUsedInodes(), s.GetAvailableInodes()),
	}
	return resp, nil
}

// usage holds the guest's numbers to what can be: they come from a tenant.
func usage(unit csi.VolumeUsage_Unit, total, used, available uint64) *csi.VolumeUsage {
	total = min(total, 1<<62)
	used = min(used, total)
	return &csi.VolumeUsage{Unit: unit, Total: int64(total), Used: int64(used), Available: int64(min(available, total-used))}
}

// abnormal is what is said against a volume as one may show it: it comes from a tenant.
func abnormal(s *volumev1.StatsResponse) string {
	text := s.GetAbnormal()
	if len(text) > maxAbnormal {
		text = text[:maxAbnormal]
	}
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(text, "?"))
}

// condition adds a VolumeCondition.
func condition(resp *csi.NodeGetVolumeStatsResponse, s *volumev1.StatsResponse) {
	message := abnormal(s)
	bad := protowire.EncodeBool(message != "")
	if message == "" {
		message = "nothing is known against it"
	}
	var c []byte
	c = protowire.AppendVarint(protowire.AppendTag(c, fieldAbnormal, protowire.VarintType), bad)
	c = protowire.AppendString(protowire.AppendTag(c, fieldMessage, protowire.BytesType), message)
	resp.ProtoReflect().SetUnknown(protowire.AppendBytes(protowire.AppendTag(nil, fieldCondition, protowire.BytesType), c))
}

// NodeGetVolumeHealth implements csi.NodeServer. Of a volume that no VM has nothing is
// known, except that its file is there.
func (n *Node) NodeGetVolumeHealth(ctx context.Context, r *csi.NodeGetVolumeHealthRequest) (*csi.NodeGetVolumeHealthResponse, error) {
	known, err := handle("volume_id", r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	if !known {
		return nil, fmt.Errorf("volume %q: %w", bounded(r.GetVolumeId()), errdefs.ErrNotFound)
	}
	key := record.Key(n.Driver, r.GetVolumeId())
	if _, err := n.Store.Staged(key); err != nil {
		return nil, fmt.Errorf("volume %s: %w", r.GetVolumeId(), err)
	}
	pubs, err := n.Store.Publications(key)
	if err != nil {
		return nil, err
	}
	health := &csi.VolumeHealth{VolumeId: r.GetVolumeId()}
	for _, p := range pubs {
		s, err := n.Machines.Stats(ctx, p.PodUID, key)
		if errdefs.IsNotFound(err) || errdefs.IsUnavailable(err) && n.off(key, p.PodUID) {
			continue
		}
		if err != nil {
			return nil, err
		}
		e := entry(s)
		if e != nil && !slices.ContainsFunc(health.HealthStatuses, func(o *csi.VolumeHealth_VolumeHealthEntry) bool { return o.Reason == e.Reason }) {
			health.HealthStatuses = append(health.HealthStatuses, e)
		}
	}
	return &csi.NodeGetVolumeHealthResponse{VolumeHealth: health}, nil
}

// entry is what a VM says against a volume, nil for nothing.
func entry(s *volumev1.StatsResponse) *csi.VolumeHealth_VolumeHealthEntry {
	e := &csi.VolumeHealth_VolumeHealthEntry{Status: csi.VolumeHealthErrorType_DEGRADED, Message: abnormal(s)}
	if e.Message == "" {
		return nil
	}
	switch s.GetHealth() {
	case volumev1.Health_BACKING_LOST:
		e.Status, e.Reason = csi.VolumeHealthErrorType_DATA_LOSS, "BackingLost"
	case volumev1.Health_DISK_ERRORS:
		e.Reason = "DiskErrors"
	default:
		e.Reason = "GuestReportsErrors"
	}
	return e
}
