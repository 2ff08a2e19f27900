package testcluster

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/console"
)

// Session is a kubectl that keeps running: logs -f, attach, exec -it, port-forward.
// What it prints is kept; Expect waits for it.
type Session struct {
	n       *Namespace
	name    string
	cmd     *exec.Cmd
	in      io.WriteCloser
	term    console.Console
	cancel  context.CancelFunc
	changed chan struct{}
	ended   chan struct{}

	mu   sync.Mutex
	out  bytes.Buffer
	read int // how much of out earlier Expects have consumed
	err  error
}

// Start starts kubectl with pipes. It is killed when the test ends.
func (n *Namespace) Start(args ...string) *Session {
	n.t.Helper()
	s := n.session(args)
	stdin, err := s.cmd.StdinPipe()
	if err != nil {
		n.t.Fatal(err)
	}
	s.in = stdin
	s.cmd.Stdout, s.cmd.Stderr = s, s
	if err := s.cmd.Start(); err != nil {
		n.t.Fatalf("kubectl %s: %v", s.name, err)
	}
	go func() {
		s.finish(s.cmd.Wait())
	}()
	return s
}

// Terminal starts kubectl on a terminal of its own, 80 columns by 24 rows.
func (n *Namespace) Terminal(args ...string) *Session {
	n.t.Helper()
	s := n.session(args)
	term, path, err := console.NewPty()
	if err != nil {
		n.t.Fatal(err)
	}
	if err := term.Resize(console.WinSize{Width: 80, Height: 24}); err != nil {
		n.t.Fatal(err)
	}
	tty, err := os.OpenFile(path, os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		n.t.Fatal(err)
	}
	s.term, s.in = term, term
	s.cmd.Stdin, s.cmd.Stdout, s.cmd.Stderr = tty, tty, tty
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	err = s.cmd.Start()
	_ = tty.Close()
	if err != nil {
		n.t.Fatalf("kubectl %s: %v", s.name, err)
	}
	go func() {
		// Ends with EIO once the last process has closed the terminal.
		_, _ = io.Copy(s, term)
		s.finish(s.cmd.Wait())
	}()
	return s
}

func (n *Namespace) session(args []string) *Session {
	ctx, cancel := context.WithCancel(context.Background())
	s := &Session{
		n: n, name: strings.Join(args, " "), cancel: cancel,
		changed: make(chan struct{}, 1), ended: make(chan struct{}),
	}
	s.cmd = n.kubectl(ctx, n.in(args)...)
	n.t.Cleanup(s.Stop)
	return s
}

// Write takes what kubectl prints.
func (s *Session) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.out.Write(p)
	s.wake()
	return len(p), nil
}

func (s *Session) wake() {
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

func (s *Session) finish(err error) {
	s.mu.Lock()
	s.err = err
	s.mu.Unlock()
	close(s.ended)
}

// Send types text.
func (s *Session) Send(text string) {
	s.n.t.Helper()
	if _, err := io.WriteString(s.in, text); err != nil {
		s.n.t.Fatalf("kubectl %s: send: %v\n%s", s.name, err, s.Output())
	}
}

// Input is kubectl's standard input, for data that is too much for Send.
func (s *Session) Input() io.Writer { return s.in }

// CloseInput sends end of file on a Session without a terminal.
func (s *Session) CloseInput() { _ = s.in.Close() }

// Resize changes the terminal's size.
func (s *Session) Resize(columns, rows uint16) {
	s.n.t.Helper()
	if err := s.term.Resize(console.WinSize{Width: columns, Height: rows}); err != nil {
		s.n.t.Fatal(err)
	}
	// The kernel tells the foreground process group; kubectl leads it.
}

// Expect waits until what was printed after the last Expect matches pattern, and
// returns the match with its groups.
func (s *Session) Expect(pattern string) []string {
	s.n.t.Helper()
	re := regexp.MustCompile(pattern)
	deadline := time.NewTimer(Patience)
	defer deadline.Stop()
	for over := false; ; {
		if m := s.match(re); m != nil {
			return m
		}
		if over {
			s.n.t.Fatalf("kubectl %s ended or said nothing more; %q did not come:\n%s", s.name, pattern, s.Output())
		}
		select {
		case <-s.changed:
		case <-s.ended:
			over = true
		case <-deadline.C:
			over = true
		}
	}
}

func (s *Session) match(re *regexp.Regexp) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	fresh := s.out.Bytes()[s.read:]
	loc := re.FindSubmatchIndex(fresh)
	if loc == nil {
		return nil
	}
	var groups []string
	for i := 0; i < len(loc); i += 2 {
		if loc[i] < 0 {
			groups = append(groups, "")
			continue
		}
		groups = append(groups, string(fresh[loc[i]:loc[i+1]]))
	}
	s.read += loc[1]
	return groups
}

// Output is everything printed so far.
func (s *Session) Output() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.out.String()
}

// Exit waits for kubectl to end by itself and returns its exit code.
func (s *Session) Exit() int {
	s.n.t.Helper()
	deadline := time.NewTimer(Patience)
	defer deadline.Stop()
	select {
	case <-s.ended:
	case <-deadline.C:
		s.n.t.Fatalf("kubectl %s does not end:\n%s", s.name, s.Output())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var exit *exec.ExitError
	if s.err != nil && !errors.As(s.err, &exit) {
		s.n.t.Fatalf("kubectl %s: %v", s.name, s.err)
	}
	return s.cmd.ProcessState.ExitCode()
}

// Stop ends kubectl.
func (s *Session) Stop() {
	s.cancel()
	if s.cmd.Process == nil {
		return
	}
	if s.term != nil {
		_ = s.term.Close()
	}
	<-s.ended
}
