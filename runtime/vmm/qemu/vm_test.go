package qemu

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hypernetes/hypernetes/guest/image"
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

func TestEndings(t *testing.T) {
	for _, f := range variants(t) {
		for _, tc := range []struct{ name, machine, command, reason, detail string }{
			{"panic", "q35", "panic", vmm.ReasonPanic, "sysrq triggered crash"},
			{"init dies", "q35", "die", vmm.ReasonPanic, "Attempted to kill init"},
			{"init dies without pvpanic", "microvm", "die", vmm.ReasonPanic, "Attempted to kill init"},
			{"reboot", "q35", "reset", vmm.ReasonShutdown, "reboot"},
		} {
			t.Run(f.variant+"/"+tc.name, func(t *testing.T) {
				c := config(f)
				c.Machine = tc.machine
				g := boot(t, c)
				g.send(tc.command)
				g.ends(tc.reason, tc.detail)
			})
		}
	}
}

func TestKillIsIdempotent(t *testing.T) {
	f := variants(t)[0]
	ctx, cancel := context.WithTimeout(t.Context(), bootTimeout)
	defer cancel()
	v, err := New(host(t)).Start(ctx, config(f))
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := v.Kill(); err != nil {
			t.Fatal(err)
		}
	}
	<-v.Done()
	if e := v.Exit(); e.Reason != vmm.ReasonKilled || v.Kill() != nil {
		t.Errorf("exit %+v", e)
	}
	if err := v.AddDisk(ctx, vmm.Disk{Serial: "late", File: imageFile(t, "late", 1<<20), ReadOnly: true}); err == nil {
		t.Error("a dead vm takes disks")
	}
	if _, err := os.Stat(fmt.Sprintf("/proc/%d", v.PID())); err == nil {
		t.Error("done before the process was reaped")
	}
}

// TestSharedLayer gives one read-only file to two VMs at once, and a writable one to
// only the first that asks.
func TestSharedLayer(t *testing.T) {
	files := variants(t)
	f := files[len(files)-1]
	path := filepath.Join(t.TempDir(), "layer")
	if err := os.WriteFile(path, append([]byte("layer"), make([]byte, 1<<20-5)...), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*bootTimeout)
	defer cancel()
	open := func(flag int) *os.File {
		file, err := os.OpenFile(path, flag, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = file.Close() })
		return file
	}
	var guests []*guest
	for i := range 2 {
		c := config(f)
		c.ID = fmt.Sprintf("share-%d", i)
		c.UID += i
		g := boot(t, c)
		if err := g.AddDisk(ctx, vmm.Disk{Serial: "layer", File: open(os.O_RDONLY), ReadOnly: true}); err != nil {
			t.Fatal(err)
		}
		guests = append(guests, g)
	}
	for _, g := range guests {
		g.ask("find layer", "size=2048 ro=1")
		g.ask("head layer", "layer")
	}
	if err := guests[0].AddDisk(ctx, vmm.Disk{Serial: "writer", File: open(os.O_RDWR)}); err == nil {
		t.Error("an image that others read can be written")
	}
	for _, g := range guests {
		if err := g.RemoveDisk(ctx, "layer"); err != nil {
			t.Fatal(err)
		}
	}
	if err := guests[0].AddDisk(ctx, vmm.Disk{Serial: "writer", File: open(os.O_RDWR)}); err != nil {
		t.Errorf("an image nobody uses any more cannot be written: %v", err)
	}
	if err := guests[1].AddDisk(ctx, vmm.Disk{Serial: "writer2", File: open(os.O_RDWR)}); err == nil {
		t.Error("two vms write one image")
	}
}

// TestScratchTemplate mounts the template with project quotas in a guest.
func TestScratchTemplate(t *testing.T) {
	for _, f := range variants(t) {
		t.Run(f.variant, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "scratch")
			if _, err := image.Scratch(t.Context(), path, 16<<30); err != nil {
				t.Fatal(err)
			}
			file, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			c := config(f)
			c.Disks = []vmm.Disk{{Serial: "scratch", File: file, Discard: true, Ephemeral: true}}
			g := boot(t, c)
			g.ask("find scratch", "size=33554432 ro=0")
			g.ask("mount scratch prjquota", "mounted")
		})
	}
}

func TestPauseAndConsole(t *testing.T) {
	f := variants(t)[0]
	w := blocked{make(chan struct{})}
	defer close(w.release)
	c := config(f)
	c.Console = w // never takes a byte: the guest must not notice
	g := boot(t, c)
	g.ask("print flood", "printed")
	if !strings.Contains(g.ConsoleTail(), "floodflood") {
		t.Errorf("console tail %q", g.ConsoleTail())
	}
	ctx, cancel := context.WithTimeout(t.Context(), bootTimeout)
	defer cancel()
	if err := g.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	g.send("echo later")
	if err := g.process.channel.SetReadDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if _, err := g.lines.Peek(1); err == nil {
		t.Error("a paused vm answers")
	}
	g.lines.Reset(g.Channel())
	if err := g.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	if got := g.line(); got != "later" {
		t.Errorf("resumed vm says %q", got)
	}
}

func TestStartErrorsNameTheRemedy(t *testing.T) {
	f := variants(t)[0]
	ctx, cancel := context.WithTimeout(t.Context(), bootTimeout)
	defer cancel()
	if _, err := Probe(ctx, "/nowhere/qemu", ""); err == nil || !strings.Contains(err.Error(), "install the Debian package qemu-system-x86") {
		t.Errorf("missing qemu: %v", err)
	}
	for name, tc := range map[string]struct {
		change func(*vmm.Config)
		want   string
	}{
		"kernel": {func(c *vmm.Config) { c.Kernel = "/nowhere" }, "make guest"},
		"memory": {func(c *vmm.Config) { c.MemoryBytes = 16 << 20 }, "raise the Pod's memory limit"},
		"cgroup": {func(c *vmm.Config) { c.Cgroups = []string{"/nowhere"} }, "enter cgroup"},
		"image": {func(c *vmm.Config) {
			c.Disks = []vmm.Disk{{Serial: "a", File: imageFile(t, "a", 1<<20), ReadOnly: false}}
		}, "start"},
	} {
		c := config(f)
		tc.change(&c)
		v, err := New(host(t)).Start(ctx, c)
		if err == nil {
			_ = v.Kill()
			<-v.Done()
			t.Errorf("%s: started", name)
		} else if !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v", name, err)
		} else {
			t.Logf("%s: %v", name, err)
		}
	}
}
