package volume

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
)

func TestEnsureDirectories(t *testing.T) {
	dir := t.TempDir()
	e := &entry{path: dir, ready: true}
	ensure := func(paths ...string) error {
		return ensureDirectories(e, &hyperstart.Volume{Name: "v", Kind: &hyperstart.Volume_EmptyDir{EmptyDir: &hyperstart.EmptyDir{
			Mode: 0o2770, Uid: uint32(os.Getuid()), Gid: uint32(os.Getgid()), Directories: paths,
		}}})
	}
	for range 2 {
		if err := ensure("a/b c", "x"); err != nil {
			t.Fatal(err)
		}
	}
	st, err := os.Stat(filepath.Join(dir, "a/b c"))
	if err != nil || st.Mode() != os.ModeDir|os.ModeSetgid|0o770 {
		t.Errorf("%v, %v", st, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("init"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := ensure("file"); err != nil {
		t.Errorf("a file an init container wrote: %v", err)
	}
	outside := t.TempDir()
	if err := os.Symlink(outside, filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{"link", "link/x", "file/x", "../x", "/x", "a//b", ""} {
		if err := ensure(p); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", p, err)
		}
	}
	if names, _ := os.ReadDir(outside); len(names) != 0 {
		t.Errorf("made %v outside", names)
	}
}
