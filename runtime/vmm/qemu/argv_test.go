package qemu

import (
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/runtime/vmm"
)

var update = flag.Bool("update", false, "rewrite testdata/*.golden")

func exampleConfig(machine, accel string) vmm.Config {
	return vmm.Config{
		ID: "0123456789abcdef", Kernel: "/k", Initrd: "/i", Cmdline: " quiet2 ", Machine: machine, Accelerator: accel,
		VCPUs: 1, MaxVCPUs: 2, MemoryBytes: 128 << 20, UID: 7, GID: 7,
		Disks: []vmm.Disk{{Serial: "layer-1", File: os.Stdin, ReadOnly: true}, {Serial: "scratch", File: os.Stdin, Discard: true, Ephemeral: true},
			{Serial: "volume", File: os.Stdin, Discard: true, Persistent: true, Throttle: &vmm.Throttle{IOPS: 100, WriteBytes: 1 << 20}},
			{Serial: "served", NBD: &vmm.NBD{Conn: os.Stdin, Export: "e1"}, Discard: true, Persistent: true, Shared: true},
		},
		NICs: []vmm.NIC{{Tap: os.Stdin, MAC: "02:00:00:00:00:01"}},
	}
}

func TestArgumentsGolden(t *testing.T) {
	h := Host{TSCKHz: 2500000}
	fds := inherited{qmp: 4, channel: 5, console: 6, taps: []int{7}, disks: []int{8, 9, 11, 12}}
	for _, tc := range []struct{ machine, accel string }{{"q35", "tcg"}, {"q35", "kvm"}, {"microvm", "tcg"}} {
		name := tc.machine + "-" + tc.accel
		t.Run(name, func(t *testing.T) {
			c := exampleConfig(tc.machine, tc.accel)
			if err := validate(c); err != nil {
				t.Fatal(err)
			}
			fds := fds
			if tc.accel == "kvm" {
				fds.vhost = []int{10}
			}
			args, err := arguments(c, h, fds, []backing{{driver: "file"}, {driver: "host_device"}, {driver: "file", direct: true, asynchronous: true}, {}})
			if err != nil {
				t.Fatal(err)
			}
			got := strings.Join(args, "\n") + "\n"
			path := filepath.Join("testdata", name+".golden")
			if *update {
				if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("arguments differ from %s (-update rewrites it):\n%s", path, got)
			}
		})
	}
}

func TestValidateRefuses(t *testing.T) {
	for name, change := range map[string]func(*vmm.Config){
		"id":          func(c *vmm.Config) { c.ID = "x,process=y" },
		"long id":     func(c *vmm.Config) { c.ID = strings.Repeat("a", 65) },
		"memory":      func(c *vmm.Config) { c.MemoryBytes = 32 << 20 },
		"odd memory":  func(c *vmm.Config) { c.MemoryBytes++ },
		"vcpus":       func(c *vmm.Config) { c.VCPUs = 0 },
		"max vcpus":   func(c *vmm.Config) { c.MaxVCPUs = 0 },
		"machine":     func(c *vmm.Config) { c.Machine = "pc,usb=on" },
		"accelerator": func(c *vmm.Config) { c.Accelerator = "" },
		"cmdline":     func(c *vmm.Config) { c.Cmdline = "a\nb" },
		"serial":      func(c *vmm.Config) { c.Disks[0].Serial = "a,b" },
		"same serial": func(c *vmm.Config) { c.Disks[1].Serial = c.Disks[0].Serial },
		"no file":     func(c *vmm.Config) { c.Disks[0].File = nil },
		"two sources": func(c *vmm.Config) { c.Disks[0].NBD = c.Disks[3].NBD },
		"export":      func(c *vmm.Config) { c.Disks[3].NBD = &vmm.NBD{Conn: os.Stdin, Export: "a,b"} },
		"no nbd":      func(c *vmm.Config) { c.Disks[3].NBD = &vmm.NBD{Export: "a"} },
		"mac":         func(c *vmm.Config) { c.NICs[0].MAC = "x,romfile=/etc/passwd" },
		"no tap":      func(c *vmm.Config) { c.NICs[0].Tap = nil },
	} {
		t.Run(name, func(t *testing.T) {
			c := exampleConfig("q35", "tcg")
			change(&c)
			if err := validate(c); !errors.Is(err, errdefs.ErrInvalidArgument) {
				t.Errorf("error %v", err)
			}
		})
	}
}

func TestFreeLUN(t *testing.T) {
	if n := freeLUN(map[string]plugged{"a": {lun: 0}, "b": {lun: 2}}); n != 1 {
		t.Errorf("free lun %d, want 1", n)
	}
}
