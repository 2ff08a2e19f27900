package sandbox

import (
	"fmt"
	"time"

	stats "github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"google.golang.org/protobuf/proto"
)

// Only the guest can end a process, measure it or remove it, and a hostile one does not.
// What it holds up must not be the end of its Pod, nor the node's other Pods.

// late is how long the guest may take for what the end of a Pod waits for.
func (s *Sandbox) late() time.Duration {
	_, late := s.opt.Config.Heartbeat(s.accel)
	return late
}

// mustEnd ends the VM if the guest does not tell in time of the end of a container's
// first process, which has been sent SIGKILL: the Pod could never be deleted.
func (p *process) mustEnd() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.exec != "" || p.ending || p.status == StatusStopped || p.overdue != nil {
		return
	}
	late := p.c.s.late()
	p.overdue = time.AfterFunc(late, func() {
		p.mu.Lock()
		told := p.ending || p.status == StatusStopped
		p.mu.Unlock()
		if !told {
			log.G(p.c.s.ctx).WithField("container", p.c.id).Error("guest does not end a container")
			p.c.s.kill(fmt.Sprintf("guest does not end container %s %v after SIGKILL", p.c.id, late))
		}
	})
}

// ends notes that the guest has told of the process's end, and whether this was news.
func (p *process) ends() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ending || p.status == StatusStopped {
		return false
	}
	p.ending = true
	if p.overdue != nil {
		p.overdue.Stop()
	}
	return true
}

// lastTry is what a guest that has had its time gets.
const lastTry = time.Second

// deleteOverdue tells whether the guest has had its time to remove a process since it
// was first asked to; its container's deleting is held. What it keeps then is its own
// rubbish.
func (p *process) deleteOverdue() bool {
	if p.deleteAsked.IsZero() {
		p.deleteAsked = time.Now()
	}
	return time.Since(p.deleteAsked) > p.c.s.late()
}

// oomEvery is the least time between two reports of one container's memory kills:
// containerd and all who listen to it hear of each.
const oomEvery = time.Second

func (c *Container) oomIsNews(now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if now.Sub(c.lastOOM) < oomEvery {
		return false
	}
	c.lastOOM = now
	return true
}

// statsPause is how long a guest that has not answered is not measured: containerd asks
// one container of the node after the other, and waits for each.
const statsPause = 30 * time.Second

// measurable is an error while the guest is not to be measured.
func (s *Sandbox) measurable(now time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if wait := s.measureAfter.Sub(now); wait > 0 {
		return fmt.Errorf("guest of sandbox %s did not answer in time, it is measured again in %v: %w", s.opt.ID, wait.Round(time.Second), errdefs.ErrUnavailable)
	}
	return nil
}

func (s *Sandbox) pauseMeasuring(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.measureAfter = now.Add(statsPause)
}

// maxMetrics bounds what a guest says of one container, in bytes.
const maxMetrics = 64 << 10

// metrics decodes a guest's measurements, of which memory bounds one.
func metrics(b []byte, memory int64) (*stats.Metrics, error) {
	if len(b) > maxMetrics {
		return nil, fmt.Errorf("%d bytes, at most %d are believed: %w", len(b), maxMetrics, errdefs.ErrDataLoss)
	}
	var m stats.Metrics
	if err := (proto.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(b, &m); err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrDataLoss)
	}
	if m.Memory != nil && memory > 0 {
		// More than there is would have the kubelet evict others for it.
		m.Memory.Usage = min(m.Memory.Usage, uint64(memory))
	}
	return &m, nil
}
