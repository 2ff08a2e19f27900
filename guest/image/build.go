package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/containerd/errdefs"
)

// Options of Build.
type Options struct {
	// Out receives vmlinux, initramfs.img, kernel.json, scratch.ext4 and a directory per
	// kernel variant.
	Out string
	// Cache keeps downloads and compiled kernels between builds.
	Cache string
	// Init is the hyperstart binary.
	Init string
	// Kernel is "stock", "hyper" (compiled if need be) or "auto": hyper if the cache has
	// it, else stock.
	Kernel string
	// ScratchBytes is the size of the scratch disk's template.
	ScratchBytes int64
	// Jobs limits a kernel's compilation; 0 is one per CPU.
	Jobs int
	// Progress receives one line per step that takes time.
	Progress io.Writer
}

type builder struct{ Options }

func (b *builder) say(format string, args ...any) {
	fmt.Fprintf(b.Progress, "guest image: "+format+"\n", args...)
}

func (b *builder) jobs() int {
	if b.Jobs > 0 {
		return b.Jobs
	}
	return runtime.NumCPU()
}

// Build brings Out up to date and leaves alone what already is. Only one Build may use
// a cache at a time.
func Build(ctx context.Context, o Options) error {
	b := &builder{o}
	if b.Progress == nil {
		b.Progress = io.Discard
	}
	kernels, err := b.kernels(ctx)
	if err != nil {
		return err
	}
	for _, k := range kernels {
		if err := b.variant(k); err != nil {
			return fmt.Errorf("%s image: %w", k.Variant, err)
		}
	}
	if err := b.choose(kernels[0]); err != nil {
		return err
	}
	return b.scratch(ctx)
}

// kernels returns the variants to install, the chosen one first.
func (b *builder) kernels(ctx context.Context) ([]Kernel, error) {
	switch b.Kernel {
	case "stock":
		k, err := b.stock(ctx)
		return []Kernel{k}, err
	case "hyper":
		k, err := b.hyper(ctx, false)
		return []Kernel{k}, err
	case "auto", "":
		stock, err := b.stock(ctx)
		if err != nil {
			return nil, err
		}
		hyper, err := b.hyper(ctx, true)
		if err != nil {
			return []Kernel{stock}, nil
		}
		return []Kernel{hyper, stock}, nil
	}
	return nil, fmt.Errorf("kernel %q: %w: stock, hyper or auto", b.Kernel, errdefs.ErrInvalidArgument)
}

// variant installs a kernel and its initramfs as Out/<variant>.
func (b *builder) variant(k Kernel) error {
	dir := filepath.Join(b.Out, k.Variant)
	for _, name := range []string{"vmlinux", "bzImage"} {
		if err := b.install(filepath.Join(k.dir, name), filepath.Join(dir, name)); err != nil && !(name == "bzImage" && errors.Is(err, fs.ErrNotExist)) {
			return err
		}
	}
	modules := ""
	if k.Modules {
		modules = k.modulesDir()
	}
	img, err := Initramfs(b.Init, modules)
	if err != nil {
		return err
	}
	path := filepath.Join(dir, "initramfs.img")
	if old, err := os.ReadFile(path); err != nil || !bytes.Equal(old, img) {
		if err := writeFile(path, img, 0o644); err != nil {
			return err
		}
		b.say("%s initramfs: %.1f MB", k.Variant, float64(len(img))/1e6)
	}
	return k.save(dir)
}

// install copies from to to unless size and time say it did so before.
func (b *builder) install(from, to string) error {
	st, err := os.Stat(from)
	if err != nil {
		return err
	}
	if old, err := os.Stat(to); err == nil && old.Size() == st.Size() && old.ModTime().Equal(st.ModTime()) {
		return nil
	}
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	if err := writeFile(to, data, 0o644); err != nil {
		return err
	}
	return os.Chtimes(to, time.Time{}, st.ModTime())
}

// choose points Out's kernel, initramfs and description at a variant.
func (b *builder) choose(k Kernel) error {
	for _, name := range []string{"vmlinux", "initramfs.img", "kernel.json"} {
		link, target := filepath.Join(b.Out, name), filepath.Join(k.Variant, name)
		if now, err := os.Readlink(link); err == nil && now == target {
			continue
		}
		if err := os.Remove(link); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := os.Symlink(target, link); err != nil {
			return err
		}
		if name == "vmlinux" {
			b.say("kernel: %s (%s)", k.Variant, k.Release)
		}
	}
	return nil
}

func (b *builder) scratch(ctx context.Context) error {
	path := filepath.Join(b.Out, "scratch.ext4")
	if st, err := os.Stat(path); err == nil && st.Size() == b.ScratchBytes {
		return nil
	}
	n, err := Scratch(ctx, path, b.ScratchBytes)
	if err != nil {
		return err
	}
	b.say("scratch disk template: %d GiB, %.1f MB allocated", b.ScratchBytes>>30, float64(n)/1e6)
	return nil
}
