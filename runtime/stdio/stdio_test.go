package stdio

import (
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// guest is a process's streams: what the test reads and writes for it.
type guest struct{ ends [3]net.Conn }

func (g *guest) dial(_ context.Context, fd uint32) (net.Conn, error) {
	ours, theirs := net.Pipe()
	g.ends[fd] = theirs
	return ours, nil
}

func fifo(t *testing.T) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(p, 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestOutput(t *testing.T) {
	out, file := fifo(t), filepath.Join(t.TempDir(), "log")
	g := &guest{}
	s, err := Open(t.Context(), Config{Stdout: out, Stderr: "file://" + file}, "ns", "c", g.dial)
	if err != nil {
		t.Fatal(err)
	}
	// A reader that comes late and goes away loses nothing that it has not taken.
	first, err := os.Open(out)
	if err != nil {
		t.Fatal(err)
	}
	big := bytes.Repeat([]byte("0123456789abcdef"), 1<<14)
	go func() {
		_, _ = g.ends[1].Write(big)
		_ = g.ends[1].Close()
		_, _ = g.ends[2].Write([]byte("oops"))
		_ = g.ends[2].Close()
	}()
	head := make([]byte, 1000)
	if _, err := io.ReadFull(first, head); err != nil {
		t.Fatal(err)
	}
	second, err := os.Open(out)
	if err != nil {
		t.Fatal(err)
	}
	_ = first.Close()
	rest, err := io.ReadAll(second)
	if err != nil || !bytes.Equal(append(head, rest...), big) {
		t.Errorf("got %d bytes, want %d: %v", len(head)+len(rest), len(big), err)
	}
	s.Drain(t.Context())
	s.Close()
	if b, err := os.ReadFile(file); err != nil || string(b) != "oops" {
		t.Errorf("log file has %q, %v", b, err)
	}
}

func TestStdin(t *testing.T) {
	in := fifo(t)
	g := &guest{}
	s, err := Open(t.Context(), Config{Stdin: in}, "ns", "c", g.dial)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for _, text := range []string{"first", "second"} { // detach and attach again
		w, err := os.OpenFile(in, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.WriteString(text); err != nil {
			t.Fatal(err)
		}
		_ = w.Close()
	}
	s.CloseStdin()
	s.CloseStdin()
	got, err := io.ReadAll(g.ends[0])
	if err != nil || string(got) != "firstsecond" {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestCloseEndsAProcessThatLives(t *testing.T) {
	g := &guest{}
	s, err := Open(t.Context(), Config{Stdin: fifo(t), Stdout: fifo(t)}, "ns", "c", g.dial)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	s.Drain(ctx)
	s.Close()
}

func TestOpenRefuses(t *testing.T) {
	g := &guest{}
	if _, err := Open(t.Context(), Config{Stdout: "npipe:////./x"}, "ns", "c", g.dial); !errdefs.IsNotImplemented(err) {
		t.Errorf("got %v", err)
	}
	if _, err := Open(t.Context(), Config{Stdout: filepath.Join(t.TempDir(), "none")}, "ns", "c", g.dial); err == nil {
		t.Error("a missing fifo was opened")
	}
}

func TestLogger(t *testing.T) {
	dir := t.TempDir()
	program := filepath.Join(dir, "logger")
	text := "#!/bin/sh\nexec 5>&-\n{ echo \"$CONTAINER_ID $1 $2\"; cat <&3; } >" + dir + "/log\n"
	if err := os.WriteFile(program, []byte(text), 0o700); err != nil {
		t.Fatal(err)
	}
	g := &guest{}
	uri := "binary://" + program + "?tag=x"
	s, err := Open(t.Context(), Config{Stdout: uri, Stderr: uri}, "ns", "c7", g.dial)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = g.ends[1].Write([]byte("hello\n"))
	_ = g.ends[1].Close()
	_ = g.ends[2].Close()
	s.Drain(t.Context())
	s.Close()
	if b, err := os.ReadFile(dir + "/log"); err != nil || string(b) != "c7 tag x\nhello\n" {
		t.Errorf("log has %q, %v", b, err)
	}
}

// TestCloseWithoutReader: the fifo is full and its reader gone, as after the end of an
// exec's client.
func TestCloseWithoutReader(t *testing.T) {
	g := &guest{}
	s, err := Open(t.Context(), Config{Stdout: fifo(t)}, "ns", "c", g.dial)
	if err != nil {
		t.Fatal(err)
	}
	// What does not fit the fifo is taken from the guest and waits to be written.
	if _, err := g.ends[1].Write(make([]byte, 64<<10+chunk)); err != nil {
		t.Fatal(err)
	}
	closed := make(chan struct{})
	go func() {
		s.Close()
		close(closed)
	}()
	select {
	case <-closed:
	case <-time.After(20 * time.Second):
		t.Fatal("close waits for a reader")
	}
}
