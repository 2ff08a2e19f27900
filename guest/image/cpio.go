package image

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"path"
	"strings"
)

// Types of a cpio entry, as in stat(2)'s st_mode.
const (
	typeDirectory = 0o040000
	typeRegular   = 0o100000
	typeSymlink   = 0o120000
	typeCharacter = 0o020000
)

// CPIO writes a "newc" archive, the format of an initramfs. Entries belong to root and
// have no time stamp, so equal input gives equal output. Missing parent directories are
// written first (the kernel does not make them). It is not for concurrent use.
type CPIO struct {
	w    io.Writer
	n    int64
	ino  uint32
	made map[string]bool
}

// NewCPIO starts an archive on w.
func NewCPIO(w io.Writer) *CPIO { return &CPIO{w: w, made: map[string]bool{".": true}} }

// Directory adds a directory with the given permission bits, once.
func (c *CPIO) Directory(name string, perm fs.FileMode) error {
	name, err := clean(name)
	if err != nil || c.made[name] {
		return err
	}
	return c.entry(name, typeDirectory|uint32(perm.Perm()), 0, 0, 0, nil)
}

// File adds a regular file of exactly size bytes from r.
func (c *CPIO) File(name string, perm fs.FileMode, size int64, r io.Reader) error {
	if size < 0 || size > math.MaxUint32 {
		return fmt.Errorf("cpio: %s: %d bytes do not fit the newc format", name, size)
	}
	name, err := clean(name)
	if err != nil {
		return err
	}
	return c.entry(name, typeRegular|uint32(perm.Perm()), size, 0, 0, r)
}

// Symlink adds a symbolic link.
func (c *CPIO) Symlink(name, target string) error {
	name, err := clean(name)
	if err != nil {
		return err
	}
	return c.entry(name, typeSymlink|0o777, int64(len(target)), 0, 0, strings.NewReader(target))
}

// CharDevice adds a character device node.
func (c *CPIO) CharDevice(name string, perm fs.FileMode, major, minor uint32) error {
	name, err := clean(name)
	if err != nil {
		return err
	}
	return c.entry(name, typeCharacter|uint32(perm.Perm()), 0, major, minor, nil)
}

// Close writes the trailer; it does not close the writer below.
func (c *CPIO) Close() error {
	if err := c.header("TRAILER!!!", 0, 0, 0, 0); err != nil {
		return err
	}
	return c.pad(512)
}

func clean(name string) (string, error) {
	p := path.Clean(strings.TrimLeft(name, "/"))
	if p == "." || p == ".." || strings.HasPrefix(p, "../") || strings.ContainsRune(p, 0) {
		return "", fmt.Errorf("cpio: %q is not a name inside the archive", name)
	}
	return p, nil
}

func (c *CPIO) entry(name string, mode uint32, size int64, major, minor uint32, r io.Reader) error {
	if c.made[name] {
		return fmt.Errorf("cpio: %s is there twice", name)
	}
	if dir := path.Dir(name); !c.made[dir] {
		if err := c.Directory(dir, 0o755); err != nil {
			return err
		}
	}
	c.made[name] = true
	if err := c.header(name, mode, size, major, minor); err != nil {
		return err
	}
	if r == nil {
		return nil
	}
	n, err := io.CopyN(c.w, r, size)
	c.n += n
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return fmt.Errorf("cpio: %s: %w", name, err)
	}
	return c.pad(4)
}

func (c *CPIO) header(name string, mode uint32, size int64, major, minor uint32) error {
	c.ino++
	links := 1
	if mode&typeDirectory != 0 && mode&typeRegular == 0 {
		links = 2
	}
	h := fmt.Sprintf("070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
		c.ino, mode, 0, 0, links, 0, size, 0, 0, major, minor, len(name)+1, 0, name)
	n, err := io.WriteString(c.w, h)
	c.n += int64(n)
	if err != nil {
		return fmt.Errorf("cpio: %s: %w", name, err)
	}
	return c.pad(4)
}

func (c *CPIO) pad(align int64) error {
	var zero [512]byte
	n, err := c.w.Write(zero[:(align-c.n%align)%align])
	c.n += int64(n)
	return err
}
