package block

import (
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"
)

// maxOptions bounds what one mount asks for; the kernel takes one page.
const maxOptions = 64

// flagOptions are the options any file system knows, with the bits they set and clear.
var flagOptions = map[string]struct{ set, clear uintptr }{
	"defaults": {}, "rw": {}, "ro": {set: unix.MS_RDONLY}, "async": {clear: unix.MS_SYNCHRONOUS}, "sync": {set: unix.MS_SYNCHRONOUS},
	"dirsync": {set: unix.MS_DIRSYNC}, "atime": {clear: unix.MS_NOATIME}, "noatime": {set: unix.MS_NOATIME},
	"diratime": {clear: unix.MS_NODIRATIME}, "nodiratime": {set: unix.MS_NODIRATIME}, "relatime": {set: unix.MS_RELATIME},
	"norelatime": {clear: unix.MS_RELATIME}, "strictatime": {set: unix.MS_STRICTATIME}, "lazytime": {set: unix.MS_LAZYTIME},
	"nolazytime": {clear: unix.MS_LAZYTIME}, "suid": {clear: unix.MS_NOSUID}, "nosuid": {set: unix.MS_NOSUID},
	"dev": {clear: unix.MS_NODEV}, "nodev": {set: unix.MS_NODEV}, "exec": {clear: unix.MS_NOEXEC}, "noexec": {set: unix.MS_NOEXEC},
}

// domain tells which values an option takes.
type domain func(value string) bool

func oneOf(words ...string) domain {
	return func(v string) bool { return slices.Contains(words, v) }
}

// dataOptions are those of one file system; a name that ends in "=" takes a value.
var dataOptions = map[string]map[string]domain{
	"ext4": {
		"acl": nil, "noacl": nil, "user_xattr": nil, "nouser_xattr": nil, "discard": nil, "nodiscard": nil, "barrier": nil, "nobarrier": nil,
		"barrier=": oneOf("0", "1"), "data=": oneOf("ordered", "journal", "writeback"), "errors=": oneOf("remount-ro", "continue", "panic"),
		"data_err=": oneOf("abort", "ignore"), "commit=": number, "stripe=": number, "max_batch_time=": number, "min_batch_time=": number,
		"inode_readahead_blks=": number, "init_itable": nil, "init_itable=": number, "noinit_itable": nil, "delalloc": nil, "nodelalloc": nil,
		"auto_da_alloc": nil, "noauto_da_alloc": nil, "dioread_lock": nil, "dioread_nolock": nil, "journal_checksum": nil,
		"nojournal_checksum": nil, "journal_async_commit": nil, "block_validity": nil, "noblock_validity": nil, "grpid": nil, "nogrpid": nil,
		"noload": nil, "norecovery": nil, "i_version": nil,
	},
	"xfs": {
		"discard": nil, "nodiscard": nil, "inode64": nil, "inode32": nil, "largeio": nil, "nolargeio": nil, "swalloc": nil, "noalign": nil,
		"nouuid": nil, "norecovery": nil, "grpid": nil, "nogrpid": nil, "wsync": nil, "filestreams": nil, "attr2": nil, "noquota": nil,
		"logbufs=": number, "logbsize=": number, "allocsize=": number, "sunit=": number, "swidth=": number,
	},
}

// mountOptions splits options into mount(2)'s flags and the file system's own text.
// Only known ones pass: some name other devices or files of the guest.
func mountOptions(fsType string, options []string, readOnly bool) (uintptr, string, error) {
	if len(options) > maxOptions {
		return 0, "", fmt.Errorf("%d mount options: at most %d: %w", len(options), maxOptions, errdefs.ErrInvalidArgument)
	}
	var flags uintptr
	var data []string
	for _, o := range options {
		if f, ok := flagOptions[o]; ok {
			flags = flags&^f.clear | f.set
			continue
		}
		if err := checkData(fsType, o); err != nil {
			return 0, "", err
		}
		data = append(data, o)
	}
	unreplayed := slices.Contains(data, "noload") || slices.Contains(data, "norecovery")
	switch {
	case readOnly:
		flags |= unix.MS_RDONLY
	case flags&unix.MS_RDONLY != 0:
		return 0, "", fmt.Errorf("mount option ro of a writable volume; remedy: readOnly: true: %w", errdefs.ErrInvalidArgument)
	case unreplayed:
		return 0, "", fmt.Errorf("mount options noload and norecovery are for read-only volumes: %w", errdefs.ErrInvalidArgument)
	}
	// The default of a file system made elsewhere may be to go on.
	if fsType == "ext4" && !slices.ContainsFunc(data, func(o string) bool { return strings.HasPrefix(o, "errors=") }) {
		data = append(data, "errors=remount-ro")
	}
	return flags, strings.Join(data, ","), nil
}

// Restrictions are the options that each mount of the file system must have anew: the
// container runtime mounts it again, and these are a mount's and not the file system's.
func (s Spec) Restrictions() []string {
	flags, _, err := mountOptions(s.Type, s.Options, s.ReadOnly)
	if err != nil {
		return nil
	}
	var out []string
	for _, o := range []string{"nosuid", "nodev", "noexec"} {
		if flags&flagOptions[o].set != 0 {
			out = append(out, o)
		}
	}
	return out
}

func checkData(fsType, option string) error {
	name, value, assigned := strings.Cut(option, "=")
	if assigned {
		name += "="
	}
	takes, ok := dataOptions[fsType][name]
	switch {
	case !ok:
		return fmt.Errorf("mount option %.80q is not allowed for %s: %w", option, fsType, errdefs.ErrInvalidArgument)
	case assigned && !takes(value):
		return fmt.Errorf("mount option %.80q: bad value: %w", option, errdefs.ErrInvalidArgument)
	}
	return nil
}

// number takes digits and one of the units file systems know.
func number(s string) bool {
	digits := strings.TrimRight(s, "kmgKMG")
	return len(s) <= 20 && digits != "" && len(s)-len(digits) <= 1 && strings.Trim(digits, "0123456789") == ""
}
