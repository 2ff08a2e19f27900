package badinput

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/test/artifacts"
)

// up runs `h8s up` for the node nobody has, which must fail.
func up(t *testing.T, env []string, flags ...string) result {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("this process is not root")
	}
	t.Cleanup(func() {
		// A test that fails because the node came up must not leave it.
		if r := run(t, nil, "h8s", "reset", "--name", nobody, "--yes"); r.code != 0 {
			t.Errorf("h8s reset: %s", r)
		}
	})
	r := run(t, env, "h8s", append([]string{"up", "--name", nobody}, flags...)...)
	t.Logf("h8s up %s: exit code %d\n%s", strings.Join(flags, " "), r.code, r.stderr)
	return r
}

// freePort is a loopback port nobody listens on now.
func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// TestUpPortTaken: the API server's or a published port is somebody else's, who is
// named.
func TestUpPortTaken(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	taken := l.Addr().(*net.TCPAddr).Port
	for _, flags := range [][]string{
		{"--api-port", fmt.Sprint(taken)},
		{"--api-port", fmt.Sprint(freePort(t)), "--publish", fmt.Sprint(taken)},
	} {
		r := up(t, nil, flags...)
		refused(t, r, 12, fmt.Sprintf(`127\.0\.0\.1:%d is in use by badinput\.test(.|\n)*--api-port(.|\n)*--publish`, taken))
		untouched(t, nobody)
	}
}

// TestUpWithoutQEMU: h8s on a PATH without QEMU names the package that has it.
func TestUpWithoutQEMU(t *testing.T) {
	r := up(t, []string{"PATH=" + pathWithout(t, "qemu-system-x86_64")}, "--api-port", fmt.Sprint(freePort(t)))
	refused(t, r, 11, `qemu-system-x86_64(.|\n)*apt-get install qemu-system-x86`)
	untouched(t, nobody)
}

// TestUpWithoutKernel: a tree without the guest's kernel names it and how to make it.
func TestUpWithoutKernel(t *testing.T) {
	tree := treeWithout(t, "vmlinux")
	r := up(t, []string{"H8S_OUT=" + tree}, "--api-port", fmt.Sprint(freePort(t)))
	refused(t, r, 11, `vmlinux(.|\n)*make guest`)
	untouched(t, nobody)
}

// TestUpWithoutComponent: likewise for a program.
func TestUpWithoutComponent(t *testing.T) {
	tree := t.TempDir()
	if err := os.Symlink(filepath.Join(artifacts.Dir(), "share"), filepath.Join(tree, "share")); err != nil {
		t.Fatal(err)
	}
	r := up(t, []string{"H8S_OUT=" + tree}, "--api-port", fmt.Sprint(freePort(t)))
	refused(t, r, 11, `bin/containerd(.|\n)*make build`)
	untouched(t, nobody)
}

// TestUpDiskFull: the node's state is on a file system that is too small.
func TestUpDiskFull(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("this process is not root")
	}
	dir := "/var/lib/h8s/" + nobody
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=24m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = unix.Unmount(dir, unix.MNT_DETACH) // h8s reset has done it, normally
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
		untouched(t, nobody)
	})
	r := up(t, nil, "--api-port", fmt.Sprint(freePort(t)))
	refused(t, r, 17, dir+`(.|\n)*(F|f)ree `)

	// Whoever insists gets the same reason from the first component that fails, and
	// reset cleans up even there.
	r = up(t, nil, "--ignore-preflight", "--api-port", fmt.Sprint(freePort(t)))
	refused(t, r, 17, `no space left on device(.|\n)*Free space`)
}

// pathWithout is a PATH whose only directory has links to every program of the real
// one but name.
func pathWithout(t *testing.T, name string) string {
	t.Helper()
	dir := t.TempDir()
	for _, from := range filepath.SplitList(os.Getenv("PATH")) {
		entries, err := os.ReadDir(from)
		if err != nil {
			continue
		}
		for _, e := range entries {
			if e.Name() != name {
				_ = os.Symlink(filepath.Join(from, e.Name()), filepath.Join(dir, e.Name())) // the first in PATH wins
			}
		}
	}
	return dir
}

// treeWithout is a tree of artefacts, all links into the real one, without one file
// of share.
func treeWithout(t *testing.T, name string) string {
	t.Helper()
	tree := t.TempDir()
	for _, sub := range []string{"bin", "cni", "images", "libexec"} {
		if err := os.Symlink(filepath.Join(artifacts.Dir(), sub), filepath.Join(tree, sub)); err != nil {
			t.Fatal(err)
		}
	}
	share := filepath.Join(tree, "share")
	if err := os.Mkdir(share, 0o755); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(filepath.Join(artifacts.Dir(), "share"))
	if err != nil {
		t.Skipf("no guest: %v", err)
	}
	for _, e := range entries {
		if e.Name() == name {
			continue
		}
		if err := os.Symlink(filepath.Join(artifacts.Dir(), "share", e.Name()), filepath.Join(share, e.Name())); err != nil {
			t.Fatal(err)
		}
	}
	return tree
}
