package bench

import (
	"context"
	"path/filepath"
	"testing"
	"time"

	"github.com/hypernetes/hypernetes/runtime/vmm/qemu"
	"github.com/hypernetes/hypernetes/test/artifacts"
)

// TestFloor proves that the floor is what it claims to be: the guest's kernel runs
// the 200 bytes as PID 1 and QEMU ends by itself.
func TestFloor(t *testing.T) {
	host, err := qemu.Probe(t.Context(), "", "")
	if err != nil {
		t.Skipf("no QEMU: %v", err)
	}
	ks, err := kernels(artifacts.Dir())
	if err != nil {
		t.Skipf("no guest kernel: %v", err)
	}
	initrd := filepath.Join(t.TempDir(), "initrd")
	if err := writeFloorInitrd(initrd); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	wall, cpu, err := floor(ctx, host, ks[0], initrd, 256)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("kernel %s: first instruction after %v, %v of CPU", ks[0].Variant, wall, cpu)
}
