package image

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"sort"
	"strings"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

const (
	annotationName = "io.containerd.image.name"
	annotationKey  = "io.hypernetes.image.key"

	// Bounds on archives of unknown origin.
	maxMetadata = 4 << 20
	maxNames    = 20000
	maxTags     = 1000
)

// Info is what an archive says about itself.
type Info struct {
	File   string
	Size   int64
	Tags   []string
	Digest string // of the first image's manifest; empty in plain docker archives
	Key    string // recipe key, empty for archives that were not built here
}

// dockerManifest is one element of manifest.json in docker's archive format.
type dockerManifest struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// writeArchive writes img as an OCI layout in a tar that docker can load as
// well, and renames it into place, so that a reader never sees half a file.
func writeArchive(file string, img v1.Image, tags []string, key string) error {
	tmp, err := os.CreateTemp(filepath.Dir(file), "."+filepath.Base(file)+"-*")
	if err != nil {
		return fmt.Errorf("archive: %w", err)
	}
	defer os.Remove(tmp.Name())
	w := bufio.NewWriterSize(tmp, 1<<20)
	err = encodeArchive(w, img, tags, key)
	if err == nil {
		err = w.Flush()
	}
	if err == nil {
		err = tmp.Chmod(0o644)
	}
	if err = errors.Join(err, tmp.Close()); err != nil {
		return fmt.Errorf("archive %s: %w", file, err)
	}
	if err := os.Rename(tmp.Name(), file); err != nil {
		return fmt.Errorf("archive: %w", err)
	}
	return nil
}

func encodeArchive(w io.Writer, img v1.Image, tags []string, key string) error {
	raw, err := img.RawManifest()
	if err != nil {
		return err
	}
	digest, err := img.Digest()
	if err != nil {
		return err
	}
	config, err := img.RawConfigFile()
	if err != nil {
		return err
	}
	configName, err := img.ConfigName()
	if err != nil {
		return err
	}
	layers, err := img.Layers()
	if err != nil {
		return err
	}
	index := indexOf(digest, int64(len(raw)), tags, key)
	docker := dockerManifest{Config: blobPath(configName), RepoTags: tags}
	byName := map[string]v1.Layer{}
	for _, l := range layers {
		h, err := l.Digest()
		if err != nil {
			return err
		}
		docker.Layers = append(docker.Layers, blobPath(h))
		byName[blobPath(h)] = l
	}
	tw := tar.NewWriter(w)
	meta := []struct {
		name string
		data any
	}{
		{"oci-layout", map[string]string{"imageLayoutVersion": "1.0.0"}},
		{"index.json", index},
		{"manifest.json", []dockerManifest{docker}},
		{blobPath(digest), json.RawMessage(raw)},
		{blobPath(configName), json.RawMessage(config)},
	}
	for _, m := range meta {
		data, ok := m.data.(json.RawMessage)
		if !ok {
			if data, err = json.Marshal(m.data); err != nil {
				return err
			}
		}
		if err := writeMember(tw, m.name, int64(len(data)), bytes.NewReader(data)); err != nil {
			return err
		}
	}
	return errors.Join(writeLayers(tw, byName), tw.Close())
}

// indexOf names one manifest by every tag.
func indexOf(digest v1.Hash, size int64, tags []string, key string) v1.IndexManifest {
	index := v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex}
	for _, t := range tags {
		index.Manifests = append(index.Manifests, v1.Descriptor{
			MediaType: types.OCIManifestSchema1, Digest: digest, Size: size,
			Platform:    &v1.Platform{OS: "linux", Architecture: "amd64"},
			Annotations: map[string]string{annotationName: t, annotationKey: key},
		})
	}
	return index
}

func writeLayers(tw *tar.Writer, layers map[string]v1.Layer) error {
	names := make([]string, 0, len(layers))
	for n := range layers {
		names = append(names, n)
	}
	sort.Strings(names)
	for _, n := range names {
		size, err := layers[n].Size()
		if err != nil {
			return err
		}
		rc, err := layers[n].Compressed()
		if err != nil {
			return err
		}
		err = writeMember(tw, n, size, rc)
		if err = errors.Join(err, rc.Close()); err != nil {
			return err
		}
	}
	return nil
}

func blobPath(h v1.Hash) string { return "blobs/" + h.Algorithm + "/" + h.Hex }

func writeMember(tw *tar.Writer, name string, size int64, r io.Reader) error {
	h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: size, ModTime: epoch}
	if err := tw.WriteHeader(h); err != nil {
		return err
	}
	_, err := io.Copy(tw, r)
	return err
}

