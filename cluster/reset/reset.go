// Package reset owns finding and removing every trace of a node on the host: its
// processes and cgroups, its directories, and mounts below them should a crash have
// left any. Links, network namespaces, taps and the node's mounts live in the node's
// own namespaces and end with its processes. It must not know how to stop a node in
// order; that is done before.
package reset

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/cluster/cgroup"
	"github.com/hypernetes/hypernetes/cluster/layout"
	"github.com/hypernetes/hypernetes/mountinfo"
)

// Item is one thing of a node's on the host.
type Item struct {
	Kind string // process, cgroup, mount, loop, volume, directory
	What string
}

// Plan lists what there is of a node, in the order of removal.
func Plan(l layout.Node) []Item {
	var items []Item
	if cg, err := cgroup.Open(); err == nil {
		for _, pid := range cg.Pids(l.Cgroup()) {
			items = append(items, Item{"process", fmt.Sprintf("%d %s", pid, comm(pid))})
		}
		for _, dir := range cg.Dirs(l.Cgroup()) {
			items = append(items, Item{"cgroup", dir})
		}
	}
	for _, m := range mounts(l) {
		items = append(items, Item{"mount", m})
	}
	for _, d := range loops(l) {
		items = append(items, Item{"loop", d})
	}
	for _, v := range Volumes(l) {
		items = append(items, Item{"volume", v})
	}
	for _, dir := range []string{l.Run, l.State} {
		if holds(dir) {
			items = append(items, Item{"directory", dir})
		}
	}
	return items
}

// Volumes lists the volumes whose data is in the node's state.
func Volumes(l layout.Node) []string {
	dirs, _ := filepath.Glob(l.StatePath("volumes", "local", "volumes", "*", "disk.raw")) // names of ours only
	var out []string
	for _, d := range dirs {
		if st, err := os.Lstat(d); err == nil {
			out = append(out, fmt.Sprintf("%s (%d MiB)", filepath.Base(filepath.Dir(d)), st.Size()>>20))
		}
	}
	return out
}

// holds reports whether there is something to remove: a directory of ours, or anything in
// one that is the operator's.
func holds(dir string) bool {
	st, err := os.Lstat(dir)
	if err != nil {
		return false
	}
	if st.IsDir() && !isMountPoint(dir) {
		return true
	}
	entries, err := os.ReadDir(dir)
	return err == nil && len(entries) > 0
}

// AnythingRuns reports whether processes of the node are left.
func AnythingRuns(l layout.Node) bool {
	cg, err := cgroup.Open()
	return err == nil && (len(cg.Pids(l.Cgroup())) > 0 || len(cg.Dirs(l.Cgroup())) > 0)
}

// Remove removes everything Plan lists and the shared parents that are then empty.
func Remove(ctx context.Context, l layout.Node) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	cg, err := cgroup.Open()
	if err != nil {
		return err
	}
	if err := errors.Join(cg.Kill(ctx, l.Cgroup()), cg.Remove(ctx, l.Cgroup())); err != nil {
		return err
	}
	if len(cg.Children("/h8s")) == 0 {
		if err := cg.Remove(ctx, "/h8s"); err != nil {
			return err
		}
	}
	for _, m := range mounts(l) {
		if err := unix.Unmount(m, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s: %w", m, err)
		}
	}
	for _, d := range loops(l) {
		if err := detachLoop(d); err != nil {
			return fmt.Errorf("detach %s: %w", d, err)
		}
	}
	if left := mounts(l); len(left) > 0 {
		return fmt.Errorf("%s is still mounted: nothing was deleted, since that would go into it", left[0])
	}
	for _, dir := range []string{l.Run, l.State} {
		if err := removeDir(dir); err != nil {
			return err
		}
	}
	// Unless other nodes are there. Not os.Remove, which would take away a link to where
	// an operator keeps the nodes.
	_ = unix.Rmdir(layout.RunRoot)
	_ = unix.Rmdir(layout.StateRoot)
	return nil
}

// removeDir removes a directory of the node's with all that is in it. One that is a mount
// point or a link is the operator's, who may keep a node on a disk of its own: it stays,
// empty. Links inside are removed, never followed.
func removeDir(dir string) error {
	st, err := os.Lstat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if st.IsDir() && !isMountPoint(dir) {
		return removeAll(dir)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var failed error
	for _, e := range entries {
		failed = errors.Join(failed, removeAll(filepath.Join(dir, e.Name())))
	}
	return failed
}

func isMountPoint(dir string) bool {
	var here, above unix.Stat_t
	return unix.Lstat(dir, &here) == nil && unix.Stat(filepath.Dir(dir), &above) == nil && here.Dev != above.Dev
}

// removeAll is os.RemoveAll that first takes the immutable flag off what has it:
// EROFS layers may be written so.
func removeAll(dir string) error {
	err := os.RemoveAll(dir)
	if !errors.Is(err, fs.ErrPermission) {
		return err
	}
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			clearImmutable(path)
		}
		return nil
	})
	return os.RemoveAll(dir)
}

