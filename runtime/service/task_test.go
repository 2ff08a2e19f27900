package service

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	stats "github.com/containerd/cgroups/v3/cgroup2/stats"
	eventsapi "github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
	"github.com/hypernetes/hypernetes/runtime/vmm/vmmtest"
)

func TestSingleContainer(t *testing.T) {
	s := start(t, &vmmtest.VMM{})
	vm := s.up()
	out := fifo(t)
	reader, err := os.OpenFile(out, os.O_RDWR, 0) // CRI holds it open
	check(t, err)
	defer reader.Close()
	pid := s.run("c1", []string{"echo", "hello"}, func(_ *specs.Spec, r *taskapi.CreateTaskRequest) { r.Stdout = out })
	if pid <= 1<<22 {
		t.Errorf("pid %d may be a host process's", pid)
	}
	if code := s.wait("c1", ""); code != 0 {
		t.Errorf("exit code %d", code)
	}
	buf := make([]byte, 64)
	if n, err := reader.Read(buf); err != nil || string(buf[:n]) != "hello\n" {
		t.Errorf("output %q, %v", buf[:n], err)
	}
	st, err := s.task.State(s.ctx(), &taskapi.StateRequest{ID: "c1"})
	check(t, err)
	if st.Status != tasktypes.Status_STOPPED || st.Pid != pid || st.ExitedAt == nil {
		t.Errorf("state %v", st)
	}
	if len(vm.Disks()) != 1 {
		t.Errorf("disks %v", vm.Disks())
	}
	check(t, s.remove("c1", ""))
	if err := s.remove("c1", ""); !errdefs.IsNotFound(err) {
		t.Errorf("second delete: %v", err)
	}
	if len(vm.Disks()) != 0 {
		t.Errorf("disks after delete %v", vm.Disks())
	}
	want := []string{"/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"}
	if got := s.allTopics(); !reflect.DeepEqual(got, want) {
		t.Errorf("events %v, want %v", got, want)
	}
}

func TestMultipleContainers(t *testing.T) {
	s := start(t, &vmmtest.VMM{})
	vm := s.up()
	pids := map[uint32]bool{}
	for i := range 3 {
		pids[s.run(fmt.Sprint("c", i), []string{"sleep"})] = true
	}
	if len(pids) != 3 || len(vm.Disks()) != 1 {
		t.Errorf("pids %v, disks %v: want three and one", pids, vm.Disks())
	}
	check(t, s.kill("c1", "", 9))
	if code := s.wait("c1", ""); code != 137 {
		t.Errorf("exit code %d", code)
	}
	for _, name := range []string{"c0", "c2"} {
		if st, err := s.task.State(s.ctx(), &taskapi.StateRequest{ID: name}); err != nil || st.Status != tasktypes.Status_RUNNING {
			t.Errorf("%s: %v, %v", name, st, err)
		}
	}
	check(t, s.remove("c1", ""))
	if s.status().State != "SANDBOX_READY" || len(vm.Disks()) != 1 {
		t.Error("one container's end touched the others")
	}
	if err := s.remove("c0", ""); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("delete of a running container: %v", err)
	}
}

func TestExitCodes(t *testing.T) {
	s := start(t, &vmmtest.VMM{})
	s.up()
	s.run("c3", []string{"exit", "3"})
	if code := s.wait("c3", ""); code != 3 {
		t.Errorf("exit code %d", code)
	}
	if err := s.kill("c3", "", 15); !errdefs.IsNotFound(err) {
		t.Errorf("kill of a stopped container: %v", err)
	}
	s.run("term", []string{"term"})
	check(t, s.kill("term", "", 15))
	if code := s.wait("term", ""); code != 128+15 {
		t.Errorf("exit code %d", code)
	}
}

func TestKillBeforeStart(t *testing.T) {
	s := start(t, &vmmtest.VMM{})
	s.up()
	_, err := s.container("c1", []string{"sleep"})
	check(t, err)
	check(t, s.kill("c1", "", 9))
	if code := s.wait("c1", ""); code != 137 {
		t.Errorf("exit code %d", code)
	}
	_, err = s.container("c2", []string{"sleep"})
	check(t, err)
	check(t, s.remove("c2", "")) // created, never started
}

func TestStartFails(t *testing.T) {
	s := start(t, &vmmtest.VMM{})
	s.up()
	_, err := s.container("c1", []string{"nosuch"})
	check(t, err)
	if _, err := s.task.Start(s.ctx(), &taskapi.StartRequest{ID: "c1"}); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		t.Errorf("start: %v", err)
	}
	check(t, s.remove("c1", ""))
}

