// Package vmuser gives every VMM process a user id of its own, so that VMMs of two Pods
// have nothing in common for the kernel.
//
// It owns the lock files that say which ids are taken. It must not know what runs as them.
package vmuser

import (
	"errors"
	"fmt"
	"hash/fnv"
	"os"
	"path/filepath"
	"strconv"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Dir is the lock files' directory below the shims' state directory.
const Dir = "users"

// User is an allocated id; it is free again when Release is called or the process ends.
type User struct {
	// ID is used as user and group id.
	ID   int
	file *os.File
}

// Take allocates one of the ids [base, base+count) for the name; dir holds the lock
// files and is made if it is missing.
//
// Errors: errdefs.ErrResourceExhausted if all are taken.
func Take(dir string, base, count int, name string) (*User, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("user id locks: %w", err)
	}
	// Starting at a place of the name's own, the first try nearly always succeeds.
	h := fnv.New32a()
	_, _ = h.Write([]byte(name))
	start := int(h.Sum32() % uint32(count))
	for i := range count {
		id := base + (start+i)%count
		f, err := lock(filepath.Join(dir, strconv.Itoa(id)))
		if errors.Is(err, unix.EWOULDBLOCK) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("lock user id %d: %w", id, err)
		}
		return &User{ID: id, file: f}, nil
	}
	return nil, fmt.Errorf("all %d user ids from %d on are taken: %w", count, base, errdefs.ErrResourceExhausted)
}

// lock opens and locks path. A holder removes its file before it unlocks, so the file
// locked here may be one that has no name any more: then it is tried again.
func lock(path string) (*os.File, error) {
	for {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return nil, err
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			_ = f.Close()
			return nil, err
		}
		ours, err1 := f.Stat()
		named, err2 := os.Stat(path)
		if err1 == nil && err2 == nil && os.SameFile(ours, named) {
			return f, nil
		}
		_ = f.Close()
		if err1 != nil || err2 != nil && !errors.Is(err2, os.ErrNotExist) {
			return nil, errors.Join(err1, err2)
		}
	}
}

// Sweep removes the lock files whose holders are dead. They keep no id taken, but a
// file for every VM that was ever killed would stay.
func Sweep(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	errs := []error{err}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		// Removed while it is locked, as by a holder: see lock.
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			ours, err1 := f.Stat()
			named, err2 := os.Stat(path)
			if err1 == nil && err2 == nil && os.SameFile(ours, named) {
				errs = append(errs, os.Remove(path))
			}
		}
		_ = f.Close()
	}
	return errors.Join(errs...)
}

// Release frees the id. It is idempotent and does nothing for nil.
func (u *User) Release() {
	if u == nil || u.file == nil {
		return
	}
	_ = os.Remove(u.file.Name())
	_ = u.file.Close()
	u.file = nil
}
