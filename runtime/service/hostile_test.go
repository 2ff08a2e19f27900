package service

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"testing"
	"time"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
	"github.com/hypernetes/hypernetes/runtime/config"
	"github.com/hypernetes/hypernetes/runtime/vmm/vmmtest"
)

// The guests of these tests answer wrongly, too much or not at all. Whatever they do,
// containerd's calls return and the Pod can be deleted.

// patient is longer than any deadline below and much shorter than for ever.
const patient = 15 * time.Second

func impatientConfig(c *config.Config) {
	c.HeartbeatTimeoutSeconds, c.HeartbeatSeconds, c.BootTimeoutSeconds = 1, 1, 3
}

// within fails the test if f does not return in time.
func within(t *testing.T, what string, limit time.Duration, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	select {
	case <-done:
	case <-time.After(limit):
		t.Fatalf("%s has not returned after %v", what, limit)
	}
}

// mutiny has the guest of vm never answer the methods, or answer them with err.
func mutiny(t *testing.T, vm *vmmtest.VM, err error, methods ...string) {
	vm.Agent.Lock()
	defer vm.Agent.Unlock()
	vm.Agent.Mutiny = func(_ context.Context, method string) error {
		for _, m := range methods {
			if m != method {
				continue
			}
			if err != nil {
				return err
			}
			<-t.Context().Done()
			return t.Context().Err()
		}
		return nil
	}
}

// remains checks what containerd asks at its restart and gives five seconds for.
func (s *shim) remains() {
	s.t.Helper()
	within(s.t, "containerd's questions at its restart", 3*time.Second, func() {
		for _, name := range []string{id, "c1"} {
			if _, err := s.task.Connect(s.ctx(), &taskapi.ConnectRequest{ID: name}); err != nil {
				s.t.Errorf("connect %s: %v", name, err)
			}
			if _, err := s.task.Pids(s.ctx(), &taskapi.PidsRequest{ID: name}); err != nil {
				s.t.Errorf("pids %s: %v", name, err)
			}
			if _, err := s.task.State(s.ctx(), &taskapi.StateRequest{ID: name}); err != nil {
				s.t.Errorf("state %s: %v", name, err)
			}
		}
		s.status()
	})
}

func TestHostileNeverAnswers(t *testing.T) {
	s := start(t, &vmmtest.VMM{}, impatientConfig)
	vm := s.up()
	s.run("c1", []string{"sleep"})
	// Everything but Ping, which shows a guest in best health.
	mutiny(t, vm, nil, "Signal", "Delete", "Stats", "Update", "Pause", "Resume", "Exec", "Resize", "ReadFile", "PutFiles", "Shutdown")
	s.remains()
	short := func() context.Context {
		ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
		t.Cleanup(cancel)
		return ctx
	}
	for name, call := range map[string]func() error{
		"stats":  func() error { _, err := s.task.Stats(short(), &taskapi.StatsRequest{ID: "c1"}); return err },
		"pause":  func() error { _, err := s.task.Pause(short(), &taskapi.PauseRequest{ID: "c1"}); return err },
		"term":   func() error { _, err := s.task.Kill(short(), &taskapi.KillRequest{ID: "c1", Signal: 15}); return err },
		"delete": func() error { _, err := s.task.Delete(short(), &taskapi.DeleteRequest{ID: "c1"}); return err },
	} {
		within(t, name, patient, func() {
			if call() == nil {
				t.Errorf("%s succeeded", name)
			}
		})
	}
	// SIGKILL is not answered, and no end is told of: the VM goes, and the container.
	within(t, "the container's end", patient, func() {
		_ = s.kill("c1", "", 9)
		if status := s.wait("c1", ""); status != 137 {
			t.Errorf("status %d", status)
		}
		check(t, s.remove("c1", ""))
	})
	if info := s.status().Info["info"]; !strings.Contains(info, "does not end container c1") {
		t.Errorf("info %s", info)
	}
}

