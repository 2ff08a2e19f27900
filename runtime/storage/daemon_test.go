package storage

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/runtime/launch"
	"github.com/hypernetes/hypernetes/volume/record"
)

func TestMain(m *testing.M) {
	launch.Maybe()
	os.Exit(m.Run())
}

const testUID = 1879048195

func need(t *testing.T, programs ...string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("skipped: needs root: the daemon is confined by namespaces")
	}
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("skipped: %v", err)
		}
	}
}

func start(t *testing.T, c Config) (*Daemon, error) {
	t.Helper()
	c.ID, c.Dir, c.UID = "test", t.TempDir(), testUID
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	d, err := Start(ctx, c)
	if err == nil {
		t.Cleanup(func() {
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	return d, err
}

func fileVolume(t *testing.T) (Volume, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.raw")
	if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Chmod(path, 0o666), os.Truncate(path, 1<<20)); err != nil {
		t.Fatal(err)
	}
	return Volume{Serial: "vol", Source: record.Source{File: &record.File{Path: path}}}, path
}

// io runs qemu-io's commands on an export.
func (d *Daemon) io(t *testing.T, export string, commands ...string) string {
	t.Helper()
	args := []string{"-f", "raw", fmt.Sprintf("nbd+unix:///%s?socket=%s", export, filepath.Join(d.dir.Name(), "nbd"))}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	out, err := exec.Command("qemu-io", args...).CombinedOutput()
	return fmt.Sprint(string(out), err)
}

// TestDaemon looks at the daemon's process from outside, and at what it leaves.
func TestDaemon(t *testing.T) {
	need(t, "qemu-storage-daemon", "qemu-io")
	v, path := fileVolume(t)
	ro, _ := fileVolume(t)
	ro.Serial, ro.ReadOnly = "ro", true
	lock, err := os.Create(filepath.Join(t.TempDir(), "lock"))
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	d, err := start(t, Config{Volumes: []Volume{v, ro}, Hold: []*os.File{lock}})
	if err != nil {
		t.Fatal(err)
	}
	lockName := lock.Name()
	_ = lock.Close()
	locked := func() bool {
		f, err := os.Open(lockName)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		return errors.Is(unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB), unix.EWOULDBLOCK)
	}
	if !locked() {
		t.Error("the daemon does not hold the lock")
	}
	proc := fmt.Sprintf("/proc/%d", d.PID())
	b, err := os.ReadFile(proc + "/status")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{fmt.Sprintf("Uid:\t%d\t%[1]d\t%[1]d\t%[1]d\n", testUID), "Groups:\t \n", "NoNewPrivs:\t1\n", "Seccomp:\t2\n", "CapEff:\t0000000000000000\n"} {
		if !strings.Contains(string(b), want) {
			t.Errorf("status lacks %q", want)
		}
	}
	for _, p := range []string{"/etc", "/proc/self", "/usr/bin/sh", "/root"} {
		if _, err := os.Stat(proc + "/root" + p); err == nil {
			t.Errorf("the daemon sees %s", p)
		}
	}
	nbd, err := d.Connect(t.Context(), "vol")
	if err != nil {
		t.Fatal(err)
	}
	if n, err := unix.GetsockoptInt(int(nbd.Conn.Fd()), unix.SOL_SOCKET, unix.SO_SNDBUF); err != nil || n < 1<<20 {
		t.Errorf("requests of a MiB are sent in pieces of %d, %v", n, err)
	}
	_ = nbd.Conn.Close()
	if out := d.io(t, "v0-1", "write -P 7 0 64k", "flush"); !strings.Contains(out, "wrote 65536/65536") {
		t.Error(out)
	}
	if out := d.io(t, "v1-1", "write -P 7 0 64k"); !strings.Contains(out, "Permission denied") {
		t.Errorf("a read-only volume: %s", out)
	}
	if out := d.io(t, "other", "read 0 64k"); strings.Contains(out, "read 65536/65536") {
		t.Errorf("another export: %s", out)
	}
	if b, err := os.ReadFile(path); err != nil || b[0] != 7 || b[65535] != 7 {
		t.Error("the file is not written", err)
	}
	if err := os.Truncate(path, 2<<20); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if size, err := d.Grow(t.Context(), "vol"); err != nil || size != 2<<20 {
			t.Fatalf("%d, %v", size, err)
		}
	}
	// Until then the VMM may use any of them.
	for export, there := range map[string]bool{"v0-1": true, "v0-3": true, "v0-4": true} {
		if out := d.io(t, export, "read -P 7 0 64k"); strings.Contains(out, "read 65536/65536") != there {
			t.Errorf("before settling, %s: %s", export, out)
		}
	}
	if err := d.Settle(t.Context(), "vol"); err != nil {
		t.Fatal(err)
	}
	for export, there := range map[string]bool{"v0-1": false, "v0-3": false, "v0-4": true} {
		if out := d.io(t, export, "read -P 7 0 64k"); strings.Contains(out, "read 65536/65536") != there {
			t.Errorf("after settling, %s: %s", export, out)
		}
	}
	if size, err := d.Size("vol"); err != nil || size != 2<<20 {
		t.Errorf("%d, %v", size, err)
	}
	if out := d.io(t, "v0-4", "read -P 7 0 64k", "read 1984k 64k"); strings.Count(out, "read 65536/65536") != 2 {
		t.Error(out)
	}
	if _, err := d.Connect(t.Context(), "other"); !errdefs.IsNotFound(err) {
		t.Errorf("another volume: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if locked() {
		t.Error("the daemon is gone, its lock is not")
	}
	if left, _ := os.ReadDir(d.dir.Name()); len(left) > 0 {
		t.Errorf("left %v", left)
	}
}

// TestUnreachable: who does not answer makes an error that names it, in bounded time.
func TestUnreachable(t *testing.T) {
	need(t, "qemu-storage-daemon")
	// Accepts connections and says nothing.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	silent := l.Addr().String()
	for name, v := range map[string]Volume{
		"rbd":   {Serial: "v", Source: record.Source{RBD: &record.RBD{Pool: "p", Image: "i", Monitors: []string{silent}, User: "u"}}, Secrets: map[string][]byte{record.SecretKey: []byte(keyringKey)}},
		"iscsi": {Serial: "v", Source: record.Source{ISCSI: &record.ISCSI{Portal: silent, Target: "iqn.2010-10.org.openstack:x"}}},
		"gone":  {Serial: "v", Source: record.Source{File: &record.File{Path: filepath.Join(t.TempDir(), "none")}}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := start(t, Config{Volumes: []Volume{v}})
			if errdefs.IsNotFound(err) && name != "gone" {
				t.Skipf("skipped: %v", err)
			}
			if err == nil || name != "gone" && (!errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), silent)) {
				t.Errorf("%v", err)
			}
			t.Log(err)
		})
	}
}
