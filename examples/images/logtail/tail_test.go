package main

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

func TestDrainFollowsAndSurvivesTruncation(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "a.log")
	var out bytes.Buffer
	tl := &tailer{dir: dir, out: &out, at: map[string]int64{}}
	for _, step := range []struct {
		flag        int
		write, want string
	}{
		{os.O_APPEND, "one\ntw", "a.log: one\n"},
		{os.O_APPEND, "o\n", "a.log: two\n"},
		{os.O_TRUNC, "new\n", "a.log: new\n"},
	} {
		f, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY|step.flag, 0o644)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteString(step.write); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		out.Reset()
		if err := tl.drainAll(); err != nil {
			t.Fatal(err)
		}
		if out.String() != step.want {
			t.Errorf("after %q: got %q, want %q", step.write, out.String(), step.want)
		}
	}
}
