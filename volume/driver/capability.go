package driver

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/volume/record"
)

const (
	// maxID bounds names and handles, as CSI does, in bytes.
	maxID = 128
	// maxMap bounds a request's map, as CSI does, in bytes.
	maxMap = 4 << 10
	// maxFlags bounds how many mount options one volume has.
	maxFlags = 32
)

// bad is an error for a field of a request: what it is, and what to do.
func bad(field string, value any, remedy string, class error) error {
	return fmt.Errorf("%s %.200q: %s: %w", field, fmt.Sprint(value), remedy, class)
}

// required checks a name or handle that must be there.
func required(field, value string) error {
	if value == "" {
		return fmt.Errorf("%s is missing: set it: %w", field, errdefs.ErrInvalidArgument)
	}
	if len(value) > maxID {
		return bad(field, value, fmt.Sprintf("has %d bytes, %d are allowed", len(value), maxID), errdefs.ErrInvalidArgument)
	}
	return nil
}

// handle checks an ID of a volume or snapshot. One that no backend would give is what is
// not found: known tells.
func handle(field, value string) (known bool, err error) {
	if value == "" {
		return false, required(field, value)
	}
	if len(value) > maxID {
		return false, nil
	}
	for _, r := range value {
		if !unicode.IsPrint(r) || r == unicode.ReplacementChar {
			return false, nil
		}
	}
	return true, nil
}

func checkMap(field string, m map[string]string) error {
	n := 0
	for k, v := range m {
		n += len(k) + len(v)
	}
	if n > maxMap {
		return bad(field, fmt.Sprintf("%d entries", len(m)), fmt.Sprintf("has %d bytes, %d are allowed", n, maxMap), errdefs.ErrInvalidArgument)
	}
	return nil
}

// use is how a volume is wanted, out of a capability.
type use struct {
	mode     string // record.Filesystem or record.Block
	fsType   string // "" is what the volume has
	flags    []string
	group    *uint32
	readOnly bool
	// one: by a single Pod at a time (SINGLE_NODE_SINGLE_WRITER).
	one bool
	// nodes: by several nodes at a time.
	nodes bool
}

// rules is what a driver allows.
type rules struct {
	driver string
	// fsTypes that the guest mounts, the default first.
	fsTypes []string
	// multiNode: a volume may be attached to several nodes.
	multiNode bool
}

// DefaultFSTypes are the file systems that guests mount, the default first. A guest whose
// kernel lacks one says so.
var DefaultFSTypes = []string{"ext4", "xfs"}

// read checks a capability and reads it.
func (r rules) read(c *csi.VolumeCapability) (use, error) {
	var u use
	if c == nil {
		return u, fmt.Errorf("volume_capability is missing: set it: %w", errdefs.ErrInvalidArgument)
	}
	switch t := c.GetAccessType().(type) {
	case *csi.VolumeCapability_Block:
		u.mode = record.Block
	case *csi.VolumeCapability_Mount:
		u.mode = record.Filesystem
		if err := r.mount(&u, t.Mount); err != nil {
			return u, err
		}
	default:
		return u, fmt.Errorf("volume_capability.access_type is missing: set mount or block: %w", errdefs.ErrInvalidArgument)
	}
	const field = "volume_capability.access_mode"
	mode := c.GetAccessMode().GetMode()
	switch mode {
	case csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER, csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER:
	case csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER:
		u.one = true
	case csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY:
		u.readOnly = true
	case csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY:
		u.readOnly, u.nodes = true, true
	case csi.VolumeCapability_AccessMode_MULTI_NODE_SINGLE_WRITER, csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER:
		u.nodes = true
		if u.mode != record.Block {
			return u, bad(field, mode, "a file system cannot be written by several VMs at a time: use ReadWriteOnce or ReadWriteOncePod, or volumeMode: Block", errdefs.ErrInvalidArgument)
		}
	default:
		return u, bad(field, mode, "is none that this driver knows: use ReadWriteOnce, ReadWriteOncePod or ReadOnlyMany", errdefs.ErrInvalidArgument)
	}
	if u.nodes && !r.multiNode {
		return u, bad(field, mode, "a volume of driver "+r.driver+" is on one node: use ReadWriteOnce or ReadWriteOncePod", errdefs.ErrInvalidArgument)
	}
	return u, nil
}

