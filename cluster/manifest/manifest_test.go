package manifest

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"
)

var update = flag.Bool("update", false, "write the golden file anew")

func values() Values {
	return Values{
		NodeIP: "100.64.0.1", Server: "https://100.64.0.1:6443", BootstrapGroup: "system:bootstrappers:h8s:nodes", MetricsPort: 4443, DNSServiceIP: "10.96.0.10", ClusterDomain: "cluster.local",
		CA: []byte("PEM"), CoreDNSImage: "h8s.local/coredns:1", Overhead: DefaultOverhead,
	}
}

func TestRenderGolden(t *testing.T) {
	objs, err := Render(values())
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, o := range objs {
		path, err := o.Path()
		if err != nil {
			t.Fatal(err)
		}
		if o.Kind() == "CustomResourceDefinition" {
			fmt.Fprintf(&b, "# %s\n", path) // its content is controller-gen's
			continue
		}
		text, err := yaml.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&b, "# %s\n%s\n", path, text)
	}
	path := filepath.Join("testdata", "objects.golden")
	if *update {
		if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), b.String()); diff != "" {
		t.Error(diff)
	}
}

func TestRenderForward(t *testing.T) {
	for forward, want := range map[string]bool{"": false, "10.0.2.3": true} {
		v := values()
		v.Forward = forward
		objs, err := Render(v)
		if err != nil {
			t.Fatal(err)
		}
		found := false
		for _, o := range objs {
			if o.Kind() == "ConfigMap" && o.Name() == "coredns" {
				found = strings.Contains(fmt.Sprint(o), "forward . 10.0.2.3")
			}
		}
		if found != want {
			t.Errorf("forward %q: in the Corefile: %t", forward, found)
		}
	}
}

func TestRenderWithoutDNS(t *testing.T) {
	v := values()
	v.CoreDNSImage = ""
	objs, err := Render(v)
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range objs {
		if o.Kind() == "Deployment" {
			t.Errorf("%s without an image", o.Name())
		}
	}
}

// server is an Applier whose answers are scripted per path, one error per call.
type server struct {
	errs  map[string][]error
	calls []string
}

func (s *server) Apply(_ context.Context, path, _ string, _ any) error {
	s.calls = append(s.calls, path)
	if e := s.errs[path]; len(e) > 0 {
		s.errs[path] = e[1:]
		return e[0]
	}
	return nil
}

func (s *server) Delete(_ context.Context, path string) error {
	s.calls = append(s.calls, "delete "+path)
	return nil
}

func object(name string) Object {
	return Object{"apiVersion": "v1", "kind": "ConfigMap", "metadata": map[string]any{"name": name, "namespace": "x"}}
}

const pathA, pathB = "/api/v1/namespaces/x/configmaps/a", "/api/v1/namespaces/x/configmaps/b"

func TestApplyRepeatsWhatPasses(t *testing.T) {
	s := &server{errs: map[string][]error{pathA: {errdefs.ErrNotFound, errdefs.ErrUnavailable}}}
	if err := Apply(t.Context(), s, []Object{object("a"), object("b")}); err != nil {
		t.Fatal(err)
	}
	if want := []string{pathA, pathB, pathA, pathA}; !cmp.Equal(want, s.calls) {
		t.Errorf("calls %v, want %v", s.calls, want)
	}
}

func TestApplyReplacesWhatCannotBeChanged(t *testing.T) {
	const path = "/apis/storage.k8s.io/v1/csidrivers/d"
	s := &server{errs: map[string][]error{path: {errdefs.ErrInvalidArgument}}}
	o := Object{"apiVersion": "storage.k8s.io/v1", "kind": "CSIDriver", "metadata": map[string]any{"name": "d"}}
	if err := Apply(t.Context(), s, []Object{o}); err != nil {
		t.Fatal(err)
	}
	if want := []string{path, "delete " + path, path}; !cmp.Equal(want, s.calls) {
		t.Errorf("calls %v, want %v", s.calls, want)
	}
}

func TestApplyEndsOnWhatDoesNot(t *testing.T) {
	s := &server{errs: map[string][]error{pathA: {errdefs.ErrInvalidArgument}}}
	err := Apply(t.Context(), s, []Object{object("a"), object("b")})
	if !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), "ConfigMap a") {
		t.Errorf("error %v", err)
	}
	if len(s.calls) != 1 {
		t.Errorf("calls %v", s.calls)
	}
}

func TestApplyEndsWithContext(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 250*time.Millisecond)
	defer cancel()
	s := &server{errs: map[string][]error{pathA: {errdefs.ErrUnavailable, errdefs.ErrUnavailable, errdefs.ErrUnavailable, errdefs.ErrUnavailable, errdefs.ErrUnavailable}}}
	if err := Apply(ctx, s, []Object{object("a")}); !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, errdefs.ErrUnavailable) {
		t.Errorf("error %v", err)
	}
}

func TestLoadOverhead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "overhead.json")
	if o, err := LoadOverhead(path); err != nil || o != DefaultOverhead {
		t.Errorf("absent: %v %v", o, err)
	}
	if err := os.WriteFile(path, []byte(`{"memory":"61Mi"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if o, err := LoadOverhead(path); err != nil || o != (Overhead{CPU: DefaultOverhead.CPU, Memory: "61Mi"}) {
		t.Errorf("measured: %v %v", o, err)
	}
	if err := os.WriteFile(path, []byte(`nonsense`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadOverhead(path); err == nil {
		t.Error("nonsense was accepted")
	}
}
