package local

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Reflink tells whether the file system copies files at a moment.
func (s *Store) Reflink() bool {
	s.reflinkOnce.Do(func() {
		a, err := os.CreateTemp(s.dir, tmpPrefix)
		if err != nil {
			return
		}
		defer os.Remove(a.Name())
		defer a.Close()
		b, err := os.CreateTemp(s.dir, tmpPrefix)
		if err != nil {
			return
		}
		defer os.Remove(b.Name())
		defer b.Close()
		if _, err := a.Write(make([]byte, 4096)); err != nil {
			return
		}
		s.reflink = unix.IoctlFileClone(int(b.Fd()), int(a.Fd())) == nil
	})
	return s.reflink
}

// copyFile makes an empty file a copy of another one: at a moment where the file system
// can, otherwise what is written of it, so that it stays sparse. Nobody may write to the
// source then.
func copyFile(to *os.File, path string) error {
	from, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer from.Close()
	err = unix.IoctlFileClone(int(to.Fd()), int(from.Fd()))
	if err == nil || !cannotClone(err) {
		return err
	}
	st, err := from.Stat()
	if err != nil {
		return err
	}
	if err := to.Truncate(st.Size()); err != nil {
		return err
	}
	for at := int64(0); at < st.Size(); {
		begin, err := from.Seek(at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil // a hole to the end
		}
		if err != nil {
			return fmt.Errorf("%s: %w", filepath.Base(path), err)
		}
		end, err := from.Seek(begin, unix.SEEK_HOLE)
		if err != nil {
			return fmt.Errorf("%s: %w", filepath.Base(path), err)
		}
		if err := copyRange(to, from, begin, end); err != nil {
			return err
		}
		at = end
	}
	return nil
}

func cannotClone(err error) bool {
	return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EXDEV) ||
		errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS)
}

func copyRange(to, from *os.File, begin, end int64) error {
	if _, err := from.Seek(begin, io.SeekStart); err != nil {
		return err
	}
	if _, err := to.Seek(begin, io.SeekStart); err != nil {
		return err
	}
	// The kernel copies where it can (copy_file_range).
	n, err := io.CopyN(to, from, end-begin)
	if err == nil && n != end-begin {
		err = io.ErrUnexpectedEOF
	}
	return err
}
