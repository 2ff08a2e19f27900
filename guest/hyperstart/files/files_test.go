package files

import (
	"errors"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
)

func file(p, data string) *hyperstart.File {
	return &hyperstart.File{Path: p, Data: []byte(data), Uid: uint32(os.Getuid()), Gid: uint32(os.Getgid())}
}

func tree(version string, f ...*hyperstart.File) *hyperstart.FileTree {
	return &hyperstart.FileTree{Version: version, Files: f, Uid: uint32(os.Getuid()), Gid: uint32(os.Getgid())}
}

func names(t *testing.T, dir string) []string {
	t.Helper()
	es, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range es {
		out = append(out, e.Name())
	}
	return out
}

func read(t *testing.T, p string) string {
	t.Helper()
	b, err := os.ReadFile(p)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func put(t *testing.T, tr *Tree, in *hyperstart.FileTree, more bool) {
	t.Helper()
	if err := tr.Put(in, more); err != nil {
		t.Fatal(err)
	}
}

func TestVersions(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "v")
	tr := New(dir)
	put(t, tr, tree("..1", file("a", "one"), file("sub/b", "b1"), file("gone", "x")), false)
	if got := names(t, dir); !slices.Equal(got, []string{"..1", "..data", "a", "gone", "sub"}) {
		t.Fatalf("first version: %v", got)
	}
	// A second version in parts: nothing shows before the last.
	put(t, tr, tree("..2", file("a", "tw")), true)
	if read(t, filepath.Join(dir, "a")) != "one" {
		t.Fatal("switched before the last part")
	}
	f := file("a", "o")
	f.Append = true
	put(t, tr, tree("..2", f, file("sub/b", "b2")), false)
	if a, b := read(t, filepath.Join(dir, "a")), read(t, filepath.Join(dir, "sub/b")); a != "two" || b != "b2" {
		t.Fatalf("second version: %q %q", a, b)
	}
	if got := names(t, dir); !slices.Equal(got, []string{"..2", "..data", "a", "sub"}) {
		t.Fatalf("stale names are left: %v", got)
	}
	// Sent again it changes nothing.
	put(t, tr, tree("..2", file("a", "other")), false)
	if read(t, filepath.Join(dir, "a")) != "two" {
		t.Fatal("the visible version was rewritten")
	}
	// An aborted tree leaves the visible one alone, and the next may reuse its name.
	put(t, tr, tree("..3", file("junk", "x")), true)
	put(t, tr, tree("..4", file("a", "four")), false)
	put(t, tr, tree("..3", file("a", "three")), false)
	if got := names(t, dir); !slices.Equal(got, []string{"..3", "..data", "a"}) || read(t, filepath.Join(dir, "a")) != "three" {
		t.Fatalf("after an aborted tree: %v", got)
	}
}

func TestPlain(t *testing.T) {
	base := t.TempDir()
	dir := filepath.Join(base, "d")
	tr := New(dir)
	put(t, tr, tree("", file("a", "1"), file("x/y", "2")), false)
	before, err := os.Stat(filepath.Join(dir, "a"))
	if err != nil {
		t.Fatal(err)
	}
	put(t, tr, tree("", file("a", "22")), false)
	after, _ := os.Stat(filepath.Join(dir, "a"))
	if !os.SameFile(before, after) || read(t, filepath.Join(dir, "a")) != "22" || read(t, filepath.Join(dir, "x/y")) != "2" {
		t.Fatal("a plain tree is not written in place")
	}
	single := New(filepath.Join(base, "f"))
	for range 2 { // announced, then brought, then announced again
		if err := single.Reserve(tree("")); err != nil {
			t.Fatal(err)
		}
		put(t, single, tree("", file("", "0123456789")), false)
	}
	put(t, single, tree("", file("", "0123456789")), false)
	b, size, err := single.ReadTail("", 4)
	if err != nil || string(b) != "6789" || size != 10 {
		t.Fatalf("tail: %q %d %v", b, size, err)
	}
	if _, _, err := tr.ReadTail("none", 4); !errors.Is(err, errdefs.ErrNotFound) {
		t.Fatalf("missing file: %v", err)
	}
}

func TestHostileTree(t *testing.T) {
	base := t.TempDir()
	secret := filepath.Join(base, "secret")
	if err := os.WriteFile(secret, []byte("keep"), 0o600); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(base, "d")
	tr := New(dir)
	put(t, tr, tree("", file("a", "1")), false)
	// What a container may have made of its directory.
	for name, target := range map[string]string{"link": "../secret", "abs": secret, "dir": ".."} {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range []string{"link", "abs", "dir/secret"} {
		if err := tr.Put(tree("", file(p, "bad")), false); err == nil {
			t.Errorf("write through %s succeeded", p)
		}
		if b, _, err := tr.ReadTail(p, 10); err == nil {
			t.Errorf("read through %s: %q", p, b)
		}
	}
	if read(t, secret) != "keep" {
		t.Fatal("a link led out of the tree")
	}
	for name, in := range map[string]*hyperstart.FileTree{
		"absolute": tree("", file("/a", "")), "up": tree("", file("a/../../b", "")), "dot": tree("", file("./a", "")),
		"empty element": tree("", file("a//b", "")), "nul": tree("", file("a\x00", "")),
		"two of empty path": tree("", file("", ""), file("b", "")), "version": tree("v1", file("a", "")),
		"version data": tree("..data", file("a", "")), "version path": tree("../x", file("a", "")),
		"reserved name": tree("..9", file("..data", "")), "long": tree("", file(strings.Repeat("x", 300), "")),
		"deep": tree("", file(strings.Repeat("a/", 200)+"b", "")),
	} {
		if err := tr.Put(in, false); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := tr.Put(nil, false); err == nil {
		t.Error("nil tree taken")
	}
}

func TestLimit(t *testing.T) {
	tr := New(filepath.Join(t.TempDir(), "d"))
	big := strings.Repeat("x", 3<<20)
	var err error
	for range MaxBytes/len(big) + 1 {
		if err = tr.Put(tree("..1", file("a", big)), true); err != nil {
			break
		}
	}
	if !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Fatalf("over the limit: %v", err)
	}
}

func FuzzCheckPath(f *testing.F) {
	for _, s := range []string{"", "a", "a/b", "../x", "/x", "a/..", "a//b", ".", "\x00", "..data/x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, p string) {
		if CheckPath(p) != nil {
			return
		}
		if !filepath.IsLocal(p) || path.Clean(p) != p || p == "." {
			t.Fatalf("%q was taken", p)
		}
	})
}
