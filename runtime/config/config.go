// Package config is the shim's configuration file, hyper.toml: what the operator of a
// node decides about its Pods' virtual machines.
//
// It owns names, defaults and validation. It must not know where values are used, and
// nothing in it may come from a tenant.
package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"

	volume "github.com/hypernetes/hypernetes/volume/record"
)

// DefaultPath is read when containerd passes no ConfigPath; it need not exist.
const DefaultPath = "/etc/h8s/hyper.toml"

// Config is hyper.toml. Sizes are in the unit the key names.
type Config struct {
	// QEMU is the binary, a path or a name found in PATH.
	QEMU string `toml:"qemu"`
	// Kernel, Initrd and Scratch are the guest image: vmlinux, initramfs and the ext4
	// template of the writable disk. Scratch may be "": then writable layers are RAM.
	Kernel  string `toml:"kernel"`
	Initrd  string `toml:"initrd"`
	Scratch string `toml:"scratch"`
	// Cmdline is appended to the kernel's; "" takes "cmdline" of the kernel.json
	// beside the kernel, if there is one.
	Cmdline string `toml:"cmdline"`
	// Machine is QEMU's machine type, Accelerator "auto", "kvm" or "tcg".
	Machine     string `toml:"machine"`
	Accelerator string `toml:"accelerator"`
	// DefaultMemoryMiB is the guest's memory for a Pod without a memory limit;
	// MemoryOverheadMiB is added to a Pod's limit for the guest's kernel and agent.
	DefaultMemoryMiB  int64 `toml:"default_memory_mib"`
	MemoryOverheadMiB int64 `toml:"memory_overhead_mib"`
	// MinMemoryMiB is the least a guest gets, MaxMemoryMiB (0: none) the most.
	MinMemoryMiB int64 `toml:"min_memory_mib"`
	MaxMemoryMiB int64 `toml:"max_memory_mib"`
	// DefaultVCPUs is for a Pod without a CPU limit, MaxVCPUs the most a Pod gets.
	DefaultVCPUs int `toml:"default_vcpus"`
	MaxVCPUs     int `toml:"max_vcpus"`
	// ScratchSizeGiB is the size of a Pod's writable disk (sparse).
	ScratchSizeGiB int64 `toml:"scratch_size_gib"`
	// ScratchDir holds the (unnamed) writable disks; it must be on a disk.
	ScratchDir string `toml:"scratch_dir"`
	// UIDBase is the first of 65536 user ids VMMs run as, each at most one. Nodes on
	// one machine must not share them.
	UIDBase int `toml:"uid_base"`
	// KubeletRoot is the kubelet's root directory.
	KubeletRoot string `toml:"kubelet_root"`
	// StateDir holds the shims' state: what to collect after a crash.
	StateDir string `toml:"state_dir"`
	// VolumeRoot is where the node's volume plugin keeps its records.
	VolumeRoot string `toml:"volume_root"`
	// BootTimeoutSeconds is how long a guest may take until its agent answers,
	// HeartbeatSeconds how often the agent is asked, and HeartbeatTimeoutSeconds how
	// late an answer may be before the VM is taken for hung (0: by accelerator).
	BootTimeoutSeconds      int `toml:"boot_timeout_seconds"`
	HeartbeatSeconds        int `toml:"heartbeat_seconds"`
	HeartbeatTimeoutSeconds int `toml:"heartbeat_timeout_seconds"`
	// ParallelBoots is how many VMs of the node boot at once; others wait for their turn
	// (0: by accelerator and number of CPUs).
	ParallelBoots int `toml:"parallel_boots"`
	// Debug logs the guest's console and every call.
	Debug bool `toml:"debug"`
}

// Default returns what holds for keys a file does not name.
func Default() Config {
	return Config{
		QEMU: "qemu-system-x86_64", Machine: "q35", Accelerator: "auto",
		DefaultMemoryMiB: 256, MemoryOverheadMiB: 96, MinMemoryMiB: 160,
		DefaultVCPUs: 1, MaxVCPUs: runtime.NumCPU(),
		ScratchSizeGiB: 10, ScratchDir: "/var/lib/h8s-shim",
		UIDBase: 1879048192, KubeletRoot: "/var/lib/kubelet", StateDir: "/run/h8s-shim", VolumeRoot: volume.Root,
		BootTimeoutSeconds: 180, HeartbeatSeconds: 10,
	}
}

// Load reads the file at path, "" being DefaultPath. Unknown keys are errors, as a
// misspelt limit is no limit.
//
// Errors: errdefs.ErrNotFound for a file that is named and missing,
// errdefs.ErrInvalidArgument naming the key and the remedy.
func Load(path string) (Config, error) {
	c := Default()
	named := path != ""
	if !named {
		path = DefaultPath
	}
	b, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) && !named:
	case errors.Is(err, fs.ErrNotExist):
		return c, fmt.Errorf("configuration file %s: %w; remedy: write it or fix ConfigPath in containerd's runtime options", path, errdefs.ErrNotFound)
	case err != nil:
		return c, fmt.Errorf("read configuration: %w", err)
	}
	if err := parse(b, &c); err != nil {
		return c, fmt.Errorf("configuration file %s: %w", path, err)
	}
	if err := c.Validate(); err != nil {
		return c, fmt.Errorf("configuration file %s: %w", path, err)
	}
	if c.Cmdline == "" {
		c.Cmdline = kernelCmdline(c.Kernel)
	}
	return c, nil
}

