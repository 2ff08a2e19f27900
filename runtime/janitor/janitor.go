// Package janitor gives back what a dead shim had taken of the host: its VMM, control
// groups, network joins, socket and state.
//
// It owns the order of giving back and works from records alone. It must not touch
// anything of a shim that lives.
package janitor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/runtime/nic"
	"github.com/hypernetes/hypernetes/runtime/record"
	"github.com/hypernetes/hypernetes/runtime/vmuser"
)

// Leftovers lists the sandboxes whose shim is dead.
func Leftovers(stateDir string) ([]*record.Record, error) {
	all, err := record.List(stateDir)
	var dead []*record.Record
	for _, r := range all {
		if !r.Shim.Alive() {
			dead = append(dead, r)
		}
	}
	return dead, err
}

// Sweep collects every leftover and returns how many there were. A node calls it before
// it starts containerd.
func Sweep(ctx context.Context, stateDir string) (int, error) {
	dead, err := Leftovers(stateDir)
	errs := []error{err}
	for _, r := range dead {
		errs = append(errs, Collect(ctx, stateDir, r))
	}
	return len(dead), errors.Join(errs...)
}

// Collect gives back everything of one sandbox. It may be repeated; what fails keeps
// the record, so that the next one tries again.
//
// Errors: errdefs.ErrFailedPrecondition if its shim lives.
func Collect(ctx context.Context, stateDir string, r *record.Record) error {
	if r.Shim.Alive() {
		return fmt.Errorf("sandbox %s: its shim (process %d) lives: %w", r.ID, r.Shim.PID, errdefs.ErrFailedPrecondition)
	}
	if err := r.VMM.Kill(ctx, vmmEnd); err != nil {
		return fmt.Errorf("sandbox %s: vmm: %w", r.ID, err)
	}
	if err := r.Storage.Kill(ctx, vmmEnd); err != nil {
		return fmt.Errorf("sandbox %s: storage daemon: %w", r.ID, err)
	}
	var errs []error
	if r.Network.NetNS != "" {
		errs = append(errs, nic.Detach(ctx, r.Network))
	}
	if r.Cgroup != nil {
		errs = append(errs, r.Cgroup.Remove())
	}
	if r.Socket != "" {
		if err := os.Remove(r.Socket); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	errs = append(errs, vmuser.Sweep(filepath.Join(stateDir, vmuser.Dir)))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("sandbox %s: %w", r.ID, err)
	}
	return r.Remove(stateDir)
}

// vmmEnd bounds how long a killed VMM may take to be gone: its descriptors hold disks
// and taps.
const vmmEnd = 5 * time.Second

// dying bounds how long a killed shim may take to be gone: the kernel closes its socket,
// which is when containerd calls delete, before it frees a VM's memory and ends.
const dying = 2 * time.Second

// Dead tells whether a sandbox's shim is dead. A process that is still there but has
// closed its socket is waited for, a moment.
func Dead(ctx context.Context, r *record.Record) bool {
	if !r.Shim.Alive() {
		return true
	}
	var d net.Dialer
	if conn, err := d.DialContext(ctx, "unix", r.Socket); err == nil {
		_ = conn.Close()
		return false
	}
	return r.Shim.AwaitEnd(ctx, dying) == nil
}

// Find returns the record a containerd id (a sandbox's or a container's) belongs to;
// sandboxFile is the bundle's "sandbox" file, which names a container's sandbox.
func Find(stateDir, namespace, id, bundle string) (*record.Record, error) {
	if b, err := os.ReadFile(filepath.Join(bundle, "sandbox")); err == nil && bundle != "" {
		id = string(b)
	}
	return record.Load(stateDir, namespace, id)
}
