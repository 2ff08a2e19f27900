package launch

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// refused are system calls that fail with EPERM: what makes processes, changes mounts,
// namespaces and the kernel, or looks at other processes.
var refused = []uint32{
	unix.SYS_FORK, unix.SYS_VFORK, unix.SYS_PTRACE, unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV, unix.SYS_KCMP,
	unix.SYS_PIDFD_GETFD, unix.SYS_UNSHARE, unix.SYS_SETNS, unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_PIVOT_ROOT, unix.SYS_CHROOT,
	unix.SYS_OPEN_TREE, unix.SYS_MOVE_MOUNT, unix.SYS_FSOPEN, unix.SYS_FSCONFIG, unix.SYS_FSMOUNT, unix.SYS_FSPICK, unix.SYS_MOUNT_SETATTR,
	unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_DELETE_MODULE, unix.SYS_KEXEC_LOAD, unix.SYS_KEXEC_FILE_LOAD, unix.SYS_REBOOT,
	unix.SYS_BPF, unix.SYS_PERF_EVENT_OPEN, unix.SYS_USERFAULTFD, unix.SYS_OPEN_BY_HANDLE_AT, unix.SYS_NAME_TO_HANDLE_AT,
	unix.SYS_ADD_KEY, unix.SYS_REQUEST_KEY, unix.SYS_KEYCTL, unix.SYS_SWAPON, unix.SYS_SWAPOFF, unix.SYS_ACCT, unix.SYS_QUOTACTL,
	unix.SYS_SETTIMEOFDAY, unix.SYS_CLOCK_SETTIME, unix.SYS_ADJTIMEX, unix.SYS_CLOCK_ADJTIME, unix.SYS_SETHOSTNAME, unix.SYS_SETDOMAINNAME,
	unix.SYS_IOPERM, unix.SYS_IOPL, unix.SYS_SYSLOG, unix.SYS_PERSONALITY, unix.SYS_MKNOD, unix.SYS_MKNODAT, unix.SYS_IO_URING_SETUP,
}

// families are the sockets a program may make.
var families = []uint32{unix.AF_UNIX, unix.AF_INET, unix.AF_INET6, unix.AF_NETLINK}

// Offsets in struct seccomp_data (linux/seccomp.h).
const (
	dataNR   = 0
	dataArch = 4
	dataArg0 = 16
)

// x32 system calls have this bit and would pass for others.
const x32 = 0x40000000

// program is the filter as classic BPF.
func program() []unix.SockFilter {
	load := func(offset uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset}
	}
	jump := func(test uint16, k uint32, yes, no uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | test | unix.BPF_K, K: k, Jt: yes, Jf: no}
	}
	answer := func(k uint32) unix.SockFilter { return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: k} }
	fail := func(errno uint32) unix.SockFilter { return answer(unix.SECCOMP_RET_ERRNO | errno) }
	p := []unix.SockFilter{
		load(dataArch), jump(unix.BPF_JEQ, unix.AUDIT_ARCH_X86_64, 1, 0), answer(unix.SECCOMP_RET_KILL_PROCESS),
		load(dataNR), jump(unix.BPF_JGE, x32, 0, 1), answer(unix.SECCOMP_RET_KILL_PROCESS),
	}
	for _, nr := range refused {
		p = append(p, jump(unix.BPF_JEQ, nr, 0, 1), fail(uint32(unix.EPERM)))
	}
	// The C library falls back to clone, whose flags can be looked at.
	p = append(p, jump(unix.BPF_JEQ, unix.SYS_CLONE3, 0, 1), fail(uint32(unix.ENOSYS)))
	p = append(p, jump(unix.BPF_JEQ, unix.SYS_CLONE, 0, 4), load(dataArg0), jump(unix.BPF_JSET, unix.CLONE_THREAD, 1, 0), fail(uint32(unix.EPERM)), answer(unix.SECCOMP_RET_ALLOW))
	p = append(p, jump(unix.BPF_JEQ, unix.SYS_SOCKET, 1, 0), answer(unix.SECCOMP_RET_ALLOW), load(dataArg0))
	for i, f := range families {
		p = append(p, jump(unix.BPF_JEQ, f, uint8(len(families)-i), 0))
	}
	return append(p, fail(uint32(unix.EAFNOSUPPORT)), answer(unix.SECCOMP_RET_ALLOW))
}

// filter installs the program for the calling thread and what it becomes; no_new_privs
// is set.
func filter() error {
	p := program()
	f := unix.SockFprog{Len: uint16(len(p)), Filter: &p[0]}
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&f))); errno != 0 {
		return fmt.Errorf("system call filter: %w", errno)
	}
	return nil
}
