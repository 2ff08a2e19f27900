package driver_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"

	volumev1 "github.com/hypernetes/hypernetes/api/volume/v1"
	"github.com/hypernetes/hypernetes/volume/backend"
	"github.com/hypernetes/hypernetes/volume/backend/backendtest"
	"github.com/hypernetes/hypernetes/volume/driver"
	"github.com/hypernetes/hypernetes/volume/driver/drivertest"
	"github.com/hypernetes/hypernetes/volume/placeholder"
	"github.com/hypernetes/hypernetes/volume/record"
	"github.com/hypernetes/hypernetes/volume/sealed"
)

const testDriver = "test.hypernetes.io"

// client is what the sidecars and the kubelet are to a driver.
type client struct {
	t *testing.T
	*drivertest.Fixture
	csi.ControllerClient
	csi.NodeClient
	conn *grpc.ClientConn
}

func serve(t *testing.T, s drivertest.Subject) *client {
	t.Helper()
	drivertest.NeedRoot(t)
	f := drivertest.Serve(t, s)
	conn, err := grpc.NewClient("unix://"+f.Address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return &client{t, f, csi.NewControllerClient(conn), csi.NewNodeClient(conn), conn}
}

func mountCap(mode csi.VolumeCapability_AccessMode_Mode) *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: mode},
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}},
	}
}

func blockCap(mode csi.VolumeCapability_AccessMode_Mode) *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: mode},
		AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
	}
}

const (
	rwo  = csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER
	rwop = csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER
	rox  = csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY
	rwx  = csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER
)

// volume is one that is made, attached and staged.
type volume struct {
	c       *client
	id, key string
	cap     *csi.VolumeCapability
	publish map[string]string
}

func (c *client) volume(name string, vc *csi.VolumeCapability) *volume {
	c.t.Helper()
	v, err := c.CreateVolume(c.t.Context(), &csi.CreateVolumeRequest{Name: name, VolumeCapabilities: []*csi.VolumeCapability{vc}})
	if err != nil {
		c.t.Fatal(err)
	}
	x := &volume{c: c, id: v.GetVolume().GetVolumeId(), cap: vc}
	x.key = record.Key(c.Node.Driver, x.id)
	if c.Node.Files == nil {
		p, err := c.ControllerPublishVolume(c.t.Context(), &csi.ControllerPublishVolumeRequest{VolumeId: x.id, NodeId: driver.NodeID(c.Node.Name, c.Node.Key.Public()), VolumeCapability: vc})
		if err != nil {
			c.t.Fatal(err)
		}
		x.publish = p.GetPublishContext()
	}
	if _, err := x.stage(); err != nil {
		c.t.Fatal(err)
	}
	return x
}

func (v *volume) stage() (*csi.NodeStageVolumeResponse, error) {
	return v.c.NodeStageVolume(v.c.t.Context(), &csi.NodeStageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.c.Dir + "/staging", VolumeCapability: v.cap, PublishContext: v.publish})
}

func (v *volume) target(pod string) string { return filepath.Join(v.c.Dir, "pods", pod, v.id, "mount") }

func (v *volume) publishTo(pod string, readOnly bool) error {
	_, err := v.c.NodePublishVolume(v.c.t.Context(), &csi.NodePublishVolumeRequest{
		VolumeId: v.id, StagingTargetPath: v.c.Dir + "/staging", TargetPath: v.target(pod), VolumeCapability: v.cap, PublishContext: v.publish, Readonly: readOnly,
		VolumeContext: map[string]string{"csi.storage.k8s.io/pod.uid": pod, "csi.storage.k8s.io/pod.namespace": "ns-" + pod, "csi.storage.k8s.io/pod.name": "p"},
	})
	return err
}

func (v *volume) unpublish(pod string) error {
	_, err := v.c.NodeUnpublishVolume(v.c.t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: v.id, TargetPath: v.target(pod)})
	return err
}

func (v *volume) unstage() error {
	_, err := v.c.NodeUnstageVolume(v.c.t.Context(), &csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.c.Dir + "/staging"})
	return err
}

