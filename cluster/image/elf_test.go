package image

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// hostTree is a tree with some of this machine's own files.
func hostTree(t *testing.T, patterns ...string) *tree {
	t.Helper()
	tr := testTree(t)
	for _, pattern := range patterns {
		files, err := filepath.Glob(pattern)
		must(t, err)
		for _, file := range files {
			if target, err := os.Readlink(file); err == nil {
				must(t, tr.addSymlink(file, target))
				continue
			}
			data, err := os.ReadFile(file)
			must(t, err)
			must(t, tr.addFile(file, 0o755, 0, 0, bytes.NewReader(data)))
		}
	}
	return tr
}

func TestPickTakesLibraries(t *testing.T) {
	if _, err := os.Stat("/lib64/ld-linux-x86-64.so.2"); err != nil {
		t.Skipf("needs a glibc of amd64 on this machine: %v", err)
	}
	all := hostTree(t, "/usr/bin/env", "/lib64/ld-linux-x86-64.so.2", "/usr/lib/x86_64-linux-gnu/libc.so.6", "/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")
	dst := testTree(t)
	must(t, all.pickInto(dst, nil, "/bin/env"))
	got := strings.Join(dst.names(), " ")
	for _, want := range []string{"usr/bin/env", "usr/lib/x86_64-linux-gnu/libc.so.6", "usr/lib64/ld-linux-x86-64.so.2"} {
		if !strings.Contains(got, want) {
			t.Errorf("%s is missing in %s", want, got)
		}
	}

	// What the base has is not taken again.
	onBase := testTree(t)
	must(t, all.pickInto(onBase, dst, "/bin/env"))
	if got := strings.Join(onBase.names(), " "); got != "usr/bin/env" {
		t.Errorf("on a base with the libraries: %s", got)
	}

	// A missing library names the program and the library.
	err := hostTree(t, "/usr/bin/env").pickInto(testTree(t), nil, "/bin/env")
	if !errors.Is(err, errdefs.ErrNotFound) || !strings.Contains(err.Error(), "usr/bin/env needs library") {
		t.Errorf("without libraries: %v", err)
	}
}

func TestReadNeedsOfOtherFiles(t *testing.T) {
	for _, text := range []string{"", "#!/bin/sh\n", "\x7fEL"} {
		if _, ok, err := readNeeds(strings.NewReader(text)); ok || err != nil {
			t.Errorf("%q: %v, %v", text, ok, err)
		}
	}
}

func FuzzReadNeeds(f *testing.F) {
	if data, err := os.ReadFile("/usr/bin/env"); err == nil {
		f.Add(data)
	}
	f.Add([]byte("\x7fELF"))
	f.Fuzz(func(t *testing.T, data []byte) {
		_, _, _ = readNeeds(bytes.NewReader(data))
	})
}
