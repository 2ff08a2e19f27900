package volume

import (
	"bytes"
	"fmt"
	"path"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// mountEntry is a line of /proc/<pid>/mountinfo (proc(5)).
type mountEntry struct {
	dev    string // major:minor
	root   string // of the mount within its file system
	point  string
	fsType string
	source string
	super  string // per-superblock options
}

// parseMountinfo skips lines it cannot read: the kernel writes none, and one odd
// mount elsewhere should not stop every Pod.
func parseMountinfo(text []byte) []mountEntry {
	var out []mountEntry
	for line := range bytes.Lines(text) {
		head, tail, ok := strings.Cut(strings.TrimSuffix(string(line), "\n"), " - ")
		if !ok {
			continue
		}
		h, t := strings.Split(head, " "), strings.Split(tail, " ")
		if len(h) < 6 || len(t) < 3 {
			continue
		}
		out = append(out, mountEntry{dev: h[2], root: unescape(h[3]), point: unescape(h[4]), fsType: t[0], source: unescape(t[1]), super: unescape(t[2])})
	}
	return out
}

// unescape reads the kernel's \ooo for space, tab, newline and backslash.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+4 <= len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// mountAt returns the topmost mount exactly on point.
func mountAt(mounts []mountEntry, point string) (mountEntry, bool) {
	for i := len(mounts) - 1; i >= 0; i-- {
		if mounts[i].point == point {
			return mounts[i], true
		}
	}
	return mountEntry{}, false
}

// covering returns the mount that p is on: the longest mount point above it, the
// topmost of those mounted on one another.
func covering(mounts []mountEntry, p string) (mountEntry, bool) {
	var best mountEntry
	found := false
	for _, m := range mounts {
		if _, ok := below(m.point, p); ok && (!found || len(m.point) >= len(best.point)) {
			best, found = m, true
		}
	}
	return best, found
}

// below returns p relative to dir, "" for dir itself.
func below(dir, p string) (string, bool) {
	if p == dir {
		return "", true
	}
	if dir != "/" {
		dir += "/"
	}
	return strings.CutPrefix(p, dir)
}

// deletedMark is what the kernel appends to the root of a mount whose directory has
// been removed.
const deletedMark = "//deleted"

// subPath finds out which part of volumeDir the kubelet has bound to bind: a volume's
// subPath is nowhere else to be read.
func subPath(mounts []mountEntry, bind, volumeDir string) (string, error) {
	b, ok := mountAt(mounts, bind)
	if !ok {
		return "", fmt.Errorf("subPath %s is not mounted: %w", bind, errdefs.ErrNotFound)
	}
	v, ok := covering(mounts, volumeDir)
	if !ok || v.dev != b.dev {
		return "", fmt.Errorf("subPath %s is on device %s, its volume %s on %q: %w", bind, b.dev, volumeDir, v.dev, errdefs.ErrInvalidArgument)
	}
	if strings.HasSuffix(b.root, deletedMark) {
		return "", fmt.Errorf("subPath %s has been removed from volume %s: %w", bind, volumeDir, errdefs.ErrNotFound)
	}
	rel, _ := below(v.point, volumeDir)
	sub, ok := below(path.Join(v.root, rel), b.root)
	if !ok {
		return "", fmt.Errorf("subPath %s shows %s, which is not in volume %s: %w", bind, b.root, volumeDir, errdefs.ErrInvalidArgument)
	}
	return sub, nil
}

// tmpfsSize reads a tmpfs's size option in bytes; 0 if there is none.
func tmpfsSize(super string) uint64 {
	for o := range strings.SplitSeq(super, ",") {
		v, ok := strings.CutPrefix(o, "size=")
		if !ok || v == "" {
			continue
		}
		shift := strings.IndexByte("kmg", v[len(v)-1]|0x20)
		if shift >= 0 {
			v = v[:len(v)-1]
		}
		n, err := strconv.ParseUint(v, 10, 64)
		if bits := 10 * (shift + 1); err == nil && n<<bits>>bits == n {
			return n << bits
		}
	}
	return 0
}