// boot is the Pod's VM: it takes the leases and returns what ends it.
func (v *volume) boot(pod string) (off func()) {
	v.c.t.Helper()
	all, err := v.c.Store.ForPod(pod)
	if err != nil || len(all) != 1 {
		v.c.t.Fatalf("pod %s has %d volumes: %v", pod, len(all), err)
	}
	held, err := v.c.Store.Take(all[0])
	if err != nil {
		v.c.t.Fatal(err)
	}
	return func() {
		for _, f := range held {
			_ = f.Close()
		}
	}
}

func (v *volume) record(pod string) record.Publication {
	v.c.t.Helper()
	p, err := v.c.Store.Publication(v.key, pod)
	if err != nil {
		v.c.t.Fatal(err)
	}
	return p
}

func (v *volume) ok(what string, err error) {
	v.c.t.Helper()
	if err != nil {
		v.c.t.Errorf("%s: %v", what, err)
	}
}

func (v *volume) code(what string, err error, want codes.Code, words ...string) {
	v.c.t.Helper()
	wantCode(v.c.t, what, err, want, words...)
}

func wantCode(t *testing.T, what string, err error, want codes.Code, words ...string) {
	t.Helper()
	if status.Code(err) != want {
		t.Errorf("%s: %v, not %s", what, err, want)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%s: %q does not say %q", what, err, w)
		}
	}
}

func attached() backendtest.Attached {
	return backendtest.Attached{Keeper: &backendtest.Keeper{Owner: "project-a"}}
}

func TestPublishedRecord(t *testing.T) {
	c := serve(t, drivertest.Subject{Volumes: attached()})
	vc := mountCap(rwo)
	vc.GetMount().MountFlags = []string{"noatime,data=ordered", "rw", "noatime"}
	vc.GetMount().VolumeMountGroup = "2000"
	v := c.volume("a", vc)
	v.ok("publish", v.publishTo("pod-1", false))
	st, err := c.Store.Staged(v.key)
	v.ok("staged", err)
	if st.Source.RBD == nil || st.Serial != record.Serial(testDriver, v.id) || st.SizeBytes != driver.DefaultBytes || st.Format != record.FormatBlank || st.ReadOnly || st.Attachment == "" {
		t.Errorf("staged %+v", st)
	}
	if key, err := c.Store.Secret(v.key, record.SecretKey); err != nil || string(key) != "c2VjcmV0" {
		t.Errorf("secret %q, %v", key, err)
	}
	p := v.record("pod-1")
	if p.FSType != "ext4" || strings.Join(p.Options, " ") != "data=ordered noatime" || p.FSGroup == nil || *p.FSGroup != 2000 || p.ReadOnly || p.FSGroupAlways {
		t.Errorf("publication %+v", p)
	}
	var stat unix.Stat_t
	if err := unix.Lstat(v.target("pod-1"), &stat); err != nil || stat.Dev != p.Device {
		t.Errorf("device %d, %d is at the target: %v", p.Device, stat.Dev, err)
	}
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || !strings.Contains(string(text), v.target("pod-1")+" rw,nosuid,nodev,noexec") {
		t.Errorf("no placeholder as the shim expects it: %v", err)
	}
	v.ok("unpublish", v.unpublish("pod-1"))

	// A Pod that only reads gives nothing to a group.
	v.ok("publish read-only", v.publishTo("pod-1", true))
	if p := v.record("pod-1"); p.FSGroup != nil || !p.ReadOnly {
		t.Errorf("publication %+v", p)
	}
	v.ok("unpublish", v.unpublish("pod-1"))
	v.ok("unstage", v.unstage())
	for range 2 {
		v.ok("unpublish what is not", v.unpublish("pod-1"))
		v.ok("unstage what is not", v.unstage())
	}
	if keys, err := c.Store.Keys(); err != nil || len(keys) != 0 {
		t.Errorf("records left: %v, %v", keys, err)
	}
}

