package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/runtime/storage"
	"github.com/hypernetes/hypernetes/runtime/vmm"
	"github.com/hypernetes/hypernetes/volume/record"
)

// diskFile is an image on a real file system, opened to bypass the page cache.
func diskFile(t *testing.T, size int64) (*os.File, string) {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "h8s-qemu-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := filepath.Join(dir, "disk.raw")
	if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, size)); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Skipf("skipped: %v: /var/tmp is on a file system without O_DIRECT", err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f, path
}

// TestPersistentDisk: what a guest wrote is on the file, a killed VM's disk and lock are
// free, and a disk that grows is seen to.
func TestPersistentDisk(t *testing.T) {
	files := variants(t)
	for _, machine := range []string{"q35", "microvm"} {
		t.Run(machine, func(t *testing.T) {
			f, path := diskFile(t, 1<<20)
			lock, err := os.Create(filepath.Join(t.TempDir(), "lock"))
			if err != nil {
				t.Fatal(err)
			}
			if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
				t.Fatal(err)
			}
			c := config(files[len(files)-1])
			c.Machine = machine
			c.Hold = []*os.File{lock}
			c.Disks = []vmm.Disk{{Serial: "vol", File: f, Discard: true, Persistent: true, Throttle: &vmm.Throttle{IOPS: 1000, WriteBytes: 10 << 20}}}
			g := boot(t, c)
			lockPath := lock.Name()
			_ = lock.Close()
			free := func() error {
				l, err := os.Open(lockPath)
				if err != nil {
					return err
				}
				defer l.Close()
				return unix.Flock(int(l.Fd()), unix.LOCK_EX|unix.LOCK_NB)
			}
			if err := free(); !errors.Is(err, unix.EWOULDBLOCK) {
				t.Errorf("the vm does not hold the lock: %v", err)
			}
			g.ask("find vol", "size=2048 ro=0")
			g.ask("put vol written", "put")
			ctx, cancel := context.WithTimeout(t.Context(), bootTimeout)
			defer cancel()
			if err := os.Truncate(path, 3<<20); err != nil {
				t.Fatal(err)
			}
			if err := g.GrowDisk(ctx, "vol", 3<<20, nil); err != nil {
				t.Fatal(err)
			}
			g.ask("rescan vol", "6144")
			if st, err := os.Stat(path); err != nil || st.Size() != 3<<20 {
				t.Errorf("%v, %v", st, err)
			}
			for _, limits := range []vmm.Throttle{{ReadIOPS: 20, Bytes: 1 << 20}, {}} {
				if err := g.ThrottleDisk(ctx, "vol", limits); err != nil {
					t.Fatal(err)
				}
				if got := g.limits(t, "vol"); got != limits {
					t.Errorf("limits %+v, want %+v", got, limits)
				}
				g.ask("put vol written", "put")
			}
			if err := g.ThrottleDisk(ctx, "other", vmm.Throttle{}); !errdefs.IsNotFound(err) {
				t.Errorf("another disk: %v", err)
			}
			if err := g.RemoveDisk(ctx, "vol"); !errdefs.IsFailedPrecondition(err) {
				t.Errorf("a persistent disk is removed: %v", err)
			}
			if err := g.GrowDisk(ctx, "other", 1, nil); !errdefs.IsNotFound(err) {
				t.Errorf("another disk: %v", err)
			}
			flags := fdFlags(t, g.PID(), path)
			if flags&unix.O_DIRECT == 0 {
				t.Errorf("the image is open with flags %#o", flags)
			}
			if err := g.Kill(); err != nil {
				t.Fatal(err)
			}
			<-g.Done()
			if err := free(); err != nil {
				t.Errorf("the vm is gone, its lock is not: %v", err)
			}
			if b, err := os.ReadFile(path); err != nil || !strings.HasPrefix(string(b), "written\x00") {
				t.Errorf("the file has %.20q, %v", b, err)
			}
		})
	}
}

