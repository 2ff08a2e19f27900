package failure

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
	"testing"
)

// TestPodKilled kills each of what a Pod's VM consists of, each of another Pod.
func TestPodKilled(t *testing.T) {
	s := set(t, "shim", "vmm", "kernel", "agent")
	// The VM dies with its shim, containerd is told, the kubelet starts the Pod anew. The
	// exit code is 255 as with any runtime: containerd's CRI decides it when its
	// connection breaks, before it asks `shim delete`, which would say 137.
	s.run("shim", func(s *scene) {
		s.dies("shim", 255, "", func(v vm) { kill(s.t, v.Shim) })
	})
	s.run("vmm", func(s *scene) {
		s.dies("vmm", 137, "killed", func(v vm) { kill(s.t, v.VMM) })
	})
	// A container that owns its kernel may crash it.
	s.run("kernel", func(s *scene) {
		s.dies("kernel", 137, "sysrq triggered crash", func(vm) {
			_, _ = s.Try("exec", "kernel", "-c", "one", "--", "sh", "-c", "echo c > /proc/sysrq-trigger")
		})
	})
	s.run("agent", func(s *scene) {
		s.dies("agent", 137, "Attempted to kill init", func(vm) { s.killAgent("agent") })
	})
	s.strike()
}

// dies does harm to a Pod's VM and checks what must come of it, whatever it was: the
// VM is gone with all its processes, and the Pod runs again in another.
func (s *scene) dies(pod string, code int, reason string, harm func(vm)) {
	s.t.Helper()
	was, links := s.was[pod], s.links()
	harm(was)
	s.gone("the VMM", was.VMM)
	s.recovered(pod, code, reason)
	s.noTrace(was, links)
}

// killAgent kills hyperstart, the guest's PID 1. A container cannot signal it from its
// own PID namespace, but the kernel's core dump helper runs in the guest's first
// namespaces.
func (s *scene) killAgent(pod string) {
	_, id, _ := strings.Cut(s.Pod(pod).Container("one").ContainerID, "://")
	script := fmt.Sprintf("printf '%s' > /assassin && chmod 755 /assassin && echo '|/run/h8s/containers/%s/rootfs/assassin' > /proc/sys/kernel/core_pattern && "+
		"sh -c 'kill -SEGV $$'; sleep 30", octal(assassin()), id)
	out, err := s.Try("exec", pod, "-c", "one", "--", "sh", "-c", script)
	s.t.Logf("exec ended with %v: %s", err, out)
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

// recovered waits until a Pod runs again in another VM, all containers restarted once,
// and checks how they ended: with code and a message that holds reason.
func (s *scene) recovered(name string, code int, reason string) {
	s.t.Helper()
	for _, container := range []string{"one", "two"} {
		s.Restarts(name, container, 1)
	}
	s.Ready(name)
	was, now := s.was[name], s.vm(name)
	if now.Sandbox == was.Sandbox || now.VMM == was.VMM || now.Shim == was.Shim {
		s.t.Errorf("the Pod runs in the old VM: was %+v, is %+v", was, now)
	}
	pod := s.Pod(name)
	for _, container := range []string{"one", "two"} {
		c := pod.Container(container)
		if c.RestartCount != 1 {
			s.t.Errorf("container %s was restarted %d times, want once", container, c.RestartCount)
		}
		end := c.LastState.Terminated
		switch {
		case end == nil:
			s.t.Errorf("container %s does not say how it ended: %+v", container, c)
		case end.ExitCode != code:
			s.t.Errorf("container %s ended with %d (%s), want %d", container, end.ExitCode, end.Reason, code)
		case !strings.Contains(end.Message, reason):
			s.t.Errorf("container %s ended with reason %q and message %q, which does not say %q", container, end.Reason, end.Message, reason)
		default:
			s.t.Logf("container %s: %d, %s, %q", container, end.ExitCode, end.Reason, end.Message)
		}
	}
	if got := s.Exec(name+"/two", "echo", "alive"); got != "alive" {
		s.t.Errorf("exec after the recovery: %q", got)
	}
}
