package block

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// root skips a test that needs disks and mounts.
func root(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("skipped: loop devices and mounts need root")
	}
	if out, err := exec.Command("losetup", "-f").CombinedOutput(); err != nil {
		t.Skipf("skipped: no loop device: %v: %s", err, out)
	}
}

// drive is a loop device on a sparse file.
type drive struct {
	t         *testing.T
	file, dev string
}

func newDrive(t *testing.T, size int64) *drive {
	t.Helper()
	d := &drive{t: t, file: filepath.Join(t.TempDir(), "disk.raw")}
	check(t, os.WriteFile(d.file, nil, 0o600))
	check(t, os.Truncate(d.file, size))
	d.plug()
	t.Cleanup(d.pull)
	return d
}

func (d *drive) plug(options ...string) {
	d.t.Helper()
	d.dev = strings.TrimSpace(d.command("losetup", append(options, "--find", "--show", d.file)...))
}

func (d *drive) pull() {
	if d.dev != "" {
		d.command("losetup", "-d", d.dev)
		d.dev = ""
	}
}

func (d *drive) command(name string, args ...string) string {
	d.t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		d.t.Fatalf("%s %q: %v: %s", name, args, err, out)
	}
	return string(out)
}

// write puts text on the disk.
func (d *drive) write(at int64, text string) {
	d.t.Helper()
	f, err := os.OpenFile(d.dev, os.O_RDWR, 0)
	check(d.t, err)
	defer f.Close()
	_, err = f.WriteAt([]byte(text), at)
	check(d.t, errors.Join(err, f.Sync()))
}

// writes counts what the disk was asked to write.
func (d *drive) writes() string {
	d.t.Helper()
	b, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(d.dev), "stat"))
	check(d.t, err)
	f := strings.Fields(string(b))
	if len(f) < 7 {
		d.t.Fatalf("stat: %q", b)
	}
	return f[4]
}

// bytes is everything on the disk.
func (d *drive) bytes() string {
	d.t.Helper()
	b, err := os.ReadFile(d.dev)
	check(d.t, err)
	return string(b)
}

// host runs programs as a test may; what it ran is in ran.
type host struct {
	d   *drive
	ran []string
	// before is called before a program runs; its error stands for the program.
	before func(argv []string) error
}

func (h *host) Host() Host {
	return Host{
		Find: func(context.Context, string) (string, error) { return h.d.dev, nil },
		Run: func(ctx context.Context, argv ...string) (int, string, error) {
			h.ran = append(h.ran, filepath.Base(argv[0]))
			if h.before != nil {
				if err := h.before(argv); err != nil {
					return 0, "", err
				}
			}
			out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput()
			if x := (*exec.ExitError)(nil); errors.As(err, &x) {
				return x.ExitCode(), string(out), nil
			}
			return 0, string(out), err
		},
	}
}

func (h *host) did() string {
	s := strings.Join(h.ran, " ")
	h.ran = nil
	return s
}

// mounted mounts, runs use in the file system and closes it.
func (h *host) mounted(s Spec, use func(m *Mounted, dir string)) {
	t := h.d.t
	t.Helper()
	dir := t.TempDir()
	m, err := Mount(t.Context(), h.Host(), s, dir)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := m.Close(t.Context()); err != nil {
			t.Errorf("close: %v", err)
			_ = unix.Unmount(dir, unix.MNT_DETACH)
		}
	}()
	if use != nil {
		use(m, dir)
	}
}

// fails mounts and expects an error with these words.
func (h *host) fails(s Spec, words ...string) {
	t := h.d.t
	t.Helper()
	dir := t.TempDir()
	m, err := Mount(t.Context(), h.Host(), s, dir)
	if err == nil {
		t.Error("mounted")
		check(t, m.Close(t.Context()))
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q lacks %q", err, w)
		}
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
