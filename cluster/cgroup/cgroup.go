// Package cgroup owns making, filling, killing and removing subtrees of the host's
// cgroup hierarchies, version 1 (every hierarchy, hybrid included) and version 2.
// It is the only place that knows which version the host has, so that version 1
// can be dropped by deleting one branch. It must not know what runs in a group.
package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/mountinfo"
)

const root = "/sys/fs/cgroup"

// hierarchy is one mounted cgroup file system.
type hierarchy struct {
	dir    string
	v2     bool
	cpuset bool
}

// Host is the set of cgroup hierarchies of this machine.
type Host struct {
	hierarchies []hierarchy
	unified     bool
}

// Open finds the hierarchies mounted below /sys/fs/cgroup.
func Open() (*Host, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(root, &st); err != nil {
		return nil, fmt.Errorf("%s: %w (mount the cgroup file systems)", root, err)
	}
	if st.Type == unix.CGROUP2_SUPER_MAGIC {
		return &Host{hierarchies: []hierarchy{{dir: root, v2: true}}, unified: true}, nil
	}
	mounts, err := mountinfo.Read("self")
	if err != nil {
		return nil, err
	}
	h := &Host{}
	for _, m := range mounts {
		if hi, ok := hierarchyOf(m); ok && !slices.ContainsFunc(h.hierarchies, func(o hierarchy) bool { return o.dir == hi.dir }) {
			h.hierarchies = append(h.hierarchies, hi)
		}
	}
	if len(h.hierarchies) == 0 {
		return nil, fmt.Errorf("no cgroup hierarchy below %s: mount cgroup2 there", root)
	}
	return h, nil
}

func hierarchyOf(m mountinfo.Mount) (hierarchy, bool) {
	if !strings.HasPrefix(m.Target, root+"/") {
		return hierarchy{}, false
	}
	switch m.Type {
	case "cgroup":
		return hierarchy{dir: m.Target, cpuset: slices.Contains(strings.Split(m.Options, ","), "cpuset")}, true
	case "cgroup2":
		return hierarchy{dir: m.Target, v2: true}, true
	}
	return hierarchy{}, false
}

// Unified reports whether the host has cgroup version 2 only.
func (h *Host) Unified() bool { return h.unified }

// Dirs lists the directories of a group that exist, one per hierarchy.
func (h *Host) Dirs(group string) []string {
	var dirs []string
	for _, hi := range h.hierarchies {
		if dir := filepath.Join(hi.dir, group); isDir(dir) {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}

// Create makes a group and its parents in every hierarchy. In version 1 the cpuset
// of the parent is copied down, else no task could enter; in version 2 the
// controllers are enabled on the way so that leaves can be limited.
func (h *Host) Create(group string) error {
	for _, hi := range h.hierarchies {
		dir := hi.dir
		for elem := range strings.SplitSeq(strings.Trim(group, "/"), "/") {
			parent := dir
			if hi.v2 {
				enableControllers(parent)
			}
			dir = filepath.Join(parent, elem)
			if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
				return fmt.Errorf("cgroup: %w", err)
			}
			if hi.cpuset {
				if err := copyDown(parent, dir, "cpuset.cpus", "cpuset.mems"); err != nil {
					return fmt.Errorf("cgroup: %w", err)
				}
			}
		}
	}
	return nil
}

// enableControllers is best effort: a controller that cannot be enabled here (for
// example in a container without delegation) is reported by the kubelet with more
// context than we have.
func enableControllers(dir string) {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return
	}
	for _, c := range strings.Fields(string(b)) {
		_ = os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+c), 0)
	}
}

func copyDown(parent, dir string, files ...string) error {
	for _, name := range files {
		have, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		if strings.TrimSpace(string(have)) != "" {
			continue
		}
		b, err := os.ReadFile(filepath.Join(parent, name))
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, name), b, 0); err != nil {
			return err
		}
	}
	return nil
}

// Children lists the names of the groups directly below a group, over all hierarchies.
func (h *Host) Children(group string) []string {
	seen := map[string]bool{}
	for _, dir := range h.Dirs(group) {
		entries, err := os.ReadDir(dir)
		if err != nil {
			continue
		}
		for _, e := range entries {
			if e.IsDir() {
				seen[e.Name()] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(seen))
}

// AttachThread moves the calling thread into a group in the version 1 hierarchies,
// so that a child forked from it starts there. The caller has locked the thread
// and never unlocks it.
func (h *Host) AttachThread(group string) error {
	tid := []byte(strconv.Itoa(unix.Gettid()))
	for _, hi := range h.hierarchies {
		if hi.v2 {
			continue
		}
		if err := os.WriteFile(filepath.Join(hi.dir, group, "tasks"), tid, 0); err != nil {
			return fmt.Errorf("cgroup: %w", err)
		}
	}
	return nil
}

// OpenV2 opens the group's directory in the version 2 hierarchy for
// SysProcAttr.CgroupFD, or returns nil if there is no such hierarchy.
func (h *Host) OpenV2(group string) (*os.File, error) {
	for _, hi := range h.hierarchies {
		if hi.v2 {
			return os.Open(filepath.Join(hi.dir, group))
		}
	}
	return nil, nil
}

// Attach moves a process into a group in every hierarchy.
func (h *Host) Attach(group string, pid int) error {
	for _, hi := range h.hierarchies {
		if err := os.WriteFile(filepath.Join(hi.dir, group, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
			return fmt.Errorf("cgroup: %w", err)
		}
	}
	return nil
}

// Pids lists the processes in a group and below it, over all hierarchies.
func (h *Host) Pids(group string) []int {
	seen := map[int]bool{}
	for _, dir := range h.Dirs(group) {
		_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.IsDir() {
				return nil // the tree changes while we walk
			}
			b, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
			if err != nil {
				return nil
			}
			for f := range strings.FieldsSeq(string(b)) {
				if pid, err := strconv.Atoi(f); err == nil && pid > 0 {
					seen[pid] = true
				}
			}
			return nil
		})
	}
	pids := make([]int, 0, len(seen))
	for pid := range seen {
		pids = append(pids, pid)
	}
	slices.Sort(pids)
	return pids
}

// Kill sends SIGKILL to every process of the subtree except this one until none is
// left or ctx ends.
func (h *Host) Kill(ctx context.Context, group string) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		left := 0
		for _, pid := range h.Pids(group) {
			if pid == os.Getpid() {
				continue
			}
			left++
			if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("kill %d in %s: %w", pid, group, err)
			}
		}
		if left == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d processes of cgroup %s do not die: %w", left, group, ctx.Err())
		case <-tick.C:
		}
	}
}

// Remove deletes the subtree in every hierarchy, waiting for dying processes to
// leave it until ctx ends.
func (h *Host) Remove(ctx context.Context, group string) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		var last error
		for _, dir := range h.Dirs(group) {
			if err := removeTree(dir); err != nil {
				last = err
			}
		}
		if last == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("cgroup %s: %w", group, last)
		case <-tick.C:
		}
	}
}

func removeTree(dir string) error {
	var dirs []string
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	var last error
	for _, d := range slices.Backward(dirs) {
		if err := os.Remove(d); err != nil && !errors.Is(err, fs.ErrNotExist) {
			last = err
		}
	}
	return last
}

// Leave moves this process to the root of every hierarchy in which it is inside
// group, so that the group can be removed.
func (h *Host) Leave(group string) error {
	if !slices.Contains(h.Pids(group), os.Getpid()) {
		return nil
	}
	return h.Attach("/", os.Getpid())
}

func isDir(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.IsDir()
}
