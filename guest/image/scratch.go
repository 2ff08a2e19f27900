package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/containerd/errdefs"
)

// Scratch makes path a sparse raw ext4 image of size bytes (a multiple of 1 MiB, at
// least 64 MiB), empty, with project quotas, and returns the bytes it allocates. Copying it is all
// a Pod's scratch disk costs, so it holds as few blocks as ext4 allows: no journal (the
// disk does not outlive the VM), inode tables and bitmaps left uninitialised, few inodes'
// worth of groups' metadata packed at the front.
func Scratch(ctx context.Context, path string, size int64) (int64, error) {
	if size < 64<<20 || size%(1<<20) != 0 {
		return 0, fmt.Errorf("scratch disk of %d bytes: %w: at least 64 MiB, whole MiB", size, errdefs.ErrInvalidArgument)
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), ".scratch-")
	if err != nil {
		return 0, err
	}
	defer os.Remove(tmp.Name()) // fails once it is renamed
	if err := errors.Join(tmp.Truncate(size), tmp.Chmod(0o644), tmp.Close()); err != nil {
		return 0, err
	}
	_, err = command(ctx, "", "/usr/sbin/mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-L", "scratch",
		// One inode for 32 KiB, as many as a root file system's writable layer needs.
		"-i", "32768", "-I", "256", "-G", strconv.Itoa(flexGroups(size)),
		"-O", "^has_journal,^resize_inode,^huge_file,project,quota,sparse_super2,flex_bg,extent,metadata_csum,64bit",
		"-E", "lazy_itable_init=1,nodiscard,quotatype=prjquota,num_backup_sb=0,packed_meta_blocks=1,root_owner=0:0",
		tmp.Name())
	if err != nil {
		return 0, fmt.Errorf("scratch disk (Debian package e2fsprogs): %w", err)
	}
	var st syscall.Stat_t
	if err := syscall.Stat(tmp.Name(), &st); err != nil {
		return 0, err
	}
	return st.Blocks * 512, os.Rename(tmp.Name(), path)
}

// flexGroups is the power of two that puts all block groups (128 MiB each) into one
// flexible group, so all bitmaps and inode tables lie together at the front.
func flexGroups(size int64) int {
	n := 16
	for int64(n)*(128<<20) < size {
		n *= 2
	}
	return n
}
