package service

import (
	"context"
	"errors"
	"math"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
	volumeapi "github.com/hypernetes/hypernetes/api/volume/v1"
	"github.com/hypernetes/hypernetes/runtime/config"
	"github.com/hypernetes/hypernetes/runtime/vmm"
	"github.com/hypernetes/hypernetes/runtime/vmm/vmmtest"
	"github.com/hypernetes/hypernetes/volume/record"
)

// node is the plugin's side: records and disks.
type node struct {
	t     *testing.T
	store record.Store
	dir   string
}

const diskBytes = 1 << 20

// publish makes a volume of its own and publishes it to the test's Pod.
func (n *node) publish(name string, change ...func(*record.Staged, *record.Publication)) record.Attachment {
	n.t.Helper()
	path := filepath.Join(n.dir, name+".raw")
	check(n.t, errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, diskBytes)))
	st := record.Staged{
		Version: record.Version, Driver: "test", Volume: name, Serial: record.Serial("test", name),
		Source: record.Source{File: &record.File{Path: path}}, Format: record.FormatBlank,
	}
	p := record.Publication{Version: record.Version, PodUID: "uid-1", Target: "/t/" + name, Device: unix.Mkdev(0, 900), Mode: record.Filesystem, FSType: "ext4"}
	for _, c := range change {
		c(&st, &p)
	}
	check(n.t, errors.Join(n.store.Stage(st, nil), n.store.Publish(st.Key(), p)))
	return record.Attachment{Key: st.Key(), Staged: st, Publication: p}
}

func withNode(t *testing.T, v *vmmtest.VMM) (*shim, *node) {
	t.Helper()
	var root string
	s := start(t, v, func(c *config.Config) { root = c.VolumeRoot })
	return s, &node{t: t, store: record.Store{Root: root}, dir: t.TempDir()}
}

func (s *shim) volumes() volumeapi.VolumesService {
	s.t.Helper()
	conn, err := net.Dial("unix", s.socket)
	check(s.t, err)
	c := ttrpc.NewClient(conn)
	s.t.Cleanup(func() { c.Close() })
	return volumeapi.NewVolumesClient(c)
}

