package disk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"hash/fnv"
	"io"
	"os"
	"strconv"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// The EROFS superblock (linux/fs/erofs/erofs_fs.h): 128 bytes at offset 1024.
const (
	superOffset  = 1024
	superSize    = 128
	erofsMagic   = 0xE0F5E1E2
	featureCRC   = 1 << 0
	minBlockBits = 9
	maxBlockBits = 16
)

const pullAgain = "remove the image (crictl rmi) and pull it again"

func openLayer(path string) (*Layer, error) {
	f, st, err := openRegular(path)
	if err != nil {
		return nil, fmt.Errorf("open layer: %w", err)
	}
	if err := checkEROFS(f, st.Size); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("layer %s: %w", path, err)
	}
	return &Layer{Path: path, Serial: serial(uint64(st.Dev), st.Ino), File: f, Size: st.Size}, nil
}

// openRegular opens without following a link in the last element and without blocking
// on a FIFO or triggering a device.
func openRegular(path string) (*os.File, unix.Stat_t, error) {
	var st unix.Stat_t
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil, st, fmt.Errorf("%s: %w", path, errdefs.ErrNotFound)
	case errors.Is(err, unix.ELOOP):
		return nil, st, invalid("%s is a symbolic link, want a regular file", path)
	case err != nil:
		return nil, st, &os.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	if err := unix.Fstat(fd, &st); err != nil {
		_ = f.Close()
		return nil, st, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		_ = f.Close()
		return nil, st, invalid("%s is not a regular file (mode %#o)", path, st.Mode)
	}
	return f, st, nil
}

// checkEROFS reads the superblock only: the guest's kernel is what parses the rest,
// and it does not trust it either. The check is for people: a half-written layer
// should be named here and not become a mount error inside a VM.
func checkEROFS(r io.ReaderAt, size int64) error {
	var sb [superSize]byte
	if _, err := r.ReadAt(sb[:], superOffset); err != nil {
		if errors.Is(err, io.EOF) {
			return damaged("%d bytes are too few for an EROFS file system", size)
		}
		return fmt.Errorf("read superblock: %w", err)
	}
	if magic := binary.LittleEndian.Uint32(sb[0:]); magic != erofsMagic {
		return damaged("no EROFS file system (magic %#x)", magic)
	}
	bits := sb[12]
	if bits < minBlockBits || bits > maxBlockBits {
		return damaged("EROFS block size 2^%d is impossible", bits)
	}
	if need := int64(binary.LittleEndian.Uint32(sb[36:])) << bits; need > size {
		return damaged("EROFS file system of %d bytes is cut off at %d", need, size)
	}
	if binary.LittleEndian.Uint32(sb[8:])&featureCRC != 0 {
		return checkCRC(r, sb, bits)
	}
	return nil
}

// checkCRC verifies the superblock's checksum, which covers the rest of its block
// with the checksum field as zero.
func checkCRC(r io.ReaderAt, sb [superSize]byte, bits uint8) error {
	want := binary.LittleEndian.Uint32(sb[4:])
	// As the kernel counts: the rest of the first block, or one block if blocks are small.
	length := int64(1) << bits
	if length > superOffset {
		length -= superOffset
	}
	block := make([]byte, length)
	if _, err := r.ReadAt(block, superOffset); err != nil {
		return damaged("superblock's block cannot be read (%v)", err)
	}
	clear(block[4:8])
	// The kernel's crc32c starts at ~0 and is not inverted at the end.
	if got := ^crc32.Checksum(block, crc32.MakeTable(crc32.Castagnoli)); got != want {
		return damaged("EROFS superblock checksum is %#x, want %#x", got, want)
	}
	return nil
}

func damaged(format string, args ...any) error {
	return fmt.Errorf(format+": %s: %w", append(args, pullAgain, errdefs.ErrDataLoss)...)
}

func serial(dev, ino uint64) string {
	h := fnv.New64a()
	var b [16]byte
	binary.LittleEndian.PutUint64(b[:], dev)
	binary.LittleEndian.PutUint64(b[8:], ino)
	_, _ = h.Write(b[:])
	return "l" + strconv.FormatUint(h.Sum64(), 36)
}
