package badinput

import (
	"archive/tar"
	"bytes"
	"crypto/rand"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// uniqueArchive writes an image with one layer that no other image has.
func uniqueArchive(t *testing.T, tag string) string {
	t.Helper()
	content := make([]byte, 256<<10)
	if _, err := rand.Read(content); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	if err := tw.WriteHeader(&tar.Header{Name: "noise", Mode: 0o644, Size: int64(len(content))}); err != nil {
		t.Fatal(err)
	}
	if _, err := tw.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	img, err := mutate.ConfigFile(empty.Image, &v1.ConfigFile{OS: "linux", Architecture: runtime.GOARCH})
	if err != nil {
		t.Fatal(err)
	}
	img, err = mutate.AppendLayers(img, layer)
	if err != nil {
		t.Fatal(err)
	}
	ref, err := name.NewTag(tag)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "image.tar")
	if err := tarball.WriteToFile(file, ref, img); err != nil {
		t.Fatal(err)
	}
	return file
}

// ownImage loads an image of the test's own and returns its tag and the files of its
// layers in the node. It is removed at the end.
func ownImage(t *testing.T, c *testcluster.Cluster, name string) (tag string, layers []string) {
	t.Helper()
	tag = "h8s.local/corrupt-" + name + ":1"
	known := map[string]bool{}
	for _, f := range layerFiles(t, c) {
		known[f] = true
	}
	if r := run(t, nil, "h8s", "image", "load", "--name", c.Node, uniqueArchive(t, tag)); r.code != 0 {
		t.Fatalf("h8s image load: %s", r)
	}
	t.Cleanup(func() {
		if r := run(t, nil, "h8s", "image", "rm", "--name", c.Node, tag); r.code != 0 {
			t.Errorf("h8s image rm: %s", r)
		}
	})
	for _, f := range layerFiles(t, c) {
		if !known[f] {
			layers = append(layers, f)
		}
	}
	if len(layers) == 0 {
		t.Fatal("loading an image made no layer file")
	}
	return tag, layers
}

func layerFiles(t *testing.T, c *testcluster.Cluster) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("/var/lib/h8s", c.Node, "containerd/io.containerd.snapshotter.v1.erofs/snapshots/*/*.erofs"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if _, err := os.Stat(f); err != nil {
			t.Fatal(err)
		}
	}
	return files
}
