package volume

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
)

// newPod makes a kubelet root with one Pod's directory.
func newPod(t *testing.T) (Pod, string) {
	t.Helper()
	root := t.TempDir()
	dir := filepath.Join(root, "pods", "0a1b-2c")
	mkdir(t, dir)
	return Pod{KubeletRoot: root, UID: "0a1b-2c"}, dir
}

func mkdir(t *testing.T, p string) string {
	t.Helper()
	if err := os.MkdirAll(p, 0o755); err != nil {
		t.Fatal(err)
	}
	return p
}

func write(t *testing.T, p, data string, mode os.FileMode) {
	t.Helper()
	mkdir(t, filepath.Dir(p))
	if err := os.WriteFile(p, []byte(data), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(p, mode); err != nil {
		t.Fatal(err)
	}
}

// publish imitates the kubelet's AtomicWriter.
func publish(t *testing.T, dir, version string, files map[string]string) {
	t.Helper()
	old, _ := os.Readlink(filepath.Join(dir, dataLink))
	for name, data := range files {
		write(t, filepath.Join(dir, version, name), data, 0o640)
	}
	mkdir(t, filepath.Join(dir, version))
	tmp := filepath.Join(dir, "..data_tmp")
	if err := os.Symlink(version, tmp); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(tmp, filepath.Join(dir, dataLink)); err != nil {
		t.Fatal(err)
	}
	for name := range files {
		first, _, _ := strings.Cut(name, "/")
		_ = os.Symlink(dataLink+"/"+first, filepath.Join(dir, first))
	}
	if old != "" {
		if err := os.RemoveAll(filepath.Join(dir, old)); err != nil {
			t.Fatal(err)
		}
	}
}

func mount(t *testing.T, source, target, fs string, flags uintptr, data string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	if err := unix.Mount(source, target, fs, flags, data); err != nil {
		t.Fatalf("mount %s: %v", target, err)
	}
	t.Cleanup(func() { _ = unix.Unmount(target, unix.MNT_DETACH) })
}

func bind(source, destination string) specs.Mount {
	return specs.Mount{Type: "bind", Source: source, Destination: destination, Options: []string{"rbind", "rprivate", "ro"}}
}

func planOne(t *testing.T, p Pod, m specs.Mount) Decision {
	t.Helper()
	pl, err := p.Plan(t.Context(), []specs.Mount{m})
	if err != nil {
		t.Fatal(err)
	}
	if pl.Mounts[0].Source != pl.Decisions[0].GuestSource || pl.Mounts[0].Destination != m.Destination {
		t.Errorf("mount %+v for %+v", pl.Mounts[0], pl.Decisions[0])
	}
	return pl.Decisions[0]
}

func TestPlanVersioned(t *testing.T) {
	p, dir := newPod(t)
	vol := filepath.Join(dir, "volumes/kubernetes.io~projected/all")
	mkdir(t, vol)
	publish(t, vol, "..2026_01", map[string]string{"token": "t", "sub/deep/ca.crt": "c"})
	if err := os.Chmod(filepath.Join(vol, "..2026_01"), 0o2770|os.ModeSetgid); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		if err := os.Chown(filepath.Join(vol, "..2026_01/token"), 1000, 2000); err != nil {
			t.Fatal(err)
		}
	}
	d := planOne(t, p, bind(vol, "/all"))
	if d.GuestSource != "/run/h8s/volumes/vol.all" || !d.Live || len(d.Parts) != 1 {
		t.Fatalf("decision %+v", d)
	}
	tree := d.Parts[0]
	if tree.Version != "..2026_01" || tree.DirMode != 0o2770 || len(tree.Files) != 2 {
		t.Fatalf("tree %v", tree)
	}
	f := tree.Files[1]
	if f.Path != "token" || string(f.Data) != "t" || f.Mode != 0o640 || os.Geteuid() == 0 && (f.Uid != 1000 || f.Gid != 2000) {
		t.Errorf("file %v", f)
	}
	if tree.Files[0].Path != "sub/deep/ca.crt" {
		t.Errorf("file %v", tree.Files[0])
	}
}

func TestPlanRefusesLinks(t *testing.T) {
	p, dir := newPod(t)
	vol := filepath.Join(dir, "volumes/kubernetes.io~secret/s")
	secret := filepath.Join(t.TempDir(), "shadow")
	write(t, secret, "root", 0o600)
	mkdir(t, vol)
	publish(t, vol, "..1", map[string]string{"ok": "1"})
	if err := os.Symlink(secret, filepath.Join(vol, "..1/leak")); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Plan(t.Context(), []specs.Mount{bind(vol, "/s")}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("link in a version: %v", err)
	}
	if err := os.Remove(filepath.Join(vol, dataLink)); err != nil {
		t.Fatal(err)
	}
	for _, target := range []string{"../../../..", filepath.Dir(secret), "..", "x"} {
		_ = os.Remove(filepath.Join(vol, dataLink))
		if err := os.Symlink(target, filepath.Join(vol, dataLink)); err != nil {
			t.Fatal(err)
		}
		if _, err := p.Plan(t.Context(), []specs.Mount{bind(vol, "/s")}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("..data -> %s: %v", target, err)
		}
	}
}

