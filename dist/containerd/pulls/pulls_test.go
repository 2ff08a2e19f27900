package pulls

import (
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

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	godigest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// hostsFile is what h8s writes to certs.d/_default/hosts.toml.
const hostsFile = "[host.\"%s\"]\n  capabilities = [\"pull\", \"resolve\"]\n"

const (
	user, password, token = "ann", "secret", "the-token"
	manifestType          = "application/vnd.oci.image.manifest.v1+json"
)

var (
	layer    = []byte("a layer")
	manifest = fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"layers":[{"digest":%q}]}`, manifestType, digest(layer))
)

func digest(b []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(b)) }

// upstream is a registry that wants a token, which it gives for a password.
func upstream(t *testing.T) *httptest.Server {
	t.Helper()
	mux := http.NewServeMux()
	server := httptest.NewTLSServer(mux)
	t.Cleanup(server.Close)
	mux.HandleFunc("/token", func(w http.ResponseWriter, r *http.Request) {
		if u, p, _ := r.BasicAuth(); u != user || p != password {
			http.Error(w, "wrong password", http.StatusUnauthorized)
			return
		}
		_, _ = fmt.Fprintf(w, `{"token":%q}`, token)
	})
	mux.HandleFunc("/v2/", func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer "+token {
			w.Header().Set("WWW-Authenticate", fmt.Sprintf("Bearer realm=%q,service=\"test\"", server.URL+"/token"))
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		switch r.URL.Path {
		case "/v2/a/b/manifests/1", "/v2/a/b/manifests/" + digest(manifest):
			w.Header().Set("Content-Type", manifestType)
			w.Header().Set("Docker-Content-Digest", digest(manifest))
			_, _ = w.Write(manifest)
		case "/v2/a/b/blobs/" + digest(layer):
			_, _ = w.Write(layer)
		default:
			http.NotFound(w, r)
		}
	})
	return server
}

// resolver returns a pull of a manifest and a layer by containerd's resolver, with a node's own registry that has nothing in front of
// the upstream one.
func resolver(t *testing.T, up *httptest.Server, secret string) (pull func(context.Context, string) (string, error), asked *int) {
	t.Helper()
	asked = new(int)
	own := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		*asked++
		http.Redirect(w, r, up.URL+r.URL.Path, http.StatusTemporaryRedirect)
	}))
	t.Cleanup(own.Close)
	root := t.TempDir()
	if err := os.Mkdir(filepath.Join(root, "_default"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "_default", "hosts.toml"), fmt.Appendf(nil, hostsFile, own.URL), 0o600); err != nil {
		t.Fatal(err)
	}
	r := docker.NewResolver(docker.ResolverOptions{Hosts: config.ConfigureHosts(t.Context(), config.HostOptions{
		HostDir:       config.HostDirFromRoot(root),
		DefaultScheme: "https",
		Credentials: func(host string) (string, string, error) {
			if "https://"+host != up.URL {
				return "", "", fmt.Errorf("credentials for %s are asked for", host)
			}
			return user, secret, nil
		},
		UpdateClient: func(c *http.Client) error {
			c.Transport = up.Client().Transport // trusts its certificate
			return nil
		},
	})})
	return func(ctx context.Context, ref string) (string, error) {
		name, desc, err := r.Resolve(ctx, ref)
		if err != nil {
			return "", err
		}
		f, err := r.Fetcher(ctx, name)
		if err != nil {
			return "", err
		}
		content, err := f.Fetch(ctx, desc)
		if err != nil {
			return "", err
		}
		defer content.Close()
		if b, err := io.ReadAll(content); err != nil || string(b) != string(manifest) {
			return "", fmt.Errorf("manifest: %q %w", b, err)
		}
		blob, err := f.Fetch(ctx, ocispec.Descriptor{
			MediaType: ocispec.MediaTypeImageLayer, Digest: godigest.FromBytes(layer), Size: int64(len(layer)),
		})
		if err != nil {
			return "", err
		}
		defer blob.Close()
		b, err := io.ReadAll(blob)
		return string(b), err
	}, asked
}

func TestRedirectedPull(t *testing.T) {
	up := upstream(t)
	host := strings.TrimPrefix(up.URL, "https://")
	pull, asked := resolver(t, up, password)
	got, err := pull(t.Context(), host+"/a/b:1")
	if err != nil || got != string(layer) {
		t.Fatalf("%q %v", got, err)
	}
	if *asked == 0 {
		t.Error("the node's own registry was not asked")
	}
}

// TestTheUpstreamsAnswerCounts checks that errors are those of the registry an image names.
func TestTheUpstreamsAnswerCounts(t *testing.T) {
	up := upstream(t)
	host := strings.TrimPrefix(up.URL, "https://")
	pull, _ := resolver(t, up, password)
	if _, err := pull(t.Context(), host+"/a/b:2"); err == nil || !strings.Contains(err.Error(), "not found") {
		t.Errorf("an image it does not have: %v", err)
	}
	pull, _ = resolver(t, up, "wrong")
	if _, err := pull(t.Context(), host+"/a/b:1"); err == nil || !strings.Contains(err.Error(), "401") {
		t.Errorf("a wrong password: %v", err)
	}
	up.Close()
	pull, _ = resolver(t, up, password)
	if _, err := pull(t.Context(), host+"/a/b:1"); err == nil || !strings.Contains(err.Error(), up.URL) || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("a registry that is down: %v", err)
	}
}
