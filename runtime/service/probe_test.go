package service

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
	probe "github.com/hypernetes/hypernetes/api/probe/v1"
	"github.com/hypernetes/hypernetes/runtime/vmm/vmmtest"
)

// daemon is a node daemon. What it answers is by the probe's argument.
type daemon struct {
	asked     chan *probe.ProbeRequest
	cancelled chan error
	rpc       *ttrpc.Server
}

func (s *shim) daemon() *daemon {
	s.t.Helper()
	rpc, err := ttrpc.NewServer()
	check(s.t, err)
	d := &daemon{asked: make(chan *probe.ProbeRequest, 10), cancelled: make(chan error, 10), rpc: rpc}
	probe.RegisterProberService(rpc, d)
	l, err := net.Listen("unix", s.prober)
	check(s.t, err)
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = rpc.Serve(context.Background(), l)
	}()
	s.t.Cleanup(func() {
		_ = rpc.Close()
		<-served
	})
	return d
}

func (d *daemon) Probe(ctx context.Context, r *probe.ProbeRequest) (*probe.ProbeResponse, error) {
	d.asked <- r
	switch r.Probe {
	case "ok":
		return &probe.ProbeResponse{Output: "fine"}, nil
	case "large":
		return &probe.ProbeResponse{Output: strings.Repeat("€", 1<<20)}, nil
	case "odd":
		return &probe.ProbeResponse{ExitCode: -7, Output: "odd"}, nil
	case "error":
		return nil, status.Error(codes.Unavailable, "not yet")
	case "hang":
		<-ctx.Done()
		d.cancelled <- ctx.Err()
		return nil, ctx.Err()
	}
	return &probe.ProbeResponse{ExitCode: 1, Output: "HTTP probe failed with statuscode: 503"}, nil
}

// hearing is an exec's stdout.
func hearing(t *testing.T) (string, *os.File) {
	t.Helper()
	path := fifo(t)
	f, err := os.OpenFile(path, os.O_RDWR, 0) // CRI holds it open
	check(t, err)
	t.Cleanup(func() { _ = f.Close() })
	return path, f
}

func (s *shim) probe(exec, argument, stdout string) error {
	s.t.Helper()
	check(s.t, s.exec("c1", exec, []string{probe.Program, argument}, func(r *taskapi.ExecProcessRequest) { r.Stdout = stdout }))
	_, err := s.task.Start(s.ctx(), &taskapi.StartRequest{ID: "c1", ExecID: exec})
	return errgrpc.ToNative(err)
}

// neverInGuest fails the test if the guest hears of an exec.
func neverInGuest(t *testing.T, vm *vmmtest.VM) {
	vm.Agent.Lock()
	defer vm.Agent.Unlock()
	vm.Agent.Mutiny = func(_ context.Context, method string) error {
		if method == "Exec" {
			t.Error("the guest was asked")
		}
		return nil
	}
}

