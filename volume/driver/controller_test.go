package driver_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/hypernetes/hypernetes/volume/backend"
	"github.com/hypernetes/hypernetes/volume/backend/backendtest"
	"github.com/hypernetes/hypernetes/volume/driver"
	"github.com/hypernetes/hypernetes/volume/driver/drivertest"
	"github.com/hypernetes/hypernetes/volume/sealed"
)

// TestBadInput: one error that names the field, the value and the remedy.
func TestBadInput(t *testing.T) {
	c := serve(t, drivertest.Subject{Volumes: attached()})
	near := serve(t, drivertest.Subject{Volumes: backendtest.Near{Keeper: &backendtest.Keeper{Dir: t.TempDir()}}})
	v := c.volume("good", mountCap(rwo))
	ctx := t.Context()
	create := func(c *client, change func(*csi.CreateVolumeRequest)) func() error {
		return func() error {
			r := &csi.CreateVolumeRequest{Name: "bad", VolumeCapabilities: []*csi.VolumeCapability{mountCap(rwo)}}
			change(r)
			_, err := c.CreateVolume(ctx, r)
			return err
		}
	}
	fs := func(change func(*csi.VolumeCapability_MountVolume)) func() error {
		return create(c, func(r *csi.CreateVolumeRequest) { change(r.VolumeCapabilities[0].GetMount()) })
	}
	stage := func(change func(*csi.NodeStageVolumeRequest)) func() error {
		return func() error {
			r := &csi.NodeStageVolumeRequest{VolumeId: v.id, StagingTargetPath: "/s", VolumeCapability: v.cap, PublishContext: v.publish}
			change(r)
			_, err := c.NodeStageVolume(ctx, r)
			return err
		}
	}
	publish := func(change func(*csi.NodePublishVolumeRequest)) func() error {
		return func() error {
			r := &csi.NodePublishVolumeRequest{VolumeId: v.id, StagingTargetPath: "/s", TargetPath: c.Dir + "/t", VolumeCapability: v.cap, PublishContext: v.publish, VolumeContext: map[string]string{}}
			change(r)
			_, err := c.NodePublishVolume(ctx, r)
			return err
		}
	}
	attach := func(id, node string) func() error {
		return func() error {
			_, err := c.ControllerPublishVolume(ctx, &csi.ControllerPublishVolumeRequest{VolumeId: id, NodeId: node, VolumeCapability: v.cap})
			return err
		}
	}
	long := strings.Repeat("x", 129)
	for _, x := range []struct {
		name  string
		call  func() error
		code  codes.Code
		words []string
	}{
		{"name of 129 bytes", create(c, func(r *csi.CreateVolumeRequest) { r.Name = long }), codes.InvalidArgument, []string{"name", "129", "128"}},
		{"no access type", create(c, func(r *csi.CreateVolumeRequest) { r.VolumeCapabilities[0].AccessType = nil }), codes.InvalidArgument, []string{"access_type", "mount or block"}},
		{"no access mode", create(c, func(r *csi.CreateVolumeRequest) { r.VolumeCapabilities[0].AccessMode = nil }), codes.InvalidArgument, []string{"access_mode", "UNKNOWN", "ReadWriteOnce"}},
		{"file system for many writers", create(c, func(r *csi.CreateVolumeRequest) { r.VolumeCapabilities[0] = mountCap(rwx) }), codes.InvalidArgument, []string{"access_mode", "MULTI_NODE_MULTI_WRITER", "volumeMode: Block"}},
		{"many nodes, but files", create(near, func(r *csi.CreateVolumeRequest) { r.VolumeCapabilities[0] = blockCap(rwx) }), codes.InvalidArgument, []string{"access_mode", "ReadWriteOnce"}},
		{"fsType", fs(func(m *csi.VolumeCapability_MountVolume) { m.FsType = "zfs" }), codes.InvalidArgument, []string{"fsType", `"zfs"`, "ext4"}},
		{"mount option", fs(func(m *csi.VolumeCapability_MountVolume) { m.MountFlags = []string{"noatime,journal_path=/dev/sda"} }), codes.InvalidArgument, []string{"mountOptions", "journal_path=/dev/sda", "leave it out"}},
		{"mount options", fs(func(m *csi.VolumeCapability_MountVolume) {
			m.MountFlags = strings.Split(strings.Repeat("noatime ", 33), " ")
		}), codes.InvalidArgument, []string{"mountOptions", "32"}},
		{"small xfs", create(c, func(r *csi.CreateVolumeRequest) {
			r.VolumeCapabilities[0].GetMount().FsType = "xfs"
			r.CapacityRange = &csi.CapacityRange{RequiredBytes: 256 << 20}
		}), codes.OutOfRange, []string{"required_bytes", "268435456", "314572800"}},
		{"group", fs(func(m *csi.VolumeCapability_MountVolume) { m.VolumeMountGroup = "-1" }), codes.InvalidArgument, []string{"volume_mount_group", `"-1"`}},
		{"no group", fs(func(m *csi.VolumeCapability_MountVolume) { m.VolumeMountGroup = "4294967295" }), codes.InvalidArgument, []string{"volume_mount_group"}},
		{"negative size", create(c, func(r *csi.CreateVolumeRequest) { r.CapacityRange = &csi.CapacityRange{RequiredBytes: -1} }), codes.InvalidArgument, []string{"required_bytes", "-1"}},
		{"limit under size", create(c, func(r *csi.CreateVolumeRequest) {
			r.CapacityRange = &csi.CapacityRange{RequiredBytes: 2, LimitBytes: 1}
		}), codes.InvalidArgument, []string{"required_bytes", "limit_bytes 1"}},
		{"unknown parameter", create(c, func(r *csi.CreateVolumeRequest) { r.Parameters = map[string]string{"tpye": "x"} }), codes.InvalidArgument, []string{`"tpye"`, `"type"`}},
		{"group policy", create(c, func(r *csi.CreateVolumeRequest) {
			r.Parameters = map[string]string{driver.ParameterFSGroup: "Never"}
		}), codes.InvalidArgument, []string{driver.ParameterFSGroup, "Never", "Always or OnRootMismatch"}},
		{"huge parameters", create(c, func(r *csi.CreateVolumeRequest) {
			r.Parameters = map[string]string{"type": strings.Repeat("x", 5000)}
		}), codes.InvalidArgument, []string{"parameters", "4096"}},
		{"empty source", create(c, func(r *csi.CreateVolumeRequest) { r.VolumeContentSource = &csi.VolumeContentSource{} }), codes.InvalidArgument, []string{"volume_content_source"}},
		{"source smaller than itself", create(c, func(r *csi.CreateVolumeRequest) {
			r.CapacityRange = &csi.CapacityRange{RequiredBytes: 1}
			r.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: v.id}}}
		}), codes.OutOfRange, []string{"required_bytes", "1073741824"}},
		{"node without key", attach(v.id, "node-1"), codes.NotFound, []string{"node_id", `"node-1"`, "CSINode"}},
		{"node with a bad key", attach(v.id, "node-1/AAAA"), codes.NotFound, []string{"AAAA", "CSINode"}},
		{"volume ID with a newline", attach("a\nb", driver.NodeID("node-1", c.Node.Key.Public())), codes.NotFound, nil},
		{"volume ID of 129 bytes", attach(long, driver.NodeID("node-1", c.Node.Key.Public())), codes.NotFound, nil},
		{"staging path", stage(func(r *csi.NodeStageVolumeRequest) { r.StagingTargetPath = "s/../t" }), codes.InvalidArgument, []string{"staging_target_path", "s/../t", "absolute"}},
		{"fsType at stage", stage(func(r *csi.NodeStageVolumeRequest) {
			r.VolumeCapability = mountCap(rwo)
			r.VolumeCapability.GetMount().FsType = "ntfs"
		}), codes.InvalidArgument, []string{"fsType", "ntfs", "ext4"}},
		{"target path", publish(func(r *csi.NodePublishVolumeRequest) { r.TargetPath = "/a/../b" }), codes.InvalidArgument, []string{"target_path", "/a/../b"}},
		{"no staging", publish(func(r *csi.NodePublishVolumeRequest) { r.StagingTargetPath = "" }), codes.FailedPrecondition, []string{"staging_target_path"}},
		{"inline volume", publish(func(r *csi.NodePublishVolumeRequest) {
			r.VolumeContext["csi.storage.k8s.io/ephemeral"] = "true"
		}), codes.InvalidArgument, []string{"volumeClaimTemplate"}},
		{"no Pod", publish(func(r *csi.NodePublishVolumeRequest) { r.VolumeContext["csi.storage.k8s.io/pod.uid"] = "" }), codes.InvalidArgument, []string{"podInfoOnMount"}},
		{"a Pod that is a path", publish(func(r *csi.NodePublishVolumeRequest) { r.VolumeContext["csi.storage.k8s.io/pod.uid"] = "../x" }), codes.InvalidArgument, []string{"pod.uid", "../x"}},
		{"shrink", func() error {
			_, err := c.ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{VolumeId: v.id, CapacityRange: &csi.CapacityRange{RequiredBytes: 1, LimitBytes: 2}})
			return err
		}, codes.OutOfRange, []string{"limit_bytes", "does not shrink"}},
		{"negative page", func() error {
			_, err := c.ListVolumes(ctx, &csi.ListVolumesRequest{MaxEntries: -1})
			return err
		}, codes.InvalidArgument, []string{"max_entries"}},
		{"token", func() error {
			_, err := c.ListSnapshots(ctx, &csi.ListSnapshotsRequest{StartingToken: "after:%"})
			return err
		}, codes.Aborted, []string{"starting_token"}},
		{"publish of a driver that attaches nothing", func() error {
			_, err := near.ControllerPublishVolume(ctx, &csi.ControllerPublishVolumeRequest{})
			return err
		}, codes.Unimplemented, []string{"ControllerPublishVolume"}},
	} {
		wantCode(t, x.name, x.call(), x.code, x.words...)
	}
	list, err := c.Places.List()
	if err != nil {
		t.Error(err)
	}
	for _, h := range list {
		if strings.HasPrefix(h.Target, c.Dir) {
			t.Errorf("a placeholder for nothing: %+v", h)
		}
	}
}

