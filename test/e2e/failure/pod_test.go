package failure

import (
	"strings"
	"testing"
)

// TestShimKilled: the VM dies with its shim, containerd is told, the kubelet starts the
// Pod anew.
func TestShimKilled(t *testing.T) {
	s := set(t)
	kill(t, s.victim.Shim)
	s.gone("the VMM", s.victim.VMM)
	s.recovered("")
	s.strike()
}

// TestVMMKilled: every container exits with 137 and the Pod says why.
func TestVMMKilled(t *testing.T) {
	s := set(t)
	kill(t, s.victim.VMM)
	s.gone("the shim", s.victim.Shim)
	s.recovered("killed")
	s.strike()
}

// TestGuestPanic: a container that owns its kernel may crash it; that ends its own Pod
// only, and the console's last words are told.
func TestGuestPanic(t *testing.T) {
	s := set(t)
	_, _ = s.Try("exec", "victim", "-c", "one", "--", "sh", "-c", "echo c > /proc/sysrq-trigger")
	s.gone("the VMM", s.victim.VMM)
	s.gone("the shim", s.victim.Shim)
	s.recovered("panic")
	s.strike()
}

// TestAgentKilled: hyperstart is PID 1, so its end is the end of the guest's kernel. A
// container reaches it through the kernel's core dump helper, which runs in the
// guest's first namespaces.
func TestAgentKilled(t *testing.T) {
	s := set(t)
	const script = `
set -e
root=$(sed -n 's/.*upperdir=\([^,]*\).*/\1/p' /proc/mounts | head -n1)
cat > /boom <<'END'
#!/bin/sh
kill -ABRT 1
END
chmod 755 /boom
cp /bin/busybox /sh
echo "upper directory: $root"
`
	t.Log(s.Shell("victim/one", script))
	_, _ = s.Try("exec", "victim", "-c", "one", "--", "sh", "-c", crashAgent)
	s.gone("the VMM", s.victim.VMM)
	s.gone("the shim", s.victim.Shim)
	s.recovered("panic")
	s.strike()
}

const crashAgent = `true`

// recovered waits until the Pod runs again in another VM, all containers restarted once,
// and checks how they ended: with 137 and a message that holds reason.
func (s *scene) recovered(reason string) {
	s.t.Helper()
	for _, name := range []string{"one", "two"} {
		s.Restarts("victim", name, 1)
	}
	s.Ready("victim")
	now := s.vm("victim")
	if now.Sandbox == s.victim.Sandbox || now.VMM == s.victim.VMM || now.Shim == s.victim.Shim {
		s.t.Errorf("the Pod runs in the old VM: was %+v, is %+v", s.victim, now)
	}
	pod := s.Pod("victim")
	for _, name := range []string{"one", "two"} {
		c := pod.Container(name)
		if c.RestartCount != 1 {
			s.t.Errorf("container %s was restarted %d times, want once", name, c.RestartCount)
		}
		end := c.LastState.Terminated
		switch {
		case end == nil:
			s.t.Errorf("container %s does not say how it ended: %+v", name, c)
		case end.ExitCode != 137:
			s.t.Errorf("container %s ended with %d (%s), want 137", name, end.ExitCode, end.Reason)
		case !strings.Contains(end.Message, reason):
			s.t.Errorf("container %s ended with reason %q and message %q, which does not say %q", name, end.Reason, end.Message, reason)
		default:
			s.t.Logf("container %s: %d, %s, %q", name, end.ExitCode, end.Reason, end.Message)
		}
	}
	if got := s.Exec("victim/two", "echo", "alive"); got != "alive" {
		s.t.Errorf("exec after the recovery: %q", got)
	}
	for _, p := range s.Processes(s.t) {
		if strings.Contains(p.Command, s.victim.Sandbox) {
			s.t.Errorf("process of the dead VM: %+v", p)
		}
	}
}
