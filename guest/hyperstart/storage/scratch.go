package storage

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"
)

// Scratch is the sandbox's writable space: an ext4 disk, or a tmpfs without one. It
// may be used concurrently.
type Scratch struct {
	dir  string
	mu   sync.Mutex
	next uint32 // project ids given out
	// quota is set when the file system accounts project quotas.
	quota bool
}

// OpenScratch mounts the disk with that serial at dir; serial "" mounts a tmpfs.
func OpenScratch(ctx context.Context, serial, dir string) (*Scratch, error) {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, fmt.Errorf("make scratch directory: %w", err)
	}
	s := &Scratch{dir: dir}
	if serial == "" {
		if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0711"); err != nil {
			return nil, fmt.Errorf("mount scratch tmpfs: %w", err)
		}
		return s, nil
	}
	dev, err := Find(ctx, serial)
	if err != nil {
		return nil, err
	}
	// Devices in a container's writable layer must work, so no nodev here. The disk
	// dies with the VM: nothing on it is worth a barrier.
	const flags = unix.MS_NOATIME
	err = unix.Mount(dev, dir, "ext4", flags, "prjquota,nobarrier,discard")
	if err != nil {
		// A kernel or a template without quotas: size limits will be refused then.
		err = unix.Mount(dev, dir, "ext4", flags, "nobarrier,discard")
	}
	if err != nil {
		return nil, fmt.Errorf("mount scratch disk %s (%s) as ext4: %w", serial, dev, err)
	}
	if err := os.Chmod(dir, 0o711); err != nil {
		return nil, fmt.Errorf("set mode of scratch directory: %w", err)
	}
	s.quota = s.accounts()
	return s, nil
}

// accounts asks for a quota and so learns whether the file system keeps any.
func (s *Scratch) accounts() bool {
	_, err := s.usage(s.dir, 1)
	return err == nil
}

// Make makes a directory of its own accounting, limited to limit bytes (0: no limit).
// A limit without quota support is an error; accounting without it is done by walking.
func (s *Scratch) Make(path string, perm fs.FileMode, limit uint64) (*Space, error) {
	abs := filepath.Join(s.dir, path)
	if limit > 0 && !s.quota {
		return nil, fmt.Errorf("size limit of %d bytes: the guest's scratch file system has no project quotas; remedy: a kernel with QFMT_V2 and a scratch disk made with -O quota,project: %w",
			limit, errdefs.ErrNotImplemented)
	}
	if err := os.MkdirAll(abs, 0o755); err != nil {
		return nil, fmt.Errorf("make scratch space: %w", err)
	}
	if err := os.Chmod(abs, perm); err != nil {
		return nil, fmt.Errorf("make scratch space: %w", err)
	}
	sp := &Space{scratch: s, Path: abs, limit: limit}
	if !s.quota {
		return sp, nil
	}
	s.mu.Lock()
	s.next++
	sp.project = s.next
	s.mu.Unlock()
	if err := s.assign(abs, sp.project, limit); err != nil {
		return nil, errors.Join(err, os.Remove(abs))
	}
	return sp, nil
}

// Dir is where scratch is mounted.
func (s *Scratch) Dir() string { return s.dir }

// Space is a directory on scratch whose use is accounted.
type Space struct {
	scratch *Scratch
	Path    string
	project uint32
	limit   uint64
}

// Usage is what a directory takes and may take.
type Usage struct{ Bytes, Inodes, Capacity uint64 }

// Usage asks the quota, or walks the tree where there is none.
func (sp *Space) Usage() (Usage, error) {
	var u Usage
	var err error
	if sp.project != 0 {
		u, err = sp.scratch.usage(sp.Path, sp.project)
	} else {
		u, err = Walk(sp.Path)
	}
	if err != nil {
		return Usage{}, err
	}
	u.Capacity = sp.limit
	if u.Capacity == 0 {
		var st unix.Statfs_t
		if err := unix.Statfs(sp.Path, &st); err != nil {
			return Usage{}, fmt.Errorf("measure scratch: %w", err)
		}
		u.Capacity = st.Blocks * uint64(st.Bsize)
	}
	return u, nil
}

// Release frees the project id's limit; the directory is the caller's to remove.
func (sp *Space) Release() error {
	if sp.project == 0 || sp.limit == 0 {
		return nil
	}
	return setLimit(sp.scratch.dir, sp.project, 0)
}

// maxWalk bounds the files one measurement looks at.
const maxWalk = 100_000

// Walk adds up what a directory tree takes, looking at no more than maxWalk files.
func Walk(dir string) (Usage, error) {
	var u Usage
	err := filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err != nil {
			return nil // it changes under us
		}
		info, err := e.Info()
		if err != nil {
			return nil
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			u.Bytes += uint64(st.Blocks) * 512
		} else {
			u.Bytes += uint64(info.Size())
		}
		if u.Inodes++; u.Inodes >= maxWalk {
			return fs.SkipAll
		}
		return nil
	})
	return u, err
}
