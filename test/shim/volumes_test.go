package shim

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	volumeapi "github.com/hypernetes/hypernetes/api/volume/v1"
	"github.com/hypernetes/hypernetes/proc"
	shimrecord "github.com/hypernetes/hypernetes/runtime/record"
	"github.com/hypernetes/hypernetes/test/ceph"
	"github.com/hypernetes/hypernetes/volume/record"
)

// node has what outlives a Pod's VM: disks, records and placeholders.
type node struct {
	t              *testing.T
	dir, kubelet   string
	store          record.Store
	fs, raw        record.Attachment
	target, subDir string
}

const (
	diskBytes = 64 << 20
	rawMinor  = 201 // of a loop device that need not be there
)

func newNode(t *testing.T) *node {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("skipped: needs root to mount placeholders")
	}
	dir, err := os.MkdirTemp("/var/tmp", "h8s-shim-test-") // a disk, past whose cache one can write
	check(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	n := &node{t: t, dir: dir, kubelet: filepath.Join(dir, "kubelet"), store: record.Store{Root: filepath.Join(dir, "records")}}
	pod := filepath.Join(n.kubelet, "pods/uid-1")
	n.target, n.subDir = filepath.Join(pod, "volumes/kubernetes.io~csi/pvc-1/mount"), filepath.Join(pod, "volume-subpaths/pvc-1/main/0")
	n.fs = n.publish("fs", func(_ *record.Staged, p *record.Publication) {
		group := uint32(2000)
		p.Target, p.Device, p.Mode, p.FSType, p.FSGroup = n.target, n.placeholder(), record.Filesystem, "ext4", &group
	})
	n.raw = n.publish("raw", func(_ *record.Staged, p *record.Publication) {
		p.Target, p.Device, p.Mode = filepath.Join(dir, "raw-target"), unix.Mkdev(7, rawMinor), record.Block
	})
	return n
}

func (n *node) publish(name string, set func(*record.Staged, *record.Publication)) record.Attachment {
	n.t.Helper()
	path := filepath.Join(n.dir, name+".raw")
	check(n.t, errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, diskBytes)))
	st := record.Staged{
		Version: record.Version, Driver: "test", Volume: name, Serial: record.Serial("test", name), SizeBytes: diskBytes,
		Format: record.FormatBlank, Source: record.Source{File: &record.File{Path: path}},
	}
	p := record.Publication{Version: record.Version, PodUID: "uid-1"}
	set(&st, &p)
	a := record.Attachment{Key: st.Key(), Staged: st, Publication: p}
	check(n.t, errors.Join(n.store.Stage(st, nil), n.store.Publish(a.Key, p)))
	return a
}

// placeholder mounts it where the kubelet expects the volume, and a subPath of it.
func (n *node) placeholder() uint64 {
	n.t.Helper()
	key := record.Key("test", "fs")
	check(n.t, errors.Join(os.MkdirAll(n.target, 0o755), os.MkdirAll(n.subDir, 0o755)))
	check(n.t, unix.Mount(record.PlaceholderSource+key, n.target, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "size=64k,nr_inodes=256,mode=0755"))
	n.t.Cleanup(func() { _ = unix.Unmount(n.target, unix.MNT_DETACH) })
	check(n.t, os.MkdirAll(filepath.Join(n.target, "sub/dir"), 0o755))
	check(n.t, unix.Mount(filepath.Join(n.target, "sub/dir"), n.subDir, "", unix.MS_BIND, ""))
	n.t.Cleanup(func() { _ = unix.Unmount(n.subDir, unix.MNT_DETACH) })
	var st unix.Stat_t
	check(n.t, unix.Lstat(n.target, &st))
	return st.Dev
}

func (n *node) start(programs ...string) *shim {
	n.t.Helper()
	return start(n.t, func(s *shim) { s.kubelet, s.volumeRoot, s.programs = n.kubelet, n.store.Root, programs })
}

// mounted gives a container both volumes.
func (n *node) mounted(spec *specs.Spec) {
	major, minor := int64(7), int64(rawMinor)
	mode := os.FileMode(0o660)
	spec.Mounts = append(spec.Mounts,
		specs.Mount{Destination: "/data", Type: "bind", Source: n.target, Options: []string{"rbind", "rprivate", "rw"}},
		specs.Mount{Destination: "/part", Type: "bind", Source: n.subDir, Options: []string{"rbind", "rprivate", "rw"}})
	spec.Linux.Devices = append(spec.Linux.Devices, specs.LinuxDevice{Path: "/dev/xvda", Type: "b", Major: major, Minor: minor, FileMode: &mode})
	spec.Linux.Resources = &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}, {Allow: true, Type: "b", Major: &major, Minor: &minor, Access: "rwm"}}}
}

