package examples

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"sigs.k8s.io/yaml"

	"github.com/hypernetes/hypernetes/cluster/image"
)

// TestManifests decodes every document and looks for its images among
// those that are built here, with tags that do not make kubelet pull always.
func TestManifests(t *testing.T) {
	catalog, err := image.Builtin()
	if err != nil {
		t.Fatal(err)
	}
	built := map[string]bool{}
	for _, r := range catalog {
		for _, tag := range r.Tags {
			built[tag] = true
		}
	}
	files, err := filepath.Glob("*/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no manifests: %v", err)
	}
	for _, file := range files {
		if _, err := os.Stat(filepath.Join(filepath.Dir(file), "README.md")); err != nil {
			t.Error(err)
		}
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, doc := range bytes.Split(data, []byte("\n---\n")) {
			for _, ref := range imagesOf(t, file, doc) {
				tag, err := name.NewTag(ref)
				if err != nil {
					t.Errorf("%s: %v", file, err)
					continue
				}
				full := strings.Replace(tag.Name(), "index.docker.io/", "docker.io/", 1)
				if !built[full] || tag.TagStr() == "latest" {
					t.Errorf("%s: image %s (%s) is built by no recipe, or is pulled always", file, ref, full)
				}
			}
		}
	}
}

// manifest is what of an object matters here; the API server checks the rest.
type manifest struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	Metadata   struct{ Name string }
	Spec       struct {
		podSpec
		Template struct{ Spec podSpec }
	}
}

type podSpec struct {
	InitContainers []struct{ Image string } `json:"initContainers"`
	Containers     []struct{ Image string } `json:"containers"`
}

func imagesOf(t *testing.T, file string, doc []byte) []string {
	t.Helper()
	var m manifest
	if err := yaml.Unmarshal(doc, &m); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	if m.APIVersion == "" || m.Kind == "" || m.Metadata.Name == "" {
		t.Errorf("%s: a document without apiVersion, kind or name", file)
	}
	var out []string
	for _, spec := range []podSpec{m.Spec.podSpec, m.Spec.Template.Spec} {
		for _, c := range append(spec.InitContainers, spec.Containers...) {
			out = append(out, c.Image)
		}
	}
	if len(out) == 0 && (m.Kind == "Pod" || m.Kind == "Deployment") {
		t.Errorf("%s: %s without containers", file, m.Kind)
	}
	return out
}
