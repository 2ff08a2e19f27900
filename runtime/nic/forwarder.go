package nic

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const (
	maxForwards = 128
	// dialTimeout bounds the guest's answer to both families together.
	dialTimeout = 30 * time.Second
	// lingerTimeout is how long the second half of a connection may stay idle after
	// the first was closed: a peer that never closes must not keep a slot for good.
	lingerTimeout = 5 * time.Minute
)

type forwarder struct {
	path      string
	dial      Dialer
	cancel    context.CancelFunc
	listeners []*net.TCPListener
	slots     chan struct{}
	wg        sync.WaitGroup
	once      sync.Once
	closeErr  error
}

func newPortForwarder(ctx context.Context, path string, dial Dialer) (*PortForwarder, error) {
	ns, err := openNS(path)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	if err := loopbackUp(ns); err != nil {
		return nil, fmt.Errorf("set loopback of %s up: %w", path, err)
	}
	p := &PortForwarder{forwarder{path: path, dial: dial, slots: make(chan struct{}, maxForwards)}}
	ports, err := p.listen(ns)
	if err == nil {
		if err = redirectLoopback(ns, ports[0], ports[1]); errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP) {
			err = fmt.Errorf("kernel has no nftables redirect (CONFIG_NFT_REDIR, CONFIG_NF_TABLES_INET): %w: %w", err, errdefs.ErrFailedPrecondition)
		}
	}
	if err != nil {
		for _, l := range p.listeners {
			_ = l.Close()
		}
		return nil, fmt.Errorf("port-forward in %s: %w", path, err)
	}
	// The forwarder lives until Close, not until the call that made it ends.
	ctx, p.cancel = context.WithCancel(context.WithoutCancel(ctx))
	for i, l := range p.listeners {
		p.wg.Go(func() { p.serve(ctx, l, i == 1) })
	}
	return p, nil
}

func loopbackUp(ns netns.NsHandle) error {
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer h.Close()
	lo, err := h.LinkByIndex(1)
	if err != nil {
		return err
	}
	return h.LinkSetUp(lo)
}

// listen opens the listeners; a namespace without IPv6 has only the first.
func (p *forwarder) listen(ns netns.NsHandle) (ports [2]uint16, err error) {
	err = inNS(ns, func() error {
		for i, a := range []*net.TCPAddr{{IP: net.IPv4(127, 0, 0, 1)}, {IP: net.IPv6loopback}} {
			l, err := net.ListenTCP([]string{"tcp4", "tcp6"}[i], a)
			if i == 1 && (errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.EAFNOSUPPORT)) {
				return nil
			}
			if err != nil {
				return fmt.Errorf("listen on %s: %w", a, err)
			}
			p.listeners = append(p.listeners, l)
			ports[i] = uint16(l.Addr().(*net.TCPAddr).Port)
		}
		return nil
	})
	return ports, err
}

// serve accepts while there is a slot; what does not fit waits in the backlog.
func (p *forwarder) serve(ctx context.Context, l *net.TCPListener, ipv6 bool) {
	for {
		select {
		case p.slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		c, err := l.AcceptTCP()
		if err != nil {
			<-p.slots
			if ctx.Err() == nil && !errors.Is(err, net.ErrClosed) {
				log.G(ctx).WithError(err).WithField("network", p.path).Error("port-forward stopped accepting")
			}
			return
		}
		p.wg.Go(func() {
			defer func() { <-p.slots }()
			if err := p.handle(ctx, c, ipv6); err != nil && ctx.Err() == nil {
				log.G(ctx).WithError(err).WithField("network", p.path).Debug("port-forward connection failed")
			}
		})
	}
}

// handle carries one connection. A refusal by the guest resets it, so that the user's
// tool reports an error instead of an empty answer.
func (p *forwarder) handle(ctx context.Context, c *net.TCPConn, ipv6 bool) error {
	defer c.Close()
	port, err := originalPort(c, ipv6)
	if err != nil {
		_ = c.SetLinger(0)
		return err
	}
	guest, err := p.dialGuest(ctx, port, ipv6)
	if err != nil {
		_ = c.SetLinger(0)
		return fmt.Errorf("dial guest port %d: %w", port, err)
	}
	defer guest.Close()
	return join(ctx, c, guest)
}

func (p *forwarder) dialGuest(ctx context.Context, port uint16, ipv6 bool) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	conn, err := p.dial(ctx, port, ipv6)
	if err == nil || ctx.Err() != nil {
		return conn, err
	}
	conn, other := p.dial(ctx, port, !ipv6)
	if other != nil {
		return nil, errors.Join(err, other)
	}
	return conn, nil
}

