package cgroup

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hypernetes/hypernetes/mountinfo"
)

// The first thread cannot be thrown away, so keep goroutines off it.
func init() { runtime.LockOSThread() }

func TestHierarchyOf(t *testing.T) {
	for line, want := range map[string]hierarchy{
		"30 29 0:26 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset":       {dir: "/sys/fs/cgroup/cpuset", cpuset: true},
		"30 29 0:26 / /sys/fs/cgroup/cpu,cpuacct rw,shared:1 - cgroup c rw,cpu": {dir: "/sys/fs/cgroup/cpu,cpuacct"},
		"30 29 0:26 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw":           {dir: "/sys/fs/cgroup/unified", v2: true},
		"30 29 0:26 / / rw - ext4 /dev/vda rw":                                  {},
		"1 2 3 / /elsewhere rw - cgroup cgroup rw,cpu":                          {},
	} {
		if got, ok := hierarchyOf(mountinfo.Parse(line)[0]); got != want || ok != (want.dir != "") {
			t.Errorf("%q: %+v %t", line, got, ok)
		}
	}
}

// group makes a group of this test's own below /h8s-test.
func group(t *testing.T) (*Host, string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("cgroups need root")
	}
	h, err := Open()
	if err != nil {
		t.Skipf("no cgroups here: %v", err)
	}
	top := fmt.Sprintf("/h8s-test-%d", os.Getpid())
	if err := h.Create(top + "/a/b"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := h.Kill(ctx, top); err != nil {
			t.Error(err)
		}
		if err := h.Remove(ctx, top); err != nil {
			t.Error(err)
		}
		if left := h.Dirs(top); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	})
	return h, top
}

// startIn starts a process in a group the way package node does.
func startIn(t *testing.T, h *Host, group string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sleep", "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	errc := make(chan error)
	go func() {
		runtime.LockOSThread() // thrown away
		v2, err := h.OpenV2(group)
		if err == nil && v2 != nil {
			defer v2.Close()
			cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(v2.Fd())
		}
		if err == nil {
			err = h.AttachThread(group)
		}
		if err == nil {
			err = cmd.Start()
		}
		errc <- err
	}()
	if err := <-errc; err != nil {
		t.Fatal(err)
	}
	return cmd
}

func TestStartKillRemove(t *testing.T) {
	h, top := group(t)
	if err := h.Create(top + "/a/b"); err != nil {
		t.Errorf("second Create: %v", err)
	}
	if got := h.Children(top); !slices.Equal(got, []string{"a"}) {
		t.Errorf("children %v", got)
	}
	cmd := startIn(t, h, top+"/a/b")
	for _, dir := range h.Dirs(top + "/a/b") {
		b, err := os.ReadFile(dir + "/cgroup.procs")
		if err != nil || !slices.Contains(strings.Fields(string(b)), fmt.Sprint(cmd.Process.Pid)) {
			t.Errorf("%s holds %q, not %d: %v", dir, b, cmd.Process.Pid, err)
		}
	}
	// The thread that started it may not be gone yet, and counts as this process.
	others := slices.DeleteFunc(h.Pids(top), func(pid int) bool { return pid == os.Getpid() })
	if !slices.Equal(others, []int{cmd.Process.Pid}) {
		t.Errorf("pids %v", others)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	killed := make(chan error, 1)
	go func() { killed <- h.Kill(ctx, top) }()
	if err := cmd.Wait(); err == nil {
		t.Error("not killed")
	}
	if err := <-killed; err != nil {
		t.Error(err)
	}
	if err := h.Remove(ctx, top); err != nil {
		t.Error(err)
	}
}

func TestRemoveOfWhatIsNotThere(t *testing.T) {
	h, top := group(t)
	if err := h.Remove(t.Context(), top+"/none"); err != nil {
		t.Error(err)
	}
	if err := h.Kill(t.Context(), top+"/none"); err != nil {
		t.Error(err)
	}
}
