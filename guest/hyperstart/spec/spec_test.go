package spec

import (
	"encoding/json"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func guest() Guest {
	return Guest{ID: "c1", CgroupParent: "/pod", Shm: "/run/h8s/shm", ResolvConf: "/run/h8s/etc/resolv.conf",
		Hostname: "/run/h8s/etc/hostname", Hosts: "/run/h8s/etc/hosts", Own: "/run/h8s/", Seccomp: true, Swap: false}
}

// TestGolden fits what containerd's CRI plugin makes of an ordinary Pod. Set UPDATE=1
// to write the golden file anew.
func TestGolden(t *testing.T) {
	in, err := os.ReadFile("testdata/cri.json")
	if err != nil {
		t.Fatal(err)
	}
	out, sysctls, err := Fit(in, guest())
	if err != nil {
		t.Fatal(err)
	}
	if sysctls["net.core.somaxconn"] != "1024" {
		t.Errorf("sysctls: %v", sysctls)
	}
	var pretty any
	if err := json.Unmarshal(out, &pretty); err != nil {
		t.Fatal(err)
	}
	got, err := json.MarshalIndent(pretty, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	const golden = "testdata/cri.golden.json"
	if os.Getenv("UPDATE") != "" {
		if err := os.WriteFile(golden, append(got, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if strings.TrimSpace(string(want)) != string(got) {
		t.Errorf("fitted spec differs from %s:\n%s", golden, got)
	}
}

func TestFitRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		raw   string
		guest func(*Guest)
		want  error
	}{
		"no JSON":        {"{", nil, errdefs.ErrInvalidArgument},
		"no process":     {"{}", nil, errdefs.ErrInvalidArgument},
		"user namespace": {`{"process":{"args":["x"]},"linux":{"namespaces":[{"type":"user"}]}}`, nil, errdefs.ErrNotImplemented},
		"seccomp": {`{"process":{"args":["x"]},"linux":{"seccomp":{"defaultAction":"SCMP_ACT_ALLOW"}}}`,
			func(g *Guest) { g.Seccomp = false }, errdefs.ErrNotImplemented},
	} {
		g := guest()
		if c.guest != nil {
			c.guest(&g)
		}
		if _, _, err := Fit([]byte(c.raw), g); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestOwnMountWins(t *testing.T) {
	raw := `{"process":{"args":["x"]},"mounts":[{"destination":"/etc/hosts","source":"/run/h8s/volumes/hosts","type":"bind"},{"destination":"/etc/resolv.conf/","source":"/var/x"}]}`
	out, _, err := Fit([]byte(raw), guest())
	if err != nil {
		t.Fatal(err)
	}
	var s specs.Spec
	if err := json.Unmarshal(out, &s); err != nil {
		t.Fatal(err)
	}
	by := map[string]string{}
	for _, m := range s.Mounts {
		by[m.Destination] = m.Source
	}
	if by["/etc/hosts"] != "/run/h8s/volumes/hosts" || by["/etc/resolv.conf"] != "/run/h8s/etc/resolv.conf" || len(s.Mounts) != 4 {
		t.Errorf("mounts: %v", s.Mounts)
	}
}

func FuzzFit(f *testing.F) {
	in, err := os.ReadFile("testdata/cri.json")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(in)
	f.Add([]byte(`{"process":{"args":["x"]},"linux":{"resources":{"unified":{"cpuset.cpus":"1"}}},"hooks":{"prestart":[{"path":"/x"}]}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		out, _, err := Fit(raw, guest())
		if err != nil {
			return
		}
		var s specs.Spec
		if err := json.Unmarshal(out, &s); err != nil {
			t.Fatal(err)
		}
		if s.Hooks != nil || s.Root.Path != "rootfs" || s.Linux.CgroupsPath != "/pod/c1" {
			t.Fatalf("unfit spec: %s", out)
		}
		for _, ns := range s.Linux.Namespaces {
			if ns.Path != "" {
				t.Fatalf("namespace path of the host: %s", out)
			}
		}
		_, _ = Process(raw, true)
		_, _ = Resources(raw, true)
	})
}

func TestDevices(t *testing.T) {
	uid, mode := uint32(7), os.FileMode(0o600)
	one, other := int64(1), int64(2)
	in := &specs.Spec{Process: &specs.Process{Args: []string{"x"}}, Linux: &specs.Linux{
		Devices: []specs.LinuxDevice{{Path: "/dev/data", Type: "b", Major: 1, Minor: 1, UID: &uid, FileMode: &mode}, {Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229}},
		Resources: &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{
			{Access: "rwm"}, {Allow: true, Type: "b", Major: &one, Minor: &one, Access: "rwm"}, {Allow: true, Type: "b", Major: &one, Minor: &other, Access: "r"},
		}},
	}}
	raw, err := json.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	g := guest()
	g.Devices = []Device{{Path: "/dev/data", Major: 8, Minor: 16}, {Path: "/data", Major: 8, Minor: 32, ReadOnly: true}}
	out, _, err := Fit(raw, g)
	if err != nil {
		t.Fatal(err)
	}
	var got specs.Spec
	if err := json.Unmarshal(out, &got); err != nil {
		t.Fatal(err)
	}
	devices, _ := json.Marshal(got.Linux.Devices)
	if want := `[{"path":"/dev/fuse","type":"c","major":10,"minor":229},{"path":"/dev/data","type":"b","major":8,"minor":16,"fileMode":384,"uid":7},` +
		`{"path":"/data","type":"b","major":8,"minor":32,"fileMode":432}]`; string(devices) != want {
		t.Errorf("devices: %s", devices)
	}
	rules, _ := json.Marshal(got.Linux.Resources.Devices)
	if want := `[{"allow":false,"access":"rwm"},{"allow":true,"type":"b","major":1,"minor":2,"access":"r"},` +
		`{"allow":true,"type":"b","major":8,"minor":16,"access":"rwm"},{"allow":true,"type":"b","major":8,"minor":32,"access":"rm"}]`; string(rules) != want {
		t.Errorf("rules: %s", rules)
	}
	for _, p := range []string{"", "/", "dev/x", "/dev/../x", "/dev/"} {
		g.Devices = []Device{{Path: p}}
		if _, _, err := Fit(raw, g); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", p, err)
		}
	}
}

func TestUpdateLeavesDevices(t *testing.T) {
	out, err := Resources([]byte(`{"devices":[{"allow":false,"access":"rwm"}],"memory":{"limit":5}}`), true)
	if err != nil || string(out) != `{"memory":{"limit":5}}` {
		t.Errorf("%s, %v", out, err)
	}
}
