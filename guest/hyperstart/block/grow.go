package block

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/guest/hyperstart/uevent"
)

// From linux/ext4.h and xfs_fs.h; x/sys has none of them.
const (
	ext4IocResizeFS   = 0x40086610 // _IOW('f', 16, __u64)
	xfsIocFSGeometry1 = 0x80705864 // _IOR('X', 100, struct xfs_fsop_geom_v1)
	xfsIocFSGrowData  = 0x4010586e // _IOW('X', 110, struct xfs_growfs_data)
)

type xfsGeometry1 struct {
	blocksize, rtextsize, agblocks, agcount, logblocks, sectsize, inodesize, imaxpct uint32
	datablocks                                                                       uint64
	_                                                                                [72]byte
}

type xfsGrowData struct {
	newblocks uint64
	imaxpct   uint32
	_         uint32
}

// Grow makes the file system as large as its disk, mounted as it is, and returns the
// size of the disk. One that is as large already is left alone.
func (m *Mounted) Grow() (int64, error) {
	size, err := Size(m.device)
	if err != nil {
		return 0, fmt.Errorf("grow: %w", err)
	}
	if m.spec.ReadOnly {
		return size, nil
	}
	f, err := os.Open(m.target)
	if err != nil {
		return 0, fmt.Errorf("grow: %w", err)
	}
	defer f.Close()
	if m.spec.Type == "xfs" {
		err = growXFS(f, size)
	} else {
		err = growExt(f, m.device, size)
	}
	if err != nil {
		return 0, fmt.Errorf("grow %s file system of disk %s to %d bytes: %w", m.spec.Type, m.spec.Serial, size, err)
	}
	return size, nil
}

func growExt(root *os.File, dev string, size int64) error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(root.Fd()), &st); err != nil {
		return err
	}
	have, err := extBlocks(dev)
	if err != nil {
		return err
	}
	want := uint64(size) / uint64(st.Bsize)
	if want <= have {
		return nil
	}
	return ioctl(root, ext4IocResizeFS, unsafe.Pointer(&want))
}

// extBlocks reads a file system's size from its superblock, which statfs tells less its
// own structures; the kernel keeps it in the page cache of the disk.
func extBlocks(dev string) (uint64, error) {
	f, err := os.Open(dev)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	head := make([]byte, superblock+superLen)
	if err := readAt(f, head, 0); err != nil {
		return 0, err
	}
	s, ok := parseExt(head)
	if !ok {
		return 0, fmt.Errorf("no superblock: %w", errdefs.ErrInternal)
	}
	return s.blocks, nil
}

func growXFS(root *os.File, size int64) error {
	var g xfsGeometry1
	if err := ioctl(root, xfsIocFSGeometry1, unsafe.Pointer(&g)); err != nil {
		return err
	}
	if g.blocksize == 0 {
		return fmt.Errorf("block size 0: %w", errdefs.ErrInternal)
	}
	want := uint64(size) / uint64(g.blocksize)
	// An allocation group has 64 blocks at least: the kernel refuses a smaller rest.
	if g.agblocks != 0 && want%uint64(g.agblocks) < 64 {
		want -= want % uint64(g.agblocks)
	}
	if want <= g.datablocks {
		return nil
	}
	return ioctl(root, xfsIocFSGrowData, unsafe.Pointer(&xfsGrowData{newblocks: want, imaxpct: g.imaxpct}))
}

func ioctl(f *os.File, req uintptr, arg unsafe.Pointer) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), req, uintptr(arg))
	if errno != 0 {
		return errno
	}
	return nil
}

// AwaitSize returns once the guest sees the disk with at least that many bytes.
func AwaitSize(ctx context.Context, dev string, bytes uint64) (int64, error) {
	var size int64
	err := uevent.Wait(ctx, func() (bool, error) {
		var err error
		size, err = Size(dev)
		if err != nil || uint64(size) >= bytes {
			return err == nil, err
		}
		// The device tells of a change by itself; asking again is for one that did not.
		_ = os.WriteFile(filepath.Join("/sys/block", filepath.Base(dev), "device/rescan"), []byte("1"), 0)
		size, err = Size(dev)
		return err == nil && uint64(size) >= bytes, err
	})
	if err != nil {
		return 0, fmt.Errorf("disk has %d bytes, not yet %d: %w: %w", size, bytes, errdefs.ErrUnavailable, err)
	}
	return size, nil
}

// freeInterval is how often a disk that is still busy is looked at: nothing tells.
const freeInterval = 20 * time.Millisecond

// free waits until the kernel has let go of the disk, and writes back what it had of it.
// An unmount in one namespace says nothing of others, and theirs end behind their
// processes.
func (m *Mounted) free(ctx context.Context) error {
	tick := time.NewTicker(freeInterval)
	defer tick.Stop()
	for {
		f, err := open(m.device, m.spec.ReadOnly)
		if err == nil {
			defer f.Close()
			if m.spec.ReadOnly {
				return nil
			}
			return f.Sync()
		}
		if !errdefs.IsFailedPrecondition(err) || errors.Is(err, unix.EROFS) {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("disk %s is still mounted somewhere: %w", m.spec.Serial, ctx.Err())
		}
	}
}
