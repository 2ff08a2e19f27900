// Package stdio joins the standard streams of a process in the guest to what containerd
// names for them: fifos, files, or a logging program.
//
// It owns the copying and the ends on the host. It must not know containers, nor how
// guest streams are opened.
package stdio

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// chunk is the copy buffer in bytes; a fifo holds 64 KiB.
const chunk = 16 << 10

// Config names the streams: "" for none, a fifo's path, file:///path or
// binary:///program?key=value. With a terminal Stderr is ignored.
type Config struct {
	Stdin, Stdout, Stderr string
	Terminal              bool
}

// Wants tells which guest streams a configuration needs.
func (c Config) Wants() (stdin, stdout, stderr bool) {
	return c.Stdin != "", c.Stdout != "", c.Stderr != "" && !c.Terminal
}

// Dial opens the guest's end of standard stream fd.
type Dial func(ctx context.Context, fd uint32) (net.Conn, error)

// IO is the joined streams of one process. Open makes it; its methods may be called
// concurrently.
type IO struct {
	cfg     Config
	conns   [3]net.Conn
	sinks   [3]*os.File // owned by copyOut once it runs
	stdin   *os.File
	outputs sync.WaitGroup
	inputs  sync.WaitGroup
	drained chan struct{}

	closing sync.Once
	ended   sync.Once
	eof     chan struct{}
	logger  *logger
}

// Open opens both ends of every stream and starts copying. On error nothing is left
// open. id and namespace are told to a logging program.
func Open(ctx context.Context, cfg Config, namespace, id string, dial Dial) (*IO, error) {
	s := &IO{cfg: cfg, drained: make(chan struct{}), eof: make(chan struct{})}
	sinks, err := s.open(ctx, namespace, id)
	if err == nil {
		err = s.dial(ctx, dial)
	}
	if err != nil {
		for _, f := range sinks {
			if f != nil {
				_ = f.Close()
			}
		}
		s.closeAll()
		return nil, err
	}
	s.sinks = sinks
	for fd, sink := range sinks {
		if sink != nil {
			s.copyOut(s.conns[fd], sink)
		}
	}
	if s.stdin != nil {
		s.inputs.Add(1)
		go s.copyIn()
	}
	go func() { // ends with the outputs
		s.outputs.Wait()
		close(s.drained)
	}()
	return s, nil
}

// open opens the host's ends; sinks are by file descriptor.
func (s *IO) open(ctx context.Context, namespace, id string) (sinks [3]*os.File, err error) {
	in, out, errw := s.cfg.Wants()
	if in {
		if s.stdin, err = openFIFO(s.cfg.Stdin); err != nil {
			return sinks, fmt.Errorf("stdin: %w", err)
		}
	}
	if u, err := url.Parse(s.cfg.Stdout); out && err == nil && u.Scheme == "binary" {
		s.logger, sinks[1], sinks[2], err = startLogger(ctx, u, namespace, id)
		if err == nil && (!errw || s.cfg.Terminal) {
			_ = sinks[2].Close()
			sinks[2] = nil
		}
		return sinks, err
	}
	if out {
		if sinks[1], err = openSink(s.cfg.Stdout); err != nil {
			return sinks, fmt.Errorf("stdout: %w", err)
		}
	}
	if errw {
		if sinks[2], err = openSink(s.cfg.Stderr); err != nil {
			return sinks, fmt.Errorf("stderr: %w", err)
		}
	}
	return sinks, nil
}

func (s *IO) dial(ctx context.Context, dial Dial) error {
	in, out, errw := s.cfg.Wants()
	for fd, want := range [3]bool{in, out, errw} {
		if !want {
			continue
		}
		conn, err := dial(ctx, uint32(fd))
		if err != nil {
			return err
		}
		s.conns[fd] = conn
	}
	return nil
}

// openFIFO opens a fifo for reading and writing, which waits for nobody: a reader that
// goes away (containerd restarts) neither ends nor breaks the stream, and one that
// comes back goes on where it was.
func openFIFO(path string) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

func openSink(uri string) (*os.File, error) {
	u, err := url.Parse(uri)
	switch {
	case err == nil && u.Scheme == "file":
		f, err := os.OpenFile(u.Path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
		if err != nil {
			return nil, fmt.Errorf("open log file: %w", err)
		}
		return f, nil
	case err == nil && u.Scheme == "fifo":
		return openFIFO(u.Path)
	case strings.Contains(uri, "://"):
		return nil, fmt.Errorf("stream %.200q: scheme must be fifo, file or binary (and binary for both outputs): %w", uri, errdefs.ErrNotImplemented)
	}
	return openFIFO(uri)
}

func (s *IO) copyOut(from net.Conn, to *os.File) {
	s.outputs.Add(1)
	go func() {
		defer s.outputs.Done()
		defer to.Close()
		defer from.Close()
		buf := make([]byte, chunk)
		dead := false
		for {
			n, err := from.Read(buf)
			if n > 0 && !dead {
				// A full fifo blocks here, and so the guest's writer: back-pressure. A
				// broken end is read on, so that the process does not hang.
				_, werr := to.Write(buf[:n])
				dead = werr != nil
			}
			if err != nil {
				return
			}
		}
	}()
}

// copyIn copies the fifo until CloseStdin, then what is left in it.
func (s *IO) copyIn() {
	defer s.inputs.Done()
	to := s.conns[0]
	defer to.Close() // the guest reads the end of file
	buf := make([]byte, chunk)
	for {
		n, err := s.stdin.Read(buf)
		if n > 0 {
			if _, werr := to.Write(buf[:n]); werr != nil {
				return
			}
		}
		if err == nil {
			continue
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			s.drainStdin(to, buf)
		}
		return
	}
}

// drainStdin passes on what the fifo holds without waiting for more.
func (s *IO) drainStdin(to io.Writer, buf []byte) {
	raw, err := s.stdin.SyscallConn()
	if err != nil {
		return
	}
	for {
		n := 0
		if err := raw.Control(func(fd uintptr) { n, _ = unix.Read(int(fd), buf) }); err != nil || n <= 0 {
			return
		}
		if _, err := to.Write(buf[:n]); err != nil {
			return
		}
	}
}

// CloseStdin ends standard input after what has been written to the fifo so far. It is
// idempotent.
func (s *IO) CloseStdin() {
	if s == nil || s.stdin == nil {
		return
	}
	s.closing.Do(func() { _ = s.stdin.SetReadDeadline(time.Unix(1, 0)) })
}

// Drain waits until all output has been passed on, but not beyond ctx: processes left
// behind may hold the streams open.
func (s *IO) Drain(ctx context.Context) {
	if s == nil {
		return
	}
	select {
	case <-s.drained:
	case <-ctx.Done():
	}
}

// Close ends everything and waits for the copying to stop.
func (s *IO) Close() {
	if s == nil {
		return
	}
	s.ended.Do(s.closeAll)
	s.outputs.Wait()
	s.inputs.Wait()
	s.logger.wait()
}

func (s *IO) closeAll() {
	s.CloseStdin()
	for _, c := range s.conns {
		if c != nil {
			// Closing only ends our sending side; the deadline ends our reading.
			_ = c.Close()
			_ = c.SetDeadline(time.Unix(1, 0))
		}
	}
	for _, f := range s.sinks {
		if f != nil {
			// A fifo nobody reads any more is full for good: writing to it ends too.
			_ = f.SetWriteDeadline(time.Unix(1, 0))
		}
	}
	if s.stdin != nil {
		_ = s.stdin.Close()
	}
}
