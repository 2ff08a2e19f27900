package container

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"
)

// pins are mounts that hold mount sources in place.
type pins []string

// Close takes them away; what has been mounted from them stays.
func (p pins) Close() error {
	var errs []error
	for _, at := range p {
		if err := unix.Unmount(at, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			errs = append(errs, fmt.Errorf("unmount %s: %w", at, err))
			continue
		}
		// Never what is below: it is the volume's, should it still be mounted.
		errs = append(errs, os.Remove(at))
	}
	return errors.Join(errs...)
}

// pin mounts the mount sources of an OCI spec that lie inside a volume (subPath) below
// prefix, found without leaving the volume, and has the spec name these. The volume's
// other containers may swap a directory on the way for a symbolic link at any time;
// crun, which opens sources by path, would follow it into the guest's own files.
//
// Mounts of a volume get its restrictions: crun sets a bind mount's options anew, and so
// would take nosuid and the like away.
func pin(config []byte, volumes, prefix string, restrictions func(volume string) []string) (_ []byte, made pins, err error) {
	var s specs.Spec
	if err := json.Unmarshal(config, &s); err != nil {
		return nil, nil, fmt.Errorf("runtime spec: %w: %w", errdefs.ErrInvalidArgument, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, made.Close())
			made = nil
		}
	}()
	changed := false
	for i := range s.Mounts {
		m := &s.Mounts[i]
		rest, ok := strings.CutPrefix(path.Clean(m.Source), volumes+"/")
		if !ok {
			continue
		}
		name, sub, inside := strings.Cut(rest, "/")
		if r := restrictions(name); len(r) > 0 {
			m.Options = append(slices.Clone(m.Options), r...)
			changed = true
		}
		if !inside {
			continue
		}
		at := fmt.Sprintf("%s-%d", prefix, i)
		if err := pinOne(path.Join(volumes, name), sub, at); err != nil {
			return nil, made, fmt.Errorf("mount %s: subPath %.200q of volume %s: %w", m.Destination, sub, name, err)
		}
		made = append(made, at)
		m.Source = at
		changed = true
	}
	if !changed {
		return config, nil, nil
	}
	out, err := json.Marshal(&s)
	if err != nil {
		return nil, made, fmt.Errorf("write runtime spec: %w", err)
	}
	return out, made, nil
}

// pinOne mounts sub of the volume at a path that it makes.
func pinOne(volume, sub, at string) error {
	f, err := openBeneath(volume, sub)
	if err != nil {
		return err
	}
	defer f.Close()
	tree, err := unix.OpenTree(int(f.Fd()), "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE|unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fmt.Errorf("open_tree: %w", err)
	}
	defer unix.Close(tree)
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if st.IsDir() {
		err = os.Mkdir(at, 0o700)
	} else {
		err = os.WriteFile(at, nil, 0o600)
	}
	if err == nil {
		err = unix.MoveMount(tree, "", unix.AT_FDCWD, at, unix.MOVE_MOUNT_F_EMPTY_PATH)
	}
	if err != nil {
		_ = os.Remove(at)
		return fmt.Errorf("pin: %w", err)
	}
	return nil
}

// openBeneath opens sub for mounting. Links that stay inside the volume are followed:
// file trees consist of them.
func openBeneath(volume, sub string) (*os.File, error) {
	root, err := unix.Open(volume, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(root)
	how := &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS}
	for {
		fd, err := unix.Openat2(root, sub, how)
		switch err {
		case nil:
			return os.NewFile(uintptr(fd), sub), nil
		case unix.EINTR, unix.EAGAIN: // somebody renames while the kernel looks
			continue
		case unix.EXDEV:
			return nil, fmt.Errorf("leads out of the volume: %w", errdefs.ErrInvalidArgument)
		}
		return nil, err
	}
}
