package qemu

import (
	"io"
	"regexp"
	"strings"
	"sync"
)

const (
	// tailBytes is how much of the console (and of QEMU's stderr) is remembered.
	tailBytes = 8 << 10
	// consoleBacklog is how many chunks of at most 4 KiB wait for a slow console writer;
	// what comes on top is dropped.
	consoleBacklog = 64
)

// tail remembers the last bytes written to it.
type tail struct {
	mu  sync.Mutex
	buf []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := len(p)
	if n > tailBytes {
		p = p[n-tailBytes:]
	}
	if over := len(t.buf) + len(p) - tailBytes; over > 0 {
		t.buf = append(t.buf[:0], t.buf[over:]...)
	}
	t.buf = append(t.buf, p...)
	return n, nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.buf)
}

// drain reads r to its end, so that the writer (the guest's serial port, QEMU's stderr)
// never waits, remembers the tail and hands w (may be nil) what it takes in time. done
// is closed when r has ended and w's last Write has returned.
func drain(r io.Reader, t *tail, w io.Writer) (done chan struct{}) {
	done = make(chan struct{})
	var chunks chan []byte
	written := make(chan struct{})
	if w == nil {
		close(written)
	} else {
		chunks = make(chan []byte, consoleBacklog)
		go func() {
			defer close(written)
			for c := range chunks {
				if _, err := w.Write(c); err != nil {
					w = io.Discard
				}
			}
		}()
	}
	go func() {
		defer close(done)
		buf := make([]byte, 4096)
		for {
			n, err := r.Read(buf)
			if n > 0 {
				_, _ = t.Write(buf[:n])
				if chunks != nil {
					select {
					case chunks <- append([]byte(nil), buf[:n]...):
					default:
					}
				}
			}
			if err != nil {
				break
			}
		}
		if chunks != nil {
			close(chunks)
		}
		<-written
	}()
	return done
}

var panicPattern = regexp.MustCompile(`Kernel panic - not syncing: [^\r\n]{0,200}`)

// panicLine finds the kernel's last panic message in what it printed.
func panicLine(console string) string {
	all := panicPattern.FindAllString(console, -1)
	if len(all) == 0 {
		return ""
	}
	return printable(all[len(all)-1])
}

// lastLine returns the last line that says anything, for people: what the guest wrote
// goes to logs and Pod events, so only printable characters stay.
func lastLine(s string) string {
	lines := strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == '\r' })
	for i := len(lines) - 1; i >= 0; i-- {
		if l := strings.TrimSpace(printable(lines[i])); l != "" {
			return l
		}
	}
	return ""
}

func printable(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return -1
		}
		return r
	}, s)
	return s[:min(len(s), 256)]
}
