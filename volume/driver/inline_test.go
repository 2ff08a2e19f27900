package driver_test

import (
	"context"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/hypernetes/hypernetes/volume/backend"
	"github.com/hypernetes/hypernetes/volume/backend/backendtest"
	"github.com/hypernetes/hypernetes/volume/driver"
	"github.com/hypernetes/hypernetes/volume/driver/drivertest"
	"github.com/hypernetes/hypernetes/volume/record"
)

// inlines makes volumes of Pods' own, without files.
type inlines struct {
	backendtest.Near
	mu   sync.Mutex
	made map[string]backend.Inline
	size map[string]int64
}

func newInlines(t *testing.T) *inlines {
	return &inlines{
		Near: backendtest.Near{Keeper: &backendtest.Keeper{Dir: t.TempDir()}}, made: map[string]backend.Inline{}, size: map[string]int64{},
	}
}

func (i *inlines) CreateInline(_ context.Context, v backend.Inline, bytes int64) (backend.Connection, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if _, ok := i.made[v.ID]; !ok {
		i.made[v.ID], i.size[v.ID] = v, bytes
	}
	return backend.Connection{SizeBytes: i.size[v.ID], Format: record.FormatBlank, Source: record.Source{File: &record.File{Path: "/inline/" + v.ID}}}, nil
}

func (i *inlines) DeleteInline(_ context.Context, id string) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	delete(i.made, id)
	return nil
}

func (i *inlines) ListInline() ([]backend.Inline, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return slices.Collect(maps.Values(i.made)), nil
}

// inlineOf is a volume as the kubelet asks for it.
func (c *client) inlineOf(letter string, attributes map[string]string) (*volume, *csi.NodePublishVolumeRequest) {
	c.t.Helper()
	v := &volume{c: c, id: "csi-" + strings.Repeat(letter, 64), cap: mountCap(rwo)}
	v.key = record.Key(c.Node.Driver, v.id)
	// As the kubelet does.
	if err := os.MkdirAll(filepath.Dir(v.target("pod-1")), 0o755); err != nil {
		c.t.Fatal(err)
	}
	r := &csi.NodePublishVolumeRequest{VolumeId: v.id, TargetPath: v.target("pod-1"), VolumeCapability: v.cap, VolumeContext: map[string]string{
		"csi.storage.k8s.io/ephemeral": "true", "csi.storage.k8s.io/pod.uid": "pod-1", "csi.storage.k8s.io/pod.namespace": "ns", "csi.storage.k8s.io/serviceAccount.name": "default",
	}}
	maps.Copy(r.VolumeContext, attributes)
	return v, r
}

func TestInline(t *testing.T) {
	files := newInlines(t)
	c := serve(t, drivertest.Subject{Volumes: files})
	v, r := c.inlineOf("a", map[string]string{"size": "2Gi"})
	for range 2 {
		_, err := c.NodePublishVolume(t.Context(), r)
		v.ok("publish", err)
	}
	st, err := c.Store.Staged(v.key)
	v.ok("staged", err)
	if st.SizeBytes != 2<<30 || st.Format != record.FormatBlank || v.record("pod-1").FSType != "ext4" {
		t.Errorf("staged %+v", st)
	}
	if files.made[v.id].Owner != filepath.Dir(v.target("pod-1")) {
		t.Errorf("made %+v", files.made)
	}
	off := v.boot("pod-1")
	v.code("unpublish under the VM", v.unpublish("pod-1"), codes.Unavailable, "pod-1")
	if len(files.made) != 1 {
		t.Error("the file went while the VM runs")
	}
	off()
	for range 2 {
		v.ok("unpublish", v.unpublish("pod-1"))
	}
	keys, err := c.Store.Keys()
	if len(files.made) != 0 || err != nil || len(keys) != 0 {
		t.Errorf("left: files %v, records %v, %v", files.made, keys, err)
	}
	// After a reboot the records are gone, the file is not.
	_, err = c.NodePublishVolume(t.Context(), r)
	v.ok("publish", err)
	v.ok("unmount", c.Places.Remove(v.key, v.target("pod-1")))
	v.ok("wipe", os.RemoveAll(c.Store.Root))
	v.ok("unpublish", v.unpublish("pod-1"))
	if len(files.made) != 0 {
		t.Errorf("left: files %v", files.made)
	}
}

