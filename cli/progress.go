package cli

import (
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/cluster/status"
)

// progress prints events as calm lines, one per finished step. On a terminal the
// step at work is shown too and replaced when it is done; elsewhere the same lines
// come without it.
type progress struct {
	mu  sync.Mutex
	out io.Writer
	tty bool
	// at is the text of the step at work, for erasing it.
	at string
}

func newProgress(out io.Writer) *progress {
	f, ok := out.(*os.File)
	return &progress{out: out, tty: ok && isTerminal(f)}
}

func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

func (p *progress) event(e status.Event) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch e.Kind {
	case status.Begin:
		if p.tty {
			p.erase()
			p.at = "• " + e.Name
			fmt.Fprint(p.out, p.at)
		}
	case status.Step:
		p.line("✓", e)
	case status.Warn:
		p.line("!", e)
	}
}

func (p *progress) line(mark string, e status.Event) {
	at := p.at
	p.erase()
	if e.Message == "" {
		fmt.Fprintf(p.out, "%s %-24s %5.1fs\n", mark, e.Name, e.Seconds)
	} else {
		fmt.Fprintf(p.out, "%s %-24s %5.1fs   %s\n", mark, e.Name, e.Seconds, e.Message)
	}
	if p.tty && at != "" && at != "• "+e.Name {
		p.at = at
		fmt.Fprint(p.out, at)
	}
}

func (p *progress) erase() {
	if p.at != "" {
		fmt.Fprint(p.out, "\r\033[K")
		p.at = ""
	}
}

// end removes what is shown of an unfinished step.
func (p *progress) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.erase()
}
