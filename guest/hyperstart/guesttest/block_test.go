package guesttest

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
)

const mib = 1 << 20

// rawDisk is a raw disk image, sparse; prepare runs programs on it.
func rawDisk(t *testing.T, size int64, prepare ...string) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "disk.raw")
	check(t, os.WriteFile(p, nil, 0o600))
	check(t, os.Truncate(p, size))
	for _, line := range prepare {
		command(t, "sh", "-c", strings.ReplaceAll(line, "$DISK", p))
	}
	return p
}

func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return string(out)
}

func sum(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	check(t, err)
	defer f.Close()
	h := sha256.New()
	_, err = io.Copy(h, f)
	check(t, err)
	return fmt.Sprintf("%x", h.Sum(nil))
}

func blockVolume(name, serial string) *hyperstart.Volume {
	return &hyperstart.Volume{Name: name, Kind: &hyperstart.Volume_Block{Block: &hyperstart.BlockVolume{Serial: serial, FsType: "ext4", MayFormat: true}}}
}

func mountAt(source, at string) func(*specs.Spec) {
	return func(s *specs.Spec) {
		s.Mounts = append(s.Mounts, specs.Mount{Destination: at, Source: "/run/h8s/volumes/" + source, Type: "bind", Options: []string{"rbind", "rprivate", "rw"}})
	}
}

func all(changes ...func(*specs.Spec)) func(*specs.Spec) {
	return func(s *specs.Spec) {
		for _, c := range changes {
			c(s)
		}
	}
}

