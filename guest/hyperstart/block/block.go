// Package block turns disks into mounted file systems: blank ones are formatted if that
// is allowed, others checked, mounted, grown to their disk's size and given to a group.
//
// It owns what may happen to a disk's content. Its first rule is that it never formats
// what it has not read and found blank, so an unreadable, foreign or damaged disk is an
// error and stays as it is. It must not know containers, volumes' names or the protocol.
package block

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"
)

// Host is what a mount works with.
type Host struct {
	// Find waits for the disk with a serial and returns its device node.
	Find func(ctx context.Context, serial string) (string, error)
	// Run runs a program to its end and returns its exit status and what it said.
	Run func(ctx context.Context, argv ...string) (status int, output string, err error)
}

// Spec is a file system as it should be.
type Spec struct {
	Serial string
	// Type is "ext4" or "xfs".
	Type     string
	Options  []string
	ReadOnly bool
	// MayFormat allows formatting a disk that is blank.
	MayFormat bool
	// Group of all files, nil to leave them; GroupAlways looks at each even if the
	// root has it.
	Group       *uint32
	GroupAlways bool
}

// Mounted is a file system that is mounted. Its methods may be called concurrently.
type Mounted struct {
	spec   Spec
	device string
	target string
}

// Check says what is wrong with a spec, without looking at a disk.
func (s Spec) Check() error {
	if _, err := kindOf(s.Type); err != nil {
		return err
	}
	_, _, err := mountOptions(s.Type, s.Options, s.ReadOnly)
	return err
}

// Mount mounts the disk's file system at target, an existing directory. What it does is
// repeatable: interrupted at any point, the next one goes on.
func Mount(ctx context.Context, h Host, s Spec, target string) (*Mounted, error) {
	m, err := mount(ctx, h, s, target)
	if err != nil {
		return nil, fmt.Errorf("disk %s: %w", s.Serial, err)
	}
	return m, nil
}

func mount(ctx context.Context, h Host, s Spec, target string) (*Mounted, error) {
	k, err := kindOf(s.Type)
	if err != nil {
		return nil, err
	}
	flags, data, err := mountOptions(s.Type, s.Options, s.ReadOnly)
	if err != nil {
		return nil, err
	}
	dev, err := h.Find(ctx, s.Serial)
	if err != nil {
		return nil, err
	}
	if err := prepare(ctx, h, k, s, dev); err != nil {
		return nil, err
	}
	if err := unix.Mount(dev, target, s.Type, flags, data); err != nil {
		return nil, mountError(err, s)
	}
	m := &Mounted{spec: s, device: dev, target: target}
	if err := m.fit(ctx); err != nil {
		return nil, errors.Join(err, unix.Unmount(target, 0))
	}
	return m, nil
}

func mountError(err error, s Spec) error {
	switch {
	case errors.Is(err, unix.ENODEV):
		return fmt.Errorf("the guest's kernel has no %s; remedy: another kernel (H8S_KERNEL=hyper has it): %w", s.Type, errdefs.ErrNotImplemented)
	case errors.Is(err, unix.EROFS) && s.ReadOnly:
		return fmt.Errorf("its %s file system was not unmounted cleanly and cannot be repaired read-only; remedy: mount it writable once, or mount option %s to read it as it is: %w: %w",
			s.Type, map[string]string{"ext4": "noload", "xfs": "norecovery"}[s.Type], errdefs.ErrFailedPrecondition, err)
	}
	return fmt.Errorf("mount as %s (options %.200q): %w", s.Type, s.Options, err)
}

// prepare leaves a file system of that kind on the disk that can be mounted, or fails.
func prepare(ctx context.Context, h Host, k kind, s Spec, dev string) error {
	f, err := open(dev, s.ReadOnly)
	if err != nil {
		return err
	}
	defer f.Close()
	if ro, err := unix.IoctlGetInt(int(f.Fd()), unix.BLKROGET); err == nil && ro != 0 && !s.ReadOnly {
		return errReadOnly
	}
	c, err := inspect(f)
	if err != nil {
		return err
	}
	switch {
	case c.kind == s.Type && c.unmountable != "":
		return fmt.Errorf("its %s file system cannot be mounted: %s: %w", s.Type, c.unmountable, errdefs.ErrFailedPrecondition)
	case c.kind == s.Type && c.unfinished:
		return k.format(ctx, h, s, f)
	case c.kind == s.Type && c.marked && !s.ReadOnly:
		// Somebody mounted it before the mark was taken away: it has data.
		err = unmark(f)
	case c.kind == s.Type:
	case c.kind != "":
		return fmt.Errorf("holds %s, not %s, and is left as it is; remedy: the right fsType, or an empty volume: %w", c.kind, s.Type, errdefs.ErrFailedPrecondition)
	default:
		return k.formatBlank(ctx, h, s, f, c)
	}
	if err != nil || s.ReadOnly {
		return err
	}
	return k.check(ctx, h, c, dev)
}

var errReadOnly = fmt.Errorf("cannot be written; remedy: mount the volume read-only: %w", errdefs.ErrFailedPrecondition)

