package sandbox

import (
	"context"
	"fmt"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/runtime/disk"
	"github.com/hypernetes/hypernetes/runtime/vmm"
)

// layers are the read-only disks of the VM: each image layer is plugged once, however
// many containers use it.
type layers struct {
	vm   vmm.VM
	mu   sync.Mutex // held while plugging: the second user of a layer waits for it
	uses map[string]int
}

func newLayers(vm vmm.VM) *layers { return &layers{vm: vm, uses: map[string]int{}} }

// add plugs the files that are not plugged yet and returns their serials in order. On
// error none is used.
func (l *layers) add(ctx context.Context, paths []string) ([]string, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var serials []string
	for _, p := range paths {
		serial, err := l.add1(ctx, p)
		if err != nil {
			l.drop(context.WithoutCancel(ctx), serials)
			return nil, err
		}
		serials = append(serials, serial)
	}
	return serials, nil
}

func (l *layers) add1(ctx context.Context, path string) (string, error) {
	layer, err := disk.OpenLayer(path)
	if err != nil {
		return "", err
	}
	defer layer.Close()
	if l.uses[layer.Serial] == 0 {
		if err := l.vm.AddDisk(ctx, vmm.Disk{Serial: layer.Serial, File: layer.File, ReadOnly: true}); err != nil && !errdefs.IsAlreadyExists(err) {
			return "", fmt.Errorf("plug image layer %s: %w", path, err)
		}
	}
	l.uses[layer.Serial]++
	return layer.Serial, nil
}

// remove is add's inverse; the guest has unmounted them.
func (l *layers) remove(ctx context.Context, serials []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.drop(ctx, serials)
}

// drop unplugs what nobody uses any more. A disk that cannot be unplugged stays until
// the VM goes; it is read-only and harms nobody.
func (l *layers) drop(ctx context.Context, serials []string) {
	ctx, cancel := context.WithTimeout(ctx, guestTimeout)
	defer cancel()
	for _, s := range serials {
		if l.uses[s]--; l.uses[s] > 0 {
			continue
		}
		if err := l.vm.RemoveDisk(ctx, s); err != nil {
			l.uses[s] = 0
			continue
		}
		delete(l.uses, s)
	}
}
