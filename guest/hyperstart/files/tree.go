package files

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
)

// Tree is one tree at a host path. It is not safe for concurrent use: parts of a tree
// are ordered anyway.
type Tree struct {
	// path of the tree: a directory, or a file if the tree is a single plain file.
	path string
	part *part
}

// part is what has come of a tree whose last part is still missing.
type part struct {
	version string
	names   map[string]bool // user-visible names
	files   int
	bytes   int
	// skip: this version is in place already and is only being sent again.
	skip bool
}

// New returns the tree at path; the parent directory must exist.
func New(path string) *Tree { return &Tree{path: path} }

// Put writes one part of a tree; with more set, nothing of a versioned tree becomes
// visible yet. After an error the tree must be sent again from its first part; what
// was visible before stays visible.
func (t *Tree) Put(in *hyperstart.FileTree, more bool) error {
	if in == nil {
		return fmt.Errorf("file tree is missing: %w", errdefs.ErrInvalidArgument)
	}
	err := t.put(in, more)
	if err != nil || !more {
		t.part = nil
	}
	return err
}

// Reserve makes the tree's directory, empty, so that it can be mounted before its
// content has come. A tree that is there is left alone.
func (t *Tree) Reserve(in *hyperstart.FileTree) error {
	if in == nil {
		return fmt.Errorf("file tree is missing: %w", errdefs.ErrInvalidArgument)
	}
	if _, err := os.Lstat(t.path); err == nil {
		return nil
	}
	root, err := t.open(in)
	if err != nil {
		return err
	}
	return root.Close()
}

func (t *Tree) put(in *hyperstart.FileTree, more bool) error {
	first := t.part == nil
	if !first && t.part.version != in.Version {
		// The shim gave up on the other tree; this is the first part of a new one.
		first = true
	}
	if first {
		t.part = &part{version: in.Version, names: map[string]bool{}}
	}
	if err := t.account(in); err != nil {
		return err
	}
	if in.Version == "" && len(in.Files) > 0 && in.Files[0].GetPath() == "" {
		return t.putSingle(in)
	}
	for _, f := range in.Files {
		if err := CheckPath(f.GetPath()); err != nil {
			return err
		}
	}
	root, err := t.open(in)
	if err != nil {
		return err
	}
	defer root.Close()
	if in.Version == "" {
		return writeAll(root, "", in)
	}
	return t.putVersion(root, in, first, more)
}

func (t *Tree) account(in *hyperstart.FileTree) error {
	t.part.files += len(in.Files)
	for _, f := range in.Files {
		t.part.bytes += len(f.GetData())
	}
	if t.part.files > MaxFiles || t.part.bytes > MaxBytes {
		return fmt.Errorf("file tree of %d files and %d bytes: over the limit of %d and %d: %w",
			t.part.files, t.part.bytes, MaxFiles, MaxBytes, errdefs.ErrInvalidArgument)
	}
	return nil
}

// putSingle writes in place: a bind mount holds on to the inode.
func (t *Tree) putSingle(in *hyperstart.FileTree) error {
	if len(in.Files) != 1 {
		return fmt.Errorf("file tree with a file of empty path has %d files, must be 1: %w", len(in.Files), errdefs.ErrInvalidArgument)
	}
	dir, name := path.Split(t.path)
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("open file tree: %w", err)
	}
	defer root.Close()
	// A reserved tree is an empty directory until its kind is known.
	if info, err := root.Lstat(name); err == nil && info.IsDir() {
		if err := root.Remove(name); err != nil {
			return fmt.Errorf("replace reserved directory: %w", err)
		}
	}
	return writeFile(root, name, in.Files[0])
}

func (t *Tree) open(in *hyperstart.FileTree) (*os.Root, error) {
	if err := os.Mkdir(t.path, 0o755); err == nil {
		if err := own(t.path, in); err != nil {
			return nil, err
		}
	} else if !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("make file tree: %w", err)
	}
	root, err := os.OpenRoot(t.path)
	if err != nil {
		return nil, fmt.Errorf("open file tree: %w", err)
	}
	return root, nil
}

