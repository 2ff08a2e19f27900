package block

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/errdefs"
)

// kind is a sort of file system this package makes and checks.
type kind struct {
	name string
	// mkfs is the command that formats, but for the device.
	mkfs []string
	// repair is the command that checks before a writable mount, nil if mounting is
	// enough; status up to repaired is success.
	repair   []string
	repaired int
	// mark: formatting needs our own mark to be told from a file system when it is
	// interrupted.
	mark bool
	min  int64
}

// Block size 4096 whatever the disk's size: small volumes grow. No discard: the disk is blank. The inode tables' zeroing is left to the
// kernel's thread, behind the mount. No reserved blocks, as the kubelet's formatter.
var kinds = map[string]kind{
	"ext4": {
		name: "ext4",
		mkfs: []string{"/usr/sbin/mkfs.ext4", "-q", "-b", "4096", "-m", "0", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard"},
		// -p: what is safe to repair, and otherwise a person is asked.
		repair: []string{"/usr/sbin/e2fsck", "-p"}, repaired: 3,
		mark: true, min: 1 << 20,
	},
	// Mounting replays xfs' log; xfs_repair is for people. An interrupted mkfs.xfs leaves
	// sb_inprogress set.
	"xfs": {name: "xfs", mkfs: []string{"/usr/sbin/mkfs.xfs", "-q", "-K", "-f"}, min: 300 << 20},
}

func kindOf(name string) (kind, error) {
	k, ok := kinds[name]
	if !ok {
		return kind{}, fmt.Errorf("fsType %.40q: must be ext4 or xfs: %w", name, errdefs.ErrInvalidArgument)
	}
	return k, nil
}

// Has tells whether the guest can make a kind of file system.
func Has(name string) bool {
	k, ok := kinds[name]
	if !ok {
		return false
	}
	if _, err := os.Stat(k.mkfs[0]); err != nil {
		return false
	}
	b, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		if strings.TrimSpace(line) == name {
			return true
		}
	}
	return false
}

// formatBlank formats a disk nothing is known of, if it may and the disk is blank.
func (k kind) formatBlank(ctx context.Context, h Host, s Spec, f *os.File, c content) error {
	switch {
	case s.ReadOnly:
		return fmt.Errorf("holds no file system, and a read-only volume is not formatted: %w", errdefs.ErrFailedPrecondition)
	case !s.MayFormat:
		return fmt.Errorf("holds no file system that is known, and may not be formatted as it was not made empty; remedy: put %s on it, or use an empty volume: %w", k.name, errdefs.ErrFailedPrecondition)
	case c.marked: // proven blank by whoever was interrupted
		return k.format(ctx, h, s, f)
	}
	if err := blank(ctx, f); err != nil {
		return err
	}
	return k.format(ctx, h, s, f)
}

// format makes a new file system. f has been found blank, or to be what a format that
// was interrupted left.
func (k kind) format(ctx context.Context, h Host, s Spec, f *os.File) error {
	if s.ReadOnly || !s.MayFormat {
		return fmt.Errorf("an interrupted formatting left it without a file system, and now it may not be formatted: %w", errdefs.ErrFailedPrecondition)
	}
	if _, err := os.Stat(k.mkfs[0]); err != nil {
		return fmt.Errorf("is blank, and this guest cannot make %s (%w); remedy: fsType ext4, or a guest image with it (H8S_KERNEL=hyper): %w", k.name, err, errdefs.ErrNotImplemented)
	}
	size, err := sizeOf(f)
	if err != nil {
		return err
	}
	if size < k.min {
		return fmt.Errorf("has %d bytes: %s needs %d: %w", size, k.name, k.min, errdefs.ErrInvalidArgument)
	}
	if k.mark {
		if err := mark(f); err != nil {
			return err
		}
	}
	if err := k.run(ctx, h, f, k.mkfs, 0); err != nil {
		return fmt.Errorf("make %s: %w", k.name, err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("make %s: %w", k.name, err)
	}
	if k.mark {
		if err := unmark(f); err != nil {
			return err
		}
	}
	c, err := inspect(f)
	if err == nil && (c.kind != k.name || c.marked || c.unmountable != "") {
		err = fmt.Errorf("holds %q after formatting: %w", c.kind, errdefs.ErrInternal)
	}
	return err
}

// check repairs what an unclean end left. A file system that says it is clean is taken
// by its word, as e2fsck -p would.
func (k kind) check(ctx context.Context, h Host, c content, dev string) error {
	if k.repair == nil || c.clean {
		return nil
	}
	status, out, err := h.Run(ctx, append(k.repair, dev)...)
	if err != nil {
		return fmt.Errorf("check %s: %w", k.name, err)
	}
	if status > k.repaired {
		return fmt.Errorf("%s file system is damaged and %s does not repair it by itself (status %d: %.500s); remedy: repair it as a raw block volume, or restore a snapshot: %w",
			k.name, strings.Join(k.repair, " "), status, lastLines(out), errdefs.ErrDataLoss)
	}
	return nil
}

// run runs a program on the disk.
func (k kind) run(ctx context.Context, h Host, f *os.File, argv []string, ok int) error {
	status, out, err := h.Run(ctx, append(append([]string{}, argv...), f.Name())...)
	if err != nil {
		return err
	}
	if status > ok {
		return fmt.Errorf("%s: status %d: %.500s", argv[0], status, lastLines(out))
	}
	return nil
}

// lastLines is the end of a program's output on one line.
func lastLines(out string) string {
	lines := strings.FieldsFunc(out, func(r rune) bool { return r == '\n' || r == '\r' })
	if len(lines) > 4 {
		lines = lines[len(lines)-4:]
	}
	return strings.ToValidUTF8(strings.Join(lines, "; "), "?")
}

// markText says that a disk was blank and is being formatted. mke2fs writes its
// superblock last, so what it leaves when it is interrupted could not be told from data.
var markText = []byte("hypernetes: this disk was blank and is being formatted; it holds nothing\n")

// markAt is where the mark is: where mke2fs writes nothing, among inode tables that it
// leaves to the kernel or, of a small disk, near the end.
func markAt(size int64) int64 { return min(headBytes-64<<10, size-128<<10) }

func marked(f *os.File, size int64) (bool, error) {
	at := markAt(size)
	if at < inspectBytes {
		return false, nil
	}
	b := make([]byte, len(markText))
	err := readAt(f, b, at)
	return bytes.Equal(b, markText), err
}

// mark writes the mark, unmark takes it away if it is there: it must be gone before
// anybody mounts.
func mark(f *os.File) error { return put(f, markText) }

func unmark(f *os.File) error {
	size, err := sizeOf(f)
	if err != nil {
		return err
	}
	if there, err := marked(f, size); err != nil || !there {
		return err
	}
	return put(f, make([]byte, len(markText)))
}

func put(f *os.File, b []byte) error {
	size, err := sizeOf(f)
	if err == nil {
		_, err = f.WriteAt(b, markAt(size))
	}
	if err = errors.Join(err, f.Sync()); err != nil {
		return fmt.Errorf("mark disk as being formatted: %w", err)
	}
	return nil
}
