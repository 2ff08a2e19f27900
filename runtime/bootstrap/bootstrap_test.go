package bootstrap

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
)

// TestMain makes this test a shim when it is started as one.
func TestMain(m *testing.M) {
	if os.Getenv("H8S_TEST_SHIM") == "" {
		os.Exit(m.Run())
	}
	os.Exit(Main(Program{
		Check: func(p Params) error {
			if p.ConfigPath == "/refused" {
				return errors.New("no kernel")
			}
			return nil
		},
		// Serves one connection, which gets the parameters.
		Serve: func(_ context.Context, p Params, l net.Listener) error {
			c, err := l.Accept()
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = c.Write([]byte(strings.Join([]string{p.ID, p.Namespace, p.Bundle, p.Address, p.ConfigPath}, " ")))
			return err
		},
		Delete: func(_ context.Context, p Params) error {
			return os.WriteFile(filepath.Join(p.Bundle, "deleted"), []byte(p.ConfigPath), 0o600)
		},
	}))
}

func run(t *testing.T, dir string, in []byte, args ...string) (stdout, stderr []byte, err error) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, args...)
	cmd.Dir, cmd.Stdin, cmd.Env = dir, bytes.NewReader(in), append(os.Environ(), "H8S_TEST_SHIM=1")
	var out, errb bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errb
	err = cmd.Run()
	return out.Bytes(), errb.Bytes(), err
}

func params(t *testing.T, id, socketDir, config string) []byte {
	t.Helper()
	p := &bootapi.BootstrapParams{InstanceID: id, Namespace: "k8s.io", ContainerdTtrpcAddress: "/c.ttrpc", SocketDir: &socketDir}
	if config != "" {
		if err := p.AddExtension(&runtimeoptions.Options{ConfigPath: config}); err != nil {
			t.Fatal(err)
		}
	}
	b, err := proto.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestStartServeDelete(t *testing.T) {
	bundle, sockets := t.TempDir(), filepath.Join(t.TempDir(), "s")
	args := []string{"-namespace", "k8s.io", "-address", "/c", "-publish-binary", "/b", "-id", "pod1"}
	out, errb, err := run(t, bundle, params(t, "pod1", sockets, "/etc/x.toml"), append(args, "start")...)
	if err != nil || len(errb) != 0 {
		t.Fatalf("start: %v, standard error %q", err, errb)
	}
	var r bootapi.BootstrapResult
	if err := proto.Unmarshal(out, &r); err != nil {
		t.Fatal(err)
	}
	path, ok := strings.CutPrefix(r.Address, "unix://")
	if !ok || r.Version != 3 || r.Protocol != "ttrpc" || len(r.Extensions) != 1 {
		t.Fatalf("result %v", &r)
	}
	var claims types.MountCapabilities
	if err := r.Extensions[0].Value.UnmarshalTo(&claims); err != nil || !strings.Contains(strings.Join(claims.Transforms, " "), "format mkdir") || claims.Types[0] != "erofs" {
		t.Errorf("claims %v, %v", &claims, err)
	}
	for p, want := range map[string]os.FileMode{path: 0o600, sockets: 0o700} {
		if st, err := os.Stat(p); err != nil || st.Mode().Perm() != want {
			t.Errorf("%s: %v, %v", p, st.Mode(), err)
		}
	}
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	var got bytes.Buffer
	if _, err := got.ReadFrom(c); err != nil {
		t.Fatal(err)
	}
	if want := "pod1 k8s.io " + bundle + " /c.ttrpc /etc/x.toml"; got.String() != want {
		t.Errorf("served with %q, want %q", got.String(), want)
	}
	for range 2 { // delete is repeated
		out, errb, err = run(t, "/", nil, append(args, "-bundle", bundle, "delete")...)
		var d taskapi.DeleteResponse
		if err != nil || len(errb) != 0 || proto.Unmarshal(out, &d) != nil || d.ExitStatus != 137 || d.ExitedAt == nil {
			t.Errorf("delete: %v, %q, %v", err, errb, &d)
		}
	}
	if b, err := os.ReadFile(filepath.Join(bundle, "deleted")); err != nil || string(b) != "/etc/x.toml" {
		t.Errorf("deleted with configuration %q, %v", b, err)
	}
}

func TestDeleteOfAContainerFindsTheConfiguration(t *testing.T) {
	dir := t.TempDir()
	for _, d := range []string{"pod1", "c1"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("/etc/x.toml", filepath.Join(dir, "pod1", configLink)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "c1", "sandbox"), []byte("pod1"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"pod1", "c1"} {
		if got := noted(filepath.Join(dir, d)); got != "/etc/x.toml" {
			t.Errorf("%s: %q", d, got)
		}
	}
}

func TestStartRefuses(t *testing.T) {
	args := []string{"-namespace", "k8s.io", "-id", "pod1", "start"}
	for name, in := range map[string][]byte{
		"nothing": nil, "another's": params(t, "pod2", t.TempDir(), ""), "garbage": []byte("\xff\xff"), "by check": params(t, "pod1", t.TempDir(), "/refused"),
	} {
		out, errb, err := run(t, t.TempDir(), in, args...)
		if err == nil || len(out) != 0 || len(errb) == 0 {
			t.Errorf("%s: %v, %q, %q", name, err, out, errb)
		}
	}
	for _, bad := range [][]string{{"start"}, {"-id", "x", "-namespace", "y"}, {"-id", "x", "-namespace", "y", "dance"}, {"-nosuch"}} {
		if _, _, err := run(t, t.TempDir(), nil, bad...); err == nil {
			t.Errorf("%v was accepted", bad)
		}
	}
}

func TestListen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "d", "s")
	l, err := listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := listen(path); err == nil {
		t.Error("a live socket was replaced")
	}
	l.SetUnlinkOnClose(false)
	_ = l.Close()
	l, err = listen(path) // a dead one is
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
}

func FuzzReadParams(f *testing.F) {
	p := &bootapi.BootstrapParams{InstanceID: "a", Namespace: "b"}
	b, err := proto.Marshal(p)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := readParams(Params{ID: "a", Namespace: "b"}, bytes.NewReader(b))
		if err == nil && p.Socket == "" {
			t.Error("no socket")
		}
		if err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("class of %v", err)
		}
	})
}
