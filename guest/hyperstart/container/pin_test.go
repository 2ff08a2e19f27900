package container

import (
	"encoding/json"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"
)

func specWith(t *testing.T, sources ...string) []byte {
	t.Helper()
	s := specs.Spec{Version: "1.0.2"}
	for _, src := range sources {
		s.Mounts = append(s.Mounts, specs.Mount{Destination: "/d", Source: src, Type: "bind"})
	}
	b, err := json.Marshal(&s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func do(t *testing.T, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// private gives the rest of the test a mount namespace of its own.
func private(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("skipped: needs root to mount")
	}
	runtime.LockOSThread() // for good: the thread ends with the test's goroutine
	do(t, unix.Unshare(unix.CLONE_FS|unix.CLONE_NEWNS), unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
}

func TestPin(t *testing.T) {
	dir, at := t.TempDir(), t.TempDir()
	private(t)
	vol := filepath.Join(dir, "vol")
	do(t, os.MkdirAll(vol+"/sub", 0o755), os.WriteFile(vol+"/sub/f", []byte("mine"), 0o600),
		os.Symlink("sub", vol+"/inside"), os.WriteFile(dir+"/secret", []byte("guest's"), 0o600),
		os.Symlink("..", vol+"/up"), os.Symlink("/", vol+"/root"), os.Symlink("/proc/self/root", vol+"/magic"))

	in := specWith(t, vol+"/sub", vol, "tmpfs", vol+"/inside/f")
	out, open, err := pin(in, dir, at+"/c", none)
	do(t, err)
	var s specs.Spec
	do(t, json.Unmarshal(out, &s))
	if s.Mounts[1].Source != vol || s.Mounts[2].Source != "tmpfs" {
		t.Errorf("sources %v", s.Mounts)
	}
	// The swap after the look.
	do(t, os.Rename(vol+"/sub", vol+"/old"), os.Symlink("..", vol+"/sub"))
	for i, p := range map[int]string{0: s.Mounts[0].Source + "/f", 3: s.Mounts[3].Source} {
		if b, err := os.ReadFile(p); err != nil || string(b) != "mine" {
			t.Errorf("mount %d is of %q, %v", i, b, err)
		}
	}
	for _, evil := range []string{"up/secret", "sub/secret", "root/etc", "magic/etc"} {
		if _, open, err := pin(specWith(t, vol+"/"+evil), dir, at+"/e", none); err == nil {
			_ = open.Close()
			t.Errorf("%s was followed out of the volume", evil)
		} else if evil != "magic/etc" && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", evil, err)
		}
	}
	do(t, open.Close())
	if left, err := os.ReadDir(at); err != nil || len(left) > 0 {
		t.Errorf("%v left, %v", left, err)
	}
	if b, err := os.ReadFile(vol + "/old/f"); err != nil || string(b) != "mine" {
		t.Errorf("the volume has %q, %v", b, err)
	}
	same, open, err := pin(specWith(t, vol), dir, at+"/n", none)
	if err != nil || open != nil || string(same) != string(specWith(t, vol)) {
		t.Errorf("without subPath: %s, %v, %v", same, open, err)
	}
}

func none(string) []string { return nil }

func TestPinRestricts(t *testing.T) {
	restrict := func(volume string) []string {
		return map[string][]string{"vol": {"nosuid", "noexec"}}[volume]
	}
	out, open, err := pin(specWith(t, "/v/vol", "/v/other", "/vol"), "/v", t.TempDir(), restrict)
	do(t, err, open.Close())
	var s specs.Spec
	do(t, json.Unmarshal(out, &s))
	for i, want := range []int{2, 0, 0} {
		if len(s.Mounts[i].Options) != want {
			t.Errorf("%s: %v", s.Mounts[i].Source, s.Mounts[i].Options)
		}
	}
}