// limits are those that QEMU has for a disk.
func (g *guest) limits(t *testing.T, serial string) vmm.Throttle {
	t.Helper()
	b, err := g.qmp.Execute(t.Context(), "qom-get", map[string]any{"path": "/objects/" + groupName(serial), "property": "limits"})
	if err != nil {
		t.Fatal(err)
	}
	var l map[string]int64
	if err := json.Unmarshal(b, &l); err != nil {
		t.Fatal(err)
	}
	return vmm.Throttle{
		IOPS: l["iops-total"], ReadIOPS: l["iops-read"], WriteIOPS: l["iops-write"],
		Bytes: l["bps-total"], ReadBytes: l["bps-read"], WriteBytes: l["bps-write"],
	}
}

// TestSharedDisk: two VMs write one disk if it is shared, and only then.
func TestSharedDisk(t *testing.T) {
	files := variants(t)
	c := config(files[len(files)-1])
	f, path := diskFile(t, 1<<20)
	c.Disks = []vmm.Disk{{Serial: "vol", File: f, Persistent: true, Shared: true}}
	one := boot(t, c)
	again := func() *os.File {
		f, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = f.Close() })
		return f
	}
	other := c
	other.ID, other.Disks = "other", []vmm.Disk{{Serial: "vol", File: again(), Persistent: true, Shared: true}}
	two := boot(t, other)
	one.ask("put vol one", "put")
	two.ask("put vol two", "put")
	if b, err := os.ReadFile(path); err != nil || !strings.HasPrefix(string(b), "two\x00") {
		t.Errorf("the file has %.20q, %v", b, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), bootTimeout)
	defer cancel()
	other.ID, other.Disks = "third", []vmm.Disk{{Serial: "vol", File: again(), Persistent: true}}
	if v, err := New(host(t)).Start(ctx, other); err == nil {
		_ = v.Kill()
		t.Error("a vm has a shared disk for itself")
	}
}

// fdFlags returns how a process has a file open.
func fdFlags(t *testing.T, pid int, path string) int {
	t.Helper()
	found, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	all := 0
	for _, fd := range found {
		if to, _ := os.Readlink(fd); to != path {
			continue
		}
		flags := 0
		for line := range strings.Lines(read(t, fmt.Sprintf("/proc/%d/fdinfo/%s", pid, filepath.Base(fd)))) {
			_, _ = fmt.Sscanf(line, "flags: %o", &flags)
		}
		all |= flags
	}
	return all
}

