package supervisor

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/proc"
)

// here starts components as ordinary children and remembers the order.
type here struct {
	mu      sync.Mutex
	started []string
	strays  []proc.ID
}

func (h *here) Strays(string, []string) []proc.ID {
	h.mu.Lock()
	defer h.mu.Unlock()
	strays := h.strays
	h.strays = nil
	return strays
}

func (h *here) Start(cmd *exec.Cmd, component string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.started = append(h.started, component)
	return cmd.Start()
}

func files(dir string) Files {
	return Files{
		Log:    func(c string) string { return filepath.Join(dir, c+".log") },
		Record: func(c string) string { return filepath.Join(dir, c+".json") },
	}
}

// shell is a component that runs a script and is ready at once.
func shell(name, script string, after ...string) Spec {
	return Spec{
		Name: name, Path: "/bin/sh", Args: []string{name, "-c", script}, Env: []string{"PATH=/usr/bin:/bin"}, After: after,
		Ready: func(context.Context) error { return nil }, StopTimeout: 2 * time.Second,
	}
}

const forever = "exec sleep 1000"

func start(t *testing.T, dir string, l Launcher, specs ...Spec) *Supervisor {
	t.Helper()
	s, err := New(l, files(dir), specs)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Stop() })
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := s.Start(ctx); err != nil {
		t.Fatal(err)
	}
	return s
}

func of(s *Supervisor, name string) Status {
	for _, st := range s.Status() {
		if st.Name == name {
			return st
		}
	}
	return Status{}
}

// await waits for a component's state to satisfy ok.
func await(t *testing.T, s *Supervisor, name string, ok func(Status) bool) Status {
	t.Helper()
	deadline, tick := time.After(time.Minute), time.NewTicker(10*time.Millisecond)
	defer tick.Stop()
	for {
		if st := of(s, name); ok(st) {
			return st
		}
		select {
		case <-deadline:
			t.Fatalf("%s stays %+v", name, of(s, name))
		case <-tick.C:
		}
	}
}

func TestOrder(t *testing.T) {
	l := &here{}
	gate := make(chan struct{})
	a := shell("a", forever)
	a.Ready = func(context.Context) error {
		select {
		case <-gate:
			return nil
		default:
			return errors.New("not yet")
		}
	}
	s, err := New(l, files(t.TempDir()), []Spec{a, shell("b", forever, "a"), shell("c", forever)})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Stop()
	done := make(chan error, 1)
	go func() { done <- s.Start(t.Context()) }()
	await(t, s, "c", func(st Status) bool { return st.State == Ready })
	if st := of(s, "b"); st.State != Pending {
		t.Errorf("b is %s before a is ready", st.State)
	}
	close(gate)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	s.Stop()
	for _, st := range s.Status() {
		if st.State != Stopped || st.PID != 0 {
			t.Errorf("after Stop: %+v", st)
		}
	}
	s.Stop() // may be called again
}

func TestUnknownDependency(t *testing.T) {
	if _, err := New(&here{}, files(t.TempDir()), []Spec{shell("a", forever, "b"), shell("b", forever)}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("error %v", err)
	}
}

func TestRespawn(t *testing.T) {
	s := start(t, t.TempDir(), &here{}, shell("a", forever))
	old := of(s, "a").PID
	if err := unix.Kill(old, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	st := await(t, s, "a", func(st Status) bool { return st.State == Ready && st.PID != 0 && st.PID != old })
	if st.Restarts != 1 {
		t.Errorf("restarts: %d", st.Restarts)
	}
}

func TestFailingTellsLastWords(t *testing.T) {
	dir := t.TempDir()
	a := shell("a", "echo the cause; exit 1")
	a.Ready = func(context.Context) error { return errors.New("never") }
	s, err := New(&here{}, files(dir), []Spec{a})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Stop()
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if err := s.Start(ctx); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "the cause") {
		t.Errorf("Start: %v", err)
	}
	await(t, s, "a", func(st Status) bool { return st.State == Failing && strings.Contains(st.LastError, "the cause") })
}

func TestMissingProgram(t *testing.T) {
	a := shell("a", "")
	a.Path = "/nonexistent/program"
	s, err := New(&here{}, files(t.TempDir()), []Spec{a})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Stop()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := s.Start(ctx); err == nil || !strings.Contains(err.Error(), "/nonexistent/program") {
		t.Errorf("Start: %v", err)
	}
}

