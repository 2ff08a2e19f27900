// Package spec fits an OCI runtime spec made for a host to the guest.
//
// It is pure: it owns which fields mean something inside the Pod's VM. It must not
// touch the file system or run anything.
package spec

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"path"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/containerd/errdefs"
)

// Guest is what the spec is fitted to.
type Guest struct {
	// ID of the container; its cgroup is CgroupParent/ID.
	ID, CgroupParent string
	Terminal         bool
	// PIDNamespace is the path of the PID namespace to join, "" for an own one.
	PIDNamespace string
	// Shm, ResolvConf, Hostname, Hosts are guest paths of the sandbox's files; one
	// that is empty is not mounted.
	Shm, ResolvConf, Hostname, Hosts string
	// Own is the prefix of guest paths a mount source may have to be taken as it is.
	Own string
	// Seccomp and Swap say what the kernel has.
	Seccomp, Swap bool
	// Devices are the raw disks the container gets.
	Devices []Device
}

// Device is a block device of the guest in a container.
type Device struct {
	Path         string
	Major, Minor int64
	ReadOnly     bool
}

// Fit rewrites the spec and returns it with the sandbox's sysctls it asked for, which
// cannot be set by the runtime as network, IPC and UTS namespaces are the guest's own.
func Fit(raw []byte, g Guest) ([]byte, map[string]string, error) {
	var s specs.Spec
	if err := json.Unmarshal(raw, &s); err != nil {
		return nil, nil, fmt.Errorf("parse runtime spec: %w: %w", errdefs.ErrInvalidArgument, err)
	}
	if s.Process == nil || len(s.Process.Args) == 0 {
		return nil, nil, fmt.Errorf("runtime spec: process.args is empty: %w", errdefs.ErrInvalidArgument)
	}
	if s.Linux == nil {
		s.Linux = &specs.Linux{}
	}
	if s.Root == nil {
		s.Root = &specs.Root{}
	}
	// What is used of later versions is the same in 1.0, the only one Debian's crun takes.
	s.Version = "1.0.2"
	s.Root.Path = "rootfs"
	s.Hooks = nil // they name programs of the host
	s.Hostname, s.Domainname = "", ""
	if err := fitNamespaces(&s, g); err != nil {
		return nil, nil, err
	}
	if s.Linux.Seccomp != nil && !g.Seccomp {
		return nil, nil, fmt.Errorf("runtime spec: linux.seccomp: the guest kernel lacks seccomp filters; remedy: CONFIG_SECCOMP_FILTER, or seccompProfile Unconfined: %w", errdefs.ErrNotImplemented)
	}
	s.Linux.CgroupsPath = path.Join(g.CgroupParent, g.ID)
	s.Linux.IntelRdt, s.Linux.TimeOffsets = nil, nil
	s.Linux.Resources = fitResources(s.Linux.Resources, g.Swap)
	s.Linux.MountLabel = ""
	for _, d := range g.Devices {
		if err := fitDevice(s.Linux, d); err != nil {
			return nil, nil, err
		}
	}
	fitMounts(&s, g)
	fitProcess(s.Process, g.Terminal)
	sysctls := s.Linux.Sysctl
	s.Linux.Sysctl = nil
	out, err := json.Marshal(&s)
	if err != nil {
		return nil, nil, fmt.Errorf("write runtime spec: %w", err)
	}
	return out, sysctls, nil
}

// Process fits an OCI process for exec.
func Process(raw []byte, terminal bool) ([]byte, error) {
	var p specs.Process
	if err := json.Unmarshal(raw, &p); err != nil {
		return nil, fmt.Errorf("parse process: %w: %w", errdefs.ErrInvalidArgument, err)
	}
	if len(p.Args) == 0 {
		return nil, fmt.Errorf("process: args is empty: %w", errdefs.ErrInvalidArgument)
	}
	fitProcess(&p, terminal)
	return json.Marshal(&p)
}

// Resources fits an update's resources. Which devices a container may use does not
// change: an update repeats the host's rules, whose numbers are not the guest's.
func Resources(raw []byte, swap bool) ([]byte, error) {
	var r specs.LinuxResources
	if err := json.Unmarshal(raw, &r); err != nil {
		return nil, fmt.Errorf("parse resources: %w: %w", errdefs.ErrInvalidArgument, err)
	}
	r.Devices = nil
	return json.Marshal(fitResources(&r, swap))
}

// fitProcess drops labels of security modules the guest does not run.
func fitProcess(p *specs.Process, terminal bool) {
	p.Terminal = terminal
	p.ApparmorProfile, p.SelinuxLabel = "", ""
	if p.Cwd == "" {
		p.Cwd = "/"
	}
}

