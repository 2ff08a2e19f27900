package record

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Take takes what a VM must hold as long as it runs: the volume's lease, as its only
// one or as one of several, and the publication's. The VMM (and who else has the disk
// open) inherits the descriptors, so that the kernel ends the leases with the last of
// these processes, however it ends; the caller closes its own then.
//
// A VMM that was taken over from inside could let go of its leases early. It could write
// to that disk as long as it lives either way, and kills end it.
//
// Errors: errdefs.ErrUnavailable if another VM has the volume, errdefs.ErrNotFound if it
// is not there any more.
func (s Store) Take(a Attachment) ([]*os.File, error) {
	volume, err := s.Lease(a.Key, a.Exclusive())
	if err != nil {
		return nil, err
	}
	pod, err := s.PodLease(a.Key, a.Publication.PodUID)
	if err != nil {
		_ = volume.Close()
		return nil, err
	}
	return []*os.File{volume, pod}, nil
}

// Lease takes a staged volume's lease without waiting.
//
// Errors: errdefs.ErrUnavailable if a VM has it, errdefs.ErrNotFound.
func (s Store) Lease(key string, exclusive bool) (*os.File, error) {
	if err := checkKey(key); err != nil {
		return nil, err
	}
	how := unix.LOCK_SH
	if exclusive {
		how = unix.LOCK_EX
	}
	f, err := take(s.lease(key), how)
	if errdefs.IsUnavailable(err) {
		return nil, fmt.Errorf("volume %s: %w", key, s.holders(key, err))
	}
	if err != nil {
		return nil, fmt.Errorf("lease of volume %s: %w", key, err)
	}
	return f, nil
}

// PodLease takes the lease that says that a Pod's VM has a volume, without waiting.
//
// Errors: errdefs.ErrUnavailable if the VM has it, errdefs.ErrNotFound.
func (s Store) PodLease(key, podUID string) (*os.File, error) {
	if err := errors.Join(checkKey(key), checkPod(podUID)); err != nil {
		return nil, err
	}
	f, err := take(s.podLease(key, podUID), unix.LOCK_EX)
	if errdefs.IsUnavailable(err) {
		return nil, fmt.Errorf("volume %s: the VM of pod %s still has it: %w", key, podUID, err)
	}
	if err != nil {
		return nil, fmt.Errorf("lease of volume %s for pod %s: %w", key, podUID, err)
	}
	return f, nil
}

// holders names the Pods that may have the lease, for people.
func (s Store) holders(key string, err error) error {
	uids, _ := s.published(key)
	var busy []string
	for _, uid := range uids {
		f, err := take(s.podLease(key, uid), unix.LOCK_EX)
		if errdefs.IsUnavailable(err) {
			busy = append(busy, uid)
		} else if err == nil {
			_ = f.Close()
		}
	}
	if len(busy) == 0 {
		return fmt.Errorf("a VM still has it: %w", err)
	}
	return fmt.Errorf("the VM of pod %s still has it: %w", strings.Join(busy, ", "), err)
}

// take locks a file, and only one that is still there: who removes it holds its lock.
func take(path string, how int) (*os.File, error) {
	// Read-only, so that a process that inherits it can write nothing here.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errdefs.ErrNotFound
	}
	if err != nil {
		return nil, err
	}
	if err := flock(f, how|unix.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errdefs.ErrUnavailable
		}
		return nil, err
	}
	mine, err := f.Stat()
	if err == nil {
		var now os.FileInfo
		if now, err = os.Lstat(path); err == nil && os.SameFile(mine, now) {
			return f, nil
		}
	}
	_ = f.Close()
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return nil, errdefs.ErrNotFound
	}
	return nil, err
}

func flock(f *os.File, how int) error {
	for {
		if err := unix.Flock(int(f.Fd()), how); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
