package block

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"
)

const mib = 1 << 20

func ext4() Spec { return Spec{Serial: "s", Type: "ext4", MayFormat: true} }

func TestLife(t *testing.T) {
	for _, fs := range []string{"ext4", "xfs"} {
		t.Run(fs, func(t *testing.T) {
			root(t)
			if !Has(fs) {
				t.Skipf("skipped: this machine cannot make %s", fs)
			}
			d := newDrive(t, 400*mib)
			h := &host{d: d}
			grows := true
			s := Spec{Serial: "s", Type: fs, Options: []string{"noatime"}, MayFormat: true}
			h.mounted(s, func(m *Mounted, dir string) {
				st, err := m.Stats()
				check(t, err)
				if st.Device != 400*mib || st.Total < 300*mib || st.Total > 400*mib || st.Used+st.Available > st.Total || st.Inodes == 0 ||
					st.InodesUsed+st.InodesAvailable != st.Inodes || st.Abnormal != "" {
					t.Errorf("stats: %+v", st)
				}
				check(t, os.WriteFile(filepath.Join(dir, "f"), []byte("kept"), 0o600))
				if _, err := Mount(t.Context(), h.Host(), s, t.TempDir()); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "in use") {
					t.Errorf("second mount: %v", err)
				}
				// Online.
				check(t, os.Truncate(d.file, 600*mib))
				d.command("losetup", "-c", d.dev)
				n, err := AwaitSize(t.Context(), d.dev, 600*mib)
				check(t, err)
				if n != 600*mib {
					t.Errorf("disk has %d bytes", n)
				}
				if _, err = m.Grow(); errors.Is(err, unix.EPERM) {
					t.Log("not grown: this machine's root lacks CAP_SYS_RESOURCE (guesttest has it)")
					check(t, os.Truncate(d.file, 400*mib))
					grows = false
					return
				}
				check(t, err)
				if st, err = m.Stats(); err != nil || st.Total < 500*mib {
					t.Errorf("grown: %+v, %v", st, err)
				}
			})
			if got := h.did(); got != "mkfs."+fs {
				t.Errorf("first mount ran %q", got)
			}
			d.pull()
			if grows {
				check(t, os.Truncate(d.file, 800*mib))
			}
			d.plug()
			s.MayFormat = false
			h.mounted(s, func(m *Mounted, dir string) {
				if b, err := os.ReadFile(filepath.Join(dir, "f")); string(b) != "kept" {
					t.Errorf("%q, %v", b, err)
				}
				if st, err := m.Stats(); err != nil || grows && st.Total < 700*mib {
					t.Errorf("grown before: %+v, %v", st, err)
				}
			})
			if got := h.did(); got != "" {
				t.Errorf("second mount of a clean file system ran %q", got)
			}
			d.pull()
			d.plug("--read-only")
			h.fails(s, "cannot be written", "read-only")
			s.ReadOnly = true
			h.mounted(s, func(m *Mounted, dir string) {
				if err := os.WriteFile(filepath.Join(dir, "x"), nil, 0o600); !errors.Is(err, unix.EROFS) {
					t.Errorf("write: %v", err)
				}
				if st, err := m.Stats(); err != nil || st.Abnormal != "" {
					t.Errorf("stats: %+v, %v", st, err)
				}
			})
			other := ext4()
			if fs == "ext4" {
				other.Type = "xfs"
			}
			d.pull()
			d.plug()
			h.fails(other, "holds "+fs, "not "+other.Type)
		})
	}
}

func TestSmallest(t *testing.T) {
	root(t)
	d := newDrive(t, mib-4096)
	h := &host{d: d}
	h.fails(ext4(), "needs 1048576")
	d = newDrive(t, 2*mib)
	h = &host{d: d}
	h.mounted(ext4(), nil)
}

