package qemu

import (
	"os"
	"runtime"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/runtime/vmm"
)

// isolatedTap opens a tap in a network namespace that ends with it.
func isolatedTap(t *testing.T) *os.File {
	t.Helper()
	type result struct {
		fd  int
		err error
	}
	ch := make(chan result, 1)
	go func() {
		runtime.LockOSThread() // not unlocked: the thread, in its namespace, ends here
		fd, err := -1, unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			fd, err = openTap("pod0")
		}
		ch <- result{fd, err}
	}()
	r := <-ch
	if r.err != nil {
		t.Skipf("no tap: %v", r.err)
	}
	f := os.NewFile(uintptr(r.fd), "tap")
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func openTap(name string) (int, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return -1, err
	}
	var req struct {
		name  [unix.IFNAMSIZ]byte
		flags uint16
		_     [22]byte
	}
	copy(req.name[:], name)
	req.flags = unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TUNSETIFF, uintptr(unsafe.Pointer(&req))); e != 0 {
		_ = unix.Close(fd)
		return -1, e
	}
	return fd, nil
}

func TestNIC(t *testing.T) {
	files := variants(t)
	for _, machine := range []string{"q35", "microvm"} {
		t.Run(machine, func(t *testing.T) {
			c := config(files[len(files)-1])
			c.Machine = machine
			c.VCPUs, c.MaxVCPUs = 2, 2
			c.NICs = []vmm.NIC{{Tap: isolatedTap(t), MAC: "02:00:00:00:00:07"}}
			g := boot(t, c)
			g.ask("has-nic 02:00:00:00:00:07", "yes")
		})
	}
}