// TestBlockVolumes has one VM with a disk of each sort.
func TestBlockVolumes(t *testing.T) {
	need(t, "/usr/sbin/mkfs.ext4", "/usr/sbin/debugfs")
	vol := rawDisk(t, 200*mib)
	raw := rawDisk(t, 64*mib)
	ro := rawDisk(t, 64*mib, "mkfs.ext4 -q $DISK", "echo before > $DISK.f; debugfs -w -R \"write $DISK.f f\" $DISK 2>/dev/null")
	foreign := map[string]disk{
		"unreadable": {path: rawDisk(t, 64*mib), badSector: 20000},
		"tail":       {path: rawDisk(t, 64*mib), badSector: 64*mib/512 - 1},
		"lvm":        {path: rawDisk(t, 64*mib, "printf LABELONE | dd of=$DISK bs=1 seek=512 conv=notrunc 2>/dev/null")},
		"backups":    {path: rawDisk(t, 200*mib, "mkfs.ext4 -q $DISK", "dd if=/dev/zero of=$DISK bs=1M count=16 conv=notrunc 2>/dev/null")},
	}
	if _, err := exec.LookPath("mkfs.xfs"); err == nil {
		foreign["xfs"] = disk{path: rawDisk(t, 300*mib, "mkfs.xfs -q $DISK")}
	}
	xfs := rawDisk(t, 320*mib)
	disks := []disk{{serial: "vol", path: vol}, {serial: "raw", path: raw}, {serial: "ro", path: ro, readOnly: true}, {serial: "newxfs", path: xfs}}
	sums := map[string]string{}
	for name, d := range foreign {
		d.serial = name
		disks = append(disks, d)
		sums[name] = sum(t, d.path)
	}
	g := newGuest(t, disks...)
	hello, err := g.sbxC.Hello(g.ctx(), &hyperstart.HelloRequest{ProtocolMinor: 1})
	check(t, err)
	contains(t, strings.Join(hello.Features, "\n"), "block-volumes")

	v := blockVolume("data", "vol")
	v.GetBlock().FsGroup = proto.Uint32(2000)
	v.GetBlock().Directories = []string{"sub/deep"}
	v.GetBlock().Options = []string{"noexec", "nosuid", "commit=30"}
	begin := time.Now()
	first := g.sh("first", `exec 2>&1; echo kept > /data/f; stat -c '%g %a' /data /sub; echo sub > /sub/s; cat /data/sub/deep/s; touch /data/.x; ln -s / /data/evil; sync; cat /ro/f; echo x > /ro/x; grep ' /data ' /proc/mounts; grep ' /sub ' /proc/mounts; echo end`, 0,
		all(mountAt("data", "/data"), mountAt("data/sub/deep", "/sub"), mountAt("ro", "/ro")),
		&hyperstart.CreateRequest{Volumes: []*hyperstart.Volume{v, {Name: "ro", Kind: &hyperstart.Volume_Block{Block: &hyperstart.BlockVolume{
			Serial: "ro", FsType: "ext4", ReadOnly: true}}}}})
	t.Logf("formatted, mounted and used after %v", time.Since(begin).Round(time.Millisecond))
	contains(t, first, "2000 2775\n2000 2775\n", "sub\n", "before\n", "Read-only file system", "end\n",
		" /data ext4 rw,nosuid,noexec,relatime,errors=remount-ro,commit=30 ", " /sub ext4 rw,nosuid,noexec,relatime,")

	// Another container of the Pod has it too, a file of it by subPath; links lead nowhere.
	g.sleeper("long", func(in *hyperstart.CreateRequest) {
		in.Volumes = []*hyperstart.Volume{v}
		in.Spec = runtimeSpec(t, all(mountAt("data", "/data"), mountAt("data/f", "/file")), "sh", "-c", "trap 'exit 0' TERM; echo ready; sleep 1000 & wait")
	})
	contains(t, g.exec("long", "c", 0, false, "sh", "-c", "cat /file /data/sub/deep/s"), "kept\nsub\n")
	_, err = g.ctrs.Create(g.ctx(), &hyperstart.CreateRequest{ContainerId: "evil", Volumes: []*hyperstart.Volume{v},
		Spec: runtimeSpec(t, mountAt("data/evil/etc", "/out"), "true"), Rootfs: &hyperstart.RootFS{LayerSerials: []string{"layer0"}}})
	if err = errgrpc.ToNative(err); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "leads out of the volume") {
		t.Errorf("a link out of the volume: %v", err)
	}

	g.testForeign(foreign, sums)
	g.testRaw()
	hasXFS := slices.Contains(hello.Features, "xfs")
	g.testXFS(hasXFS)

	st, err := g.sbxC.VolumeStats(g.ctx(), &hyperstart.VolumeStatsRequest{Serial: "vol"})
	check(t, err)
	t.Logf("stats: %v", st)
	if st.DeviceBytes != 200*mib || st.TotalBytes < 150*mib || st.TotalBytes > 200*mib || st.UsedBytes+st.AvailableBytes > st.TotalBytes || st.Abnormal != "" {
		t.Errorf("stats: %v", st)
	}
	check(t, g.qmp.run("block_resize", map[string]any{"node-name": "d2", "size": 300 * mib}))
	begin = time.Now()
	grown, err := g.sbxC.GrowVolume(g.ctx(), &hyperstart.GrowVolumeRequest{Serial: "vol", SizeBytes: 300 * mib})
	check(t, err)
	t.Logf("grown in %v: %v", time.Since(begin).Round(time.Millisecond), grown)
	if grown.DeviceBytes != 300*mib || grown.TotalBytes < 240*mib {
		t.Errorf("grown: %v", grown)
	}
	check(t, g.qmp.run("block_resize", map[string]any{"node-name": "d3", "size": 96 * mib}))
	if grown, err = g.sbxC.GrowVolume(g.ctx(), &hyperstart.GrowVolumeRequest{Serial: "raw", SizeBytes: 96 * mib}); err != nil || grown.DeviceBytes != 96*mib {
		t.Errorf("grown raw: %v %v", grown, err)
	}
	contains(t, g.exec("long", "w", 0, false, "sh", "-c", "dd if=/dev/zero of=/data/big bs=1M count=210 2>&1 && stat -c %s /data/big"), "220200960")
	g.exec("long", "d", 0, false, "sh", "-c", "echo last > /data/last") // not synced: Shutdown's to do
	g.shutdown()
	if c := g.console.String(); strings.Contains(c, "not unmounted cleanly") {
		t.Errorf("console:\n%s", c)
	}

	command(t, "e2fsck", "-fn", vol)
	contains(t, command(t, "dumpe2fs", "-h", vol), "Filesystem state:         clean\n")
	contains(t, command(t, "debugfs", "-R", "cat last", vol), "last\n")
	if hasXFS {
		command(t, "xfs_repair", "-n", xfs)
	}
	contains(t, command(t, "dd", "if="+raw, "bs=1", "count=9", "status=none"), "raw data\n")
	for name, d := range foreign {
		if sum(t, d.path) != sums[name] {
			t.Errorf("disk %s has changed", name)
		}
	}

	// Power cut: what was synced is there at the next start, which grows at mount.
	check(t, os.Truncate(vol, 400*mib))
	g = newGuest(t, disk{serial: "vol", path: vol})
	g.sleeper("cut", func(in *hyperstart.CreateRequest) {
		in.Volumes = []*hyperstart.Volume{blockVolume("v", "vol")}
		in.Spec = runtimeSpec(t, mountAt("v", "/v"), "sh", "-c", "echo synced > /v/synced; sync; echo ready; while :; do echo x >> /v/more; done")
	})
	if st, err = g.sbxC.VolumeStats(g.ctx(), &hyperstart.VolumeStatsRequest{Serial: "vol"}); err != nil || st.TotalBytes < 340*mib {
		t.Errorf("grown at mount: %v %v", st, err)
	}
	check(t, g.cmd.Process.Kill())
	<-g.exited
	g = newGuest(t, disk{serial: "vol", path: vol})
	contains(t, g.sh("again", "cat /v/f /v/last /v/synced", 0, mountAt("v", "/v"), &hyperstart.CreateRequest{Volumes: []*hyperstart.Volume{blockVolume("v", "vol")}}),
		"kept\nlast\nsynced\n")
	g.testHealth()
	g.shutdown()
	g = newGuest(t, disk{serial: "vol", path: vol})
	contains(t, g.sh("repaired", "cat /v/f && echo new > /v/new", 0, mountAt("v", "/v"), &hyperstart.CreateRequest{Volumes: []*hyperstart.Volume{blockVolume("v", "vol")}}), "kept\n")
	if st, err = g.sbxC.VolumeStats(g.ctx(), &hyperstart.VolumeStatsRequest{Serial: "vol"}); err != nil || st.Abnormal != "" {
		t.Errorf("repaired: %v %v", st, err)
	}
	g.shutdown()
	command(t, "e2fsck", "-fn", vol)
}