func TestCreateFailsCleanly(t *testing.T) {
	s := start(t, &vmmtest.VMM{})
	vm := s.up()
	vm.Agent.Lock()
	vm.Agent.FailCreate = errdefs.ErrResourceExhausted
	vm.Agent.Unlock()
	if _, err := s.container("c1", []string{"sleep"}); !errdefs.IsResourceExhausted(err) {
		t.Errorf("got %v", err)
	}
	if len(vm.Disks()) != 0 {
		t.Errorf("disks left: %v", vm.Disks())
	}
	vm.Agent.Lock()
	vm.Agent.FailCreate = nil
	vm.Agent.Unlock()
	s.run("c1", []string{"sleep"}) // the name is free again
	if _, err := s.container("c1", []string{"sleep"}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("same name: %v", err)
	}
}

func TestHostPathIsRefused(t *testing.T) {
	s := start(t, &vmmtest.VMM{})
	s.up()
	_, err := s.container("c1", []string{"sleep"}, func(sp *specs.Spec, _ *taskapi.CreateTaskRequest) {
		sp.Mounts = []specs.Mount{{Destination: "/data", Type: "bind", Source: "/etc", Options: []string{"rbind"}}}
	})
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "/data") {
		t.Errorf("got %v", err)
	}
}

func (s *shim) exec(container, exec string, args []string, change func(*taskapi.ExecProcessRequest)) error {
	b, err := json.Marshal(&specs.Process{Args: args, Cwd: "/"})
	check(s.t, err)
	r := &taskapi.ExecProcessRequest{ID: container, ExecID: exec, Spec: &anypb.Any{Value: b}}
	if change != nil {
		change(r)
	}
	_, err = s.task.Exec(s.ctx(), r)
	return errgrpc.ToNative(err)
}

func TestExec(t *testing.T) {
	s := start(t, &vmmtest.VMM{})
	s.up()
	init := s.run("c1", []string{"sleep"})
	in, out := fifo(t), fifo(t)
	check(t, s.exec("c1", "e1", []string{"cat"}, func(r *taskapi.ExecProcessRequest) { r.Stdin, r.Stdout = in, out }))
	if err := s.exec("c1", "e1", []string{"cat"}, nil); !errdefs.IsAlreadyExists(err) {
		t.Errorf("same id: %v", err)
	}
	if err := s.kill("c1", "e1", 9); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("kill before start: %v", err)
	}
	r, err := s.task.Start(s.ctx(), &taskapi.StartRequest{ID: "c1", ExecID: "e1"})
	check(t, err)
	if r.Pid <= init {
		t.Errorf("pids %d and %d", r.Pid, init)
	}
	reader, err := os.Open(out)
	check(t, err)
	defer reader.Close()
	w, err := os.OpenFile(in, os.O_WRONLY, 0)
	check(t, err)
	_, err = io.WriteString(w, "ping")
	check(t, err)
	check(t, w.Close())
	_, err = s.task.CloseIO(s.ctx(), &taskapi.CloseIORequest{ID: "c1", ExecID: "e1", Stdin: true})
	check(t, err)
	if b, err := io.ReadAll(reader); err != nil || string(b) != "ping" {
		t.Errorf("output %q, %v", b, err)
	}
	if code := s.wait("c1", "e1"); code != 0 {
		t.Errorf("exit code %d", code)
	}
	check(t, s.remove("c1", "e1"))
	if err := s.remove("c1", "e1"); !errdefs.IsNotFound(err) {
		t.Errorf("second delete: %v", err)
	}
	want := []string{"/tasks/create", "/tasks/start", "/tasks/exec-added", "/tasks/exec-started", "/tasks/exit", "/tasks/delete"}
	if got := s.allTopics(); !reflect.DeepEqual(got, want) {
		t.Errorf("events %v, want %v", got, want)
	}
}

func TestEventsAreTheHosts(t *testing.T) {
	s := start(t, &vmmtest.VMM{})
	vm := s.up()
	pid := s.run("c1", []string{"sleep"})
	vm.Agent.Lock()
	vm.Agent.ExitTime = time.Now().Add(1000 * time.Hour)
	vm.Agent.Unlock()
	// Of containers that do not exist, execs that do not, and codes that cannot be.
	vm.Agent.Emit(&hyperstart.Event{What: &hyperstart.Event_Exit{Exit: &hyperstart.Exit{ContainerId: "other"}}})
	vm.Agent.Emit(&hyperstart.Event{What: &hyperstart.Event_Exit{Exit: &hyperstart.Exit{ContainerId: "c1", ExecId: "e9"}}})
	vm.Agent.Emit(&hyperstart.Event{})
	vm.Agent.Emit(&hyperstart.Event{What: &hyperstart.Event_Oom{Oom: &hyperstart.OOM{ContainerId: "c1"}}})
	vm.Agent.Emit(&hyperstart.Event{What: &hyperstart.Event_Exit{Exit: &hyperstart.Exit{ContainerId: "c1", Pid: 1, Status: 70000}}})
	if code := s.wait("c1", ""); code != 255 {
		t.Errorf("exit code %d", code)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.events) != 4 {
		t.Fatalf("events %v", s.topics)
	}
	e := s.events[3].(*eventsapi.TaskExit)
	if e.Pid != pid || e.ExitedAt.AsTime().After(time.Now()) || s.topics[2] != "/tasks/oom" {
		t.Errorf("event %v, topics %v", e, s.topics)
	}
}