// open opens a disk that nobody has mounted.
func open(dev string, readOnly bool) (*os.File, error) {
	mode := unix.O_CLOEXEC
	if !readOnly {
		mode |= unix.O_RDWR
	}
	fd, err := unix.Open(dev, mode|unix.O_EXCL, 0)
	if err == nil {
		// Only asked, not kept: what formats and checks wants it exclusively, too.
		_ = unix.Close(fd)
		fd, err = unix.Open(dev, mode, 0)
	}
	switch {
	case errors.Is(err, unix.EBUSY):
		return nil, fmt.Errorf("%s is in use: %w", dev, errdefs.ErrFailedPrecondition)
	case errors.Is(err, unix.EROFS), errors.Is(err, unix.EACCES):
		return nil, fmt.Errorf("%w: %w", errReadOnly, err)
	case err != nil:
		return nil, &os.PathError{Op: "open", Path: dev, Err: err}
	}
	return os.NewFile(uintptr(fd), dev), nil
}

func sizeOf(f *os.File) (int64, error) {
	n, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return 0, fmt.Errorf("size of %s: %w", f.Name(), err)
	}
	return n, nil
}

// Size of the disk with that device node.
func Size(dev string) (int64, error) {
	f, err := os.Open(dev)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return sizeOf(f)
}

// fit makes the mounted file system as large as its disk and gives it to its group.
func (m *Mounted) fit(ctx context.Context) error {
	if m.spec.ReadOnly {
		return nil
	}
	if _, err := m.Grow(); err != nil {
		return err
	}
	if m.spec.Group == nil {
		return nil
	}
	if err := own(ctx, m.target, *m.spec.Group, m.spec.GroupAlways); err != nil {
		return fmt.Errorf("give files to group %d: %w", *m.spec.Group, err)
	}
	return nil
}

// Device is the disk's node.
func (m *Mounted) Device() string { return m.device }

// Stats are a file system's numbers.
type Stats struct {
	Device, Total, Used, Available      uint64
	Inodes, InodesUsed, InodesAvailable uint64
	// Abnormal is what is known against it, "" for nothing.
	Abnormal string
}

// Stats measures the file system.
func (m *Mounted) Stats() (Stats, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(m.target, &st); err != nil {
		return Stats{}, fmt.Errorf("measure disk %s: %w", m.spec.Serial, err)
	}
	size, err := Size(m.device)
	if err != nil {
		return Stats{Abnormal: fmt.Sprintf("the disk cannot be opened: %v", err)}, nil
	}
	bs := uint64(st.Frsize)
	return Stats{
		Device: uint64(size), Total: st.Blocks * bs, Used: (st.Blocks - min(st.Bfree, st.Blocks)) * bs, Available: st.Bavail * bs,
		Inodes: st.Files, InodesUsed: st.Files - min(st.Ffree, st.Files), InodesAvailable: st.Ffree,
		Abnormal: m.abnormal(&st, "/sys"),
	}, nil
}

// abnormal looks for what the kernel holds against the file system or its disk.
func (m *Mounted) abnormal(st *unix.Statfs_t, sys string) string {
	name := filepath.Base(m.device)
	if state := word(filepath.Join(sys, "block", name, "device/state")); state != "" && state != "running" {
		return "the disk is " + state
	}
	const remedy = "; remedy: start the Pod anew, which checks it"
	// Newer kernels (and stable updates of older ones) do not set the flag on errors.
	if !m.spec.ReadOnly && st.Flags&unix.ST_RDONLY != 0 {
		return "the file system went read-only after an error" + remedy
	}
	if m.spec.Type == "ext4" {
		switch n := word(filepath.Join(sys, "fs/ext4", name, "errors_count")); {
		case n == "" || n == "0":
			return ""
		case m.spec.ReadOnly || slices.Contains(m.spec.Options, "errors=continue"):
			return "the file system has recorded " + n + " errors" + remedy
		default: // of this mount: a check would have cleared older ones
			return "the file system went read-only after " + n + " errors" + remedy
		}
	}
	// xfs says nothing, it fails everything.
	if _, err := os.ReadDir(m.target); errors.Is(err, unix.EIO) {
		return "the file system shut down after an error; remedy: restart the Pod"
	}
	return ""
}

func word(path string) string {
	b, err := os.ReadFile(path)
	if err != nil || len(b) > 64 {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// Close writes back and unmounts. It returns nil only when nothing of the file system is
// mounted any more, wherever containers may have had it.
func (m *Mounted) Close(ctx context.Context) error {
	// First what matters most: whatever fails then is only unclean, not lost.
	errs := []error{m.sync()}
	if err := unix.Unmount(m.target, 0); err != nil && !errors.Is(err, unix.EINVAL) {
		errs = append(errs, fmt.Errorf("unmount disk %s: %w", m.spec.Serial, err))
		if !m.spec.ReadOnly {
			// Clean all the same, if nobody has a file open for writing.
			_ = unix.Mount("", m.target, "", unix.MS_REMOUNT|unix.MS_RDONLY, "")
		}
		return errors.Join(errs...)
	}
	return errors.Join(append(errs, m.free(ctx))...)
}

func (m *Mounted) sync() error {
	if m.spec.ReadOnly {
		return nil
	}
	f, err := os.Open(m.target)
	if err != nil {
		return fmt.Errorf("write back disk %s: %w", m.spec.Serial, err)
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return fmt.Errorf("write back disk %s: %w", m.spec.Serial, err)
	}
	return nil
}