// fitNamespaces gives mount, PID and cgroup namespaces: the VM is the Pod's network, IPC
// and UTS namespace. The cgroup namespace is not asked for on a host with cgroup v1;
// without it a container would find the guest's root in /sys/fs/cgroup, not its limits.
func fitNamespaces(s *specs.Spec, g Guest) error {
	kept := []specs.LinuxNamespace{{Type: specs.PIDNamespace, Path: g.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.CgroupNamespace}}
	for _, ns := range s.Linux.Namespaces {
		if ns.Type == specs.UserNamespace {
			return fmt.Errorf("runtime spec: user namespaces (hostUsers: false) are not supported in the guest yet: %w", errdefs.ErrNotImplemented)
		}
	}
	s.Linux.Namespaces = kept
	s.Linux.UIDMappings, s.Linux.GIDMappings = nil, nil
	return nil
}

// fitResources drops what names the host's CPUs and memory nodes or what cgroup v2
// and this kernel have not.
func fitResources(r *specs.LinuxResources, swap bool) *specs.LinuxResources {
	if r == nil {
		return nil
	}
	if r.CPU != nil {
		r.CPU.Cpus, r.CPU.Mems = "", ""
		r.CPU.RealtimePeriod, r.CPU.RealtimeRuntime = nil, nil
	}
	if m := r.Memory; m != nil {
		//lint:ignore SA1019 a deprecated wish is dropped, not made
		m.Kernel, m.KernelTCP, m.Swappiness, m.DisableOOMKiller, m.UseHierarchy = nil, nil, nil, nil, nil
		if !swap {
			m.Swap = nil
		}
	}
	r.BlockIO, r.Network, r.Rdma = nil, nil, nil
	for k := range r.Unified {
		if strings.HasPrefix(k, "cpuset.") || !swap && strings.HasPrefix(k, "memory.swap.") {
			delete(r.Unified, k)
		}
	}
	return r
}

// fitDevice puts a device of the guest in the place of the host's of that path, whose
// numbers mean something else here.
func fitDevice(l *specs.Linux, d Device) error {
	if !path.IsAbs(d.Path) || path.Clean(d.Path) != d.Path || d.Path == "/" {
		return fmt.Errorf("device path %.200q: must be absolute and clean: %w", d.Path, errdefs.ErrInvalidArgument)
	}
	mode := fs.FileMode(0o660)
	node := specs.LinuxDevice{Path: d.Path, FileMode: &mode}
	if l.Resources == nil {
		l.Resources = &specs.LinuxResources{}
	}
	devices := l.Devices[:0:0]
	for _, old := range l.Devices {
		if path.Clean(old.Path) != d.Path {
			devices = append(devices, old)
			continue
		}
		node.FileMode, node.UID, node.GID = old.FileMode, old.UID, old.GID
		rules := l.Resources.Devices[:0:0]
		for _, r := range l.Resources.Devices {
			if !(r.Allow && r.Type == old.Type && r.Major != nil && *r.Major == old.Major && r.Minor != nil && *r.Minor == old.Minor) {
				rules = append(rules, r)
			}
		}
		l.Resources.Devices = rules
	}
	node.Type, node.Major, node.Minor = "b", d.Major, d.Minor
	l.Devices = append(devices, node)
	access := "rwm"
	if d.ReadOnly {
		access = "rm"
	}
	l.Resources.Devices = append(l.Resources.Devices, specs.LinuxDeviceCgroup{Allow: true, Type: "b", Major: &d.Major, Minor: &d.Minor, Access: access})
	return nil
}

// fitMounts gives every container the sandbox's shm and name files. A mount of the
// shim's own making (its source is a guest path) wins.
func fitMounts(s *specs.Spec, g Guest) {
	files := []struct{ dst, src string }{
		{"/dev/shm", g.Shm}, {"/etc/resolv.conf", g.ResolvConf}, {"/etc/hostname", g.Hostname}, {"/etc/hosts", g.Hosts},
	}
	for _, f := range files {
		kept := s.Mounts[:0:0]
		own := false
		for _, m := range s.Mounts {
			if path.Clean(m.Destination) == f.dst {
				if !strings.HasPrefix(m.Source, g.Own) {
					continue
				}
				own = true
			}
			kept = append(kept, m)
		}
		if !own && f.src != "" {
			kept = append(kept, specs.Mount{
				Destination: f.dst, Source: f.src, Type: "bind", Options: mountOptions(s, f.dst),
			})
		}
		s.Mounts = kept
	}
}

func mountOptions(s *specs.Spec, dst string) []string {
	o := []string{"rbind", "rprivate"}
	if dst == "/dev/shm" {
		return append(o, "nosuid", "nodev", "noexec")
	}
	if s.Root.Readonly {
		return append(o, "ro")
	}
	return append(o, "rw")
}
