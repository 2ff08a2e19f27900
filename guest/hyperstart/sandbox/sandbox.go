// Package sandbox is the Pod as a whole inside its VM: name, clock, randomness,
// kernel settings, network, scratch space and the files every container sees.
//
// It owns the sandbox's state and makes Configure repeatable. It must not know
// containers.
package sandbox

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
	"github.com/hypernetes/hypernetes/guest/hyperstart/boot"
	"github.com/hypernetes/hypernetes/guest/hyperstart/netconf"
	"github.com/hypernetes/hypernetes/guest/hyperstart/reaper"
	"github.com/hypernetes/hypernetes/guest/hyperstart/storage"
)

const defaultShm = 64 << 20

// Sandbox is the Pod's state. Its methods may be called concurrently.
type Sandbox struct {
	dir    string // /run/h8s
	reaper *reaper.Reaper

	mu      sync.Mutex
	scratch *storage.Scratch
	shm     bool
	// pause is PID 1 of the shared PID namespace, 0 when there is none.
	pause int
	files Files
}

// Files are guest paths of what every container mounts; "" where there is none.
type Files struct{ Shm, ResolvConf, Hostname, Hosts string }

// New keeps the sandbox's files below dir.
func New(dir string, r *reaper.Reaper) *Sandbox { return &Sandbox{dir: dir, reaper: r} }

// Configure brings the sandbox to the described state.
func (s *Sandbox) Configure(ctx context.Context, in *hyperstart.ConfigureRequest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	// Randomness first: a clone of a template would give out its siblings' numbers.
	if err := addEntropy(in.Entropy); err != nil {
		return err
	}
	if err := setClock(in.Clock); err != nil {
		return err
	}
	if err := s.names(in); err != nil {
		return err
	}
	if err := netconf.Apply(ctx, in.Interfaces, in.Routes, in.Neighbors); err != nil {
		return err
	}
	if err := WriteSysctls("/proc/sys", in.Sysctls); err != nil {
		return err
	}
	if err := s.mountShm(in.ShmBytes); err != nil {
		return err
	}
	if s.scratch == nil {
		sc, err := storage.OpenScratch(ctx, in.ScratchSerial, filepath.Join(s.dir, "scratch"))
		if err != nil {
			return err
		}
		s.scratch = sc
	}
	if in.SharePidNamespace && s.pause == 0 {
		return s.startPause()
	}
	return nil
}

func (s *Sandbox) names(in *hyperstart.ConfigureRequest) error {
	dir := filepath.Join(s.dir, "etc")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("make sandbox files: %w", err)
	}
	if in.Hostname != "" {
		if err := unix.Sethostname([]byte(in.Hostname)); err != nil {
			return fmt.Errorf("set hostname %q: %w", in.Hostname, err)
		}
	}
	for _, f := range []struct {
		name string
		data []byte
		path *string
	}{
		{"resolv.conf", in.ResolvConf, &s.files.ResolvConf},
		{"hostname", hostnameLine(in.Hostname), &s.files.Hostname},
		{"hosts", in.Hosts, &s.files.Hosts},
	} {
		if len(f.data) == 0 {
			continue
		}
		p := filepath.Join(dir, f.name)
		// In place, so that running containers see it too.
		if err := os.WriteFile(p, f.data, 0o644); err != nil {
			return fmt.Errorf("write sandbox file: %w", err)
		}
		*f.path = p
	}
	return nil
}

func hostnameLine(name string) []byte {
	if name == "" {
		return nil
	}
	return []byte(name + "\n")
}

func (s *Sandbox) mountShm(size uint64) error {
	if size == 0 {
		size = defaultShm
	}
	p := filepath.Join(s.dir, "shm")
	flags := uintptr(unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC)
	if s.shm {
		flags |= unix.MS_REMOUNT
	}
	if err := os.MkdirAll(p, 0o755); err != nil {
		return fmt.Errorf("make shm: %w", err)
	}
	if err := unix.Mount("shm", p, "tmpfs", flags, fmt.Sprintf("mode=1777,size=%d", size)); err != nil {
		return fmt.Errorf("mount shm of %d bytes: %w", size, err)
	}
	s.shm, s.files.Shm = true, p
	return nil
}

func (s *Sandbox) startPause() error {
	pid, _, err := s.reaper.Start("/proc/self/exe", []string{boot.PauseName}, &syscall.ProcAttr{
		Dir: "/", Files: []uintptr{0, 1, 2},
		Sys: &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID, Setsid: true},
	})
	if err != nil {
		return fmt.Errorf("start shared PID namespace: %w", err)
	}
	s.pause = pid
	// The kernel never kills its PID 1 for memory; this one must be asked for.
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), []byte("-1000"), 0); err != nil {
		return fmt.Errorf("protect shared PID namespace: %w", err)
	}
	return nil
}

// PIDNamespace is the path of the shared PID namespace.
func (s *Sandbox) PIDNamespace() (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pause == 0 {
		return "", fmt.Errorf("sandbox has no shared PID namespace; remedy: share_pid_namespace in Configure: %w", errdefs.ErrFailedPrecondition)
	}
	return fmt.Sprintf("/proc/%d/ns/pid", s.pause), nil
}

// Scratch is the scratch space; Configure mounts it.
func (s *Sandbox) Scratch() (*storage.Scratch, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.scratch == nil {
		return nil, fmt.Errorf("sandbox is not configured: %w", errdefs.ErrFailedPrecondition)
	}
	return s.scratch, nil
}

// Files returns what every container mounts.
func (s *Sandbox) Files() Files {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.files
}
