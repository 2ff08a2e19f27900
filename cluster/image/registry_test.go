package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

func testRegistry(t *testing.T) (*httptest.Server, string) {
	t.Helper()
	b := testBuilder(t, baseRecipe, topRecipe)
	results, err := b.Build(context.Background(), "top")
	must(t, err)
	r := NewRegistry(t.Context(), b.Images)
	server := httptest.NewServer(r)
	t.Cleanup(func() {
		server.Close()
		r.Close()
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
		{"GET", "/v2/base/manifests/1?ns=docker.io", 307},
		{"GET", "/v2/library/base/manifests/2?ns=docker.io", 307},
		{"GET", "/v2/library/base/blobs/sha256:00?ns=docker.io", 307},
		{"GET", "/v2/library/base/tags/list", 404},
		{"GET", "/v2/library/base/referrers/" + digest + "?ns=docker.io", 404},
		{"GET", "/v2/library/base/manifests/2", 404},
		{"GET", "/v2/base/manifests/2?ns=h8s.local", 404},
		{"GET", "/v2/base/manifests/1?ns=127.0.0.1:5001", 404},
		{"GET", "/v2/base/manifests/1?ns=localhost:5001", 404},
		{"GET", "/v2/base/manifests/1?ns=a/b", 404},
		{"GET", "/v2/base/manifests/1?ns=user@host", 404},
		{"PUT", "/v2/library/base/manifests/latest?ns=docker.io", 405},
		{"GET", "/v2/../../etc/passwd", 404},
		{"GET", "/", 404},
	} {
		req, err := http.NewRequest(tc.method, server.URL+tc.path, nil)
		must(t, err)
		resp, err := http.DefaultTransport.RoundTrip(req) // follows no redirect
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

// TestRegistryFollowsItsDirectory changes the directory under a running registry.
func TestRegistryFollowsItsDirectory(t *testing.T) {
	b := testBuilder(t, baseRecipe, topRecipe)
	results, err := b.Build(t.Context(), "base")
	must(t, err)
	base := filepath.Join(b.Images, "base.tar")
	broken := filepath.Join(b.Images, "broken.tar")
	must(t, os.WriteFile(broken, []byte("not a tar at all"), 0o600))
	r := NewRegistry(t.Context(), b.Images)
	t.Cleanup(r.Close)
	status := func(path string) int {
		t.Helper()
		w := httptest.NewRecorder()
		r.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/v2/"+path, nil))
		return w.Code
	}
	want := func(what, path string, code int) {
		t.Helper()
		if got := status(path); got != code {
			t.Errorf("%s: %s answers %d, want %d", what, path, got, code)
		}
	}
	const baseTag, topTag = "base/manifests/1?ns=h8s.local", "top/manifests/1?ns=h8s.local"
	want("at first", baseTag, 200)
	want("not built yet", topTag, 404)
	_, err = b.Build(t.Context(), "top")
	must(t, err)
	want("built since", topTag, 200)

	// An archive that is being read goes on being read when it has gone.
	digest, s, ok := r.find("manifests", "h8s.local/base", "1")
	if !ok || digest != results[0].Digest {
		t.Fatalf("base: %s %v", digest, ok)
	}
	must(t, os.Remove(base))
	want("removed", baseTag, 404)
	if _, err := io.Copy(io.Discard, io.NewSectionReader(s.archive.file, s.off, s.size)); err != nil {
		t.Errorf("read on: %v", err)
	}
	r.release(s)
	if s.archive.file != nil {
		t.Error("the archive stays open though nobody reads it")
	}

	good, err := os.ReadFile(filepath.Join(b.Images, "top.tar"))
	must(t, err)
	must(t, os.WriteFile(broken, good, 0o600))
	must(t, os.Remove(filepath.Join(b.Images, "top.tar")))
	want("under another name", topTag, 200)
	r.Close()
	want("closed", topTag, 404)
}

func TestUpstream(t *testing.T) {
	for registry, want := range map[string]string{
		"docker.io": "https://registry-1.docker.io", "quay.io": "https://quay.io", "example.org:5000": "https://example.org:5000",
		"": "", "h8s.local": "", "localhost": "", "localhost:5000": "", "127.0.0.1:5000": "", "h8s.local:1": "",
		"a/b": "", "a?b": "", "a:b": "", ".": "",
	} {
		if got := upstream(registry); got != want {
			t.Errorf("%q: %q, want %q", registry, got, want)
		}
	}
}
