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

// tree is what subdirectories are made like.
type tree struct {
	paths    []string
	mode     uint32
	uid, gid int
	// follow symbolic links that stay in the volume, as the kubelet does: what has lived
	// longer than the Pod may consist of them.
	follow bool
}

// ensureDirectories makes a volume's subdirectories that containers mount by subPath.
// Containers may have written into the volume, so nothing is followed out of it, and in
// an empty directory a symbolic link on the way is refused.
func ensureDirectories(e *entry, v *hyperstart.Volume) error {
	d, b := v.GetEmptyDir(), v.GetBlock()
	if len(d.GetDirectories())+len(b.GetDirectories()) == 0 {
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
	t := tree{paths: d.GetDirectories(), mode: d.GetMode(), uid: int(d.GetUid()), gid: int(d.GetGid())}
	if b != nil {
		var st unix.Stat_t
		if err := unix.Stat(e.path, &st); err != nil {
			return fmt.Errorf("stat volume %s: %w", v.GetName(), err)
		}
		t = tree{paths: b.Directories, mode: st.Mode, gid: int(st.Gid), follow: true}
	}
	for _, p := range t.paths {
		if err := ensureDirectory(root, p, t); err != nil {
			return fmt.Errorf("volume %s: subPath %.200q: %w", v.GetName(), p, err)
		}
	}
	return nil
}

func ensureDirectory(root *os.Root, p string, t tree) error {
	if err := files.CheckPath(p); err != nil {
		return err
	}
	elements := strings.Split(p, "/")
	for i := range elements {
		sub := strings.Join(elements[:i+1], "/")
		st, err := root.Lstat(sub)
		if err == nil && st.Mode()&fs.ModeSymlink != 0 && t.follow {
			if st, err = root.Stat(sub); err != nil {
				return fmt.Errorf("%q is a symbolic link to nothing in the volume: %w: %w", sub, errdefs.ErrInvalidArgument, err)
			}
		}
		switch {
		case errors.Is(err, fs.ErrNotExist):
			if err := makeDirectory(root, sub, t); err != nil {
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

func makeDirectory(root *os.Root, sub string, t tree) error {
	if err := root.Mkdir(sub, 0o700); err != nil {
		if errors.Is(err, unix.EROFS) {
			return fmt.Errorf("%q is not there, and the volume is read-only: %w", sub, errdefs.ErrFailedPrecondition)
		}
		return err
	}
	if err := root.Lchown(sub, t.uid, t.gid); err != nil {
		return err
	}
	bits := t.mode & 0o7777
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