// TestForeign has disks with something on them, which must stay as they are.
func TestForeign(t *testing.T) {
	root(t)
	const size = 320 * mib
	// What sfdisk writes: a protective MBR, the table and its copy.
	table := func(d *drive) {
		d.write(510, "\x55\xaa")
		d.write(512, "EFI PART\x00\x00\x01\x00")
		d.write(size-512, "EFI PART\x00\x00\x01\x00")
	}
	at := func(off int64, text string) func(d *drive) { return func(d *drive) { d.write(off, text) } }
	for name, c := range map[string]struct {
		make func(d *drive)
		want string
	}{
		"xfs":                 {func(d *drive) { d.command("mkfs.xfs", "-q", d.dev) }, "holds xfs, not ext4"},
		"lvm":                 {at(512, "LABELONE\x01\x00"), "an LVM physical volume"},
		"luks":                {at(0, "LUKS\xba\xbe\x00\x02"), "a LUKS encrypted disk"},
		"second LUKS header":  {at(16384, "SKUL\xba\xbe\x00\x02"), "a LUKS encrypted disk"},
		"gpt":                 {table, "a GPT partition table"},
		"swap":                {func(d *drive) { d.command("mkswap", d.dev) }, "swap space"},
		"dos":                 {at(446, "\x00\x00\x00\x00\x83\x00\x00\x00\x00\x08\x00\x00\x00\x00\x02\x00"+strings.Repeat("\x00", 48)+"\x55\xaa"), "a partition table"},
		"text":                {at(0, "my data\n"), "at byte 0)"},
		"late in the head":    {at(16*mib-1, "x"), "at byte 16777215)"},
		"last byte":           {at(size-1, "x"), "holds data"},
		"in the middle":       {at(size/2+10, "x"), "holds data"},
		"second group":        {at(128*mib+0x38, "\x53\xef"), "holds data"},
		"GPT's copy":          {func(d *drive) { table(d); d.write(0, strings.Repeat("\x00", 16*mib)) }, "holds data"},
		"RAID's at the end":   {at(size-64<<10, "\xfc\x4e\x2b\xa9"), "holds data"},
		"only ext4's backups": {func(d *drive) { d.command("mkfs.ext4", "-q", d.dev); d.write(0, strings.Repeat("\x00", 16*mib)) }, "holds data"},
		"only small ext4's": {func(d *drive) {
			d.command("mkfs.ext4", "-q", "-b", "1024", d.dev)
			d.write(0, strings.Repeat("\x00", 16*mib))
		}, "holds data"},
		"xfs without its first":  {func(d *drive) { d.command("mkfs.xfs", "-q", d.dev); d.write(0, strings.Repeat("\x00", 16*mib)) }, "holds data"},
		"ext4 below LUKS":        {func(d *drive) { d.command("mkfs.ext4", "-q", d.dev); d.write(0, "LUKS\xba\xbe") }, "both ext4 and a LUKS"},
		"an external ext4 log":   {func(d *drive) { d.command("mkfs.ext4", "-q", "-O", "journal_dev", d.dev) }, "only the journal"},
		"cut short":              {func(d *drive) { check(t, os.Truncate(d.file, size/2)) }, ""},
		"unreadable in the head": {func(d *drive) { check(t, os.Truncate(d.file, 8*mib)) }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDrive(t, size)
			h := &host{d: d}
			c.make(d)
			if c.want == "" {
				// A loop device whose file was cut reads as an error on new kernels, as zeros on old.
				if f, err := os.Open(d.dev); err == nil {
					_, err = f.ReadAt(make([]byte, 4096), size-4096)
					f.Close()
					if err == nil {
						t.Skip("skipped: this kernel's loop devices make zeros of what their file has not (guesttest has real errors)")
					}
				}
				h.fails(ext4(), "cannot be read")
				if got := h.did(); got != "" {
					t.Errorf("ran %q", got)
				}
				return
			}
			unix.Sync()
			before := d.writes()
			h.fails(ext4(), c.want)
			if got := h.did(); got != "" {
				t.Errorf("ran %q", got)
			}
			unix.Sync()
			if n := d.writes(); n != before {
				t.Errorf("%s writes, %s before", n, before)
			}
		})
	}
}