func TestHostileKeepsWhatIsDeleted(t *testing.T) {
	for name, answer := range map[string]error{"no answer": nil, "refusal": fmt.Errorf("no: %w", errdefs.ErrPermissionDenied)} {
		t.Run(name, func(t *testing.T) {
			s := start(t, &vmmtest.VMM{}, impatientConfig)
			vm := s.up()
			s.run("c1", []string{"exit", "3"})
			if got := s.wait("c1", ""); got != 3 {
				t.Errorf("status %d", got)
			}
			mutiny(t, vm, answer, "Delete")
			within(t, "delete", patient, func() {
				for { // containerd tries again, with seconds between
					ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
					r, err := s.task.Delete(ctx, &taskapi.DeleteRequest{ID: "c1"})
					cancel()
					if err == nil {
						if r.ExitStatus != 3 {
							t.Errorf("status %d", r.ExitStatus)
						}
						return
					}
					<-time.After(100 * time.Millisecond)
				}
			})
			if s.status().State != stateReady {
				t.Error("the other containers' VM is gone too")
			}
		})
	}
}

// TestHostileStatistics: one guest's silence costs the node's round of questions little,
// and its figures are bounded.
func TestHostileStatistics(t *testing.T) {
	s := start(t, &vmmtest.VMM{})
	vm := s.up()
	s.run("c1", []string{"sleep"})
	mutiny(t, vm, nil, "Stats")
	ask := func() error {
		_, err := s.task.Stats(s.ctx(), &taskapi.StatsRequest{ID: "c1"})
		return err
	}
	within(t, "first question", statsTimeout+5*time.Second, func() {
		if ask() == nil {
			t.Error("the guest has answered")
		}
	})
	within(t, "ten more questions", 3*time.Second, func() {
		for range 10 {
			if ask() == nil {
				t.Error("the guest has answered")
			}
		}
	})
	check(t, s.kill("c1", "", 9))
	s.wait("c1", "")
}

// TestHostileEvents: ends of what does not exist, each end a thousand times, endless
// memory kills.
func TestHostileEvents(t *testing.T) {
	s := start(t, &vmmtest.VMM{})
	vm := s.up()
	s.run("c1", []string{"sleep"})
	s.run("c2", []string{"sleep"})
	before := runtime.NumGoroutine()
	for i := range 3000 {
		for _, e := range []*hyperstart.Event{
			{What: &hyperstart.Event_Exit{Exit: &hyperstart.Exit{ContainerId: fmt.Sprint("other", i)}}},
			{What: &hyperstart.Event_Exit{Exit: &hyperstart.Exit{ContainerId: "c1", ExecId: fmt.Sprint(i)}}},
			{What: &hyperstart.Event_Exit{Exit: &hyperstart.Exit{ContainerId: "c1", Status: 1 << 31}}},
			{What: &hyperstart.Event_Oom{Oom: &hyperstart.OOM{ContainerId: "c2"}}},
			{What: &hyperstart.Event_Oom{Oom: &hyperstart.OOM{ContainerId: strings.Repeat("x", 100)}}},
			{},
		} {
			vm.Agent.Emit(e)
		}
	}
	within(t, "c1's end", patient, func() {
		if got := s.wait("c1", ""); got != 255 {
			t.Errorf("status %d", got)
		}
	})
	if now := runtime.NumGoroutine(); now > before+100 {
		t.Errorf("%d goroutines, %d before", now, before)
	}
	check(t, s.kill("c2", "", 9))
	s.wait("c2", "") // after everything that was said before
	count := map[string]int{}
	for _, topic := range s.allTopics() {
		count[topic]++
	}
	if count["/tasks/exit"] != 2 || count["/tasks/oom"] == 0 || count["/tasks/oom"] > 20 {
		t.Errorf("events %v", count)
	}
}