func (r rules) mount(u *use, m *csi.VolumeCapability_MountVolume) error {
	u.fsType = m.GetFsType()
	if u.fsType != "" && !slices.Contains(r.fsTypes, u.fsType) {
		return bad("fsType", u.fsType, "the Pod's VM mounts "+strings.Join(r.fsTypes, " and ")+": use that, or leave it out", errdefs.ErrInvalidArgument)
	}
	if len(m.GetMountFlags()) > maxFlags {
		return bad("mountOptions", fmt.Sprintf("%d options", len(m.GetMountFlags())), fmt.Sprintf("%d are allowed", maxFlags), errdefs.ErrInvalidArgument)
	}
	for _, f := range m.GetMountFlags() {
		// A PV's mountOptions may hold several in one entry.
		for o := range strings.SplitSeq(f, ",") {
			switch {
			case o == "rw", o == "defaults":
			case o == "ro":
				u.readOnly = true
			case mountOption.MatchString(o):
				u.flags = append(u.flags, o)
			default:
				return bad("mountOptions", o, "is none that the Pod's VM takes: leave it out (see docs/storage.md for those it does)", errdefs.ErrInvalidArgument)
			}
		}
	}
	slices.Sort(u.flags)
	u.flags = slices.Compact(u.flags)
	if g := m.GetVolumeMountGroup(); g != "" {
		n, err := strconv.ParseUint(g, 10, 32)
		if err != nil || n == 1<<32-1 {
			return bad("volume_mount_group", g, "must be a group's number", errdefs.ErrInvalidArgument)
		}
		group := uint32(n)
		u.group = &group
	}
	return nil
}

// mountOption is what passes to the guest, whose own list (guest/hyperstart/block) is the
// last word: options that name other devices, files or namespaces are in neither.
var mountOption = regexp.MustCompile(`^(` + strings.Join([]string{
	`a?sync`, `dirsync`, `(no)?(atime|diratime|relatime|lazytime)`, `strictatime`, `(no)?(suid|dev|exec)`,
	`(no)?(acl|user_xattr|discard|barrier|delalloc|auto_da_alloc|journal_checksum|block_validity|grpid)`, `barrier=[01]`, `data=(ordered|journal|writeback)`,
	`errors=(remount-ro|continue|panic)`, `(commit|stripe|max_batch_time|min_batch_time|inode_readahead_blks|init_itable|allocsize|logbufs|logbsize)=[0-9]{1,12}[kmgKMG]?`,
	`(no)?init_itable`, `dioread_(no)?lock`, `journal_async_commit`, `noload`, `norecovery`, `i_version`, `data_err=(abort|ignore)`,
	`inode(32|64)`, `(no)?largeio`, `swalloc`, `noalign`, `nouuid`, `wsync`, `filestreams`,
}, "|") + `)$`)

// size reads a capacity range; 0 is what was not asked for.
func size(r *csi.CapacityRange) (least, most int64, err error) {
	least, most = r.GetRequiredBytes(), r.GetLimitBytes()
	switch {
	case least < 0:
		return 0, 0, bad("capacity_range.required_bytes", least, "must not be negative", errdefs.ErrInvalidArgument)
	case most < 0:
		return 0, 0, bad("capacity_range.limit_bytes", most, "must not be negative", errdefs.ErrInvalidArgument)
	case most != 0 && least > most:
		return 0, 0, bad("capacity_range.required_bytes", least, fmt.Sprintf("is over limit_bytes %d: ask for less or allow more", most), errdefs.ErrInvalidArgument)
	}
	return least, most, nil
}
