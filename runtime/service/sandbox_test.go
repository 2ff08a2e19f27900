package service

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	stats "github.com/containerd/cgroups/v3/cgroup2/stats"
	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/hypernetes/hypernetes/runtime/config"
	"github.com/hypernetes/hypernetes/runtime/record"
	"github.com/hypernetes/hypernetes/runtime/vmm/vmmtest"
)

func TestLifecycle(t *testing.T) {
	s := start(t, &vmmtest.VMM{})
	check(t, s.create())
	if err := s.create(); !errdefs.IsAlreadyExists(err) {
		t.Errorf("created twice: %v", err)
	}
	r, err := s.startSandbox()
	check(t, err)
	if r.Pid == 0 || r.CreatedAt == nil || r.Spec == nil {
		t.Errorf("start said %v", r)
	}
	st := s.status()
	if st.State != "SANDBOX_READY" || st.Pid != r.Pid || !st.CreatedAt.AsTime().Equal(r.CreatedAt.AsTime()) || st.Info["info"] == "" {
		t.Errorf("status %v", st)
	}
	a := s.vmm.VMs()[0].Agent
	a.Lock()
	if c := a.Configured; c.Hostname != "web" || len(c.Entropy) != 256 || c.Clock == nil || c.SharePidNamespace {
		t.Errorf("guest was told %v", c)
	}
	a.Unlock()
	rec, err := record.Load(s.cfg.StateDir, "k8s.io", id)
	check(t, err)
	if !rec.VMM.Alive() || rec.VMM.PID != int(r.Pid) || rec.Shim.PID != os.Getpid() || rec.Pod != "blue/web" {
		t.Errorf("record %+v", rec)
	}
	for range 2 {
		_, err := s.sandbox.StopSandbox(s.ctx(), &sandboxapi.StopSandboxRequest{SandboxID: id})
		check(t, err)
	}
	if st := s.status(); st.State != "SANDBOX_NOTREADY" || st.ExitedAt == nil || st.Pid != 0 {
		t.Errorf("status after stop %v", st)
	}
	if _, err := record.Load(s.cfg.StateDir, "k8s.io", id); !errdefs.IsNotFound(err) {
		t.Errorf("record after stop: %v", err)
	}
	if s.users != 0 || s.detached != 1 || len(s.attached) != 1 {
		t.Errorf("left: %d users, detached %d times", s.users, s.detached)
	}
	_, err = s.sandbox.ShutdownSandbox(s.ctx(), &sandboxapi.ShutdownSandboxRequest{SandboxID: id})
	check(t, err)
	select {
	case err := <-s.served:
		check(t, err)
	case <-time.After(10 * time.Second):
		t.Error("shim does not exit")
	}
}

func TestPlatform(t *testing.T) {
	s := start(t, &vmmtest.VMM{})
	s.up()
	r, err := s.sandbox.Platform(s.ctx(), &sandboxapi.PlatformRequest{SandboxID: id})
	check(t, err)
	if r.Platform.OS != "linux" || r.Platform.Architecture != runtime.GOARCH {
		t.Errorf("platform %v", r)
	}
}

func TestStartWithoutCreate(t *testing.T) {
	s := start(t, &vmmtest.VMM{})
	if _, err := s.startSandbox(); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("got %v", err)
	}
	if _, err := s.sandbox.SandboxStatus(s.ctx(), &sandboxapi.SandboxStatusRequest{SandboxID: id}); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		t.Errorf("status: %v", err)
	}
	if _, err := s.sandbox.SandboxStatus(s.ctx(), &sandboxapi.SandboxStatusRequest{SandboxID: "other"}); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		t.Errorf("another's status: %v", err)
	}
}

