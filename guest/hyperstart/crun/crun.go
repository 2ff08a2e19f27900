// Package crun runs the OCI runtime.
//
// It owns crun's command line, its error log and the console socket. It must not know
// the protocol or where root file systems come from.
package crun

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/guest/hyperstart/reaper"
)

// Runtime is one crun state directory. Its methods may be called concurrently for
// different containers.
type Runtime struct {
	// Path of the binary; Root its state directory; Scratch a directory for sockets,
	// logs and pid files, short because socket names are limited to 107 bytes.
	Path, Root, Scratch string
	Reaper              *reaper.Reaper

	serial atomic.Uint64
}

// Process is a process crun left to PID 1.
type Process struct {
	PID int
	// PidFD refers to the process even after its number has been reused.
	PidFD int
	// Done gets the status once.
	Done <-chan reaper.Status
	// Console is the terminal's master side, nil without terminal.
	Console *os.File
}

// Create creates container id from bundle, its stdio being the given files.
func (r *Runtime) Create(ctx context.Context, id, bundle string, stdio [3]*os.File, terminal bool) (*Process, error) {
	return r.spawn(ctx, stdio, terminal, func(pidFile string, console []string) []string {
		args := append([]string{"create", "--bundle", bundle, "--pid-file", pidFile}, console...)
		return append(args, id)
	})
}

// Exec starts process (OCI process JSON) in container id.
func (r *Runtime) Exec(ctx context.Context, id string, process []byte, stdio [3]*os.File, terminal bool) (*Process, error) {
	file := r.name("process")
	if err := os.WriteFile(file, process, 0o600); err != nil {
		return nil, fmt.Errorf("write process: %w", err)
	}
	defer os.Remove(file)
	return r.spawn(ctx, stdio, terminal, func(pidFile string, console []string) []string {
		args := append([]string{"exec", "--detach", "--process", file, "--pid-file", pidFile}, console...)
		return append(args, id)
	})
}

// Start lets the created container run its program. It does itself what `crun start`
// does to a container without hooks, a byte into the FIFO its init waits on: a process
// less, which under software emulation is 150 ms of a Pod's start.
func (r *Runtime) Start(ctx context.Context, id string) error {
	fifo := filepath.Join(r.Root, id, "exec.fifo")
	fd, err := unix.Open(fifo, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	switch err {
	case nil:
	case unix.ENOENT:
		return r.run(ctx, [3]*os.File{}, "start", id)
	case unix.ENXIO:
		return fmt.Errorf("start container: its init has died: %w", errdefs.ErrFailedPrecondition)
	default:
		return fmt.Errorf("start container: %w", err)
	}
	defer unix.Close(fd)
	// First, as crun does: the FIFO's absence is how it knows a started container.
	if err := unix.Unlink(fifo); err != nil {
		return fmt.Errorf("start container: %w", err)
	}
	if _, err := unix.Write(fd, []byte{0}); err != nil {
		return fmt.Errorf("start container: %w", err)
	}
	return nil
}

// Update changes the resources (OCI LinuxResources JSON) of a container.
func (r *Runtime) Update(ctx context.Context, id string, resources []byte) error {
	file := r.name("resources")
	if err := os.WriteFile(file, resources, 0o600); err != nil {
		return fmt.Errorf("write resources: %w", err)
	}
	defer os.Remove(file)
	return r.run(ctx, [3]*os.File{}, "update", "--resources", file, id)
}

// Delete kills what is left of a container and forgets it.
func (r *Runtime) Delete(ctx context.Context, id string) error {
	if _, err := os.Stat(filepath.Join(r.Root, id)); os.IsNotExist(err) {
		return nil
	}
	return r.run(ctx, [3]*os.File{}, "delete", "--force", id)
}

func (r *Runtime) name(kind string) string {
	return filepath.Join(r.Scratch, kind+strconv.FormatUint(r.serial.Add(1), 10))
}

func (r *Runtime) spawn(ctx context.Context, stdio [3]*os.File, terminal bool,
	args func(pidFile string, console []string) []string) (*Process, error) {
	pidFile := r.name("pid")
	defer os.Remove(pidFile)
	var console []string
	var sock *consoleSocket
	if terminal {
		s, err := listenConsole(r.name("tty"))
		if err != nil {
			return nil, err
		}
		defer s.close()
		sock, console = s, []string{"--console-socket", s.path}
	}
	window := r.Reaper.Window()
	defer window.Close()
	if err := r.run(ctx, stdio, args(pidFile, console)...); err != nil {
		return nil, err
	}
	b, err := os.ReadFile(pidFile)
	if err != nil {
		return nil, fmt.Errorf("read pid file: %w", err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return nil, fmt.Errorf("read pid file: %w", err)
	}
	p := &Process{PID: pid, PidFD: -1, Done: window.Adopt(pid)}
	// It fails for a process that is already dead, whose status is in Done.
	if fd, err := unix.PidfdOpen(pid, 0); err == nil {
		p.PidFD = fd
	}
	if sock != nil {
		if p.Console, err = sock.receive(); err != nil {
			_ = unix.Kill(pid, unix.SIGKILL)
			return nil, err
		}
	}
	return p, nil
}

func (r *Runtime) run(ctx context.Context, stdio [3]*os.File, args ...string) error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	files := make([]uintptr, 3)
	for i, f := range stdio {
		if f == nil {
			f = null
		}
		files[i] = f.Fd()
	}
	log := r.name("log")
	defer os.Remove(log)
	argv := append([]string{r.Path, "--root", r.Root, "--cgroup-manager", "cgroupfs",
		"--log", log, "--log-format", "json"}, args...)
	pid, done, err := r.Reaper.Start(r.Path, argv, &syscall.ProcAttr{
		Env:   []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"},
		Files: files,
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return err
	}
	select {
	case st := <-done:
		if st.Code != 0 {
			return &Error{Command: args[0], Code: st.Code, Message: lastMessage(log)}
		}
		return nil
	case <-ctx.Done():
		// The pid is ours until the status has been taken.
		_ = unix.Kill(pid, unix.SIGKILL)
		<-done
		return fmt.Errorf("crun %s: %w", args[0], ctx.Err())
	}
}

// Error is a command of crun that failed.
type Error struct {
	Command string
	Code    uint32
	Message string
}

func (e *Error) Error() string {
	m := e.Message
	if m == "" {
		m = "exit status " + strconv.FormatUint(uint64(e.Code), 10)
	}
	return "crun " + e.Command + ": " + m
}

// maxLog bounds how much of crun's log is read back.
const maxLog = 16 << 10

func lastMessage(log string) string {
	f, err := os.Open(log)
	if err != nil {
		return ""
	}
	defer f.Close()
	buf := make([]byte, maxLog)
	n, _ := f.Read(buf)
	lines := bytes.Split(bytes.TrimSpace(buf[:n]), []byte("\n"))
	last := lines[len(lines)-1]
	var entry struct {
		Msg string `json:"msg"`
	}
	if json.Unmarshal(last, &entry) == nil && entry.Msg != "" {
		return entry.Msg
	}
	return string(last)
}
