package image

import (
	"archive/tar"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/containerd/errdefs"
)

// libraryDirs are where Debian's dynamic loader looks without a cache.
var libraryDirs = []string{
	"/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib", "/usr/lib64",
}

// needs is what an ELF file asks of its surroundings.
type needs struct {
	interp string
	libs   []string
	runDir []string // RPATH and RUNPATH, $ORIGIN kept
}

// readNeeds parses an ELF file; ok is false for anything else, a shell script
// for instance.
func readNeeds(r io.ReaderAt) (n needs, ok bool, err error) {
	magic := make([]byte, len(elf.ELFMAG))
	if _, err := r.ReadAt(magic, 0); err != nil || string(magic) != elf.ELFMAG {
		return needs{}, false, nil
	}
	f, err := elf.NewFile(r)
	if err != nil {
		return needs{}, false, fmt.Errorf("parse elf: %w", err)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP && p.Filesz < 4096 {
			b := make([]byte, p.Filesz)
			if _, err := p.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) {
				return needs{}, false, fmt.Errorf("read elf interpreter: %w", err)
			}
			n.interp = strings.TrimRight(string(b), "\x00")
		}
	}
	n.libs, err = f.ImportedLibraries()
	if err != nil {
		return needs{}, false, fmt.Errorf("read elf libraries: %w", err)
	}
	for _, tag := range []elf.DynTag{elf.DT_RPATH, elf.DT_RUNPATH} {
		dirs, err := f.DynString(tag)
		if err != nil {
			return needs{}, false, fmt.Errorf("read elf run path: %w", err)
		}
		for _, d := range dirs {
			n.runDir = append(n.runDir, strings.Split(d, ":")...)
		}
	}
	return n, true, nil
}

// pickInto copies p from t to dst and, if it is an ELF file, everything it
// needs, found in t or, without being copied, in below (the base; may be nil).
// Links on the way are copied with what they point to.
func (t *tree) pickInto(dst, below *tree, p string) error {
	c, err := canonical(p)
	if err != nil {
		return err
	}
	if _, done := dst.entries[c]; done {
		return nil
	}
	e, ok := t.entries[c]
	if !ok {
		real, _, err := t.lookup(p)
		if err != nil {
			return fmt.Errorf("%w; is its package in the recipe?", err)
		}
		return t.pickInto(dst, below, real)
	}
	switch e.kind {
	case tar.TypeSymlink:
		dst.entries[c] = e
		if to, _, err := t.lookup(p); err == nil {
			return t.pickInto(dst, below, to)
		}
		return nil // a dangling link is the package's business
	case tar.TypeLink:
		dst.entries[c] = e
		return t.pickInto(dst, below, e.target)
	case tar.TypeDir:
		dst.entries[c] = e
		return nil
	}
	return t.pickFile(dst, below, c, e)
}

func (t *tree) pickFile(dst, below *tree, c string, e entry) error {
	if err := dst.addFile(c, e.mode, e.uid, e.gid, t.content(e)); err != nil {
		return err
	}
	n, isELF, err := readNeeds(t.content(e))
	if err != nil {
		return fmt.Errorf("%s: %w", c, err)
	}
	if !isELF {
		return nil
	}
	if n.interp != "" {
		if err := t.pickLibrary(dst, below, c, []string{path.Dir(n.interp)}, path.Base(n.interp)); err != nil {
			return err
		}
	}
	dirs := make([]string, 0, len(n.runDir)+len(libraryDirs))
	for _, d := range n.runDir {
		d = strings.NewReplacer("$ORIGIN", "/"+path.Dir(c), "${ORIGIN}", "/"+path.Dir(c)).Replace(d)
		dirs = append(dirs, path.Clean("/"+d))
	}
	dirs = append(dirs, libraryDirs...)
	for _, lib := range n.libs {
		if err := t.pickLibrary(dst, below, c, dirs, lib); err != nil {
			return err
		}
	}
	return nil
}

func (t *tree) pickLibrary(dst, below *tree, user string, dirs []string, lib string) error {
	for _, d := range dirs {
		p := path.Join(d, lib)
		if below != nil {
			if _, _, err := below.lookup(p); err == nil {
				return nil
			}
		}
		if _, _, err := t.lookup(p); err == nil {
			return t.pickInto(dst, below, p)
		}
	}
	return fmt.Errorf("%s needs library %s, which no package of the recipe has: %w", user, lib, errdefs.ErrNotFound)
}
