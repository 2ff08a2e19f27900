// Package turn lets the shims of a node boot a few VMs at a time: sixty that boot at once on
// two CPUs all miss their deadlines, in turns each is up in seconds and the last no later.
//
// It owns the places; a place is an abstract unix socket, so it is free again the moment
// its holder dies, however it dies, and nothing is left in any file system. Such names
// belong to a network namespace: the nodes of one machine have places of their own. It
// must not know what is done in a turn.
package turn

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Places are the turns of those who name the same group.
type Places struct {
	// Group tells groups of one network namespace apart; any text.
	Group string
	// Count is how many turns there are at once; 0 or less is no limit.
	Count int
}

// pause between looks for a free place, varied so that those who wait do not look together.
const pause = 40 * time.Millisecond

// Take waits for a turn until ctx ends. release ends it and may be called again.
func (p Places) Take(ctx context.Context) (release func(), err error) {
	if p.Count <= 0 {
		return func() {}, nil
	}
	h := fnv.New64a()
	_, _ = h.Write([]byte(p.Group))
	for {
		for i := range p.Count {
			fd, err := bind(fmt.Sprintf("@h8s-turn-%x-%d", h.Sum64(), i))
			if errors.Is(err, unix.EADDRINUSE) {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("wait for a turn: %w", err)
			}
			return sync.OnceFunc(func() { _ = unix.Close(fd) }), nil
		}
		t := time.NewTimer(pause/2 + rand.N(pause))
		select {
		case <-ctx.Done():
			t.Stop()
			return nil, fmt.Errorf("wait for a turn (%d at a time): %w", p.Count, ctx.Err())
		case <-t.C:
		}
	}
}

func bind(name string) (int, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: name}); err != nil {
		_ = unix.Close(fd)
		var e syscall.Errno
		if errors.As(err, &e) {
			return -1, e
		}
		return -1, err
	}
	return fd, nil
}
