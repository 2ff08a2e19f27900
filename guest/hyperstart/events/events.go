// Package events keeps what happened in the sandbox (exits, OOM kills) in order, so
// that a shim that reconnects misses nothing.
//
// It owns sequence numbers and the bounded log. It must not know containers.
package events

import (
	"context"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
)

// Keep is how many of the latest events are kept.
const Keep = 1024

// Log is the event log; New makes one. It may be used concurrently.
type Log struct {
	mu      sync.Mutex
	last    uint64
	events  []*hyperstart.Event
	changed chan struct{}
}

// New returns an empty log. The first event gets number 1.
func New() *Log { return &Log{changed: make(chan struct{})} }

// Exit records the end of a process.
func (l *Log) Exit(at time.Time, e *hyperstart.Exit) {
	l.add(at, &hyperstart.Event{What: &hyperstart.Event_Exit{Exit: e}})
}

// OOM records that the kernel killed a process of the container for memory.
func (l *Log) OOM(container string) {
	l.add(time.Now(), &hyperstart.Event{What: &hyperstart.Event_Oom{Oom: &hyperstart.OOM{ContainerId: container}}})
}

func (l *Log) add(at time.Time, e *hyperstart.Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.last++
	e.Seq, e.At = l.last, timestamppb.New(at)
	if len(l.events) == Keep {
		copy(l.events, l.events[1:])
		l.events = l.events[:Keep-1]
	}
	l.events = append(l.events, e)
	close(l.changed)
	l.changed = make(chan struct{})
}

// Follow calls send with every event above after, in order and without end, until ctx
// ends or send fails.
func (l *Log) Follow(ctx context.Context, after uint64, send func(*hyperstart.Event) error) error {
	for {
		batch, changed := l.above(after)
		for _, e := range batch {
			if err := send(e); err != nil {
				return err
			}
			after = e.Seq
		}
		if len(batch) > 0 {
			continue
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (l *Log) above(after uint64) ([]*hyperstart.Event, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	i := len(l.events)
	for i > 0 && l.events[i-1].Seq > after {
		i--
	}
	return append([]*hyperstart.Event(nil), l.events[i:]...), l.changed
}
