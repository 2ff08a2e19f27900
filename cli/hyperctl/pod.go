package hyperctl

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"maps"
	"math/big"
	"path"
	"regexp"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Labels that Kubernetes' tools use as well, so that crictl shows our Pods.
const (
	namespace      = "hyper"
	labelManaged   = "io.hypernetes.hyperctl"
	labelPodName   = "io.kubernetes.pod.name"
	labelPodSpace  = "io.kubernetes.pod.namespace"
	labelPodUID    = "io.kubernetes.pod.uid"
	labelContainer = "io.kubernetes.container.name"
)

// runOptions are the flags of `run`.
type runOptions struct {
	image   string
	command []string

	name       string
	hostname   string
	memory     string
	cpus       float64
	publish    []string
	env        []string
	workdir    string
	entrypoint string
	user       string
	detach     bool
	stdin      bool
	tty        bool
	remove     bool
	pull       string
	readOnly   bool
	privileged bool
}

var (
	podName    = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$`)
	memorySize = regexp.MustCompile(`^([0-9]+)([kKmMgG]?)i?[bB]?$`)
)

// spec is what a run sends to the runtime.
type spec struct {
	pod       *cri.PodSandboxConfig
	container *cri.ContainerConfig
}

// newSpec turns flags into CRI messages. logDir is where Pods' log
// directories go, cgroupParent may be empty.
func newSpec(o runOptions, logDir, cgroupParent string) (*spec, error) {
	if err := o.validate(); err != nil {
		return nil, err
	}
	name := o.name
	if name == "" {
		name = autoName(o.image)
	}
	resources, err := o.resources()
	if err != nil {
		return nil, err
	}
	ports, err := parsePorts(o.publish)
	if err != nil {
		return nil, err
	}
	uid := newUID()
	hostname := o.hostname
	if hostname == "" {
		hostname = strings.ReplaceAll(name, ".", "-")
	}
	labels := map[string]string{labelManaged: "true", labelPodName: name, labelPodSpace: namespace, labelPodUID: uid}
	pod := &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: name, Namespace: namespace, Uid: uid},
		Hostname:     hostname,
		LogDirectory: path.Join(logDir, name+"-"+uid[:8]),
		PortMappings: ports,
		Labels:       labels,
		Annotations:  map[string]string{labelManaged + "/image": o.image},
		Linux: &cri.LinuxPodSandboxConfig{
			CgroupParent:    cgroupParent,
			Resources:       resources,
			SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: namespaces(), Privileged: o.privileged},
		},
	}
	container, err := o.container(labels, resources)
	if err != nil {
		return nil, err
	}
	return &spec{pod: pod, container: container}, nil
}

// container is the Pod's only one; the Pod has its limits as well.
func (o runOptions) container(podLabels map[string]string, resources *cri.LinuxContainerResources) (*cri.ContainerConfig, error) {
	env, err := parseEnv(o.env)
	if err != nil {
		return nil, err
	}
	labels := maps.Clone(podLabels)
	labels[labelContainer] = "main"
	c := &cri.ContainerConfig{
		Metadata:   &cri.ContainerMetadata{Name: "main"},
		Image:      &cri.ImageSpec{Image: o.image, UserSpecifiedImage: o.image},
		Args:       o.command,
		WorkingDir: o.workdir,
		Envs:       env,
		Labels:     labels,
		LogPath:    "main.log",
		Stdin:      o.stdin || o.tty,
		StdinOnce:  (o.stdin || o.tty) && !o.detach,
		Tty:        o.tty,
		Linux: &cri.LinuxContainerConfig{
			Resources: resources,
			SecurityContext: &cri.LinuxContainerSecurityContext{
				Privileged: o.privileged, ReadonlyRootfs: o.readOnly, NamespaceOptions: namespaces(),
			},
		},
	}
	if o.entrypoint != "" {
		c.Command = []string{o.entrypoint}
	}
	return c, setUser(c.Linux.SecurityContext, o.user)
}

func namespaces() *cri.NamespaceOption {
	return &cri.NamespaceOption{Network: cri.NamespaceMode_POD, Pid: cri.NamespaceMode_CONTAINER, Ipc: cri.NamespaceMode_POD}
}

func (o runOptions) validate() error {
	switch {
	case o.name != "" && !podName.MatchString(o.name):
		return fmt.Errorf("name %q: use lower-case letters, digits, '-' and '.', at most 63: %w", o.name, errdefs.ErrInvalidArgument)
	case o.detach && o.remove:
		return fmt.Errorf("--rm needs a run in the foreground: nobody would remove a detached Pod; leave out --detach or --rm: %w", errdefs.ErrInvalidArgument)
	case o.pull != "missing" && o.pull != "always" && o.pull != "never":
		return fmt.Errorf("pull %q: want missing, always or never: %w", o.pull, errdefs.ErrInvalidArgument)
	case o.cpus < 0 || o.cpus > 1024:
		return fmt.Errorf("cpus %v: want 0 (no limit) to 1024: %w", o.cpus, errdefs.ErrInvalidArgument)
	}
	return nil
}

// resources are the limits of the Pod and of its only container.
func (o runOptions) resources() (*cri.LinuxContainerResources, error) {
	r := &cri.LinuxContainerResources{}
	if o.memory != "" {
		n, err := parseMemory(o.memory)
		if err != nil {
			return nil, err
		}
		r.MemoryLimitInBytes = n
	}
	if o.cpus > 0 {
		r.CpuPeriod = 100000
		r.CpuQuota = max(1000, int64(o.cpus*100000))
		r.CpuShares = max(2, int64(o.cpus*1024))
	}
	return r, nil
}

// parseMemory reads bytes with an optional unit, K, M or G (powers of 1024).
func parseMemory(s string) (int64, error) {
	m := memorySize.FindStringSubmatch(s)
	if m == nil {
		return 0, fmt.Errorf("memory %q: want a number with K, M or G, as 256M: %w", s, errdefs.ErrInvalidArgument)
	}
	n, err := strconv.ParseInt(m[1], 10, 64)
	shift := map[string]uint{"": 0, "k": 10, "m": 20, "g": 30}[strings.ToLower(m[2])]
	if err != nil || n > (1<<50)>>shift {
		return 0, fmt.Errorf("memory %q: too large: %w", s, errdefs.ErrInvalidArgument)
	}
	if n <<= shift; n < 4<<20 {
		return 0, fmt.Errorf("memory %q: at least 4M: %w", s, errdefs.ErrInvalidArgument)
	}
	return n, nil
}

// parsePorts reads HOSTPORT:PORT[/tcp|udp|sctp].
func parsePorts(list []string) ([]*cri.PortMapping, error) {
	protocols := map[string]cri.Protocol{"tcp": cri.Protocol_TCP, "udp": cri.Protocol_UDP, "sctp": cri.Protocol_SCTP}
	var out []*cri.PortMapping
	for _, p := range list {
		spec, protocol, given := strings.Cut(p, "/")
		if !given {
			protocol = "tcp"
		}
		host, ctr, two := strings.Cut(spec, ":")
		if !two {
			ctr = host
		}
		h, err1 := strconv.ParseUint(host, 10, 16)
		c, err2 := strconv.ParseUint(ctr, 10, 16)
		kind, known := protocols[protocol]
		if err1 != nil || err2 != nil || h == 0 || c == 0 || !known {
			return nil, fmt.Errorf("publish %q: want HOSTPORT:PORT or HOSTPORT:PORT/udp: %w", p, errdefs.ErrInvalidArgument)
		}
		out = append(out, &cri.PortMapping{Protocol: kind, HostPort: int32(h), ContainerPort: int32(c)})
	}
	return out, nil
}

func parseEnv(list []string) ([]*cri.KeyValue, error) {
	var out []*cri.KeyValue
	for _, e := range list {
		k, v, ok := strings.Cut(e, "=")
		if !ok || k == "" {
			return nil, fmt.Errorf("env %q: want NAME=VALUE: %w", e, errdefs.ErrInvalidArgument)
		}
		out = append(out, &cri.KeyValue{Key: k, Value: []byte(v)})
	}
	return out, nil
}

// setUser reads USER or UID or UID:GID.
func setUser(sc *cri.LinuxContainerSecurityContext, user string) error {
	if user == "" {
		return nil
	}
	u, g, group := strings.Cut(user, ":")
	uid, err := strconv.ParseInt(u, 10, 32)
	if err != nil {
		if group {
			return fmt.Errorf("user %q: a group needs numbers, as 1000:1000: %w", user, errdefs.ErrInvalidArgument)
		}
		sc.RunAsUsername = user
		return nil
	}
	sc.RunAsUser = &cri.Int64Value{Value: uid}
	if !group {
		return nil
	}
	gid, err := strconv.ParseInt(g, 10, 32)
	if err != nil {
		return fmt.Errorf("user %q: want UID:GID: %w", user, errdefs.ErrInvalidArgument)
	}
	sc.RunAsGroup = &cri.Int64Value{Value: gid}
	return nil
}

// autoName is the image's base name and ten digits, as hyperctl always did.
func autoName(image string) string {
	base := path.Base(image)
	base, _, _ = strings.Cut(base, "@")
	base, _, _ = strings.Cut(base, ":")
	base = strings.Trim(regexp.MustCompile(`[^a-z0-9.-]`).ReplaceAllString(strings.ToLower(base), "-"), "-.")
	if base == "" || len(base) > 40 {
		base = "pod"
	}
	n, err := rand.Int(rand.Reader, big.NewInt(10_000_000_000))
	if err != nil {
		panic(err) // crypto/rand never fails on Linux
	}
	return fmt.Sprintf("%s-%010d", base, n)
}

func newUID() string {
	b := make([]byte, 16)
	if _, err := rand.Read(b); err != nil {
		panic(err) // crypto/rand never fails on Linux
	}
	return hex.EncodeToString(b)
}