func own(dir string, in *hyperstart.FileTree) error {
	if err := os.Chown(dir, int(in.Uid), int(in.Gid)); err != nil {
		return fmt.Errorf("own file tree: %w", err)
	}
	if err := os.Chmod(dir, mode(in.DirMode, 0o755)); err != nil {
		return fmt.Errorf("set mode of file tree: %w", err)
	}
	return nil
}

// mode converts Unix permission bits, the special ones included; 0 means otherwise.
func mode(bits, otherwise uint32) fs.FileMode {
	if bits == 0 {
		bits = otherwise
	}
	m := fs.FileMode(bits & 0o777)
	if bits&unix.S_ISUID != 0 {
		m |= fs.ModeSetuid
	}
	if bits&unix.S_ISGID != 0 {
		m |= fs.ModeSetgid
	}
	if bits&unix.S_ISVTX != 0 {
		m |= fs.ModeSticky
	}
	return m
}

func (t *Tree) putVersion(root *os.Root, in *hyperstart.FileTree, first, more bool) error {
	if err := checkVersion(in.Version); err != nil {
		return err
	}
	current, err := root.Readlink(dataLink)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read %s: %w", dataLink, err)
	}
	if first {
		t.part.skip = current == in.Version
	}
	if t.part.skip {
		return nil
	}
	if first {
		if err := fresh(root, in); err != nil {
			return err
		}
	}
	for _, f := range in.Files {
		name := firstElement(f.Path)
		if strings.HasPrefix(name, "..") {
			return fmt.Errorf("file path %.80q: names beginning with .. are reserved in a versioned tree: %w", f.Path, errdefs.ErrInvalidArgument)
		}
		t.part.names[name] = true
	}
	if err := writeAll(root, in.Version, in); err != nil {
		return err
	}
	if more {
		return nil
	}
	return switchVersion(root, in.Version, t.part.names)
}

func fresh(root *os.Root, in *hyperstart.FileTree) error {
	if err := root.RemoveAll(in.Version); err != nil {
		return fmt.Errorf("remove unfinished version: %w", err)
	}
	return makeDir(root, in.Version, in)
}

// switchVersion makes version the visible one: one rename, then the links around it.
func switchVersion(root *os.Root, version string, names map[string]bool) error {
	if err := root.RemoveAll(dataTemp); err != nil {
		return fmt.Errorf("remove %s: %w", dataTemp, err)
	}
	if err := root.Symlink(version, dataTemp); err != nil {
		return fmt.Errorf("link %s: %w", dataTemp, err)
	}
	if err := root.Rename(dataTemp, dataLink); err != nil {
		return fmt.Errorf("switch %s to %s: %w", dataLink, version, err)
	}
	for name := range names {
		if err := ensureLink(root, name); err != nil {
			return err
		}
	}
	return sweep(root, version, names)
}

func ensureLink(root *os.Root, name string) error {
	target := dataLink + "/" + name
	if have, err := root.Readlink(name); err == nil && have == target {
		return nil
	}
	if err := root.RemoveAll(name); err != nil {
		return fmt.Errorf("replace %q: %w", name, err)
	}
	if err := root.Symlink(target, name); err != nil {
		return fmt.Errorf("link %q: %w", name, err)
	}
	return nil
}

// sweep removes links to names that are gone and the directories of other versions.
func sweep(root *os.Root, version string, names map[string]bool) error {
	d, err := root.Open(".")
	if err != nil {
		return fmt.Errorf("list file tree: %w", err)
	}
	entries, err := d.ReadDir(-1)
	d.Close()
	if err != nil {
		return fmt.Errorf("list file tree: %w", err)
	}
	for _, e := range entries {
		stale := false
		switch name := e.Name(); {
		case e.Type()&fs.ModeSymlink != 0 && name != dataLink && !names[name]:
			target, err := root.Readlink(name)
			stale = err == nil && strings.HasPrefix(target, dataLink+"/")
		case e.IsDir() && strings.HasPrefix(name, "..") && name != version:
			stale = true
		}
		if stale {
			if err := root.RemoveAll(e.Name()); err != nil {
				return fmt.Errorf("remove stale %q: %w", e.Name(), err)
			}
		}
	}
	return nil
}

