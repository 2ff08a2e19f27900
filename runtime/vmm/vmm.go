// Package vmm is what the shim asks of a virtual machine monitor. One VM is one
// Pod; the shim is its only owner and the VM dies with it.
//
// It owns the description of a VM and its lifecycle. It must not know containers,
// Pods, Kubernetes or the guest's agent: those see only Channel's bytes.
package vmm

import (
	"context"
	"io"
	"os"
	"time"
)

// Config describes a VM before it starts. Paths are the host's; everything in it
// comes from the node's operator or the shim, never from a tenant.
type Config struct {
	// ID names the VM in logs, process titles and cgroups: [a-z0-9-]{1,64}.
	ID string
	// Binary of the VMM, kernel (vmlinux or bzImage) and initramfs.
	Binary, Kernel, Initrd string
	// Cmdline is appended to the kernel command line the VMM needs.
	Cmdline string
	// Machine is the profile: "q35" (default) or "microvm".
	Machine string
	// Accelerator is "kvm" or "tcg"; see qemu.Probe.
	Accelerator string
	// VCPUs at boot (>= 1) and the most that may be plugged later (>= VCPUs).
	VCPUs, MaxVCPUs int
	// MemoryBytes at boot, a multiple of 1 MiB.
	MemoryBytes int64
	// Disks known at boot; later ones by AddDisk.
	Disks []Disk
	// NICs are host taps, opened by the shim; the VMM inherits the descriptors.
	NICs []NIC
	// UID and GID the VMM runs as; 0 keeps the shim's (tests only).
	UID, GID int
	// Hold are descriptors the VMM inherits for nothing but keeping them open: locks that
	// shall last as long as it lives. The caller closes its own.
	Hold []*os.File
	// Cgroups are absolute paths of existing cgroup directories (one, or one per v1
	// hierarchy) the VMM enters before it executes.
	Cgroups []string
	// Console receives what the guest prints on its serial console. The VMM never
	// blocks on it: the implementation drops what the writer cannot take.
	Console io.Writer
}

// Disk is a raw image or block device opened by the shim; the VMM gets the
// descriptor and never a path, so it needs nothing of the node's file system.
type Disk struct {
	// Serial identifies the disk in the guest (SCSI unit serial): [a-zA-Z0-9_-]{1,20}.
	Serial string
	// File is the open image; a read-only disk must be opened O_RDONLY, one that bypasses
	// the host's page cache with O_DIRECT. The VMM duplicates it; the caller closes its own.
	File *os.File
	// NBD, instead of File, is where the disk is served; at boot only.
	NBD      *NBD
	ReadOnly bool
	// Discard lets the guest punch holes (scratch disks).
	Discard bool
	// Ephemeral content ends with the VM: the guest's flushes need not reach the disk.
	Ephemeral bool
	// Persistent content outlives the VM: the guest hears of every error, and zeroes it
	// writes need no space. Such a disk is there at boot and stays, and what bounds it may
	// change.
	Persistent bool
	// Shared lets others write the disk at the same time.
	Shared bool
	// Throttle bounds a disk known at boot; nil for none.
	Throttle *Throttle
}

// NBD is a disk behind an NBD server (github.com/NetworkBlockDevice/nbd, doc/proto.md).
type NBD struct {
	// Conn is a connected socket that has not been read or written yet.
	Conn *os.File
	// Export is the disk's name there.
	Export string
}

// Throttle bounds I/O a second; 0 is no bound. All and reads or writes exclude each other.
type Throttle struct {
	IOPS, ReadIOPS, WriteIOPS    int64
	Bytes, ReadBytes, WriteBytes int64
}

// NIC is one network interface of the guest.
type NIC struct {
	// Tap is an open /dev/net/tun queue attached to the host tap.
	Tap *os.File
	// MAC the guest's interface has, in colon notation.
	MAC string
}

// Exit tells how a VM ended.
type Exit struct {
	At time.Time
	// Reason is one of the Reason constants; Detail is a line for people.
	Reason string
	Detail string
}

// Reasons of an Exit.
const (
	ReasonShutdown = "shutdown" // the guest powered off
	ReasonPanic    = "panic"    // the guest kernel panicked (or its PID 1 died)
	ReasonKilled   = "killed"   // Kill was called, or somebody else's signal
	ReasonFailed   = "failed"   // the VMM could not go on
)

// VMM starts virtual machines.
type VMM interface {
	// Start starts the VM and returns once the VMM accepts commands, not when the
	// guest has booted. ctx bounds starting only. On error nothing is left behind.
	Start(ctx context.Context, cfg Config) (VM, error)
}

// VM is a running virtual machine. Its methods may be called concurrently.
type VM interface {
	// PID of the VMM's process.
	PID() int
	// Channel is the guest channel's host end; there is one, valid until the VM exits.
	Channel() io.ReadWriteCloser
	// AddDisk hot-plugs a disk; the guest finds it by serial. RemoveDisk is its
	// inverse and succeeds for a disk that is not there.
	AddDisk(ctx context.Context, d Disk) error
	RemoveDisk(ctx context.Context, serial string) error
	// GrowDisk has the guest see that the disk has bytes now, which its file or device
	// has already; nbd is a new connection to a disk that is served, nil for others.
	GrowDisk(ctx context.Context, serial string, bytes int64, nbd *NBD) error
	// ThrottleDisk bounds a persistent disk from now on.
	ThrottleDisk(ctx context.Context, serial string, t Throttle) error
	// Faults counts the errors the guest was told of when it used a persistent disk.
	Faults(serial string) int
	// Pause and Resume stop and continue the virtual CPUs.
	Pause(ctx context.Context) error
	Resume(ctx context.Context) error
	// Kill ends the VMM at once. It is idempotent; Wait tells when it is gone.
	Kill() error
	// Done is closed after the VMM's process has been reaped; then Exit is valid.
	Done() <-chan struct{}
	Exit() Exit
}
