package disk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func erofs(path string, options ...string) *types.Mount {
	return &types.Mount{Type: "erofs", Source: path, Options: append([]string{"ro", "loop"}, options...)}
}

func overlay(options ...string) *types.Mount {
	return &types.Mount{Type: "format/mkdir/overlay", Source: "overlay", Options: options}
}

var rwlayer = &types.Mount{Type: "mkfs/ext4", Source: "/s/9/rwlayer.img", Options: []string{"X-containerd.mkfs.fs=ext4", "X-containerd.mkfs.size=1048576", "rw", "loop"}}

func TestParseRootFS(t *testing.T) {
	const upper, work = "upperdir=/s/9/fs", "workdir=/s/9/work"
	for name, c := range map[string]struct {
		mounts []*types.Mount
		want   RootFS
		err    string
	}{
		"several layers": {
			[]*types.Mount{erofs("/s/3/layer.erofs"), erofs("/s/2/layer.erofs"), erofs("/s/1/layer.erofs"), overlay(work, upper, "lowerdir={{ overlay 0 2 }}")},
			RootFS{Layers: []string{"/s/1/layer.erofs", "/s/2/layer.erofs", "/s/3/layer.erofs"}, Writable: true}, "",
		},
		"one layer": {
			[]*types.Mount{erofs("/s/1/layer.erofs"), overlay(work, upper, "lowerdir={{ mount 0 }}", "index=off")},
			RootFS{Layers: []string{"/s/1/layer.erofs"}, Writable: true}, "",
		},
		"block mode": {
			[]*types.Mount{rwlayer, erofs("/s/2/l"), erofs("/s/1/l"), overlay("X-containerd.mkdir.path={{ mount 0 }}/upper:0755", "workdir={{ mount 0 }}/work", "upperdir={{ mount 0 }}/upper", "lowerdir={{ overlay 1 2 }}")},
			RootFS{Layers: []string{"/s/1/l", "/s/2/l"}, Writable: true, SizeLimit: 1 << 20}, "",
		},
		"block mode, one layer": {
			[]*types.Mount{rwlayer, erofs("/s/1/l"), overlay("workdir={{ mount 0 }}/work", "upperdir={{ mount 0 }}/upper", "lowerdir={{ mount 1 }}")},
			RootFS{Layers: []string{"/s/1/l"}, Writable: true, SizeLimit: 1 << 20}, "",
		},
		"view of one":     {[]*types.Mount{erofs("/s/1/l", "X-containerd.dmverity=/s/1/l.dmverity")}, RootFS{Layers: []string{"/s/1/l"}}, ""},
		"view of several": {[]*types.Mount{erofs("/s/2/l"), erofs("/s/1/l"), overlay("lowerdir={{ overlay 0 1 }}")}, RootFS{Layers: []string{"/s/1/l", "/s/2/l"}}, ""},
		"bound view":      {[]*types.Mount{erofs("/s/1/l"), {Type: "format/bind", Source: "{{ mount 0 }}", Options: []string{"ro", "rbind"}}}, RootFS{Layers: []string{"/s/1/l"}}, ""},

		"nothing":              {nil, RootFS{}, "no mounts"},
		"nil mount":            {[]*types.Mount{nil}, RootFS{}, "mount 0 is empty"},
		"overlayfs":            {[]*types.Mount{{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=/a:/b"}}}, RootFS{}, `use snapshotter "erofs"`},
		"native":               {[]*types.Mount{{Type: "bind", Source: "/s/1/fs", Options: []string{"rbind"}}}, RootFS{}, `use snapshotter "erofs"`},
		"block device":         {[]*types.Mount{{Type: "ext4", Source: "/dev/dm-3"}}, RootFS{}, `type "ext4"`},
		"no layers, block":     {[]*types.Mount{rwlayer, {Type: "format/mkdir/bind", Source: "{{ mount 0 }}/upper"}}, RootFS{}, `use snapshotter "erofs"`},
		"only a writable disk": {[]*types.Mount{rwlayer}, RootFS{}, "no image layers"},
		"layers unjoined":      {[]*types.Mount{erofs("/a"), erofs("/b")}, RootFS{}, "nothing that joins"},
		"layer missing":        {[]*types.Mount{erofs("/a"), erofs("/b"), overlay("lowerdir={{ overlay 0 2 }}")}, RootFS{}, "lowerdir"},
		"layer left out":       {[]*types.Mount{erofs("/a"), erofs("/b"), overlay("lowerdir={{ mount 1 }}")}, RootFS{}, "lowerdir"},
		"no lowerdir":          {[]*types.Mount{erofs("/a"), overlay(upper)}, RootFS{}, "lowerdir"},
		"two lowerdirs":        {[]*types.Mount{erofs("/a"), overlay("lowerdir={{ mount 0 }}", "lowerdir=/etc")}, RootFS{}, "two lowerdir"},
		"host lowerdir":        {[]*types.Mount{erofs("/a"), overlay("lowerdir={{ mount 0 }}:/etc")}, RootFS{}, "lowerdir"},
		"something on top":     {[]*types.Mount{erofs("/a"), overlay("lowerdir={{ mount 0 }}"), {Type: "bind", Source: "/etc"}}, RootFS{}, "should be the last"},
		"relative":             {[]*types.Mount{erofs("a")}, RootFS{}, "absolute"},
		"unclean":              {[]*types.Mount{erofs("/a/../b")}, RootFS{}, "absolute"},
		"merged":               {[]*types.Mount{erofs("/s/fsmeta.erofs", "device=/s/1/l")}, RootFS{}, "merged layer"},
		"id mapped":            {[]*types.Mount{erofs("/a"), overlay("uidmap=0:1:2", "lowerdir={{ mount 0 }}")}, RootFS{}, "user namespaces"},
		"size":                 {[]*types.Mount{{Type: "mkfs/ext4", Options: []string{"X-containerd.mkfs.size=-1"}}}, RootFS{}, "number of bytes"},
	} {
		got, err := ParseRootFS(c.mounts)
		if c.err == "" && (err != nil || !reflect.DeepEqual(got, c.want)) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
		if c.err != "" && (!errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.err)) {
			t.Errorf("%s: error %v, want %q", name, err, c.err)
		}
	}
}

func FuzzParseRootFS(f *testing.F) {
	f.Add("mkfs/ext4|/w|X-containerd.mkfs.size=5\nerofs|/a|ro\nformat/mkdir/overlay|overlay|lowerdir={{ mount 1 }},upperdir=/u")
	f.Add("erofs|/b|\nerofs|/a|\nformat/bind|{{ mount 0 }}|ro")
	f.Fuzz(func(t *testing.T, text string) {
		var mounts []*types.Mount
		for line := range strings.Lines(text) {
			p := append(strings.SplitN(strings.TrimSuffix(line, "\n"), "|", 3), "", "")
			mounts = append(mounts, &types.Mount{Type: p[0], Source: p[1], Options: strings.Split(p[2], ",")})
		}
		fs, err := ParseRootFS(mounts)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) {
				t.Errorf("error without class: %v", err)
			}
			return
		}
		if len(fs.Layers) == 0 || fs.SizeLimit < 0 {
			t.Errorf("%q gives %+v", text, fs)
		}
		for _, l := range fs.Layers {
			if !filepath.IsAbs(l) || filepath.Clean(l) != l {
				t.Errorf("%q gives layer %q", text, l)
			}
		}
	})
}

