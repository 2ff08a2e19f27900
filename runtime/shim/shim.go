// Package shim is containerd-shim-hyper-v2 put together: one process that is one Pod's
// way to containerd.
//
// It owns which real thing stands behind each interface. It must not decide anything
// about Pods.
package shim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	probe "github.com/hypernetes/hypernetes/api/probe/v1"
	"github.com/hypernetes/hypernetes/runtime/bootstrap"
	"github.com/hypernetes/hypernetes/runtime/config"
	"github.com/hypernetes/hypernetes/runtime/disk"
	"github.com/hypernetes/hypernetes/runtime/events"
	"github.com/hypernetes/hypernetes/runtime/janitor"
	"github.com/hypernetes/hypernetes/runtime/nic"
	"github.com/hypernetes/hypernetes/runtime/prober"
	"github.com/hypernetes/hypernetes/runtime/sandbox"
	"github.com/hypernetes/hypernetes/runtime/service"
	"github.com/hypernetes/hypernetes/runtime/storage"
	"github.com/hypernetes/hypernetes/runtime/turn"
	"github.com/hypernetes/hypernetes/runtime/vmm"
	"github.com/hypernetes/hypernetes/runtime/vmm/qemu"
	"github.com/hypernetes/hypernetes/runtime/vmuser"
)

// Program returns the shim of this version.
func Program(version string) bootstrap.Program {
	return bootstrap.Program{
		Check:  check,
		Serve:  func(ctx context.Context, p bootstrap.Params, l net.Listener) error { return serve(ctx, p, l, version) },
		Delete: collect,
		Sweep:  sweep,
	}
}

func check(p bootstrap.Params) error {
	c, err := config.Load(p.ConfigPath)
	if err != nil {
		return err
	}
	for _, f := range []struct{ key, path string }{{"kernel", c.Kernel}, {"initrd", c.Initrd}, {"scratch", c.Scratch}} {
		if _, err := os.Stat(f.path); f.path != "" && err != nil {
			return fmt.Errorf("%s: %w: %w; remedy: make guest, or set %s in hyper.toml", f.key, err, errdefs.ErrNotFound, f.key)
		}
	}
	return checkKernel(c.Kernel)
}

// checkKernel looks whether a file may be a kernel. QEMU takes anything for one and
// then says that it is too old.
func checkKernel(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("kernel: %w", err)
	}
	defer f.Close()
	const setupMagic = 0x202 // of the boot protocol's header (Linux, x86/boot.rst)
	head := make([]byte, setupMagic+4)
	n, err := f.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("kernel: %w", err)
	}
	if head = head[:n]; bytes.HasPrefix(head, []byte("\x7fELF")) || bytes.HasSuffix(head, []byte("HdrS")) {
		return nil
	}
	return fmt.Errorf("kernel %s is neither a vmlinux nor a bzImage: %w; remedy: make guest, or set kernel in hyper.toml", path, errdefs.ErrInvalidArgument)
}

// flushTime bounds sending the last events.
const flushTime = 3 * time.Second

func serve(ctx context.Context, p bootstrap.Params, l net.Listener, version string) error {
	cfg, err := config.Load(p.ConfigPath)
	if err != nil {
		return err
	}
	if cfg.Debug {
		_ = log.SetLevel("debug")
	}
	publisher := events.New(p.Address, p.Namespace)
	s := sandbox.New(sandbox.Options{
		ID: p.ID, Namespace: p.Namespace, Bundle: p.Bundle, Socket: p.Socket, Version: version,
		Config: cfg, Host: host{cfg}, Publisher: publisher, Prober: prober.Prober{Socket: probe.Socket},
	})
	idle := time.AfterFunc(idleAfter, debug.FreeOSMemory)
	defer idle.Stop()
	err = service.New(s, version).Serve(ctx, l)
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushTime)
	defer cancel()
	if cerr := s.Close(stop); err == nil {
		err = cerr
	}
	publisher.Close(stop)
	return err
}

// idleAfter is when most Pods have started: what starting took is given back then.
const idleAfter = 30 * time.Second

// collect is harmless while the sandbox's shim lives: containerd calls it for every
// container that ends.
func collect(ctx context.Context, p bootstrap.Params) error {
	cfg, err := config.Load(p.ConfigPath)
	if err != nil {
		// Without a configuration there is nowhere to look but the default place.
		cfg = config.Default()
	}
	r, err := janitor.Find(cfg.StateDir, p.Namespace, p.ID, p.Bundle)
	switch {
	case errdefs.IsNotFound(err):
		return nil
	case err != nil:
		return err
	}
	if !janitor.Dead(ctx, r) {
		return nil
	}
	return janitor.Collect(ctx, cfg.StateDir, r)
}

func sweep(ctx context.Context, p bootstrap.Params) error {
	cfg, err := config.Load(p.ConfigPath)
	if err != nil {
		return err
	}
	_, err = janitor.Sweep(ctx, cfg.StateDir)
	return err
}

// host is the machine.
type host struct{ cfg config.Config }

// VMM implements sandbox.Host.
func (h host) VMM(ctx context.Context) (vmm.VMM, string, error) {
	facts, err := qemu.Probe(ctx, h.cfg.QEMU, filepath.Join(h.cfg.StateDir, "qemu.json"))
	if err != nil {
		return nil, "", err
	}
	accel := h.cfg.Accelerator
	if accel == "auto" {
		accel = facts.Accelerator
	}
	return qemu.New(facts), accel, nil
}

// Attach implements sandbox.Host.
func (host) Attach(ctx context.Context, netns string) (*nic.Attachment, error) {
	return nic.Attach(ctx, netns)
}

// Detach implements sandbox.Host.
func (host) Detach(ctx context.Context, s nic.State) error {
	if s.NetNS == "" {
		return nil
	}
	return nic.Detach(ctx, s)
}

// Forward implements sandbox.Host.
func (host) Forward(ctx context.Context, netns string, dial nic.Dialer) (io.Closer, error) {
	return nic.NewPortForwarder(ctx, netns, dial)
}

// Scratch implements sandbox.Host.
func (h host) Scratch(ctx context.Context) (*os.File, error) {
	if h.cfg.Scratch == "" {
		return nil, nil
	}
	if err := os.MkdirAll(h.cfg.ScratchDir, 0o700); err != nil {
		return nil, fmt.Errorf("scratch_dir: %w", err)
	}
	return disk.NewScratch(ctx, h.cfg.ScratchDir, h.cfg.Scratch, h.cfg.ScratchSizeGiB<<30)
}

// Storage implements sandbox.Host.
func (host) Storage(ctx context.Context, c storage.Config) (sandbox.Storage, error) {
	return storage.Start(ctx, c)
}

// Turn implements sandbox.Host. Emulated, a boot keeps a CPU busy from start to end.
func (h host) Turn(ctx context.Context, accelerator string) (func(), error) {
	count := h.cfg.ParallelBoots
	if count == 0 {
		count = 2 * runtime.NumCPU()
		if accelerator == "kvm" {
			count *= 8
		}
	}
	return turn.Places{Group: h.cfg.StateDir, Count: count}.Take(ctx)
}

// User implements sandbox.Host.
func (h host) User(name string) (int, func(), error) {
	u, err := vmuser.Take(filepath.Join(h.cfg.StateDir, vmuser.Dir), h.cfg.UIDBase, config.UIDs, name)
	if err != nil {
		return 0, nil, err
	}
	return u.ID, u.Release, nil
}
