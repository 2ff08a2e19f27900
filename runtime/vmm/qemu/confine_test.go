package qemu

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestConfinement looks at a running VM's process from outside.
func TestConfinement(t *testing.T) {
	files := variants(t)
	c := config(files[len(files)-1])
	cgroup := testCgroup(t)
	c.Cgroups = []string{cgroup}
	g := boot(t, c)
	proc := fmt.Sprintf("/proc/%d", g.PID())

	status := read(t, proc+"/status")
	for _, want := range []string{
		"Uid:\t1879048193\t1879048193\t1879048193\t1879048193\n", "Gid:\t1879048193\t1879048193\t1879048193\t1879048193\n",
		"Groups:\t \n", "NoNewPrivs:\t1\n", "Seccomp:\t2\n",
		"CapInh:\t0000000000000000\n", "CapPrm:\t0000000000000000\n", "CapEff:\t0000000000000000\n", "CapAmb:\t0000000000000000\n",
	} {
		if !strings.Contains(status, want) {
			t.Errorf("status lacks %q:\n%s", want, status)
		}
	}
	for _, ns := range []string{"mnt", "net", "ipc", "uts"} {
		ours, err1 := os.Readlink("/proc/self/ns/" + ns)
		theirs, err2 := os.Readlink(proc + "/ns/" + ns)
		if err1 != nil || err2 != nil || ours == theirs {
			t.Errorf("%s namespace: ours %s, the vm's %s (%v %v)", ns, ours, theirs, err1, err2)
		}
	}
	for line := range strings.Lines(read(t, proc+"/net/dev")) {
		if strings.Contains(line, ":") && !strings.Contains(line, "lo:") {
			t.Errorf("network device in the vm's namespace: %s", line)
		}
	}
	checkView(t, proc)
	if !strings.Contains(read(t, proc+"/cgroup"), filepath.Base(cgroup)) {
		t.Errorf("cgroups: %s", read(t, proc+"/cgroup"))
	}
	if limits := read(t, proc+"/limits"); !strings.Contains(limits, "Max core file size        0                    0") {
		t.Errorf("limits: %s", limits)
	}
	if !strings.Contains(read(t, proc+"/cmdline"), "guest="+c.ID) || read(t, proc+"/comm") != processName(c.ID)+"\n" {
		t.Errorf("process title %q %q", read(t, proc+"/comm"), read(t, proc+"/cmdline"))
	}
}

func checkView(t *testing.T, proc string) {
	t.Helper()
	for line := range strings.Lines(read(t, proc+"/mountinfo")) {
		if f := strings.Fields(line); !strings.HasPrefix(f[5], "ro,") {
			t.Errorf("writable mount: %s", line)
		}
	}
	n := 0
	err := filepath.WalkDir(proc+"/root/", func(p string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			n++
			if !d.Type().IsRegular() && !strings.HasSuffix(p, "/root/dev/null") {
				t.Errorf("not a file in the vm's root: %s", p)
			}
		}
		return err
	})
	if err != nil || n < 10 || n > 200 {
		t.Errorf("%d files in the vm's root: %v", n, err)
	}
	for _, p := range []string{"/etc", "/proc/self", "/dev/kvm", "/dev/mem", "/sys", "/usr/bin/sh", "/root"} {
		if _, err := os.Stat(proc + "/root" + p); err == nil {
			t.Errorf("the vm sees %s", p)
		}
	}
}

// testCgroup makes a cgroup of the version the machine has.
func testCgroup(t *testing.T) string {
	t.Helper()
	for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/pids", "/sys/fs/cgroup/unified"} {
		if _, err := os.Stat(root + "/cgroup.procs"); err != nil {
			continue
		}
		dir := fmt.Sprintf("%s/h8s-qemu-test-%d", root, os.Getpid())
		if err := os.Mkdir(dir, 0o755); err != nil {
			continue
		}
		t.Cleanup(func() {
			if err := os.Remove(dir); err != nil {
				t.Error(err)
			}
		})
		return dir
	}
	t.Skip("no cgroup hierarchy to make a cgroup in")
	return ""
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
