package hyperctl

import (
	"errors"
	"regexp"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestNewSpec(t *testing.T) {
	s, err := newSpec(runOptions{
		image: "docker.io/library/nginx:1.22", command: []string{"-g", "daemon off;"}, pull: "missing",
		memory: "64M", cpus: 0.5, publish: []string{"8080:80", "53/udp"}, env: []string{"A=b=c"},
		user: "33:34", entrypoint: "/nginx", tty: true,
	}, "/logs", "/h8s/x")
	if err != nil {
		t.Fatal(err)
	}
	if !regexp.MustCompile(`^nginx-[0-9]{10}$`).MatchString(s.pod.Metadata.Name) {
		t.Errorf("name %q", s.pod.Metadata.Name)
	}
	r := s.pod.Linux.Resources
	if r.MemoryLimitInBytes != 64<<20 || r.CpuQuota != 50000 || r.CpuPeriod != 100000 || r.CpuShares != 512 {
		t.Errorf("resources %v", r)
	}
	if p := s.pod.PortMappings; len(p) != 2 || p[0].HostPort != 8080 || p[0].ContainerPort != 80 || p[1].ContainerPort != 53 || p[1].Protocol.String() != "UDP" {
		t.Errorf("ports %v", p)
	}
	c := s.container
	if !c.Tty || !c.Stdin || !c.StdinOnce || c.Command[0] != "/nginx" || strings.Join(c.Args, " ") != "-g daemon off;" {
		t.Errorf("container %v", c)
	}
	if c.Linux.SecurityContext.RunAsUser.Value != 33 || c.Linux.SecurityContext.RunAsGroup.Value != 34 {
		t.Errorf("user %v", c.Linux.SecurityContext)
	}
	if string(c.Envs[0].Value) != "b=c" || s.pod.Linux.CgroupParent != "/h8s/x" || !strings.HasPrefix(s.pod.LogDirectory, "/logs/nginx-") {
		t.Errorf("env %v, cgroup %q, logs %q", c.Envs, s.pod.Linux.CgroupParent, s.pod.LogDirectory)
	}
}

func TestNewSpecRefuses(t *testing.T) {
	for want, change := range map[string]func(*runOptions){
		`memory "lots"`:      func(o *runOptions) { o.memory = "lots" },
		`memory "1M"`:        func(o *runOptions) { o.memory = "1M" },
		`memory "9999999G"`:  func(o *runOptions) { o.memory = "9999999G" },
		`cpus -1`:            func(o *runOptions) { o.cpus = -1 },
		`name "No"`:          func(o *runOptions) { o.name = "No" },
		`name "../x"`:        func(o *runOptions) { o.name = "../x" },
		`publish "0:80"`:     func(o *runOptions) { o.publish = []string{"0:80"} },
		`publish "80:70000"`: func(o *runOptions) { o.publish = []string{"80:70000"} },
		`publish "80/icmp"`:  func(o *runOptions) { o.publish = []string{"80/icmp"} },
		`env "=x"`:           func(o *runOptions) { o.env = []string{"=x"} },
		`user "ann:1"`:       func(o *runOptions) { o.user = "ann:1" },
		`pull "sometimes"`:   func(o *runOptions) { o.pull = "sometimes" },
		"--rm needs":         func(o *runOptions) { o.detach, o.remove = true, true },
	} {
		o := runOptions{image: "x", pull: "missing"}
		change(&o)
		if _, err := newSpec(o, "/logs", ""); !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want an invalid argument with %q", err, want)
		}
	}
}

func TestParseMemory(t *testing.T) {
	for s, want := range map[string]int64{"8388608": 8 << 20, "64M": 64 << 20, "64MiB": 64 << 20, "1g": 1 << 30, "65536k": 64 << 20} {
		if got, err := parseMemory(s); err != nil || got != want {
			t.Errorf("%s: %d, %v; want %d", s, got, err, want)
		}
	}
}

func TestAutoName(t *testing.T) {
	for image, want := range map[string]string{
		"ubuntu:trusty": `^ubuntu-\d{10}$`, "registry:5000/a/B_c@sha256:00": `^b-c-\d{10}$`, "x/" + strings.Repeat("y", 60): `^pod-\d{10}$`,
	} {
		if got := autoName(image); !regexp.MustCompile(want).MatchString(got) || !podName.MatchString(got) {
			t.Errorf("%s: %s", image, got)
		}
	}
}
