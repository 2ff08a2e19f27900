package images

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/compression"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// entry is a file of a layer: a directory if its name ends in a slash, else a file with
// the given text unless the header says otherwise.
type entry struct {
	name, text string
	header     tar.Header
}

var stamp = time.Unix(1_700_000_000, 0)

// layer makes a layer of a tar made of entries.
func layer(t *testing.T, comp compression.Compression, entries ...entry) v1.Layer {
	t.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, e := range entries {
		h := e.header
		h.Name = e.name
		h.ModTime = stamp
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
			if strings.HasSuffix(e.name, "/") {
				h.Typeflag = tar.TypeDir
			}
		}
		if h.Mode == 0 {
			h.Mode = 0o644
			if h.Typeflag == tar.TypeDir {
				h.Mode = 0o755
			}
		}
		if h.Typeflag == tar.TypeReg {
			h.Size = int64(len(e.text))
		}
		if err := tw.WriteHeader(&h); err != nil {
			t.Fatalf("%s: %v", e.name, err)
		}
		if _, err := io.WriteString(tw, e.text); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return layerOf(t, comp, b.Bytes())
}

// layerOf makes a layer of what should be a tar.
func layerOf(t *testing.T, comp compression.Compression, content []byte) v1.Layer {
	t.Helper()
	if comp == compression.None {
		return static.NewLayer(content, types.OCIUncompressedLayer)
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content)), nil },
		tarball.WithCompression(comp), tarball.WithCompressionLevel(1), tarball.WithMediaType(mediaTypes[comp]))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

var mediaTypes = map[compression.Compression]types.MediaType{
	compression.GZip: types.OCILayer, compression.ZStd: types.OCILayerZStd,
}

// noise is the content of a file that does not compress.
func noise(seed byte, size int) []byte {
	out := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(out) // never fails
	return out
}

// onTestbox appends layers to the testbox image, as an OCI image.
func onTestbox(t *testing.T, out string, layers ...v1.Layer) v1.Image {
	t.Helper()
	base, err := tarball.ImageFromPath(filepath.Join(out, "images", "testbox.tar"), nil)
	if err != nil {
		t.Fatal(err)
	}
	img, err := mutate.AppendLayers(mutate.MediaType(base, types.OCIManifestSchema1), layers...)
	if err != nil {
		t.Fatal(err)
	}
	return mutate.ConfigMediaType(img, types.OCIConfigJSON)
}

// save writes an image as an OCI layout in a tar, as `skopeo copy` does; edit, if any,
// changes blobs on the way.
func save(t *testing.T, tag string, img v1.Image, edit func(digest string, content []byte) []byte) string {
	t.Helper()
	if _, err := name.NewTag(tag); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "image.tar")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	tw := tar.NewWriter(f)
	add := func(path string, content []byte, err error) {
		t.Helper()
		if err == nil {
			err = tw.WriteHeader(&tar.Header{Name: path, Mode: 0o644, Size: int64(len(content)), ModTime: stamp})
		}
		if err == nil {
			_, err = tw.Write(content)
		}
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
	}
	blob := func(h v1.Hash, content []byte, err error) {
		t.Helper()
		if edit != nil && err == nil {
			content = edit(h.String(), content)
		}
		add("blobs/"+h.Algorithm+"/"+h.Hex, content, err)
	}
	add("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`), nil)
	raw, err := img.RawManifest()
	if err != nil {
		t.Fatal(err)
	}
	digest, err := img.Digest()
	blob(digest, raw, err)
	add("index.json", fmt.Appendf(nil,
		`{"schemaVersion":2,"manifests":[{"mediaType":%q,"digest":%q,"size":%d,"annotations":{"io.containerd.image.name":%q}}]}`,
		types.OCIManifestSchema1, digest, len(raw), tag), nil)
	config, err := img.RawConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	configName, err := img.ConfigName()
	blob(configName, config, err)
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range layers {
		h, err := l.Digest()
		if err != nil {
			t.Fatal(err)
		}
		r, err := l.Compressed()
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		_ = r.Close()
		blob(h, content, err)
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return file
}