func TestInlineBadInput(t *testing.T) {
	files := newInlines(t)
	c := serve(t, drivertest.Subject{Volumes: files})
	for _, x := range []struct {
		name       string
		attributes map[string]string
		change     func(*csi.NodePublishVolumeRequest)
		code       codes.Code
		words      string
	}{
		{"unknown attribute", map[string]string{"handle": "x"}, nil, codes.InvalidArgument, `"handle"`},
		{"size that is none", map[string]string{"size": "much"}, nil, codes.InvalidArgument, `volumeAttributes.size "much"`},
		{"size of nothing", map[string]string{"size": "0"}, nil, codes.InvalidArgument, "over 0"},
		{"size below nothing", map[string]string{"size": "-1Gi"}, nil, codes.InvalidArgument, "over 0"},
		{"small xfs", map[string]string{"size": "10Mi"}, func(r *csi.NodePublishVolumeRequest) {
			r.VolumeCapability.GetMount().FsType = "xfs"
		}, codes.OutOfRange, "xfs"},
		{"other file system", nil, func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability.GetMount().FsType = "btrfs" }, codes.InvalidArgument, "btrfs"},
		{"read-only", nil, func(r *csi.NodePublishVolumeRequest) { r.Readonly = true }, codes.InvalidArgument, "readOnly"},
		{"secret", nil, func(r *csi.NodePublishVolumeRequest) { r.Secrets = map[string]string{"a": "b"} }, codes.InvalidArgument, "nodePublishSecretRef"},
		{"raw", nil, func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability = blockCap(rwo) }, codes.InvalidArgument, "file system"},
		{"handle of a claim's", nil, func(r *csi.NodePublishVolumeRequest) { r.VolumeId = "pvc-1.2" }, codes.InvalidArgument, "pvc-1.2"},
		{"no Pod", nil, func(r *csi.NodePublishVolumeRequest) { r.VolumeContext["csi.storage.k8s.io/pod.uid"] = "/" }, codes.InvalidArgument, "UID"},
	} {
		v, r := c.inlineOf("b", x.attributes)
		if x.change != nil {
			x.change(r)
		}
		_, err := c.NodePublishVolume(t.Context(), r)
		wantCode(t, x.name, err, x.code, x.words)
		if _, err := os.Lstat(v.target("pod-1")); err == nil || len(files.made) > 0 {
			t.Errorf("%s: something was made", x.name)
		}
	}
	other := serve(t, drivertest.Subject{Volumes: attached()})
	_, r := other.inlineOf("c", nil)
	_, err := other.NodePublishVolume(t.Context(), r)
	wantCode(t, "a driver without", err, codes.InvalidArgument, "volumeClaimTemplate")
}

// TestCollectInline: what a Pod had is removed when the kubelet has no directory of it, and
// only then.
func TestCollectInline(t *testing.T) {
	files := newInlines(t)
	c := serve(t, drivertest.Subject{Volumes: files})
	collector := &driver.Collector{Store: c.Store, Places: c.Places, Nodes: []*driver.Node{c.Node}, Root: c.Dir, Locks: c.Node.Locks, Interval: time.Hour}
	v, r := c.inlineOf("d", nil)
	_, err := c.NodePublishVolume(t.Context(), r)
	v.ok("publish", err)
	off := v.boot("pod-1")
	collect := func(what string, left bool) {
		t.Helper()
		v.ok("collect", collector.Collect(t.Context()))
		if _, ok := files.made[v.id]; ok != left {
			t.Errorf("%s: the file is there: %t", what, ok)
		}
	}
	collect("a Pod that runs", true)
	v.ok("unmount", c.Places.Remove(v.key, v.target("pod-1")))
	v.ok("forget", os.RemoveAll(filepath.Join(c.Dir, "pods", "pod-1")))
	collect("a VM that runs", true)
	off()
	// The kubelet's directory is not there: it may yet be mounted.
	v.ok("hide", os.Rename(filepath.Join(c.Dir, "pods"), filepath.Join(c.Dir, "hidden")))
	collect("no kubelet", true)
	v.ok("show", os.Rename(filepath.Join(c.Dir, "hidden"), filepath.Join(c.Dir, "pods")))
	collect("a Pod that is gone", false)
	if _, err := c.Store.Staged(v.key); err == nil {
		t.Error("the record stays")
	}
	if _, err := os.Lstat(v.target("pod-1")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("target: %v", err)
	}
}
