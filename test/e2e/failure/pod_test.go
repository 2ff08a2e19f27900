package failure

import (
	"bytes"
	"encoding/binary"
	"fmt"
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
// container cannot signal it from its own PID namespace, but the kernel's core dump
// helper runs in the guest's first namespaces.
func TestAgentKilled(t *testing.T) {
	s := set(t)
	_, id, _ := strings.Cut(s.Pod("victim").Container("one").ContainerID, "://")
	script := fmt.Sprintf("printf '%s' > /assassin && chmod 755 /assassin && echo '|/run/h8s/containers/%s/rootfs/assassin' > /proc/sys/kernel/core_pattern && "+
		"sh -c 'kill -SEGV $$'; sleep 30", octal(assassin()), id)
	out, err := s.Try("exec", "victim", "-c", "one", "--", "sh", "-c", script)
	t.Logf("exec ended with %v: %s", err, out)
	s.gone("the VMM", s.victim.VMM)
	s.gone("the shim", s.victim.Shim)
	s.recovered("panic")
	s.strike()
}

// assassin is an ELF executable without any library that sends SIGABRT to PID 1, which
// a Go program like hyperstart does not survive.
func assassin() []byte {
	code := []byte{
		0xb8, 62, 0, 0, 0, 0xbf, 1, 0, 0, 0, 0xbe, 6, 0, 0, 0, 0x0f, 0x05, // kill(1, SIGABRT)
		0xb8, 60, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05, // exit(0)
	}
	const base, headers = 0x400000, 64 + 56
	size := uint64(headers + len(code))
	var b bytes.Buffer
	b.Write([]byte{0x7f, 'E', 'L', 'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	for _, field := range []any{
		uint16(2), uint16(62), uint32(1), uint64(base + headers), uint64(64), uint64(0),
		uint32(0), uint16(64), uint16(56), uint16(1), uint16(64), uint16(0), uint16(0),
		uint32(1), uint32(5), uint64(0), uint64(base), uint64(base), size, size, uint64(0x1000),
	} {
		_ = binary.Write(&b, binary.LittleEndian, field) // to memory
	}
	b.Write(code)
	return b.Bytes()
}

// octal writes bytes for printf(1).
func octal(b []byte) string {
	var s strings.Builder
	for _, c := range b {
		fmt.Fprintf(&s, "\\%03o", c)
	}
	return s.String()
}

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