func TestCutShort(t *testing.T) {
	root(t)
	for _, fs := range []string{"ext4", "xfs"} {
		d := newDrive(t, 400*mib)
		h := &host{d: d}
		d.command("mkfs."+fs, "-q", d.dev)
		d.pull()
		check(t, os.Truncate(d.file, 350*mib))
		d.plug()
		h.fails(Spec{Serial: "s", Type: fs, MayFormat: true}, "cannot be mounted", "419430400", "367001600", "cut short")
		if got := h.did(); got != "" {
			t.Errorf("ran %q", got)
		}
	}
}

func TestMayNotFormat(t *testing.T) {
	root(t)
	d := newDrive(t, 64*mib)
	h := &host{d: d}
	s := ext4()
	s.MayFormat = false
	h.fails(s, "may not be formatted")
	s.MayFormat, s.ReadOnly = true, true
	h.fails(s, "read-only volume is not formatted")
	if strings.Trim(d.bytes(), "\x00") != "" || h.did() != "" {
		t.Error("written to")
	}
}

// TestInterrupted kills formatting at its steps: the next mount formats again, but never
// what somebody has mounted.
func TestInterrupted(t *testing.T) {
	root(t)
	cut := errors.New("power cut")
	t.Run("before mkfs", func(t *testing.T) {
		h := &host{d: newDrive(t, 64*mib), before: func([]string) error { return cut }}
		h.fails(ext4(), "power cut")
		if !strings.Contains(h.d.bytes(), string(markText)) {
			t.Error("not marked")
		}
		s := ext4()
		s.MayFormat = false
		h.fails(s, "may not be formatted")
		h.before = nil
		h.mounted(ext4(), nil)
	})
	t.Run("within mkfs", func(t *testing.T) {
		h := &host{d: newDrive(t, 256*mib)}
		h.before = func(argv []string) error {
			// What mke2fs writes first and last, without the superblock.
			if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			h.d.write(1024, strings.Repeat("\x00", 1024))
			return cut
		}
		h.fails(ext4(), "power cut")
		h.before = nil
		h.mounted(ext4(), nil)
	})
	after := func(argv []string) error {
		if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return cut
	}
	t.Run("after mkfs", func(t *testing.T) {
		h := &host{d: newDrive(t, 64*mib), before: after}
		h.fails(ext4(), "power cut")
		h.before, h.ran = nil, nil
		h.mounted(ext4(), nil)
		if got := h.did(); got != "mkfs.ext4" {
			t.Errorf("ran %q", got)
		}
	})
	t.Run("mounted by somebody else", func(t *testing.T) {
		h := &host{d: newDrive(t, 64*mib), before: after}
		h.fails(ext4(), "power cut")
		h.before, h.ran = nil, nil
		dir := t.TempDir()
		check(t, unix.Mount(h.d.dev, dir, "ext4", 0, ""))
		err := os.WriteFile(filepath.Join(dir, "theirs"), nil, 0o600)
		check(t, errors.Join(err, unix.Unmount(dir, 0)))
		h.mounted(ext4(), func(_ *Mounted, dir string) {
			if _, err := os.Stat(filepath.Join(dir, "theirs")); err != nil {
				t.Error(err)
			}
		})
		if got := h.did(); got != "" {
			t.Errorf("ran %q", got)
		}
		if strings.Contains(h.d.bytes(), string(markText)) {
			t.Error("still marked")
		}
	})
	t.Run("xfs", func(t *testing.T) {
		h := &host{d: newDrive(t, 320*mib)}
		h.d.command("mkfs.xfs", "-q", h.d.dev)
		h.d.write(126, "\x01")
		s := Spec{Serial: "s", Type: "xfs"}
		h.fails(s, "may not be formatted")
		s.MayFormat = true
		h.mounted(s, nil)
	})
}

