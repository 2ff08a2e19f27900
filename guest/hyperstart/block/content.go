package block

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"math"
	"math/bits"
	"os"
)

// inspectBytes are read to tell what a disk holds. The farthest signature is that of
// btrfs.
const inspectBytes = 128 << 10

// content is what a disk holds, by its first bytes.
type content struct {
	// kind is "ext4" (ext2 and ext3 are mounted as that, too), "xfs" or in words what
	// else it is; "" if nothing is known.
	kind string
	// bytes the file system is large, by its own account.
	bytes uint64
	// unmountable is why a file system of the kind cannot be mounted, "" if it can.
	unmountable string
	// clean: it was unmounted and asks for no check.
	clean bool
	// marked: it was blank when a formatting began.
	marked bool
	// unfinished: a formatting was interrupted, and nobody has mounted it.
	unfinished bool
}

func inspect(f *os.File) (content, error) {
	size, err := sizeOf(f)
	if err != nil {
		return content{}, err
	}
	head := make([]byte, min(size, inspectBytes))
	err = readAt(f, head, 0)
	there := false
	if err == nil {
		there, err = marked(f, size)
	}
	if err != nil {
		return content{}, fmt.Errorf("cannot be read, so what it holds is not known: %w", err)
	}
	c := identify(head, there)
	if c.bytes > uint64(size) && !c.unfinished {
		c.unmountable = fmt.Sprintf("it has %d bytes and the disk %d: the disk was cut short, or it is another one", c.bytes, size)
	}
	return c, nil
}

// signature is what tells a kind of content.
type signature struct {
	at         int
	text, name string
}

// layers are what lies below file systems. A disk that has one of these and the
// superblock of a file system is ambiguous: one of both is a remainder.
var layers = []signature{
	{0, "LUKS\xba\xbe", "a LUKS encrypted disk"},
	{16384, "SKUL\xba\xbe", "a LUKS encrypted disk"},
	{512, "LABELONE", "an LVM physical volume"}, {0, "LABELONE", "an LVM physical volume"},
	{1024, "LABELONE", "an LVM physical volume"}, {1536, "LABELONE", "an LVM physical volume"},
	{4096, "\xfc\x4e\x2b\xa9", "a member of a software RAID"}, {0, "\xfc\x4e\x2b\xa9", "a member of a software RAID"},
	{512, "EFI PART", "a GPT partition table"}, {4096, "EFI PART", "a GPT partition table"},
}

// others are looked for in this order: boot sectors' mark is in file systems that can be
// booted from, too.
var others = []signature{
	{65600, "_BHRfS_M", "btrfs"}, {4086, "SWAPSPACE2", "swap space"}, {4086, "SWAP-SPACE", "swap space"},
	{1024, "\xe2\xe1\xf5\xe0", "erofs"}, {1024, "\x10\x20\xf5\xf2", "f2fs"}, {0, "hsqs", "squashfs"},
	{32769, "CD001", "an ISO 9660 image"}, {3, "NTFS    ", "NTFS"}, {3, "EXFAT   ", "exFAT"}, {3, "-FVE-FS-", "a BitLocker encrypted disk"},
	{82, "FAT32", "FAT"}, {54, "FAT1", "FAT"},
	{0, "QFI\xfb", "a qcow2 image"}, {0, "KDMV", "a VMDK image"}, {0, "conectix", "a VHD image"}, {0, "vhdxfile", "a VHDX image"},
	{65536, "\x01\x16\x19\x70", "GFS2"}, {65588, "ReIsEr", "ReiserFS"}, {32768, "JFS1", "JFS"},
	{4120, "\xc6\x85\x73\xf6", "a bcache device"}, {510, "\x55\xaa", "a partition table or boot sector"},
}

// identify tells what a disk with that head, and the mark perhaps, holds.
func identify(head []byte, marked bool) content {
	c := content{marked: marked}
	if s, ok := parseExt(head); ok {
		s.judge(&c)
	} else if has(head, 0, []byte("XFSB")) {
		c.kind = "xfs"
		if len(head) > 126 {
			c.unfinished = head[126] != 0
			c.bytes = product(binary.BigEndian.Uint64(head[8:]), uint64(binary.BigEndian.Uint32(head[4:])))
		}
	}
	layer := find(head, layers)
	if has(head, 0, []byte("XFSB")) && c.kind == "ext4" {
		layer = "xfs"
	}
	switch {
	case c.kind == "":
		c.kind = cmp.Or(layer, find(head, others))
	case layer != "":
		return content{kind: "both " + c.kind + " and " + layer}
	}
	return c
}

func find(head []byte, list []signature) string {
	for _, s := range list {
		if has(head, s.at, []byte(s.text)) {
			return s.name
		}
	}
	return ""
}

func has(b []byte, at int, text []byte) bool {
	return at+len(text) <= len(b) && bytes.Equal(b[at:at+len(text)], text)
}

// ext is what matters here of an ext2/3/4 superblock.
type ext struct {
	state, mounts, maxMounts        uint16
	mounted, interval, orphan       uint32
	incompat, roCompat, errs, shift uint32
	blocks                          uint64
}

const (
	extIncompatRecover   = 0x4
	extIncompatJournal   = 0x8
	extIncompat64Bit     = 0x80
	extRoOrphanPresent   = 0x10000
	extStateValid        = 1
	superblock, superLen = 1024, 1024
)

func parseExt(head []byte) (ext, bool) {
	if len(head) < superblock+superLen {
		return ext{}, false
	}
	b := head[superblock : superblock+superLen]
	u16, u32 := binary.LittleEndian.Uint16, binary.LittleEndian.Uint32
	if u16(b[0x38:]) != 0xef53 {
		return ext{}, false
	}
	s := ext{
		state: u16(b[0x3a:]), mounts: u16(b[0x34:]), maxMounts: u16(b[0x36:]), mounted: u32(b[0x2c:]), interval: u32(b[0x44:]),
		incompat: u32(b[0x60:]), roCompat: u32(b[0x64:]), orphan: u32(b[0xe8:]), errs: u32(b[0x194:]), shift: u32(b[0x18:]),
		blocks: uint64(u32(b[0x4:])),
	}
	if s.incompat&extIncompat64Bit != 0 {
		s.blocks |= uint64(u32(b[0x150:])) << 32
	}
	return s, true
}

func (s ext) judge(c *content) {
	c.kind = "ext4"
	c.bytes = product(s.blocks, 1024<<min(s.shift, 32))
	if s.incompat&extIncompatJournal != 0 {
		c.unmountable = "it is only the journal of another one"
	}
	// Without a journal every unclean end is in the state; a limit of mounts or days
	// (mostly off) is e2fsck's to look at.
	c.clean = s.state == extStateValid && s.incompat&extIncompatRecover == 0 && s.roCompat&extRoOrphanPresent == 0 &&
		s.orphan == 0 && s.errs == 0 && int16(s.maxMounts) <= 0 && s.interval == 0
	c.unfinished = c.marked && s.mounts == 0 && s.mounted == 0
}

// product is a times b, or the largest number.
func product(a, b uint64) uint64 {
	hi, lo := bits.Mul64(a, b)
	if hi != 0 {
		return math.MaxUint64
	}
	return lo
}
