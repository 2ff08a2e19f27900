package atomicfile

import (
	"os"
	"path/filepath"
	"testing"
)

func TestWrite(t *testing.T) {
	dir := t.TempDir()
	path, outside := filepath.Join(dir, "file"), filepath.Join(dir, "outside")
	if err := os.WriteFile(outside, []byte("mine"), 0o644); err != nil {
		t.Fatal(err)
	}
	// As a crash, or somebody with bad intentions, may leave it.
	if err := os.Symlink(outside, path+Suffix); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		content string
		mode    os.FileMode
	}{{"one", 0o644}, {"two", 0o600}, {"two", 0o600}, {"two", 0o640}, {"", 0o600}} {
		if err := Write(path, []byte(c.content), c.mode); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if err != nil || string(b) != c.content {
			t.Errorf("%q %v, want %q", b, err, c.content)
		}
		if st, err := os.Lstat(path); err != nil || st.Mode() != c.mode {
			t.Errorf("mode %v %v, want %v", st.Mode(), err, c.mode)
		}
	}
	if b, err := os.ReadFile(outside); err != nil || string(b) != "mine" {
		t.Errorf("written through a link: %q %v", b, err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "*"+Suffix)); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestWriteLeavesTheSameAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := Write(path, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := Write(path, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if after, err := os.Stat(path); err != nil || !os.SameFile(before, after) {
		t.Error("written again")
	}
}

func TestWriteFails(t *testing.T) {
	path := filepath.Join(t.TempDir(), "no", "file")
	if err := Write(path, nil, 0o600); !os.IsNotExist(err) {
		t.Errorf("%v", err)
	}
}
