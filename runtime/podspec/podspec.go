// Package podspec reads a Pod's CRI description and decides what its VM looks like: its
// size, its names, its resolver, its kernel settings.
//
// It is pure: the same description gives the same VM, nothing is opened. It must not know
// the VMM, the agent or cgroups.
package podspec

import (
	"bytes"
	"fmt"
	"path"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	cri "github.com/hypernetes/hypernetes/api/cri/v1"
	"github.com/hypernetes/hypernetes/runtime/config"
)

// typeName is what CRI calls the message in an Any, with or without a prefix.
const typeName = "runtime.v1.PodSandboxConfig"

// maxConfig bounds the description, in bytes; Kubernetes bounds annotations at 256 KiB.
const maxConfig = 2 << 20

const miB = 1 << 20

// Pod is what the shim needs to know of a Pod.
type Pod struct {
	Name, Namespace, UID string
	Annotations          map[string]string
	Hostname             string
	// ResolvConf is nil if the description says nothing of DNS.
	ResolvConf []byte
	Sysctls    map[string]string
	// CgroupParent is the Pod's cgroup, relative to each hierarchy's root, "/" first.
	CgroupParent string
	HostNetwork  bool
	// SharePIDNamespace is whether containers see each other's processes.
	SharePIDNamespace bool
	MemoryBytes       int64
	VCPUs             int
}

// Parse reads the options of a CreateSandbox request. nil options are a sandbox without
// Kubernetes: everything has its default.
//
// Errors: errdefs.ErrInvalidArgument, naming the field.
func Parse(options *anypb.Any, cfg config.Config) (Pod, error) {
	in := &cri.PodSandboxConfig{}
	if options != nil && (options.TypeUrl != "" || len(options.Value) > 0) {
		if name := options.TypeUrl[strings.LastIndex(options.TypeUrl, "/")+1:]; name != typeName {
			return Pod{}, fmt.Errorf("sandbox options are a %.100q, must be a %s: %w", options.TypeUrl, typeName, errdefs.ErrInvalidArgument)
		}
		if len(options.Value) > maxConfig {
			return Pod{}, fmt.Errorf("sandbox options of %d bytes are over the limit of %d: %w", len(options.Value), maxConfig, errdefs.ErrInvalidArgument)
		}
		if err := proto.Unmarshal(options.Value, in); err != nil {
			return Pod{}, fmt.Errorf("sandbox options: %w: %w", err, errdefs.ErrInvalidArgument)
		}
	}
	return fromCRI(in, cfg)
}

func fromCRI(in *cri.PodSandboxConfig, cfg config.Config) (Pod, error) {
	l := in.GetLinux()
	ns := l.GetSecurityContext().GetNamespaceOptions()
	if m := ns.GetUsernsOptions(); m != nil && m.Mode == cri.NamespaceMode_POD {
		return Pod{}, fmt.Errorf("userns_options: a Pod with hostUsers: false is not supported, its VM has its own users already; remedy: leave hostUsers out: %w", errdefs.ErrInvalidArgument)
	}
	p := Pod{
		Name: in.GetMetadata().GetName(), Namespace: in.GetMetadata().GetNamespace(), UID: in.GetMetadata().GetUid(),
		Annotations: in.GetAnnotations(), Hostname: in.GetHostname(),
		HostNetwork:       ns.GetNetwork() == cri.NamespaceMode_NODE,
		SharePIDNamespace: ns.GetPid() == cri.NamespaceMode_POD,
		MemoryBytes:       Memory(l.GetResources().GetMemoryLimitInBytes(), cfg),
		VCPUs:             VCPUs(l.GetResources().GetCpuQuota(), l.GetResources().GetCpuPeriod(), cfg),
		Sysctls:           sysctls(l.GetSysctls()),
	}
	var err error
	if p.CgroupParent, err = cgroupParent(l.GetCgroupParent()); err != nil {
		return Pod{}, err
	}
	if len(p.Hostname) > 64 || strings.ContainsAny(p.Hostname, "\x00\n/") {
		return Pod{}, fmt.Errorf("hostname %.100q: must have at most 64 characters, no slash or newline: %w", p.Hostname, errdefs.ErrInvalidArgument)
	}
	if p.ResolvConf, err = resolvConf(in.GetDnsConfig()); err != nil {
		return Pod{}, err
	}
	return p, nil
}