// TestNothingLeaks: what leaves the controller holds no more than an ID and a box.
func TestNothingLeaks(t *testing.T) {
	c := serve(t, drivertest.Subject{Volumes: attached()})
	v := c.volume("a", mountCap(rwo))
	if len(v.publish) != 2 || v.publish["attachment"] == "" {
		t.Errorf("publish context %v", v.publish)
	}
	for k, value := range v.publish {
		for _, secret := range []string{"c2VjcmV0", "6789", "volumes", "project-a"} {
			if strings.Contains(value, secret) {
				t.Errorf("%s holds %q", k, secret)
			}
		}
	}
	other, err := sealed.Generate()
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Open(v.publish["sealed"], sealed.For{Driver: testDriver, Volume: v.id, Node: "node-1"}, &backend.Connection{}); err == nil {
		t.Error("another node opens it")
	}
	// The same volume again, to a node whose key was made anew.
	p, err := c.ControllerPublishVolume(t.Context(), &csi.ControllerPublishVolumeRequest{VolumeId: v.id, NodeId: driver.NodeID("node-1", other.Public()), VolumeCapability: v.cap})
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Open(p.GetPublishContext()["sealed"], sealed.For{Driver: testDriver, Volume: v.id, Node: "node-1"}, &backend.Connection{}); err != nil {
		t.Error(err)
	}
}

