package placeholder

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/mountinfo"
	"github.com/hypernetes/hypernetes/volume/record"
)

const (
	loopMajor = 7
	// fileSize is what a device without a VM has; stray writes end there.
	fileSize = 64 << 10
	suffix   = ".img"
	// maxTries bounds the race for a free loop device.
	maxTries = 32
)

// file is the one behind the device of a volume at target: of each path another one, and
// its name begins with the volume's key.
func (p Places) file(key, target string) string {
	sum := sha256.Sum256([]byte(target))
	return filepath.Join(p.Dir, key+"-"+hex.EncodeToString(sum[:8])+suffix)
}

// Device has the placeholder of a raw device at target and returns its st_rdev.
func (p Places) Device(key, target string) (uint64, error) {
	if err := check(key, target); err != nil {
		return 0, err
	}
	top, err := mountAt(target)
	if err != nil {
		return 0, err
	}
	if top != nil && !p.ours(key, target, top) {
		return 0, foreign(target, top)
	}
	if err := p.makeFile(key, target); err != nil {
		return 0, fmt.Errorf("placeholder: %w", err)
	}
	minor, err := p.loop(key, target)
	if err != nil {
		return 0, err
	}
	var st unix.Stat_t
	if top != nil {
		if err := unix.Lstat(target, &st); err != nil {
			return 0, fmt.Errorf("placeholder: %w", err)
		}
		if st.Rdev == unix.Mkdev(loopMajor, minor) {
			return st.Rdev, nil
		}
		// Bound to a loop device that is gone.
		if err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW); err != nil {
			return 0, fmt.Errorf("placeholder: unmount %s: %w", target, err)
		}
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o750); err != nil {
		return 0, fmt.Errorf("placeholder: %w", err)
	}
	f, err := os.OpenFile(target, os.O_CREATE|os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return 0, fmt.Errorf("placeholder: %w", err)
	}
	info, err := f.Stat()
	_ = f.Close()
	if err != nil {
		return 0, fmt.Errorf("placeholder: %w", err)
	}
	if !info.Mode().IsRegular() {
		return 0, fmt.Errorf("target path %s is a %s, not a file to bind a device to: %w", target, info.Mode().Type(), errdefs.ErrFailedPrecondition)
	}
	if err := unix.Mount(node(minor), target, "", unix.MS_BIND, ""); err != nil {
		return 0, fmt.Errorf("placeholder: bind %s to %s: %w", node(minor), target, err)
	}
	if err := unix.Lstat(target, &st); err != nil {
		return 0, fmt.Errorf("placeholder: %w", err)
	}
	return st.Rdev, nil
}