// testForeign asks for file systems on disks that must not be formatted.
func (g *guest) testForeign(disks map[string]disk, sums map[string]string) {
	for name := range disks {
		_, err := g.ctrs.Create(g.ctx(), &hyperstart.CreateRequest{ContainerId: "f-" + name, Volumes: []*hyperstart.Volume{blockVolume("f-"+name, name)},
			Spec: runtimeSpec(g.t, mountAt("f-"+name, "/v"), "true"), Rootfs: &hyperstart.RootFS{LayerSerials: []string{"layer0"}}})
		want := map[string]string{"unreadable": "cannot be read", "tail": "cannot be read", "lvm": "an LVM physical volume", "backups": "holds data", "xfs": "holds xfs"}[name]
		if err == nil || !strings.Contains(err.Error(), want) {
			g.t.Errorf("disk %s: %v, want %q", name, err, want)
		}
		g.t.Logf("%s: %v", name, err)
	}
}

// testHealth has the kernel find an error in the file system.
func (g *guest) testHealth() {
	writable := func(s *specs.Spec) {
		for i := range s.Mounts {
			if s.Mounts[i].Destination == "/sys" {
				s.Mounts[i].Options = []string{"nosuid", "noexec", "nodev"}
			}
		}
		c := s.Process.Capabilities
		c.Bounding = append(c.Bounding, "CAP_SYS_ADMIN")
		c.Effective, c.Permitted = c.Bounding, c.Bounding
	}
	// Scratch, too: disks' names have no order. It goes on after errors.
	g.sh("error", "exec 2>&1; for f in /sys/fs/ext4/sd*/trigger_fs_error; do echo test > $f; done; echo x > /v/x && exit 1; exit 0", 0,
		all(mountAt("v", "/v"), writable), &hyperstart.CreateRequest{Volumes: []*hyperstart.Volume{blockVolume("v", "vol")}})
	st, err := g.sbxC.VolumeStats(g.ctx(), &hyperstart.VolumeStatsRequest{Serial: "vol"})
	if err != nil || !strings.Contains(st.Abnormal, "read-only after ") {
		g.t.Errorf("after an error: %v %v", st, err)
	}
}

