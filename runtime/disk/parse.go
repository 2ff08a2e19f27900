package disk

import (
	"fmt"
	"path"
	"strconv"
	"strings"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
)

// Bounds of a mount list. Overlayfs in the guest takes 500 lower layers; the kernel
// refuses paths over 4096 bytes anyway.
const (
	maxMounts  = 512
	maxOptions = 1024
	maxPath    = 4096
)

// Mount types of containerd's erofs snapshotter (plugins/snapshots/erofs, 2.4).
const (
	typeEROFS   = "erofs"
	typeMkfs    = "mkfs/ext4"
	optMkfsSize = "X-containerd.mkfs.size="
	optDevice   = "device="
)

// parse knows the shapes the erofs snapshotter gives, in both of its modes:
//
//	[mkfs/ext4] erofs... format/mkdir/overlay   container of any number of layers
//	erofs... format/mkdir/overlay               several layers, read-only
//	erofs format/bind                           one layer, read-only
//	erofs                                       one layer, a view
//
// The layers come topmost first, as overlayfs's lowerdir wants them.
func parse(mounts []*types.Mount) (RootFS, error) {
	if len(mounts) == 0 {
		return RootFS{}, invalid("root file system has no mounts")
	}
	if len(mounts) > maxMounts {
		return RootFS{}, invalid("root file system has %d mounts, at most %d are possible", len(mounts), maxMounts)
	}
	for i, m := range mounts {
		if m == nil || len(m.Options) > maxOptions {
			return RootFS{}, invalid("root file system mount %d is empty or has over %d options", i, maxOptions)
		}
	}
	var (
		fs   RootFS
		rest = mounts
	)
	first := 0
	if rest[0].Type == typeMkfs {
		size, err := mkfsSize(rest[0])
		if err != nil {
			return RootFS{}, err
		}
		fs.SizeLimit = size
		rest, first = rest[1:], 1
	}
	for len(rest) > 0 && rest[0].Type == typeEROFS {
		p, err := layerPath(rest[0])
		if err != nil {
			return RootFS{}, err
		}
		fs.Layers = append([]string{p}, fs.Layers...)
		rest = rest[1:]
	}
	if len(fs.Layers) == 0 {
		return RootFS{}, foreign(mounts[first:])
	}
	writable, err := parseTop(rest, first, len(fs.Layers))
	if err != nil {
		return RootFS{}, err
	}
	fs.Writable = writable
	return fs, nil
}

// parseTop reads what is left after the layers: nothing, or one mount joining all of
// them, the first of which has index first. It tells whether the result is writable.
func parseTop(rest []*types.Mount, first, layers int) (bool, error) {
	if len(rest) == 0 {
		if first != 0 || layers != 1 {
			return false, invalid("root file system has %d layers and nothing that joins them", layers)
		}
		return false, nil
	}
	top := rest[0]
	if len(rest) > 1 {
		return false, invalid("root file system mount of type %q follows the one of type %q, which should be the last", rest[1].Type, top.Type)
	}
	switch top.Type {
	case "format/bind":
		if want := fmt.Sprintf("{{ mount %d }}", first); layers != 1 || top.Source != want {
			return false, invalid("root file system mount of type format/bind has source %q, want %q and one layer", top.Source, want)
		}
		return false, nil
	case "format/mkdir/overlay", "format/overlay":
		return parseOverlay(top.Options, first, layers)
	default:
		return false, foreign(rest)
	}
}

// parseOverlay checks that the overlay joins exactly the layers seen, in order:
// anything else would silently give the container other files than its image's.
func parseOverlay(options []string, first, layers int) (bool, error) {
	var (
		lower    string
		writable bool
	)
	for _, o := range options {
		key, value, _ := strings.Cut(o, "=")
		switch key {
		case "lowerdir":
			if lower != "" {
				return false, invalid("overlay mount has two lowerdir options")
			}
			lower = value
		case "upperdir":
			writable = true
		case "uidmap", "gidmap":
			return false, invalid("overlay mount has option %q: user namespaces on the host mean nothing to a VM; set snapshotter option remap_ids to false", o)
		}
	}
	want := fmt.Sprintf("{{ overlay %d %d }}", first, first+layers-1)
	if layers == 1 {
		want = fmt.Sprintf("{{ mount %d }}", first)
	}
	if lower != want {
		return false, invalid("overlay mount has lowerdir %q, want %q for its %d layers", lower, want, layers)
	}
	return writable, nil
}

func layerPath(m *types.Mount) (string, error) {
	p := m.Source
	if len(p) > maxPath || !path.IsAbs(p) || path.Clean(p) != p || p == "/" || strings.ContainsRune(p, 0) {
		return "", invalid("erofs layer source %.128q is not an absolute, clean path", p)
	}
	for _, o := range m.Options {
		if strings.HasPrefix(o, optDevice) {
			return "", invalid("erofs layer %q is a merged layer over other devices (%.128q): remove the fsmeta.erofs beside it, containerd 2.4 makes none", p, o)
		}
	}
	return p, nil
}

func mkfsSize(m *types.Mount) (int64, error) {
	for _, o := range m.Options {
		v, ok := strings.CutPrefix(o, optMkfsSize)
		if !ok {
			continue
		}
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil || n < 0 {
			return 0, invalid("mkfs/ext4 mount has option %.128q, want a number of bytes", o)
		}
		return n, nil
	}
	return 0, nil
}

// foreign explains mounts that the erofs snapshotter did not make from image layers.
func foreign(mounts []*types.Mount) error {
	const remedy = `use snapshotter "erofs" (containerd: plugins."io.containerd.cri.v1.images".snapshotter = "erofs", then pull the image again)`
	if len(mounts) == 0 {
		return invalid("root file system has a writable disk and no image layers: %s", remedy)
	}
	switch t := mounts[0].Type; t {
	case "overlay":
		return invalid("root file system is an overlay of host directories (snapshotter overlayfs), which a VM cannot mount: %s", remedy)
	case "bind", "format/mkdir/bind":
		return invalid("root file system is the host directory %.128q (an image without layers, or snapshotter native), which a VM cannot mount: %s", mounts[0].Source, remedy)
	default:
		return invalid("root file system has a mount of type %.64q, which a VM cannot mount: %s", t, remedy)
	}
}

func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}