func TestPlanEmptyDir(t *testing.T) {
	p, dir := newPod(t)
	disk := mkdir(t, filepath.Join(dir, "volumes/kubernetes.io~empty-dir/disk"))
	mem := mkdir(t, filepath.Join(dir, "volumes/kubernetes.io~empty-dir/mem"))
	mount(t, "tmpfs", mem, "tmpfs", 0, "size=8m,mode=1777")
	if err := os.Chmod(disk, 0o777|os.ModeSetgid); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(disk, 0, 2000); err != nil {
		t.Fatal(err)
	}
	e := planOne(t, p, bind(disk, "/d")).Volume.GetEmptyDir()
	if want := (&hyperstart.EmptyDir{Mode: 0o2777, Gid: 2000}); !proto.Equal(e, want) {
		t.Errorf("disk: %v", e)
	}
	e = planOne(t, p, bind(mem, "/m")).Volume.GetEmptyDir()
	if want := (&hyperstart.EmptyDir{Memory: true, SizeLimit: 8 << 20, Mode: 0o1777}); !proto.Equal(e, want) {
		t.Errorf("memory: %v", e)
	}

	// Two subPaths of two containers, as the kubelet binds them.
	var mounts []specs.Mount
	for i, sub := range []string{"disk/a b/c", "mem/x"} {
		from := mkdir(t, filepath.Join(dir, "volumes/kubernetes.io~empty-dir", sub))
		vol, _, _ := strings.Cut(sub, "/")
		to := mkdir(t, filepath.Join(dir, "volume-subpaths", vol, "app", fmt.Sprint(i)))
		mount(t, from, to, "", unix.MS_BIND, "")
		mounts = append(mounts, bind(to, "/s"+fmt.Sprint(i)))
	}
	pl, err := p.Plan(t.Context(), append(mounts, bind(disk, "/whole")))
	if err != nil {
		t.Fatal(err)
	}
	if pl.Mounts[0].Source != "/run/h8s/volumes/vol.disk/a b/c" || pl.Mounts[1].Source != "/run/h8s/volumes/vol.mem/x" || pl.Mounts[2].Source != "/run/h8s/volumes/vol.disk" {
		t.Errorf("mounts %+v", pl.Mounts)
	}
	vols, puts := pl.Requests()
	if len(vols) != 2 || len(puts) != 0 || vols[0].GetEmptyDir().Directories[0] != "a b/c" {
		t.Errorf("requests %v %v", vols, puts)
	}
}

func TestPlanFiles(t *testing.T) {
	p, dir := newPod(t)
	write(t, filepath.Join(dir, "etc-hosts"), "127.0.0.1 localhost\n", 0o644)
	term := filepath.Join(dir, "containers/app/1f2e")
	write(t, term, "", 0o666)
	d := planOne(t, p, bind(filepath.Join(dir, "etc-hosts"), "/etc/hosts"))
	if d.Volume.Name != "etc-hosts" || len(d.Parts[0].Files) != 1 || d.Parts[0].Files[0].Path != "" || d.Live {
		t.Errorf("hosts %+v", d)
	}
	d = planOne(t, p, bind(term, "/dev/termination-log"))
	if d.Volume.Name != "term.app.1f2e" || d.ReadBack != term || d.Parts[0].Files[0].Mode != 0o666 {
		t.Errorf("termination %+v", d)
	}
	long := bytes.Repeat([]byte("x"), 2*TerminationLimit)
	if err := p.WriteBack(d.ReadBack, append(long, "end"...)); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(term); len(b) != TerminationLimit || !bytes.HasSuffix(b, []byte("end")) {
		t.Errorf("termination message of %d bytes", len(b))
	}
	if err := p.WriteBack(filepath.Join(dir, "etc-hosts"), nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("write back elsewhere: %v", err)
	}
	if err := os.Remove(term); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(dir, "etc-hosts"), term); err != nil {
		t.Fatal(err)
	}
	if err := p.WriteBack(term, []byte("x")); err == nil {
		t.Error("wrote through a link")
	}
}