// TestVolumes: disks come with the VM, with their leases, and go with it.
func TestVolumes(t *testing.T) {
	s, n := withNode(t, &vmmtest.VMM{})
	data := n.publish("data")
	raw := n.publish("raw", func(st *record.Staged, p *record.Publication) {
		p.Mode, p.FSType, p.Device, st.Throttle = record.Block, "", unix.Mkdev(7, 9), &record.Throttle{IOPS: 7}
	})
	ro := n.publish("ro", func(_ *record.Staged, p *record.Publication) { p.ReadOnly = true })
	n.publish("others", func(_ *record.Staged, p *record.Publication) { p.PodUID = "uid-2" })
	vm := s.up()
	if len(vm.Config.Disks) != 3 || len(vm.Config.Hold) != 6 {
		t.Fatalf("%d disks, %d held", len(vm.Config.Disks), len(vm.Config.Hold))
	}
	for _, d := range vm.Config.Disks {
		if !d.Persistent || d.Discard == d.ReadOnly || d.ReadOnly != (d.Serial == ro.Staged.Serial) || (d.Throttle != nil) != (d.Serial == raw.Staged.Serial) {
			t.Errorf("disk %+v", d)
		}
	}
	configured := vm.Agent.Configured
	if len(configured.Volumes) != 2 {
		t.Errorf("configured with %v", configured.Volumes)
	}
	if address, err := n.store.Shim("uid-1"); err != nil || address != "unix://"+s.socket {
		t.Errorf("address %s, %v", address, err)
	}
	s.run("c", []string{"sleep"}, func(spec *specs.Spec, _ *taskapi.CreateTaskRequest) {
		spec.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/xvda", Type: "b", Major: 7, Minor: 9}}
	})
	if d := vm.Agent.Created["c"].BlockDevices; len(d) != 1 || d[0].Serial != raw.Staged.Serial || d[0].Path != "/dev/xvda" {
		t.Errorf("devices %v", d)
	}
	if _, err := s.container("d", []string{"sleep"}, func(spec *specs.Spec, _ *taskapi.CreateTaskRequest) {
		spec.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/xvda", Type: "b", Major: 7, Minor: 10}}
	}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a placeholder of no volume: %v", err)
	}

	v := s.volumes()
	vm.Agent.Usage[data.Staged.Serial] = &hyperstart.VolumeStatsResponse{
		DeviceBytes: math.MaxUint64, TotalBytes: math.MaxUint64, UsedBytes: math.MaxUint64, AvailableBytes: math.MaxUint64,
		TotalInodes: 100, UsedInodes: 60, AvailableInodes: 60, Abnormal: strings.Repeat("\x1b", 5000),
	}
	got, err := v.Stats(s.ctx(), &volumeapi.StatsRequest{Key: data.Key})
	check(t, err)
	if got.DeviceBytes != diskBytes || got.TotalBytes != diskBytes || got.UsedBytes != diskBytes || got.AvailableBytes != 0 ||
		got.UsedInodes != 60 || got.AvailableInodes != 40 || len(got.Abnormal) > 1024 || strings.Contains(got.Abnormal, "\x1b") || got.Health != volumeapi.Health_GUEST_REPORTS_ERRORS {
		t.Errorf("stats %v", got)
	}
	vm.Agent.Usage[data.Staged.Serial].Abnormal = ""
	vm.Break(data.Staged.Serial, 3)
	for said, want := range map[string]string{"": "3 reads or writes have failed", "read-only": "3 reads or writes have failed; in the VM: read-only"} {
		vm.Agent.Usage[data.Staged.Serial].Abnormal = said
		if got, err = v.Stats(s.ctx(), &volumeapi.StatsRequest{Key: data.Key}); err != nil || got.Abnormal != want || got.Health != volumeapi.Health_DISK_ERRORS {
			t.Errorf("stats of a disk that fails: %v %v", got, err)
		}
	}
	away := data.Staged.Source.File.Path + ".away"
	check(t, os.Rename(data.Staged.Source.File.Path, away))
	if got, err = v.Stats(s.ctx(), &volumeapi.StatsRequest{Key: data.Key}); err != nil || !strings.Contains(got.Abnormal, "gone from the node") || got.Health != volumeapi.Health_BACKING_LOST {
		t.Errorf("stats of a disk that is gone: %v %v", got, err)
	}
	check(t, os.Rename(away, data.Staged.Source.File.Path))
	if _, err := v.Stats(s.ctx(), &volumeapi.StatsRequest{Key: "ff"}); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		t.Errorf("stats of another volume: %v", err)
	}
	if _, err := v.Grow(s.ctx(), &volumeapi.GrowRequest{Key: data.Key, SizeBytes: 2 * diskBytes}); !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
		t.Errorf("grown before its keeper has: %v", err)
	}
	check(t, os.Truncate(data.Staged.Source.File.Path, 2*diskBytes))
	r, err := v.Grow(s.ctx(), &volumeapi.GrowRequest{Key: data.Key, SizeBytes: 2 * diskBytes})
	check(t, err)
	if r.DeviceBytes != 2*diskBytes || vm.Grown(data.Staged.Serial) != 2*diskBytes || vm.Agent.Grown[data.Staged.Serial] != 2*diskBytes {
		t.Errorf("grown to %v, vm %d", r, vm.Grown(data.Staged.Serial))
	}
	// Limits are the record's, whenever they are asked for.
	data.Staged.SizeBytes = 2 * diskBytes
	for _, limits := range []*record.Throttle{{ReadIOPS: 5, BPS: 7}, nil} {
		data.Staged.Throttle = limits
		check(t, n.store.Stage(data.Staged, nil))
		_, err := v.Throttle(s.ctx(), &volumeapi.ThrottleRequest{Key: data.Key})
		check(t, err)
		want := vmm.Throttle{}
		if limits != nil {
			want = vmm.Throttle{ReadIOPS: 5, Bytes: 7}
		}
		if got := vm.Throttled(data.Staged.Serial); got != want {
			t.Errorf("limits %+v, want %+v", got, want)
		}
	}
	if _, err := v.Throttle(s.ctx(), &volumeapi.ThrottleRequest{Key: "ff"}); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		t.Errorf("limits of another volume: %v", err)
	}
	_, err = s.sandbox.StopSandbox(s.ctx(), &sandboxapi.StopSandboxRequest{SandboxID: id})
	check(t, err)
	if _, err := n.store.Shim("uid-1"); !errdefs.IsNotFound(err) {
		t.Errorf("the address is left: %v", err)
	}
	for _, a := range []record.Attachment{data, raw, ro} {
		check(t, errors.Join(n.store.Unpublish(a.Key, "uid-1"), n.store.Unstage(a.Key)))
	}
}

