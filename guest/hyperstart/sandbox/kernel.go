package sandbox

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/containerd/errdefs"
)

const (
	maxEntropy = 512
	// From linux/random.h.
	rndAddEntropy = 0x40085203
	rndReseedCRNG = 0x5207
)

// addEntropy credits bytes to the kernel's generator and makes it use them at once.
func addEntropy(b []byte) error {
	if len(b) == 0 {
		return nil
	}
	if len(b) > maxEntropy {
		return fmt.Errorf("entropy of %d bytes: more than %d: %w", len(b), maxEntropy, errdefs.ErrInvalidArgument)
	}
	f, err := os.OpenFile("/dev/urandom", os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("add entropy: %w", err)
	}
	defer f.Close()
	// struct rand_pool_info: bits credited, bytes, data.
	buf := binary.NativeEndian.AppendUint32(nil, uint32(len(b)*8))
	buf = binary.NativeEndian.AppendUint32(buf, uint32(len(b)))
	buf = append(buf, b...)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), rndAddEntropy, uintptr(unsafe.Pointer(&buf[0]))); errno != 0 {
		return fmt.Errorf("add entropy: %w", errno)
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), rndReseedCRNG, 0); errno != 0 {
		return fmt.Errorf("reseed random numbers: %w", errno)
	}
	return nil
}

func setClock(t *timestamppb.Timestamp) error {
	if t == nil || t.Seconds == 0 && t.Nanos == 0 {
		return nil
	}
	if err := t.CheckValid(); err != nil {
		return fmt.Errorf("clock: %w: %w", errdefs.ErrInvalidArgument, err)
	}
	ts := unix.NsecToTimespec(t.AsTime().UnixNano())
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
		return fmt.Errorf("set clock: %w", err)
	}
	return nil
}

var validSysctl = regexp.MustCompile(`^[a-zA-Z0-9_-]+([./][a-zA-Z0-9_-]+)*$`)

// SysctlPath turns a.b.c, or a/b.1/c as sysctl(8) also takes it, into a path.
func SysctlPath(root, name string) (string, error) {
	if !validSysctl.MatchString(name) {
		return "", fmt.Errorf("sysctl %.80q: malformed name: %w", name, errdefs.ErrInvalidArgument)
	}
	first := strings.IndexAny(name, "./")
	if first < 0 || name[first] == '.' {
		// Dots separate; a slash then stands for a dot inside an element.
		name = strings.NewReplacer(".", "/", "/", ".").Replace(name)
	}
	return filepath.Join(root, name), nil
}

// WriteSysctls sets kernel settings below root (/proc/sys).
func WriteSysctls(root string, settings map[string]string) error {
	for name, value := range settings {
		p, err := SysctlPath(root, name)
		if err != nil {
			return err
		}
		f, err := os.OpenFile(p, os.O_WRONLY, 0)
		if err == nil {
			_, err = f.WriteString(value)
			if cerr := f.Close(); err == nil {
				err = cerr
			}
		}
		if err != nil {
			return fmt.Errorf("sysctl %s=%.80q: %w", name, value, err)
		}
	}
	return nil
}

// Memory reads the VM's total and available memory in bytes.
func Memory() (total, available uint64, err error) {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, 0, fmt.Errorf("read memory: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		var kib uint64
		if _, err := fmt.Sscanf(line, "MemTotal: %d kB", &kib); err == nil {
			total = kib << 10
		} else if _, err := fmt.Sscanf(line, "MemAvailable: %d kB", &kib); err == nil {
			available = kib << 10
		}
	}
	return total, available, nil
}
