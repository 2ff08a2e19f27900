package volume

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"sort"
	"strings"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
)

// Bounds of a file tree. Kubernetes allows 1 MiB for one ConfigMap or Secret; a
// projected volume may join many. The guest keeps it all in memory.
const (
	MaxFiles = 4096
	MaxBytes = 16 << 20
	// MaxPart bounds one message of a tree, in bytes.
	MaxPart = 1 << 20
	// MaxFile bounds a plain file (/etc/hosts, termination message), in bytes.
	MaxFile  = 1 << 20
	maxDepth = 32
)

const (
	dataLink = "..data"
	// versionTries is how often the version may change while it is being read.
	versionTries = 8
)

// packVersioned reads the current version of a volume the AtomicWriter fills. The
// kubelet removes a version as soon as the next is in place, so what has been read
// counts only if it is still the current one afterwards.
func packVersioned(dir string) (*hyperstart.FileTree, error) {
	root, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, gone(dir, err)
	}
	defer unix.Close(root)
	for range versionTries {
		version, err := readVersion(root)
		if err != nil {
			return nil, gone(dir+"/"+dataLink, err)
		}
		tree, err := packDir(root, version)
		if now, again := readVersion(root); again == nil && now != version {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("pack %s: %w", dir, err)
		}
		tree.Version = version
		return tree, nil
	}
	return nil, fmt.Errorf("volume %s keeps changing while it is read: %w", dir, errdefs.ErrUnavailable)
}

// currentVersion is packVersioned's version without the files.
func currentVersion(dir string) (string, error) {
	root, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", gone(dir, err)
	}
	defer unix.Close(root)
	v, err := readVersion(root)
	if err != nil {
		return "", gone(dir+"/"+dataLink, err)
	}
	return v, nil
}

func readVersion(root int) (string, error) {
	var buf [256]byte
	n, err := unix.Readlinkat(root, dataLink, buf[:])
	if err != nil {
		return "", err
	}
	v := string(buf[:n])
	if n == len(buf) || len(v) < 3 || !strings.HasPrefix(v, "..") || strings.Contains(v, "/") || !utf8.ValidString(v) {
		return "", fmt.Errorf("link points to %.64q, want a version of the kubelet's: %w", v, errdefs.ErrInvalidArgument)
	}
	return v, nil
}

// packer collects files within the bounds.
type packer struct {
	files []*hyperstart.File
	bytes int
}

// packDir reads the directory name below root. No symbolic link is followed: the
// kubelet's writer makes none below a version.
func packDir(root int, name string) (*hyperstart.FileTree, error) {
	fd, st, err := openBeneath(root, name, unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	var p packer
	if err := p.walk(fd, "", 0); err != nil {
		return nil, err
	}
	return &hyperstart.FileTree{Files: p.files, DirMode: st.Mode & 0o7777, Uid: st.Uid, Gid: st.Gid}, nil
}

// walk reads the directory fd, which it closes.
func (p *packer) walk(fd int, prefix string, depth int) error {
	dir := os.NewFile(uintptr(fd), prefix)
	defer dir.Close()
	if depth > maxDepth {
		return fmt.Errorf("%s is over %d directories deep: %w", prefix, maxDepth, errdefs.ErrResourceExhausted)
	}
	// One more than fits tells that there are too many without reading them all.
	names, err := dir.Readdirnames(MaxFiles + 1)
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("list %q: %w", prefix, err)
	}
	if len(p.files)+len(names) > MaxFiles {
		return fmt.Errorf("over %d files: %w", MaxFiles, errdefs.ErrResourceExhausted)
	}
	sort.Strings(names)
	for _, n := range names {
		if err := p.entry(fd, n, path.Join(prefix, n), depth); err != nil {
			return err
		}
	}
	return nil
}

func (p *packer) entry(dir int, name, rel string, depth int) error {
	if !utf8.ValidString(name) {
		return fmt.Errorf("file name %q is not UTF-8: %w", rel, errdefs.ErrInvalidArgument)
	}
	fd, st, err := openBeneath(dir, name, 0)
	if err != nil {
		return err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return p.walk(fd, rel, depth+1)
	case unix.S_IFREG:
		f := os.NewFile(uintptr(fd), rel)
		defer f.Close()
		return p.add(f, st, rel, MaxBytes-p.bytes)
	default:
		_ = unix.Close(fd)
		return fmt.Errorf("%s is neither file nor directory: %w", rel, errdefs.ErrInvalidArgument)
	}
}