func TestProbe(t *testing.T) {
	s := start(t, &vmmtest.VMM{})
	vm := s.up()
	neverInGuest(t, vm)
	init := s.run("c1", []string{"sleep"})
	d := s.daemon()
	out, r := hearing(t)
	check(t, s.exec("c1", "p1", []string{probe.Program, "ok"}, func(r *taskapi.ExecProcessRequest) { r.Stdout = out }))
	if st, err := s.task.State(s.ctx(), &taskapi.StateRequest{ID: "c1", ExecID: "p1"}); err != nil || st.Status != tasktypes.Status_CREATED {
		t.Errorf("%v, %v", st, err)
	}
	if err := s.kill("c1", "p1", 9); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("kill before start: %v", err)
	}
	started, err := s.task.Start(s.ctx(), &taskapi.StartRequest{ID: "c1", ExecID: "p1"})
	check(t, err)
	if started.Pid <= init {
		t.Errorf("pid %d, init %d", started.Pid, init)
	}
	if code := s.wait("c1", "p1"); code != 0 {
		t.Errorf("exit code %d", code)
	}
	buf := make([]byte, 64)
	if n, err := r.Read(buf); err != nil || string(buf[:n]) != "fine" {
		t.Errorf("output %q, %v", buf[:n], err)
	}
	if q := <-d.asked; q.PodNamespace != "blue" || q.PodName != "web" || q.PodUid != "uid-1" || q.Probe != "ok" {
		t.Errorf("asked %v", q)
	}
	st, err := s.task.State(s.ctx(), &taskapi.StateRequest{ID: "c1", ExecID: "p1"})
	check(t, err)
	if st.Status != tasktypes.Status_STOPPED || st.Pid != started.Pid || st.ExitedAt == nil || st.Stdout != out {
		t.Errorf("state %v", st)
	}
	if _, err := s.task.Start(s.ctx(), &taskapi.StartRequest{ID: "c1", ExecID: "p1"}); !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
		t.Errorf("second start: %v", err)
	}
	if err := s.kill("c1", "p1", 9); !errdefs.IsNotFound(err) {
		t.Errorf("kill after end: %v", err)
	}
	check(t, s.remove("c1", "p1"))
	if err := s.remove("c1", "p1"); !errdefs.IsNotFound(err) {
		t.Errorf("second delete: %v", err)
	}
	want := []string{"/tasks/create", "/tasks/start", "/tasks/exec-added", "/tasks/exec-started", "/tasks/exit", "/tasks/delete"}
	if got := s.allTopics(); !reflect.DeepEqual(got, want) {
		t.Errorf("events %v, want %v", got, want)
	}
}

func TestProbeAnswers(t *testing.T) {
	s := start(t, &vmmtest.VMM{})
	neverInGuest(t, s.up())
	s.run("c1", []string{"sleep"})
	s.daemon()
	for argument, want := range map[string]struct {
		code uint32
		says string
	}{
		"fails": {1, "HTTP probe failed with statuscode: 503"},
		"error": {1, "network probe: not yet"},
		"odd":   {1, "odd"},
		"large": {0, strings.Repeat("€", probe.MaxOutput/3)},
	} {
		out, r := hearing(t)
		check(t, s.probe(argument, argument, out))
		if code := s.wait("c1", argument); code != want.code {
			t.Errorf("%s: exit code %d", argument, code)
		}
		got := make([]byte, len(want.says))
		if _, err := io.ReadFull(r, got); err != nil || string(got) != want.says {
			t.Errorf("%s: output %.100q, %v", argument, got, err)
		}
		check(t, r.SetReadDeadline(time.Unix(1, 0)))
		if n, err := r.Read(got); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: more output: %d %v", argument, n, err)
		}
		check(t, s.remove("c1", argument))
	}
	// With every stream, and with none.
	in, out, errw := fifo(t), fifo(t), fifo(t)
	check(t, s.exec("c1", "all", []string{probe.Program, "ok"}, func(r *taskapi.ExecProcessRequest) { r.Stdin, r.Stdout, r.Stderr = in, out, errw }))
	check(t, s.exec("c1", "none", []string{probe.Program, "ok"}, nil))
	check(t, s.exec("c1", "tty", []string{probe.Program, "hang"}, func(r *taskapi.ExecProcessRequest) { r.Terminal, r.Stdin, r.Stdout = true, in, out }))
	for _, exec := range []string{"all", "none", "tty"} {
		_, err := s.task.Start(s.ctx(), &taskapi.StartRequest{ID: "c1", ExecID: exec})
		check(t, err)
		if exec == "tty" {
			_, err := s.task.ResizePty(s.ctx(), &taskapi.ResizePtyRequest{ID: "c1", ExecID: exec, Width: 80, Height: 25})
			check(t, err)
			check(t, s.kill("c1", exec, 2))
		}
		s.wait("c1", exec)
		check(t, s.remove("c1", exec))
	}
}

