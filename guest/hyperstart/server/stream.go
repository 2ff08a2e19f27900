package server

import (
	"context"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
	"github.com/hypernetes/hypernetes/guest/channel"
)

const (
	// headerTimeout is how long a stream may take to say what it is for.
	headerTimeout = time.Minute
	dialTimeout   = 10 * time.Second
)

func readHeader(conn net.Conn) (*hyperstart.StreamHeader, error) {
	if err := conn.SetReadDeadline(time.Now().Add(headerTimeout)); err != nil {
		return nil, err
	}
	head, err := channel.ReadHeader(conn)
	if err != nil {
		return nil, err
	}
	return head, conn.SetReadDeadline(time.Time{})
}

// dial connects the stream to a TCP port of the Pod's loopback and copies both ways,
// passing on each direction's end by itself.
func dial(conn net.Conn, d *hyperstart.Dial) {
	defer conn.Close()
	if d.GetPort() == 0 || d.GetPort() > 65535 {
		_ = channel.Reply(conn, fmt.Errorf("port %d: must be 1 to 65535: %w", d.GetPort(), errdefs.ErrInvalidArgument))
		return
	}
	host := "127.0.0.1"
	if d.GetIpv6() {
		host = "::1"
	}
	dialer := net.Dialer{Timeout: dialTimeout}
	tcp, err := dialer.DialContext(context.Background(), "tcp", net.JoinHostPort(host, strconv.Itoa(int(d.GetPort()))))
	if err != nil {
		_ = channel.Reply(conn, err)
		return
	}
	defer tcp.Close()
	if channel.Reply(conn, nil) != nil {
		return
	}
	splice(conn, tcp.(*net.TCPConn))
}

// splice copies both ways. Closing a channel stream only ends its sending side; a
// side that fails ends both.
func splice(stream net.Conn, tcp *net.TCPConn) {
	var both sync.WaitGroup
	both.Add(1)
	go func() {
		defer both.Done()
		if _, err := io.Copy(tcp, stream); err != nil {
			_ = tcp.Close()
			return
		}
		_ = tcp.CloseWrite()
	}()
	_, err := io.Copy(stream, tcp)
	_ = stream.Close()
	if err != nil {
		_ = stream.SetReadDeadline(time.Unix(1, 0))
	}
	both.Wait()
}

// listener feeds accepted rpc streams to the ttrpc server.
type listener struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newListener() *listener {
	return &listener{conns: make(chan net.Conn), done: make(chan struct{})}
}

func (l *listener) hand(c net.Conn) bool {
	select {
	case l.conns <- c:
		return true
	case <-l.done:
		return false
	}
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *listener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *listener) Addr() net.Addr { return address{} }

type address struct{}

func (address) Network() string { return "channel" }
func (address) String() string  { return channel.PortName }