func (n *node) unpublish() error {
	var errs []error
	for _, a := range []record.Attachment{n.fs, n.raw} {
		if err := n.store.Unpublish(a.Key, "uid-1"); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// TestVolumesOutliveTheirVM: a Pod writes, its VM is killed, and the next one of the same
// Pod has everything; meanwhile the volumes are nobody else's.
func TestVolumesOutliveTheirVM(t *testing.T) {
	n := newNode(t)
	first := n.start()
	pid := first.up()
	code, out := first.sh("writer", `echo one >/data/f && echo two >/part/g && ls -ln /data/sub/dir/g | { read m l u g rest; echo $g; } &&
		echo raw | dd of=/dev/xvda bs=512 conv=sync,fsync 2>/dev/null && /usr/bin/busybox sync`, n.mounted).end()
	if code != 0 || out != "2000\n" {
		t.Fatalf("exit code %d, output %q", code, out)
	}
	for _, f := range []string{"f", "sub/dir/g"} {
		if _, err := os.Lstat(filepath.Join(n.target, f)); err == nil {
			t.Errorf("%s is on the node", f)
		}
	}
	if err := n.unpublish(); !errdefs.IsUnavailable(err) {
		t.Errorf("unpublished under the vm: %v", err)
	}
	stats, err := first.volumes.Stats(first.ctx(), &volumeapi.StatsRequest{Key: n.fs.Key})
	check(t, err)
	if stats.DeviceBytes != diskBytes || stats.TotalBytes < diskBytes/2 || stats.UsedBytes+stats.AvailableBytes > stats.TotalBytes || stats.UsedInodes < 11 {
		t.Errorf("stats %v", stats)
	}
	for _, a := range []record.Attachment{n.fs, n.raw} {
		check(t, os.Truncate(a.Staged.Source.File.Path, 2*diskBytes))
		g, err := first.volumes.Grow(first.ctx(), &volumeapi.GrowRequest{Key: a.Key, SizeBytes: 2 * diskBytes})
		check(t, err)
		if g.DeviceBytes != 2*diskBytes {
			t.Errorf("grown to %v", g)
		}
	}
	grown, err := first.volumes.Stats(first.ctx(), &volumeapi.StatsRequest{Key: n.fs.Key})
	check(t, err)
	if grown.TotalBytes < stats.TotalBytes*3/2 {
		t.Errorf("the file system has %d bytes, had %d", grown.TotalBytes, stats.TotalBytes)
	}
	other := n.start()
	if err := other.create(); !errdefs.IsUnavailable(err) {
		t.Errorf("a second vm of the pod: %v", err)
	}
	check(t, unix.Kill(pid, unix.SIGKILL))
	_, err = first.sandbox.WaitSandbox(first.ctx(), &sandboxapi.WaitSandboxRequest{SandboxID: first.id})
	check(t, err)

	second := n.start()
	second.up()
	code, out = second.sh("reader", "cat /data/f /part/g && dd if=/dev/xvda bs=4 count=1 2>/dev/null && echo more >>/data/f", n.mounted).end()
	if code != 0 || out != "one\ntwo\nraw\n" {
		t.Errorf("exit code %d, output %q", code, out)
	}
	_, err = second.sandbox.StopSandbox(second.ctx(), &sandboxapi.StopSandboxRequest{SandboxID: second.id})
	check(t, err)
	// At once: stopping has waited for the VM's end.
	check(t, errors.Join(n.unpublish(), n.store.Unstage(n.fs.Key), n.store.Unstage(n.raw.Key)))
}

// TestShimKilledWithVolumes: they are free when its VM is gone, which is at once.
func TestShimKilledWithVolumes(t *testing.T) {
	n := newNode(t)
	s := n.start()
	s.up()
	if err := n.unpublish(); !errdefs.IsUnavailable(err) {
		t.Errorf("unpublished under the vm: %v", err)
	}
	r, err := s.task.Connect(s.ctx(), &taskapi.ConnectRequest{ID: s.id})
	check(t, err)
	id, err := proc.Find(int(r.ShimPid))
	check(t, err)
	check(t, id.Kill(s.ctx(), patience)) // dead, not dying: delete is harmless to what lives
	s.run(nil, "delete", "-bundle", s.bundle)
	check(t, errors.Join(n.unpublish(), n.store.Unstage(n.fs.Key), n.store.Unstage(n.raw.Key)))
	if _, err := n.store.Shim("uid-1"); !errdefs.IsNotFound(err) {
		t.Errorf("the shim's address is left: %v", err)
	}
	s.forgetUsers()
}

// TestVolumeOfCeph: the Pod's VM has an image of a cluster through its storage daemon; it
// grows, and a daemon that ends takes the VM along.
func TestVolumeOfCeph(t *testing.T) {
	if testing.Short() {
		t.Skip("skipped: -short, and starting Ceph takes 10 s")
	}
	c := ceph.Start(t)
	c.RBD("create", "--size", "64", "volumes/one")
	n := newNode(t)
	st := n.fs.Staged
	st.Source = record.Source{RBD: &record.RBD{Pool: "volumes", Image: "one", Monitors: []string{c.Monitor}, User: "cinder"}}
	check(t, n.store.Stage(st, map[string][]byte{record.SecretKey: []byte(c.Key())}))
	s := n.start()
	s.up()
	code, out := s.sh("writer", "echo one >/data/f && /usr/bin/busybox sync && cat /data/f", n.mounted).end()
	if code != 0 || out != "one\n" {
		t.Fatalf("exit code %d, output %q", code, out)
	}
	c.RBD("resize", "--size", "128", "volumes/one")
	g, err := s.volumes.Grow(s.ctx(), &volumeapi.GrowRequest{Key: n.fs.Key, SizeBytes: 128 << 20})
	check(t, err)
	stats, err := s.volumes.Stats(s.ctx(), &volumeapi.StatsRequest{Key: n.fs.Key})
	check(t, err)
	if g.DeviceBytes != 128<<20 || stats.DeviceBytes != 128<<20 || stats.TotalBytes < 96<<20 {
		t.Errorf("grown to %v, stats %v", g, stats)
	}
	check(t, unix.Kill(s.storageDaemon(), unix.SIGKILL))
	_, err = s.sandbox.WaitSandbox(s.ctx(), &sandboxapi.WaitSandboxRequest{SandboxID: s.id})
	check(t, err)

	second := n.start()
	second.up()
	code, out = second.sh("reader", "cat /data/f", n.mounted).end()
	if code != 0 || out != "one\n" {
		t.Errorf("exit code %d, output %q", code, out)
	}
	_, err = second.sandbox.StopSandbox(second.ctx(), &sandboxapi.StopSandboxRequest{SandboxID: second.id})
	check(t, err)
	check(t, errors.Join(n.unpublish(), n.store.Unstage(n.fs.Key)))
	if left := c.Watchers("one"); len(left) > 0 {
		t.Errorf("who had the image open is still known: %v", left)
	}
}

// TestVolumeOutOfReach: a Pod whose volume cannot be opened does not start, says why and
// leaves nothing.
func TestVolumeOutOfReach(t *testing.T) {
	n := newNode(t)
	st := n.fs.Staged
	st.Source = record.Source{RBD: &record.RBD{Pool: "volumes", Image: "one", Monitors: []string{"127.0.0.1:1"}}}
	check(t, n.store.Stage(st, nil))
	s := n.start()
	if err := s.create(); err == nil || !strings.Contains(err.Error(), "127.0.0.1:1") {
		t.Errorf("create: %v", err)
	}
	check(t, errors.Join(n.unpublish(), n.store.Unstage(n.fs.Key), n.store.Unstage(n.raw.Key)))
}

// storageDaemon is the pid of the Pod's.
func (s *shim) storageDaemon() int {
	s.t.Helper()
	r, err := shimrecord.Load(s.state(), "k8s.io", s.id)
	check(s.t, err)
	if !r.Storage.Alive() {
		s.t.Fatal("no storage daemon runs")
	}
	return r.Storage.PID
}

// TestVolumeHealth: what is known against a volume is told: its writes fail, its file was
// cut, or is gone.
func TestVolumeHealth(t *testing.T) {
	n := newNode(t)
	// A file system that is too small for its volume.
	small := filepath.Join(n.dir, "small")
	check(t, os.Mkdir(small, 0o700))
	check(t, unix.Mount("small", small, "tmpfs", 0, "size=12m"))
	t.Cleanup(func() { _ = unix.Unmount(small, unix.MNT_DETACH) })
	path := filepath.Join(small, "disk.raw")
	check(t, errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, diskBytes)))
	n.fs.Staged.Source.File.Path = path
	check(t, n.store.Stage(n.fs.Staged, nil))
	s := n.start()
	s.up()
	health := func() *volumeapi.StatsResponse {
		t.Helper()
		st, err := s.volumes.Stats(s.ctx(), &volumeapi.StatsRequest{Key: n.fs.Key})
		check(t, err)
		return st
	}
	if st := health(); st.Health != volumeapi.Health_HEALTHY || st.Abnormal != "" {
		t.Errorf("at first: %v", st)
	}
	_, out := s.sh("writer", "dd if=/dev/urandom of=/data/f bs=1048576 count=32 conv=fsync 2>&1; true", n.mounted).end()
	if st := health(); st.Health != volumeapi.Health_DISK_ERRORS || !strings.Contains(st.Abnormal, "have failed") {
		t.Errorf("after writes that failed: %v; writer: %s", st, out)
	}
	check(t, os.Truncate(path, diskBytes/2))
	if st := health(); st.Health != volumeapi.Health_BACKING_LOST || !strings.Contains(st.Abnormal, "was cut") || st.TotalBytes > diskBytes/2 {
		t.Errorf("after the file was cut: %v", st)
	}
	check(t, os.Remove(path))
	if st := health(); st.Health != volumeapi.Health_BACKING_LOST || !strings.Contains(st.Abnormal, "gone from the node") {
		t.Errorf("after the file was removed: %v", st)
	}
}

// TestPlaceholderOfNoVolume: a container never gets what stands for a volume.
func TestPlaceholderOfNoVolume(t *testing.T) {
	n := newNode(t)
	check(t, n.unpublish())
	s := n.start()
	s.up()
	if _, err := s.container("c", "true", n.mounted); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("create: %v", err)
	}
}
