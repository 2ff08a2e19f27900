package image

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"

	"github.com/containerd/errdefs"
)

// assembly carries out one recipe's steps on a tree.
type assembly struct {
	recipe  *Recipe
	tree    *tree
	below   *tree // the base's names, nil without a base
	archive *archive
	spill   string
}

func (a *assembly) run(ctx context.Context, programs map[string]string) error {
	packages, err := newTree(a.spill)
	if err != nil {
		return err
	}
	defer packages.close()
	if err := a.unpack(ctx, packages); err != nil {
		return err
	}
	if err := a.pick(packages); err != nil {
		return err
	}
	for _, p := range a.recipe.Programs {
		if err := a.program(packages, p.Path, programs[p.Path]); err != nil {
			return err
		}
	}
	steps := []func() error{a.copies, a.files, a.zips, a.links, a.users}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return a.applets(ctx)
}

func (a *assembly) unpack(ctx context.Context, packages *tree) error {
	if len(a.recipe.Packages) == 0 {
		return nil
	}
	debs, err := a.archive.closure(ctx, a.recipe.Packages)
	if err != nil {
		return err
	}
	var status strings.Builder
	for _, d := range debs {
		if err := d.unpack(ctx, packages); err != nil {
			return err
		}
		c, err := d.control(ctx)
		if err != nil {
			return err
		}
		status.WriteString(c)
	}
	if a.recipe.PackageDatabase {
		return packages.addFile("/var/lib/dpkg/status", 0o644, 0, 0, strings.NewReader(status.String()))
	}
	return nil
}

// pick moves what is wanted of the packages into the image.
func (a *assembly) pick(packages *tree) error {
	if len(a.recipe.Packages) == 0 {
		return nil
	}
	patterns := a.recipe.Pick
	if len(patterns) == 0 {
		for _, d := range a.recipe.Drop {
			if err := packages.remove(d); err != nil {
				return err
			}
		}
		patterns = []string{"/**"}
	}
	for _, pattern := range patterns {
		found := packages.match(pattern)
		if pattern == "/**" {
			found = packages.names()
		}
		if len(found) == 0 {
			return fmt.Errorf("pick: %s is in no package of the recipe: %w", pattern, errdefs.ErrNotFound)
		}
		for _, p := range found {
			if err := a.pickOne(packages, p); err != nil {
				return err
			}
		}
	}
	for _, d := range a.recipe.Drop {
		if err := a.tree.remove(d); err != nil {
			return err
		}
	}
	return nil
}

// pickOne takes libraries along only when something was picked by name: a
// whole closure has them all, and optional plugins may lack theirs.
func (a *assembly) pickOne(packages *tree, p string) error {
	if len(a.recipe.Pick) > 0 {
		return packages.pickInto(a.tree, a.below, p)
	}
	e := packages.entries[p]
	if e.kind == tar.TypeReg {
		return a.tree.addFile(p, e.mode, e.uid, e.gid, packages.content(e))
	}
	a.tree.entries[p] = e
	return nil
}

func (a *assembly) program(packages *tree, path, file string) error {
	f, err := os.Open(file)
	if err != nil {
		return fmt.Errorf("program %s: %w", path, err)
	}
	defer f.Close()
	if err := packages.addFile(path, 0o755, 0, 0, f); err != nil {
		return err
	}
	return packages.pickInto(a.tree, a.below, path)
}

func (a *assembly) copies() error {
	for _, c := range a.recipe.Copies {
		_, e, err := a.tree.lookup(c.From)
		if err != nil {
			return fmt.Errorf("copies: %w", err)
		}
		if err := a.tree.addFile(c.To, e.mode, e.uid, e.gid, a.tree.content(e)); err != nil {
			return err
		}
	}
	return nil
}

func (a *assembly) files() error {
	for _, d := range a.recipe.Dirs {
		mode, uid, gid, err := attributes(d.Mode, d.Owner, 0o755)
		if err != nil {
			return err
		}
		if err := a.tree.addDir(d.Path, mode, uid, gid); err != nil {
			return err
		}
	}
	for _, f := range a.recipe.Files {
		mode, uid, gid, err := attributes(f.Mode, f.Owner, 0o644)
		if err != nil {
			return err
		}
		if err := a.tree.addFile(f.Path, mode, uid, gid, strings.NewReader(f.Content)); err != nil {
			return err
		}
	}
	return nil
}

