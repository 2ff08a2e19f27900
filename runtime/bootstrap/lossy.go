package bootstrap

import (
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// What one Pod may add to containerd's log, which all Pods share: a guest that provokes
// messages must not be able to fill the node's disk.
const (
	// logBurst is in bytes, logRate in bytes a second.
	logBurst = 256 << 10
	logRate  = 2 << 10
)

// lossy writes to a non-blocking descriptor and never fails; what is too much is lost.
type lossy struct {
	write func([]byte)
	now   func() time.Time

	mu      sync.Mutex
	credit  int
	since   time.Time
	dropped int
}

func newLossy(fd int) *lossy {
	return &lossy{write: func(p []byte) { _, _ = unix.Write(fd, p) }, now: time.Now, credit: logBurst}
}

// Write implements io.Writer for one message at a time.
func (l *lossy) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	if !l.since.IsZero() {
		earned := min(now.Sub(l.since), time.Hour) * logRate / time.Second
		l.credit = min(logBurst, l.credit+int(earned))
		if earned > 0 {
			l.since = now
		}
	} else {
		l.since = now
	}
	if len(p) > l.credit {
		l.dropped++
		return len(p), nil
	}
	if l.dropped > 0 {
		l.write(fmt.Appendf(nil, "level=warning msg=\"%d messages of this shim were too many and are lost\"\n", l.dropped))
		l.dropped = 0
	}
	l.credit -= len(p)
	l.write(p)
	return len(p), nil
}
