package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/guest/image/closure"
)

// Host is what must be known of QEMU and this machine before a VM starts. It holds for
// one boot of the host and one build of QEMU.
type Host struct {
	// Key is what the facts were found for; a cache with another one is not used.
	Key string `json:"key"`
	// Binary is QEMU's absolute path, links resolved; Version what it says ("7.2.22").
	Binary  string `json:"binary"`
	Version string `json:"version"`
	// Accelerator is "kvm" if a test guest ran under it, else "tcg"; Reason says why not.
	Accelerator string `json:"accelerator"`
	Reason      string `json:"reason,omitempty"`
	// TSCKHz is the rate of the host's time stamp counter.
	TSCKHz int64 `json:"tsc_khz"`
	// VhostNet tells whether there is a /dev/vhost-net to use with KVM.
	VhostNet bool `json:"vhost_net"`
	// IOUring tells whether a process without privileges may use io_uring.
	IOUring bool `json:"io_uring"`
	// Files are QEMU's libraries and modules by absolute path.
	Files []string `json:"files"`
	// Firmware are the firmware images a VM may need, by absolute path.
	Firmware []string `json:"firmware"`
}

// probeTimeout bounds the test guest, as long as a working one takes on a busy host.
const probeTimeout = 2 * time.Second

// Probe finds the facts of the host for QEMU's binary ("" is qemu-system-x86_64 of the
// PATH). They are kept in the file cache ("" keeps nothing), so only the first call
// after a boot of the host takes more than a millisecond; then at most three seconds.
func Probe(ctx context.Context, binary, cache string) (Host, error) {
	path, key, err := identify(binary)
	if err != nil {
		return Host{}, err
	}
	if h, err := readHost(cache); err == nil && h.Key == key {
		return h, nil
	}
	h := Host{Key: key, Binary: path}
	if h.Version, err = version(ctx, path); err != nil {
		return Host{}, err
	}
	if h.Files, err = libraries(path); err != nil {
		return Host{}, err
	}
	if h.Firmware, err = firmware(); err != nil {
		return Host{}, err
	}
	if h.TSCKHz, err = measureTSC(ctx); err != nil {
		return Host{}, err
	}
	h.Accelerator = "kvm"
	if err := tryKVM(ctx, path); err != nil {
		if ctx.Err() != nil {
			return Host{}, ctx.Err()
		}
		h.Accelerator, h.Reason = "tcg", err.Error()
	}
	_, err = os.Stat("/dev/vhost-net")
	h.VhostNet = err == nil && h.Accelerator == "kvm"
	h.IOUring = tryIOUring()
	if cache == "" {
		return h, nil
	}
	return h, writeHost(cache, h)
}

func identify(binary string) (path, key string, err error) {
	if binary == "" {
		binary = "qemu-system-x86_64"
	}
	path, err = exec.LookPath(binary)
	if err == nil {
		path, err = filepath.EvalSymlinks(path)
	}
	if err == nil {
		path, err = filepath.Abs(path)
	}
	if err != nil {
		return "", "", fmt.Errorf("qemu at %s: %w (%w): install the Debian package qemu-system-x86, or set qemu in hyper.toml", binary, errdefs.ErrNotFound, err)
	}
	st, err := os.Stat(path)
	if err != nil {
		return "", "", fmt.Errorf("qemu: %w", err)
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", "", fmt.Errorf("boot id: %w", err)
	}
	ino := st.Sys().(*syscall.Stat_t).Ino
	return path, fmt.Sprintf("2 %s %s %d %d %d", strings.TrimSpace(string(boot)), path, ino, st.Size(), st.ModTime().UnixNano()), nil
}

func readHost(cache string) (Host, error) {
	var h Host
	b, err := os.ReadFile(cache)
	if err == nil {
		err = json.Unmarshal(b, &h)
	}
	return h, err
}

// writeHost replaces the cache atomically: shims start at the same time.
func writeHost(cache string, h Host) error {
	b, err := json.Marshal(h)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(cache), 0o700); err != nil {
		return fmt.Errorf("cache of the host's facts: %w", err)
	}
	f, err := os.CreateTemp(filepath.Dir(cache), ".host-")
	if err != nil {
		return fmt.Errorf("cache of the host's facts: %w", err)
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), cache)
	}
	if err != nil {
		_ = os.Remove(f.Name())
		return fmt.Errorf("cache of the host's facts: %w", err)
	}
	return nil
}

var versionPattern = regexp.MustCompile(`version ([0-9]+\.[0-9]+[0-9.]*)`)