// TestAdoption leaves a process to a second supervisor as if the first had been
// killed, which cannot be done to oneself: the first is just never stopped.
func TestAdoption(t *testing.T) {
	dir := t.TempDir()
	first := start(t, dir, &here{}, shell("same", forever), shell("changed", forever))
	pids := map[string]int{"same": of(first, "same").PID, "changed": of(first, "changed").PID}

	l := &here{}
	changed := shell("changed", forever)
	changed.Inputs = map[string]string{"/config": "new"}
	// The first supervisor would respawn what the second ends.
	for _, c := range first.components {
		c.spec.Path = "/nonexistent"
	}
	second := start(t, dir, l, shell("same", forever), changed)
	if st := of(second, "same"); st.PID != pids["same"] || !st.Adopted {
		t.Errorf("not adopted: %+v, was %d", st, pids["same"])
	}
	if st := of(second, "changed"); st.PID == pids["changed"] || st.Adopted {
		t.Errorf("adopted in spite of another configuration: %+v", st)
	}
	if len(l.started) != 1 || l.started[0] != "changed" {
		t.Errorf("started %v", l.started)
	}
	if err := unix.Kill(pids["same"], unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	await(t, second, "same", func(st Status) bool { return st.State == Ready && st.PID != pids["same"] && !st.Adopted })
}

func TestStopInsists(t *testing.T) {
	a := shell("a", "trap '' TERM; while :; do sleep 0.1; done")
	a.StopTimeout = 300 * time.Millisecond
	s := start(t, t.TempDir(), &here{}, a)
	pid := of(s, "a").PID
	s.Stop()
	if _, err := proc.Find(pid); err == nil {
		t.Errorf("process %d lives on", pid)
	}
}

func TestStopByName(t *testing.T) {
	s := start(t, t.TempDir(), &here{}, shell("a", forever), shell("b", forever, "a"))
	s.Stop("b")
	if a, b := of(s, "a"), of(s, "b"); a.State != Ready || b.State != Stopped {
		t.Errorf("a %s, b %s", a.State, b.State)
	}
}

func TestWordsOf(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	for content, want := range map[string]string{
		"": "none", "a\nb\n\n \n": "b", strings.Repeat("x", 40<<10) + "\nend": "end", "\xff\n": "?",
	} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := wordsOf(path); got != want {
			t.Errorf("%.20q: %q, want %q", content, got, want)
		}
	}
	if got := wordsOf(path + "none"); got != "none" {
		t.Errorf("no file: %q", got)
	}
}

// TestStraysEnd is a supervisor killed between starting a process and recording it.
func TestStraysEnd(t *testing.T) {
	stray := exec.Command("sleep", "1000")
	if err := stray.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- stray.Wait() }()
	t.Cleanup(func() { _ = stray.Process.Kill() })
	id, err := proc.Find(stray.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	start(t, t.TempDir(), &here{strays: []proc.ID{id}}, shell("one", forever))
	select {
	case <-ended:
	case <-time.After(time.Minute):
		t.Error("the stray lives beside the new process")
	}
}

func TestStartAfterTheEnd(t *testing.T) {
	h := &here{}
	s, err := New(h, files(t.TempDir()), []Spec{shell("one", forever)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Start(ctx); !errors.Is(err, context.Canceled) || len(h.started) > 0 {
		t.Errorf("%v, started %v", err, h.started)
	}
}

func TestUnready(t *testing.T) {
	var sick atomic.Bool
	spec := shell("one", forever)
	spec.Ready = func(context.Context) error {
		if sick.Load() {
			return errors.New("no answer")
		}
		return nil
	}
	s, err := New(&here{}, files(t.TempDir()), []Spec{spec})
	if err != nil {
		t.Fatal(err)
	}
	s.watchEvery = 5 * time.Millisecond
	t.Cleanup(func() { s.Stop() })
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	pid := of(s, "one").PID
	sick.Store(true)
	await(t, s, "one", func(st Status) bool { return st.State == Unready && st.LastError == "no answer" })
	sick.Store(false)
	st := await(t, s, "one", func(st Status) bool { return st.State == Ready })
	if st.PID != pid || st.Restarts != 0 || st.LastError != "" {
		t.Errorf("%+v, want process %d untouched", st, pid)
	}
}

// TestGate holds a component back until its gate opens, and lets it be stopped before.
func TestGate(t *testing.T) {
	l, gate := &here{}, make(chan struct{})
	held, kept := shell("held", forever), shell("kept", forever)
	held.Gate, kept.Gate = gate, make(chan struct{})
	s, err := New(l, files(t.TempDir()), []Spec{shell("free", forever), held, kept})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Stop()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Start(ctx) }()
	await(t, s, "free", func(st Status) bool { return st.State == Ready })
	if st := of(s, "held"); st.State != Pending {
		t.Errorf("behind its gate: %+v", st)
	}
	close(gate)
	await(t, s, "held", func(st Status) bool { return st.State == Ready })
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("start: %v", err)
	}
	s.Stop("kept")
	if st := of(s, "kept"); st.State != Stopped {
		t.Errorf("stopped behind its gate: %+v", st)
	}
}
