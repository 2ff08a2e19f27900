package placeholder

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	key   = "0123456789abcdef0123456789abcdef"
	other = "fedcba9876543210fedcba9876543210"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("mounts are made by root only")
	}
}

// placed returns a Places and a target below a directory of its own; both are removed.
func placed(t *testing.T) (Places, string) {
	t.Helper()
	dir := t.TempDir()
	p, target := Places{filepath.Join(dir, "places")}, filepath.Join(dir, "pod a", "mount")
	t.Cleanup(func() {
		for unix.Unmount(target, unix.MNT_DETACH) == nil {
		}
		files, _ := filepath.Glob(filepath.Join(p.Dir, "*"))
		for _, f := range files {
			if err := free(f); err != nil {
				t.Error(err)
			}
		}
	})
	return p, target
}

func gone(t *testing.T, p Places, target string) {
	t.Helper()
	if _, err := os.Lstat(target); !os.IsNotExist(err) {
		t.Errorf("%s is still there: %v", target, err)
	}
	if left, _ := os.ReadDir(p.Dir); len(left) != 0 {
		t.Errorf("%s is still there", left[0])
	}
	if list, err := p.List(); err != nil || slices.ContainsFunc(list, func(h Placeholder) bool { return h.Target == target }) {
		t.Errorf("%+v, %v", list, err)
	}
}

func TestDirectory(t *testing.T) {
	needRoot(t)
	p, target := placed(t)
	first, err := p.Directory(key, target)
	if err != nil {
		t.Fatal(err)
	}
	again, err := p.Directory(key, target)
	if err != nil || again != first {
		t.Errorf("again: %d, not %d: %v", again, first, err)
	}
	if list, err := p.List(); err != nil || !slices.Contains(list, Placeholder{Directory, key, target, first}) {
		t.Errorf("%+v, %v", list, err)
	}
	if _, err := os.Stat(filepath.Join(target, Marker)); err != nil {
		t.Error(err)
	}
	stands := Placeholder{Directory, key, target, first}
	if !p.Stands(stands) || p.Stands(Placeholder{Directory, key, target, first + 1}) || p.Stands(Placeholder{Directory, key, filepath.Dir(target), first}) {
		t.Error("what stands is not told from what does not")
	}
	// As the kubelet does for a subPath, and a stray write.
	if err := os.MkdirAll(filepath.Join(target, "a/b"), 0o750); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(filepath.Join(target, "large"), make([]byte, 1<<20), 0o600); err == nil {
		t.Error("1 MiB fits in the placeholder")
	}
	if _, err := p.Directory(other, target); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("another volume at the same path: %v", err)
	}
	if err := p.Remove(other, target); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("remove another volume's: %v", err)
	}
	defer func() {
		if p.Stands(stands) {
			t.Error("it stands after it was removed")
		}
	}()
	// A process within it does not keep it.
	busy := exec.Command("sleep", "60")
	busy.Dir = target
	if err := busy.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = busy.Process.Kill(); _ = busy.Wait() }()
	for range 2 {
		if err := p.Remove(key, target); err != nil {
			t.Fatal(err)
		}
		gone(t, p, target)
	}
}

func TestDirectoryFaults(t *testing.T) {
	needRoot(t)
	p, target := placed(t)
	if err := os.MkdirAll(target, 0o750); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(target, "data"), []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := p.Remove(key, target); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a directory with files: %v", err)
	}
	if b, err := os.ReadFile(filepath.Join(target, "data")); err != nil || string(b) != "precious" {
		t.Errorf("%q, %v", b, err)
	}
	if err := unix.Mount("other", target, "tmpfs", 0, "size=4k"); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Directory(key, target); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a mount of another: %v", err)
	}
	if err := p.Remove(key, target); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("remove a mount of another: %v", err)
	}
	for _, bad := range []string{"", "/", "relative", "/a/../b", "/a/"} {
		if _, err := p.Directory(key, bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("target %q: %v", bad, err)
		}
	}
	for _, bad := range []string{"", "../x", "ABC", strings.Repeat("a", 49)} {
		if _, err := p.Directory(bad, target); !errdefs.IsInvalidArgument(err) {
			t.Errorf("key %q: %v", bad, err)
		}
	}
}