func TestSecondPod(t *testing.T) {
	c := serve(t, drivertest.Subject{Volumes: attached()})
	for _, x := range []struct {
		name          string
		cap           *csi.VolumeCapability
		first, second bool // read-only
		ok            bool
	}{
		{"two writers", mountCap(rwo), false, false, false},
		{"writer, then reader", mountCap(rwo), false, true, false},
		{"reader, then writer", mountCap(rwo), true, false, false},
		{"two readers", mountCap(rwo), true, true, true},
		{"read-only many", mountCap(rox), false, false, true},
		{"once only", mountCap(rwop), true, true, false},
		{"raw, not shared", blockCap(rwo), false, false, false},
		{"raw and shared", blockCap(rwx), false, false, true},
	} {
		t.Run(x.name, func(t *testing.T) {
			c := *c
			c.t = t
			v := c.volume(x.name, x.cap)
			v.ok("first", v.publishTo("pod-1", x.first))
			err := v.publishTo("pod-2", x.second)
			if x.ok {
				v.ok("second", err)
				// The VM of one does not hold up the other's end.
				off := v.boot("pod-1")
				v.ok("unpublish second", v.unpublish("pod-2"))
				v.code("unpublish first", v.unpublish("pod-1"), codes.Unavailable, "pod-1")
				off()
			} else {
				v.code("second", err, codes.FailedPrecondition, "pod-1", "node-1")
				if _, err := os.Lstat(v.target("pod-2")); err == nil {
					t.Error("a placeholder for a Pod that was refused")
				}
			}
			v.ok("unpublish first", v.unpublish("pod-1"))
			v.ok("second, alone", v.publishTo("pod-2", x.second))
			v.ok("unpublish second", v.unpublish("pod-2"))
			v.ok("unstage", v.unstage())
		})
	}
}

// TestLease has everything that would take a disk away wait for the VM's end.
func TestLease(t *testing.T) {
	k := attached()
	c := serve(t, drivertest.Subject{Volumes: k})
	v := c.volume("a", mountCap(rwo))
	v.ok("publish", v.publishTo("pod-1", false))
	off := v.boot("pod-1")
	v.code("unpublish", v.unpublish("pod-1"), codes.Unavailable, "VM of pod pod-1 still has it")
	v.code("unstage", v.unstage(), codes.FailedPrecondition, "pod-1")
	if _, err := os.Stat(filepath.Join(v.target("pod-1"), placeholder.Marker)); err != nil {
		t.Errorf("the placeholder went while the VM runs: %v", err)
	}
	v.ok("publish again", v.publishTo("pod-1", false))
	v.ok("stage again", func() error { _, err := v.stage(); return err }())
	v.code("publish otherwise", v.publishTo("pod-1", true), codes.Unavailable, "in another way")
	if _, err := os.Stat(filepath.Join(v.target("pod-1"), placeholder.Marker)); err != nil {
		t.Errorf("a publish that failed took the placeholder of the one before: %v", err)
	}
	// Attached anew meanwhile, elsewhere: the disk of a running VM is not exchanged.
	box, err := sealed.Seal(c.Node.Key.Public(), sealed.For{Driver: testDriver, Volume: v.id, Node: c.Node.Name}, backend.Connection{
		Attachment: "other", Owner: "project-a", Source: record.Source{RBD: &record.RBD{Pool: "p", Image: "i", Monitors: []string{"h:1"}}},
	})
	v.ok("seal", err)
	was := v.publish
	v.publish = map[string]string{"sealed": box}
	v.code("stage as another disk", func() error { _, err := v.stage(); return err }(), codes.Unavailable, "another disk", "pod-1")
	v.publish = was
	off()
	v.ok("unpublish", v.unpublish("pod-1"))
	v.ok("unstage", v.unstage())
}

func TestAfterReboot(t *testing.T) {
	c := serve(t, drivertest.Subject{Volumes: attached()})
	v := c.volume("a", mountCap(rwo))
	v.ok("publish", v.publishTo("pod-1", false))
	// Everything in memory is gone, and so are mounts.
	v.ok("unmount", unix.Unmount(v.target("pod-1"), 0))
	v.ok("wipe", os.RemoveAll(c.Store.Root))
	v.ok("publish again", v.publishTo("pod-1", false))
	if v.record("pod-1").Target != v.target("pod-1") {
		t.Error("not published")
	}
	v.ok("wipe", os.RemoveAll(c.Store.Root))
	v.ok("unpublish", v.unpublish("pod-1"))
	v.ok("unstage", v.unstage())
}

type owners map[string]string

// OwnerOf implements driver.Owners.
func (o owners) OwnerOf(_ context.Context, ns string) (string, error) {
	switch p, ok := o[ns]; {
	case !ok:
		return "", errdefs.ErrNotFound
	case p == "unknown":
		return "", errdefs.ErrUnavailable
	default:
		return p, nil
	}
}

