package hyperctl

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/console"
	"golang.org/x/sys/unix"
)

func TestHyperctl(t *testing.T) {
	n := newNode(t)
	began := func(name string, f func(*testing.T, *node)) {
		t.Run(name, func(t *testing.T) { f(t, n) })
	}
	began("starts the node", startsNode)
	// Everything else may share the node, at the same time.
	t.Run("pods", func(t *testing.T) {
		for _, c := range []struct {
			name string
			run  func(*testing.T, *node)
		}{
			{"the readme's line", readme},
			{"detached", detached},
			{"foreground", foreground},
			{"terminal", terminal},
			{"logs", logs},
			{"attach", attach},
			{"endings", endings},
			{"images", images},
			{"mistakes", mistakes},
		} {
			t.Run(c.name, func(t *testing.T) {
				t.Parallel()
				c.run(t, n)
			})
		}
	})
	began("survives hyperctl and h8s", survives)
	n.want(t, 0, "", "rm", "-fa")
	n.want(t, 0, "POD ID", "ps", "-a")
}

func startsNode(t *testing.T, n *node) {
	out := n.want(t, 0, "is not running; starting it", "info", "-o", "json")
	var info struct {
		Node       string
		Handlers   []string
		Conditions map[string]string
	}
	if err := json.Unmarshal([]byte(out), &info); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if info.Node != n.name || fmt.Sprint(info.Handlers) != "[hyper runc]" || info.Conditions["RuntimeReady"] != "ok" || info.Conditions["NetworkReady"] != "ok" {
		t.Errorf("info: %+v", info)
	}
	if _, _, errs := n.call(nil, "info"); errs != "" {
		t.Errorf("the second command starts the node again: %s", errs)
	}
}

// hostKernel is the machine's `uname -r`.
func hostKernel(t *testing.T) string {
	t.Helper()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	return unix.ByteSliceToString(u.Release[:])
}

// readme is what hyperctl was first asked to do, with an image that is at hand.
func readme(t *testing.T, n *node) {
	pod := n.want(t, 0, "", "run", "-d", "debian", "sleep", "1000")
	if len(pod) != 64 {
		t.Fatalf("run -d printed %q", pod)
	}
	if kernel := n.want(t, 0, "", "exec", pod, "uname", "-r"); kernel == hostKernel(t) || kernel == "" {
		t.Errorf("kernel in the Pod: %q", kernel)
	}
	s := n.terminal(t, "exec", "-t", pod, "/bin/bash")
	s.send(t, "tty; cat /proc/1/comm; exit 6\n")
	s.expect(t, "/dev/pts/0", "sleep")
	if code := s.wait(t); code != 6 {
		t.Errorf("exec -t ends with %d", code)
	}
	n.want(t, 0, "", "rm", "-f", pod)
}

func detached(t *testing.T, n *node) {
	pod := n.want(t, 0, "", "run", "-d", "--name", "box", "-e", "GREETING=hello", "-m", "96M", "-c", "0.5", "-w", "/tmp", "--hostname", "pandora",
		"busybox", "sh", "-c", "echo started; exec sleep 1000")
	until(t, "the Pod prints", func() bool { return n.want(t, 0, "", "logs", "box") == "started" })
	n.want(t, 0, "hello /tmp pandora", "exec", "box", "sh", "-c", "echo $GREETING $(pwd) $(hostname)")
	n.want(t, 9, "", "exec", pod[:12], "sh", "-c", "exit 9")
	n.want(t, 127, "no-such-program", "exec", pod, "no-such-program")
	if code, out, _ := n.call(strings.NewReader("through stdin"), "exec", "-i", "box", "cat"); code != 0 || out != "through stdin" {
		t.Errorf("exec -i: code %d, %q", code, out)
	}
	n.want(t, 1, "is taken by", "run", "-d", "--name", "box", "busybox", "true")
	n.want(t, 0, "running", "ps")
	n.want(t, 1, "is running; stop it first", "rm", "box")
	n.want(t, 0, "box", "stop", "-t", "1", "box")
	n.want(t, 1, "", "exec", "box", "true")
	n.want(t, 0, "exited (137)", "ps", "-a")
	n.want(t, 0, "box", "rm", "box")
	n.want(t, 1, `no Pod "box"`, "rm", "box")
}

