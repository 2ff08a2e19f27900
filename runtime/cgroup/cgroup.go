// Package cgroup puts a Pod's VMM and shim into a control group below the Pod's, on hosts
// with cgroup version 1 or 2, and measures it.
//
// It owns the groups it makes, named h8s-<id>, and never changes one it has not made. It
// must not know who runs in them.
package cgroup

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/mountinfo"
)

// Mount is a mounted hierarchy.
type Mount struct {
	// Path is where it is mounted, Root which group is mounted there.
	Path, Root string
	// Controllers of a version 1 hierarchy; nil for version 2.
	Controllers []string
}

// used are the controllers of version 1 a Pod's processes are put under. Named and
// unified hierarchies of a hybrid host are left alone.
var used = map[string]bool{
	"cpu": true, "cpuacct": true, "cpuset": true, "memory": true, "pids": true, "blkio": true, "devices": true, "freezer": true, "hugetlb": true,
}

// Mounts returns the hierarchies to use: those of version 1, or the one of version 2 if
// there are none.
func Mounts() ([]Mount, error) {
	all, err := mountinfo.Read("self")
	if err != nil {
		return nil, fmt.Errorf("find cgroup mounts: %w", err)
	}
	return hierarchies(all), nil
}

func hierarchies(all []mountinfo.Mount) []Mount {
	var v1, v2 []Mount
	seen := map[string]bool{}
	for _, on := range all {
		m := Mount{Root: on.Root, Path: on.Target}
		switch on.Type {
		case "cgroup2":
			if len(v2) == 0 {
				v2 = append(v2, m)
			}
		case "cgroup":
			for _, o := range strings.Split(on.Options, ",") {
				if used[o] && !seen[o] {
					seen[o] = true
					m.Controllers = append(m.Controllers, o)
				}
			}
			if len(m.Controllers) > 0 {
				v1 = append(v1, m)
			}
		}
	}
	if len(v1) > 0 {
		return v1
	}
	return v2
}

// Group is one control group in every hierarchy used.
type Group struct {
	// Paths are its directories, one for each hierarchy.
	Paths []string `json:"paths"`
	// Home are the directories, in the same order, the calling process was in.
	Home []string `json:"home"`
	// Unified is whether this is version 2.
	Unified bool `json:"unified"`
}

// Plan names the group h8s-<id> below parent ("/a/b", relative to the hierarchies'
// roots); nothing is made.
func Plan(parent, id string) (*Group, error) {
	mounts, err := Mounts()
	if err != nil {
		return nil, err
	}
	self, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, fmt.Errorf("find own cgroup: %w", err)
	}
	g := &Group{}
	for _, m := range mounts {
		g.Unified = m.Controllers == nil
		g.Paths = append(g.Paths, filepath.Join(m.Path, parent, "h8s-"+id))
		g.Home = append(g.Home, filepath.Join(m.Path, ownPath(string(self), m)))
	}
	return g, nil
}

// ownPath is the process's group relative to the mount.
func ownPath(self string, m Mount) string {
	for line := range strings.Lines(self) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) != 3 {
			continue
		}
		mine := m.Controllers == nil && f[0] == "0"
		for _, c := range strings.Split(f[1], ",") {
			mine = mine || len(m.Controllers) > 0 && c == m.Controllers[0]
		}
		if mine {
			if rel, err := filepath.Rel(m.Root, f[2]); err == nil && !strings.HasPrefix(rel, "..") {
				return rel
			}
		}
	}
	return ""
}

// Make makes the group where it is missing.
func (g *Group) Make() error {
	for _, p := range g.Paths {
		if err := make1(p); err != nil {
			return fmt.Errorf("make cgroup: %w", err)
		}
	}
	return nil
}

// make1 makes one directory and its parents. A new group of the cpuset controller
// (version 1) accepts no process before it has processors and memory nodes.
func make1(p string) error {
	if _, err := os.Stat(p); err == nil {
		return nil
	}
	parent := filepath.Dir(p)
	if err := make1(parent); err != nil {
		return err
	}
	if err := os.Mkdir(p, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
		b, err := os.ReadFile(filepath.Join(p, f))
		if err != nil || strings.TrimSpace(string(b)) != "" {
			continue // another controller, version 2, or set already
		}
		if b, err = os.ReadFile(filepath.Join(parent, f)); err != nil || strings.TrimSpace(string(b)) == "" {
			continue
		}
		if err := os.WriteFile(filepath.Join(p, f), b, 0); err != nil {
			return err
		}
	}
	return nil
}

// Enter moves a process into the group; Leave moves it back to where the process that
// planned the group was.
func (g *Group) Enter(pid int) error { return move(g.Paths, pid) }

// Leave is Enter's inverse.
func (g *Group) Leave(pid int) error { return move(g.Home, pid) }

func move(paths []string, pid int) error {
	var errs []error
	for _, p := range paths {
		errs = append(errs, os.WriteFile(filepath.Join(p, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0))
	}
	return errors.Join(errs...)
}

// Remove kills what is left in the group, other than this process, and removes it. It
// succeeds for a group that is gone; it gives up after two seconds.
func (g *Group) Remove() error {
	var errs []error
	for _, p := range g.Paths {
		errs = append(errs, remove(p))
	}
	return errors.Join(errs...)
}

func remove(p string) error {
	deadline := time.Now().Add(2 * time.Second)
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		err := unix.Rmdir(p)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return fmt.Errorf("remove cgroup %s: %w", p, err)
		}
		kill(p)
		// The kernel has no event for a group becoming empty that every version has.
		<-time.After(pause)
	}
}

func kill(p string) {
	b, err := os.ReadFile(filepath.Join(p, "cgroup.procs"))
	if err != nil {
		return
	}
	s := bufio.NewScanner(strings.NewReader(string(b)))
	for s.Scan() {
		if pid, err := strconv.Atoi(s.Text()); err == nil && pid > 1 && pid != os.Getpid() {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}
}