func TestControllerPassesOn(t *testing.T) {
	k := &recorder{Attached: attached()}
	s := &driver.Controller{Driver: testDriver, Volumes: k, TopologyKeys: []string{"t/node"}, MultiNode: true}
	_, err := s.CreateVolume(t.Context(), &csi.CreateVolumeRequest{
		Name: "pvc-1", VolumeCapabilities: []*csi.VolumeCapability{blockCap(rwx)},
		Parameters: map[string]string{
			"type": "fast", driver.ParameterFSGroup: "Always", "csi.storage.k8s.io/pvc/name": "claim", "csi.storage.k8s.io/pvc/namespace": "ns", "csi.storage.k8s.io/pv/name": "pv",
		},
		AccessibilityRequirements: &csi.TopologyRequirement{
			Preferred: []*csi.Topology{{Segments: map[string]string{"t/node": "b", "other": "x"}}},
			Requisite: []*csi.Topology{{Segments: map[string]string{"t/node": "a"}}, {Segments: map[string]string{"t/node": "b"}}, {Segments: map[string]string{"other": "x"}}},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprint(backend.Create{
		Name: "pvc-1", MinBytes: driver.DefaultBytes, Parameters: map[string]string{"type": "fast"}, Namespace: "ns", Claim: "claim", MultiAttach: true,
		Topologies: []map[string]string{{"t/node": "b"}, {"t/node": "a"}},
	})
	if got := fmt.Sprint(k.asked); got != want {
		t.Errorf("asked for %s, not %s", got, want)
	}
}

// TestPublishedNodes: a list says which nodes have a volume, by their CSI IDs.
func TestPublishedNodes(t *testing.T) {
	k := attached()
	s := &driver.Controller{Driver: testDriver, Volumes: k, MultiNode: true, Nodes: named{}}
	v, err := k.Create(t.Context(), backend.Create{Name: "a", MinBytes: 1})
	if err != nil {
		t.Fatal(err)
	}
	for _, node := range []string{"n1", "n2", "gone"} {
		if _, err := k.Attach(t.Context(), backend.Attach{Volume: v.ID, Node: node, Shared: true}); err != nil {
			t.Fatal(err)
		}
	}
	list, err := s.ListVolumes(t.Context(), &csi.ListVolumesRequest{})
	if got := fmt.Sprint(list.GetEntries()[0].GetStatus().GetPublishedNodeIds()); err != nil || got != "[gone n1/key n2/key]" {
		t.Errorf("%s, %v", got, err)
	}
}

type named struct{}

// NodeID implements driver.Nodes.
func (named) NodeID(_ context.Context, _, node string) (string, error) {
	if node == "gone" {
		return "", nil
	}
	return node + "/key", nil
}

type recorder struct {
	backendtest.Attached
	asked backend.Create
}

// Create implements backend.Volumes.
func (r *recorder) Create(ctx context.Context, c backend.Create) (backend.Volume, error) {
	r.asked = c
	return r.Attached.Create(ctx, c)
}

func TestOneOperationAtATime(t *testing.T) {
	k := attached()
	entered, leave := make(chan struct{}), make(chan struct{})
	var once sync.Once
	k.Fail = func(method string) error {
		if method == "Delete" {
			once.Do(func() { close(entered); <-leave })
		}
		return nil
	}
	c := serve(t, drivertest.Subject{Volumes: k})
	ctx := t.Context()
	done := make(chan error)
	go func() {
		_, err := c.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: "volume-000001"})
		done <- err
	}()
	<-entered
	_, err := c.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: "volume-000001"})
	wantCode(t, "a second call", err, codes.Aborted, "volume-000001", "under way")
	close(leave)
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := c.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: "volume-000001"}); err != nil {
		t.Error(err)
	}
}

