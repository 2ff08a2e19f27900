package stdio

import (
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

func open(t *testing.T, r *Registry, cfg Config) *IO {
	t.Helper()
	s, err := Open(r, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func stream(t *testing.T, r *Registry, fd uint32) net.Conn {
	t.Helper()
	host, guest := net.Pipe()
	if err := r.Register(Key{"c", "", fd}, guest); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { host.Close() })
	return host
}

func TestCopy(t *testing.T) {
	r := NewRegistry()
	in, out := stream(t, r, 0), stream(t, r, 1)
	s := open(t, r, Config{Container: "c", Stdin: true, Stdout: true})
	if s.Child()[2] != nil {
		t.Fatal("stderr was not asked for")
	}
	// The child is cat.
	child := s.Child()
	s.child = [3]*os.File{}
	s.Started(nil)
	go func() {
		_, _ = io.Copy(child[1], child[0])
		child[0].Close()
		child[1].Close()
	}()
	go func() {
		_, _ = in.Write([]byte("hello"))
		in.Close()
	}()
	got, err := io.ReadAll(out)
	if err != nil || string(got) != "hello" {
		t.Fatalf("%q %v", got, err)
	}
	s.Exited(time.Minute)
	s.Close()
}

func TestReattach(t *testing.T) {
	r := NewRegistry()
	first := stream(t, r, 1)
	s := open(t, r, Config{Container: "c", Stdout: true})
	child := s.Child()
	s.child = [3]*os.File{}
	s.Started(nil)
	if _, err := child[1].Write([]byte("a")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1)
	if _, err := io.ReadFull(first, b); err != nil || b[0] != 'a' {
		t.Fatalf("%q %v", b, err)
	}
	first.Close() // the shim goes away; what comes meanwhile waits in the pipe
	if _, err := child[1].Write([]byte("b")); err != nil {
		t.Fatal(err)
	}
	second := stream(t, r, 1)
	if _, err := io.ReadFull(second, b); err != nil || b[0] != 'b' {
		t.Fatalf("%q %v", b, err)
	}
	child[1].Close()
	if rest, err := io.ReadAll(second); err != nil || len(rest) != 0 {
		t.Fatalf("%q %v", rest, err)
	}
	s.Close()
	if len(r.taken)+len(r.waiting) != 0 {
		t.Fatal("the registry keeps a dead process")
	}
}

func TestNobodyReads(t *testing.T) {
	r := NewRegistry()
	s := open(t, r, Config{Container: "c", Stdout: true, Stderr: true})
	child := s.Child()
	s.child = [3]*os.File{}
	s.Started(nil)
	if _, err := child[1].Write(make([]byte, 1024)); err != nil {
		t.Fatal(err)
	}
	child[1].Close()
	child[2].Close()
	begin := time.Now()
	s.Exited(50 * time.Millisecond)
	s.Close()
	if time.Since(begin) > 10*time.Second {
		t.Fatal("an exit waits for a reader")
	}
	if err := s.Resize(1, 1); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Fatalf("resize without terminal: %v", err)
	}
	if err := r.Register(Key{"c", "", 3}, nil); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Fatalf("descriptor 3: %v", err)
	}
}
