package failure

import (
	"fmt"
	"net"
	"strings"
	"testing"

	"github.com/hypernetes/hypernetes/cluster/status"
	"github.com/hypernetes/hypernetes/cluster/supervisor"
)

// victim is the Pod that must not be harmed by the death of a component.
const victim = "victim"

// TestComponentKilled kills the components of the node one after another, and h8s
// itself: Pods live on, in the same VMs, with not a line of their logs lost.
func TestComponentKilled(t *testing.T) {
	s := set(t, victim)
	// The new containerd finds the shims again.
	s.run("containerd", func(s *scene) { s.killComponents("containerd") })
	s.run("kubelet", func(s *scene) { s.killComponents("kubelet") })
	// Two at once: Pods live on without an API server and without its store.
	s.run("control plane", func(s *scene) { s.killComponents("etcd", "kube-apiserver") })
	s.run("h8s", (*scene).killSupervisor)
	s.strike()
}

// killComponents kills components and checks that they come back and that Pods have
// not noticed.
func (s *scene) killComponents(names ...string) {
	old := map[string]supervisor.Status{}
	for _, name := range names {
		c, err := s.component(name)
		if err != nil {
			s.t.Fatal(err)
		}
		old[name] = c
	}
	for _, name := range names {
		kill(s.t, old[name].PID)
	}
	for _, name := range names {
		s.Until(name+" is ready again", later, func() bool {
			c, err := s.component(name)
			return err == nil && c.State == supervisor.Ready && c.PID != old[name].PID
		})
		c, _ := s.component(name)
		s.t.Logf("%s: process %d, then %d, ready after %.1f s", name, old[name].PID, c.PID, c.ReadySeconds)
	}
	s.unharmed()
	s.newPods()
}

// killSupervisor: without h8s the API is not published and nothing is respawned, but
// everything runs on; the next `h8s up` takes it over and repairs what died since.
func (s *scene) killSupervisor() {
	st, err := s.status()
	if err != nil {
		s.t.Fatal(err)
	}
	kill(s.t, st.PID)
	s.gone("h8s", st.PID)

	out, code := s.h8s("status")
	if code == 0 || !strings.Contains(out, string(status.Headless)) || !strings.Contains(out, "h8s up") {
		s.t.Errorf("h8s status without its daemon: exit code %d, want another, the word %q and what to do:\n%s", code, status.Headless, out)
	}
	if conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", st.Settings.APIPort)); err == nil {
		_ = conn.Close()
		s.t.Error("somebody still listens on the API port")
	}
	pids := map[string]int{}
	for _, c := range st.Components {
		pids[c.Name] = c.PID
	}
	kill(s.t, pids["kube-scheduler"])

	if out, code := s.h8s("up"); code != 0 {
		s.t.Fatalf("h8s up: exit code %d\n%s", code, out)
	}
	again, err := s.status()
	if err != nil {
		s.t.Fatal(err)
	}
	for _, c := range again.Components {
		adopted := c.PID == pids[c.Name]
		if adopted == (c.Name == "kube-scheduler") {
			s.t.Errorf("component %s: process %d, then %d", c.Name, pids[c.Name], c.PID)
		}
	}
	s.unharmed()
	s.newPods()
}

// unharmed checks that the victim is the same VM with the same containers, that exec
// works and that no line of its log is missing or doubled.
func (s *scene) unharmed() {
	s.t.Helper()
	if now := s.vm(victim); now != s.was[victim] {
		s.t.Errorf("the Pod is another: was %+v, is %+v", s.was[victim], now)
	}
	s.Ready(victim, neighbour)
	for _, name := range []string{"one", "two"} {
		if n := s.Pod(victim).Container(name).RestartCount; n != 0 {
			s.t.Errorf("container %s was restarted %d times", name, n)
		}
	}
	if got := s.Exec(victim+"/two", "echo", "alive"); got != "alive" {
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
	return strings.Split(strings.TrimSpace(s.Logs(victim+"/one")), "\n")
}

// newPods checks that the node still starts Pods.
func (s *scene) newPods() {
	s.t.Helper()
	s.Kubectl("run", "late", "--image=h8s.local/busybox:1", "--restart=Never", "--command", "--", "sh", "-c", "exit 3")
	if end := s.Ended("late", "late"); end.ExitCode != 3 {
		s.t.Errorf("a new Pod ended with %+v, want exit code 3", end)
	}
	s.Kubectl("delete", "pod", "late", "--wait", "--timeout=1m")
}
