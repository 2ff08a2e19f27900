package record

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// Memory sees to it that secrets never get to a disk: where the store is on one, as below a
// /run that is no tmpfs, they get a tmpfs of their own in this mount namespace, for as long
// as that lives. One process calls it, before the first Stage.
func (s Store) Memory() error {
	dir := filepath.Join(s.root(), "secrets")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("secrets of volumes: %w", err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("secrets of volumes: %s: %w", dir, err)
	}
	if slices.Contains([]int64{unix.TMPFS_MAGIC, unix.RAMFS_MAGIC}, int64(st.Type)) {
		return nil
	}
	// Room for a few hundred volumes, a page and two inodes each.
	err := unix.Mount("h8s-secrets", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700,size=8m,nr_inodes=8k")
	if err != nil {
		return fmt.Errorf("secrets of volumes: %s is on a disk, and no tmpfs can be mounted there: %w", dir, err)
	}
	return nil
}
