package preload

import (
	"archive/tar"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
)

func archive(t *testing.T, dir, name, manifest string) {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := tar.NewWriter(f)
	for file, content := range map[string]string{"manifest.json": manifest, "other": "x"} {
		if content == "" {
			continue
		}
		if err := w.WriteHeader(&tar.Header{Name: file, Mode: 0o600, Size: int64(len(content))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}

// store remembers imports; imported archives bring all tags.
type store struct {
	has      map[string]bool
	imported []string
	fail     string
}

func (s *store) Has(_ context.Context, tag string) (bool, error) { return s.has[tag], nil }

func (s *store) Import(_ context.Context, path string) error {
	if filepath.Base(path) == s.fail {
		return errors.New("refused")
	}
	s.imported = append(s.imported, filepath.Base(path))
	a, err := Read(path)
	for _, tag := range a.Tags {
		s.has[tag] = true
	}
	return err
}

func TestImportOncePerContent(t *testing.T) {
	dir := t.TempDir()
	journal := filepath.Join(t.TempDir(), "journal")
	archive(t, dir, "a.tar", `[{"Config":"1","RepoTags":["a:1"]}]`)
	archive(t, dir, "b.tar", `[{"Config":"2","RepoTags":["b:1","b:2"]}]`)
	s := &store{has: map[string]bool{}}
	run := func(want ...string) {
		t.Helper()
		list, err := List(dir)
		if err != nil {
			t.Fatal(err)
		}
		s.imported = nil
		if _, err := Import(t.Context(), s, list, journal); err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(s.imported, want) {
			t.Errorf("imported %v, want %v", s.imported, want)
		}
	}
	run("a.tar", "b.tar")
	run()
	archive(t, dir, "b.tar", `[{"Config":"3","RepoTags":["b:1","b:2"]}]`)
	run("b.tar")
	delete(s.has, "a:1")
	run("a.tar")
	if err := os.WriteFile(journal, []byte(`{"torn`), 0o600); err != nil {
		t.Fatal(err)
	}
	run("a.tar", "b.tar")
}

func TestImportGoesOnAfterAFailure(t *testing.T) {
	dir := t.TempDir()
	archive(t, dir, "a.tar", `[{"Config":"1","RepoTags":["a:1"]}]`)
	archive(t, dir, "b.tar", `[{"Config":"2","RepoTags":["b:1"]}]`)
	list, err := List(dir)
	if err != nil {
		t.Fatal(err)
	}
	s := &store{has: map[string]bool{}, fail: "a.tar"}
	n, err := Import(t.Context(), s, list, filepath.Join(dir, "journal"))
	if n != 1 || err == nil || !slices.Equal(s.imported, []string{"b.tar"}) {
		t.Errorf("%d %v %v", n, err, s.imported)
	}
}

func TestReadRefuses(t *testing.T) {
	dir := t.TempDir()
	archive(t, dir, "none.tar", "")
	archive(t, dir, "bad.tar", "nonsense")
	if err := os.WriteFile(filepath.Join(dir, "text.tar"), []byte("not a tar file at all, and long enough to be read as one"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Read(filepath.Join(dir, "none.tar")); !errdefs.IsInvalidArgument(err) {
		t.Errorf("without a manifest: %v", err)
	}
	for _, name := range []string{"bad.tar", "text.tar", "absent.tar"} {
		if _, err := Read(filepath.Join(dir, name)); err == nil {
			t.Errorf("%s was read", name)
		}
	}
}

func TestFind(t *testing.T) {
	list := []Archive{{Tags: []string{"x:1"}}, {Tags: []string{"y:1", "h8s.local/coredns:1"}}}
	if got := Find(list, "h8s.local/coredns:"); got != "h8s.local/coredns:1" {
		t.Error(got)
	}
	if got := Find(list, "z"); got != "" {
		t.Error(got)
	}
}
