package image

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func testTree(t *testing.T) *tree {
	t.Helper()
	tr, err := newTree(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := tr.close(); err != nil {
			t.Error(err)
		}
	})
	return tr
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// listing is what a layer holds, one line per entry, in order.
func listing(t *testing.T, layer []byte) string {
	t.Helper()
	var b strings.Builder
	tr := tar.NewReader(bytes.NewReader(layer))
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return b.String()
		}
		if err != nil {
			t.Fatal(err)
		}
		if !h.ModTime.Equal(epoch) {
			t.Errorf("%s: time %s", h.Name, h.ModTime)
		}
		fmt.Fprintf(&b, "%c %04o %d:%d %s", h.Typeflag, h.Mode, h.Uid, h.Gid, h.Name)
		if h.Linkname != "" {
			fmt.Fprintf(&b, " -> %s", h.Linkname)
		}
		b.WriteByte('\n')
	}
}

func TestTreeWritesSortedMergedLayer(t *testing.T) {
	tr := testTree(t)
	must(t,
		tr.addFile("/sbin/init", 0o755, 0, 0, strings.NewReader("i")),
		tr.addFile("./bin/busybox", 0o755, 0, 0, strings.NewReader("b")),
		tr.addHardlink("/bin/sh", "/bin/busybox"),
		tr.addHardlink("/usr/sbin/httpd", "/bin/sh"),
		tr.addDir("/tmp", 0o1777, 0, 0),
		tr.addFile("/home/ann/x", 0o600, 1000, 1000, strings.NewReader("x")),
		tr.addSymlink("/var/run", "/run"),
	)
	var layer bytes.Buffer
	must(t, tr.writeTar(&layer, nil))
	want := `2 0777 0:0 bin -> usr/bin
2 0777 0:0 sbin -> usr/sbin
5 0755 0:0 home/
5 0755 0:0 home/ann/
0 0600 1000:1000 home/ann/x
5 1777 0:0 tmp/
5 0755 0:0 usr/
5 0755 0:0 usr/bin/
0 0755 0:0 usr/bin/busybox
5 0755 0:0 usr/sbin/
0 0755 0:0 usr/sbin/init
5 0755 0:0 var/
2 0777 0:0 var/run -> /run
1 0755 0:0 usr/bin/sh -> usr/bin/busybox
1 0755 0:0 usr/sbin/httpd -> usr/bin/busybox
`
	if got := listing(t, layer.Bytes()); got != want {
		t.Errorf("layer:\n%swant:\n%s", got, want)
	}
	again := testTree(t)
	must(t, again.readTar(bytes.NewReader(layer.Bytes()), false))
	var second bytes.Buffer
	must(t, again.writeTar(&second, nil))
	if !bytes.Equal(layer.Bytes(), second.Bytes()) {
		t.Errorf("a layer read and written again differs:\n%s", listing(t, second.Bytes()))
	}
}

func TestLayerOnBaseHasOnlyWhatIsNew(t *testing.T) {
	base, top := testTree(t), testTree(t)
	must(t,
		base.addFile("/usr/bin/sh", 0o755, 0, 0, strings.NewReader("s")),
		base.addDir("/root", 0o700, 0, 0),
		top.addFile("/root/.profile", 0o644, 0, 0, strings.NewReader("p")),
	)
	base.addParents(nil)
	var layer bytes.Buffer
	must(t, top.writeTar(&layer, base))
	if got, want := listing(t, layer.Bytes()), "0 0644 0:0 root/.profile\n"; got != want {
		t.Errorf("layer:\n%swant:\n%s", got, want)
	}
}

func TestLookup(t *testing.T) {
	tr := testTree(t)
	must(t,
		tr.addFile("/usr/lib/x/real", 0o644, 0, 0, strings.NewReader("r")),
		tr.addSymlink("/usr/lib/x/relative", "real"),
		tr.addSymlink("/usr/lib/y", "/lib/x"),
		tr.addSymlink("/lib64/ld.so", "../lib/x/real"),
		tr.addSymlink("/loop", "loop"),
		tr.addSymlink("/escape", "../../../usr/lib/x/real"),
		tr.addHardlink("/hard", "/lib/x/relative"),
	)
	for path, want := range map[string]error{
		"/lib/x/real": nil, "/usr/lib/y/relative": nil, "/lib64/ld.so": nil, "/hard": nil, "/escape": nil,
		"/loop": errdefs.ErrInvalidArgument, "/missing": errdefs.ErrNotFound, "/../x": errdefs.ErrInvalidArgument,
	} {
		got, _, err := tr.lookup(path)
		if !errors.Is(err, want) || (want == nil && got != "usr/lib/x/real") {
			t.Errorf("lookup %s: %q, %v; want %v", path, got, err, want)
		}
	}
}

func TestRemoveKeepsHardLinks(t *testing.T) {
	tr := testTree(t)
	must(t,
		tr.addFile("/usr/bin/a", 0o755, 0, 0, strings.NewReader("content")),
		tr.addHardlink("/usr/bin/b", "/usr/bin/a"),
		tr.addHardlink("/usr/bin/c", "/usr/bin/a"),
		tr.addFile("/usr/share/doc/a/readme", 0o644, 0, 0, strings.NewReader("r")),
		tr.remove("/usr/share/doc/**"),
		tr.remove("/usr/bin/a"),
	)
	if got := strings.Join(tr.names(), " "); got != "usr/bin/b usr/bin/c" {
		t.Errorf("left: %s", got)
	}
	_, e, err := tr.lookup("/usr/bin/c")
	must(t, err)
	if text, _ := io.ReadAll(tr.content(e)); string(text) != "content" {
		t.Errorf("content of c: %q", text)
	}
}

func FuzzReadTar(f *testing.F) {
	var good bytes.Buffer
	w := tar.NewWriter(&good)
	for _, h := range []*tar.Header{
		{Typeflag: tar.TypeReg, Name: "bin/a", Size: 1, Mode: 0o755},
		{Typeflag: tar.TypeLink, Name: "b", Linkname: "bin/a"},
		{Typeflag: tar.TypeSymlink, Name: "c", Linkname: "../.."},
		{Typeflag: tar.TypeReg, Name: "../evil", Size: 0},
	} {
		if err := w.WriteHeader(h); err != nil {
			f.Fatal(err)
		}
		if h.Size > 0 {
			_, _ = w.Write([]byte("x"))
		}
	}
	f.Add(good.Bytes())
	f.Fuzz(func(t *testing.T, data []byte) {
		tr, err := newTree(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		defer tr.close()
		_ = tr.readTar(bytes.NewReader(data), false)
		for _, p := range tr.names() {
			if strings.HasPrefix(p, "../") || strings.HasPrefix(p, "/") {
				t.Errorf("path %q leaves the tree", p)
			}
			_, _, _ = tr.lookup(p)
		}
	})
}
