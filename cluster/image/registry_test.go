package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

func testRegistry(t *testing.T) (*httptest.Server, string) {
	t.Helper()
	b := testBuilder(t, baseRecipe, topRecipe)
	results, err := b.Build(context.Background(), "top")
	must(t, err)
	r, err := NewRegistry(b.Images)
	must(t, err)
	server := httptest.NewServer(r)
	t.Cleanup(func() {
		server.Close()
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return server, results[0].Digest
}

func TestRegistryAnswersWhatContainerdAsks(t *testing.T) {
	server, digest := testRegistry(t)
	for _, tc := range []struct {
		method, path string
		code         int
	}{
		{"GET", "/v2/", 200},
		{"HEAD", "/v2/library/base/manifests/latest?ns=docker.io", 200},
		{"GET", "/v2/library/base/manifests/" + digest + "?ns=docker.io", 200},
		{"GET", "/v2/base/manifests/1?ns=h8s.local", 200},
		{"GET", "/v2/base/manifests/1?ns=docker.io", 404},
		{"GET", "/v2/library/base/manifests/2?ns=docker.io", 404},
		{"GET", "/v2/library/base/blobs/sha256:00?ns=docker.io", 404},
		{"GET", "/v2/library/base/tags/list", 404},
		{"PUT", "/v2/library/base/manifests/latest?ns=docker.io", 405},
		{"GET", "/v2/../../etc/passwd", 404},
		{"GET", "/", 404},
	} {
		req, err := http.NewRequest(tc.method, server.URL+tc.path, nil)
		must(t, err)
		resp, err := server.Client().Do(req)
		must(t, err)
		must(t, resp.Body.Close())
		if resp.StatusCode != tc.code {
			t.Errorf("%s %s: %s, want %d", tc.method, tc.path, resp.Status, tc.code)
		}
		if tc.code == 200 && strings.Contains(tc.path, "manifests/latest") && resp.Header.Get("Docker-Content-Digest") != digest {
			t.Errorf("%s: digest %q, want %q", tc.path, resp.Header.Get("Docker-Content-Digest"), digest)
		}
	}
}

func TestRegistryServesWholeImages(t *testing.T) {
	server, _ := testRegistry(t)
	fetch := func(path string) []byte {
		resp, err := server.Client().Get(server.URL + "/v2/top/" + path + "?ns=h8s.local")
		must(t, err)
		defer resp.Body.Close()
		data, err := io.ReadAll(resp.Body)
		must(t, err)
		if resp.StatusCode != http.StatusOK {
			t.Fatalf("%s: %s", path, resp.Status)
		}
		return data
	}
	m, err := v1.ParseManifest(bytes.NewReader(fetch("manifests/1")))
	must(t, err)
	if len(m.Layers) != 2 {
		t.Errorf("%d layers", len(m.Layers))
	}
	for _, d := range append(m.Layers, m.Config) {
		data := fetch("blobs/" + d.Digest.String())
		if got := fmt.Sprintf("sha256:%x", sha256.Sum256(data)); got != d.Digest.String() || int64(len(data)) != d.Size {
			t.Errorf("blob %s: %d bytes of %s", d.Digest, len(data), got)
		}
	}
}
