package image

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Registry serves the archives of a directory as a read-only registry, so that
// what insists on pulling (imagePullPolicy: Always, which the tag "latest"
// implies) finds the images that came along. containerd is told of it by
// certs.d/_default/hosts.toml; it then asks for every registry's names with
// the registry in the query parameter "ns".
//
// The directory is read once, by NewRegistry; archives are replaced by
// renaming, so an open file stays what it was. Safe for concurrent use.
type Registry struct {
	tags  map[string]v1.Descriptor // by full reference
	blobs map[string]section       // by digest
	files []*os.File
}

// section is where a blob lies in an archive.
type section struct {
	file      *os.File
	off, size int64
	mediaType string
}

// NewRegistry reads the OCI archives (*.tar) in dir. Other archives in it are
// left out: they can be loaded, but hold no manifest to serve.
func NewRegistry(dir string) (*Registry, error) {
	paths, err := filepath.Glob(filepath.Join(dir, "*.tar"))
	if err != nil {
		return nil, fmt.Errorf("image directory: %w", err)
	}
	r := &Registry{tags: map[string]v1.Descriptor{}, blobs: map[string]section{}}
	for _, p := range paths {
		if err := r.add(p); err != nil {
			return nil, errors.Join(fmt.Errorf("image archive %s: %w", p, err), r.Close())
		}
	}
	return r, nil
}

// Close releases the archives.
func (r *Registry) Close() error {
	var errs []error
	for _, f := range r.files {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

func (r *Registry) add(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	r.files = append(r.files, f)
	var index v1.IndexManifest
	tr := tar.NewReader(f)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("not a complete tar: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		if h.Name == "index.json" {
			if h.Size > maxMetadata {
				return fmt.Errorf("index.json of %d bytes is too large: %w", h.Size, errdefs.ErrInvalidArgument)
			}
			if err := json.NewDecoder(tr).Decode(&index); err != nil {
				return fmt.Errorf("index.json: %w: %w", err, errdefs.ErrInvalidArgument)
			}
			continue
		}
		algorithm, hex, ok := strings.Cut(strings.TrimPrefix(h.Name, "blobs/"), "/")
		if !ok || h.Typeflag != tar.TypeReg || !strings.HasPrefix(h.Name, "blobs/") {
			continue
		}
		off, err := f.Seek(0, io.SeekCurrent) // tar.Reader does not read ahead
		if err != nil {
			return err
		}
		r.blobs[algorithm+":"+hex] = section{file: f, off: off, size: h.Size, mediaType: "application/octet-stream"}
	}
	for _, d := range index.Manifests {
		b, here := r.blobs[d.Digest.String()]
		if tag := d.Annotations[annotationName]; tag != "" && here {
			r.tags[tag] = d
			b.mediaType = string(d.MediaType)
			r.blobs[d.Digest.String()] = b
		}
	}
	return nil
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
	digest := ref
	if kind == "manifests" && !strings.Contains(ref, ":") {
		d, ok := r.tags[path.Join(req.URL.Query().Get("ns"), name)+":"+ref]
		if !ok {
			refuse(w, http.StatusNotFound, "MANIFEST_UNKNOWN", "no such image came along")
			return
		}
		digest = d.Digest.String()
	}
	b, ok := r.blobs[digest]
	if !ok || (kind != "manifests" && kind != "blobs") {
		refuse(w, http.StatusNotFound, "BLOB_UNKNOWN", "no such content")
		return
	}
	w.Header().Set("Content-Type", b.mediaType)
	w.Header().Set("Docker-Content-Digest", digest)
	http.ServeContent(w, req, "", epoch, io.NewSectionReader(b.file, b.off, b.size))
}

func refuse(w http.ResponseWriter, code int, kind, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(map[string]any{"errors": []map[string]string{{"code": kind, "message": message}}})
}
