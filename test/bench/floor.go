package bench

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/hypernetes/hypernetes/guest/image"
	"github.com/hypernetes/hypernetes/runtime/vmm/qemu"
)

// guestMiB is the memory of measured VMs and of the bare guest they are compared with:
// what a Pod without limits gets.
const guestMiB = 256

// marker is what the smallest init prints.
const marker = "h8s-bench: first instruction"

// smallestInit is an ELF executable for the guest that writes the marker to its
// standard output and restarts the machine: the least a PID 1 can do and be seen.
func smallestInit() []byte {
	const base, headers = 0x400000, 64 + 56
	text := marker + "\n"
	code := []byte{
		0xb8, 1, 0, 0, 0, // mov eax, SYS_write
		0xbf, 1, 0, 0, 0, // mov edi, 1
		0x48, 0x8d, 0x35, 0, 0, 0, 0, // lea rsi, [rip+text]
		0xba, byte(len(text)), 0, 0, 0, // mov edx, len
		0x0f, 0x05, // syscall
		0xb8, 169, 0, 0, 0, // mov eax, SYS_reboot
		0xbf, 0xad, 0xde, 0xe1, 0xfe, // mov edi, LINUX_REBOOT_MAGIC1
		0xbe, 0x69, 0x19, 0x12, 0x28, // mov esi, LINUX_REBOOT_MAGIC2
		0xba, 0x67, 0x45, 0x23, 0x01, // mov edx, LINUX_REBOOT_CMD_RESTART
		0x0f, 0x05, // syscall
		0xeb, 0xfe, // jmp $
	}
	const afterLea = 17
	binary.LittleEndian.PutUint32(code[afterLea-4:], uint32(len(code)-afterLea))
	size := uint64(headers + len(code) + len(text))

	var b bytes.Buffer
	b.Write([]byte{0x7f, 'E', 'L', 'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	for _, field := range []any{
		uint16(2), uint16(62), uint32(1), // executable, x86-64, version
		uint64(base + headers), uint64(64), uint64(0), // entry, program headers, sections
		uint32(0), uint16(64), uint16(56), uint16(1), uint16(64), uint16(0), uint16(0),
		uint32(1), uint32(5), // one loaded segment, read and execute
		uint64(0), uint64(base), uint64(base), size, size, uint64(0x1000),
	} {
		_ = binary.Write(&b, binary.LittleEndian, field) // to memory
	}
	b.Write(code)
	b.WriteString(text)
	return b.Bytes()
}

// kernel is one guest kernel of out/share.
type kernel struct {
	Variant string
	vmlinux string
	cmdline string
}

// kernels lists the guest kernels that were built, the one in use first.
func kernels(out string) ([]kernel, error) {
	inUse, err := filepath.EvalSymlinks(filepath.Join(out, "share", "vmlinux"))
	if err != nil {
		return nil, err
	}
	var found []kernel
	for _, variant := range []string{"stock", "hyper"} {
		dir := filepath.Join(out, "share", variant)
		k := kernel{Variant: variant, vmlinux: filepath.Join(dir, "vmlinux")}
		if _, err := os.Stat(k.vmlinux); err != nil {
			continue
		}
		var info struct{ Cmdline string }
		if b, err := os.ReadFile(filepath.Join(dir, "kernel.json")); err == nil {
			if err := json.Unmarshal(b, &info); err != nil {
				return nil, fmt.Errorf("%s: kernel.json: %w", dir, err)
			}
		}
		k.cmdline = info.Cmdline
		if real, err := filepath.EvalSymlinks(k.vmlinux); err == nil && real == inUse {
			found = append([]kernel{k}, found...)
			continue
		}
		found = append(found, k)
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("no kernel in %s: run `make guest`", filepath.Join(out, "share"))
	}
	return found, nil
}

// floor boots kernel k with the smallest init and returns how long it took from exec
// of QEMU to the marker, in wall clock and in QEMU's CPU time.
func floor(ctx context.Context, host qemu.Host, k kernel, initrd string, memoryMiB int) (wall, cpu time.Duration, err error) {
	cmd := exec.CommandContext(ctx, host.Binary, floorArgs(k, host.TSCKHz, initrd, memoryMiB)...)
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return 0, 0, err
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return 0, 0, err
	}
	lines := bufio.NewScanner(stdout)
	seen := false
	for lines.Scan() {
		if !seen && strings.Contains(lines.Text(), marker) {
			seen = true
			wall = time.Since(began)
		}
	}
	err = cmd.Wait()
	if err == nil && !seen {
		err = errors.New("the guest ended without running its init")
	}
	if err != nil {
		return 0, 0, fmt.Errorf("bare QEMU, kernel %s: %w: %s", k.Variant, err, strings.TrimSpace(stderr.String()))
	}
	usage := cmd.ProcessState.SysUsage().(*syscall.Rusage)
	return wall, time.Duration(usage.Utime.Nano() + usage.Stime.Nano()), nil
}

// floorArgs is the machine Pods run on, as runtime/vmm/qemu has it, without any device.
func floorArgs(k kernel, tscKHz int64, initrd string, memoryMiB int) []string {
	cmdline := fmt.Sprintf("console=ttyS0 quiet panic=-1 reboot=t cryptomgr.notests 8250.nr_uarts=1 "+
		"tsc_early_khz=%d tsc=reliable no_timer_check mitigations=off pci=lastbus=0 %s", tscKHz, k.cmdline)
	return []string{
		"-M", "q35,sata=off,smbus=off,usb=off,hpet=off,vmport=off,i8042=off,smm=off,graphics=off,mem-merge=off,dump-guest-core=off",
		"-accel", "tcg,thread=multi,tb-size=32", "-cpu", "max", "-m", fmt.Sprint(memoryMiB), "-smp", "1",
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-bios", "qboot.rom",
		"-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
		"-kernel", k.vmlinux, "-initrd", initrd, "-append", strings.TrimSpace(cmdline),
	}
}

// writeFloorInitrd makes the initramfs that holds nothing but the smallest init.
func writeFloorInitrd(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	archive := image.NewCPIO(f)
	init := smallestInit()
	if err := archive.File("init", 0o755, int64(len(init)), bytes.NewReader(init)); err != nil {
		return err
	}
	if err := archive.Close(); err != nil {
		return err
	}
	return f.Close()
}