func parse(b []byte, c *Config) error {
	d := toml.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	err := d.Decode(c)
	if err == nil {
		return nil
	}
	var strict *toml.StrictMissingError
	if errors.As(err, &strict) && len(strict.Errors) > 0 {
		return fmt.Errorf("unknown key %q: %w", fmt.Sprint(strict.Errors[0].Key()), errdefs.ErrInvalidArgument)
	}
	return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
}

// Validate checks every key by itself; files are not opened.
func (c Config) Validate() error {
	for _, p := range []struct{ key, value string }{
		{"kernel", c.Kernel}, {"initrd", c.Initrd}, {"kubelet_root", c.KubeletRoot}, {"state_dir", c.StateDir}, {"scratch_dir", c.ScratchDir}, {"volume_root", c.VolumeRoot},
	} {
		if !filepath.IsAbs(p.value) {
			return fmt.Errorf("%s is %q, must be an absolute path: %w", p.key, p.value, errdefs.ErrInvalidArgument)
		}
	}
	if c.Scratch != "" && !filepath.IsAbs(c.Scratch) {
		return fmt.Errorf("scratch is %q, must be an absolute path: %w", c.Scratch, errdefs.ErrInvalidArgument)
	}
	for _, v := range []struct {
		key              string
		value, low, high int64
	}{
		{"default_memory_mib", c.DefaultMemoryMiB, 64, 1 << 20},
		{"memory_overhead_mib", c.MemoryOverheadMiB, 0, 1 << 16},
		{"min_memory_mib", c.MinMemoryMiB, 64, 1 << 20},
		{"max_memory_mib", c.MaxMemoryMiB, 0, 1 << 30},
		{"default_vcpus", int64(c.DefaultVCPUs), 1, 1024},
		{"max_vcpus", int64(c.MaxVCPUs), int64(c.DefaultVCPUs), 1024},
		{"scratch_size_gib", c.ScratchSizeGiB, 1, 16 << 10},
		{"uid_base", int64(c.UIDBase), 1, 1<<31 - 1 - UIDs},
		{"boot_timeout_seconds", int64(c.BootTimeoutSeconds), 1, 3600},
		{"heartbeat_seconds", int64(c.HeartbeatSeconds), 1, 3600},
		{"parallel_boots", int64(c.ParallelBoots), 0, 100000},
		{"heartbeat_timeout_seconds", int64(c.HeartbeatTimeoutSeconds), 0, 3600},
	} {
		if v.value < v.low || v.value > v.high {
			return fmt.Errorf("%s is %d, must be %d to %d: %w", v.key, v.value, v.low, v.high, errdefs.ErrInvalidArgument)
		}
	}
	if c.Accelerator != "auto" && c.Accelerator != "kvm" && c.Accelerator != "tcg" {
		return fmt.Errorf("accelerator is %q, must be auto, kvm or tcg: %w", c.Accelerator, errdefs.ErrInvalidArgument)
	}
	if c.Machine != "q35" && c.Machine != "microvm" {
		return fmt.Errorf("machine is %q, must be q35 or microvm: %w", c.Machine, errdefs.ErrInvalidArgument)
	}
	return nil
}

// UIDs is how many user ids there are from UIDBase on.
const UIDs = 65536

// BootTimeout bounds the guest's boot.
func (c Config) BootTimeout() time.Duration {
	return time.Duration(c.BootTimeoutSeconds) * time.Second
}

// Heartbeat returns how often the agent is asked, and how late it may answer under an
// accelerator. A guest under software emulation on a busy host may stand still for long.
func (c Config) Heartbeat(accelerator string) (every, late time.Duration) {
	every = time.Duration(c.HeartbeatSeconds) * time.Second
	switch {
	case c.HeartbeatTimeoutSeconds > 0:
		late = time.Duration(c.HeartbeatTimeoutSeconds) * time.Second
	case accelerator == "kvm":
		late = 30 * time.Second
	default:
		late = 2 * time.Minute
	}
	return every, late
}

// kernelCmdline is what the builder of the kernel recommends, "" if it said nothing.
func kernelCmdline(kernel string) string {
	b, err := os.ReadFile(filepath.Join(filepath.Dir(kernel), "kernel.json"))
	if err != nil {
		return ""
	}
	var k struct {
		Cmdline string `json:"cmdline"`
	}
	if json.Unmarshal(b, &k) != nil {
		return ""
	}
	return k.Cmdline
}
