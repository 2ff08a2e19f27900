// The guest of this package's tests: PID 1 that loads the kernel's modules, opens the
// channel and obeys one command a line.
package main

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	for _, m := range [][2]string{{"devtmpfs", "/dev"}, {"proc", "/proc"}, {"sysfs", "/sys"}} {
		_ = unix.Mount(m[0], m[1], m[0], 0, "")
	}
	order, _ := os.ReadFile("/lib/modules/h8s.order")
	for _, path := range strings.Fields(string(order)) {
		f, err := os.Open(path)
		if err == nil {
			err = unix.FinitModule(int(f.Fd()), "", 0)
			f.Close()
		}
		if err != nil {
			fmt.Println("init: module", path, err)
		}
	}
	port := openPort()
	fmt.Fprintf(port, "hello\n")
	lines := bufio.NewReader(port)
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			time.Sleep(10 * time.Millisecond) // no host end yet
			continue
		}
		fmt.Fprintf(port, "%s\n", obey(strings.Fields(line)))
	}
}

func openPort() *os.File {
	for {
		names, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
		for _, n := range names {
			b, _ := os.ReadFile(n)
			if strings.TrimSpace(string(b)) == "io.hypernetes.hyperstart" {
				f, err := os.OpenFile("/dev/"+filepath.Base(filepath.Dir(n)), os.O_RDWR, 0)
				if err == nil {
					return f
				}
			}
		}
		time.Sleep(time.Millisecond)
	}
}

func obey(words []string) string {
	if len(words) == 0 {
		return "error: empty"
	}
	arg := ""
	if len(words) > 1 {
		arg = words[1]
	}
	switch words[0] {
	case "echo":
		return arg
	case "find":
		for range 5000 {
			if d := disk(arg); d != "" {
				size, _ := os.ReadFile("/sys/block/" + d + "/size")
				ro, _ := os.ReadFile("/sys/block/" + d + "/ro")
				return "size=" + strings.TrimSpace(string(size)) + " ro=" + strings.TrimSpace(string(ro))
			}
			time.Sleep(2 * time.Millisecond)
		}
		return "error: no disk " + arg
	case "gone":
		for range 5000 {
			if disk(arg) == "" {
				return "gone"
			}
			time.Sleep(2 * time.Millisecond)
		}
		return "error: still there"
	case "head":
		b := make([]byte, 16)
		f, err := os.Open("/dev/" + disk(arg))
		if err == nil {
			_, err = f.Read(b)
			f.Close()
		}
		if err != nil {
			return "error: " + err.Error()
		}
		return string(bytes.TrimRight(b, "\x00"))
	case "put":
		b := make([]byte, 512)
		copy(b, words[2])
		f, err := os.OpenFile("/dev/"+disk(arg), os.O_WRONLY|os.O_SYNC, 0)
		if err == nil {
			_, err = f.Write(b)
			f.Close()
		}
		if err != nil {
			return "error: " + err.Error()
		}
		return "put"
	case "rescan":
		if err := os.WriteFile("/sys/block/"+disk(arg)+"/device/rescan", []byte("1"), 0); err != nil {
			return "error: " + err.Error()
		}
		size, _ := os.ReadFile("/sys/block/" + disk(arg) + "/size")
		return strings.TrimSpace(string(size))
	case "mount":
		dir := "/tmp/" + arg
		_ = os.MkdirAll(dir, 0o755)
		if err := unix.Mount("/dev/"+disk(arg), dir, "ext4", 0, words[2]); err != nil {
			return "error: " + err.Error()
		}
		return "mounted"
	case "has-nic":
		for range 5000 {
			addresses, _ := filepath.Glob("/sys/class/net/*/address")
			for _, a := range addresses {
				if b, _ := os.ReadFile(a); strings.TrimSpace(string(b)) == arg {
					return "yes"
				}
			}
			time.Sleep(2 * time.Millisecond)
		}
		return "no"
	case "print":
		for range 100 {
			fmt.Println(strings.Repeat(arg, 64))
		}
		return "printed"
	case "meminfo":
		b, _ := os.ReadFile("/proc/meminfo")
		return strings.Join(strings.Fields(string(b))[:9], " ")
	case "uptime":
		b, _ := os.ReadFile("/proc/uptime")
		return strings.TrimSpace(string(b))
	case "panic":
		_ = os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0)
	case "die":
		os.Exit(3)
	case "off":
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	case "reset":
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	}
	return "error: " + strings.Join(words, " ")
}

// disk finds a SCSI disk by its unit serial number (VPD page 0x80).
func disk(serial string) string {
	pages, _ := filepath.Glob("/sys/block/sd*/device/vpd_pg80")
	for _, p := range pages {
		b, _ := os.ReadFile(p)
		if len(b) > 4 && string(b[4:]) == serial {
			return strings.Split(p, "/")[3]
		}
	}
	return ""
}
