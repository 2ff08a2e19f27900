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
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

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
	if err := killVMM(ctx, r.VMM); err != nil {
		return fmt.Errorf("sandbox %s: %w", r.ID, err)
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

// killVMM kills a VMM that has outlived its shim and waits for its end: its descriptors
// hold disks and taps.
func killVMM(ctx context.Context, p record.Process) error {
	if !p.Alive() {
		return nil
	}
	fd, err := unix.PidfdOpen(p.PID, 0)
	if err != nil {
		if errors.Is(err, unix.ESRCH) {
			return nil
		}
		return fmt.Errorf("vmm %d: %w", p.PID, err)
	}
	f := os.NewFile(uintptr(fd), "pidfd")
	defer f.Close()
	// The descriptor pins the process: what it names now is what will be killed.
	if !p.Alive() {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill vmm %d: %w", p.PID, err)
	}
	wait := 5 * time.Second
	if d, ok := ctx.Deadline(); ok {
		wait = min(wait, time.Until(d))
	}
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(wait/time.Millisecond))
	if err == nil && n == 0 {
		return fmt.Errorf("vmm %d does not end: %w", p.PID, errdefs.ErrAborted)
	}
	return nil
}

// Find returns the record a containerd id (a sandbox's or a container's) belongs to;
// sandboxFile is the bundle's "sandbox" file, which names a container's sandbox.
func Find(stateDir, namespace, id, bundle string) (*record.Record, error) {
	if b, err := os.ReadFile(filepath.Join(bundle, "sandbox")); err == nil && bundle != "" {
		id = string(b)
	}
	return record.Load(stateDir, namespace, id)
}