// Inspect reads an image archive's table of contents: an OCI layout or a
// docker archive, plain or gzipped. It checks that the metadata parses and
// that every file it names is there, so that a wrong or truncated file is
// refused with a reason before a runtime sees it; blobs are not hashed (the
// runtime does). Memory is bounded whatever the file holds.
func Inspect(file string) (Info, error) {
	f, err := os.Open(file)
	if err != nil {
		return Info{}, fmt.Errorf("image archive: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return Info{}, fmt.Errorf("image archive: %w", err)
	}
	if !st.Mode().IsRegular() {
		return Info{}, fmt.Errorf("image archive %s: not a regular file: %w", file, errdefs.ErrInvalidArgument)
	}
	info, err := inspect(f)
	if err != nil {
		return Info{}, fmt.Errorf("image archive %s: %w", file, err)
	}
	info.File, info.Size = file, st.Size()
	return info, nil
}

// contents is what one pass over an archive collects.
type contents struct {
	names map[string]bool
	meta  map[string][]byte // small files that may be metadata
}

func inspect(r io.ReadSeeker) (Info, error) {
	c, err := scan(r)
	if err != nil {
		return Info{}, err
	}
	if _, ok := c.meta["index.json"]; ok {
		return c.oci()
	}
	if _, ok := c.meta["manifest.json"]; ok {
		return c.docker()
	}
	return Info{}, fmt.Errorf("neither index.json nor manifest.json inside; expected the output of `docker save`, `skopeo copy ... oci-archive:` or `h8s image build`: %w", errdefs.ErrInvalidArgument)
}

func scan(r io.ReadSeeker) (*contents, error) {
	in, err := uncompressed(r)
	if err != nil {
		return nil, err
	}
	c := &contents{names: map[string]bool{}, meta: map[string][]byte{}}
	var kept int64
	tr := tar.NewReader(in)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return c, nil
		}
		if err != nil {
			return nil, fmt.Errorf("not a complete tar: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		name := path.Clean("/" + h.Name)[1:]
		if c.names[name] = true; len(c.names) > maxNames {
			return nil, fmt.Errorf("more than %d files: %w", maxNames, errdefs.ErrInvalidArgument)
		}
		isIndex := name == "index.json" || name == "manifest.json"
		isBlob := strings.HasPrefix(name, "blobs/") && h.Size <= 1<<20
		if h.Typeflag != tar.TypeReg || (!isIndex && !isBlob) {
			continue
		}
		if kept += h.Size; h.Size > maxMetadata || kept > 16*maxMetadata {
			if isBlob {
				continue
			}
			return nil, fmt.Errorf("%s of %d bytes is too large (at most %d): %w", name, h.Size, maxMetadata, errdefs.ErrInvalidArgument)
		}
		if c.meta[name], err = io.ReadAll(tr); err != nil {
			return nil, fmt.Errorf("read %s: %w: %w", name, err, errdefs.ErrInvalidArgument)
		}
	}
}

func uncompressed(r io.ReadSeeker) (io.Reader, error) {
	magic := make([]byte, 2)
	n, err := io.ReadFull(r, magic)
	if err != nil && n == 0 {
		return nil, fmt.Errorf("empty file: %w", errdefs.ErrInvalidArgument)
	}
	if _, err := r.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	if magic[0] == 0x1f && magic[1] == 0x8b {
		z, err := gzip.NewReader(bufio.NewReader(r))
		if err != nil {
			return nil, fmt.Errorf("gzip: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		return z, nil
	}
	return bufio.NewReaderSize(r, 1<<16), nil
}

func (c *contents) oci() (Info, error) {
	var index v1.IndexManifest
	if err := json.Unmarshal(c.meta["index.json"], &index); err != nil {
		return Info{}, fmt.Errorf("index.json: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if len(index.Manifests) == 0 || len(index.Manifests) > maxTags {
		return Info{}, fmt.Errorf("index.json names %d images (want 1 to %d): %w", len(index.Manifests), maxTags, errdefs.ErrInvalidArgument)
	}
	var info Info
	for _, d := range index.Manifests {
		name := blobPath(d.Digest)
		if !c.names[name] {
			return Info{}, fmt.Errorf("%s is missing; is the file cut short?: %w", name, errdefs.ErrInvalidArgument)
		}
		if d.MediaType == types.OCIManifestSchema1 || d.MediaType == types.DockerManifestSchema2 {
			if err := c.checkManifest(name); err != nil {
				return Info{}, err
			}
		}
		if info.Digest == "" {
			info.Digest, info.Key = d.Digest.String(), d.Annotations[annotationKey]
		}
		if tag := tagOf(d); tag != "" {
			info.Tags = append(info.Tags, tag)
		}
	}
	return info, nil
}

func (c *contents) checkManifest(name string) error {
	var m v1.Manifest
	if err := json.Unmarshal(c.meta[name], &m); err != nil {
		return fmt.Errorf("manifest %s: %w: %w", name, err, errdefs.ErrInvalidArgument)
	}
	for _, d := range append(m.Layers, m.Config) {
		if p := blobPath(d.Digest); !c.names[p] {
			return fmt.Errorf("%s is missing; is the file cut short?: %w", p, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

func (c *contents) docker() (Info, error) {
	var list []dockerManifest
	if err := json.Unmarshal(c.meta["manifest.json"], &list); err != nil {
		return Info{}, fmt.Errorf("manifest.json: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if len(list) == 0 {
		return Info{}, fmt.Errorf("manifest.json names no image: %w", errdefs.ErrInvalidArgument)
	}
	var info Info
	for _, m := range list {
		for _, p := range append(m.Layers, m.Config) {
			if !c.names[path.Clean("/" + p)[1:]] {
				return Info{}, fmt.Errorf("%q is missing; is the file cut short?: %w", p, errdefs.ErrInvalidArgument)
			}
		}
		if info.Tags = append(info.Tags, m.RepoTags...); len(info.Tags) > maxTags {
			return Info{}, fmt.Errorf("more than %d tags: %w", maxTags, errdefs.ErrInvalidArgument)
		}
	}
	return info, nil
}
