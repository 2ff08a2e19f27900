package badinput

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/cluster/layout"
	"github.com/hypernetes/hypernetes/cluster/status"
	"github.com/hypernetes/hypernetes/cluster/supervisor"
	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// TestHyperConfig gives the runtime of a running node a configuration with which no VM
// can start. It is read for every Pod, so the node works again when it is repaired.
func TestHyperConfig(t *testing.T) {
	c := testcluster.Up(t)
	before := quiet(t, c)
	n := c.Namespace(t)
	file := filepath.Join("/var/lib/h8s", c.Node, "etc", "hyper.toml")
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	restore := func() {
		if err := os.WriteFile(file, good, 0o600); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(restore)
	for _, tc := range []struct{ name, old, new, want string }{
		{"no-kernel", `(?m)^kernel = .*$`, `kernel = "/nonexistent/vmlinux"`, `^FailedCreatePodSandBox: .*kernel.*/nonexistent/vmlinux.*make guest`},
		{"no-qemu", `(?m)^qemu = .*$|\A`, "qemu = \"/nonexistent/qemu-system-x86_64\"\n", `^FailedCreatePodSandBox: .*/nonexistent/qemu-system-x86_64.*install the Debian package qemu-system-x86`},
		{"not-a-kernel", `(?m)^kernel = .*$`, `kernel = "/etc/hostname"`, `^FailedCreatePodSandBox: .*kernel.*/etc/hostname`},
		{"bad-value", `(?m)^default_memory_mib = .*$`, `default_memory_mib = -3`, `^FailedCreatePodSandBox: .*default_memory_mib`},
		{"unknown-key", `\A`, "colour = \"blue\"\n", `^FailedCreatePodSandBox: .*colour`},
		{"not-toml", `\A`, "[[[\n", `^FailedCreatePodSandBox: .*hyper.toml`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := n.For(t)
			done := false
			bad := regexp.MustCompile(tc.old).ReplaceAllStringFunc(string(good), func(was string) string {
				if done {
					return was
				}
				done = true
				return tc.new
			})
			if bad == string(good) {
				t.Fatalf("nothing in hyper.toml matches %q:\n%s", tc.old, good)
			}
			if err := os.WriteFile(file, []byte(bad), 0o600); err != nil {
				t.Fatal(err)
			}
			apply(t, n, pod(tc.name, busybox, nil))
			event(t, n, tc.name, tc.want)
			restore()
			n.Kubectl("delete", "pod", tc.name, "--wait", "--timeout=2m")
		})
	}
	apply(t, n, pod("repaired", busybox, nil))
	n.Ready("repaired")
	without(t, n, before)
}

// TestKubeletConfig breaks the kubelet's configuration under a running node: h8s status
// says which component fails and in its own words why, Pods run on, and stopping and
// starting h8s repairs it without touching them.
func TestKubeletConfig(t *testing.T) {
	c := testcluster.Up(t)
	n := c.Namespace(t)
	apply(t, n, pod("bystander", busybox, nil))
	n.Ready("bystander")
	l, err := layout.NewNode(c.Node)
	if err != nil {
		t.Fatal(err)
	}
	config := l.Config("kubelet.yaml")
	good, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := os.Stat(config); err == nil {
			_ = os.WriteFile(config, good, 0o600) // only needed if the test has failed
		}
	})
	if err := os.WriteFile(config, append(good, "\nmaxPods: many\n"...), 0o600); err != nil {
		t.Fatal(err)
	}
	before := kubelet(t, l)
	if err := unix.Kill(before.PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	n.Until("the kubelet is given up on for now", 60*time.Second, func() bool {
		s := kubelet(t, l)
		return s.State == supervisor.Failing || (s.State == supervisor.Backoff && s.Restarts > before.Restarts+1)
	})
	r := run(t, nil, "h8s", "status", "--name", c.Node)
	if !strings.Contains(r.stdout, "degraded") || !regexp.MustCompile(`kubelet is (failing|backoff): .*(maxPods|kubelet.yaml|config)`).MatchString(r.stdout) {
		t.Errorf("h8s status does not say what is wrong with the kubelet:\n%s", r)
	}
	t.Logf("h8s status:\n%s", r)

	if r := run(t, nil, "h8s", "down", "--keep-pods", "--name", c.Node); r.code != 0 {
		t.Fatalf("h8s down --keep-pods: %s", r)
	}
	if r := run(t, nil, "h8s", "up", "--name", c.Node); r.code != 0 {
		t.Fatalf("h8s up: %s", r)
	}
	n.Ready("bystander")
	if restarts := n.Pod("bystander").Container("main").RestartCount; restarts != 0 {
		t.Errorf("the Pod was restarted %d times", restarts)
	}
	// A kubelet that has just started does not know its Pods at once.
	n.Until("exec works", told, func() bool {
		out, err := n.Try("exec", "bystander", "--", "echo", "alive")
		return err == nil && out == "alive\n"
	})
}

func kubelet(t *testing.T, l layout.Node) supervisor.Status {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	st, err := status.NewClient(l.StatusSocket()).Status(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range st.Components {
		if c.Name == "kubelet" {
			return c
		}
	}
	t.Fatal("the node has no kubelet")
	return supervisor.Status{}
}
