package hyperctl

import (
	"errors"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/containerd/console"
	"github.com/spf13/cobra"
)

// errDetached means that the user left a terminal with ^P^Q.
var errDetached = errors.New("detached")

// terminal is where the user sits: three streams, one of them perhaps a tty.
type terminal struct {
	in       io.Reader
	out, err io.Writer
}

func terminalOf(cmd *cobra.Command) *terminal {
	return &terminal{in: cmd.InOrStdin(), out: cmd.OutOrStdout(), err: cmd.ErrOrStderr()}
}

type windowSize struct {
	Width, Height uint16
}

// raw runs f with the terminal, if there is one, in raw mode, and tells f of
// its size now and whenever it changes.
func (t *terminal) raw(f func(resize <-chan windowSize) error) error {
	file, ok := t.in.(*os.File)
	if !ok {
		return f(nil)
	}
	c, err := console.ConsoleFromFile(file)
	if err != nil {
		return f(nil) // a pipe: fine, there is just nothing to set
	}
	if err := c.SetRaw(); err != nil {
		return err
	}
	sizes := make(chan windowSize, 1)
	changed := make(chan os.Signal, 1)
	signal.Notify(changed, syscall.SIGWINCH)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			if s, err := c.Size(); err == nil {
				select {
				case sizes <- windowSize{s.Width, s.Height}:
				case <-stop:
					return
				}
			}
			select {
			case <-changed:
			case <-stop:
				return
			}
		}
	}()
	err = f(sizes)
	signal.Stop(changed)
	close(stop)
	<-stopped
	return errors.Join(err, c.Reset())
}

// input is what a process with a terminal reads: standard input if that was
// asked for or is a terminal, too. The end of a file or of /dev/null would hang
// up the process's terminal before its output has been read.
func (t *terminal) input(wanted bool) io.Reader {
	if file, ok := t.in.(*os.File); !wanted && ok {
		if _, err := console.ConsoleFromFile(file); err == nil {
			return t.in
		}
	}
	if wanted {
		return t.in
	}
	return nil
}

// detachable is input that ends with errDetached at ^P^Q.
func detachable(in io.Reader) io.Reader {
	if in == nil {
		return nil
	}
	return &detachReader{r: in}
}

const ctrlP, ctrlQ = 0x10, 0x11

type detachReader struct {
	r       io.Reader
	pending bool // a ^P has been held back
}

func (d *detachReader) Read(p []byte) (int, error) {
	if len(p) < 2 {
		return 0, io.ErrShortBuffer
	}
	off := 0
	if d.pending {
		off = 1 // room for the ^P that may have to be given after all
	}
	n, err := d.r.Read(p[off:])
	if n == 0 {
		return 0, err
	}
	got := p[off : off+n]
	if d.pending {
		d.pending = false
		if got[0] == ctrlQ {
			return 0, errDetached
		}
		p[0] = ctrlP
		got = p[:n+1]
	}
	for i := 0; i+1 < len(got); i++ {
		if got[i] == ctrlP && got[i+1] == ctrlQ {
			return i, errDetached
		}
	}
	if got[len(got)-1] == ctrlP && err == nil {
		d.pending = true
		return len(got) - 1, nil
	}
	return len(got), err
}
