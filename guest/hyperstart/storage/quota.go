package storage

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// From linux/fs.h and linux/quota.h; x/sys has neither.
const (
	fsIocFsGetXattr  = 0x801c581f
	fsIocFsSetXattr  = 0x401c5820
	xflagProjInherit = 0x00000200

	qGetQuota = 0x800007
	qSetQuota = 0x800008
	prjQuota  = 2
	// qifBLimits is dqb_valid's bit for the block limits.
	qifBLimits = 1
)

type fsxattr struct {
	xflags, extsize, nextents, projid, cowextsize uint32
	_                                             [8]byte
}

// dqblk is struct if_dqblk: limits in KiB, current space in bytes.
type dqblk struct {
	bhardlimit, bsoftlimit, curspace  uint64
	ihardlimit, isoftlimit, curinodes uint64
	btime, itime                      uint64
	valid                             uint32
	_                                 uint32
}

func (s *Scratch) assign(dir string, project uint32, limit uint64) error {
	f, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("assign project: %w", err)
	}
	defer f.Close()
	var x fsxattr
	if err := ioctl(f, fsIocFsGetXattr, unsafe.Pointer(&x)); err != nil {
		return fmt.Errorf("read project of %s: %w", dir, err)
	}
	x.projid = project
	x.xflags |= xflagProjInherit
	if err := ioctl(f, fsIocFsSetXattr, unsafe.Pointer(&x)); err != nil {
		return fmt.Errorf("assign project %d to %s: %w", project, dir, err)
	}
	if limit == 0 {
		return nil
	}
	return setLimit(dir, project, limit)
}

func setLimit(dir string, project uint32, limit uint64) error {
	f, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("set quota: %w", err)
	}
	defer f.Close()
	kib := (limit + 1023) / 1024
	q := dqblk{bhardlimit: kib, bsoftlimit: kib, valid: qifBLimits}
	if err := quotactl(f, qSetQuota, project, &q); err != nil {
		return fmt.Errorf("set quota of project %d to %d bytes: %w", project, limit, err)
	}
	return nil
}

func (s *Scratch) usage(dir string, project uint32) (Usage, error) {
	f, err := os.Open(dir)
	if err != nil {
		return Usage{}, fmt.Errorf("read quota: %w", err)
	}
	defer f.Close()
	var q dqblk
	if err := quotactl(f, qGetQuota, project, &q); err != nil {
		return Usage{}, fmt.Errorf("read quota of project %d: %w", project, err)
	}
	return Usage{Bytes: q.curspace, Inodes: q.curinodes}, nil
}

func ioctl(f *os.File, req uintptr, arg unsafe.Pointer) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), req, uintptr(arg))
	if errno != 0 {
		return errno
	}
	return nil
}

func quotactl(f *os.File, cmd int, id uint32, q *dqblk) error {
	_, _, errno := unix.Syscall6(unix.SYS_QUOTACTL_FD, f.Fd(), uintptr(cmd<<8|prjQuota),
		uintptr(id), uintptr(unsafe.Pointer(q)), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}