// served is a storage daemon with the volume vol, a file.
func served(ctx context.Context, t *testing.T) (*storage.Daemon, string) {
	t.Helper()
	if _, err := exec.LookPath("qemu-storage-daemon"); err != nil {
		t.Skip("skipped: no qemu-storage-daemon: install the Debian package qemu-system-common")
	}
	f, path := diskFile(t, 1<<20)
	_ = f.Close()
	if err := os.Chmod(path, 0o666); err != nil { // the daemon opens it as its own user
		t.Fatal(err)
	}
	d, err := storage.Start(ctx, storage.Config{
		ID: "served", Dir: t.TempDir(), UID: 1879048194,
		Volumes: []storage.Volume{{Serial: "vol", Source: record.Source{File: &record.File{Path: path}}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d, path
}

// TestServedDiskHangs: a storage daemon that waits for its Ceph keeps neither QEMU from
// answering nor the VM from ending.
func TestServedDiskHangs(t *testing.T) {
	files := variants(t)
	ctx, cancel := context.WithTimeout(t.Context(), bootTimeout)
	defer cancel()
	d, path := served(ctx, t)
	nbd, err := d.Connect(ctx, "vol")
	if err != nil {
		t.Fatal(err)
	}
	defer nbd.Conn.Close()
	c := config(files[len(files)-1])
	c.Disks = []vmm.Disk{{Serial: "vol", NBD: nbd, Persistent: true}}
	g := boot(t, c)
	g.ask("put vol one", "put")
	hang := func(text string) {
		t.Helper()
		if err := unix.Kill(d.PID(), unix.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Kill(d.PID(), unix.SIGCONT) })
		g.send("put vol " + text)
		for range 10 {
			ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
			defer cancel()
			for _, command := range []string{"query-status", "query-blockstats"} {
				if _, err := g.qmp.Execute(ctx, command, nil); err != nil {
					t.Fatalf("%s while the storage hangs: %v", command, err)
				}
			}
			<-time.After(50 * time.Millisecond)
		}
	}
	hang("two")
	if err := unix.Kill(d.PID(), unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if got := g.line(); got != "put" {
		t.Errorf("when the storage is back the guest says %q", got)
	}
	hang("three")
	if err := g.Kill(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-g.Done():
	case <-time.After(30 * time.Second):
		t.Fatal("a VM whose storage hangs does not end")
	}
	if b, err := os.ReadFile(path); err != nil || !strings.HasPrefix(string(b), "two\x00") {
		t.Errorf("the file has %.20q, %v", b, err)
	}
}

// TestServedDisk: a disk behind a storage daemon is written, grows and fails as one.
func TestServedDisk(t *testing.T) {
	files := variants(t)
	ctx, cancel := context.WithTimeout(t.Context(), bootTimeout)
	defer cancel()
	d, path := served(ctx, t)
	connect := func() *vmm.NBD {
		nbd, err := d.Connect(ctx, "vol")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = nbd.Conn.Close() })
		return nbd
	}
	c := config(files[len(files)-1])
	c.Disks = []vmm.Disk{{Serial: "vol", NBD: connect(), Discard: true, Persistent: true, Throttle: &vmm.Throttle{IOPS: 1000}}}
	g := boot(t, c)
	g.ask("find vol", "size=2048 ro=0")
	g.ask("put vol written", "put")
	for mib := range int64(2) { // the second time there is an older node to go
		size := (mib + 2) << 20
		if err := os.Truncate(path, size); err != nil {
			t.Fatal(err)
		}
		if got, err := d.Grow(ctx, "vol"); err != nil || got != size {
			t.Fatalf("served with %d, %v", got, err)
		}
		if err := g.GrowDisk(ctx, "vol", size, connect()); err != nil {
			t.Fatal(err)
		}
		if err := d.Settle(ctx, "vol"); err != nil {
			t.Fatal(err)
		}
		g.ask("rescan vol", fmt.Sprint(size/512))
		g.ask("put vol written"+fmt.Sprint(mib), "put")
	}
	// A connection that is none: the disk goes on with the one it has, and grows later.
	dead := connect()
	if err := unix.Shutdown(int(dead.Conn.Fd()), unix.SHUT_RDWR); err != nil {
		t.Fatal(err)
	}
	if err := g.GrowDisk(ctx, "vol", 4<<20, dead); err == nil {
		t.Error("grown over a dead connection")
	}
	g.ask("put vol written1", "put")
	if _, err := d.Grow(ctx, "vol"); err != nil {
		t.Fatal(err)
	}
	if err := g.GrowDisk(ctx, "vol", 3<<20, connect()); err != nil {
		t.Fatal(err)
	}
	if err := d.Settle(ctx, "vol"); err != nil {
		t.Fatal(err)
	}
	g.ask("put vol written1", "put")
	if err := g.GrowDisk(ctx, "vol", 4<<20, nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("grown without a connection: %v", err)
	}
	if b, err := os.ReadFile(path); err != nil || !strings.HasPrefix(string(b), "written1\x00") {
		t.Errorf("the file has %.20q, %v", b, err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	g.send("put vol lost")
	if got := g.line(); !strings.HasPrefix(got, "error") {
		t.Errorf("a write without the daemon: %s", got)
	}
	if g.Faults("vol") == 0 || g.Faults("other") != 0 {
		t.Errorf("%d faults", g.Faults("vol"))
	}
}