func foreground(t *testing.T, n *node) {
	code, out, errs := n.call(nil, "run", "--rm", "busybox", "sh", "-c", "echo out; echo err >&2; exit 7")
	if code != 7 || out != "out\n" || errs != "err\n" {
		t.Errorf("code %d, %q, %q", code, out, errs)
	}
	code, out, errs = n.call(strings.NewReader(strings.Repeat("0123456789", 50000)), "run", "-i", "--rm", "busybox", "wc", "-c")
	if code != 0 || strings.TrimSpace(out) != "500000" {
		t.Errorf("stdin: code %d, %q, %q", code, out, errs)
	}
}

// terminal runs a shell as one sits in front of it: output, size, signals, detaching.
func terminal(t *testing.T, n *node) {
	s := n.terminal(t, "run", "-it", "--name", "shell", "busybox", "sh")
	s.send(t, "echo is $((40+2)); stty size\n")
	s.expect(t, "is 42", "24 80")
	if err := s.console.Resize(console.WinSize{Width: 100, Height: 30}); err != nil {
		t.Fatal(err)
	}
	until(t, "the guest learns the new size", func() bool {
		s.send(t, "stty size\n")
		return s.printed("30 100")
	})
	s.send(t, "sleep 1000\n")
	until(t, "sleep runs", func() bool {
		return strings.Contains(n.want(t, 0, "", "exec", "shell", "ps"), "sleep 1000")
	})
	s.send(t, "\x03echo interrupted $?\n")
	s.expect(t, "interrupted 130")
	s.send(t, "\x10\x11") // ^P^Q
	if code := s.wait(t); code != 0 {
		t.Errorf("leaving with ^P^Q ends with %d", code)
	}
	n.want(t, 0, "running", "ps")
	again := n.terminal(t, "attach", "shell")
	again.send(t, "echo back $((6*7)); exit 4\n")
	again.expect(t, "back 42")
	again.wait(t)
	until(t, "the shell has ended", func() bool { return strings.Contains(n.want(t, 0, "", "ps", "-a"), "exited (4)") })
	n.want(t, 0, "", "rm", "shell")
}

func logs(t *testing.T, n *node) {
	n.want(t, 0, "", "run", "-d", "--name", "talk", "h8s.local/testbox", "log", "5", "100ms")
	n.want(t, 0, "line 4", "logs", "-f", "talk")
	if out := n.want(t, 0, "", "logs", "--tail", "2", "talk"); out != "line 3\nline 4" {
		t.Errorf("tail: %q", out)
	}
	n.want(t, 0, "", "rm", "-f", "talk")
}

func attach(t *testing.T, n *node) {
	n.want(t, 0, "", "run", "-d", "-i", "--name", "echo", "busybox", "sh", "-c", `while read line; do echo "got $line"; [ "$line" = end ] && exit 3; done`)
	code, out, errs := n.call(&typist{lines: []string{"one\n", "end\n"}}, "attach", "echo")
	if code != 0 || !strings.Contains(out, "got one\ngot end\n") {
		t.Errorf("attach: code %d, %q, %q", code, out, errs)
	}
	until(t, "it has ended", func() bool { return strings.Contains(n.want(t, 0, "", "ps", "-a"), "exited (3)") })
	n.want(t, 0, "", "rm", "echo")
}

// typist gives a line after a pause, as a person would. containerd reads an attached
// stdin before it has connected the output, and what is printed in between is in the log
// only: no condition tells when it is safe.
type typist struct{ lines []string }

func (r *typist) Read(b []byte) (int, error) {
	if len(r.lines) == 0 {
		return 0, io.EOF
	}
	time.Sleep(2 * time.Second)
	n := copy(b, r.lines[0])
	r.lines = r.lines[1:]
	return n, nil
}

func endings(t *testing.T, n *node) {
	n.want(t, 137, "", "run", "--rm", "h8s.local/testbox", "suicide", "9")
	n.want(t, 0, "", "run", "-d", "--name", "polite", "h8s.local/testbox", "signals", "-code", "5")
	until(t, "it handles signals", func() bool { return strings.Contains(n.want(t, 0, "", "logs", "polite"), "ready") })
	n.want(t, 0, "", "stop", "polite")
	n.want(t, 0, "exited (5)", "ps", "-a")
	n.want(t, 137, "", "run", "-m", "64M", "--name", "hog", "h8s.local/testbox", "mem", "500")
	n.want(t, 0, "OOMKilled", "ps", "-a")
	n.want(t, 0, "", "rm", "polite", "hog")
}

