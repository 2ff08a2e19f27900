// Package record is what a shim writes down about its Pod before it takes anything of
// the host, so that somebody else can give it back after a crash.
//
// It owns the files: one directory a sandbox, one JSON document in it, replaced as a
// whole. It must not know how anything in it is made or removed.
package record

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/atomicfile"
	"github.com/hypernetes/hypernetes/runtime/cgroup"
	"github.com/hypernetes/hypernetes/runtime/nic"
)

// Record is the document. Fields are set before what they describe comes to be.
type Record struct {
	ID        string `json:"id"`
	Namespace string `json:"namespace"`
	Bundle    string `json:"bundle"`
	// Socket is the shim's, Shim its process, VMM the virtual machine's.
	Socket string  `json:"socket"`
	Shim   Process `json:"shim"`
	VMM    Process `json:"vmm,omitzero"`
	// Storage is the storage daemon's process, if the Pod has one.
	Storage Process       `json:"storage,omitzero"`
	Cgroup  *cgroup.Group `json:"cgroup,omitempty"`
	Network nic.State     `json:"network,omitzero"`
	// Pod is for people.
	Pod string `json:"pod,omitempty"`
}

// Process names a process for as long as the host runs: pids are used again, a pid with
// the time it started is not.
type Process struct {
	PID int `json:"pid"`
	// Start is in clock ticks since boot, as in /proc/<pid>/stat.
	Start uint64 `json:"start"`
}

// Find returns the process with that pid as it is now.
//
// Errors: errdefs.ErrNotFound.
func Find(pid int) (Process, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return Process{}, fmt.Errorf("process %d: %w", pid, errdefs.ErrNotFound)
	}
	// The name in parentheses may hold anything; field 22 is the 20th after it.
	text := string(b)
	f := strings.Fields(text[strings.LastIndexByte(text, ')')+1:])
	if len(f) < 20 || f[0] == "Z" || f[0] == "X" {
		return Process{}, fmt.Errorf("process %d has ended: %w", pid, errdefs.ErrNotFound)
	}
	start, err := strconv.ParseUint(f[19], 10, 64)
	if err != nil {
		return Process{}, fmt.Errorf("process %d: start time %q: %w", pid, f[19], errdefs.ErrInternal)
	}
	return Process{PID: pid, Start: start}, nil
}

// Alive tells whether the process still runs.
func (p Process) Alive() bool {
	if p.PID <= 0 {
		return false
	}
	now, err := Find(p.PID)
	return err == nil && now == p
}

// Kill kills the process, if it runs, and waits at most limit for its end.
//
// Errors: errdefs.ErrAborted if it does not end.
func (p Process) Kill(ctx context.Context, limit time.Duration) error {
	return p.end(ctx, unix.SIGKILL, limit)
}

// AwaitEnd waits at most limit for the end of the process.
//
// Errors: errdefs.ErrAborted if it does not end.
func (p Process) AwaitEnd(ctx context.Context, limit time.Duration) error {
	return p.end(ctx, 0, limit)
}

func (p Process) end(ctx context.Context, signal unix.Signal, limit time.Duration) error {
	fd, err := unix.PidfdOpen(p.PID, 0)
	if err != nil {
		if p.Alive() {
			return fmt.Errorf("process %d: %w", p.PID, err)
		}
		return nil
	}
	defer unix.Close(fd)
	// The descriptor pins the process: what it names now is what is meant.
	if !p.Alive() {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, signal, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", p.PID, err)
	}
	if d, ok := ctx.Deadline(); ok {
		limit = min(limit, time.Until(d))
	}
	for until := time.Now().Add(limit); ; { // a signal may interrupt the wait
		left := max(0, time.Until(until))
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(left/time.Millisecond))
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fmt.Errorf("wait for process %d: %w", p.PID, err)
		case n == 0:
			return fmt.Errorf("process %d does not end: %w", p.PID, errdefs.ErrAborted)
		default:
			return nil
		}
	}
}

var validID = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]{0,127}$`)

// Dir is where the sandbox's files are below the shims' state directory.
//
// Errors: errdefs.ErrInvalidArgument for names that are no file names.
func Dir(stateDir, namespace, id string) (string, error) {
	if !validID.MatchString(namespace) || !validID.MatchString(id) {
		return "", fmt.Errorf("namespace %.200q and id %.200q must be letters, digits and ._-, at most 128: %w", namespace, id, errdefs.ErrInvalidArgument)
	}
	return filepath.Join(stateDir, "sandboxes", namespace, id), nil
}

// Save replaces the record; it is on disk when Save returns.
func (r *Record) Save(stateDir string) error {
	dir, err := Dir(stateDir, r.Namespace, r.ID)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("sandbox state: %w", err)
	}
	b, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("sandbox state: %w", err)
	}
	if err := atomicfile.Write(filepath.Join(dir, "state.json"), b, 0o600); err != nil {
		return fmt.Errorf("sandbox state: %w", err)
	}
	return nil
}

// Load reads a sandbox's record.
//
// Errors: errdefs.ErrNotFound, errdefs.ErrDataLoss if it cannot be read.
func Load(stateDir, namespace, id string) (*Record, error) {
	dir, err := Dir(stateDir, namespace, id)
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(filepath.Join(dir, "state.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("sandbox %s: %w", id, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("sandbox state: %w", err)
	}
	var r Record
	if err := json.Unmarshal(b, &r); err != nil {
		return nil, fmt.Errorf("sandbox state of %s: %w: %w", id, err, errdefs.ErrDataLoss)
	}
	return &r, nil
}

// List returns all records; what cannot be read is in the error, with the others.
func List(stateDir string) ([]*Record, error) {
	files, err := filepath.Glob(filepath.Join(stateDir, "sandboxes", "*", "*", "state.json"))
	if err != nil {
		return nil, err
	}
	var out []*Record
	var errs []error
	for _, f := range files {
		dir := filepath.Dir(f)
		r, err := Load(stateDir, filepath.Base(filepath.Dir(dir)), filepath.Base(dir))
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		out = append(out, r)
	}
	return out, errors.Join(errs...)
}

// Remove removes the record; it succeeds if there is none.
func (r *Record) Remove(stateDir string) error {
	dir, err := Dir(stateDir, r.Namespace, r.ID)
	if err != nil {
		return err
	}
	return os.RemoveAll(dir)
}