func image(t *testing.T) string {
	t.Helper()
	mkfs, err := exec.LookPath("mkfs.erofs")
	if err != nil {
		t.Skip("no mkfs.erofs (package erofs-utils)")
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), bytes.Repeat([]byte("x"), 9000), 0o600); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(t.TempDir(), "layer.erofs")
	if b, err := exec.Command(mkfs, "--quiet", "-Enoinline_data", out, dir).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.erofs: %v: %s", err, b)
	}
	return out
}

func TestOpenLayer(t *testing.T) {
	path := image(t)
	l, err := OpenLayer(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	link := filepath.Join(t.TempDir(), "hard")
	if err := os.Link(path, link); err != nil {
		t.Fatal(err)
	}
	same, err := OpenLayer(link)
	if err != nil {
		t.Fatal(err)
	}
	defer same.Close()
	if l.Serial != same.Serial || len(l.Serial) > 20 || len(l.Serial) < 2 {
		t.Errorf("serials %q and %q", l.Serial, same.Serial)
	}
	if _, err := l.File.Write([]byte("x")); err == nil {
		t.Error("a layer is writable")
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, data := range map[string][]byte{
		"empty":        nil,
		"short":        whole[:1100],
		"cut":          whole[:len(whole)-4096],
		"zeroes":       make([]byte, len(whole)),
		"bad checksum": flip(whole, superOffset+20),
		"block size":   set(whole, superOffset+12, 40),
	} {
		p := filepath.Join(dir, strings.ReplaceAll(name, " ", "-"))
		if err := os.WriteFile(p, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenLayer(p); !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), p) || !strings.Contains(err.Error(), "pull it again") {
			t.Errorf("%s: %v", name, err)
		}
	}
	sym, fifo := filepath.Join(dir, "sym"), filepath.Join(dir, "fifo")
	if err := errors.Join(os.Symlink(path, sym), unix.Mkfifo(fifo, 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{sym, fifo, dir, "/dev/null"} {
		if _, err := OpenLayer(p); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", p, err)
		}
	}
	if _, err := OpenLayer(filepath.Join(dir, "none")); !errdefs.IsNotFound(err) {
		t.Errorf("missing: %v", err)
	}
}

func flip(b []byte, at int) []byte { return set(b, at, b[at]^0xff) }

func set(b []byte, at int, v byte) []byte {
	b = bytes.Clone(b)
	b[at] = v
	return b
}

func FuzzCheckEROFS(f *testing.F) {
	seed := make([]byte, 4096)
	binary.LittleEndian.PutUint32(seed[superOffset:], erofsMagic)
	seed[superOffset+12] = 12
	f.Add(seed)
	f.Fuzz(func(t *testing.T, b []byte) { _ = checkEROFS(bytes.NewReader(b), int64(len(b))) })
}

// template makes a sparse file of size bytes with data at its head, middle and end.
func template(t testing.TB, dir string, size int64, data int) string {
	t.Helper()
	p := filepath.Join(dir, "template")
	f, err := os.Create(p)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	for i, off := range []int64{0, size / 2, size - int64(data)} {
		if _, err := f.WriteAt(bytes.Repeat([]byte{byte('a' + i)}, data), off); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

func TestNewScratch(t *testing.T) {
	dir := t.TempDir()
	tmpl := template(t, t.TempDir(), 256<<20, 300<<10)
	f, err := NewScratch(t.Context(), dir, tmpl, 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	if st.Size != 1<<30 || st.Nlink != 0 || st.Blocks*512 > 4<<20 {
		t.Errorf("size %d, links %d, %d bytes on disk", st.Size, st.Nlink, st.Blocks*512)
	}
	if names, _ := os.ReadDir(dir); len(names) != 0 {
		t.Errorf("left %v", names)
	}
	want, err := os.ReadFile(tmpl)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("content differs, %v", err)
	}
	if _, err := NewScratch(t.Context(), dir, tmpl+"x", 0); !errdefs.IsNotFound(err) {
		t.Errorf("no template: %v", err)
	}
	if _, err := NewScratch(t.Context(), dir+"x", tmpl, 0); !errdefs.IsNotFound(err) {
		t.Errorf("no directory: %v", err)
	}
	if _, err := NewScratch(t.Context(), dir, dir, 0); !errdefs.IsInvalidArgument(err) {
		t.Errorf("template is a directory: %v", err)
	}
}

// TestNewScratchFull copies onto a tmpfs too small for it: another file system, too.
func TestNewScratchFull(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	small := t.TempDir()
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=512k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(small, unix.MNT_DETACH) })
	tmpl := template(t, t.TempDir(), 8<<20, 300<<10)
	_, err := NewScratch(t.Context(), small, tmpl, 0)
	if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), small) {
		t.Errorf("full: %v", err)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(small, &fs); err != nil || fs.Bfree != fs.Blocks {
		t.Errorf("%d of %d blocks are free, %v", fs.Bfree, fs.Blocks, err)
	}
}

// TestScratchIsUsable copies a template as the guest image build makes it.
func TestScratchIsUsable(t *testing.T) {
	mkfs, err := exec.LookPath("mkfs.ext4")
	if err != nil {
		t.Skip("no mkfs.ext4 (package e2fsprogs)")
	}
	tmpl := filepath.Join(t.TempDir(), "scratch.ext4")
	if b, err := exec.Command(mkfs, "-q", "-O", "quota,project", "-E", "lazy_itable_init=1", tmpl, "1G").CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, b)
	}
	f, err := NewScratch(t.Context(), t.TempDir(), tmpl, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if b, err := exec.Command("e2fsck", "-fn", fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd())).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v: %s", err, b)
	}
}

func BenchmarkNewScratch(b *testing.B) {
	tmpl := template(b, b.TempDir(), 10<<30, 2<<20)
	dir := b.TempDir()
	for b.Loop() {
		f, err := NewScratch(b.Context(), dir, tmpl, 0)
		if err != nil {
			b.Fatal(err)
		}
		_ = f.Close()
	}
}