func (p *packer) add(f *os.File, st unix.Stat_t, rel string, limit int) error {
	data, err := io.ReadAll(io.LimitReader(f, int64(limit)+1))
	if err != nil {
		return fmt.Errorf("read %s: %w", rel, err)
	}
	if len(data) > limit {
		return fmt.Errorf("%q exceeds the %d bytes a volume of files may have: %w", rel, limit, errdefs.ErrResourceExhausted)
	}
	p.bytes += len(data)
	p.files = append(p.files, &hyperstart.File{Path: rel, Data: data, Mode: st.Mode & 0o7777, Uid: st.Uid, Gid: st.Gid})
	return nil
}

// openBeneath opens name below dir, without any symbolic link on the way and without
// blocking on a FIFO.
func openBeneath(dir int, name string, flags uint64) (int, unix.Stat_t, error) {
	var st unix.Stat_t
	fd, err := unix.Openat2(dir, name, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_NOCTTY | unix.O_CLOEXEC | flags,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	})
	if errors.Is(err, unix.ELOOP) {
		return -1, st, fmt.Errorf("%s is a symbolic link: %w", name, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return -1, st, gone(name, err)
	}
	if err := unix.Fstat(fd, &st); err != nil {
		_ = unix.Close(fd)
		return -1, st, fmt.Errorf("stat %s: %w", name, err)
	}
	return fd, st, nil
}

// packPlain reads one file, or a directory's files, at rel below base: a tree that is
// not updated. A file becomes the tree's only one, with path "".
func packPlain(base, rel string) (*hyperstart.FileTree, error) {
	root, err := unix.Open(base, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, gone(base, err)
	}
	defer unix.Close(root)
	fd, st, err := openBeneath(root, rel, 0)
	if err != nil {
		return nil, err
	}
	var p packer
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		if err := p.walk(fd, "", 0); err != nil {
			return nil, fmt.Errorf("pack %s: %w", rel, err)
		}
		return &hyperstart.FileTree{Files: p.files, DirMode: st.Mode & 0o7777, Uid: st.Uid, Gid: st.Gid}, nil
	case unix.S_IFREG:
		f := os.NewFile(uintptr(fd), rel)
		defer f.Close()
		if err := p.add(f, st, "", MaxFile); err != nil {
			return nil, fmt.Errorf("pack %s: %w", rel, err)
		}
		return &hyperstart.FileTree{Files: p.files, DirMode: 0o755}, nil
	default:
		_ = unix.Close(fd)
		return nil, fmt.Errorf("%s/%s is neither file nor directory: %w", base, rel, errdefs.ErrInvalidArgument)
	}
}

// overhead is more than a file's message has besides its path and data.
const overhead = 64

// split cuts a tree into parts of at most MaxPart bytes; a file that does not fit is
// continued by appending in the next part. There is at least one part.
func split(tree *hyperstart.FileTree) []*hyperstart.FileTree {
	var parts []*hyperstart.FileTree
	room := 0
	next := func() {
		parts = append(parts, &hyperstart.FileTree{Version: tree.Version, DirMode: tree.DirMode, Uid: tree.Uid, Gid: tree.Gid})
		room = MaxPart - len(tree.Version) - overhead
	}
	next()
	for _, f := range tree.Files {
		data, first := f.Data, true
		for first || len(data) > 0 {
			need := len(f.Path) + overhead
			if room < need+min(len(data), 4096) {
				next()
			}
			n := min(len(data), room-need)
			last := parts[len(parts)-1]
			last.Files = append(last.Files, &hyperstart.File{Path: f.Path, Data: data[:n], Mode: f.Mode, Uid: f.Uid, Gid: f.Gid, Append: !first})
			data, first = data[n:], false
			room -= need + n
		}
	}
	return parts
}

func gone(what string, err error) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ESTALE) {
		return fmt.Errorf("%s: %w", what, errdefs.ErrNotFound)
	}
	return fmt.Errorf("open %s: %w", what, err)
}