func TestCode(t *testing.T) {
	for want, err := range map[codes.Code]error{
		codes.OK:                 nil,
		codes.Canceled:           fmt.Errorf("a: %w", context.Canceled),
		codes.DeadlineExceeded:   fmt.Errorf("a: %w", context.DeadlineExceeded),
		codes.InvalidArgument:    errdefs.ErrInvalidArgument,
		codes.NotFound:           errdefs.ErrNotFound,
		codes.AlreadyExists:      errdefs.ErrAlreadyExists,
		codes.PermissionDenied:   errdefs.ErrPermissionDenied,
		codes.ResourceExhausted:  errdefs.ErrResourceExhausted,
		codes.FailedPrecondition: errdefs.ErrFailedPrecondition,
		codes.Aborted:            errdefs.ErrConflict,
		codes.OutOfRange:         errdefs.ErrOutOfRange,
		codes.Unimplemented:      errdefs.ErrNotImplemented,
		codes.Unavailable:        apierrors.NewTooManyRequests("slow", 1),
		codes.DataLoss:           errdefs.ErrDataLoss,
		codes.Unauthenticated:    errdefs.ErrUnauthenticated,
		codes.Internal:           errors.New("disk on fire"),
	} {
		if got := driver.Code(err); got != want {
			t.Errorf("%v is %s, not %s", err, got, want)
		}
	}
}

func FuzzParseNodeID(f *testing.F) {
	k, err := sealed.Generate()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(driver.NodeID("node-1", k.Public()))
	f.Add("/")
	f.Add("a/b/c")
	f.Fuzz(func(t *testing.T, id string) {
		if node, key, err := driver.ParseNodeID(id); err == nil && driver.NodeID(node, key) != id {
			t.Errorf("%q is read as %q", id, driver.NodeID(node, key))
		}
	})
}
