// Package vmmtest is a virtual machine for tests that do not need one: a vmm.VMM whose
// guests are goroutines that speak hyperstart.v1 over the real channel.
//
// It owns make-believe processes: "exit N", "echo WORDS", "cat", "sleep" and "term", which
// ends on SIGTERM. It must only be imported by tests.
package vmmtest

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/runtime/vmm"
)

// VMM starts make-believe VMs.
type VMM struct {
	// Boot delays a guest's first answer.
	Boot time.Duration
	// Mute guests never answer.
	Mute bool
	// Guest, if set, is what is at the other end of the channel instead of an Agent.
	Guest func(net.Conn)
	// Features, if set, is what Agents say they know.
	Features []string
	// Wire, if set, is between the channel and the Agent.
	Wire func(net.Conn) net.Conn

	mu  sync.Mutex
	vms []*VM
}

// VMs returns what has been started.
func (v *VMM) VMs() []*VM {
	v.mu.Lock()
	defer v.mu.Unlock()
	return append([]*VM(nil), v.vms...)
}

// Start implements vmm.VMM.
func (v *VMM) Start(_ context.Context, cfg vmm.Config) (vmm.VM, error) {
	// A real process, so that what looks at pids has one to look at.
	cmd := exec.Command("sleep", "3600")
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start make-believe vmm: %w", err)
	}
	host, guest := net.Pipe()
	if v.Wire != nil {
		guest = v.Wire(guest)
	}
	vm := &VM{Config: cfg, Agent: newAgent(), cmd: cmd, channel: host, done: make(chan struct{}), disks: map[string]bool{}, grown: map[string]int64{}, throttled: map[string]vmm.Throttle{}, faults: map[string]int{}}
	for _, d := range cfg.Disks {
		vm.disks[d.Serial] = true
	}
	if v.Features != nil {
		vm.Agent.Features = v.Features
	}
	vm.Agent.powerOff = func() { vm.end(vmm.ReasonShutdown) }
	go vm.wait()
	switch {
	case v.Guest != nil:
		go v.Guest(guest)
	case !v.Mute:
		go func() {
			<-time.After(v.Boot)
			vm.Agent.serve(guest)
		}()
	}
	v.mu.Lock()
	v.vms = append(v.vms, vm)
	v.mu.Unlock()
	return vm, nil
}

// VM is a make-believe VM.
type VM struct {
	Config vmm.Config
	// Agent is what runs in it.
	Agent *Agent

	cmd     *exec.Cmd
	channel net.Conn
	done    chan struct{}

	mu    sync.Mutex
	disks map[string]bool
	grown map[string]int64
	// throttled is what ThrottleDisk was told last.
	throttled map[string]vmm.Throttle
	// faults are how often disks have failed.
	faults map[string]int
	exit   vmm.Exit
}

func (v *VM) wait() {
	_ = v.cmd.Wait()
	v.Agent.stop()
	_ = v.channel.Close()
	v.mu.Lock()
	if v.exit.Reason == "" {
		v.exit.Reason, v.exit.Detail = vmm.ReasonKilled, "killed by somebody"
	}
	v.exit.At = time.Now()
	v.mu.Unlock()
	close(v.done)
}

func (v *VM) end(reason string) {
	v.mu.Lock()
	if v.exit.Reason == "" {
		v.exit.Reason = reason
	}
	v.mu.Unlock()
	_ = v.cmd.Process.Kill()
}

// Panic ends the VM as a guest kernel's panic would.
func (v *VM) Panic() { v.end(vmm.ReasonPanic) }

// Disks returns the serials plugged now.
func (v *VM) Disks() map[string]bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	out := map[string]bool{}
	for s := range v.disks {
		out[s] = true
	}
	return out
}

// PID implements vmm.VM.
func (v *VM) PID() int { return v.cmd.Process.Pid }

// Channel implements vmm.VM.
func (v *VM) Channel() io.ReadWriteCloser { return v.channel }

// AddDisk implements vmm.VM.
func (v *VM) AddDisk(_ context.Context, d vmm.Disk) error {
	if _, err := d.File.Stat(); err != nil {
		return fmt.Errorf("disk %s: %w", d.Serial, err)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.disks[d.Serial] {
		return fmt.Errorf("disk %s: %w", d.Serial, errdefs.ErrAlreadyExists)
	}
	v.disks[d.Serial] = true
	return nil
}

// RemoveDisk implements vmm.VM.
func (v *VM) RemoveDisk(_ context.Context, serial string) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.disks, serial)
	return nil
}

// GrowDisk implements vmm.VM.
func (v *VM) GrowDisk(_ context.Context, serial string, bytes int64, _ *vmm.NBD) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if !v.disks[serial] {
		return fmt.Errorf("disk %s: %w", serial, errdefs.ErrNotFound)
	}
	v.grown[serial] = bytes
	return nil
}

// ThrottleDisk implements vmm.VM.
func (v *VM) ThrottleDisk(_ context.Context, serial string, t vmm.Throttle) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if !v.disks[serial] {
		return fmt.Errorf("disk %s: %w", serial, errdefs.ErrNotFound)
	}
	v.throttled[serial] = t
	return nil
}

// Throttled returns what ThrottleDisk was told of a disk.
func (v *VM) Throttled(serial string) vmm.Throttle {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.throttled[serial]
}

// Faults implements vmm.VM.
func (v *VM) Faults(serial string) int {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.faults[serial]
}

// Break has a disk fail n times.
func (v *VM) Break(serial string, n int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.faults[serial] += n
}

// Grown returns what GrowDisk was told of a disk, 0 for nothing.
func (v *VM) Grown(serial string) int64 {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.grown[serial]
}

// Pause implements vmm.VM.
func (v *VM) Pause(context.Context) error { return v.cmd.Process.Signal(os.Interrupt) }

// Resume implements vmm.VM.
func (v *VM) Resume(context.Context) error { return nil }

// Kill implements vmm.VM.
func (v *VM) Kill() error {
	v.end(vmm.ReasonKilled)
	return nil
}

// Done implements vmm.VM.
func (v *VM) Done() <-chan struct{} { return v.done }

// Exit implements vmm.VM.
func (v *VM) Exit() vmm.Exit {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.exit
}
