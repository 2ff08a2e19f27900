package ocispec

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

var update = flag.Bool("update", false, "write the golden files anew")

func TestGuestGolden(t *testing.T) {
	in, err := os.ReadFile(filepath.Join("testdata", "cri.json"))
	if err != nil {
		t.Fatal(err)
	}
	s, err := Parse(in)
	if err != nil {
		t.Fatal(err)
	}
	mounts := []specs.Mount{{Destination: "/proc", Type: "proc", Source: "proc"}, {Destination: "/cfg", Type: "bind", Source: "/run/h8s/volumes/cfg", Options: []string{"rbind", "ro"}}}
	out, pid, err := Guest(s, "c1", mounts)
	if err != nil {
		t.Fatal(err)
	}
	if pid != (PIDNamespace{PID: 4194307}) {
		t.Errorf("pid namespace %+v", pid)
	}
	var pretty bytes.Buffer
	if err := json.Indent(&pretty, out, "", "  "); err != nil {
		t.Fatal(err)
	}
	pretty.WriteByte('\n')
	golden := filepath.Join("testdata", "guest.golden.json")
	if *update {
		if err := os.WriteFile(golden, pretty.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(want, pretty.Bytes()) {
		t.Errorf("differs from %s (go test -update writes it):\n%s", golden, pretty.Bytes())
	}
	if s.Hostname == "" || s.Linux.Namespaces[0].Path == "" {
		t.Error("the given spec was changed")
	}
}

func TestPIDNamespace(t *testing.T) {
	for p, want := range map[string]PIDNamespace{
		"":                 {},
		"/proc/77/ns/pid":  {PID: 77},
		"/proc/0/ns/pid":   {Sandbox: true},
		"/run/netns/pid-x": {Sandbox: true},
	} {
		if got, err := pidNamespace(p); err != nil || got != want {
			t.Errorf("%q: got %+v, %v", p, got, err)
		}
	}
	for _, p := range []string{"/proc/self/ns/pid", "/proc/-1/ns/pid", "/proc/99999999999/ns/pid"} {
		if _, err := pidNamespace(p); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: got %v", p, err)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	for _, text := range []string{"", "{}", `{"process":{"args":["a"]}}`, `{"process":{"args":[]},"linux":{}}`, string(make([]byte, MaxSpec+1))} {
		if _, err := Parse([]byte(text)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%.20q: got %v", text, err)
		}
	}
}

func FuzzGuest(f *testing.F) {
	in, err := os.ReadFile(filepath.Join("testdata", "cri.json"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(in)
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := Parse(b)
		if err != nil {
			return
		}
		out, _, err := Guest(s, "c1", nil)
		if err != nil {
			return
		}
		got, err := Parse(out)
		if err != nil {
			t.Fatal(err)
		}
		if got.Hooks != nil || got.Linux.CgroupsPath != "c1" || len(got.Mounts) != 0 || got.Root.Path != "rootfs" {
			t.Errorf("host's things left: %s", out)
		}
		for _, n := range got.Linux.Namespaces {
			if n.Path != "" {
				t.Errorf("namespace %s has path %q", n.Type, n.Path)
			}
		}
	})
}