func TestBadConfiguration(t *testing.T) {
	s := start(t, &vmmtest.VMM{})
	_, err := s.sandbox.CreateSandbox(s.ctx(), &sandboxapi.CreateSandboxRequest{SandboxID: id, Options: &anypb.Any{TypeUrl: "x"}})
	if !errdefs.IsInvalidArgument(errgrpc.ToNative(err)) {
		t.Errorf("got %v", err)
	}
	_, err = s.sandbox.ShutdownSandbox(s.ctx(), &sandboxapi.ShutdownSandboxRequest{SandboxID: id})
	check(t, err)
	check(t, <-s.served)
}

func TestPing(t *testing.T) {
	s := start(t, &vmmtest.VMM{})
	s.up()
	_, err := s.sandbox.PingSandbox(s.ctx(), &sandboxapi.PingRequest{SandboxID: id})
	check(t, err)
}

// TestGuestNeverAnswers: the boot has a deadline, and nothing is left after it.
func TestGuestNeverAnswers(t *testing.T) {
	s := start(t, &vmmtest.VMM{Mute: true})
	check(t, s.create())
	_, err := s.startSandbox()
	if err == nil {
		t.Fatal("a mute guest started")
	}
	s.awaitStop()
	if s.users != 0 || s.detached != 1 {
		t.Errorf("left: %d users, detached %d times", s.users, s.detached)
	}
}

func (s *shim) awaitStop() {
	s.t.Helper()
	_, err := s.sandbox.WaitSandbox(s.ctx(), &sandboxapi.WaitSandboxRequest{SandboxID: id})
	check(s.t, err)
}

func TestWaitUnblocksOnStop(t *testing.T) {
	s := start(t, &vmmtest.VMM{})
	s.up()
	waited := make(chan error, 3)
	for range 3 {
		sb, _ := s.dial() // each its own connection, as after a restart of containerd
		go func() {
			_, err := sb.WaitSandbox(s.ctx(), &sandboxapi.WaitSandboxRequest{SandboxID: id})
			waited <- err
		}()
	}
	_, err := s.sandbox.StopSandbox(s.ctx(), &sandboxapi.StopSandboxRequest{SandboxID: id})
	check(t, err)
	for range 3 {
		check(t, <-waited)
	}
}

func TestStopWhileBooting(t *testing.T) {
	s := start(t, &vmmtest.VMM{Mute: true})
	check(t, s.create())
	_, err := s.sandbox.StopSandbox(s.ctx(), &sandboxapi.StopSandboxRequest{SandboxID: id})
	check(t, err)
	if _, err := s.startSandbox(); err == nil {
		t.Error("a stopped sandbox started")
	}
}

// TestVMMDies: every container exits with 137, the sandbox is not ready, waiters return.
func TestVMMDies(t *testing.T) {
	for name, end := range map[string]func(*vmmtest.VM){
		"killed": func(v *vmmtest.VM) { _ = v.Kill() },
		"panic":  func(v *vmmtest.VM) { v.Panic() },
	} {
		t.Run(name, func(t *testing.T) {
			s := start(t, &vmmtest.VMM{})
			vm := s.up()
			s.run("c1", []string{"sleep"})
			s.run("c2", []string{"sleep"})
			end(vm)
			if a, b := s.wait("c1", ""), s.wait("c2", ""); a != 137 || b != 137 {
				t.Errorf("exit codes %d and %d", a, b)
			}
			s.awaitStop()
			if st := s.status(); st.State != "SANDBOX_NOTREADY" {
				t.Errorf("status %v", st)
			}
			if err := s.kill("c1", "", 9); !errdefs.IsNotFound(err) {
				t.Errorf("kill: %v", err)
			}
			check(t, s.remove("c1", ""))
			check(t, s.remove("c2", ""))
			if _, err := s.container("c3", []string{"sleep"}); !errdefs.IsFailedPrecondition(err) {
				t.Errorf("create in a dead sandbox: %v", err)
			}
		})
	}
}