// testXFS makes and grows xfs, or is told why it cannot.
func (g *guest) testXFS(has bool) {
	v := blockVolume("x", "newxfs")
	v.GetBlock().FsType = "xfs"
	in := &hyperstart.CreateRequest{Volumes: []*hyperstart.Volume{v}}
	if !has {
		in.ContainerId, in.Spec, in.Rootfs = "xfs", runtimeSpec(g.t, nil, "true"), &hyperstart.RootFS{LayerSerials: []string{"layer0"}}
		if _, err := g.ctrs.Create(g.ctx(), in); !errdefs.IsNotImplemented(errgrpc.ToNative(err)) || !strings.Contains(err.Error(), "cannot make xfs") {
			g.t.Errorf("xfs: %v", err)
		}
		return
	}
	contains(g.t, g.sh("xfs", "mount | grep /x; echo x > /x/f; cat /x/f", 0, mountAt("x", "/x"), in), "type xfs", "x\n")
	check(g.t, g.qmp.run("block_resize", map[string]any{"node-name": "d5", "size": 512 * mib}))
	grown, err := g.sbxC.GrowVolume(g.ctx(), &hyperstart.GrowVolumeRequest{Serial: "newxfs", SizeBytes: 512 * mib})
	if err != nil || grown.TotalBytes < 420*mib {
		g.t.Errorf("grown xfs: %v %v", grown, err)
	}
}

// testRaw gives a disk to containers as a device.
func (g *guest) testRaw() {
	uid, mode := uint32(33), os.FileMode(0o666)
	seven, zero := int64(7), int64(0)
	placeholder := func(s *specs.Spec) { // as containerd makes it of the node's loop device
		s.Linux.Devices = append(s.Linux.Devices, specs.LinuxDevice{Path: "/dev/data", Type: "b", Major: 7, Minor: 0, FileMode: &mode, UID: &uid})
		s.Linux.Resources.Devices = []specs.LinuxDeviceCgroup{{Access: "rwm"}, {Allow: true, Type: "b", Major: &seven, Minor: &zero, Access: "rwm"}}
		s.Process.Capabilities.Bounding = append(s.Process.Capabilities.Bounding, "CAP_MKNOD")
		s.Process.Capabilities.Effective, s.Process.Capabilities.Permitted = s.Process.Capabilities.Bounding, s.Process.Capabilities.Bounding
	}
	text := g.sh("raw", `exec 2>&1; stat -c '%F %u %a' /dev/data; echo raw data | dd of=/dev/data conv=notrunc 2>&1; sync; dd if=/dev/data bs=9 count=1 2>/dev/null
mknod /dev/loop b 7 0; dd if=/dev/loop of=/dev/null bs=512 count=1; echo loop=$?; blockdev --getsize64 /dev/data`, 0, placeholder,
		&hyperstart.CreateRequest{BlockDevices: []*hyperstart.BlockDevice{{Path: "/dev/data", Serial: "raw"}}})
	contains(g.t, text, "block special file 33 666\n", "raw data\n", "Operation not permitted", "loop=1\n", "67108864\n")
	text = g.sh("raw-ro", "exec 2>&1; dd if=/dev/data bs=9 count=1 2>/dev/null; echo x > /dev/data; echo write=$?", 0, placeholder,
		&hyperstart.CreateRequest{BlockDevices: []*hyperstart.BlockDevice{{Path: "/dev/data", Serial: "raw", ReadOnly: true}}})
	contains(g.t, text, "raw data\n", "Operation not permitted", "write=1\n")
	// An update brings the spec's rules again, with the host's numbers.
	g.sleeper("raw-long", func(in *hyperstart.CreateRequest) {
		in.BlockDevices = []*hyperstart.BlockDevice{{Path: "/dev/data", Serial: "raw"}}
		in.Spec = runtimeSpec(g.t, placeholder, "sh", "-c", "trap 'exit 0' TERM; echo ready; sleep 1000 & wait")
	})
	limit := int64(32 << 20)
	update, err := json.Marshal(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit},
		Devices: []specs.LinuxDeviceCgroup{{Access: "rwm"}, {Allow: true, Type: "b", Major: &seven, Minor: &zero, Access: "rwm"}}})
	check(g.t, err)
	_, err = g.ctrs.Update(g.ctx(), &hyperstart.UpdateRequest{ContainerId: "raw-long", Resources: update})
	check(g.t, err)
	contains(g.t, g.exec("raw-long", "r", 0, false, "dd", "if=/dev/data", "bs=9", "count=1"), "raw data\n")
	g.signal("raw-long", 15, false)
	g.exit("raw-long", "", 0)
	g.delete("raw-long", "", 0)
	text = g.sh("none", "ls /dev/data", 1, nil, nil)
	contains(g.t, text, "No such file")
	st, err := g.sbxC.VolumeStats(context.Background(), &hyperstart.VolumeStatsRequest{Serial: "raw"})
	if err != nil || st.DeviceBytes != 64*mib || st.TotalBytes != 0 {
		g.t.Errorf("raw stats: %v %v", st, err)
	}
}
