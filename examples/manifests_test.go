package examples

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/hypernetes/hypernetes/cluster/image"
)

// TestManifests decodes every document strictly and looks for its images among
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
			for _, c := range containers(t, file, doc) {
				tag, err := name.NewTag(c.Image)
				if err != nil {
					t.Errorf("%s: %v", file, err)
					continue
				}
				full := strings.Replace(tag.Name(), "index.docker.io/", "docker.io/", 1)
				if !built[full] || tag.TagStr() == "latest" {
					t.Errorf("%s: image %s (%s) is built by no recipe, or is pulled always", file, c.Image, full)
				}
			}
		}
	}
}

func containers(t *testing.T, file string, doc []byte) []corev1.Container {
	t.Helper()
	var kind metav1.TypeMeta
	if err := yaml.Unmarshal(doc, &kind); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	var pod corev1.Pod
	var deployment appsv1.Deployment
	var object any
	switch kind.Kind {
	case "Pod":
		object = &pod
	case "Deployment":
		object = &deployment
	case "Service":
		object = &corev1.Service{}
	case "ConfigMap":
		object = &corev1.ConfigMap{}
	case "Secret":
		object = &corev1.Secret{}
	default:
		t.Fatalf("%s: kind %q is not expected here", file, kind.Kind)
	}
	if err := yaml.UnmarshalStrict(doc, object); err != nil {
		t.Errorf("%s: %v", file, err)
	}
	spec := pod.Spec
	if kind.Kind == "Deployment" {
		spec = deployment.Spec.Template.Spec
	}
	return append(spec.InitContainers, spec.Containers...)
}