// immutableFlag is FS_IMMUTABLE_FL of linux/fs.h.
const immutableFlag = 0x10

func clearImmutable(path string) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	flags, err := unix.IoctlGetInt(fd, unix.FS_IOC_GETFLAGS)
	if err == nil && flags&immutableFlag != 0 {
		_ = unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, flags&^immutableFlag)
	}
}

// mounts lists mount points of the calling namespace below the node's directories,
// innermost first. The directories themselves are not meant (removeDir).
func mounts(l layout.Node) []string {
	all, err := mountinfo.Read("self")
	if err != nil {
		return nil
	}
	dirs := realDirs(l)
	var out []string
	for _, m := range all {
		if slices.ContainsFunc(dirs, func(dir string) bool { return m.Target != dir && under(m.Target, dir) }) {
			out = append(out, m.Target)
		}
	}
	slices.Reverse(out)
	return out
}

// realDirs are the node's directories by the names the kernel knows them by.
func realDirs(l layout.Node) []string {
	dirs := []string{l.State, l.Run}
	for i, dir := range dirs {
		if real, err := filepath.EvalSymlinks(dir); err == nil {
			dirs[i] = real
		}
	}
	return dirs
}

func under(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, dir+"/")
}

// loops lists loop devices backed by files of the node, and those on top of them, which the
// kubelet makes: what is on top of others first. Files of raw volumes' placeholders are
// known by inode: the node saw them under other names, and the kernel tells none of those
// once the node's mounts are gone.
func loops(l layout.Node) []string {
	type inode struct{ device, number uint64 }
	placeholders := map[inode]bool{}
	files, _ := filepath.Glob(l.StatePath("volumes", "placeholders", "*.img")) // the pattern is correct
	for _, f := range files {
		var st unix.Stat_t
		if unix.Lstat(f, &st) == nil {
			placeholders[inode{st.Dev, st.Ino}] = true
		}
	}
	all := map[string]*unix.LoopInfo64{} // what is known of those that are not yet the node's
	var out []string
	found := map[uint64]bool{} // device numbers of those that are
	names, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, name := range names {
		dev := "/dev/" + filepath.Base(filepath.Dir(filepath.Dir(name)))
		b, err := os.ReadFile(name)
		if err != nil {
			continue
		}
		info, number := loopStatus(dev)
		file := strings.TrimSpace(string(b))
		if placeholders[inode{info.Device, info.Inode}] || slices.ContainsFunc(realDirs(l), func(dir string) bool { return under(file, dir) }) {
			out = append(out, dev)
			found[number] = true
		} else if info.Rdevice != 0 {
			all[dev] = info
		}
	}
	for more := true; more; {
		more = false
		for dev, info := range all {
			if found[info.Rdevice] {
				_, number := loopStatus(dev)
				out, found[number], more = append(out, dev), true, true
				delete(all, dev)
			}
		}
	}
	slices.Reverse(out)
	return out
}

// loopStatus is what a loop device has below it, and its number; of one that cannot be
// asked, nothing.
func loopStatus(dev string) (*unix.LoopInfo64, uint64) {
	none := &unix.LoopInfo64{}
	fd, err := unix.Open(dev, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return none, 0
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	info, err := unix.IoctlLoopGetStatus64(fd)
	if err != nil || unix.Fstat(fd, &st) != nil {
		return none, 0
	}
	return info, st.Rdev
}

func detachLoop(dev string) error {
	fd, err := unix.Open(dev, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_, err = unix.IoctlRetInt(fd, unix.LOOP_CLR_FD)
	return err
}

func comm(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		return "(ended)"
	}
	return strings.TrimSpace(string(b))
}

// WaitDaemonGone waits until the node's daemon has let go of its lock, which is the
// last thing it does.
func WaitDaemonGone(ctx context.Context, l layout.Node) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		f, err := os.Open(l.RunPath("lock"))
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		_ = f.Close()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the daemon does not end: %w", ctx.Err())
		case <-tick.C:
		}
	}
}