func TestProbeWithoutDaemon(t *testing.T) {
	s := start(t, &vmmtest.VMM{})
	neverInGuest(t, s.up())
	s.run("c1", []string{"sleep"})
	err := s.probe("p1", "ok", "")
	if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "kubestack") {
		t.Errorf("start: %v", err)
	}
	check(t, s.remove("c1", "p1"))
	for exec, args := range map[string][]string{
		"no": {probe.Program}, "two": {probe.Program, "a", "b"}, "empty": {probe.Program, ""}, "long": {probe.Program, strings.Repeat("x", probe.MaxArgument+1)},
	} {
		check(t, s.exec("c1", exec, args, nil))
		if _, err := s.task.Start(s.ctx(), &taskapi.StartRequest{ID: "c1", ExecID: exec}); !errdefs.IsInvalidArgument(errgrpc.ToNative(err)) {
			t.Errorf("%s: %v", exec, err)
		}
		check(t, s.remove("c1", exec))
	}
	// It comes, and goes in the middle of a question.
	d := s.daemon()
	out, r := hearing(t)
	check(t, s.probe("p1", "hang", out))
	<-d.asked
	check(t, d.rpc.Close())
	if code := s.wait("c1", "p1"); code != 1 {
		t.Errorf("exit code %d", code)
	}
	buf := make([]byte, 200)
	if n, err := r.Read(buf); err != nil || !strings.Contains(string(buf[:n]), "network probe: ") {
		t.Errorf("output %q, %v", buf[:n], err)
	}
}

func TestProbeIsCancelled(t *testing.T) {
	for name, c := range map[string]struct {
		end  func(*shim, *vmmtest.VM) error
		code uint32
	}{
		"kill":      {func(s *shim, _ *vmmtest.VM) error { return s.kill("c1", "p1", 9) }, 137},
		"term":      {func(s *shim, _ *vmmtest.VM) error { return s.kill("c1", "p1", 15) }, 143},
		"container": {func(s *shim, _ *vmmtest.VM) error { return s.kill("c1", "", 9) }, 137},
		"vm":        {func(s *shim, vm *vmmtest.VM) error { return vm.Kill() }, 137},
	} {
		t.Run(name, func(t *testing.T) {
			s := start(t, &vmmtest.VMM{})
			vm := s.up()
			s.run("c1", []string{"sleep"})
			d := s.daemon()
			check(t, s.probe("p1", "hang", fifo(t)))
			<-d.asked
			for _, harmless := range []uint32{0, 17, 28} {
				check(t, s.kill("c1", "p1", harmless))
			}
			// The guest has no say in it.
			vm.Agent.Emit(&hyperstart.Event{What: &hyperstart.Event_Exit{Exit: &hyperstart.Exit{ContainerId: "c1", ExecId: "p1"}}})
			if err := s.remove("c1", "p1"); !errdefs.IsFailedPrecondition(err) {
				t.Errorf("delete of a running probe: %v", err)
			}
			check(t, c.end(s, vm))
			if code := s.wait("c1", "p1"); code != c.code {
				t.Errorf("exit code %d, want %d", code, c.code)
			}
			select {
			case <-d.cancelled:
			case <-s.ctx().Done():
				t.Error("the daemon goes on with it")
			}
			check(t, s.remove("c1", "p1"))
		})
	}
}

// TestProbeUnread has nobody read what is said: only a kill ends that.
func TestProbeUnread(t *testing.T) {
	s := start(t, &vmmtest.VMM{})
	s.up()
	s.run("c1", []string{"sleep"})
	s.daemon()
	path, f := hearing(t)
	check(t, f.SetWriteDeadline(time.Now().Add(100*time.Millisecond)))
	for {
		if _, err := f.Write(make([]byte, 4096)); err != nil {
			break
		}
	}
	check(t, s.probe("p1", "large", path))
	check(t, s.kill("c1", "p1", 9))
	if _, err := io.CopyN(io.Discard, f, 64<<10); err != nil {
		t.Fatal(err)
	}
	s.wait("c1", "p1")
	check(t, s.remove("c1", "p1"))
}
