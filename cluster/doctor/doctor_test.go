package doctor

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/cluster/layout"
	"github.com/hypernetes/hypernetes/cluster/settings"
)

func TestRunKeepsOrderAndBoundsChecks(t *testing.T) {
	var deadline bool
	results := Run(t.Context(), []Check{
		{"a", func(ctx context.Context) Result { _, deadline = ctx.Deadline(); return pass("fine") }},
		{"b", func(context.Context) Result { return fail("H8S_B", "bad", "mend it") }},
		{"c", func(context.Context) Result { return warn("H8S_C", "so so", "") }},
	})
	if results[0].ID != "a" || results[1].ID != "b" || results[2].ID != "c" || !deadline {
		t.Errorf("%+v, deadline %t", results, deadline)
	}
	if bad := Failed(results); len(bad) != 1 || bad[0].Code != "H8S_B" {
		t.Errorf("failed: %+v", bad)
	}
}

// TestMachine runs all checks on this machine; whatever they find, each must say why,
// and how to mend it if something is wrong.
func TestMachine(t *testing.T) {
	a := layout.Artifacts{Root: t.TempDir()}
	ids := map[string]bool{}
	for _, r := range Run(t.Context(), Machine(Input{Artifacts: a, Settings: settings.Node{APIPort: 1}, Quick: true})) {
		if ids[r.ID] {
			t.Errorf("two checks called %s", r.ID)
		}
		ids[r.ID] = true
		if r.Reason == "" || (r.Verdict != Pass && (r.Remedy == "" || !strings.HasPrefix(r.Code, "H8S_"))) {
			t.Errorf("incomplete: %+v", r)
		}
	}
}

// TestInstances counts what this process opens and forgets what it closes.
func TestInstances(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("counts root's instances: run as root")
	}
	proc := t.TempDir()
	if err := os.Symlink("/proc/self", filepath.Join(proc, "1")); err != nil {
		t.Fatal(err)
	}
	before := instances(proc)
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	if n := instances(proc); n != before+1 {
		t.Errorf("%d instances, want %d", n, before+1)
	}
	if err := unix.Close(fd); err != nil {
		t.Fatal(err)
	}
	if n := instances(proc); n != before {
		t.Errorf("%d instances, want %d", n, before)
	}
}

func TestComponentsAndGuest(t *testing.T) {
	a := layout.Artifacts{Root: t.TempDir()}
	if r := components(Input{Artifacts: a, Settings: settings.Node{RuntimeOnly: true}})(t.Context()); r.Verdict != Fail || !strings.Contains(r.Reason, "containerd-shim-hyper-v2") {
		t.Errorf("%+v", r)
	}
	if r := guest(a)(t.Context()); r.Verdict != Fail {
		t.Errorf("%+v", r)
	}
	for _, name := range []string{"share/vmlinux", "share/initramfs.img", "share/scratch.ext4"} {
		path := filepath.Join(a.Root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if r := guest(a)(t.Context()); r.Verdict != Pass {
		t.Errorf("%+v", r)
	}
}

func TestPorts(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	in := Input{Settings: settings.Node{APIPort: l.Addr().(*net.TCPAddr).Port}}
	if r := ports(in)(t.Context()); r.Verdict != Fail || r.Code != "H8S_PORT_IN_USE" {
		t.Errorf("taken: %+v", r)
	}
	in.Running = true
	if r := ports(in)(t.Context()); r.Verdict != Pass {
		t.Errorf("taken by the node itself: %+v", r)
	}
}

func TestQemuMajor(t *testing.T) {
	for line, want := range map[string]int{"QEMU emulator version 7.2.19 (Debian 1:7.2+dfsg-7+deb12u14)": 7, "QEMU emulator version 10.0.0": 10} {
		if got, ok := qemuMajor(line); !ok || got != want {
			t.Errorf("%q: %d %t", line, got, ok)
		}
	}
	for _, line := range []string{"", "version", "version x.y"} {
		if _, ok := qemuMajor(line); ok {
			t.Errorf("%q was read", line)
		}
	}
}
