package volume

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/containerd/errdefs"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
	"github.com/hypernetes/hypernetes/guest/hyperstart/block"
	"github.com/hypernetes/hypernetes/guest/hyperstart/storage"
)

func loop(t *testing.T) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("skipped: loop devices and mounts need root")
	}
	file := filepath.Join(t.TempDir(), "disk.raw")
	check(t, os.WriteFile(file, nil, 0o600))
	check(t, os.Truncate(file, 64<<20))
	out, err := exec.Command("losetup", "--find", "--show", file).CombinedOutput()
	if err != nil {
		t.Skipf("skipped: no loop device: %v: %s", err, out)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "-d", dev).CombinedOutput(); err != nil {
			t.Errorf("losetup -d: %v: %s", err, out)
		}
	})
	return dev
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// disks are the disks of a pretended guest; find waits for gate, if there is one.
type disks struct {
	dev  map[string]string
	gate chan struct{}
}

func (d *disks) host() block.Host {
	return block.Host{
		Find: func(ctx context.Context, serial string) (string, error) {
			if d.gate != nil {
				select {
				case <-d.gate:
				case <-ctx.Done():
					return "", ctx.Err()
				}
			}
			if dev := d.dev[serial]; dev != "" {
				return dev, nil
			}
			return "", errdefs.ErrNotFound
		},
		Run: func(ctx context.Context, argv ...string) (int, string, error) {
			out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput()
			return 0, string(out), err
		},
	}
}

func newSet(t *testing.T, d *disks) *Set {
	t.Helper()
	dir := t.TempDir()
	s := New(dir, func() (*storage.Scratch, error) { return nil, errdefs.ErrFailedPrecondition }, d.host())
	t.Cleanup(func() {
		if err := s.Close(context.Background()); err != nil {
			t.Errorf("close: %v", err)
		}
		if b, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(b), dir) {
			t.Errorf("something is still mounted below %s (%v)", dir, err)
		}
	})
	return s
}

func onDisk(name, serial string, directories ...string) *hyperstart.Volume {
	return &hyperstart.Volume{Name: name, Kind: &hyperstart.Volume_Block{Block: &hyperstart.BlockVolume{
		Serial: serial, FsType: "ext4", MayFormat: true, FsGroup: proto.Uint32(4321), Directories: directories,
	}}}
}

