package proc

import (
	"errors"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// TestEnd: a process is waited for, killed, and not taken for another.
func TestEnd(t *testing.T) {
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

func TestSignal(t *testing.T) {
	self, err := Find(os.Getpid())
	if err != nil || !self.Alive() {
		t.Fatalf("%+v %v", self, err)
	}
	for _, other := range []ID{{}, {PID: self.PID, Start: self.Start + 1}, {PID: -1}} {
		if other.Alive() {
			t.Errorf("%+v is alive", other)
		}
	}
	if err := (ID{PID: self.PID, Start: 1}).Signal(unix.SIGKILL); !errors.Is(err, unix.ESRCH) {
		t.Errorf("signal to another process of the same pid: %v", err)
	}
}

func TestWait(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	id, err := Find(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	_ = w.Close()
	if gone, err := id.Wait(r); err != nil || gone {
		t.Errorf("told to stop waiting: %t %v", gone, err)
	}
	r2, w2, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r2.Close()
	defer w2.Close()
	_ = cmd.Process.Kill()
	if gone, err := id.Wait(r2); err != nil || !gone {
		t.Errorf("after the end: %t %v", gone, err)
	}
	_ = cmd.Wait()
	if gone, err := id.Wait(r2); err != nil || !gone {
		t.Errorf("long after the end: %t %v", gone, err)
	}
}
