package reset

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/cluster/layout"
)

func TestRemove(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounts need root")
	}
	dir := t.TempDir()
	l := layout.Node{Name: "reset-test", State: dir + "/state", Run: dir + "/run"}
	if plan := Plan(l); len(plan) != 0 {
		t.Errorf("plan of nothing: %v", plan)
	}
	for _, d := range []string{l.StatePath("a", "mnt"), l.Run} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mount("tmpfs", l.StatePath("a", "mnt"), "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	file := l.StatePath("fixed")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	setImmutable(t, file)
	kinds := map[string]int{}
	for _, item := range Plan(l) {
		kinds[item.Kind]++
	}
	if kinds["mount"] != 1 || kinds["directory"] != 2 {
		t.Errorf("plan: %v", kinds)
	}
	if err := Remove(t.Context(), l); err != nil {
		clearImmutable(file)
		t.Fatal(err)
	}
	if plan := Plan(l); len(plan) != 0 {
		t.Errorf("left: %v", plan)
	}
	if err := Remove(t.Context(), l); err != nil {
		t.Errorf("second time: %v", err)
	}
	if err := WaitDaemonGone(t.Context(), l); err != nil {
		t.Errorf("no daemon: %v", err)
	}
}

// TestLoops: devices of raw volumes go with the node, also those that the kubelet made on
// top of them, and also if nobody knows their files by name any more.
func TestLoops(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounts and loop devices need root")
	}
	dir := t.TempDir()
	l := layout.Node{Name: "reset-test", State: dir + "/state", Run: dir + "/run"}
	inside := dir + "/inside"
	for _, d := range []string{l.StatePath("volumes", "placeholders"), inside} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mount(l.StatePath("volumes"), inside, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(inside, unix.MNT_DETACH) })
	if err := os.WriteFile(inside+"/placeholders/key-1.img", make([]byte, 64<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	setup := func(file string) string {
		out, err := exec.Command("losetup", "--find", "--show", file).CombinedOutput()
		if err != nil {
			t.Skipf("skipped: no loop devices here: %v: %s", err, out)
		}
		dev := strings.TrimSpace(string(out))
		t.Cleanup(func() { _ = exec.Command("losetup", "--detach", dev).Run() })
		return dev
	}
	lower := setup(inside + "/placeholders/key-1.img")
	upper := setup(lower)
	if err := unix.Unmount(inside, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	if got := loops(l); !slices.Equal(got, []string{upper, lower}) {
		t.Errorf("loops %v, want %s and %s", got, upper, lower)
	}
	if err := Remove(t.Context(), l); err != nil {
		t.Fatal(err)
	}
	for _, dev := range []string{lower, upper} {
		if _, err := os.Stat("/sys/block/" + filepath.Base(dev) + "/loop"); err == nil {
			t.Errorf("%s is left", dev)
		}
	}
}

// setImmutable is best effort: not every file system has the flag.
func setImmutable(t *testing.T, path string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, immutableFlag); err != nil {
		t.Logf("no immutable files here: %v", err)
	}
}

func TestUnder(t *testing.T) {
	for path, want := range map[string]bool{"/a/b": true, "/a/b/c": true, "/a/bc": false, "/a": false} {
		if got := under(path, "/a/b"); got != want {
			t.Errorf("%s: %t", path, got)
		}
	}
}

// TestRemoveStaysInside gives a node that an operator keeps elsewhere, with links out of it
// and something of the operator's mounted at its root.
func TestRemoveStaysInside(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounts need root")
	}
	dir := t.TempDir()
	outside, disk := dir+"/outside", dir+"/disk"
	l := layout.Node{Name: "reset-test", State: dir + "/state", Run: dir + "/run"}
	for _, d := range []string{outside, disk, l.Run} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	precious := outside + "/precious"
	if err := os.WriteFile(precious, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(disk, l.State); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(disk, unix.MNT_DETACH) })
	for _, link := range []string{l.StatePath("dir"), l.RunPath("dir")} {
		if err := os.Symlink(outside, link); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(disk+"/with space", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", disk+"/with space", "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	if err := Remove(t.Context(), l); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(precious); err != nil {
		t.Errorf("a link was followed: %v", err)
	}
	if target, err := os.Readlink(l.State); err != nil || target != disk {
		t.Errorf("the operator's link: %q %v", target, err)
	}
	if entries, err := os.ReadDir(disk); err != nil || len(entries) > 0 || !isMountPoint(disk) {
		t.Errorf("the operator's disk holds %v %v", entries, err)
	}
	if plan := Plan(l); len(plan) != 0 {
		t.Errorf("left: %v", plan)
	}
}
