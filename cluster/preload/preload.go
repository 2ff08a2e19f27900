// Package preload owns bringing image archives from a directory into containerd when
// a node starts. An archive is imported once per content; it must not know what the
// images are for.
package preload

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/atomicfile"
)

// maxIndex bounds manifest.json of an archive.
const maxIndex = 4 << 20

// Archive is an image archive on disk.
type Archive struct {
	Path string
	Tags []string
	// ID changes when the archive's images do: the digest of each configuration.
	ID string
}

// List reads the archives (*.tar with a docker manifest.json, which OCI archives of
// ours have too) in dir, in order of name. A missing directory holds none.
func List(dir string) ([]Archive, error) {
	paths, err := filepath.Glob(filepath.Join(dir, "*.tar"))
	if err != nil {
		return nil, err
	}
	slices.Sort(paths)
	var out []Archive
	for _, path := range paths {
		a, err := Read(path)
		if err != nil {
			return nil, err
		}
		out = append(out, a)
	}
	return out, nil
}

// Read reads one archive's manifest.
func Read(path string) (Archive, error) {
	f, err := os.Open(path)
	if err != nil {
		return Archive{}, err
	}
	defer f.Close()
	tr := tar.NewReader(f)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return Archive{}, fmt.Errorf("%s: no manifest.json: %w", path, errdefs.ErrInvalidArgument)
		}
		if err != nil {
			return Archive{}, fmt.Errorf("%s: %w", path, err)
		}
		if h.Name == "manifest.json" {
			a, err := parseManifest(tr)
			a.Path = path
			if err != nil {
				err = fmt.Errorf("%s: %w", path, err)
			}
			return a, err
		}
	}
}

func parseManifest(r io.Reader) (Archive, error) {
	var images []struct {
		Config   string
		RepoTags []string
	}
	if err := json.NewDecoder(io.LimitReader(r, maxIndex)).Decode(&images); err != nil {
		return Archive{}, fmt.Errorf("manifest.json: %w", err)
	}
	var a Archive
	ids := make([]string, 0, len(images))
	for _, i := range images {
		a.Tags = append(a.Tags, i.RepoTags...)
		ids = append(ids, i.Config)
	}
	slices.Sort(ids)
	a.ID = strings.Join(ids, ",")
	return a, nil
}

// Find returns the first tag that begins with prefix, or "".
func Find(archives []Archive, prefix string) string {
	for _, a := range archives {
		for _, t := range a.Tags {
			if strings.HasPrefix(t, prefix) {
				return t
			}
		}
	}
	return ""
}

// Store is where images go.
type Store interface {
	// Has reports whether an image with this tag exists.
	Has(ctx context.Context, tag string) (bool, error)
	Import(ctx context.Context, archive string) error
}

// Import imports the archives that are not recorded in the file journal as imported,
// or whose images are gone, those in first before the others. It returns the number
// imported and carries on after an archive that fails.
func Import(ctx context.Context, store Store, archives []Archive, journal string) (int, error) {
	done, err := readJournal(journal)
	if err != nil {
		return 0, err
	}
	imported := 0
	var failed error
	for _, a := range archives {
		if ctx.Err() != nil {
			return imported, errors.Join(failed, ctx.Err())
		}
		name := filepath.Base(a.Path)
		if done[name] == a.ID && a.ID != "" && hasAll(ctx, store, a.Tags) {
			continue
		}
		if err := store.Import(ctx, a.Path); err != nil {
			failed = errors.Join(failed, fmt.Errorf("image %s: %w", name, err))
			continue
		}
		imported++
		done[name] = a.ID
		if err := writeJournal(journal, done); err != nil {
			return imported, errors.Join(failed, err)
		}
	}
	return imported, failed
}

func hasAll(ctx context.Context, store Store, tags []string) bool {
	for _, t := range tags {
		if ok, err := store.Has(ctx, t); err != nil || !ok {
			return false
		}
	}
	return true
}

func readJournal(path string) (map[string]string, error) {
	done := map[string]string{}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return done, nil
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(b, &done); err != nil {
		return map[string]string{}, nil // a torn journal costs one import
	}
	return done, nil
}

func writeJournal(path string, done map[string]string) error {
	b, err := json.Marshal(done)
	if err != nil {
		return err
	}
	return atomicfile.Write(path, b, 0o600)
}
