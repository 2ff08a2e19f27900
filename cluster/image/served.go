package image

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

const octets = "application/octet-stream"

// identity tells one content of a path from the next.
type identity struct {
	inode   uint64
	size    int64
	changed time.Time
}

func identify(path string) (identity, error) {
	st, err := os.Stat(path)
	if err != nil {
		return identity{}, err
	}
	return identityOf(st), nil
}

func identityOf(st fs.FileInfo) identity {
	id := identity{size: st.Size(), changed: st.ModTime()}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		id.inode = sys.Ino
	}
	return id
}

// served is an archive that a Registry serves, guarded by the Registry's lock. Its
// file is closed when it was dropped and nobody reads it any more.
type served struct {
	id      identity
	file    *os.File
	tags    map[string]v1.Descriptor // by full reference
	blobs   map[string]section       // by digest
	users   int
	dropped bool
}

func (s *served) drop() {
	s.dropped = true
	s.closeUnused()
}

func (s *served) release() {
	s.users--
	s.closeUnused()
}

func (s *served) closeUnused() {
	if s.dropped && s.users == 0 && s.file != nil {
		_ = s.file.Close() // only ever read
		s.file = nil
	}
}

// openServed reads an archive's table of contents. Blobs are not hashed: who pulls
// them does that.
func openServed(path string) (*served, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	s := &served{file: f, tags: map[string]v1.Descriptor{}, blobs: map[string]section{}}
	if err := s.read(); err != nil {
		_ = f.Close()
		return nil, err
	}
	return s, nil
}

func (s *served) read() error {
	st, err := s.file.Stat()
	if err != nil {
		return err
	}
	s.id = identityOf(st)
	var index v1.IndexManifest
	tr := tar.NewReader(s.file)
	for n := 0; ; n++ {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("not a complete tar: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		if n > maxNames {
			return fmt.Errorf("more than %d files: %w", maxNames, errdefs.ErrInvalidArgument)
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
		if err := s.note(h); err != nil {
			return err
		}
	}
	for _, d := range index.Manifests {
		b, here := s.blobs[d.Digest.String()]
		if tag := tagOf(d); tag != "" && here {
			s.tags[tag] = d
			b.mediaType = string(d.MediaType)
			s.blobs[d.Digest.String()] = b
		}
	}
	return nil
}

// note remembers where the blob lies whose header was just read.
func (s *served) note(h *tar.Header) error {
	algorithm, hex, ok := strings.Cut(strings.TrimPrefix(h.Name, "blobs/"), "/")
	if !ok || h.Typeflag != tar.TypeReg || !strings.HasPrefix(h.Name, "blobs/") {
		return nil
	}
	off, err := s.file.Seek(0, io.SeekCurrent) // tar.Reader does not read ahead
	if err != nil {
		return err
	}
	s.blobs[algorithm+":"+hex] = section{archive: s, off: off, size: h.Size, mediaType: octets}
	return nil
}

// tagOf is the reference an index names a manifest by, or "".
func tagOf(d v1.Descriptor) string {
	if tag := d.Annotations[annotationName]; tag != "" {
		return tag
	}
	return d.Annotations["org.opencontainers.image.ref.name"]
}
