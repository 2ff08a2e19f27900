package image

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"sort"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// epoch is the modification time of everything the builder writes: equal
// inputs must give equal digests, and some programs dislike the year 1970.
var epoch = time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)

// maxLinks bounds symbolic link resolution, as the kernel does.
const maxLinks = 40

// entry is one path of a tree. Content is a section of the tree's spill file.
type entry struct {
	kind     byte // tar.TypeReg, TypeDir, TypeSymlink, TypeLink
	mode     int64
	uid, gid int
	target   string // of a symbolic link as written; of a hard link, canonical
	off      int64
	size     int64
}

// tree is a file system in the making: names in memory, contents in one spill
// file. Paths are canonical: relative, clean, with /usr merged. Not safe for
// concurrent use.
type tree struct {
	entries map[string]entry
	spill   *os.File
	end     int64
}

// newTree makes an empty tree whose spill file is in dir and already unlinked.
func newTree(dir string) (*tree, error) {
	f, err := os.CreateTemp(dir, "tree-*")
	if err != nil {
		return nil, fmt.Errorf("spill file: %w", err)
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &tree{entries: map[string]entry{}, spill: f}, nil
}

func (t *tree) close() error { return t.spill.Close() }

// merged are the top-level directories that are links into /usr.
var merged = []string{"bin", "lib", "lib32", "lib64", "libx32", "sbin"}

// canonical turns any spelling of a path in an image into the tree's, and
// refuses those that leave the root.
func canonical(p string) (string, error) {
	c := path.Clean("/" + p)[1:]
	for _, part := range strings.Split(p, "/") {
		if part == ".." {
			return "", fmt.Errorf("path %q leaves the root: %w", p, errdefs.ErrInvalidArgument)
		}
	}
	first, _, _ := strings.Cut(c, "/")
	for _, m := range merged {
		if first == m {
			return "usr/" + c, nil
		}
	}
	return c, nil
}

// content returns a reader of a regular file's bytes.
func (t *tree) content(e entry) *io.SectionReader {
	return io.NewSectionReader(t.spill, e.off, e.size)
}

// store appends r to the spill file.
func (t *tree) store(r io.Reader) (off, size int64, err error) {
	off = t.end
	size, err = io.Copy(io.NewOffsetWriter(t.spill, off), r)
	if err != nil {
		return 0, 0, fmt.Errorf("write spill file: %w", err)
	}
	t.end += size
	return off, size, nil
}

// addFile puts a regular file; an existing entry is replaced.
func (t *tree) addFile(p string, mode int64, uid, gid int, r io.Reader) error {
	c, err := canonical(p)
	if err != nil {
		return err
	}
	off, size, err := t.store(r)
	if err != nil {
		return err
	}
	t.entries[c] = entry{kind: tar.TypeReg, mode: mode, uid: uid, gid: gid, off: off, size: size}
	return nil
}

func (t *tree) addDir(p string, mode int64, uid, gid int) error {
	c, err := canonical(p)
	if err != nil || c == "" {
		return err
	}
	t.entries[c] = entry{kind: tar.TypeDir, mode: mode, uid: uid, gid: gid}
	return nil
}

func (t *tree) addSymlink(p, target string) error {
	c, err := canonical(p)
	if err != nil {
		return err
	}
	t.entries[c] = entry{kind: tar.TypeSymlink, mode: 0o777, target: target}
	return nil
}

// addHardlink makes p another name of the regular file target.
func (t *tree) addHardlink(p, target string) error {
	c, err := canonical(p)
	if err != nil {
		return err
	}
	to, e, err := t.lookup(target)
	if err != nil {
		return err
	}
	if c == to {
		return nil
	}
	t.entries[c] = entry{kind: tar.TypeLink, mode: e.mode, uid: e.uid, gid: e.gid, target: to}
	return nil
}

// lookup follows symbolic and hard links to the entry p names.
func (t *tree) lookup(p string) (string, entry, error) {
	c, err := canonical(p)
	if err != nil {
		return "", entry{}, err
	}
	for range maxLinks {
		next, done := t.step(c)
		if done {
			e, ok := t.entries[next]
			if !ok {
				return "", entry{}, fmt.Errorf("%s: no such file in the image: %w", p, errdefs.ErrNotFound)
			}
			return next, e, nil
		}
		if c, err = canonical(next); err != nil {
			return "", entry{}, err
		}
	}
	return "", entry{}, fmt.Errorf("%s: too many links: %w", p, errdefs.ErrInvalidArgument)
}

// step replaces the first link in c by its target; done means c has none.
func (t *tree) step(c string) (next string, done bool) {
	parts := strings.Split(c, "/")
	for i := range parts {
		prefix := strings.Join(parts[:i+1], "/")
		e, ok := t.entries[prefix]
		if !ok || (e.kind != tar.TypeSymlink && e.kind != tar.TypeLink) {
			continue
		}
		to := e.target
		if e.kind == tar.TypeSymlink && !path.IsAbs(to) {
			to = path.Join("/", path.Dir(prefix), to)
		}
		return path.Join("/", to, strings.Join(parts[i+1:], "/"))[1:], false
	}
	return c, true
}

// readTar adds every entry of a tar stream. Special files are left out: they
// have no place in an image, the runtime makes /dev. With namesOnly, contents
// over a mebibyte are not kept (enough to build on top of a base).
func (t *tree) readTar(r io.Reader, namesOnly bool) error {
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read tar: %w", err)
		}
		if err := t.addTarEntry(h, tr, namesOnly); err != nil {
			return err
		}
	}
}

