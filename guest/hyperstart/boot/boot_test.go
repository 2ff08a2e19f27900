package boot

import (
	"path/filepath"
	"slices"
	"testing"
)

func TestCmdline(t *testing.T) {
	line := "console=ttyS0 quiet h8s.vsock=1024 x=a=b\n"
	for key, want := range map[string]string{"h8s.vsock": "1024", "x": "a=b", "console": "ttyS0"} {
		if v, ok := Cmdline(line, key); !ok || v != want {
			t.Errorf("%s: %q %v", key, v, ok)
		}
	}
	if _, ok := Cmdline(line, "quiet"); ok {
		t.Error("a flag has no value")
	}
}

func TestModules(t *testing.T) {
	got := moduleNames([]byte("# order\na.ko\n\n  /x/b.ko # last\n"))
	if !slices.Equal(got, []string{"a.ko", "/x/b.ko"}) {
		t.Errorf("names: %v", got)
	}
	dir := t.TempDir()
	if err := Modules(filepath.Join(dir, "none")); err != nil {
		t.Errorf("a kernel without modules: %v", err)
	}
}
