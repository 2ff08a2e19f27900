// Command h8s-guest-image makes the guest's kernel, initramfs and scratch disk template
// (package guest/image); `make guest` runs it.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/hypernetes/hypernetes/guest/image"
)

func main() {
	cache := os.Getenv("H8S_CACHE")
	if cache == "" {
		dir, err := os.UserCacheDir()
		if err != nil {
			dir = "/var/cache"
		}
		cache = filepath.Join(dir, "h8s")
	}
	o := image.Options{Progress: os.Stderr}
	flag.StringVar(&o.Out, "out", "out/share", "`directory` to fill")
	flag.StringVar(&o.Cache, "cache", cache, "`directory` of downloads and compiled kernels ($H8S_CACHE)")
	flag.StringVar(&o.Init, "init", "out/bin/hyperstart", "hyperstart `binary`, the guest's PID 1")
	flag.StringVar(&o.Kernel, "kernel", os.Getenv("H8S_KERNEL"), "stock, hyper or auto ($H8S_KERNEL)")
	flag.IntVar(&o.Jobs, "jobs", 0, "parallel compilations; 0 is one per CPU")
	gib := flag.Int64("scratch-gib", 16, "size of the scratch disk template in GiB")
	flag.Parse()
	o.ScratchBytes = *gib << 30
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := image.Build(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "h8s-guest-image:", err)
		os.Exit(1)
	}
}
