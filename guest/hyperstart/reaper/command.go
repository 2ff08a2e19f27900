package reaper

import (
	"context"
	"fmt"
	"io"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxOutput bounds what is kept of a program's output, its end.
const maxOutput = 16 << 10

// Command runs a program to its end, as os/exec must not, and returns its exit status
// and the end of what it wrote to stdout and stderr. If ctx ends it is killed; a
// program the kernel does not let die (its disk hangs) is waited for all the same.
func (r *Reaper) Command(ctx context.Context, argv ...string) (int, string, error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDONLY, 0)
	if err != nil {
		return 0, "", err
	}
	defer null.Close()
	from, to, err := os.Pipe()
	if err != nil {
		return 0, "", fmt.Errorf("run %s: %w", argv[0], err)
	}
	defer from.Close()
	pidfd := -1
	_, done, err := r.Start(argv[0], argv, &syscall.ProcAttr{
		Env:   []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"},
		Files: []uintptr{null.Fd(), to.Fd(), to.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true, PidFD: &pidfd},
	})
	to.Close()
	if err != nil {
		return 0, "", err
	}
	proc := os.NewFile(uintptr(pidfd), argv[0])
	defer proc.Close()
	killed := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(killed)
		_ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0)
	})
	var out tail
	_, readErr := io.Copy(&out, from)
	st := <-done
	if !stop() {
		<-killed // it uses the descriptor
	}
	if err := ctx.Err(); err != nil {
		return 0, "", fmt.Errorf("run %s: %w", argv[0], err)
	}
	if readErr != nil {
		return 0, "", fmt.Errorf("read output of %s: %w", argv[0], readErr)
	}
	return int(st.Code), string(out), nil
}

// tail keeps the end of what is written.
type tail []byte

func (t *tail) Write(p []byte) (int, error) {
	*t = append(*t, p...)
	if over := len(*t) - maxOutput; over > 0 {
		*t = append((*t)[:0], (*t)[over:]...)
	}
	return len(p), nil
}
