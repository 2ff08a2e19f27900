// Package files writes the small file trees the shim pushes (configMaps, secrets,
// hosts files) and reads termination messages back.
//
// It owns path validation, limits and the atomic switch of versions. It must not know
// which volume a tree belongs to or what mounts it.
package files

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
)

// Limits of one tree, all parts together. Trees live in the guest's memory.
const (
	MaxFiles = 16384
	MaxBytes = 64 << 20
	// maxPath is PATH_MAX, maxName NAME_MAX.
	maxPath, maxName = 4095, 255
	maxDepth         = 64
)

// CheckPath refuses paths that are not relative, clean and below the tree. The empty
// path, the tree itself, is for the caller to allow.
func CheckPath(p string) error {
	if p == "" || len(p) > maxPath {
		return fmt.Errorf("file path of %d bytes: must be 1 to %d: %w", len(p), maxPath, errdefs.ErrInvalidArgument)
	}
	parts := strings.Split(p, "/")
	if len(parts) > maxDepth {
		return fmt.Errorf("file path %.80q: more than %d levels: %w", p, maxDepth, errdefs.ErrInvalidArgument)
	}
	for _, e := range parts {
		if err := checkName(e); err != nil {
			return fmt.Errorf("file path %.80q: %w", p, err)
		}
	}
	return nil
}

func checkName(e string) error {
	switch {
	case e == "" || e == "." || e == "..":
		return fmt.Errorf("element %q: %w", e, errdefs.ErrInvalidArgument)
	case len(e) > maxName:
		return fmt.Errorf("element of %d bytes, over %d: %w", len(e), maxName, errdefs.ErrInvalidArgument)
	case strings.ContainsAny(e, "/\x00"):
		return fmt.Errorf("element %.80q holds a slash or NUL: %w", e, errdefs.ErrInvalidArgument)
	}
	return nil
}

const (
	dataLink = "..data"
	dataTemp = "..data_tmp"
)

// checkVersion refuses version names that could not be a directory beside ..data, or
// that a user-visible name of the tree could collide with.
func checkVersion(v string) error {
	if err := checkName(v); err != nil {
		return fmt.Errorf("file tree version: %w", err)
	}
	if v == dataLink || v == dataTemp || !strings.HasPrefix(v, "..") {
		return fmt.Errorf("file tree version %.80q: must begin with .. and not be %s or %s: %w",
			v, dataLink, dataTemp, errdefs.ErrInvalidArgument)
	}
	return nil
}

// firstElement is the user-visible name a path appears under.
func firstElement(p string) string {
	e, _, _ := strings.Cut(p, "/")
	return e
}
