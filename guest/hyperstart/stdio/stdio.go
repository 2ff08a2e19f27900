package stdio

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"
)

// chunk is the copy buffer; a pipe holds 64 KiB.
const chunk = 32 << 10

// quiet is how long a stream must bring nothing, after CloseStdin, for stdin to be
// closed: what the shim sent before the call may still be on its way.
const quiet = 500 * time.Millisecond

// Config says which streams a process has.
type Config struct {
	Container, Exec       string
	Terminal              bool
	Stdin, Stdout, Stderr bool
}

// IO is the standard streams of one process.
type IO struct {
	cfg     Config
	reg     *Registry
	child   [3]*os.File // the process's ends, until Started
	parent  [3]*os.File // ours
	links   [3]*link
	console *os.File

	closing atomic.Bool
	outputs sync.WaitGroup
	copiers sync.WaitGroup
	drained chan struct{}
	once    sync.Once
}

// Open makes the pipes and takes the registered streams. A stream that is not asked
// for is /dev/null to the process; one that is asked for and not there yet holds the
// process up only when its pipe is full. The caller calls Close in the end.
func Open(reg *Registry, cfg Config) (*IO, error) {
	s := &IO{cfg: cfg, reg: reg, drained: make(chan struct{})}
	want := [3]bool{cfg.Stdin, cfg.Stdout, cfg.Stderr && !cfg.Terminal}
	for fd, w := range want {
		if !w {
			continue
		}
		l := newLink()
		s.links[fd] = l
		if conn := reg.take(Key{cfg.Container, cfg.Exec, uint32(fd)}, l.attach); conn != nil {
			l.attach(conn)
		}
		if cfg.Terminal {
			continue
		}
		if err := s.pipe(fd); err != nil {
			s.closeChild()
			s.Close()
			return nil, err
		}
	}
	return s, nil
}

// pipe makes the pipe of one stream. The process's end must block, ours must not;
// they are two open files, so each has its own flag.
func (s *IO) pipe(fd int) error {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return fmt.Errorf("make pipe: %w", err)
	}
	child, parent := p[1], p[0]
	if fd == 0 {
		child, parent = p[0], p[1]
	}
	if err := unix.SetNonblock(parent, true); err != nil {
		_ = unix.Close(p[0])
		_ = unix.Close(p[1])
		return fmt.Errorf("make pipe: %w", err)
	}
	s.child[fd] = os.NewFile(uintptr(child), "stdio")
	s.parent[fd] = os.NewFile(uintptr(parent), "stdio")
	return nil
}

// Child returns the process's ends, nil where it gets /dev/null or a terminal.
func (s *IO) Child() [3]*os.File { return s.child }

func (s *IO) closeChild() {
	for i, f := range s.child {
		if f != nil {
			_ = f.Close()
			s.child[i] = nil
		}
	}
}

// Started begins copying; the process has its ends now. console is the terminal's
// master side, nil without terminal.
func (s *IO) Started(console *os.File) {
	s.closeChild()
	if console != nil {
		s.console = console
		s.parent[0], s.parent[1] = console, console
	}
	for fd := 1; fd <= 2; fd++ {
		if l := s.links[fd]; l != nil {
			s.output(s.parent[fd], l)
		}
	}
	if console != nil && s.links[1] == nil {
		s.output(console, nil) // somebody has to read a terminal
	}
	if l := s.links[0]; l != nil {
		s.copiers.Add(1)
		go s.copyIn(s.parent[0], l)
	}
	go func() {
		s.outputs.Wait()
		close(s.drained)
	}()
}

func (s *IO) output(from *os.File, to *link) {
	s.outputs.Add(1)
	s.copiers.Add(1)
	go func() {
		defer s.copiers.Done()
		defer s.outputs.Done()
		buf := make([]byte, chunk)
		for {
			n, err := from.Read(buf)
			if n > 0 && to != nil && !to.send(buf[:n]) {
				to = nil // go on reading: the process must not stop for us
			}
			if err != nil {
				break // end of file, or EIO of a terminal nobody has open any more
			}
		}
		if to != nil {
			to.close()
		}
	}()
}

func (s *IO) copyIn(to *os.File, l *link) {
	defer s.copiers.Done()
	buf := make([]byte, chunk)
	for {
		n, conn, err := l.receive(buf)
		if n > 0 {
			if _, werr := to.Write(buf[:n]); werr != nil {
				break
			}
		}
		switch {
		case err == nil:
			if s.closing.Load() {
				_ = conn.SetReadDeadline(time.Now().Add(quiet))
			}
			continue
		case errors.Is(err, net.ErrClosed):
		case s.replaced(l, conn):
			continue
		}
		break
	}
	if s.console == nil {
		_ = to.Close()
	}
	// Discard the rest: a shim that goes on writing must not hang on a full window.
	s.discard(l, buf)
}

func (s *IO) discard(l *link, buf []byte) {
	for {
		conn := l.peek()
		if conn == nil {
			return
		}
		if s.closing.Load() {
			l.patient(conn)
		}
		for {
			if _, err := conn.Read(buf); err != nil {
				break
			}
		}
		if !s.replaced(l, conn) {
			return
		}
	}
}

// replaced tells whether the shim has attached another stream since.
func (s *IO) replaced(l *link, conn net.Conn) bool {
	now := l.peek()
	return now != nil && now != conn
}

// CloseStdin ends the process's standard input after what the shim has sent so far.
func (s *IO) CloseStdin() {
	l := s.links[0]
	if l == nil || s.closing.Swap(true) {
		return
	}
	if conn := l.peek(); conn != nil {
		_ = conn.SetReadDeadline(time.Now().Add(quiet))
	} else {
		l.close()
	}
}

// Resize sets the terminal's size in characters.
func (s *IO) Resize(width, height uint32) error {
	if s.console == nil {
		return fmt.Errorf("process has no terminal: %w", errdefs.ErrFailedPrecondition)
	}
	raw, err := s.console.SyscallConn()
	if err != nil {
		return fmt.Errorf("resize terminal: %w", err)
	}
	size := &unix.Winsize{Row: uint16(min(height, 65535)), Col: uint16(min(width, 65535))}
	var ierr error
	if err := raw.Control(func(fd uintptr) { ierr = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, size) }); err != nil {
		return fmt.Errorf("resize terminal: %w", err)
	}
	if ierr != nil {
		return fmt.Errorf("resize terminal: %w", ierr)
	}
	return nil
}

// Exited says the process is dead; it waits until its output has gone into the
// streams, but no longer than limit, as children may hold the pipes open.
func (s *IO) Exited(limit time.Duration) {
	t := time.NewTimer(limit)
	defer t.Stop()
	select {
	case <-s.drained:
	case <-t.C:
	}
	if l := s.links[0]; l != nil {
		l.close()
	}
}

// Close ends everything and waits for the copying to stop.
func (s *IO) Close() {
	s.once.Do(func() {
		s.reg.Forget(s.cfg.Container, s.cfg.Exec)
		for _, l := range s.links {
			if l != nil {
				l.close()
			}
		}
		for _, f := range s.parent {
			if f != nil {
				_ = f.Close()
			}
		}
	})
	s.copiers.Wait()
}