func (p Places) makeFile(key, target string) error {
	if err := os.MkdirAll(p.Dir, 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(p.file(key, target), os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(fileSize), f.Close())
}

// loop returns the minor number of the file's loop device, which is made if there is none.
func (p Places) loop(key, target string) (uint32, error) {
	if minor, err := find(p.file(key, target)); err == nil {
		return minor, nil
	} else if !errdefs.IsNotFound(err) {
		return 0, err
	}
	f, err := os.OpenFile(p.file(key, target), os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return 0, fmt.Errorf("placeholder: %w", err)
	}
	defer f.Close()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return 0, fmt.Errorf("placeholder of a raw device: this kernel has no loop devices: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	defer control.Close()
	for range maxTries {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return 0, fmt.Errorf("placeholder: free loop device: %w", err)
		}
		d, err := openLoop(uint32(n), os.O_RDWR)
		if err != nil {
			return 0, fmt.Errorf("placeholder: %w", err)
		}
		config := unix.LoopConfig{Fd: uint32(f.Fd())}
		copy(config.Info.File_name[:len(config.Info.File_name)-1], record.PlaceholderSource+key)
		err = unix.IoctlLoopConfigure(int(d.Fd()), &config)
		_ = d.Close()
		if errors.Is(err, unix.EBUSY) {
			continue // another took it
		}
		if err != nil {
			return 0, fmt.Errorf("placeholder: set up %s: %w", node(uint32(n)), err)
		}
		return uint32(n), nil
	}
	return 0, fmt.Errorf("placeholder: every free loop device was taken by another %d times: %w", maxTries, errdefs.ErrUnavailable)
}

func node(minor uint32) string { return "/dev/loop" + strconv.FormatUint(uint64(minor), 10) }

// openLoop opens a loop device whose node may be missing: /dev need not be devtmpfs.
func openLoop(minor uint32, flags int) (*os.File, error) {
	f, err := os.OpenFile(node(minor), flags|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		if err := unix.Mknod(node(minor), unix.S_IFBLK|0o600, int(unix.Mkdev(loopMajor, minor))); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
		f, err = os.OpenFile(node(minor), flags|unix.O_NONBLOCK, 0)
	}
	return f, err
}

func loopStatus(minor uint32) (*unix.LoopInfo64, error) {
	d, err := openLoop(minor, os.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return unix.IoctlLoopGetStatus64(int(d.Fd()))
}

// isFile tells whether a loop device is the file's, by its inode: names differ with who
// looks.
func isFile(info *unix.LoopInfo64, file string) bool {
	var st unix.Stat_t
	return unix.Lstat(file, &st) == nil && info.Inode == st.Ino && info.Device == st.Dev
}

// loops returns the minor numbers of loop devices that have a file.
func loops() ([]uint32, error) {
	dirs, err := filepath.Glob("/sys/block/loop*/loop")
	if err != nil {
		return nil, fmt.Errorf("placeholder: %w", err)
	}
	var out []uint32
	for _, dir := range dirs {
		n, err := strconv.ParseUint(strings.TrimPrefix(filepath.Base(filepath.Dir(dir)), "loop"), 10, 20)
		if err == nil {
			out = append(out, uint32(n))
		}
	}
	return out, nil
}

// find returns the loop device of a file; errdefs.ErrNotFound if there is none.
func find(file string) (uint32, error) {
	all, err := loops()
	if err != nil {
		return 0, err
	}
	for _, minor := range all {
		if info, err := loopStatus(minor); err == nil && isFile(info, file) {
			return minor, nil
		}
	}
	return 0, fmt.Errorf("loop device of %s: %w", file, errdefs.ErrNotFound)
}

// free removes a file and the loop device it has.
func free(file string) error {
	if _, err := os.Lstat(file); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	minor, err := find(file)
	switch {
	case errdefs.IsNotFound(err):
	case err != nil:
		return err
	default:
		d, err := openLoop(minor, os.O_RDONLY)
		if err != nil {
			return fmt.Errorf("placeholder: %w", err)
		}
		// In use, it goes with its last user.
		err = unix.IoctlSetInt(int(d.Fd()), unix.LOOP_CLR_FD, 0)
		_ = d.Close()
		if err != nil && !errors.Is(err, unix.ENXIO) {
			return fmt.Errorf("placeholder: free %s: %w", node(minor), err)
		}
	}
	if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("placeholder: %w", err)
	}
	return nil
}

// devices finds the devices' placeholders: where a loop device of one of our files is
// bound. One that is bound nowhere has no Target.
func (p Places) devices(all []mountinfo.Mount) ([]Placeholder, error) {
	entries, err := os.ReadDir(p.Dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("placeholder: %w", err)
	}
	files := map[string]bool{}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), suffix) {
			files[filepath.Join(p.Dir, e.Name())] = true
		}
	}
	if len(files) == 0 {
		return nil, nil
	}
	var out []Placeholder
	for _, m := range all {
		var st unix.Stat_t
		if !strings.HasPrefix(m.Root, "/loop") || unix.Lstat(m.Target, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK || unix.Major(st.Rdev) != loopMajor {
			continue
		}
		for file := range files {
			key, _, _ := strings.Cut(filepath.Base(file), "-")
			// The kubelet binds the device once more, elsewhere: that path has no file.
			if checkKey(key) == nil && file == p.file(key, m.Target) {
				out = append(out, Placeholder{Device, key, m.Target, st.Rdev})
				delete(files, file)
				break
			}
		}
	}
	for file := range files {
		key, _, _ := strings.Cut(filepath.Base(file), "-")
		if checkKey(key) == nil {
			out = append(out, Placeholder{Kind: Device, Key: key, Device: 0})
		}
	}
	return out, nil
}

// Collect frees the loop devices of a volume that are bound nowhere, as a crash between
// unbinding and freeing leaves them.
func (p Places) Collect(key string) error {
	if err := checkKey(key); err != nil {
		return err
	}
	all, err := mounts()
	if err != nil {
		return err
	}
	bound := map[string]bool{}
	for _, m := range all {
		bound[p.file(key, m.Target)] = true
	}
	files, err := filepath.Glob(filepath.Join(p.Dir, key+"-*"+suffix))
	if err != nil {
		return fmt.Errorf("placeholder: %w", err)
	}
	var errs []error
	for _, file := range files {
		if !bound[file] {
			errs = append(errs, free(file))
		}
	}
	return errors.Join(errs...)
}
