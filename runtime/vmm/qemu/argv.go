package qemu

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"regexp"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/guest/channel"
	"github.com/hypernetes/hypernetes/runtime/vmm"
)

const (
	// MinMemory is the least guest RAM a VM starts with, in bytes: with 64 MiB
	// HyperKernel does not get to PID 1. Debian's kernel needs 112 MiB.
	MinMemory = 80 << 20
	// maxDisks bounds a VM's disks: far over any Pod's, within virtio-scsi's LUNs.
	maxDisks = 1024
	maxVCPUs = 32
)

var (
	idPattern     = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,63}$`)
	serialPattern = regexp.MustCompile(`^[a-zA-Z0-9_-]{1,20}$`)
)

// inherited are the descriptor numbers QEMU finds its connections at.
type inherited struct {
	qmp, channel, console int
	// vhost has a vhost-net descriptor for each of taps, or none.
	taps, vhost, disks []int
}

// validate refuses what QEMU would refuse later and less clearly.
func validate(c vmm.Config) error {
	bad := func(field string, value any, remedy string) error {
		return fmt.Errorf("vm %s: %s %v: %w: %s", c.ID, field, value, errdefs.ErrInvalidArgument, remedy)
	}
	switch {
	case !idPattern.MatchString(c.ID):
		return bad("id", strconv.Quote(c.ID), "1 to 64 of a-z, 0-9 and -")
	case c.MemoryBytes < MinMemory:
		return bad("memory", c.MemoryBytes, fmt.Sprintf("a VM needs at least %d MiB: raise the Pod's memory limit or default_memory_mib in hyper.toml", MinMemory>>20))
	case c.MemoryBytes%(1<<20) != 0:
		return bad("memory", c.MemoryBytes, "must be whole MiB")
	case c.VCPUs < 1 || c.MaxVCPUs < c.VCPUs || c.MaxVCPUs > maxVCPUs:
		return bad("vcpus", fmt.Sprintf("%d of at most %d", c.VCPUs, c.MaxVCPUs), fmt.Sprintf("1 to %d", maxVCPUs))
	case c.Machine != "" && c.Machine != "q35" && c.Machine != "microvm":
		return bad("machine", c.Machine, "q35 or microvm")
	case c.Accelerator != "kvm" && c.Accelerator != "tcg":
		return bad("accelerator", strconv.Quote(c.Accelerator), "kvm or tcg (see Probe)")
	case strings.ContainsAny(c.Cmdline, "\x00\n"):
		return bad("cmdline", strconv.Quote(c.Cmdline), "must be one line")
	case len(c.Disks) > maxDisks:
		return bad("disks", len(c.Disks), fmt.Sprintf("at most %d", maxDisks))
	}
	seen := map[string]bool{}
	for _, d := range c.Disks {
		if err := validateDisk(d); err != nil {
			return fmt.Errorf("vm %s: %w", c.ID, err)
		}
		if seen[d.Serial] {
			return bad("disk serial", d.Serial, "is there twice")
		}
		seen[d.Serial] = true
	}
	for i, n := range c.NICs {
		if _, err := net.ParseMAC(n.MAC); err != nil {
			return bad(fmt.Sprintf("nic %d mac", i), strconv.Quote(n.MAC), "colon notation")
		}
		if n.Tap == nil {
			return bad(fmt.Sprintf("nic %d tap", i), "nil", "must be an open tap")
		}
	}
	return nil
}

func validateDisk(d vmm.Disk) error {
	if !serialPattern.MatchString(d.Serial) {
		return fmt.Errorf("disk serial %q: %w: 1 to 20 of a-z, A-Z, 0-9, _ and -", d.Serial, errdefs.ErrInvalidArgument)
	}
	if (d.File == nil) == (d.NBD == nil) {
		return fmt.Errorf("disk %s: %w: an open file or an NBD connection is needed", d.Serial, errdefs.ErrInvalidArgument)
	}
	if d.NBD != nil && (d.NBD.Conn == nil || !serialPattern.MatchString(d.NBD.Export)) {
		return fmt.Errorf("disk %s: %w: no NBD connection, or export %q is not 1 to 20 of a-z, A-Z, 0-9, _ and -", d.Serial, errdefs.ErrInvalidArgument, d.NBD.Export)
	}
	return nil
}

// arguments is the whole command line, without argv[0]. images has how each of c.Disks
// is opened.
func arguments(c vmm.Config, h Host, fds inherited, images []backing) ([]string, error) {
	a := []string{
		"-name", "guest=" + c.ID + ",process=" + processName(c.ID),
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		// qboot: a firmware without option ROMs, boot menus and probing.
		"-L", firmwareDir, "-bios", firmwareDir + "/qboot.rom",
		"-accel", accelerator(c.Accelerator), "-cpu", cpuModel(c.Accelerator),
		"-smp", fmt.Sprintf("cpus=%d,maxcpus=%d,sockets=1,cores=%[2]d,threads=1", c.VCPUs, c.MaxVCPUs),
		"-m", fmt.Sprintf("size=%dM", c.MemoryBytes>>20),
		"-kernel", kernelPath, "-initrd", initrdPath, "-append", cmdline(c, h),
		"-chardev", fmt.Sprintf("socket,id=qmp,fd=%d", fds.qmp), "-mon", "chardev=qmp,mode=control",
		"-chardev", fmt.Sprintf("socket,id=console,fd=%d", fds.console), "-serial", "chardev:console",
		"-chardev", fmt.Sprintf("socket,id=channel,fd=%d", fds.channel),
	}
	bus := "pci"
	if c.Machine == "microvm" {
		bus = "device"
		// The virtio-mmio transports default to the legacy interface.
		a = append(a, "-M", "microvm,acpi=on,pit=on,pic=on,rtc=on,mem-merge=off,dump-guest-core=off", "-global", "virtio-mmio.force-legacy=false")
	} else {
		a = append(a, "-M", "q35,sata=off,smbus=off,usb=off,hpet=off,vmport=off,i8042=off,smm=off,graphics=off,mem-merge=off,dump-guest-core=off",
			"-device", "pvpanic-pci,id=pvpanic")
	}
	device := func(name, options string) {
		d := "virtio-" + name + "-" + bus + ",id=" + name
		if bus == "pci" {
			d += ",disable-legacy=on"
		}
		if options != "" {
			d += "," + options
		}
		a = append(a, "-device", d)
	}
	// One port only: each costs the guest two full queues of pages.
	device("serial", "max_ports=2")
	a = append(a, "-device", "virtserialport,bus=serial.0,nr=1,chardev=channel,name="+channel.PortName)
	device("scsi", "")
	a = append(a, "-object", "rng-builtin,id=entropy")
	device("rng", "rng=entropy")
	device("balloon", "free-page-reporting=on,deflate-on-oom=on")
	for i, n := range c.NICs {
		id := "net" + strconv.Itoa(i)
		vhost := "vhost=off"
		if len(fds.vhost) > 0 {
			vhost = fmt.Sprintf("vhost=on,vhostfd=%d", fds.vhost[i])
		}
		a = append(a, "-netdev", fmt.Sprintf("tap,id=%s,fd=%d,%s", id, fds.taps[i], vhost))
		d := fmt.Sprintf("virtio-net-%s,id=nic%d,netdev=%s,mac=%s", bus, i, id, n.MAC)
		if bus == "pci" {
			d += ",disable-legacy=on,romfile="
		}
		a = append(a, "-device", d)
	}
	for i, d := range c.Disks {
		protocol := nbdNode(d, strconv.Itoa(fds.disks[i]))
		if d.NBD == nil {
			fdset := i + 1
			protocol = fileNode(d, fdset, images[i])
			a = append(a, "-add-fd", fmt.Sprintf("fd=%d,set=%d", fds.disks[i], fdset))
		}
		add := func(option string, value map[string]any) error {
			b, err := json.Marshal(value)
			a = append(a, option, string(b))
			return err
		}
		err := add("-blockdev", rawNode(d, protocol, images[i]))
		if throttled(d) {
			err = errors.Join(err, add("-object", throttleGroup(d)), add("-blockdev", throttleNode(d)))
		}
		if err = errors.Join(err, add("-device", scsiDisk(d, i))); err != nil {
			return nil, err
		}
	}
	return a, nil
}

// processName fits the kernel's 15 characters; ps shows the whole ID in the arguments.
func processName(id string) string { return ("h8s-" + id)[:min(15, 4+len(id))] }

func accelerator(name string) string {
	if name == "kvm" {
		return "kvm"
	}
	// The least that costs nothing at boot, which translates about 32 MiB of code (16
	// to 128 took the same CPU time, each MiB up to there is memory of every VM).
	return "tcg,thread=multi,tb-size=32"
}

func cpuModel(accel string) string {
	if accel == "kvm" {
		return "host"
	}
	return "max"
}

// cmdline is the kernel's. PID 1's death is a panic, a panic a reset (-1: at once; t:
// triple fault, which needs no device), and a reset the end of the VM (-no-reboot).
func cmdline(c vmm.Config, h Host) string {
	words := []string{"console=ttyS0", "quiet", "panic=-1", "reboot=t", "cryptomgr.notests", "8250.nr_uarts=1", "net.ifnames=0", "random.trust_cpu=on"}
	if c.Accelerator == "tcg" {
		// The guest's TSC is the host's. Without the frequency it is calibrated against
		// emulated timers, which on a busy host fails (microvm then hangs). There is no
		// speculation to mitigate in an emulated CPU.
		words = append(words, fmt.Sprintf("tsc_early_khz=%d", h.TSCKHz), "tsc=reliable", "no_timer_check", "mitigations=off")
	}
	if c.Machine != "microvm" {
		words = append(words, "pci=lastbus=0")
	}
	if s := strings.TrimSpace(c.Cmdline); s != "" {
		words = append(words, s)
	}
	return strings.Join(words, " ")
}

// backing is how a disk's file is to be opened.
type backing struct {
	// driver is "file" or "host_device"; "" for what is no file.
	driver string
	// direct bypasses the page cache; asynchronous is with io_uring.
	direct, asynchronous bool
}

// rawNode is a blockdev-add of a raw image on a protocol. Formats are never probed.
func rawNode(d vmm.Disk, protocol any, i backing) map[string]any {
	n := map[string]any{"driver": "raw", "node-name": rawName(d), "read-only": d.ReadOnly, "discard": discard(d), "file": protocol}
	if d.Ephemeral {
		n["cache"] = map[string]any{"no-flush": true}
	}
	if i.direct {
		n["cache"] = map[string]any{"direct": true}
	}
	if d.Persistent && d.Discard && !d.ReadOnly {
		n["detect-zeroes"] = "unmap"
	}
	return n
}

// fileNode is a file behind an fdset. Locking stays at "auto": readers share, a writer
// excludes everybody else, but those of a shared disk.
func fileNode(d vmm.Disk, fdset int, i backing) map[string]any {
	n := map[string]any{"driver": i.driver, "filename": "/dev/fdset/" + strconv.Itoa(fdset), "read-only": d.ReadOnly, "discard": discard(d)}
	if i.direct {
		n["cache"] = map[string]any{"direct": true}
	}
	if i.asynchronous {
		n["aio"] = "io_uring"
	}
	return n
}

// nbdNode is what is behind a connected descriptor: a number, or a name given by getfd.
func nbdNode(d vmm.Disk, fd string) map[string]any {
	if d.NBD == nil {
		return nil
	}
	return map[string]any{
		"driver": "nbd", "server": map[string]any{"type": "fd", "str": fd}, "export": d.NBD.Export,
		"read-only": d.ReadOnly, "discard": discard(d),
	}
}

func discard(d vmm.Disk) string {
	if d.Discard {
		return "unmap"
	}
	return "ignore"
}

// throttleNode is on top of a disk's raw node.
func throttleNode(d vmm.Disk) map[string]any {
	return map[string]any{
		"driver": "throttle", "node-name": nodeName(d.Serial), "throttle-group": groupName(d.Serial), "file": rawName(d),
		"read-only": d.ReadOnly, "discard": discard(d),
	}
}

func throttleGroup(d vmm.Disk) map[string]any {
	t := vmm.Throttle{}
	if d.Throttle != nil {
		t = *d.Throttle
	}
	return map[string]any{"qom-type": "throttle-group", "id": groupName(d.Serial), "limits": limits(t)}
}

// limits has all of them: one that is left out stays as it was.
func limits(t vmm.Throttle) map[string]int64 {
	return map[string]int64{
		"iops-total": t.IOPS, "iops-read": t.ReadIOPS, "iops-write": t.WriteIOPS,
		"bps-total": t.Bytes, "bps-read": t.ReadBytes, "bps-write": t.WriteBytes,
	}
}

// throttled tells whether there is a throttle on top of a disk: on all whose limits may
// change, for without limits it costs 0.1 µs a request.
func throttled(d vmm.Disk) bool { return d.Persistent || d.Throttle != nil }

// scsiDisk is a device_add. All disks are LUNs of one target: one event, one scan each.
func scsiDisk(d vmm.Disk, lun int) map[string]any {
	dev := map[string]any{
		"driver": "scsi-hd", "id": deviceName(d.Serial), "bus": "scsi.0", "channel": 0, "scsi-id": 0, "lun": lun,
		"drive": nodeName(d.Serial), "serial": d.Serial, "rotation_rate": 1,
	}
	if d.Persistent {
		dev["werror"], dev["rerror"] = "report", "report"
	}
	if d.Shared {
		dev["share-rw"] = true
	}
	return dev
}

// rawName is the raw node's: the disk's own, or the one below its throttle.
func rawName(d vmm.Disk) string {
	if throttled(d) {
		return "raw-" + d.Serial
	}
	return nodeName(d.Serial)
}

func nodeName(serial string) string   { return "node-" + serial }
func groupName(serial string) string  { return "limit-" + serial }
func deviceName(serial string) string { return "disk-" + serial }