func writeAll(root *os.Root, dir string, in *hyperstart.FileTree) error {
	for _, f := range in.Files {
		name := path.Join(dir, f.Path)
		if err := makeParents(root, name, in); err != nil {
			return err
		}
		if err := writeFile(root, name, f); err != nil {
			return err
		}
	}
	return nil
}

func makeParents(root *os.Root, name string, in *hyperstart.FileTree) error {
	dir := path.Dir(name)
	if dir == "." {
		return nil
	}
	if info, err := root.Stat(dir); err == nil && info.IsDir() {
		return nil
	}
	if err := makeParents(root, dir, in); err != nil {
		return err
	}
	return makeDir(root, dir, in)
}

func makeDir(root *os.Root, dir string, in *hyperstart.FileTree) error {
	if err := root.Mkdir(dir, 0o755); err != nil {
		return fmt.Errorf("make directory: %w", err)
	}
	if err := root.Chown(dir, int(in.Uid), int(in.Gid)); err != nil {
		return fmt.Errorf("own directory: %w", err)
	}
	if err := root.Chmod(dir, mode(in.DirMode, 0o755)); err != nil {
		return fmt.Errorf("set mode of directory: %w", err)
	}
	return nil
}

// writeFile writes without following links or blocking on a FIFO: containers may
// write to a plain tree's directory.
func writeFile(root *os.Root, name string, f *hyperstart.File) error {
	flags := os.O_WRONLY | os.O_CREATE | unix.O_NOFOLLOW | unix.O_NONBLOCK
	if f.Append {
		flags |= os.O_APPEND
	} else {
		flags |= os.O_TRUNC
	}
	w, err := root.OpenFile(name, flags, 0o600)
	if err != nil {
		return fmt.Errorf("write file: %w", err)
	}
	err = fill(w, f)
	if cerr := w.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("write file %.80q: %w", name, err)
	}
	return nil
}

func fill(w *os.File, f *hyperstart.File) error {
	info, err := w.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("is no regular file: %w", errdefs.ErrFailedPrecondition)
	}
	if _, err := w.Write(f.Data); err != nil {
		return err
	}
	if err := w.Chown(int(f.Uid), int(f.Gid)); err != nil {
		return err
	}
	return w.Chmod(mode(f.Mode, 0o644))
}

// MaxTail bounds what ReadTail returns, in bytes.
const MaxTail = 1 << 20

// ReadTail returns at most limit bytes (0 or over MaxTail: MaxTail) of the end of a
// file of the tree, and the file's size. Path "" is a single-file tree.
func (t *Tree) ReadTail(name string, limit uint32) ([]byte, uint64, error) {
	dir := t.path
	if name == "" {
		dir, name = path.Split(t.path)
	} else if err := CheckPath(name); err != nil {
		return nil, 0, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, 0, fmt.Errorf("open file tree: %w", notFound(err))
	}
	defer root.Close()
	f, err := root.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, fmt.Errorf("read file: %w", notFound(err))
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	if !info.Mode().IsRegular() {
		return nil, 0, fmt.Errorf("read file %.80q: is no regular file: %w", name, errdefs.ErrFailedPrecondition)
	}
	if limit == 0 || limit > MaxTail {
		limit = MaxTail
	}
	from := max(info.Size()-int64(limit), 0)
	b, err := io.ReadAll(io.NewSectionReader(f, from, int64(limit)))
	if err != nil {
		return nil, 0, fmt.Errorf("read file: %w", err)
	}
	return b, uint64(info.Size()), nil
}

func notFound(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	return err
}
