package shim

import (
	"strings"
	"testing"
	"time"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// TestContainersOfAPod: several containers share the VM, its host name and its memory of
// nothing else; each has its own root, processes and end.
func TestContainersOfAPod(t *testing.T) {
	s := start(t)
	began := time.Now()
	s.up()
	t.Logf("sandbox up after %v", time.Since(began).Round(time.Millisecond))
	sleeper := s.sh("sleeper", "echo $$ >/tmp/mine; hostname; while :; do sleep 1; done")
	code, out := s.sh("failing", "hostname; ls /tmp; exit 3").end()
	if code != 3 || out != "pod\n" {
		t.Errorf("exit code %d, output %q", code, out)
	}
	// 20 MiB through a fifo whose reader keeps up, then the end at once.
	code, out = s.sh("loud", "dd if=/dev/zero bs=65536 count=320 2>/dev/null | tr '\\0' x").end()
	if code != 0 || len(out) != 20<<20 || strings.Trim(out, "x") != "" {
		t.Errorf("exit code %d, %d bytes", code, len(out))
	}
	for _, name := range []string{"failing", "loud"} {
		_, err := s.task.Delete(s.ctx(), &taskapi.DeleteRequest{ID: name})
		check(t, err)
	}
	_, err := s.task.Kill(s.ctx(), &taskapi.KillRequest{ID: "sleeper", Signal: uint32(unix.SIGKILL)})
	check(t, err)
	if code, out := sleeper.end(); code != 137 || out != "pod\n" {
		t.Errorf("exit code %d, output %q", code, out)
	}
	if st, err := s.sandbox.SandboxStatus(s.ctx(), &sandboxapi.SandboxStatusRequest{SandboxID: s.id}); err != nil || st.State != "SANDBOX_READY" {
		t.Errorf("status %v, %v", st, err)
	}
	m, err := s.sandbox.SandboxMetrics(s.ctx(), &sandboxapi.SandboxMetricsRequest{SandboxID: s.id})
	check(t, err)
	if proto.Size(m.Metrics.Data) < 20 {
		t.Errorf("metrics are empty: %v", m)
	}
	_, err = s.sandbox.StopSandbox(s.ctx(), &sandboxapi.StopSandboxRequest{SandboxID: s.id})
	check(t, err)
}

// TestOOM: a container over its limit is killed, its neighbour is not.
func TestOOM(t *testing.T) {
	s := start(t)
	s.up()
	limit := int64(16 << 20)
	neighbour := s.sh("neighbour", "sleep 1000")
	code, _ := s.sh("greedy", "x=a; while :; do x=$x$x; done", func(sp *specs.Spec) {
		sp.Linux.Resources = &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}}
	}).end()
	if code != 137 {
		t.Errorf("exit code %d", code)
	}
	_, err := s.task.Kill(s.ctx(), &taskapi.KillRequest{ID: "neighbour", Signal: uint32(unix.SIGKILL)})
	check(t, err)
	neighbour.end()
}

// TestVMMKilled: the Pod ends and says so, and nothing is left.
func TestVMMKilled(t *testing.T) {
	s := start(t)
	pid := s.up()
	p := s.sh("c1", "sleep 1000")
	check(t, unix.Kill(pid, unix.SIGKILL))
	if code, _ := p.end(); code != 137 {
		t.Errorf("exit code %d", code)
	}
	_, err := s.sandbox.WaitSandbox(s.ctx(), &sandboxapi.WaitSandboxRequest{SandboxID: s.id})
	check(t, err)
	st, err := s.sandbox.SandboxStatus(s.ctx(), &sandboxapi.SandboxStatusRequest{SandboxID: s.id})
	check(t, err)
	if st.State != "SANDBOX_NOTREADY" {
		t.Errorf("status %v", st)
	}
}

// TestShimKilled: the VM dies with its shim; delete collects, and says so twice.
func TestShimKilled(t *testing.T) {
	s := start(t)
	s.up()
	s.sh("c1", "sleep 1000")
	r, err := s.task.Connect(s.ctx(), &taskapi.ConnectRequest{ID: s.id})
	check(t, err)
	// While it lives, delete is harmless.
	s.run(nil, "delete", "-bundle", s.bundle)
	if _, err := s.task.State(s.ctx(), &taskapi.StateRequest{ID: "c1"}); err != nil {
		t.Fatalf("delete hurt a live sandbox: %v", err)
	}
	check(t, unix.Kill(int(r.ShimPid), unix.SIGKILL))
	for range 2 {
		var d taskapi.DeleteResponse
		check(t, proto.Unmarshal(s.run(nil, "delete", "-bundle", s.bundle), &d))
		if d.ExitStatus != 137 {
			t.Errorf("delete said %v", &d)
		}
	}
	for _, l := range s.leftovers() {
		if !strings.Contains(l, "/users/") { // an unlocked file, taken again by name
			t.Errorf("left behind: %s", l)
		}
	}
	s.forgetUsers()
}

func TestNothingRunsWithoutASandbox(t *testing.T) {
	s := start(t)
	_, err := s.task.Create(s.ctx(), &taskapi.CreateTaskRequest{ID: "c1", Bundle: s.bundle})
	if !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
		t.Errorf("got %v", err)
	}
}
