package record

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/mountinfo"
)

// TestMemory: secrets are in memory, mounted once where the store is on a disk and not at
// all where it is in memory anyway.
func TestMemory(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("skipped: only root mounts")
	}
	disk, err := os.MkdirTemp(".", "memory-test-") // the checkout is on a disk
	if err != nil {
		t.Fatal(err)
	}
	if disk, err = filepath.Abs(disk); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = unix.Unmount(filepath.Join(disk, "secrets"), unix.MNT_DETACH)
		_ = os.RemoveAll(disk)
	})
	mounts := func(dir string) (n int) {
		all, err := mountinfo.Read("self")
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range all {
			if m.Target == filepath.Join(dir, "secrets") && m.Type == "tmpfs" {
				n++
			}
		}
		return n
	}
	s, st := Store{Root: disk}, stagedFile()
	for range 2 {
		if err := s.Memory(); err != nil {
			t.Fatal(err)
		}
		if err := s.Stage(st, map[string][]byte{SecretKey: []byte("k")}); err != nil {
			t.Fatal(err)
		}
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(filepath.Join(s.secrets(st.Key()), SecretKey), &fs); err != nil || int64(fs.Type) != unix.TMPFS_MAGIC || mounts(disk) > 1 {
		t.Errorf("the secret is on a file system %#x, %d mounts, %v", fs.Type, mounts(disk), err)
	}
	if err := s.Unstage(st.Key()); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(filepath.Join(disk, "secrets")); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	shm := memory(t)
	if err := (Store{Root: shm}).Memory(); err != nil || mounts(shm) != 0 {
		t.Errorf("%d mounts, %v", mounts(shm), err)
	}
}
