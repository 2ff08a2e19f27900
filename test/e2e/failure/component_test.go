package failure

import (
	"fmt"
	"net"
	"strings"
	"testing"

	"github.com/hypernetes/hypernetes/cluster/status"
	"github.com/hypernetes/hypernetes/cluster/supervisor"
)

// TestContainerdKilled: Pods live on, and the new containerd finds their shims again.
func TestContainerdKilled(t *testing.T) { componentKilled(t, "containerd") }

// TestKubeletKilled: Pods live on.
func TestKubeletKilled(t *testing.T) { componentKilled(t, "kubelet") }

// TestControlPlaneKilled: Pods live on without an API server and without etcd.
func TestControlPlaneKilled(t *testing.T) { componentKilled(t, "etcd", "kube-apiserver") }

// componentKilled kills components and checks that they come back and that Pods have
// not noticed.
func componentKilled(t *testing.T, names ...string) {
	s := set(t)
	old := map[string]supervisor.Status{}
	for _, name := range names {
		c, err := s.component(name)
		if err != nil {
			t.Fatal(err)
		}
		old[name] = c
	}
	for _, name := range names {
		kill(t, old[name].PID)
	}
	for _, name := range names {
		s.Until(name+" is ready again", later, func() bool {
			c, err := s.component(name)
			return err == nil && c.State == supervisor.Ready && c.PID != old[name].PID
		})
		c, _ := s.component(name)
		t.Logf("%s: process %d, then %d, ready after %.1f s", name, old[name].PID, c.PID, c.ReadySeconds)
	}
	s.unharmed()
	s.newPods()
	s.strike()
}

// TestSupervisorKilled: without h8s the API is not published and nothing is respawned,
// but everything runs on; the next `h8s up` takes it over and repairs what died since.
func TestSupervisorKilled(t *testing.T) {
	s := set(t)
	st, err := s.status()
	if err != nil {
		t.Fatal(err)
	}
	kill(t, st.PID)
	s.gone("h8s", st.PID)

	out, code := s.h8s("status")
	if code == 0 || !strings.Contains(out, string(status.Headless)) || !strings.Contains(out, "h8s up") {
		t.Errorf("h8s status without its daemon: exit code %d, want another, the word %q and what to do:\n%s", code, status.Headless, out)
	}
	if conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", st.Settings.APIPort)); err == nil {
		_ = conn.Close()
		t.Error("somebody still listens on the API port")
	}
	pids := map[string]int{}
	for _, c := range st.Components {
		pids[c.Name] = c.PID
	}
	kill(t, pids["kube-scheduler"])

	if out, code := s.h8s("up"); code != 0 {
		t.Fatalf("h8s up: exit code %d\n%s", code, out)
	}
	again, err := s.status()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range again.Components {
		adopted := c.PID == pids[c.Name]
		if adopted == (c.Name == "kube-scheduler") {
			t.Errorf("component %s: process %d, then %d", c.Name, pids[c.Name], c.PID)
		}
	}
	s.unharmed()
	s.newPods()
	s.strike()
}

// unharmed checks that the victim is the same VM with the same containers, that exec
// works and that no line of its log is missing or doubled.
func (s *scene) unharmed() {
	s.t.Helper()
	if now := s.vm("victim"); now != s.victim {
		s.t.Errorf("the Pod is another: was %+v, is %+v", s.victim, now)
	}
	s.Ready("victim", "neighbour")
	for _, name := range []string{"one", "two"} {
		if n := s.Pod("victim").Container(name).RestartCount; n != 0 {
			s.t.Errorf("container %s was restarted %d times", name, n)
		}
	}
	if got := s.Exec("victim/two", "echo", "alive"); got != "alive" {
		s.t.Errorf("exec: %q", got)
	}
	lines := len(s.log())
	s.Until("the log grows", soon, func() bool { return len(s.log()) > lines+2 })
	for i, line := range s.log() {
		if want := fmt.Sprintf("line %d", i); line != want {
			s.t.Fatalf("the log has %q where %q should be", line, want)
		}
	}
}

func (s *scene) log() []string {
	s.t.Helper()
	return strings.Split(strings.TrimSpace(s.Logs("victim/one")), "\n")
}

// newPods checks that the node still starts Pods.
func (s *scene) newPods() {
	s.t.Helper()
	s.Kubectl("run", "late", "--image=h8s.local/busybox:1", "--restart=Never", "--command", "--", "sh", "-c", "exit 3")
	if end := s.Ended("late", "late"); end.ExitCode != 3 {
		s.t.Errorf("a new Pod ended with %+v, want exit code 3", end)
	}
}