func (a *assembly) zips() error {
	for _, z := range a.recipe.Zips {
		data, err := makeZip(z.Files)
		if err != nil {
			return fmt.Errorf("zips: %s: %w", z.Path, err)
		}
		if err := a.tree.addFile(z.Path, 0o644, 0, 0, bytes.NewReader(data)); err != nil {
			return err
		}
	}
	return nil
}

func makeZip(files map[string]string) ([]byte, error) {
	names := make([]string, 0, len(files))
	for n := range files {
		names = append(names, n)
	}
	sort.Strings(names)
	var buf bytes.Buffer
	w := zip.NewWriter(&buf)
	for _, n := range names {
		f, err := w.CreateHeader(&zip.FileHeader{Name: n, Method: zip.Deflate, Modified: epoch})
		if err != nil {
			return nil, err
		}
		if _, err := io.WriteString(f, files[n]); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}

func (a *assembly) links() error {
	for _, l := range a.recipe.Links {
		add := a.tree.addSymlink
		if l.Hard {
			add = a.tree.addHardlink
		}
		if err := add(l.Path, l.Target); err != nil {
			return fmt.Errorf("links: %w", err)
		}
	}
	return nil
}

// users appends to the accounts of this image or of its base.
func (a *assembly) users() error {
	if len(a.recipe.Users) == 0 {
		return nil
	}
	passwd, group := a.text("/etc/passwd"), a.text("/etc/group")
	for _, u := range a.recipe.Users {
		home, shell := u.Home, u.Shell
		if home == "" {
			home = "/nonexistent"
		}
		if shell == "" {
			shell = "/usr/sbin/nologin"
		}
		passwd += fmt.Sprintf("%s:x:%d:%d::%s:%s\n", u.Name, u.UID, u.GID, home, shell)
		if !strings.Contains("\n"+group, "\n"+u.Name+":") {
			group += fmt.Sprintf("%s:x:%d:\n", u.Name, u.GID)
		}
	}
	if err := a.tree.addFile("/etc/passwd", 0o644, 0, 0, strings.NewReader(passwd)); err != nil {
		return err
	}
	return a.tree.addFile("/etc/group", 0o644, 0, 0, strings.NewReader(group))
}

// text is a small file of this image, else of its base, else nothing.
func (a *assembly) text(p string) string {
	for _, t := range []*tree{a.tree, a.below} {
		if t == nil {
			continue
		}
		if _, e, err := t.lookup(p); err == nil {
			b, err := io.ReadAll(t.content(e))
			if err == nil {
				return string(b)
			}
		}
	}
	return ""
}

// applets asks the binary itself for its names. It runs under the image's own
// dynamic loader, from a scratch directory, and with an empty environment.
func (a *assembly) applets(ctx context.Context) error {
	spec := a.recipe.Applets
	if spec == nil {
		return nil
	}
	dir, err := os.MkdirTemp(a.spill, "applets-*")
	if err != nil {
		return fmt.Errorf("applets: %w", err)
	}
	defer os.RemoveAll(dir)
	closure, err := newTree(a.spill)
	if err != nil {
		return err
	}
	defer closure.close()
	if err := a.tree.pickInto(closure, nil, spec.Binary); err != nil {
		return fmt.Errorf("applets: %w", err)
	}
	var loader string
	for _, p := range closure.names() {
		e := closure.entries[p]
		if e.kind == tar.TypeSymlink {
			continue
		}
		flat := filepath.Join(dir, filepath.Base(p))
		if strings.HasPrefix(filepath.Base(p), "ld-") {
			loader = flat
		}
		if err := extract(flat, closure.content(e)); err != nil {
			return fmt.Errorf("applets: %w", err)
		}
	}
	binary := filepath.Join(dir, filepath.Base(spec.Binary))
	argv := append([]string{binary}, spec.Args...)
	if loader != "" {
		argv = append([]string{loader, "--library-path", dir}, argv...)
	}
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = []string{}
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("applets: run %s: %w", spec.Binary, err)
	}
	for p := range strings.FieldsSeq(string(out)) {
		if err := a.tree.addHardlink("/"+strings.TrimPrefix(p, "/"), spec.Binary); err != nil {
			return fmt.Errorf("applets: %w", err)
		}
	}
	return nil
}

func extract(file string, r io.Reader) error {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o755)
	if err != nil {
		return err
	}
	if _, err := io.Copy(f, r); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}
