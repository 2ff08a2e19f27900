// Package closure finds the shared libraries a program needs, from its ELF headers alone
// (ldd would run it). It must not know what the answer is for.
package closure

import (
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
)

// libraryDirs is where Debian's ld.so looks; the guest has no ld.so.cache, so only
// libraries of these (and of a RUNPATH) can be found there.
var libraryDirs = []string{"/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib", "/usr/lib", "/lib64"}

// Of returns the shared libraries and ELF interpreters the given programs need,
// theirs included, as the absolute paths the guest will look them up by, each once and
// in order of discovery. root is prefixed to every lookup ("" for the running system).
func Of(root string, programs ...string) ([]string, error) {
	c := closure{root: root, seen: map[string]bool{}}
	for _, p := range programs {
		if err := c.add(p); err != nil {
			return nil, err
		}
	}
	return c.found, nil
}

type closure struct {
	root  string
	seen  map[string]bool
	found []string
}

func (c *closure) add(name string) error {
	if c.seen[name] {
		return nil
	}
	c.seen[name] = true
	f, err := elf.Open(filepath.Join(c.root, name))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("program %s: %w: install the Debian package that has it", name, errdefs.ErrNotFound)
	}
	if err != nil {
		return fmt.Errorf("program %s: %w", name, err)
	}
	defer f.Close()
	if interp, err := interpreter(f); err != nil {
		return fmt.Errorf("program %s: %w", name, err)
	} else if interp != "" && !c.seen[interp] {
		c.found = append(c.found, interp)
		if err := c.add(interp); err != nil {
			return err
		}
	}
	needed, err := f.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("libraries of %s: %w", name, err)
	}
	dirs := append(runpath(f, name), libraryDirs...)
	for _, lib := range needed {
		p, err := c.lookup(lib, dirs)
		if err != nil {
			return fmt.Errorf("program %s: %w", name, err)
		}
		if c.seen[p] {
			continue
		}
		c.found = append(c.found, p)
		if err := c.add(p); err != nil {
			return err
		}
	}
	return nil
}

func (c *closure) lookup(lib string, dirs []string) (string, error) {
	if strings.Contains(lib, "/") {
		return lib, nil
	}
	for p := range c.seen { // the interpreter is also a library (ld-linux-x86-64.so.2)
		if filepath.Base(p) == lib {
			return p, nil
		}
	}
	for _, d := range dirs {
		p := filepath.Join(d, lib)
		if st, err := os.Stat(filepath.Join(c.root, p)); err == nil && st.Mode().IsRegular() {
			return p, nil
		}
	}
	return "", fmt.Errorf("library %s: %w in %s", lib, errdefs.ErrNotFound, strings.Join(dirs, ":"))
}

func interpreter(f *elf.File) (string, error) {
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		if p.Filesz == 0 || p.Filesz > 4096 {
			return "", fmt.Errorf("interpreter name of %d bytes: %w", p.Filesz, errdefs.ErrInvalidArgument)
		}
		b := make([]byte, p.Filesz)
		if _, err := p.ReadAt(b, 0); err != nil {
			return "", err
		}
		return strings.TrimRight(string(b), "\x00"), nil
	}
	return "", nil
}

func runpath(f *elf.File, name string) []string {
	var dirs []string
	for _, tag := range []elf.DynTag{elf.DT_RUNPATH, elf.DT_RPATH} {
		v, err := f.DynString(tag)
		if err != nil {
			continue // no dynamic section
		}
		for _, s := range v {
			for _, d := range strings.Split(s, ":") {
				d = strings.NewReplacer("$ORIGIN", filepath.Dir(name), "${ORIGIN}", filepath.Dir(name)).Replace(d)
				if d != "" {
					dirs = append(dirs, filepath.Clean(d))
				}
			}
		}
	}
	return dirs
}
