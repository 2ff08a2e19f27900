package block

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"
)

const (
	groupRW     = 0o660
	groupSearch = 0o110 | unix.S_ISGID
	// maxDepth bounds the directories that are open at a time.
	maxDepth = 8192
	names    = 512
)

// own gives everything below dir to a group, as the kubelet does (SetVolumeOwnership):
// group, its read and write bits, and of directories search and set-gid. The root comes
// last, so that one interrupted starts again. Unless always, a root that is right is
// taken for the whole.
func own(ctx context.Context, dir string, gid uint32, always bool) error {
	root, err := os.OpenFile(dir, unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer root.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(root.Fd()), &st); err != nil {
		return err
	}
	if !always && owned(&st, gid) {
		return nil
	}
	if err := ownBelow(ctx, root, gid, 0); err != nil {
		return err
	}
	return give(int(root.Fd()), ".", gid)
}

func owned(st *unix.Stat_t, gid uint32) bool {
	want := st.Mode
	if st.Mode&unix.S_IFMT != unix.S_IFLNK {
		want |= groupRW
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		want |= groupSearch
	}
	return st.Gid == gid && st.Mode == want
}

func ownBelow(ctx context.Context, dir *os.File, gid uint32, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("directories are nested deeper than %d: %w", maxDepth, errdefs.ErrInvalidArgument)
	}
	fd := int(dir.Fd())
	for {
		list, err := dir.Readdirnames(names)
		for _, name := range list {
			if err := ownOne(ctx, fd, name, gid, depth); err != nil {
				return err
			}
		}
		if len(list) == 0 {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
	}
}

func ownOne(ctx context.Context, dir int, name string, gid uint32, depth int) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &os.PathError{Op: "stat", Path: name, Err: err}
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return &os.PathError{Op: "open", Path: name, Err: err}
		}
		sub := os.NewFile(uintptr(fd), name)
		err = ownBelow(ctx, sub, gid, depth+1)
		sub.Close()
		if err != nil {
			return err
		}
	}
	if owned(&st, gid) {
		return nil
	}
	return give(dir, name, gid)
}

// give changes one file, a symbolic link itself and never what it names.
func give(dir int, name string, gid uint32) error {
	fd, err := unix.Openat(dir, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: name, Err: err}
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return &os.PathError{Op: "stat", Path: name, Err: err}
	}
	err = unix.Fchownat(fd, "", -1, int(gid), unix.AT_EMPTY_PATH)
	if err == nil && st.Mode&unix.S_IFMT != unix.S_IFLNK {
		mode := st.Mode&0o7777 | groupRW
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			mode |= groupSearch
		}
		// After chown, which clears set-uid; by the descriptor's name, as O_PATH's have no fchmod.
		err = unix.Chmod("/proc/self/fd/"+strconv.Itoa(fd), mode)
	}
	// An immutable file stays as it is, as with the kubelet.
	if err != nil && !errors.Is(err, unix.EPERM) {
		return &os.PathError{Op: "chown", Path: name, Err: err}
	}
	return nil
}