// TestSlowGuest: who asks for statistics is not kept waiting by a guest.
func TestSlowGuest(t *testing.T) {
	s, n := withNode(t, &vmmtest.VMM{})
	a := n.publish("data")
	vm := s.up()
	over := make(chan struct{})
	t.Cleanup(func() { close(over) })
	vm.Agent.Lock()
	vm.Agent.Mutiny = func(_ context.Context, method string) error {
		if method == "VolumeStats" {
			<-over // an answer at the deadline could be the first to be heard
		}
		return nil
	}
	vm.Agent.Unlock()
	if _, err := s.volumes().Stats(s.ctx(), &volumeapi.StatsRequest{Key: a.Key}); !errdefs.IsUnavailable(errgrpc.ToNative(err)) {
		t.Errorf("stats: %v", err)
	}
}

// TestVolumesThatKeepAPodFromStarting: it gets all of its volumes or does not start.
func TestVolumesThatKeepAPodFromStarting(t *testing.T) {
	for name, tc := range map[string]struct {
		spoil func(*node, record.Attachment) error
		is    func(error) bool
	}{
		"in use": {func(n *node, a record.Attachment) error {
			f, err := n.store.Lease(a.Key, true)
			n.t.Cleanup(func() { _ = f.Close() })
			return err
		}, errdefs.IsUnavailable},
		"no disk":    {func(_ *node, a record.Attachment) error { return os.Remove(a.Staged.Source.File.Path) }, errdefs.IsNotFound},
		"empty disk": {func(_ *node, a record.Attachment) error { return os.Truncate(a.Staged.Source.File.Path, 0) }, errdefs.IsDataLoss},
		"odd disk":   {func(_ *node, a record.Attachment) error { return os.Truncate(a.Staged.Source.File.Path, 777) }, errdefs.IsDataLoss},
		"damaged record": {func(n *node, a record.Attachment) error {
			return os.Truncate(filepath.Join(n.store.Root, "volumes", a.Key, "staged.json"), 7)
		}, errdefs.IsDataLoss},
		"a link": {func(_ *node, a record.Attachment) error {
			p := a.Staged.Source.File.Path
			return errors.Join(os.Rename(p, p+"2"), os.Symlink(p+"2", p))
		}, func(err error) bool { return err != nil }},
		"too small": {func(n *node, a record.Attachment) error {
			a.Staged.SizeBytes = 2 * diskBytes
			return n.store.Stage(a.Staged, nil)
		}, errdefs.IsFailedPrecondition},
	} {
		t.Run(name, func(t *testing.T) {
			s, n := withNode(t, &vmmtest.VMM{})
			a := n.publish("data")
			other := n.publish("other")
			check(t, tc.spoil(n, a))
			if err := s.create(); !tc.is(err) {
				t.Fatalf("create: %v", err)
			}
			if len(s.vmm.VMs()) != 0 {
				t.Error("a vm was started")
			}
			f, err := n.store.Lease(other.Key, true)
			check(t, err)
			_ = f.Close()
		})
	}
}

// TestOldGuest: a guest that does not know volumes would start without them.
func TestOldGuest(t *testing.T) {
	v := &vmmtest.VMM{}
	s, n := withNode(t, v)
	n.publish("data")
	v.Features = []string{"other"}
	check(t, s.create())
	if _, err := s.startSandbox(); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "make guest") {
		t.Errorf("start: %v", err)
	}
}