func images(t *testing.T, n *node) {
	n.want(t, 0, "sha256:", "pull", "nginx")
	n.want(t, 0, "sha256:", "pull", "docker.io/library/nginx:1.22")
	n.want(t, 0, "resouer/sample:v2", "load", filepath.Join(n.out, "images", "sample.tar"))
	var list []struct{ Tags []string }
	if err := json.Unmarshal([]byte(n.want(t, 0, "", "images", "-o", "json")), &list); err != nil || len(list) < 2 {
		t.Errorf("images -o json: %d %v", len(list), err)
	}
	n.want(t, 0, "", "rmi", "resouer/sample:v2")
	n.want(t, 1, "not on this node", "rmi", "resouer/sample:v2")
	bad := filepath.Join(t.TempDir(), "bad.tar")
	if err := os.WriteFile(bad, []byte("this is no archive"), 0o600); err != nil {
		t.Fatal(err)
	}
	n.want(t, 2, "bad.tar", "load", bad)
}

func mistakes(t *testing.T, n *node) {
	n.want(t, 1, "hyperctl load FILE.tar", "run", "-d", "--pull", "never", "ubuntu:trusty", "sleep", "1000")
	n.want(t, 1, "hyperctl load FILE.tar", "run", "-d", "h8s.local/none:1")
	n.want(t, 127, "no-such-program", "run", "--rm", "busybox", "no-such-program")
	n.want(t, 126, "", "run", "--rm", "busybox", "/etc/passwd")
	n.want(t, 1, "nowhere", "run", "--runtime", "nowhere", "busybox", "true")
	n.want(t, 2, "memory", "run", "-m", "much", "busybox", "true")
	n.want(t, 1, "no Pod or container", "logs", "nobody")
}

// survives stops what made the Pod and finds the Pod as it was.
func survives(t *testing.T, n *node) {
	pod := n.want(t, 0, "", "run", "-d", "--name", "lasting", "busybox", "sh", "-c", "echo kept > /note; exec sleep 1000")
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if text, err := n.command(ctx, "h8s", "down", "--keep-pods", "--name", n.name).CombinedOutput(); err != nil {
		t.Fatalf("h8s down --keep-pods: %v\n%s", err, text)
	}
	if _, _, errs := n.call(nil, "ps"); !strings.Contains(errs, "starting it") {
		t.Errorf("the node was not started again: %s", errs)
	}
	n.want(t, 0, "kept", "exec", pod, "cat", "/note")
}

// session is a hyperctl on a terminal of its own.
type session struct {
	console console.Console
	output  chan string // what was printed, in pieces; closed at the end
	seen    string
	ended   chan int
}

func (n *node) terminal(t *testing.T, args ...string) *session {
	t.Helper()
	master, path, err := console.NewPty()
	if err != nil {
		t.Fatal(err)
	}
	if err := master.Resize(console.WinSize{Width: 80, Height: 24}); err != nil {
		t.Fatal(err)
	}
	tty, err := os.OpenFile(path, os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	cmd := n.command(ctx, "hyperctl", args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	err = cmd.Start()
	_ = tty.Close()
	if err != nil {
		t.Fatal(err)
	}
	s := &session{console: master, output: make(chan string, 4096), ended: make(chan int, 1)}
	read := make(chan struct{})
	go func() {
		defer close(read)
		defer close(s.output)
		buf := make([]byte, 4096)
		for {
			k, err := master.Read(buf) // EIO when the last process has closed the terminal
			if k > 0 {
				s.output <- string(buf[:k])
			}
			if err != nil {
				return
			}
		}
	}()
	waited := make(chan struct{})
	go func() {
		defer close(waited)
		_ = cmd.Wait()
		s.ended <- cmd.ProcessState.ExitCode()
	}()
	t.Cleanup(func() {
		cancel()
		<-waited
		_ = master.Close()
		<-read
	})
	return s
}

func (s *session) send(t *testing.T, text string) {
	t.Helper()
	if _, err := io.WriteString(s.console, text); err != nil {
		t.Fatalf("type %q: %v", text, err)
	}
}

// printed reports whether text has been printed by now.
func (s *session) printed(text string) bool {
	for {
		select {
		case piece, ok := <-s.output:
			if !ok {
				return strings.Contains(s.seen, text)
			}
			s.seen += piece
		default:
			return strings.Contains(s.seen, text)
		}
	}
}

func (s *session) expect(t *testing.T, texts ...string) {
	t.Helper()
	for _, text := range texts {
		until(t, fmt.Sprintf("the terminal shows %q; it shows %q", text, s.seen), func() bool { return s.printed(text) })
	}
}

// wait returns hyperctl's exit code.
func (s *session) wait(t *testing.T) int {
	t.Helper()
	return <-s.ended // its context ends it at the latest
}