func expire(conns ...net.Conn) {
	for _, c := range conns {
		_ = c.SetDeadline(time.Unix(1, 0))
	}
}

// join copies both ways until both are at their end or one failed. Once one way has
// ended the other may only pause for lingerTimeout.
func join(ctx context.Context, a, b net.Conn) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// A deadline in the past ends every read and write under way, for streams too whose
	// Close waits for the other side.
	expired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() { expire(a, b); close(expired) })
	defer func() {
		if !stop() {
			<-expired
		}
	}()
	// linger must not undo an expiry that came just before it.
	linger := func(c net.Conn) {
		_ = c.SetReadDeadline(time.Now().Add(lingerTimeout))
		if ctx.Err() != nil {
			expire(c)
		}
	}
	var (
		wg      sync.WaitGroup
		errs    [2]error
		lingers atomic.Bool
	)
	half := func(i int, dst, src net.Conn) {
		err := copyHalf(dst, src, func() {
			if lingers.Load() {
				linger(src)
			}
		})
		if err == nil {
			err = closeWrite(dst)
		}
		if err != nil {
			errs[i] = err
			cancel()
			return
		}
		lingers.Store(true)
		linger(dst)
	}
	wg.Go(func() { half(0, a, b) })
	wg.Go(func() { half(1, b, a) })
	wg.Wait()
	return errors.Join(errs[:]...)
}

func copyHalf(dst io.Writer, src io.Reader, progress func()) error {
	buf := make([]byte, 32<<10)
	for {
		n, err := src.Read(buf)
		if n > 0 {
			if _, err := dst.Write(buf[:n]); err != nil {
				return err
			}
			progress()
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// closeWrite passes an end of file on, where the connection can.
func closeWrite(c net.Conn) error {
	if w, ok := c.(interface{ CloseWrite() error }); ok {
		if err := w.CloseWrite(); err != nil && !errors.Is(err, unix.ENOTCONN) {
			return err
		}
	}
	return nil
}

// originalPort asks the kernel where the client dialled before the redirection.
func originalPort(c *net.TCPConn, ipv6 bool) (uint16, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var addr netip.AddrPort
	var optErr error
	err = raw.Control(func(fd uintptr) { addr, optErr = originalDst(int(fd), ipv6) })
	if err := errors.Join(err, optErr); err != nil {
		return 0, fmt.Errorf("read original destination: %w", err)
	}
	return addr.Port(), nil
}

func originalDst(fd int, ipv6 bool) (netip.AddrPort, error) {
	if ipv6 {
		// IP6T_SO_ORIGINAL_DST has the same number; the answer is a sockaddr_in6, which
		// is how the MTU structure begins.
		m, err := unix.GetsockoptIPv6MTUInfo(fd, unix.IPPROTO_IPV6, unix.SO_ORIGINAL_DST)
		if err != nil {
			return netip.AddrPort{}, err
		}
		return netip.AddrPortFrom(netip.AddrFrom16(m.Addr.Addr), networkOrder(m.Addr.Port)), nil
	}
	// The answer is a sockaddr_in: family, port, address, in 16 bytes like the request.
	m, err := unix.GetsockoptIPv6Mreq(fd, unix.IPPROTO_IP, unix.SO_ORIGINAL_DST)
	if err != nil {
		return netip.AddrPort{}, err
	}
	b := m.Multiaddr
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), uint16(b[2])<<8|uint16(b[3])), nil
}

// networkOrder reads a port that the kernel left in network order.
func networkOrder(port uint16) uint16 {
	var b [2]byte
	binary.NativeEndian.PutUint16(b[:], port)
	return binary.BigEndian.Uint16(b[:])
}

func (p *forwarder) close() error {
	p.once.Do(func() {
		p.cancel()
		var errs []error
		for _, l := range p.listeners {
			errs = append(errs, l.Close())
		}
		p.wg.Wait()
		ns, err := openNS(p.path)
		switch {
		case errors.Is(err, errdefs.ErrNotFound):
		case err != nil:
			errs = append(errs, err)
		default:
			errs = append(errs, removeTable(ns, forwardTable), ns.Close())
		}
		p.closeErr = errors.Join(errs...)
	})
	return p.closeErr
}
