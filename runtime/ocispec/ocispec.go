// Package ocispec rewrites a container's OCI runtime spec, made by containerd for the
// host, to what the guest runs.
//
// It is pure. It owns which fields name something of the host and what becomes of them;
// mounts have been planned by package volume before. It must not open anything.
package ocispec

import (
	"encoding/json"
	"fmt"
	"path"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// MaxSpec bounds config.json, in bytes: it must fit a message to the guest.
const MaxSpec = 3 << 20

// PIDNamespace says whose processes a container sees.
type PIDNamespace struct {
	// Sandbox: every process of the Pod's containers.
	Sandbox bool
	// PID is the reported pid of the container to join; 0 for none.
	PID uint32
}

// Parse reads config.json.
//
// Errors: errdefs.ErrInvalidArgument, naming the field.
func Parse(b []byte) (*specs.Spec, error) {
	if len(b) > MaxSpec {
		return nil, fmt.Errorf("runtime spec of %d bytes is over the limit of %d: %w", len(b), MaxSpec, errdefs.ErrInvalidArgument)
	}
	var s specs.Spec
	if err := json.Unmarshal(b, &s); err != nil {
		return nil, fmt.Errorf("runtime spec: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if s.Process == nil || len(s.Process.Args) == 0 {
		return nil, fmt.Errorf("runtime spec: process.args is empty: %w", errdefs.ErrInvalidArgument)
	}
	if s.Linux == nil {
		return nil, fmt.Errorf("runtime spec: linux is missing: %w", errdefs.ErrInvalidArgument)
	}
	return &s, nil
}

// Guest returns the spec for the guest, with the planned mounts, and the PID namespace
// the container wants. The spec given is not changed.
//
// Errors: errdefs.ErrInvalidArgument for namespaces the VM has not.
func Guest(in *specs.Spec, id string, mounts []specs.Mount) ([]byte, PIDNamespace, error) {
	s, linux, process := *in, *in.Linux, *in.Process
	s.Linux, s.Process = &linux, &process
	s.Mounts = mounts
	root := specs.Root{Path: "rootfs"}
	if in.Root != nil {
		root.Readonly = in.Root.Readonly
	}
	s.Root = &root
	// Hooks name programs of the host; NRI and CDI put some there.
	s.Hooks = nil
	s.Hostname, s.Domainname = "", ""
	process.ApparmorProfile, process.SelinuxLabel = "", ""
	linux.MountLabel = ""
	linux.CgroupsPath = id
	linux.IntelRdt = nil
	linux.UIDMappings, linux.GIDMappings = nil, nil
	var pid PIDNamespace
	var err error
	if linux.Namespaces, pid, err = namespaces(in.Linux.Namespaces); err != nil {
		return nil, pid, err
	}
	out, err := json.Marshal(&s)
	if err != nil {
		return nil, pid, fmt.Errorf("write runtime spec: %w", err)
	}
	if len(out) > MaxSpec {
		return nil, pid, fmt.Errorf("runtime spec of %d bytes is over the limit of %d: %w", len(out), MaxSpec, errdefs.ErrInvalidArgument)
	}
	return out, pid, nil
}

// namespaces drops the host's paths: network, IPC and UTS are the VM's.
func namespaces(in []specs.LinuxNamespace) ([]specs.LinuxNamespace, PIDNamespace, error) {
	var out []specs.LinuxNamespace
	var pid PIDNamespace
	for _, n := range in {
		switch n.Type {
		case specs.UserNamespace:
			return nil, pid, fmt.Errorf("runtime spec: linux.namespaces: a user namespace is not supported, the VM has its own users already; remedy: leave hostUsers out: %w", errdefs.ErrInvalidArgument)
		case specs.PIDNamespace:
			var err error
			if pid, err = pidNamespace(n.Path); err != nil {
				return nil, pid, err
			}
		}
		out = append(out, specs.LinuxNamespace{Type: n.Type})
	}
	return out, pid, nil
}

// pidNamespace reads "/proc/<n>/ns/pid"; any other path is the Pod's.
func pidNamespace(p string) (PIDNamespace, error) {
	if p == "" {
		return PIDNamespace{}, nil
	}
	rest, ok := strings.CutPrefix(path.Clean(p), "/proc/")
	number, found := strings.CutSuffix(rest, "/ns/pid")
	if !ok || !found {
		return PIDNamespace{Sandbox: true}, nil
	}
	n, err := strconv.ParseUint(number, 10, 32)
	if err != nil {
		return PIDNamespace{}, fmt.Errorf("runtime spec: linux.namespaces: pid namespace %.100q: %w", p, errdefs.ErrInvalidArgument)
	}
	if n == 0 {
		return PIDNamespace{Sandbox: true}, nil
	}
	return PIDNamespace{PID: uint32(n)}, nil
}

// containerType is the annotation containerd's CRI plugin sets to a container's kind.
const containerType = "io.kubernetes.cri.container-type"

// IsSandbox tells whether the spec is of a pause container: containerd has been
// configured with another sandboxer than "shim".
func IsSandbox(s *specs.Spec) bool { return s.Annotations[containerType] == "sandbox" }
