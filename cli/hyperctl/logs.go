package hyperctl

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/fsnotify/fsnotify"
	"github.com/spf13/cobra"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func newLogsCommand(o *options) *cobra.Command {
	var l logOptions
	var container string
	cmd := &cobra.Command{
		Use:   "logs [flags] POD|CONTAINER",
		Short: "Print what a Pod's process has written",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			h, err := o.connect(ctx, cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			defer h.close()
			c, err := h.findContainer(ctx, args[0], container)
			if err != nil {
				return err
			}
			if l.follow {
				w, err := h.watchExit(ctx, c.Id)
				if err != nil {
					return err
				}
				defer w.stop()
				l.done = w.done
			}
			file, err := h.logFile(ctx, c.Id)
			if err != nil {
				return err
			}
			l.stdout, l.stderr = cmd.OutOrStdout(), cmd.ErrOrStderr()
			return followLog(ctx, file, l)
		},
	}
	cmd.Flags().BoolVarP(&l.follow, "follow", "f", false, "go on until the process ends")
	cmd.Flags().BoolVarP(&l.times, "timestamps", "t", false, "begin lines with their time")
	cmd.Flags().IntVar(&l.tail, "tail", 0, "only the last `N` lines (default: all)")
	cmd.Flags().StringVar(&container, "container", "", "`NAME` of the container, if the Pod has several")
	return cmd
}

// logFile asks the runtime for a container's log file. Our own log directory
// has the same path inside and outside the node.
func (h *hyper) logFile(ctx context.Context, id string) (string, error) {
	st, err := h.pods.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: id})
	if err != nil {
		return "", h.explain("container status", err)
	}
	if st.Status.LogPath == "" {
		return "", fmt.Errorf("container %s has no log: %w", shortID(id), errdefs.ErrNotFound)
	}
	return st.Status.LogPath, nil
}

// ioConfig is how a container's first process is connected.
type ioConfig struct {
	TTY       bool `json:"tty"`
	Stdin     bool `json:"stdin"`
	StdinOnce bool `json:"stdin_once"` // the first end of input is the last
}

func (h *hyper) ioOf(ctx context.Context, id string) (ioConfig, error) {
	st, err := h.pods.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: id, Verbose: true})
	if err != nil {
		return ioConfig{}, h.explain("container status", err)
	}
	var info struct {
		Config ioConfig `json:"config"`
	}
	if err := json.Unmarshal([]byte(st.Info["info"]), &info); err != nil {
		return ioConfig{}, fmt.Errorf("container status: %w", err)
	}
	return info.Config, nil
}

type logOptions struct {
	follow         bool
	times          bool
	tail           int
	done           <-chan struct{} // with follow: the process has ended
	stdout, stderr io.Writer
}

// followLog prints a log file in the CRI format, and with follow what is added
// to it until the process has ended and everything has been read.
func followLog(ctx context.Context, file string, o logOptions) error {
	f, err := os.Open(file)
	if err != nil {
		return fmt.Errorf("log: %w", err)
	}
	defer f.Close()
	if o.tail > 0 {
		if err := seekTail(f, o.tail); err != nil {
			return fmt.Errorf("log: %w", err)
		}
	}
	p := &logPrinter{r: bufio.NewReader(f), o: o}
	if !o.follow {
		return p.drain()
	}
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch log: %w", err)
	}
	defer w.Close()
	if err := w.Add(file); err != nil {
		return fmt.Errorf("watch log: %w", err)
	}
	for {
		if err := p.drain(); err != nil {
			return err
		}
		select {
		case <-w.Events:
		case err := <-w.Errors:
			return fmt.Errorf("watch log: %w", err)
		case <-o.done:
			return p.drain()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// seekTail places f before its last n lines.
func seekTail(f *os.File, n int) error {
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	buf := make([]byte, 64<<10)
	lines := -1 // the newline that ends the last line does not count
	for off := end; off > 0; {
		size := min(int64(len(buf)), off)
		off -= size
		if _, err := f.ReadAt(buf[:size], off); err != nil {
			return err
		}
		for i := size - 1; i >= 0; i-- {
			if buf[i] != '\n' {
				continue
			}
			if lines++; lines == n {
				_, err := f.Seek(off+i+1, io.SeekStart)
				return err
			}
		}
	}
	_, err = f.Seek(0, io.SeekStart)
	return err
}

// logPrinter prints complete lines and keeps the beginning of an incomplete one.
type logPrinter struct {
	r    *bufio.Reader
	o    logOptions
	rest []byte
	mid  bool // the last part printed did not end its line
}

func (p *logPrinter) drain() error {
	for {
		part, err := p.r.ReadSlice('\n')
		p.rest = append(p.rest, part...)
		if errors.Is(err, bufio.ErrBufferFull) {
			continue
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read log: %w", err)
		}
		err = p.print(p.rest[:len(p.rest)-1])
		p.rest = p.rest[:0]
		if err != nil {
			return err
		}
	}
}

// print writes one record, "TIME STREAM TAGS TEXT"; the tag P means that the
// line goes on in the next record.
func (p *logPrinter) print(record []byte) error {
	when, rest, ok1 := bytes.Cut(record, []byte(" "))
	stream, rest, ok2 := bytes.Cut(rest, []byte(" "))
	tags, text, ok3 := bytes.Cut(rest, []byte(" "))
	if !ok1 || !ok2 || !ok3 {
		return fmt.Errorf("log: %.40q is not a record of a container log: %w", record, errdefs.ErrDataLoss)
	}
	w := p.o.stdout
	if string(stream) == "stderr" {
		w = p.o.stderr
	}
	var out []byte
	if p.o.times && !p.mid {
		out = append(append(out, when...), ' ')
	}
	out = append(out, text...)
	p.mid = strings.HasPrefix(string(tags), "P")
	if !p.mid {
		out = append(out, '\n')
	}
	_, err := w.Write(out)
	return err
}
