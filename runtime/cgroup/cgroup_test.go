package cgroup

import (
	"os"
	"os/exec"
	"reflect"
	"testing"

	"github.com/hypernetes/hypernetes/mountinfo"
)

func TestHierarchies(t *testing.T) {
	hybrid := "30 1 0:2 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n" +
		"31 1 0:3 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n" +
		"32 1 0:4 /h8s /sys/fs/cgroup/memory rw shared:1 - cgroup cgroup rw,memory\n" +
		"33 1 0:5 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n" +
		"34 1 0:2 / /var/other rw - cgroup cgroup rw,cpu,cpuacct\n"
	want := []Mount{
		{Path: "/sys/fs/cgroup/cpu", Root: "/", Controllers: []string{"cpu", "cpuacct"}},
		{Path: "/sys/fs/cgroup/memory", Root: "/h8s", Controllers: []string{"memory"}},
	}
	if got := hierarchies(mountinfo.Parse(hybrid)); !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v", got)
	}
	unified := "30 1 0:2 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n"
	if got := hierarchies(mountinfo.Parse(unified)); !reflect.DeepEqual(got, []Mount{{Path: "/sys/fs/cgroup", Root: "/"}}) {
		t.Errorf("got %+v", got)
	}
}

func TestOwnPath(t *testing.T) {
	self := "5:memory:/h8s/n/system\n2:cpu,cpuacct:/a\n0::/u\n"
	for _, tc := range []struct {
		m    Mount
		want string
	}{
		{Mount{Root: "/h8s", Controllers: []string{"memory"}}, "n/system"},
		{Mount{Root: "/", Controllers: []string{"cpuacct"}}, "a"},
		{Mount{Root: "/"}, "u"},
		{Mount{Root: "/elsewhere", Controllers: []string{"memory"}}, ""},
	} {
		if got := ownPath(self, tc.m); got != tc.want {
			t.Errorf("%+v: got %q, want %q", tc.m, got, tc.want)
		}
	}
}

// TestGroup runs a process in a real group of the host, below a group of the test's own.
func TestGroup(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("skipped: needs root to make control groups")
	}
	parent := "/h8s-test-" + t.Name()
	g, err := Plan(parent, "abc")
	if err != nil {
		t.Fatal(err)
	}
	if len(g.Paths) == 0 {
		t.Skip("skipped: this machine has no cgroup mounts")
	}
	top, err := Plan("/", "x")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, p := range g.Paths {
			_ = os.Remove(p)
		}
		for i := range top.Paths {
			_ = os.Remove(top.Paths[i][:len(top.Paths[i])-len("/h8s-x")] + parent)
		}
	})
	if err := g.Make(); err != nil {
		t.Skipf("skipped: cannot make control groups here: %v", err)
	}
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	defer cmd.Process.Kill()
	if err := g.Enter(cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	if m := g.Metrics(); m.Pids.Current != 1 {
		t.Errorf("metrics %v", m)
	}
	if err := g.Remove(); err != nil {
		t.Fatal(err)
	}
	<-ended // Remove has killed it
	for _, p := range g.Paths {
		if _, err := os.Stat(p); err == nil {
			t.Errorf("%s is still there", p)
		}
	}
	if err := g.Remove(); err != nil {
		t.Errorf("second remove: %v", err)
	}
}