func TestPlanConfigMapSubPath(t *testing.T) {
	p, dir := newPod(t)
	vol := mkdir(t, filepath.Join(dir, "volumes/kubernetes.io~configmap/cm"))
	publish(t, vol, "..1", map[string]string{"nginx.conf": "one"})
	to := filepath.Join(dir, "volume-subpaths/cm/app/0")
	write(t, to, "", 0o640)
	mount(t, filepath.Join(vol, "..1/nginx.conf"), to, "", unix.MS_BIND, "")
	d := planOne(t, p, bind(to, "/etc/nginx.conf"))
	if d.Live || string(d.Parts[0].Files[0].Data) != "one" || d.Parts[0].Version != "" {
		t.Fatalf("decision %+v", d)
	}
	// An update does not reach a subPath, but its version's removal must not hurt.
	publish(t, vol, "..2", map[string]string{"nginx.conf": "two"})
	if again := planOne(t, p, bind(to, "/etc/nginx.conf")); again.GuestSource != d.GuestSource {
		t.Errorf("same content, other name: %s, %s", again.GuestSource, d.GuestSource)
	}
	// A restarted container gets a new bind with today's content.
	if err := unix.Unmount(to, 0); err != nil {
		t.Fatal(err)
	}
	mount(t, filepath.Join(vol, "..2/nginx.conf"), to, "", unix.MS_BIND, "")
	if again := planOne(t, p, bind(to, "/etc/nginx.conf")); again.GuestSource == d.GuestSource || string(again.Parts[0].Files[0].Data) != "two" {
		t.Errorf("restart: %+v", again)
	}
}

func TestPlanRefuses(t *testing.T) {
	p, dir := newPod(t)
	host := t.TempDir()
	for _, c := range []struct {
		m    specs.Mount
		want string
	}{
		{bind(host, "/host"), "hostPath volumes are not available to Pods in a VM: use emptyDir, configMap, or a PersistentVolumeClaim; operators may run the Pod with runtimeClassName: runc"},
		{bind("/dev/null", "/dev/null"), "devices and sockets"},
		{bind("/dev", "/dev"), "devices and sockets"},
		{bind(mkdir(t, filepath.Join(dir, "volumes/kubernetes.io~nfs/n")), "/n"), `"kubernetes.io~nfs"`},
		{bind(mkdir(t, filepath.Join(dir, "volumes/kubernetes.io~csi/pvc/mount")), "/n"), `"kubernetes.io~csi"`},
		{specs.Mount{Type: "ext4", Source: "/dev/sda", Destination: "/x"}, `type "ext4"`},
	} {
		_, err := p.Plan(t.Context(), []specs.Mount{c.m})
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), c.m.Destination) {
			t.Errorf("%s: %v", c.m.Source, err)
		}
	}
	defaults := []specs.Mount{{Type: "proc", Source: "proc", Destination: "/proc"}, {Type: "tmpfs", Source: "tmpfs", Destination: "/dev"}, {Type: "cgroup", Source: "cgroup", Destination: "/sys/fs/cgroup"}}
	pl, err := p.Plan(t.Context(), defaults)
	if err != nil || len(pl.Decisions) != 0 || pl.Mounts[2].Source != "cgroup" {
		t.Errorf("defaults: %+v, %v", pl, err)
	}
	if _, err := (Pod{KubeletRoot: "/x", UID: ".."}).Plan(t.Context(), nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("UID: %v", err)
	}
}

// TestKubeletRootLink: containerd resolves links in sources.
func TestKubeletRootLink(t *testing.T) {
	p, dir := newPod(t)
	link := filepath.Join(t.TempDir(), "kubelet")
	if err := os.Symlink(p.KubeletRoot, link); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "etc-hosts"), "x", 0o644)
	p.KubeletRoot = link
	planOne(t, p, bind(filepath.Join(dir, "etc-hosts"), "/etc/hosts"))
}

func TestSplitAndRequests(t *testing.T) {
	p, dir := newPod(t)
	vol := mkdir(t, filepath.Join(dir, "volumes/kubernetes.io~projected/big"))
	want := map[string]string{"a": strings.Repeat("a", 3<<20), "empty": "", "z": strings.Repeat("z", MaxPart)}
	for i := range 300 {
		want[fmt.Sprintf("small/%03d", i)] = "s"
	}
	publish(t, vol, "..1", want)
	pl, err := p.Plan(t.Context(), []specs.Mount{bind(vol, "/big")})
	if err != nil {
		t.Fatal(err)
	}
	vols, puts := pl.Requests()
	if len(vols) != 0 || len(puts) < 5 {
		t.Fatalf("%d volumes, %d puts", len(vols), len(puts))
	}
	got := map[string]string{}
	for i, r := range puts {
		if size := proto.Size(r.Tree); size > MaxPart {
			t.Errorf("part %d has %d bytes", i, size)
		}
		if r.More != (i < len(puts)-1) || r.Volume != "vol.big" || r.Tree.Version != "..1" {
			t.Errorf("part %d: %v %s %s", i, r.More, r.Volume, r.Tree.Version)
		}
		for _, f := range r.Tree.Files {
			if _, seen := got[f.Path]; seen != f.Append {
				t.Errorf("%s: append %v", f.Path, f.Append)
			}
			got[f.Path] += string(f.Data)
		}
	}
	for k, v := range want {
		if g, ok := got[k]; !ok || g != v {
			t.Errorf("%s: %d bytes, want %d", k, len(g), len(v))
		}
	}
	publish(t, vol, "..2", map[string]string{"a": strings.Repeat("a", MaxBytes+1)})
	if _, err := p.Plan(t.Context(), []specs.Mount{bind(vol, "/big")}); !errdefs.IsResourceExhausted(err) {
		t.Errorf("too big: %v", err)
	}
}
