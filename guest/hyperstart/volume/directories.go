package volume

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
	"github.com/hypernetes/hypernetes/guest/hyperstart/files"
)

// ensureDirectories makes an empty directory's subdirectories that containers mount
// by subPath. Containers may have written into the volume, so nothing is followed out
// of it, and a symbolic link on the way is refused.
func ensureDirectories(e *entry, v *hyperstart.Volume) error {
	d := v.GetEmptyDir()
	if d == nil || len(d.Directories) == 0 {
		return nil
	}
	if e.tree != nil {
		return fmt.Errorf("volume %s is no empty directory: %w", v.GetName(), errdefs.ErrFailedPrecondition)
	}
	root, err := os.OpenRoot(e.path)
	if err != nil {
		return fmt.Errorf("open volume %s: %w", v.GetName(), err)
	}
	defer root.Close()
	for _, p := range d.Directories {
		if err := ensureDirectory(root, p, d); err != nil {
			return fmt.Errorf("volume %s: subPath %.200q: %w", v.GetName(), p, err)
		}
	}
	return nil
}

func ensureDirectory(root *os.Root, p string, d *hyperstart.EmptyDir) error {
	if err := files.CheckPath(p); err != nil {
		return err
	}
	elements := strings.Split(p, "/")
	for i := range elements {
		sub := strings.Join(elements[:i+1], "/")
		st, err := root.Lstat(sub)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			if err := makeDirectory(root, sub, d); err != nil {
				return err
			}
		case err != nil:
			return err
		case st.Mode()&fs.ModeSymlink != 0:
			return fmt.Errorf("%q is a symbolic link: %w", sub, errdefs.ErrInvalidArgument)
		case !st.IsDir() && i < len(elements)-1:
			return fmt.Errorf("%q is no directory: %w", sub, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

func makeDirectory(root *os.Root, sub string, d *hyperstart.EmptyDir) error {
	if err := root.Mkdir(sub, 0o700); err != nil {
		return err
	}
	if err := root.Lchown(sub, int(d.Uid), int(d.Gid)); err != nil {
		return err
	}
	bits := d.Mode & 0o7777
	if bits == 0 {
		bits = 0o777
	}
	m := fs.FileMode(bits & 0o777)
	if bits&unix.S_ISGID != 0 {
		m |= fs.ModeSetgid
	}
	if bits&unix.S_ISVTX != 0 {
		m |= fs.ModeSticky
	}
	return root.Chmod(sub, m)
}
