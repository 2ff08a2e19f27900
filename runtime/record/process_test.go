package record

import (
	"os/exec"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// TestProcessEnd: a process is waited for, killed, and not taken for another.
func TestProcessEnd(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	reaped := make(chan struct{})
	go func() { defer close(reaped); _ = cmd.Wait() }()
	t.Cleanup(func() { _ = cmd.Process.Kill(); <-reaped })
	p, err := Find(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.AwaitEnd(t.Context(), 10*time.Millisecond); !errdefs.IsAborted(err) {
		t.Errorf("a running process has ended: %v", err)
	}
	other := p
	other.Start++
	if err := other.Kill(t.Context(), time.Second); err != nil || !p.Alive() {
		t.Errorf("another process was killed: %v", err)
	}
	if err := p.Kill(t.Context(), 10*time.Second); err != nil || p.Alive() {
		t.Errorf("kill: %v", err)
	}
	if err := p.Kill(t.Context(), time.Second); err != nil {
		t.Errorf("a second kill: %v", err)
	}
}
