// Package gateway owns the only two ways between the host's network and the node's:
// host loopback ports forwarded into the node, and an HTTP proxy inside the node
// through which image pulls go out. It must not know what is served.
package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/containerd/log"
)

// Dial connects to an address in the other network.
type Dial func(ctx context.Context, network, address string) (net.Conn, error)

// dialTimeout bounds how long a client of a forward waits for the node.
const dialTimeout = 10 * time.Second

// Gateway runs forwards and the proxy until it is closed.
type Gateway struct {
	wg     sync.WaitGroup
	ctx    context.Context
	cancel context.CancelFunc

	mu      sync.Mutex
	closers []io.Closer
}

// New returns an empty gateway; ctx only carries values such as the logger.
func New(ctx context.Context) *Gateway {
	g := &Gateway{}
	g.ctx, g.cancel = context.WithCancel(context.WithoutCancel(ctx))
	return g
}

// Close ends every listener and connection and waits for them.
func (g *Gateway) Close() {
	g.cancel()
	g.mu.Lock()
	closers := g.closers
	g.closers = nil
	g.mu.Unlock()
	for _, c := range closers {
		_ = c.Close()
	}
	g.wg.Wait()
}

func (g *Gateway) own(c io.Closer) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closers = append(g.closers, c)
}

// Forward passes every connection of l on to address, dialled with dial. It takes
// ownership of l and returns at once.
func (g *Gateway) Forward(l net.Listener, dial Dial, address string) {
	g.own(l)
	g.wg.Go(func() {
		for {
			conn, err := l.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				log.G(g.ctx).WithError(err).WithField("listen", l.Addr()).Warn("accept")
				select {
				case <-g.ctx.Done():
					return
				case <-time.After(100 * time.Millisecond): // out of file descriptors, most likely
				}
				continue
			}
			g.wg.Go(func() { g.pass(conn, dial, address) })
		}
	})
}

func (g *Gateway) pass(in net.Conn, dial Dial, address string) {
	ctx, cancel := context.WithTimeout(g.ctx, dialTimeout)
	out, err := dial(ctx, "tcp", address)
	cancel()
	if err != nil {
		log.G(g.ctx).WithError(err).WithField("to", address).Debug("forward")
		_ = in.Close()
		return
	}
	g.splice(in, out)
}

// splice copies both ways, passing half-closes on, until both directions have ended
// or the gateway is closed.
func (g *Gateway) splice(a, b net.Conn) {
	stop := context.AfterFunc(g.ctx, func() {
		_ = a.Close()
		_ = b.Close()
	})
	defer stop()
	defer a.Close()
	defer b.Close()
	var wg sync.WaitGroup
	one := func(dst, src net.Conn) {
		_, _ = io.Copy(dst, src)
		if c, ok := dst.(interface{ CloseWrite() error }); ok {
			_ = c.CloseWrite()
		} else {
			_ = dst.Close()
		}
	}
	wg.Go(func() { one(a, b) })
	wg.Go(func() { one(b, a) })
	wg.Wait()
}

// PortInUseError says that a host port the node wants is taken.
type PortInUseError struct {
	Port int
	// Owner is the program listening there, if it could be found.
	Owner string
	Err   error
}

func (e *PortInUseError) Error() string {
	owner := e.Owner
	if owner == "" {
		owner = "another program"
	}
	return fmt.Sprintf("port 127.0.0.1:%d is in use by %s: %v", e.Port, owner, e.Err)
}

func (e *PortInUseError) Unwrap() error { return e.Err }
