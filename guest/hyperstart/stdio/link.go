package stdio

import (
	"net"
	"sync"
	"time"
)

// link is the end of a standard stream towards the shim: the current connection, or
// none while the shim is away.
type link struct {
	mu      sync.Mutex
	conn    net.Conn
	changed chan struct{}
	closed  bool
}

func newLink() *link { return &link{changed: make(chan struct{})} }

// attach replaces the connection. On a closed link conn is closed at once.
func (l *link) attach(conn net.Conn) {
	l.mu.Lock()
	old := l.conn
	if l.closed {
		old = conn
	} else {
		l.conn = conn
		close(l.changed)
		l.changed = make(chan struct{})
	}
	l.mu.Unlock()
	if old != nil {
		end(old)
	}
}

// end closes a stream for both directions: Close alone ends only sending, and a
// blocked Read would wait for the shim.
func end(conn net.Conn) {
	_ = conn.SetReadDeadline(time.Unix(1, 0))
	_ = conn.Close()
}

// patient takes the read deadline off conn unless the link is closed.
func (l *link) patient(conn net.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.closed {
		_ = conn.SetReadDeadline(time.Time{})
	}
}

// current waits for a connection other than not; false when the link is closed.
func (l *link) current(not net.Conn) (net.Conn, bool) {
	for {
		l.mu.Lock()
		conn, changed, closed := l.conn, l.changed, l.closed
		l.mu.Unlock()
		if closed {
			return nil, false
		}
		if conn != nil && conn != not {
			return conn, true
		}
		<-changed
	}
}

// peek returns the connection, nil if there is none.
func (l *link) peek() net.Conn {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.conn
}

// close ends the link and its connection.
func (l *link) close() {
	l.mu.Lock()
	conn := l.conn
	if l.closed {
		l.mu.Unlock()
		return
	}
	l.closed = true
	close(l.changed)
	if conn != nil {
		end(conn)
	}
	l.mu.Unlock()
}

// send writes all of p, going on with the next connection when one breaks; what a
// broken connection had not taken is sent again from where it stopped. It reports
// false once the link is closed.
func (l *link) send(p []byte) bool {
	var broken net.Conn
	for len(p) > 0 {
		conn, ok := l.current(broken)
		if !ok {
			return false
		}
		n, err := conn.Write(p)
		p = p[n:]
		if err != nil {
			broken = conn
		}
	}
	return true
}

// receive reads from the connection into p. An error means the connection's end, for
// good or until the shim reattaches.
func (l *link) receive(p []byte) (int, net.Conn, error) {
	conn, ok := l.current(nil)
	if !ok {
		return 0, nil, net.ErrClosed
	}
	n, err := conn.Read(p)
	return n, conn, err
}