func (t *tree) addTarEntry(h *tar.Header, body io.Reader, namesOnly bool) error {
	c, err := canonical(h.Name)
	if err != nil {
		return err
	}
	mode := h.Mode & 0o7777
	switch h.Typeflag {
	case tar.TypeDir:
		return t.addDir(h.Name, mode, h.Uid, h.Gid)
	case tar.TypeReg:
		if namesOnly && h.Size > 1<<20 {
			body = bytes.NewReader(nil)
		}
		return t.addFile(h.Name, mode, h.Uid, h.Gid, body)
	case tar.TypeSymlink:
		if isMergeLink(h.Name) {
			return nil
		}
		t.entries[c] = entry{kind: tar.TypeSymlink, mode: 0o777, uid: h.Uid, gid: h.Gid, target: h.Linkname}
	case tar.TypeLink:
		to, err := canonical(h.Linkname)
		if err != nil {
			return err
		}
		t.entries[c] = entry{kind: tar.TypeLink, mode: mode, uid: h.Uid, gid: h.Gid, target: to}
	}
	return nil
}

func isMergeLink(name string) bool {
	c := path.Clean("/" + name)[1:]
	for _, m := range merged {
		if c == m {
			return true
		}
	}
	return false
}

// remove deletes what matches a pattern; names of hard links to a removed
// file are kept by moving the content to the first of them.
func (t *tree) remove(pattern string) error {
	for _, p := range t.match(pattern) {
		e := t.entries[p]
		delete(t.entries, p)
		if e.kind == tar.TypeReg {
			t.inherit(p, e)
		}
	}
	return nil
}

func (t *tree) inherit(gone string, e entry) {
	var heir string
	for _, p := range t.names() {
		l := t.entries[p]
		if l.kind != tar.TypeLink || l.target != gone {
			continue
		}
		if heir == "" {
			heir = p
			t.entries[p] = e
			continue
		}
		l.target = heir
		t.entries[p] = l
	}
}

// match lists, sorted, the entries a pattern names: "/a/**" is /a and all
// below, otherwise path.Match.
func (t *tree) match(pattern string) []string {
	sub, deep := strings.CutSuffix(pattern, "/**")
	c, err := canonical(sub)
	if err != nil {
		return nil
	}
	var out []string
	for _, p := range t.names() {
		if deep {
			if p == c || strings.HasPrefix(p, c+"/") {
				out = append(out, p)
			}
			continue
		}
		if ok, _ := path.Match(c, p); ok {
			out = append(out, p)
		}
	}
	return out
}

func (t *tree) names() []string {
	out := make([]string, 0, len(t.entries))
	for p := range t.entries {
		out = append(out, p)
	}
	sort.Strings(out)
	return out
}

// writeTar writes the tree as a layer: sorted, fixed times, every parent
// directory present, hard links after their target, the /usr merge links
// unless below (the base) already has them.
func (t *tree) writeTar(w io.Writer, below *tree) error {
	tw := tar.NewWriter(w)
	t.addParents(below)
	if below == nil {
		for _, m := range merged {
			if _, ok := t.entries["usr/"+m]; ok {
				if err := writeHeader(tw, m, entry{kind: tar.TypeSymlink, mode: 0o777, target: "usr/" + m}); err != nil {
					return err
				}
			}
		}
	}
	var links []string
	for _, p := range t.names() {
		e := t.entries[p]
		if e.kind == tar.TypeLink {
			links = append(links, p)
			continue
		}
		if below != nil && e.kind == tar.TypeDir && below.entries[p] == e {
			continue
		}
		if err := writeHeader(tw, p, e); err != nil {
			return err
		}
		if e.kind == tar.TypeReg {
			if _, err := io.Copy(tw, t.content(e)); err != nil {
				return fmt.Errorf("write %s: %w", p, err)
			}
		}
	}
	for _, p := range links {
		if err := writeHeader(tw, p, t.entries[p]); err != nil {
			return err
		}
	}
	return tw.Close()
}

// addParents makes missing parent directories, like those of the base.
func (t *tree) addParents(below *tree) {
	for _, p := range t.names() {
		for d := path.Dir(p); d != "."; d = path.Dir(d) {
			if _, ok := t.entries[d]; ok {
				continue
			}
			e := entry{kind: tar.TypeDir, mode: 0o755}
			if below != nil {
				if b, ok := below.entries[d]; ok && b.kind == tar.TypeDir {
					e = b
				}
			}
			t.entries[d] = e
		}
	}
}

func writeHeader(tw *tar.Writer, p string, e entry) error {
	h := &tar.Header{
		Typeflag: e.kind, Name: p, Mode: e.mode, Uid: e.uid, Gid: e.gid,
		Size: e.size, Linkname: e.target, ModTime: epoch, Format: tar.FormatPAX,
	}
	if e.kind == tar.TypeDir {
		h.Name += "/"
	}
	if err := tw.WriteHeader(h); err != nil {
		return fmt.Errorf("write %s: %w", p, err)
	}
	return nil
}