func TestBlockVolumes(t *testing.T) {
	d := &disks{dev: map[string]string{"one": loop(t), "two": loop(t), "raw": loop(t)}}
	s := newSet(t, d)
	for range 2 {
		check(t, s.Ensure(t.Context(), onDisk("a", "one", "sub/deep"), onDisk("b", "two")))
	}
	var st unix.Stat_t
	check(t, unix.Stat(filepath.Join(s.dir, "a/sub/deep"), &st))
	if st.Gid != 4321 || st.Mode&0o7777 != 0o2775 {
		t.Errorf("subPath: group %d mode %o", st.Gid, st.Mode)
	}
	vs, err := s.DiskStats(t.Context(), "one")
	check(t, err)
	if vs.DeviceBytes != 64<<20 || vs.TotalBytes == 0 || vs.UsedBytes+vs.AvailableBytes > vs.TotalBytes || vs.TotalInodes == 0 || vs.Abnormal != "" {
		t.Errorf("stats: %v", vs)
	}
	if vs, err = s.DiskStats(t.Context(), "raw"); err != nil || vs.DeviceBytes != 64<<20 {
		t.Errorf("stats of a disk nobody uses yet: %v %v", vs, err)
	}
	dev, err := s.Device(t.Context(), "raw")
	check(t, err)
	if dev != d.dev["raw"] {
		t.Errorf("raw device is %s", dev)
	}
	if vs, err = s.DiskStats(t.Context(), "raw"); err != nil || vs.DeviceBytes != 64<<20 || vs.TotalBytes != 0 {
		t.Errorf("raw stats: %v %v", vs, err)
	}
	if g, err := s.Grow(t.Context(), "raw", 64<<20); err != nil || g.DeviceBytes != 64<<20 || g.TotalBytes != 0 {
		t.Errorf("raw grow: %v %v", g, err)
	}
	if g, err := s.Grow(t.Context(), "one", 64<<20); err != nil || g.DeviceBytes != 64<<20 || g.TotalBytes == 0 {
		t.Errorf("grow: %v %v", g, err)
	}
	if len(s.Usage()) != 0 {
		t.Errorf("usage of empty directories: %v", s.Usage())
	}
	readOnly := onDisk("a", "one")
	readOnly.GetBlock().ReadOnly = true
	for what, err := range map[string]error{
		"same disk twice":        s.Ensure(t.Context(), onDisk("c", "one")),
		"other disk":             s.Ensure(t.Context(), onDisk("a", "two")),
		"read-only now":          s.Ensure(t.Context(), readOnly),
		"volume of a raw device": s.Ensure(t.Context(), onDisk("d", "raw")),
		"another kind":           s.Ensure(t.Context(), &hyperstart.Volume{Name: "a", Kind: &hyperstart.Volume_EmptyDir{}}),
		"files into it":          s.Put("a", &hyperstart.FileTree{}, false),
		"raw device of a volume": func() error { _, err := s.Device(t.Context(), "one"); return err }(),
	} {
		if !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for what, err := range map[string]error{
		"no disk":  s.Ensure(t.Context(), onDisk("x", "none")),
		"stats":    func() error { _, err := s.DiskStats(t.Context(), "none"); return err }(),
		"strange":  func() error { _, err := s.DiskStats(t.Context(), "other"); return err }(),
		"grow":     func() error { _, err := s.Grow(t.Context(), "other", 1); return err }(),
		"no disk2": s.Ensure(t.Context(), onDisk("x", "none")),
	} {
		if !errdefs.IsNotFound(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestBlockDirectories(t *testing.T) {
	s := newSet(t, &disks{dev: map[string]string{"one": loop(t)}})
	check(t, s.Ensure(t.Context(), onDisk("a", "one", "v1")))
	dir, outside := filepath.Join(s.dir, "a"), t.TempDir()
	check(t, os.Symlink("v1", dir+"/current"))
	check(t, os.Symlink(outside, dir+"/out"))
	check(t, os.Symlink("none", dir+"/dangling"))
	check(t, os.WriteFile(dir+"/file", nil, 0o600))
	check(t, s.Ensure(t.Context(), onDisk("a", "one", "current/data", "file")))
	if _, err := os.Stat(dir + "/v1/data"); err != nil {
		t.Error(err)
	}
	for _, p := range []string{"out", "out/x", "dangling", "file/x", "../x", "/x"} {
		if err := s.Ensure(t.Context(), onDisk("a", "one", p)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", p, err)
		}
	}
	if names, _ := os.ReadDir(outside); len(names) != 0 {
		t.Errorf("made %v outside", names)
	}
}

// TestSlowDisk has a disk that comes late: calls end in time, and a later one finds what
// the first began.
func TestSlowDisk(t *testing.T) {
	d := &disks{dev: map[string]string{"one": loop(t)}, gate: make(chan struct{})}
	s := newSet(t, d)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for range 2 {
		if err := s.Ensure(ctx, onDisk("a", "one")); !errdefs.IsUnavailable(err) {
			t.Errorf("while it waits: %v", err)
		}
	}
	e, err := s.entry("a", false)
	check(t, err)
	e.mu.Lock()
	if len(s.Usage()) != 0 { // does not wait
		t.Errorf("usage: %v", s.Usage())
	}
	e.mu.Unlock()
	if _, err := s.DiskStats(ctx, "one"); !errdefs.IsUnavailable(err) {
		t.Errorf("stats while it waits: %v", err)
	}
	close(d.gate)
	check(t, s.Ensure(t.Context(), onDisk("a", "one")))
}

func TestCloseEndsMounting(t *testing.T) {
	d := &disks{dev: map[string]string{}, gate: make(chan struct{})}
	s := newSet(t, d)
	check(t, s.Begin(onDisk("a", "one")))
	check(t, s.Close(t.Context()))
	if err := s.Ensure(t.Context(), onDisk("a", "one")); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("after close: %v", err)
	}
	bad := onDisk("b", "two")
	bad.GetBlock().FsType = "ntfs"
	if err := s.Begin(bad); !errdefs.IsInvalidArgument(err) {
		t.Errorf("bad kind: %v", err)
	}
}

// TestHungDisk closes a set whose disk never answers.
func TestHungDisk(t *testing.T) {
	hung := make(chan struct{})
	s := New(t.TempDir(), nil, block.Host{Find: func(context.Context, string) (string, error) {
		<-hung
		return "", errors.New("gone")
	}})
	check(t, s.Begin(onDisk("a", "one")))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Close(ctx); err == nil || !strings.Contains(err.Error(), "does not answer") {
		t.Errorf("close: %v", err)
	}
	close(hung)
	check(t, s.Close(t.Context()))
}