func TestTenants(t *testing.T) {
	c := serve(t, drivertest.Subject{Volumes: attached(), Owners: owners{"ns-a": "project-a", "ns-b": "project-b", "ns-none": "", "ns-dark": "unknown"}})
	v := c.volume("a", mountCap(rwo))
	v.code("other tenant", v.publishTo("b", false), codes.PermissionDenied, "project-b")
	v.code("no tenant", v.publishTo("none", false), codes.PermissionDenied, "ns-none")
	v.code("nobody knows", v.publishTo("dark", false), codes.Unavailable)
	v.code("no such namespace", v.publishTo("gone", false), codes.NotFound)
	for _, pod := range []string{"b", "none", "dark", "gone"} {
		if _, err := os.Lstat(v.target(pod)); err == nil {
			t.Errorf("a placeholder for pod %s, which was refused", pod)
		}
	}
	v.ok("own tenant", v.publishTo("a", false))
	v.ok("unpublish", v.unpublish("a"))

	ours := serve(t, drivertest.Subject{Volumes: backendtest.Attached{Keeper: &backendtest.Keeper{}}, Owners: owners{"ns-a": "project-a", "ns-none": ""}})
	v = ours.volume("a", mountCap(rwo))
	v.code("a tenant and the operator's volume", v.publishTo("a", false), codes.PermissionDenied)
	v.ok("the operator's own", v.publishTo("none", false))
	v.ok("unpublish", v.unpublish("none"))
}

