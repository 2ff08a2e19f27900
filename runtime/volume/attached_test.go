package volume

import (
	"path/filepath"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/mountinfo"
	"github.com/hypernetes/hypernetes/volume/record"
)

const attachedKey = "00112233445566778899aabbccddeeff"

func attached(device uint64) record.Attachment {
	group := uint32(2000)
	return record.Attachment{
		Key:         attachedKey,
		Staged:      record.Staged{Serial: "v1", Format: record.FormatBlank},
		Publication: record.Publication{Mode: record.Filesystem, FSType: "ext4", Device: device, Options: []string{"noatime"}, FSGroup: &group},
	}
}

// TestAttached uses real mounts as the node plugin and the kubelet make them.
func TestAttached(t *testing.T) {
	p, dir := newPod(t)
	target := mkdir(t, filepath.Join(dir, "volumes/kubernetes.io~csi/pvc-1/mount"))
	mount(t, record.PlaceholderSource+attachedKey, target, "tmpfs", 0, "size=64k")
	var st unix.Stat_t
	if err := unix.Lstat(target, &st); err != nil {
		t.Fatal(err)
	}
	p.Resolvers = []Resolver{Attached{attached(st.Dev)}}
	d := planOne(t, p, bind(target, "/data"))
	v := d.Volume.GetBlock()
	name := "disk." + attachedKey
	if d.GuestSource != GuestRoot+"/"+name || v.GetSerial() != "v1" || v.FsType != "ext4" || !v.MayFormat || v.ReadOnly || v.GetFsGroup() != 2000 || len(v.Directories) != 0 {
		t.Errorf("%+v %v", d, v)
	}
	mkdir(t, filepath.Join(target, "a b/c"))
	for i, sub := range []string{"a b", "a b/c"} {
		at := mkdir(t, filepath.Join(dir, "volume-subpaths/pvc-1/main", string(rune('0'+i))))
		mount(t, filepath.Join(target, sub), at, "", unix.MS_BIND, "")
		if d := planOne(t, p, bind(at, "/sub")); d.GuestSource != GuestRoot+"/"+name+"/"+sub || !slices.Equal(d.Volume.GetBlock().Directories, []string{sub}) {
			t.Errorf("subPath %s: %+v", sub, d)
		}
	}
	pl, err := p.Plan(t.Context(), []specs.Mount{bind(target, "/data"), bind(filepath.Join(dir, "volume-subpaths/pvc-1/main/0"), "/sub")})
	if err != nil {
		t.Fatal(err)
	}
	if volumes, _ := pl.Requests(); len(volumes) != 1 || !slices.Equal(volumes[0].GetBlock().Directories, []string{"a b"}) {
		t.Errorf("requests %v", volumes)
	}
	ro := attached(st.Dev)
	ro.Publication.ReadOnly = true
	if v := Guest(ro).GetBlock(); !v.ReadOnly || v.MayFormat {
		t.Errorf("read-only: %v", v)
	}
}

// TestAttachedFailsClosed: a placeholder is never what a container gets.
func TestAttachedFailsClosed(t *testing.T) {
	const src = "/var/lib/kubelet/pods/u/volumes/kubernetes.io~csi/pvc-1/mount"
	line := func(dev, root, source string) []mountinfo.Mount {
		return mountinfo.Parse("94 27 " + dev + " " + root + " " + src + " rw,nosuid - tmpfs " + source + " rw,size=64k\n")
	}
	good := record.PlaceholderSource + attachedKey
	a := Attached{attached(unix.Mkdev(0, 46))}
	if d, err := a.resolve(line("0:46", "/", good), src, true); err != nil || d == nil {
		t.Fatalf("%v %v", d, err)
	}
	block := attached(unix.Mkdev(0, 46))
	block.Publication.Mode = record.Block
	for name, tc := range map[string]struct {
		a      Attached
		mounts []mountinfo.Mount
	}{
		"not mounted":     {a, nil},
		"no record":       {nil, line("0:46", "/", good)},
		"another record":  {Attached{block}, line("0:46", "/", good)},
		"another volume":  {a, line("0:46", "/", record.PlaceholderSource+"ff")},
		"another device":  {a, line("0:47", "/", good)},
		"deleted":         {a, line("0:46", "/x//deleted", good)},
		"part of a whole": {a, line("0:46", "/x", good)},
	} {
		if d, err := tc.a.resolve(tc.mounts, src, true); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s: %v, %v", name, d, err)
		}
	}
	if d, err := a.resolve(line("0:46", "/", "tmpfs"), src, true); d != nil || err != nil {
		t.Errorf("another driver's: %v, %v", d, err)
	}
	// Whoever resolves it or not, Plan refuses it.
	p, dir := newPod(t)
	p.Resolvers = []Resolver{a}
	if _, err := p.Plan(t.Context(), []specs.Mount{bind(mkdir(t, filepath.Join(dir, "volumes/kubernetes.io~csi/pvc-1/mount")), "/x")}); err == nil {
		t.Error("an empty directory of the host passes for a volume")
	}
}

func TestAttachedDevices(t *testing.T) {
	number := func(n int64) *int64 { return &n }
	a := attached(unix.Mkdev(7, 3))
	a.Publication.Mode = record.Block
	spec := &specs.Spec{Linux: &specs.Linux{Devices: []specs.LinuxDevice{
		{Path: "/dev/null", Type: "c", Major: 1, Minor: 3}, {Path: "/dev/xvda", Type: "b", Major: 7, Minor: 3}, {Path: "/dev/loop0", Type: "b", Major: 7, Minor: 0},
	}}}
	got, err := Attached{a}.Devices(spec)
	if err != nil || len(got) != 1 || got[0].Path != "/dev/xvda" || got[0].Serial != "v1" || got[0].ReadOnly {
		t.Fatalf("%v %v", got, err)
	}
	spec.Linux.Resources = &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Access: "rwm"}, {Allow: true, Type: "b", Major: number(7), Minor: number(3), Access: "rm"}}}
	if got, err = (Attached{a}).Devices(spec); err != nil || !got[0].ReadOnly {
		t.Errorf("%v %v", got, err)
	}
	if got, err := (Attached{}).Devices(spec); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a placeholder passes for a volume: %v %v", got, err)
	}
}