// Memory is the size of the guest's RAM in bytes, a multiple of 1 MiB, for a Pod with a
// memory limit (0: none).
func Memory(limit int64, cfg config.Config) int64 {
	mib := cfg.DefaultMemoryMiB
	if limit > 0 {
		// Rounded up without overflow: limits near 2^63 exist in the wild.
		mib = limit/miB + cfg.MemoryOverheadMiB
		if limit%miB != 0 {
			mib++
		}
	}
	mib = max(mib, cfg.MinMemoryMiB)
	if cfg.MaxMemoryMiB > 0 {
		mib = min(mib, cfg.MaxMemoryMiB)
	}
	return min(mib, 1<<30) * miB
}

// VCPUs is how many virtual CPUs a CPU limit wants: the quota rounded up.
func VCPUs(quota, period int64, cfg config.Config) int {
	n := int64(cfg.DefaultVCPUs)
	if quota > 0 && period > 0 {
		n = quota / period
		if quota%period != 0 {
			n++
		}
	}
	return int(max(1, min(n, int64(cfg.MaxVCPUs))))
}

// sysctls are the Pod's, and those every container runtime sets for a Pod's network.
func sysctls(in map[string]string) map[string]string {
	out := map[string]string{
		"net.ipv4.ip_unprivileged_port_start": "0",
		"net.ipv4.ping_group_range":           "0 2147483647",
	}
	for k, v := range in {
		out[k] = v
	}
	return out
}

var slice = regexp.MustCompile(`\.slice(:|$)`)

func cgroupParent(p string) (string, error) {
	if p == "" {
		return "/h8s-pods", nil
	}
	if slice.MatchString(p) {
		return "", fmt.Errorf("cgroup_parent %.200q is systemd's; remedy: cgroupDriver: cgroupfs in the kubelet's configuration: %w", p, errdefs.ErrInvalidArgument)
	}
	if strings.Contains(p, "\x00") || strings.Contains("/"+p+"/", "/../") || len(p) > 1024 {
		return "", fmt.Errorf("cgroup_parent %.200q: must be a path without \"..\": %w", p, errdefs.ErrInvalidArgument)
	}
	return path.Clean("/" + p), nil
}

// resolvConf writes resolv.conf, bounded as the resolver's own reader is.
func resolvConf(d *cri.DNSConfig) ([]byte, error) {
	if d == nil || len(d.Servers)+len(d.Searches)+len(d.Options) == 0 {
		return nil, nil
	}
	var b bytes.Buffer
	for _, f := range []struct {
		key    string
		values []string
		joined bool
	}{{"nameserver", d.Servers, false}, {"search", d.Searches, true}, {"options", d.Options, true}} {
		for _, v := range f.values {
			if v == "" || strings.ContainsAny(v, " \t\r\n\x00") {
				return nil, fmt.Errorf("dns_config: %s %.100q: must be one word: %w", f.key, v, errdefs.ErrInvalidArgument)
			}
		}
		switch {
		case len(f.values) == 0:
		case f.joined:
			fmt.Fprintf(&b, "%s %s\n", f.key, strings.Join(f.values, " "))
		default:
			for _, v := range f.values {
				fmt.Fprintf(&b, "%s %s\n", f.key, v)
			}
		}
	}
	if b.Len() > 64<<10 {
		return nil, fmt.Errorf("dns_config of %d bytes is over the limit of 64 KiB: %w", b.Len(), errdefs.ErrInvalidArgument)
	}
	return b.Bytes(), nil
}

// Hosts is /etc/hosts of containers that bring none, for the first addresses of the Pod.
func Hosts(hostname string, addresses []string) []byte {
	var b bytes.Buffer
	b.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n")
	for _, a := range addresses {
		if ip, _, ok := strings.Cut(a, "/"); ok && hostname != "" {
			fmt.Fprintf(&b, "%s\t%s\n", ip, hostname)
		}
	}
	return b.Bytes()
}