func TestUnclean(t *testing.T) {
	root(t)
	d := newDrive(t, 64*mib)
	h := &host{d: d}
	var dirty string
	h.mounted(ext4(), func(_ *Mounted, dir string) {
		check(t, os.WriteFile(filepath.Join(dir, "f"), []byte("kept"), 0o600))
		f, err := os.Open(dir)
		check(t, err)
		check(t, errors.Join(unix.Syncfs(int(f.Fd())), f.Close()))
		dirty = d.bytes() // as after a power cut
	})
	h.did()
	d.write(0, dirty)
	ro := ext4()
	ro.ReadOnly = true
	d.pull()
	d.plug("--read-only")
	h.fails(ro, "not unmounted cleanly", "noload")
	ro.Options = []string{"noload"}
	h.mounted(ro, nil)
	d.pull()
	d.plug()
	h.mounted(ext4(), func(_ *Mounted, dir string) {
		if b, err := os.ReadFile(filepath.Join(dir, "f")); string(b) != "kept" {
			t.Errorf("%q, %v", b, err)
		}
	})
	if got := h.did(); got != "e2fsck" {
		t.Errorf("ran %q", got)
	}
	// Damage e2fsck does not repair by itself.
	d.command("debugfs", "-w", "-R", "clri <2>", d.dev)
	d.command("debugfs", "-w", "-R", "ssv state 2", d.dev)
	h.fails(ext4(), "damaged", "status 4", "UNEXPECTED INCONSISTENCY")
}

func TestReadOnlyAfterError(t *testing.T) {
	root(t)
	d := newDrive(t, 64*mib)
	h := &host{d: d}
	h.mounted(ext4(), func(m *Mounted, dir string) {
		// As the kernel does it itself: mount(8)'s abort option raises a file system error.
		if err := unix.Mount("", dir, "", unix.MS_REMOUNT, "abort"); err != nil && !errors.Is(err, unix.EROFS) {
			t.Logf("abort: %v", err)
		}
		_ = os.WriteFile(filepath.Join(dir, "x"), []byte("x"), 0o600)
		st, err := m.Stats()
		check(t, err)
		if !strings.Contains(st.Abnormal, "read-only after") {
			t.Errorf("abnormal: %q", st.Abnormal)
		}
		m.spec.ReadOnly = true // nothing to write back
	})
	h.did()
	h.mounted(ext4(), func(m *Mounted, _ string) {
		if st, err := m.Stats(); err != nil || st.Abnormal != "" {
			t.Errorf("after a check: %+v, %v", st, err)
		}
	})
	if got := h.did(); got != "e2fsck" {
		t.Errorf("ran %q", got)
	}
}

func TestAbnormal(t *testing.T) {
	sys := t.TempDir()
	m := &Mounted{spec: ext4(), device: "/dev/sdq"}
	var st unix.Statfs_t
	for p, c := range map[string]struct{ value, want string }{
		"block/sdq/device/state":   {"offline\n", "the disk is offline"},
		"fs/ext4/sdq/errors_count": {"3\n", "read-only after 3 errors"},
	} {
		p = filepath.Join(sys, p)
		check(t, os.MkdirAll(filepath.Dir(p), 0o755))
		check(t, os.WriteFile(p, []byte(c.value), 0o600))
		if got := m.abnormal(&st, sys); !strings.Contains(got, c.want) {
			t.Errorf("%s: %q", p, got)
		}
		check(t, os.Remove(p))
	}
}

// TestCloseElsewhere has the file system mounted a second time, as in a container's
// namespace that is still going.
func TestCloseElsewhere(t *testing.T) {
	root(t)
	h := &host{d: newDrive(t, 64*mib)}
	dir, other := t.TempDir(), t.TempDir()
	m, err := Mount(t.Context(), h.Host(), ext4(), dir)
	check(t, err)
	check(t, unix.Mount(dir, other, "", unix.MS_BIND, ""))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := m.Close(ctx); err == nil || !strings.Contains(err.Error(), "still mounted") {
		t.Errorf("close: %v", err)
	}
	done := make(chan error, 1)
	go func() { done <- m.free(t.Context()) }()
	check(t, unix.Unmount(other, 0))
	check(t, <-done)
}

func TestSpecCheck(t *testing.T) {
	for _, s := range []Spec{{Type: "btrfs"}, {}, {Type: "ext4", Options: []string{"journal_path=/dev/sda"}}} {
		if err := s.Check(); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%+v: %v", s, err)
		}
	}
	if err := ext4().Check(); err != nil {
		t.Error(err)
	}
}