func TestDevice(t *testing.T) {
	needRoot(t)
	p, target := placed(t)
	first, err := p.Device(key, target)
	if err != nil {
		t.Fatal(err)
	}
	again, err := p.Device(key, target)
	if err != nil || again != first {
		t.Errorf("again: %d, not %d: %v", again, first, err)
	}
	if list, err := p.List(); err != nil || !slices.Contains(list, Placeholder{Device, key, target, first}) {
		t.Errorf("%+v, %v", list, err)
	}
	stands := Placeholder{Device, key, target, first}
	if !p.Stands(stands) || p.Stands(Placeholder{Device, other, target, first}) || p.Stands(Placeholder{Directory, key, target, first}) {
		t.Error("what stands is not told from what does not")
	}
	defer func() {
		if p.Stands(stands) {
			t.Error("it stands after it was removed")
		}
	}()
	// The kubelet's own hold on it.
	out, err := exec.Command("losetup", "-f", "--show", target).CombinedOutput()
	if err != nil {
		t.Fatalf("losetup: %v: %s", err, out)
	}
	if out, err := exec.Command("losetup", "-d", strings.TrimSpace(string(out))).CombinedOutput(); err != nil {
		t.Fatalf("losetup -d: %v: %s", err, out)
	}
	beside := filepath.Join(filepath.Dir(target), "second")
	second, err := p.Device(key, beside)
	if err != nil || second == first {
		t.Errorf("a second path: %d, %v", second, err)
	}
	if err := p.Remove(key, beside); err != nil {
		t.Error(err)
	}
	for range 2 {
		if err := p.Remove(key, target); err != nil {
			t.Fatal(err)
		}
		gone(t, p, target)
	}
	if _, err := loopStatus(unix.Minor(first)); err == nil {
		t.Error("the loop device is still set up")
	}
}

// TestDeviceCrashes has a device made again and removed from where a crash can leave it.
func TestDeviceCrashes(t *testing.T) {
	needRoot(t)
	for name, crash := range map[string]func(p Places, target string) error{
		"file made": func(p Places, target string) error { return p.makeFile(key, target) },
		"loop set up": func(p Places, target string) error {
			_ = p.makeFile(key, target)
			_, err := p.loop(key, target)
			return err
		},
		"unbound": func(p Places, target string) error {
			_, err := p.Device(key, target)
			_ = unix.Unmount(target, 0)
			return err
		},
		"loop lost": func(p Places, target string) error {
			dev, err := p.Device(key, target)
			d, _ := openLoop(unix.Minor(dev), os.O_RDONLY)
			_ = unix.IoctlSetInt(int(d.Fd()), unix.LOOP_CLR_FD, 0)
			_ = d.Close()
			return err
		},
	} {
		for _, again := range []bool{true, false} {
			p, target := placed(t)
			if err := crash(p, target); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if again {
				dev, err := p.Device(key, target)
				if err != nil {
					t.Errorf("%s: again: %v", name, err)
				} else if info, err := loopStatus(unix.Minor(dev)); err != nil || !isFile(info, p.file(key, target)) {
					t.Errorf("%s: the device is not the file's: %v", name, err)
				}
			}
			if err := p.Remove(key, target); err != nil {
				t.Errorf("%s: remove: %v", name, err)
			}
			gone(t, p, target)
		}
	}
	p, target := placed(t)
	if err := p.makeFile(key, target); err != nil {
		t.Fatal(err)
	}
	if _, err := p.loop(key, target); err != nil {
		t.Fatal(err)
	}
	if list, err := p.List(); err != nil || !slices.Contains(list, Placeholder{Device, key, "", 0}) {
		t.Errorf("%+v, %v", list, err)
	}
	if err := p.Collect(key); err != nil {
		t.Error(err)
	}
	gone(t, p, target)
}
