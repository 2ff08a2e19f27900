// Package placeholder is what stands where the kubelet wants a volume on a node: nothing
// of the volume, which only the Pod's VM mounts, but something that the kubelet, the
// runtime and the shim can tell from an empty directory.
//
// For a file system that is a tmpfs of 64 KiB whose mount source names the volume. The
// kubelet can make a subPath's directories in it, a stray write is bounded and seen, an
// unmount removes everything, and a bind of a part of it tells in mountinfo which part.
// For a raw device it is a loop device of a small file, bound at the path: the kubelet
// holds it by a loop device of its own, and the runtime asks for its numbers.
//
// It owns these mounts and devices. It must not know CSI, VMs, or of records more than how
// they call a placeholder. Calls for one
// path are not concurrent; every call may be repeated, also after a crash within one.
package placeholder

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/mountinfo"
	"github.com/hypernetes/hypernetes/volume/record"
)

const (
	// Marker is the file in a placeholder's directory that says why it is empty.
	Marker = ".h8s-volume-is-in-the-vm"

	options = "size=64k,nr_inodes=256,mode=0755"
	// maxStack bounds how many mounts at one path are removed in a call.
	maxStack = 16
)

const marker = `This directory stands for a volume that is a disk of a Pod's virtual machine and is
mounted only there. What you see is the node's side, as a Pod of another runtime class
sees it. Give the Pod the runtime class of Hypernetes.
`

// Kinds of placeholders.
const (
	Directory = "directory"
	Device    = "device"
)

// Placeholder is one that is there.
type Placeholder struct {
	Kind, Key, Target string
	// Device is st_dev of a directory, st_rdev of a device.
	Device uint64
}

// Places makes placeholders; Dir, which should be in memory, is for the files of devices.
type Places struct{ Dir string }

