package disk

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// copyStep bounds one copy_file_range, so that a cancelled context is seen.
const copyStep = 8 << 20

func newScratch(ctx context.Context, dir, template string, size int64) (*os.File, error) {
	src, st, err := openRegular(template)
	if err != nil {
		return nil, fmt.Errorf("scratch template: %w", err)
	}
	defer src.Close()
	dst, err := unnamed(dir)
	if err != nil {
		return nil, scratchError(dir, err)
	}
	if err := fill(ctx, dst, src, st.Size); err != nil {
		_ = dst.Close()
		return nil, scratchError(dir, err)
	}
	if err := dst.Truncate(max(size, st.Size)); err != nil {
		_ = dst.Close()
		return nil, scratchError(dir, err)
	}
	return dst, nil
}

// unnamed makes a file without a name. File systems without O_TMPFILE (overlayfs
// before 6.3, NFS) get a file whose name is removed at once.
func unnamed(dir string) (*os.File, error) {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC|unix.O_EXCL, 0o600)
	if err == nil {
		return os.NewFile(uintptr(fd), dir+"/scratch"), nil
	}
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EISDIR) {
		return nil, err
	}
	f, err := os.CreateTemp(dir, "scratch-")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

// fill copies by sharing blocks where the file system can (btrfs, XFS), else the
// data between the holes.
func fill(ctx context.Context, dst, src *os.File, size int64) error {
	if err := unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())); err == nil {
		return nil
	}
	if err := dst.Truncate(size); err != nil {
		return err
	}
	for off := int64(0); off < size; {
		start, end, err := nextData(src, off, size)
		if err != nil {
			return err
		}
		if start == size {
			return nil
		}
		if err := copyRange(ctx, dst, src, start, end); err != nil {
			return err
		}
		off = end
	}
	return nil
}

// nextData returns the next extent of data at or after off; start is size when only
// holes are left. Where holes cannot be asked for, the rest is one extent.
func nextData(src *os.File, off, size int64) (start, end int64, err error) {
	start, err = unix.Seek(int(src.Fd()), off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		return size, size, nil
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
		return off, size, nil
	case err != nil:
		return 0, 0, fmt.Errorf("find data: %w", err)
	}
	end, err = unix.Seek(int(src.Fd()), start, unix.SEEK_HOLE)
	if err != nil {
		return 0, 0, fmt.Errorf("find hole: %w", err)
	}
	return min(start, size), min(end, size), nil
}

// copyRange copies [start,end) in the kernel if it can, else through a buffer.
func copyRange(ctx context.Context, dst, src *os.File, start, end int64) error {
	inKernel := true
	var buf []byte
	for off := start; off < end; {
		if err := ctx.Err(); err != nil {
			return err
		}
		step := min(end-off, copyStep)
		if inKernel {
			r, w := off, off
			n, err := unix.CopyFileRange(int(src.Fd()), &r, int(dst.Fd()), &w, int(step), 0)
			switch {
			case err == nil && n > 0:
				off += int64(n)
				continue
			case errors.Is(err, unix.EINTR):
				continue
			case err == nil, errors.Is(err, unix.EXDEV), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOSYS):
				inKernel = false
			default:
				return err
			}
		}
		if buf == nil {
			buf = make([]byte, 1<<20)
		}
		n, err := src.ReadAt(buf[:min(step, int64(len(buf)))], off)
		if n == 0 {
			return fmt.Errorf("read template at %d: %w", off, err)
		}
		if _, err := dst.WriteAt(buf[:n], off); err != nil {
			return err
		}
		off += int64(n)
	}
	return nil
}

func scratchError(dir string, err error) error {
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("no space for a scratch disk in %s (free some, or move the state directory): %w", dir, errdefs.ErrResourceExhausted)
	case errors.Is(err, unix.ENOENT):
		return fmt.Errorf("scratch directory %s: %w", dir, errdefs.ErrNotFound)
	default:
		return fmt.Errorf("make scratch disk in %s: %w", dir, err)
	}
}