func version(ctx context.Context, path string) (string, error) {
	out, err := exec.CommandContext(ctx, path, "-version").Output()
	if err != nil {
		return "", fmt.Errorf("%s -version: %w", path, err)
	}
	m := versionPattern.FindSubmatch(out)
	if m == nil {
		return "", fmt.Errorf("%s -version says %.60q: %w", path, out, errdefs.ErrInvalidArgument)
	}
	return string(m[1]), nil
}

// libraries finds what QEMU loads: its libraries and, where Debian built it as a module,
// the TCG accelerator with its own.
func libraries(path string) ([]string, error) {
	programs := []string{path}
	modules, err := filepath.Glob("/usr/lib/x86_64-linux-gnu/qemu/accel-tcg-x86_64.so")
	if err != nil {
		return nil, err
	}
	files, err := closure.Of("", append(programs, modules...)...)
	if err != nil {
		return nil, fmt.Errorf("qemu: %w", err)
	}
	return append(files, modules...), nil
}

// firmware finds qboot, which starts either machine, and the ROMs QEMU adds to hand a
// kernel over.
func firmware() ([]string, error) {
	var found []string
	for _, name := range []string{"qboot.rom", "pvh.bin", "linuxboot_dma.bin", "kvmvapic.bin"} {
		path := filepath.Join("/usr/share/qemu", name)
		if _, err := os.Stat(path); err != nil {
			return nil, fmt.Errorf("qemu firmware %s: %w: install the Debian package qemu-system-data", path, errdefs.ErrNotFound)
		}
		found = append(found, path)
	}
	return found, nil
}

// tryKVM runs a guest of a few instructions under KVM. That /dev/kvm is there says
// little: nested and paravirtual variants accept a VM and then refuse its CPU, or never
// run it.
func tryKVM(ctx context.Context, path string) error {
	for _, vendor := range []string{"kvm_intel", "kvm_amd"} {
		if _, err := os.Stat("/sys/module/" + vendor); err == nil {
			return runProbeGuest(ctx, path)
		}
	}
	return fmt.Errorf("kernel has neither kvm_intel nor kvm_amd: %w", errdefs.ErrUnavailable)
}

// tryIOUring makes a ring. Kernels are built without it, sandboxes refuse it, and since
// Linux 6.6 it can be for privileged processes only (kernel.io_uring_disabled).
func tryIOUring() bool {
	if b, err := os.ReadFile("/proc/sys/kernel/io_uring_disabled"); err == nil && strings.TrimSpace(string(b)) != "0" {
		return false
	}
	var params [120]byte // struct io_uring_params
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&params)), 0)
	if errno != 0 {
		return false
	}
	_ = unix.Close(int(fd))
	return true
}

// probeExit is how QEMU exits when the guest wrote 0x31 to isa-debug-exit.
const probeExit = 0x31<<1 | 1

func runProbeGuest(ctx context.Context, path string) error {
	return runBIOS(ctx, path, "kvm", "host")
}

func runBIOS(ctx context.Context, path, accel, cpu string) error {
	f, err := os.CreateTemp("", "h8s-probe-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(probeBIOS())
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-M", "q35,sata=off,smbus=off,usb=off", "-accel", accel, "-cpu", cpu, "-m", "8", "-bios", f.Name(),
		"-device", "isa-debug-exit,iobase=0xf4,iosize=4")
	// A process stuck in the kernel cannot be waited for: Probe must not hang with it.
	cmd.WaitDelay = 200 * time.Millisecond
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("test guest under %s did not answer within %v: %w", accel, probeTimeout, ctx.Err())
	case errors.As(err, &exit) && exit.ExitCode() == probeExit:
		return nil
	case err == nil:
		return fmt.Errorf("test guest under %s ended without its answer: %w", accel, errdefs.ErrUnavailable)
	}
	return fmt.Errorf("test guest under %s: %w: %.200s", accel, err, strings.TrimSpace(string(out)))
}

// probeBIOS is a firmware image whose reset vector runs CPUID and then reports success.
func probeBIOS() []byte {
	rom := make([]byte, 64<<10)
	copy(rom[len(rom)-16:], []byte{
		0x31, 0xc0, // xor ax, ax
		0x0f, 0xa2, // cpuid
		0xb0, 0x31, // mov al, 0x31
		0xe6, 0xf4, // out 0xf4, al
		0xf4,       // hlt
		0xeb, 0xfd, // jmp to the hlt
	})
	return rom
}
