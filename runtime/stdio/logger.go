package stdio

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"time"

	"github.com/containerd/errdefs"
)

// loggerStart bounds how long a logging program may take until it is ready.
const loggerStart = 10 * time.Second

// logger is a running logging program (containerd's binary:// protocol): it reads
// standard output on descriptor 3, standard error on 4 and closes 5 when it is ready.
type logger struct {
	done chan struct{}
}

func startLogger(ctx context.Context, u *url.URL, namespace, id string) (_ *logger, out, errw *os.File, err error) {
	var ends [3][2]*os.File
	defer func() {
		for _, e := range ends {
			for _, f := range e {
				if f != nil {
					_ = f.Close()
				}
			}
		}
	}()
	for i := range ends {
		if ends[i][0], ends[i][1], err = os.Pipe(); err != nil {
			return nil, nil, nil, fmt.Errorf("logging program: %w", err)
		}
	}
	var args []string
	for k, vs := range u.Query() {
		args = append(args, k)
		if len(vs) > 0 {
			args = append(args, vs[0])
		}
	}
	cmd := exec.Command(u.Path, args...)
	cmd.Env = append(os.Environ(), "CONTAINER_ID="+id, "CONTAINER_NAMESPACE="+namespace)
	cmd.ExtraFiles = []*os.File{ends[0][0], ends[1][0], ends[2][1]}
	if err := cmd.Start(); err != nil {
		return nil, nil, nil, fmt.Errorf("logging program: %w", err)
	}
	l := &logger{done: make(chan struct{})}
	go func() { // ends with the program, which ends with its input
		_ = cmd.Wait()
		close(l.done)
	}()
	_ = ends[2][1].Close()
	ends[2][1] = nil
	if err := ready(ctx, ends[2][0]); err != nil {
		_ = cmd.Process.Kill()
		<-l.done
		return nil, nil, nil, err
	}
	out, errw = ends[0][1], ends[1][1]
	ends[0][1], ends[1][1] = nil, nil
	return l, out, errw, nil
}

func ready(ctx context.Context, f *os.File) error {
	deadline := time.Now().Add(loggerStart)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	_ = f.SetReadDeadline(deadline)
	var b [1]byte
	if _, err := f.Read(b[:]); os.IsTimeout(err) {
		return fmt.Errorf("logging program is not ready: %w", errdefs.ErrAborted)
	}
	return nil
}

// loggerEnd is how long a logging program may take to write what it has read.
const loggerEnd = 10 * time.Second

func (l *logger) wait() {
	if l == nil {
		return
	}
	t := time.NewTimer(loggerEnd)
	defer t.Stop()
	select {
	case <-l.done:
	case <-t.C:
	}
}
