package janitor

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/proc"
	"github.com/hypernetes/hypernetes/runtime/record"
)

// child starts a process that stands for a VMM.
func child(t *testing.T) (proc.ID, <-chan struct{}) {
	t.Helper()
	cmd := exec.Command("sleep", "600")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(done)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-done
	})
	p, err := proc.Find(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	return p, done
}

func TestCollect(t *testing.T) {
	state, socket := t.TempDir(), filepath.Join(t.TempDir(), "s")
	if err := os.WriteFile(socket, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	vmm, ended := child(t)
	self, err := proc.Find(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	live := &record.Record{ID: "live", Namespace: "k8s.io", Shim: self, VMM: vmm}
	// The shim's pid is used again by a process that started later: it is dead.
	dead := &record.Record{ID: "dead", Namespace: "k8s.io", Shim: proc.ID{PID: os.Getpid(), Start: self.Start - 1}, VMM: vmm, Socket: socket}
	for _, r := range []*record.Record{live, dead} {
		if err := r.Save(state); err != nil {
			t.Fatal(err)
		}
	}
	if err := Collect(t.Context(), state, live); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a live shim's sandbox was collected: %v", err)
	}
	n, err := Sweep(t.Context(), state)
	if err != nil || n != 1 {
		t.Fatalf("swept %d, %v", n, err)
	}
	<-ended
	if _, err := os.Stat(socket); err == nil {
		t.Error("socket is left")
	}
	if _, err := record.Load(state, "k8s.io", "dead"); !errdefs.IsNotFound(err) {
		t.Errorf("record is left: %v", err)
	}
	if _, err := record.Load(state, "k8s.io", "live"); err != nil {
		t.Errorf("live record: %v", err)
	}
	if err := Collect(t.Context(), state, dead); err != nil {
		t.Errorf("again: %v", err)
	}
}

func TestFindByContainer(t *testing.T) {
	state, bundle := t.TempDir(), t.TempDir()
	r := &record.Record{ID: "pod1", Namespace: "k8s.io"}
	if err := r.Save(state); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bundle, "sandbox"), []byte("pod1"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := Find(state, "k8s.io", "c1", bundle); err != nil || got.ID != "pod1" {
		t.Errorf("got %v, %v", got, err)
	}
	if _, err := Find(state, "k8s.io", "../../etc", ""); !errdefs.IsInvalidArgument(err) {
		t.Errorf("got %v", err)
	}
	if err := os.WriteFile(filepath.Join(state, "sandboxes", "k8s.io", "pod1", "state.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := record.List(state); !errdefs.IsDataLoss(err) {
		t.Errorf("damaged record: %v", err)
	}
}