// TestTerminationMessage: it is on the host before anybody hears of the exit.
func TestTerminationMessage(t *testing.T) {
	s := start(t, &vmmtest.VMM{})
	s.up()
	file := filepath.Join(s.cfg.KubeletRoot, "pods", "uid-1", "containers", "web", "abc123")
	check(t, os.MkdirAll(filepath.Dir(file), 0o755))
	check(t, os.WriteFile(file, nil, 0o666))
	s.run("c1", []string{"message", "it was me"}, func(sp *specs.Spec, _ *taskapi.CreateTaskRequest) {
		sp.Mounts = []specs.Mount{{Destination: "/dev/termination-log", Type: "bind", Source: file, Options: []string{"rbind", "rw"}}}
	})
	s.wait("c1", "")
	if b, err := os.ReadFile(file); err != nil || string(b) != "it was me" {
		t.Errorf("message %q, %v", b, err)
	}
}

func TestJoinPIDNamespace(t *testing.T) {
	s := start(t, &vmmtest.VMM{})
	vm := s.up()
	pid := s.run("c1", []string{"sleep"})
	join := func(n uint32) option {
		return func(sp *specs.Spec, _ *taskapi.CreateTaskRequest) {
			sp.Linux.Namespaces[0].Path = fmt.Sprintf("/proc/%d/ns/pid", n)
		}
	}
	s.run("debug", []string{"sleep"}, join(pid))
	vm.Agent.Lock()
	if got := vm.Agent.Created["debug"].PidNamespaceOf; got != "c1" {
		t.Errorf("joins %q", got)
	}
	vm.Agent.Unlock()
	if _, err := s.container("bad", []string{"sleep"}, join(12345)); !errdefs.IsInvalidArgument(err) {
		t.Errorf("process of the host: %v", err)
	}
}

func TestStatsPauseUpdatePids(t *testing.T) {
	s := start(t, &vmmtest.VMM{})
	s.up()
	pid := s.run("c1", []string{"sleep"})
	r, err := s.task.Stats(s.ctx(), &taskapi.StatsRequest{ID: "c1"})
	check(t, err)
	var m stats.Metrics
	check(t, proto.Unmarshal(r.Stats.Value, &m))
	if m.Pids.Current != 7 || r.Stats.TypeUrl != "io.containerd.cgroups.v2.Metrics" {
		t.Errorf("stats %v of type %s", &m, r.Stats.TypeUrl)
	}
	_, err = s.task.Pause(s.ctx(), &taskapi.PauseRequest{ID: "c1"})
	check(t, err)
	if st, err := s.task.State(s.ctx(), &taskapi.StateRequest{ID: "c1"}); err != nil || st.Status != tasktypes.Status_PAUSED {
		t.Errorf("state %v, %v", st, err)
	}
	_, err = s.task.Resume(s.ctx(), &taskapi.ResumeRequest{ID: "c1"})
	check(t, err)
	_, err = s.task.Update(s.ctx(), &taskapi.UpdateTaskRequest{ID: "c1", Resources: &anypb.Any{Value: []byte(`{}`)}})
	check(t, err)
	p, err := s.task.Pids(s.ctx(), &taskapi.PidsRequest{ID: "c1"})
	check(t, err)
	if len(p.Processes) != 1 || p.Processes[0].Pid != pid {
		t.Errorf("pids %v", p)
	}
	if _, err := s.task.ResizePty(s.ctx(), &taskapi.ResizePtyRequest{ID: "c1"}); !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
		t.Errorf("resize without terminal: %v", err)
	}
	if _, err := s.task.Checkpoint(s.ctx(), &taskapi.CheckpointTaskRequest{ID: "c1"}); !errdefs.IsNotImplemented(errgrpc.ToNative(err)) {
		t.Errorf("checkpoint: %v", err)
	}
	if _, err := s.task.State(s.ctx(), &taskapi.StateRequest{ID: "c9"}); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		t.Errorf("state of nothing: %v", err)
	}
}
