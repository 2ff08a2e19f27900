package qemu

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/hypernetes/hypernetes/runtime/vmm"
)

func TestGuestLife(t *testing.T) {
	for _, f := range variants(t) {
		for _, machine := range []string{"q35", "microvm"} {
			t.Run(f.variant+"/"+machine, func(t *testing.T) {
				boot1 := imageFile(t, "boot-disk", 1<<20)
				c := config(f)
				c.Machine = machine
				c.Disks = []vmm.Disk{{Serial: "boot1", File: boot1, ReadOnly: true}}
				started := time.Now()
				g := boot(t, c)
				t.Logf("%s/%s: hello after %v", f.variant, machine, time.Since(started).Round(time.Millisecond))
				g.ask("echo one", "one")
				g.ask("find boot1", "size=2048 ro=1")
				g.ask("head boot1", "boot-disk")
				hotplug(t, g)
				g.send("off")
				g.ends(vmm.ReasonShutdown, "powered off")
			})
		}
	}
}

func hotplug(t *testing.T, g *guest) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), bootTimeout)
	defer cancel()
	for round := range 2 { // what was removed can come back
		for i := range 3 {
			serial := fmt.Sprintf("layer-%d", i)
			d := vmm.Disk{Serial: serial, File: imageFile(t, serial, 2<<20), ReadOnly: i != 2, Discard: i == 2, Ephemeral: i == 2}
			started := time.Now()
			if err := g.AddDisk(ctx, d); err != nil {
				t.Fatal(err)
			}
			plugged := time.Since(started)
			g.ask("find "+serial, fmt.Sprintf("size=4096 ro=%d", map[bool]int{true: 1}[i != 2]))
			g.ask("head "+serial, serial)
			t.Logf("round %d disk %d: plugged %v, seen and read %v", round, i, plugged.Round(time.Microsecond), time.Since(started).Round(time.Millisecond))
			if err := g.AddDisk(ctx, d); err == nil {
				t.Fatal("a serial can be added twice")
			}
		}
		for _, serial := range []string{"layer-1", "layer-0", "layer-2", "never-there"} {
			if err := g.RemoveDisk(ctx, serial); err != nil {
				t.Fatal(err)
			}
			g.ask("gone "+serial, "gone")
		}
	}
}

// imageFile makes a raw image that starts with text and opens it as a layer would be.
func imageFile(t testing.TB, text string, size int64) *os.File {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	flag := os.O_RDONLY
	if text == "layer-2" {
		flag = os.O_RDWR
	}
	f, err := os.OpenFile(path, flag, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}
