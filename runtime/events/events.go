// Package events brings what happened in a Pod to containerd's event service, in order
// and across restarts of containerd.
//
// It owns the queue and the connection. It must not know what events mean.
package events

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	eventsapi "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const (
	// keep is how many events wait for containerd at most; the oldest are dropped.
	keep = 2048
	// sendTimeout bounds one attempt, retryLeast and retryMost the pause after a
	// failed one.
	sendTimeout = 5 * time.Second
	retryLeast  = 100 * time.Millisecond
	retryMost   = 5 * time.Second
	// namespaceHeader is how containerd's ttrpc services are told the namespace.
	namespaceHeader = "containerd-namespace-ttrpc"
)

// Publisher sends events. New makes one; its methods may be called concurrently.
type Publisher struct {
	address, namespace string

	mu      sync.Mutex
	queue   []*types.Envelope
	dropped int
	closed  bool
	changed chan struct{}
	done    chan struct{}
	cancel  context.CancelFunc

	client *ttrpc.Client // of the sending goroutine
}

// New starts a publisher to the ttrpc address of containerd ("unix:///path" or a path);
// with "" events go nowhere. It ends with Close.
func New(address, namespace string) *Publisher {
	ctx, cancel := context.WithCancel(context.Background())
	p := &Publisher{
		address: strings.TrimPrefix(address, "unix://"), namespace: namespace,
		changed: make(chan struct{}, 1), done: make(chan struct{}), cancel: cancel,
	}
	go p.run(ctx)
	return p
}

// Publish queues an event; it never blocks.
func (p *Publisher) Publish(topic string, event proto.Message) {
	if p.address == "" {
		return
	}
	b, err := proto.Marshal(event)
	if err != nil {
		log.L.WithError(err).WithField("topic", topic).Error("marshal event")
		return
	}
	e := &types.Envelope{
		Timestamp: timestamppb.Now(), Namespace: p.namespace, Topic: topic,
		// containerd names types without the usual prefix.
		Event: &anypb.Any{TypeUrl: string(event.ProtoReflect().Descriptor().FullName()), Value: b},
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	if len(p.queue) == keep {
		p.queue = p.queue[1:]
		p.dropped++
	}
	p.queue = append(p.queue, e)
	p.wake()
}

func (p *Publisher) wake() {
	select {
	case p.changed <- struct{}{}:
	default:
	}
}

// Close sends what is queued until ctx ends, and stops the publisher.
func (p *Publisher) Close(ctx context.Context) {
	p.mu.Lock()
	p.closed = true
	p.wake()
	p.mu.Unlock()
	select {
	case <-p.done:
	case <-ctx.Done():
	}
	p.cancel()
	<-p.done
}

func (p *Publisher) head() (e *types.Envelope, dropped int, closed bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	dropped, p.dropped = p.dropped, 0
	if len(p.queue) > 0 {
		e = p.queue[0]
	}
	return e, dropped, p.closed
}

func (p *Publisher) sent(e *types.Envelope) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.queue) > 0 && p.queue[0] == e {
		p.queue[0] = nil
		p.queue = p.queue[1:]
	}
}

func (p *Publisher) run(ctx context.Context) {
	defer close(p.done)
	defer p.disconnect()
	pause := retryLeast
	for {
		e, dropped, closed := p.head()
		if dropped > 0 {
			log.L.WithField("events", dropped).Warn("containerd is away for long: oldest events dropped")
		}
		if e == nil {
			if closed {
				return
			}
			select {
			case <-p.changed:
				continue
			case <-ctx.Done():
				return
			}
		}
		if err := p.send(ctx, e); err == nil {
			p.sent(e)
			pause = retryLeast
			continue
		} else if ctx.Err() != nil {
			return
		} else if pause == retryLeast {
			log.L.WithError(err).WithField("topic", e.Topic).Warn("publish event, trying again")
		}
		p.disconnect()
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return
		}
		pause = min(2*pause, retryMost)
	}
}

func (p *Publisher) send(ctx context.Context, e *types.Envelope) error {
	ctx, cancel := context.WithTimeout(ctx, sendTimeout)
	defer cancel()
	if p.client == nil {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "unix", p.address)
		if err != nil {
			return fmt.Errorf("connect to containerd: %w", err)
		}
		p.client = ttrpc.NewClient(conn)
	}
	ctx = ttrpc.WithMetadata(ctx, ttrpc.MD{namespaceHeader: []string{p.namespace}})
	_, err := eventsapi.NewTTRPCEventsClient(p.client).Forward(ctx, &eventsapi.ForwardRequest{Envelope: e})
	return err
}

func (p *Publisher) disconnect() {
	if p.client != nil {
		_ = p.client.Close()
		p.client = nil
	}
}
