package image

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"sync"

	"github.com/containerd/log"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Registry serves the archives of a directory as a read-only registry, so that
// what insists on pulling (imagePullPolicy: Always, which the tag "latest"
// implies) finds the images that came along. containerd is told of it by
// certs.d/_default/hosts.toml; it then asks for every registry's names with
// the registry in the query parameter "ns".
//
// Whatever is not here is redirected to that registry. "Not found" would make containerd
// ask there as well, but it then reports our answer instead of the one that matters:
// that the registry cannot be reached, or wants other credentials.
//
// The directory is looked at anew whenever a manifest is asked for, so archives may
// come, change and go; they are replaced by renaming, and one that is being read
// stays open until it has been. Safe for concurrent use.
type Registry struct {
	ctx context.Context // for its logger
	dir string

	mu       sync.Mutex
	archives map[string]*served // by path
	tags     map[string]v1.Descriptor
	blobs    map[string]section // by digest
	closed   bool
}

// ownRegistry is the registry in the names of images that exist nowhere else.
const ownRegistry = "h8s.local"

// section is where a blob lies in an archive.
type section struct {
	archive   *served
	off, size int64
	mediaType string
}

// NewRegistry serves the OCI archives (*.tar) in dir. Archives of other kinds are left
// out: they can be loaded, but hold no manifest to serve. What cannot be read is
// logged with ctx's logger and left out as well, for the sake of the others.
func NewRegistry(ctx context.Context, dir string) *Registry {
	r := &Registry{ctx: ctx, dir: dir, archives: map[string]*served{}}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.refresh()
	return r
}

// Close releases the archives; whatever is asked for afterwards is not found.
func (r *Registry) Close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, a := range r.archives {
		a.drop()
	}
	r.archives, r.tags, r.blobs, r.closed = nil, nil, nil, true
}

// refresh reads what is new in the directory and forgets what is gone; r.mu is held.
func (r *Registry) refresh() {
	if r.closed {
		return
	}
	paths, err := filepath.Glob(filepath.Join(r.dir, "*.tar"))
	if err != nil {
		log.G(r.ctx).WithError(err).Error("image directory")
		return
	}
	changed := r.tags == nil
	now := make(map[string]*served, len(paths))
	for _, p := range paths {
		a, fresh := r.look(p)
		now[p] = a
		changed = changed || fresh
	}
	for p, a := range r.archives {
		if now[p] != a {
			changed = true
			a.drop()
		}
	}
	r.archives = now
	if !changed {
		return
	}
	r.tags, r.blobs = map[string]v1.Descriptor{}, map[string]section{}
	for _, p := range paths { // sorted: of two archives with one tag the first counts
		for digest, s := range now[p].blobs {
			if _, known := r.blobs[digest]; !known || s.mediaType != octets {
				r.blobs[digest] = s
			}
		}
		for tag, d := range now[p].tags {
			if _, taken := r.tags[tag]; !taken {
				r.tags[tag] = d
			}
		}
	}
}

// look returns the archive at path and whether it had to be read. One that cannot be
// read is remembered as an empty one, so that it is complained of once.
func (r *Registry) look(path string) (*served, bool) {
	id, err := identify(path)
	if a := r.archives[path]; a != nil && err == nil && a.id == id {
		return a, false
	}
	a, err := openServed(path)
	if err != nil {
		log.G(r.ctx).WithError(err).WithField("archive", path).Warn("image archive is not served")
		a = &served{id: id}
	}
	return a, true
}

// find looks a request's content up and keeps its archive open for it.
func (r *Registry) find(kind, repository, ref string) (digest string, s section, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	digest = ref
	if kind == "manifests" {
		r.refresh()
		if !strings.Contains(ref, ":") {
			d, known := r.tags[repository+":"+ref]
			if !known {
				return "", section{}, false
			}
			digest = d.Digest.String()
		}
	}
	if s, ok = r.blobs[digest]; ok {
		s.archive.users++
	}
	return digest, s, ok
}

func (r *Registry) release(s section) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s.archive.release()
}

// ServeHTTP answers the pull half of the OCI distribution API.
func (r *Registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	rest, ok := strings.CutPrefix(path.Clean(req.URL.Path), "/v2")
	switch {
	case !ok:
		http.NotFound(w, req)
		return
	case req.Method != http.MethodGet && req.Method != http.MethodHead:
		refuse(w, http.StatusMethodNotAllowed, "UNSUPPORTED", "this registry is read-only")
		return
	case rest == "":
		_, _ = io.WriteString(w, "{}")
		return
	}
	parts := strings.Split(strings.TrimPrefix(rest, "/"), "/")
	if len(parts) < 3 {
		refuse(w, http.StatusNotFound, "NAME_UNKNOWN", "no such repository")
		return
	}
	name, kind, ref := strings.Join(parts[:len(parts)-2], "/"), parts[len(parts)-2], parts[len(parts)-1]
	if kind != "manifests" && kind != "blobs" {
		refuse(w, http.StatusNotFound, "UNSUPPORTED", "this registry serves manifests and blobs only")
		return
	}
	registry := req.URL.Query().Get("ns")
	digest, s, ok := r.find(kind, path.Join(registry, name), ref)
	if !ok {
		if url := upstream(registry); url != "" {
			http.Redirect(w, req, url+path.Clean(req.URL.Path), http.StatusTemporaryRedirect)
			return
		}
		code := map[string]string{"manifests": "MANIFEST_UNKNOWN", "blobs": "BLOB_UNKNOWN"}[kind]
		refuse(w, http.StatusNotFound, code, "no such image came along")
		return
	}
	defer r.release(s)
	w.Header().Set("Content-Type", s.mediaType)
	w.Header().Set("Docker-Content-Digest", digest)
	http.ServeContent(w, req, "", epoch, io.NewSectionReader(s.archive.file, s.off, s.size))
}

var registryName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9.-]*(:[0-9]{1,5})?$`)

// upstream is the URL of the registry that serves a name, or "" if none does or if
// containerd's own rules say how to reach it.
func upstream(registry string) string {
	host, _, _ := strings.Cut(registry, ":")
	switch {
	case registry == "docker.io":
		return "https://registry-1.docker.io"
	case host == ownRegistry, host == "localhost", net.ParseIP(host) != nil && net.ParseIP(host).IsLoopback(), !registryName.MatchString(registry):
		return ""
	}
	return "https://" + registry
}

func refuse(w http.ResponseWriter, code int, kind, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(map[string]any{"errors": []map[string]string{{"code": kind, "message": message}}})
}