// Directory has the placeholder of a file system at target and returns its st_dev.
func (p Places) Directory(key, target string) (uint64, error) {
	if err := check(key, target); err != nil {
		return 0, err
	}
	top, err := mountAt(target)
	if err != nil {
		return 0, err
	}
	switch {
	case top == nil:
		if err := os.MkdirAll(target, 0o750); err != nil {
			return 0, fmt.Errorf("placeholder: %w", err)
		}
		if info, err := os.Lstat(target); err != nil {
			return 0, fmt.Errorf("placeholder: %w", err)
		} else if !info.IsDir() {
			return 0, fmt.Errorf("target path %s is a %s, not a directory: %w", target, info.Mode().Type(), errdefs.ErrFailedPrecondition)
		}
		if err := unix.Mount(record.PlaceholderSource+key, target, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, options); err != nil {
			return 0, fmt.Errorf("placeholder: mount %s: %w", target, err)
		}
	case top.Source != record.PlaceholderSource+key || top.Type != "tmpfs" || top.Root != "/":
		return 0, foreign(target, top)
	}
	// A call that was killed may have mounted and no more.
	if f, err := os.OpenFile(filepath.Join(target, Marker), os.O_CREATE|os.O_EXCL|os.O_WRONLY|unix.O_NOFOLLOW, 0o444); err == nil {
		_, err := f.WriteString(marker)
		if err = errors.Join(err, f.Close()); err != nil {
			return 0, fmt.Errorf("placeholder: %w", err)
		}
	} else if !errors.Is(err, fs.ErrExist) {
		return 0, fmt.Errorf("placeholder: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Lstat(target, &st); err != nil {
		return 0, fmt.Errorf("placeholder %s: %w", target, err)
	}
	return st.Dev, nil
}

// Remove removes what is at target and the loop device behind it; it succeeds if nothing
// is. The error is errdefs.ErrFailedPrecondition for what is not this volume's.
func (p Places) Remove(key, target string) error {
	if err := check(key, target); err != nil {
		return err
	}
	for range maxStack {
		top, err := mountAt(target)
		if err != nil {
			return err
		}
		if top == nil {
			if err := unlink(target); err != nil {
				return err
			}
			return free(p.file(key, target))
		}
		if !p.ours(key, target, top) {
			return foreign(target, top)
		}
		err = unix.Unmount(target, unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EBUSY) {
			// Who is in there has nothing of the volume's.
			err = unix.Unmount(target, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
		}
		if err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("placeholder: unmount %s: %w", target, err)
		}
	}
	return fmt.Errorf("placeholder: over %d mounts at %s: %w", maxStack, target, errdefs.ErrResourceExhausted)
}

// ours tells whether a mount is this volume's placeholder. A device's is: what is bound
// is a loop device of our file, or one that was and is no more.
func (p Places) ours(key, target string, m *mountinfo.Mount) bool {
	if m.Type == "tmpfs" && m.Source == record.PlaceholderSource+key && m.Root == "/" {
		return true
	}
	var st unix.Stat_t
	if unix.Lstat(target, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK || unix.Major(st.Rdev) != loopMajor {
		return false
	}
	if info, err := loopStatus(unix.Minor(st.Rdev)); err == nil {
		return isFile(info, p.file(key, target))
	}
	_, err := os.Lstat(p.file(key, target))
	return err == nil
}

// unlink removes what stood below a mount. A directory with something in it is a fault
// that nobody may repair by deleting.
func unlink(target string) error {
	info, err := os.Lstat(target)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("placeholder: %w", err)
	}
	if !info.IsDir() && !(info.Mode().IsRegular() && info.Size() == 0) {
		return fmt.Errorf("target path %s is a %s of %d bytes and no placeholder: look at it and remove it: %w", target, info.Mode().Type(), info.Size(), errdefs.ErrFailedPrecondition)
	}
	if err := os.Remove(target); errors.Is(err, unix.ENOTEMPTY) {
		return fmt.Errorf("target path %s is a directory with files and no placeholder: look at them and remove them: %w", target, errdefs.ErrFailedPrecondition)
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("placeholder: %w", err)
	}
	return nil
}

// Stands tells whether a placeholder that was made is still there.
func (p Places) Stands(h Placeholder) bool {
	var st unix.Stat_t
	if unix.Lstat(h.Target, &st) != nil {
		return false
	}
	if h.Kind == Device {
		if st.Mode&unix.S_IFMT != unix.S_IFBLK || st.Rdev != h.Device || unix.Major(st.Rdev) != loopMajor {
			return false
		}
		info, err := loopStatus(unix.Minor(st.Rdev))
		return err == nil && isFile(info, p.file(h.Key, h.Target))
	}
	return st.Mode&unix.S_IFMT == unix.S_IFDIR && st.Dev == h.Device
}

// List returns the placeholders there are.
func (p Places) List() ([]Placeholder, error) {
	all, err := mounts()
	if err != nil {
		return nil, err
	}
	var out []Placeholder
	for _, m := range all {
		key, ok := strings.CutPrefix(m.Source, record.PlaceholderSource)
		device, valid := m.Number()
		// Binds of a part of it are the kubelet's subPaths.
		if ok && valid && m.Type == "tmpfs" && m.Root == "/" && checkKey(key) == nil {
			out = append(out, Placeholder{Directory, key, m.Target, device})
		}
	}
	devices, err := p.devices(all)
	return append(out, devices...), err
}

func mounts() ([]mountinfo.Mount, error) {
	all, err := mountinfo.Read("self")
	if err != nil {
		return nil, fmt.Errorf("placeholder: %w", err)
	}
	return all, nil
}

// mountAt returns the uppermost mount at a path, nil for none.
func mountAt(target string) (*mountinfo.Mount, error) {
	all, err := mounts()
	if err != nil {
		return nil, err
	}
	if m, ok := mountinfo.At(all, target); ok {
		return &m, nil
	}
	return nil, nil
}

func check(key, target string) error {
	if err := checkKey(key); err != nil {
		return err
	}
	if len(target) < 2 || len(target) > 4095 || !filepath.IsAbs(target) || filepath.Clean(target) != target || strings.ContainsRune(target, 0) {
		return fmt.Errorf("target path %.200q is not absolute and clean: %w", target, errdefs.ErrInvalidArgument)
	}
	return nil
}

func checkKey(key string) error {
	if len(key) != 32 || strings.Trim(key, "0123456789abcdef") != "" {
		return fmt.Errorf("key %.64q is not 32 of 0-9 and a-f: %w", key, errdefs.ErrInvalidArgument)
	}
	return nil
}

func foreign(target string, m *mountinfo.Mount) error {
	return fmt.Errorf("target path %s has a mount of %.100q (%s) that is not this volume's placeholder: unmount it: %w", target, m.Source, m.Type, errdefs.ErrFailedPrecondition)
}