func TestHostileErrors(t *testing.T) {
	s := start(t, &vmmtest.VMM{})
	vm := s.up()
	s.run("c1", []string{"sleep"})
	mutiny(t, vm, status.Error(codes.NotFound, strings.Repeat("\x1b[2J\r", 1<<17)), "Pause")
	_, err := s.task.Pause(s.ctx(), &taskapi.PauseRequest{ID: "c1"})
	if err == nil || len(err.Error()) > 8<<10 || strings.ContainsAny(err.Error(), "\x1b\r") {
		t.Errorf("error of %d bytes", len(fmt.Sprint(err)))
	}
	check(t, s.kill("c1", "", 9))
	s.wait("c1", "")
}

// TestHostileChannel: guests that do not even speak the protocol. No sandbox becomes of
// them, at the boot's deadline at the latest, and nothing is left.
func TestHostileChannel(t *testing.T) {
	header := func(kind byte, flags uint16, stream, length uint32) []byte {
		b := []byte{0, kind, 0, 0}
		binary.BigEndian.PutUint16(b[2:], flags)
		b = binary.BigEndian.AppendUint32(b, stream)
		return binary.BigEndian.AppendUint32(b, length)
	}
	flood := func(frame []byte) func(net.Conn) {
		return func(c net.Conn) {
			go func() { _, _ = io.Copy(io.Discard, c) }()
			for {
				if _, err := c.Write(frame); err != nil {
					return
				}
			}
		}
	}
	for name, guest := range map[string]func(net.Conn){
		"reads nothing":   func(net.Conn) {},
		"says nothing":    func(c net.Conn) { _, _ = io.Copy(io.Discard, c) },
		"garbage":         flood([]byte("\xff\x00garbage ")),
		"pings":           flood(header(2, 1, 0, 7)),
		"opens streams":   flood(header(1, 1, 2, 0)),
		"data of nobody":  flood(append(header(0, 0, 99, 1), 'x')),
		"endless frame":   flood(header(0, 0, 1, 1<<31)),
		"hangs up":        func(c net.Conn) { _ = c.Close() },
		"goes away":       flood(header(3, 0, 0, 0)),
		"window overflow": flood(header(1, 0, 1, 1<<32-1)),
		"reply too long":  flood(append(header(0, 2, 1, 8), 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0)),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := start(t, &vmmtest.VMM{Guest: guest}, impatientConfig)
			check(t, s.create())
			within(t, "start", patient, func() {
				if _, err := s.startSandbox(); err == nil {
					t.Error("the sandbox has started")
				}
			})
			within(t, "shutdown", patient, func() {
				_, err := s.sandbox.ShutdownSandbox(s.ctx(), &sandboxapi.ShutdownSandboxRequest{SandboxID: id})
				check(t, err)
			})
			s.mu.Lock()
			defer s.mu.Unlock()
			if s.detached != 1 || s.users != 0 {
				t.Errorf("%d networks detached, %d users left", s.detached, s.users)
			}
		})
	}
}

// TestHostileStopsReading: a guest in good health stops reading its channel, so that
// not even a request to shut down can be sent.
func TestHostileStopsReading(t *testing.T) {
	gate, end := make(chan struct{}), make(chan struct{})
	defer close(end)
	s := start(t, &vmmtest.VMM{Wire: func(c net.Conn) net.Conn { return &gated{c, gate, end} }}, impatientConfig)
	s.up()
	s.run("c1", []string{"sleep"})
	close(gate)
	s.remains()
	within(t, "stop", patient+10*time.Second, func() {
		_ = s.kill("c1", "", 9)
		_, err := s.sandbox.StopSandbox(s.ctx(), &sandboxapi.StopSandboxRequest{SandboxID: id})
		check(t, err)
		if got := s.wait("c1", ""); got != 137 {
			t.Errorf("status %d", got)
		}
		check(t, s.remove("c1", ""))
	})
}

// gated is a connection whose end nobody reads any more once gate is closed, until end is.
type gated struct {
	net.Conn
	gate, end chan struct{}
}

func (g *gated) Read(p []byte) (int, error) {
	select {
	case <-g.gate:
		<-g.end
		return 0, io.EOF
	default:
	}
	n, err := g.Conn.Read(p)
	return n, err
}