func TestHungGuestIsKilled(t *testing.T) {
	s := start(t, &vmmtest.VMM{}, func(c *config.Config) { c.HeartbeatSeconds, c.HeartbeatTimeoutSeconds = 1, 1 })
	vm := s.up()
	vm.Agent.Lock()
	vm.Agent.Hang = true
	vm.Agent.Unlock()
	s.run("c1", []string{"sleep"})
	if code := s.wait("c1", ""); code != 137 {
		t.Errorf("exit code %d", code)
	}
	s.awaitStop()
	if info := s.status().Info["info"]; !strings.Contains(info, "hangs") {
		t.Errorf("info %s", info)
	}
}

func TestConnectAndShutdown(t *testing.T) {
	s := start(t, &vmmtest.VMM{})
	vm := s.up()
	r, err := s.task.Connect(s.ctx(), &taskapi.ConnectRequest{ID: id})
	check(t, err)
	if int(r.ShimPid) != os.Getpid() || int(r.TaskPid) != vm.PID() {
		t.Errorf("connect said %v", r)
	}
	p, err := s.task.Pids(s.ctx(), &taskapi.PidsRequest{ID: id})
	check(t, err)
	if len(p.Processes) != 1 {
		t.Errorf("pids %v", p)
	}
	for _, name := range []string{id, "c1"} { // after every container's delete
		_, err := s.task.Shutdown(s.ctx(), &taskapi.ShutdownRequest{ID: name})
		check(t, err)
	}
	select {
	case err := <-s.served:
		t.Errorf("shim has ended: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
}

// TestLeakedShimEnds: containerd died between start and CreateSandbox.
func TestLeakedShimEnds(t *testing.T) {
	s := start(t, &vmmtest.VMM{})
	if _, err := s.task.Pids(s.ctx(), &taskapi.PidsRequest{ID: id}); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		t.Errorf("pids: %v", err)
	}
	_, err := s.task.Shutdown(s.ctx(), &taskapi.ShutdownRequest{ID: id})
	check(t, err)
	check(t, <-s.served)
}

func TestMetricsAndUpdate(t *testing.T) {
	s := start(t, &vmmtest.VMM{})
	s.up()
	r, err := s.sandbox.SandboxMetrics(s.ctx(), &sandboxapi.SandboxMetricsRequest{SandboxID: id})
	check(t, err)
	var m stats.Metrics
	if r.Metrics.Data.TypeUrl != "io.containerd.cgroups.v2.Metrics" {
		t.Errorf("type %s", r.Metrics.Data.TypeUrl)
	}
	check(t, proto.Unmarshal(r.Metrics.Data.Value, &m))
	for text, grows := range map[string]bool{
		`{"Resources":{"memory_limit_in_bytes":1048576}}`:       false,
		`{"Resources":{"memory_limit_in_bytes":1099511627776}}`: true,
	} {
		_, err := s.sandbox.UpdateSandbox(s.ctx(), &sandboxapi.UpdateSandboxRequest{
			SandboxID: id, Fields: []string{"extensions"},
			Sandbox: &types.Sandbox{Extensions: map[string]*anypb.Any{"updated-resources": {Value: []byte(text)}}},
		})
		if errdefs.IsNotImplemented(errgrpc.ToNative(err)) != grows {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func TestHostNetwork(t *testing.T) {
	s := start(t, &vmmtest.VMM{})
	_, err := s.sandbox.CreateSandbox(s.ctx(), &sandboxapi.CreateSandboxRequest{SandboxID: id, Options: podConfig(t)})
	check(t, err)
	_, err = s.startSandbox()
	check(t, err)
	if len(s.attached) != 1 || s.attached[0] != "" {
		t.Errorf("attached %q", s.attached)
	}
}

func TestRecordIsPrivate(t *testing.T) {
	s := start(t, &vmmtest.VMM{})
	s.up()
	dir, err := record.Dir(s.cfg.StateDir, "k8s.io", id)
	check(t, err)
	for p, want := range map[string]os.FileMode{dir: 0o700, filepath.Join(dir, "state.json"): 0o600} {
		if st, err := os.Stat(p); err != nil || st.Mode().Perm() != want {
			t.Errorf("%s: %v, %v", p, st.Mode(), err)
		}
	}
}