func TestSealedIsForOne(t *testing.T) {
	c := serve(t, drivertest.Subject{Volumes: attached(), Roots: []string{"/no/such/root"}})
	a, b := c.volume("a", mountCap(rwo)), c.volume("b", mountCap(rwo))
	a.publish, b.publish = b.publish, a.publish
	_, err := a.stage()
	a.code("another volume's connection", err, codes.PermissionDenied)
	a.publish = nil
	_, err = a.stage()
	a.code("no connection", err, codes.InvalidArgument, "attachRequired")
	a.publish = map[string]string{"sealed": "AAAA"}
	_, err = a.stage()
	a.code("no box", err, codes.InvalidArgument, "attach it again")

	dir := t.TempDir()
	for _, name := range []string{"in/disk", "out/disk"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for link, to := range map[string]string{"in/dir": "../out", "in/link": "../out/disk"} {
		if err := os.Symlink(to, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	c.Node.Roots = []string{dir + "/missing", dir + "/in"}
	for path, want := range map[string]codes.Code{
		dir + "/in/disk":        codes.OK,
		dir + "/in/none":        codes.FailedPrecondition,
		dir + "/in/link":        codes.FailedPrecondition,
		dir + "/in/dir/disk":    codes.PermissionDenied,
		dir + "/out/disk":       codes.PermissionDenied,
		dir + "/in/../out/disk": codes.InvalidArgument,
		dir + "/gone/disk":      codes.FailedPrecondition,
		"/dev/null":             codes.PermissionDenied,
		"disk":                  codes.InvalidArgument,
	} {
		v := c.volume(strings.ReplaceAll(path, "/", "-"), mountCap(rwo))
		v.ok("unstage", v.unstage())
		box, err := sealed.Seal(c.Node.Key.Public(), sealed.For{Driver: testDriver, Volume: v.id, Node: c.Node.Name}, backend.Connection{Owner: "p", Source: record.Source{File: &record.File{Path: path}}})
		v.ok("seal", err)
		v.publish = map[string]string{"sealed": box}
		_, err = v.stage()
		wantCode(t, path, err, want)
	}
}

// breaking fails at one of its calls, before or after it has done what it is for: so a
// process is killed.
type breaking struct {
	driver.Places
	at    int
	after bool
}

var errKilled = errors.New("killed")

func (b *breaking) step(do func() error) error {
	b.at--
	if b.at == 0 && !b.after {
		return errKilled
	}
	err := do()
	if b.at == 0 {
		return errKilled
	}
	return err
}

func (b *breaking) Directory(key, target string) (dev uint64, err error) {
	err = b.step(func() error { dev, err = b.Places.Directory(key, target); return err })
	return dev, err
}

func (b *breaking) Device(key, target string) (dev uint64, err error) {
	err = b.step(func() error { dev, err = b.Places.Device(key, target); return err })
	return dev, err
}

func (b *breaking) Remove(key, target string) error {
	return b.step(func() error { return b.Places.Remove(key, target) })
}

func TestCrashes(t *testing.T) {
	c := serve(t, drivertest.Subject{Volumes: attached()})
	sound := c.Node.Places
	for i, vc := range []*csi.VolumeCapability{mountCap(rwo), blockCap(rwo)} {
		for at := 1; at <= 3; at++ {
			for _, after := range []bool{false, true} {
				for _, again := range []bool{false, true} {
					v := c.volume(fmt.Sprint(i, at, after, again), vc)
					c.Node.Places = &breaking{sound, at, after}
					_ = v.publishTo("pod-1", false)
					_ = v.unpublish("pod-1")
					c.Node.Places = sound
					if again {
						v.ok("publish again", v.publishTo("pod-1", false))
						v.boot("pod-1")()
					}
					v.ok("unpublish", v.unpublish("pod-1"))
					v.ok("unstage", v.unstage())
					if _, err := os.Lstat(v.target("pod-1")); err == nil {
						t.Errorf("step %d after %t: %s is still there", at, after, v.target("pod-1"))
					}
				}
			}
		}
	}
}

func TestCollect(t *testing.T) {
	c := serve(t, drivertest.Subject{Volumes: attached()})
	locks := c.Node.Locks
	collector := &driver.Collector{Store: c.Store, Places: c.Places, Root: c.Dir, Locks: locks, Interval: time.Hour}
	collect := func() {
		t.Helper()
		if err := collector.Collect(t.Context()); err != nil {
			t.Error(err)
		}
	}
	fine, bare, lost, held := c.volume("fine", mountCap(rwo)), c.volume("bare", mountCap(rwo)), c.volume("lost", blockCap(rwo)), c.volume("held", mountCap(rwo))
	for _, v := range []*volume{fine, bare, lost, held} {
		v.ok("publish", v.publishTo("pod-1", false))
	}
	// A record whose placeholder is gone, one of a VM that runs, a placeholder and a loop
	// device whose record is gone.
	bare.ok("unmount", unix.Unmount(bare.target("pod-1"), 0))
	held.ok("unmount", unix.Unmount(held.target("pod-1"), 0))
	p := held.record("pod-1")
	lease, err := c.Store.PodLease(held.key, p.PodUID)
	held.ok("lease", err)
	lost.ok("forget", c.Store.Unpublish(lost.key, "pod-1"))
	lost.ok("unbind", unix.Unmount(lost.target("pod-1"), 0))
	orphan := filepath.Join(c.Dir, "pods", "orphan")
	_, err = c.Places.Directory(record.Key("d", "orphan"), orphan)
	fine.ok("orphan", err)
	elsewhere := t.TempDir()
	_, err = c.Places.Directory(record.Key("d", "orphan"), elsewhere)
	fine.ok("elsewhere", err)
	defer func() { _ = unix.Unmount(elsewhere, 0) }()

	unlock, err := locks.Try(bare.key)
	bare.ok("lock", err)
	collect()
	bare.record("pod-1") // an operation is under way
	unlock()
	collect()
	if _, err := c.Store.Publication(bare.key, "pod-1"); !errdefs.IsNotFound(err) {
		t.Errorf("a record without a placeholder stays: %v", err)
	}
	fine.record("pod-1")
	held.record("pod-1")
	if _, err := os.Lstat(orphan); err == nil {
		t.Error("a placeholder without a record stays")
	}
	if _, err := os.Stat(filepath.Join(elsewhere, placeholder.Marker)); err != nil {
		t.Errorf("another node's placeholder was removed: %v", err)
	}
	if files, _ := os.ReadDir(c.Places.Dir); len(files) != 0 {
		t.Errorf("loop devices stay: %v", files)
	}
	_ = lease.Close()
	collect()
	if _, err := c.Store.Publication(held.key, "pod-1"); !errdefs.IsNotFound(err) {
		t.Errorf("a record without a placeholder stays after its VM: %v", err)
	}
	fine.ok("unpublish", fine.unpublish("pod-1"))
	for _, v := range []*volume{bare, lost, held} {
		v.ok("unpublish", v.unpublish("pod-1"))
	}
}

func TestStats(t *testing.T) {
	c := serve(t, drivertest.Subject{Volumes: attached()})
	v := c.volume("a", mountCap(rwo))
	v.ok("publish", v.publishTo("pod-1", false))
	ask := func() (*csi.NodeGetVolumeStatsResponse, error) {
		return c.NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: v.id, VolumePath: v.target("pod-1")})
	}
	c.Shim.Answer = &volumev1.StatsResponse{TotalBytes: 100, UsedBytes: math.MaxUint64, AvailableBytes: math.MaxUint64, TotalInodes: math.MaxUint64, UsedInodes: 5, AvailableInodes: math.MaxUint64}
	r, err := ask()
	v.ok("stats", err)
	for _, u := range r.GetUsage() {
		if u.Total < 0 || u.Used < 0 || u.Available < 0 || u.Used+u.Available > u.Total {
			t.Errorf("usage %+v", u)
		}
	}
	if is, message := conditionOf(t, r); is || message == "" {
		t.Errorf("condition %t %q", is, message)
	}
	health := func() []*csi.VolumeHealth_VolumeHealthEntry {
		t.Helper()
		h, err := c.NodeGetVolumeHealth(t.Context(), &csi.NodeGetVolumeHealthRequest{VolumeId: v.id})
		v.ok("health", err)
		return h.GetVolumeHealth().GetHealthStatuses()
	}
	if h := health(); len(h) != 0 {
		t.Errorf("health %v", h)
	}
	for kind, want := range map[volumev1.Health]string{
		volumev1.Health_GUEST_REPORTS_ERRORS: "DEGRADED GuestReportsErrors", volumev1.Health_DISK_ERRORS: "DEGRADED DiskErrors",
		volumev1.Health_BACKING_LOST: "DATA_LOSS BackingLost", 77: "DEGRADED GuestReportsErrors",
	} {
		c.Shim.Answer.Abnormal, c.Shim.Answer.Health = "read-only\n\x1b[31m"+strings.Repeat("ä", 4000), kind
		r, err = ask()
		v.ok("stats", err)
		is, message := conditionOf(t, r)
		if !is || !strings.HasPrefix(message, "read-only  [31mää") || len(message) > 1000 || !utf8.ValidString(message) {
			t.Errorf("condition %t %q", is, message)
		}
		if h := health(); len(h) != 1 || h[0].GetStatus().String()+" "+h[0].GetReason() != want || h[0].GetMessage() != message {
			t.Errorf("health %v, want %s", h, want)
		}
	}
	c.Shim.Answer, c.Shim.Err = nil, errdefs.ErrUnavailable
	_, err = ask()
	v.code("a guest that does not answer", err, codes.Unavailable)
	off := v.boot("pod-1")
	_, err = c.NodeGetVolumeHealth(t.Context(), &csi.NodeGetVolumeHealthRequest{VolumeId: v.id})
	v.code("health of a guest that does not answer", err, codes.Unavailable)
	off()
	if h := health(); len(h) != 0 {
		t.Errorf("health without a VM: %v", h)
	}
	c.Shim.Err = nil
	address, err := c.Store.Shim("pod-1")
	v.ok("shim", err)
	v.ok("remove shim", c.Store.RemoveShim("pod-1", address))
	_, err = ask()
	v.code("no VM", err, codes.Unavailable, "pod-1")
	v.ok("unpublish", v.unpublish("pod-1"))
	_, err = ask()
	v.code("unpublished", err, codes.NotFound, v.target("pod-1"))

	// The kubelet asks for a raw device at a path of its own.
	v = c.volume("b", blockCap(rwo))
	v.ok("publish", v.publishTo("pod-1", false))
	r, err = c.NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: v.id, VolumePath: "/var/lib/kubelet/plugins/kubernetes.io/csi/volumeDevices/pv-1/dev/pod-1"})
	if err != nil || len(r.GetUsage()) != 1 || r.GetUsage()[0].GetTotal() != 1<<30 {
		t.Errorf("stats of a raw device: %v, %v", r, err)
	}
	v.ok("unpublish", v.unpublish("pod-1"))
}

