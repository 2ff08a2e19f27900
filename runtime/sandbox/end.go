package sandbox

import (
	"context"
	"errors"
	"os"
	"sync"
	"time"

	stats "github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/log"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
	"github.com/hypernetes/hypernetes/runtime/cgroup"
	"github.com/hypernetes/hypernetes/runtime/vmm"
)

// killedStatus is the exit status of a process that went with its VM: 128+SIGKILL.
const killedStatus = 137

// supervise waits for the VM's end, tells of every process's and gives everything back.
func (s *Sandbox) supervise() {
	defer s.wg.Done()
	<-s.vm.Done()
	e := s.vm.Exit()
	s.mu.Lock()
	planned := s.phase >= phaseStopping
	if !planned {
		s.phase = phaseStopping
		if s.reason == "" {
			s.reason = "vm ended: " + e.Reason
		}
	}
	reason := s.reason
	all := make([]*Container, 0, len(s.containers))
	for _, c := range s.containers {
		all = append(all, c)
	}
	s.mu.Unlock()
	l := log.G(s.ctx).WithField("pod", s.record.Pod).WithField("reason", reason)
	if planned && e.Reason != vmm.ReasonPanic {
		l.Info("vm has ended")
	} else {
		l.WithField("detail", e.Detail).WithField("console", s.console.String()).Error("vm has ended unexpectedly")
	}
	at := e.At
	if at.IsZero() {
		at = time.Now()
	}
	words := lastWords(reason, e, s.console.String())
	for _, c := range all {
		if !planned {
			c.explain(words)
		}
		c.exitAll(killedStatus, at)
	}
	<-s.booted // boot notices by itself
	s.end(reason)
}

// end gives everything back and marks the sandbox stopped. It runs once.
func (s *Sandbox) end(reason string) {
	s.release.Do(func() {
		if s.vm != nil {
			_ = s.vm.Kill()
			<-s.vm.Done()
		}
		if err := s.giveBack(); err != nil {
			// The record stays, so shim delete and the janitor try again.
			log.G(s.ctx).WithError(err).Error("give back host resources")
		} else if err := s.record.Remove(s.opt.Config.StateDir); s.record.ID != "" && err != nil {
			log.G(s.ctx).WithError(err).Error("remove sandbox state")
		}
		s.mu.Lock()
		s.phase, s.exitedAt = phaseStopped, time.Now()
		if s.reason == "" {
			s.reason = reason
		}
		s.mu.Unlock()
		close(s.stopped)
	})
}

func (s *Sandbox) giveBack() error {
	var errs []error
	if s.forward != nil {
		errs = append(errs, s.forward.Close())
	}
	if s.watcher != nil {
		s.watcher.Close()
	}
	if s.host != nil {
		_ = s.host.Close() // the VM is gone: so is its end
	}
	if s.attach != nil {
		errs = append(errs, s.attach.Close())
		ctx, cancel := context.WithTimeout(context.WithoutCancel(s.ctx), 10*time.Second)
		defer cancel()
		errs = append(errs, s.opt.Host.Detach(ctx, s.attach.State()))
	}
	errs = append(errs, s.giveBackVolumes())
	if s.uid != nil {
		s.uid()
	}
	errs = append(errs, s.group.leave())
	return errors.Join(errs...)
}

// follow hands the guest's events to their processes.
func (s *Sandbox) follow() {
	defer s.wg.Done()
	err := s.agent.Events(s.ctx, func(e *hyperstart.Event) {
		switch w := e.What.(type) {
		case *hyperstart.Event_Exit:
			if c := s.lookup(w.Exit.ContainerId); c != nil {
				c.guestExit(w.Exit, e.At.AsTime())
			}
		case *hyperstart.Event_Oom:
			if c := s.lookup(w.Oom.ContainerId); c != nil {
				c.oom()
			}
		}
	})
	if s.ctx.Err() != nil {
		return
	}
	// Without the channel the Pod cannot be managed any more. Usually the VM has ended
	// and this is how it shows first.
	select {
	case <-s.vm.Done():
	case <-time.After(2 * time.Second):
		log.G(s.ctx).WithError(err).Error("channel to the guest is lost")
		s.kill("channel to the guest lost")
	}
}

func (s *Sandbox) heartbeat() {
	defer s.wg.Done()
	every, late := s.opt.Config.Heartbeat(s.accel)
	if err := s.agent.Heartbeat(s.ctx, every, late); err != nil {
		log.G(s.ctx).WithError(err).Error("guest hangs")
		s.kill("guest hangs: " + err.Error())
	}
}

// kill ends the VM for a reason people shall see.
func (s *Sandbox) kill(reason string) {
	s.mu.Lock()
	if s.phase < phaseStopping && s.reason == "" {
		s.reason = reason
	}
	s.mu.Unlock()
	_ = s.vm.Kill()
}

// groupHandle is the Pod's control group, or none.
type groupHandle struct{ g *cgroup.Group }

func (h groupHandle) metrics(pid int) *stats.Metrics {
	if h.g == nil {
		return &stats.Metrics{Pids: &stats.PidsStat{Current: uint64(min(pid, 1))}, CPU: &stats.CPUStat{}, Memory: &stats.MemoryStat{}}
	}
	return h.g.Metrics()
}

// leave moves this process out before the group is removed: the kubelet kills what it
// finds in a stopped Pod's group, and the shim answers until the Pod is removed.
func (h groupHandle) leave() error {
	if h.g == nil {
		return nil
	}
	return errors.Join(h.g.Leave(os.Getpid()), h.g.Remove())
}

// tail keeps the end of the guest's console for the log.
type tail struct {
	mu sync.Mutex
	b  []byte
}

const tailBytes = 4 << 10

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if over := len(t.b) + len(p) - tailBytes; over > 0 {
		t.b = append(t.b[:0], t.b[min(over, len(t.b)):]...)
	}
	t.b = append(t.b, p[max(0, len(p)-tailBytes):]...)
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.b)
}
