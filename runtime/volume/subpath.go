package volume

import (
	"fmt"
	"path"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/mountinfo"
)

// covering returns the mount that p is on: the longest mount point above it, the
// topmost of those mounted on one another.
func covering(mounts []mountinfo.Mount, p string) (mountinfo.Mount, bool) {
	var best mountinfo.Mount
	found := false
	for _, m := range mounts {
		if _, ok := below(m.Target, p); ok && (!found || len(m.Target) >= len(best.Target)) {
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
func subPath(mounts []mountinfo.Mount, bind, volumeDir string) (string, error) {
	b, ok := mountinfo.At(mounts, bind)
	if !ok {
		return "", fmt.Errorf("subPath %s is not mounted: %w", bind, errdefs.ErrNotFound)
	}
	v, ok := covering(mounts, volumeDir)
	if !ok || v.Device != b.Device {
		return "", fmt.Errorf("subPath %s is on device %s, its volume %s on %q: %w", bind, b.Device, volumeDir, v.Device, errdefs.ErrInvalidArgument)
	}
	if strings.HasSuffix(b.Root, deletedMark) {
		return "", fmt.Errorf("subPath %s has been removed from volume %s: %w", bind, volumeDir, errdefs.ErrNotFound)
	}
	rel, _ := below(v.Target, volumeDir)
	sub, ok := below(path.Join(v.Root, rel), b.Root)
	if !ok {
		return "", fmt.Errorf("subPath %s shows %s, which is not in volume %s: %w", bind, b.Root, volumeDir, errdefs.ErrInvalidArgument)
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