// conditionOf reads an answer as a kubelet that speaks CSI 1.9.
func conditionOf(t *testing.T, r *csi.NodeGetVolumeStatsResponse) (abnormal bool, message string) {
	t.Helper()
	fields := func(b []byte, each func(n protowire.Number, number uint64, bytes []byte)) {
		for len(b) > 0 {
			n, kind, tag := protowire.ConsumeTag(b)
			size := protowire.ConsumeFieldValue(n, kind, b[tag:])
			if tag < 0 || size < 0 {
				t.Fatalf("%x is no message", b)
			}
			number, _ := protowire.ConsumeVarint(b[tag:])
			bytes, _ := protowire.ConsumeBytes(b[tag:])
			each(n, number, bytes)
			b = b[tag+size:]
		}
	}
	fields(r.ProtoReflect().GetUnknown(), func(n protowire.Number, _ uint64, bytes []byte) {
		if n != 2 {
			t.Errorf("field %d", n)
		}
		fields(bytes, func(n protowire.Number, number uint64, bytes []byte) {
			switch n {
			case 1:
				abnormal = protowire.DecodeBool(number)
			case 2:
				message = string(bytes)
			}
		})
	})
	return abnormal, message
}

func TestExpand(t *testing.T) {
	c := serve(t, drivertest.Subject{Volumes: attached()})
	v := c.volume("a", mountCap(rwo))
	const gib = 1 << 30
	expand := func(path string, bytes int64) (int64, error) {
		r, err := c.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{VolumeId: v.id, VolumePath: path, StagingTargetPath: c.Dir + "/staging", CapacityRange: &csi.CapacityRange{RequiredBytes: bytes}})
		return r.GetCapacityBytes(), err
	}
	// As the kubelet does before a Pod has it.
	if n, err := expand(c.Dir+"/staging", 2*gib); err != nil || n != 2*gib {
		t.Errorf("%d, %v", n, err)
	}
	v.ok("publish", v.publishTo("pod-1", false))
	if n, err := expand(v.target("pod-1"), 3*gib); err != nil || n != 3*gib || c.Shim.Grown[v.key] != 3*gib {
		t.Errorf("%d, %v, %v", n, err, c.Shim.Grown)
	}
	if st, err := c.Store.Staged(v.key); err != nil || st.SizeBytes != 3*gib {
		t.Errorf("%+v, %v", st, err)
	}
	if key, err := c.Store.Secret(v.key, record.SecretKey); err != nil || len(key) == 0 {
		t.Errorf("the secret went: %v", err)
	}
	// A guest that does not grow is an error as long as its VM runs.
	c.Shim.Err = errdefs.ErrUnavailable
	off := v.boot("pod-1")
	_, err := expand(v.target("pod-1"), 4*gib)
	v.code("a guest that does not answer", err, codes.Unavailable)
	off()
	if _, err := expand(v.target("pod-1"), 4*gib); err != nil {
		t.Errorf("no VM: %v", err)
	}
	v.ok("unpublish", v.unpublish("pod-1"))

	// Limits change likewise, and who has written them may have been killed before it told.
	c.Shim.Err = nil
	v.ok("publish", v.publishTo("pod-1", false))
	limit := func(t *record.Throttle) error { return c.Node.Limit(v.c.t.Context(), v.id, t) }
	for i, limits := range []*record.Throttle{{IOPS: 100}, {IOPS: 100}, nil} {
		v.ok("limit", limit(limits))
		if st, err := c.Store.Staged(v.key); err != nil || !reflect.DeepEqual(st.Throttle, limits) || c.Shim.Throttled[v.key] != i+1 {
			t.Errorf("limits %+v: %+v, told %d times, %v", limits, st, c.Shim.Throttled[v.key], err)
		}
	}
	if key, err := c.Store.Secret(v.key, record.SecretKey); err != nil || len(key) == 0 {
		t.Errorf("the secret went: %v", err)
	}
	off = v.boot("pod-1")
	c.Shim.Err = errdefs.ErrUnavailable
	if err := limit(nil); !errdefs.IsUnavailable(err) {
		t.Errorf("a VM that does not answer: %v", err)
	}
	c.Shim.Err = errdefs.ErrNotImplemented
	v.ok("an older shim", limit(nil))
	c.Shim.Err = errdefs.ErrUnavailable
	off()
	v.ok("no VM", limit(nil))
	v.ok("unpublish", v.unpublish("pod-1"))
	v.ok("unstage", v.unstage())
	v.ok("not staged", limit(nil))

	near := serve(t, drivertest.Subject{Volumes: backendtest.Near{Keeper: &backendtest.Keeper{Dir: t.TempDir()}}})
	v = near.volume("a", mountCap(rwo))
	_, err = near.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{VolumeId: v.id, VolumePath: "/x", CapacityRange: &csi.CapacityRange{RequiredBytes: 5 * gib}})
	v.code("a file that was not expanded", err, codes.OutOfRange)
}
