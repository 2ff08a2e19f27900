package podspec

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hypernetes/hypernetes/runtime/config"
)

func testConfig() config.Config {
	c := config.Default()
	c.MaxVCPUs = 4
	return c
}

// options are made with the CRI's own package: the test that our part of it is the same
// on the wire.
func options(t testing.TB, c *runtimev1.PodSandboxConfig) *anypb.Any {
	t.Helper()
	b, err := proto.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	return &anypb.Any{TypeUrl: "runtime.v1.PodSandboxConfig", Value: b}
}

func full() *runtimev1.PodSandboxConfig {
	return &runtimev1.PodSandboxConfig{
		Metadata: &runtimev1.PodSandboxMetadata{Name: "web", Namespace: "blue", Uid: "u-1", Attempt: 2},
		Hostname: "web", LogDirectory: "/var/log/pods/x",
		DnsConfig:    &runtimev1.DNSConfig{Servers: []string{"10.96.0.10", "fd00::a"}, Searches: []string{"blue.svc.cluster.local", "svc.cluster.local"}, Options: []string{"ndots:5"}},
		PortMappings: []*runtimev1.PortMapping{{ContainerPort: 80}},
		Labels:       map[string]string{"app": "web"},
		Annotations:  map[string]string{"a": "b"},
		Linux: &runtimev1.LinuxPodSandboxConfig{
			CgroupParent: "/kubepods/burstable/podu-1",
			Sysctls:      map[string]string{"net.core.somaxconn": "512"},
			Resources:    &runtimev1.LinuxContainerResources{MemoryLimitInBytes: 64<<20 + 1, CpuQuota: 150000, CpuPeriod: 100000},
			SecurityContext: &runtimev1.LinuxSandboxSecurityContext{
				NamespaceOptions: &runtimev1.NamespaceOption{Pid: runtimev1.NamespaceMode_CONTAINER},
			},
		},
		Windows: &runtimev1.WindowsPodSandboxConfig{},
	}
}

func TestParse(t *testing.T) {
	for _, prefix := range []string{"", "type.googleapis.com/"} {
		o := options(t, full())
		o.TypeUrl = prefix + o.TypeUrl
		p, err := Parse(o, testConfig())
		if err != nil {
			t.Fatal(err)
		}
		if p.Name != "web" || p.Namespace != "blue" || p.UID != "u-1" || p.Hostname != "web" || p.Annotations["a"] != "b" {
			t.Errorf("names: %+v", p)
		}
		if p.MemoryBytes != (65+96)<<20 || p.VCPUs != 2 || p.CgroupParent != "/kubepods/burstable/podu-1" {
			t.Errorf("sizes: %+v", p)
		}
		if p.SharePIDNamespace || p.HostNetwork {
			t.Errorf("namespaces: %+v", p)
		}
		want := "nameserver 10.96.0.10\nnameserver fd00::a\nsearch blue.svc.cluster.local svc.cluster.local\noptions ndots:5\n"
		if string(p.ResolvConf) != want {
			t.Errorf("resolv.conf: %q", p.ResolvConf)
		}
		if p.Sysctls["net.core.somaxconn"] != "512" || p.Sysctls["net.ipv4.ip_unprivileged_port_start"] != "0" {
			t.Errorf("sysctls: %v", p.Sysctls)
		}
	}
}

func TestParseNothing(t *testing.T) {
	p, err := Parse(nil, testConfig())
	if err != nil || p.MemoryBytes != 256<<20 || p.VCPUs != 1 || p.ResolvConf != nil {
		t.Errorf("got %+v, %v", p, err)
	}
}

func TestParseRefuses(t *testing.T) {
	for name, change := range map[string]func(*runtimev1.PodSandboxConfig){
		"hostname":      func(c *runtimev1.PodSandboxConfig) { c.Hostname = "a/b" },
		"search":        func(c *runtimev1.PodSandboxConfig) { c.DnsConfig.Searches = []string{"a\nnameserver 1.2.3.4"} },
		"cgroup_parent": func(c *runtimev1.PodSandboxConfig) { c.Linux.CgroupParent = "/a/../../b" },
		"systemd":       func(c *runtimev1.PodSandboxConfig) { c.Linux.CgroupParent = "kubepods-pod1.slice" },
		"userns_options": func(c *runtimev1.PodSandboxConfig) {
			c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = &runtimev1.UserNamespace{Mode: runtimev1.NamespaceMode_POD}
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := full()
			change(c)
			if _, err := Parse(options(t, c), testConfig()); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), name) {
				t.Errorf("got %v", err)
			}
		})
	}
	if _, err := Parse(&anypb.Any{TypeUrl: "other"}, testConfig()); !errdefs.IsInvalidArgument(err) {
		t.Errorf("type: %v", err)
	}
}

func TestSizes(t *testing.T) {
	c := testConfig()
	for _, tc := range []struct{ limit, want int64 }{
		{0, 256 << 20}, {1, 160 << 20}, {1 << 30, (1024 + 96) << 20}, {1<<63 - 1, 1 << 50},
	} {
		if got := Memory(tc.limit, c); got != tc.want {
			t.Errorf("Memory(%d) = %d, want %d", tc.limit, got, tc.want)
		}
	}
	for _, tc := range []struct {
		quota, period int64
		want          int
	}{{0, 0, 1}, {-1, 100000, 1}, {1000, 100000, 1}, {100000, 100000, 1}, {100001, 100000, 2}, {1 << 62, 1, 4}} {
		if got := VCPUs(tc.quota, tc.period, c); got != tc.want {
			t.Errorf("VCPUs(%d, %d) = %d, want %d", tc.quota, tc.period, got, tc.want)
		}
	}
}

func FuzzParse(f *testing.F) {
	b, err := proto.Marshal(full())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := Parse(&anypb.Any{TypeUrl: typeName, Value: b}, testConfig())
		if err != nil {
			return
		}
		if p.MemoryBytes < 160<<20 || p.MemoryBytes%miB != 0 || p.VCPUs < 1 || p.VCPUs > 4 {
			t.Errorf("size %d bytes, %d CPUs", p.MemoryBytes, p.VCPUs)
		}
		if !strings.HasPrefix(p.CgroupParent, "/") || strings.Contains(p.CgroupParent+"/", "/../") {
			t.Errorf("cgroup %q", p.CgroupParent)
		}
	})
}
