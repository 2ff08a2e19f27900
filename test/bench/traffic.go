package bench

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/network/netns"
)

// A connection to a server of serve begins with what its client wants.
const (
	wantEcho = 'e' // a byte back
	wantSink = 's' // the number of bytes that came until the end of the stream
)

// patience is how long anything in a measurement may take before it counts as broken.
const patience = 30 * time.Second

// serve answers TCP connections until stop, which waits.
func serve(ctx context.Context, ns *netns.NS, at netip.AddrPort) (stop func(), err error) {
	l, err := ns.Listen(ctx, "tcp", at.String())
	if err != nil {
		return nil, err
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer func() { _ = c.Close() }()
				_ = c.SetDeadline(time.Now().Add(patience))
				one := make([]byte, 1)
				if _, err := io.ReadFull(c, one); err != nil {
					return
				}
				if one[0] == wantEcho {
					_, _ = c.Write(one)
					_, _ = c.Read(one) // the client resets it
					return
				}
				buf, total := make([]byte, 256<<10), uint64(0)
				for {
					n, err := c.Read(buf)
					total += uint64(n)
					if err != nil {
						break
					}
				}
				_, _ = c.Write(binary.BigEndian.AppendUint64(nil, total))
			})
		}
	})
	return func() { _ = l.Close(); wg.Wait() }, nil
}

// serveEcho gives back whatever comes, until stop, which waits.
func serveEcho(ctx context.Context, ns *netns.NS, at string) (stop func(), err error) {
	l, err := ns.Listen(ctx, "tcp", at)
	if err != nil {
		return nil, err
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer func() { _ = c.Close() }()
				_ = c.SetDeadline(time.Now().Add(patience))
				_, _ = io.Copy(c, c)
			})
		}
	})
	return func() { _ = l.Close(); wg.Wait() }, nil
}

// throughput sends one stream for about d and returns the bytes per second that arrived.
func throughput(ctx context.Context, ns *netns.NS, to netip.AddrPort, d time.Duration) (float64, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	conn, err := ns.DialContext(ctx, "tcp", to.String())
	if err != nil {
		return 0, err
	}
	c := conn.(*net.TCPConn)
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(patience))
	if _, err := c.Write([]byte{wantSink}); err != nil {
		return 0, err
	}
	buf := make([]byte, 256<<10)
	began := time.Now()
	for time.Since(began) < d {
		if _, err := c.Write(buf); err != nil {
			return 0, err
		}
	}
	if err := c.CloseWrite(); err != nil {
		return 0, err
	}
	answer := make([]byte, 8)
	if _, err := io.ReadFull(c, answer); err != nil {
		return 0, err
	}
	return float64(binary.BigEndian.Uint64(answer)) / time.Since(began).Seconds(), nil
}

// connections makes n connections with a byte there and a byte back, several at a time,
// and returns how many there were per second.
func connections(ns *netns.NS, to netip.AddrPort, n, workers int) (float64, error) {
	errs := make([]error, workers)
	var wg sync.WaitGroup
	began := time.Now()
	for w := range workers {
		// The thread stays in the namespace: entering it is not what is measured.
		wg.Go(func() {
			errs[w] = ns.Do(func() error {
				for range n / workers {
					if err := connection(to); err != nil {
						return err
					}
				}
				return nil
			})
		})
	}
	wg.Wait()
	return float64(n/workers*workers) / time.Since(began).Seconds(), errors.Join(errs...)
}

// connection makes one from the thread's namespace. It ends by a reset, so that neither end
// keeps an address in TIME_WAIT.
func connection(to netip.AddrPort) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	limit := unix.NsecToTimeval(patience.Nanoseconds())
	if err := errors.Join(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit),
		unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}),
	); err != nil {
		return err
	}
	for {
		err = unix.Connect(fd, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())})
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("connect to %s: %w", to, err)
	}
	one := []byte{wantEcho}
	if _, err := unix.Write(fd, one); err != nil {
		return fmt.Errorf("write to %s: %w", to, err)
	}
	for {
		n, err := unix.Read(fd, one)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n != 1 {
			return fmt.Errorf("read from %s: %d, %w", to, n, err)
		}
		return nil
	}
}

// echoed sends one stream to an echo server for about d and returns the bytes per second
// that came back.
func echoed(ctx context.Context, ns *netns.NS, to netip.AddrPort, d time.Duration) (float64, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	conn, err := ns.DialContext(ctx, "tcp", to.String())
	if err != nil {
		return 0, err
	}
	c := conn.(*net.TCPConn)
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(patience))
	began := time.Now()
	sent := make(chan error, 1)
	go func() {
		buf := make([]byte, 256<<10)
		for time.Since(began) < d {
			if _, err := c.Write(buf); err != nil {
				sent <- err
				return
			}
		}
		sent <- c.CloseWrite()
	}()
	n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{c}, make([]byte, 256<<10))
	if err != nil {
		_ = c.Close()
	}
	return float64(n) / time.Since(began).Seconds(), errors.Join(err, <-sent)
}

// answers is what came of asking a resolver.
type answers struct {
	// PerSecond is of all clients together, P50 and P99 are of single questions.
	PerSecond float64
	P50, P99  time.Duration
}

// ask asks n questions for addresses over UDP, by clients that each wait for an answer
// before the next.
func ask(ctx context.Context, ns *netns.NS, server string, clients, n int, name func(i int) string) (answers, error) {
	n = n / clients * clients
	took, errs := make([]time.Duration, n), make([]error, clients)
	conns := make([]net.Conn, clients)
	for i := range conns {
		c, err := ns.DialContext(ctx, "udp", server)
		if err != nil {
			return answers{}, err
		}
		defer func() { _ = c.Close() }()
		conns[i] = c
	}
	var wg sync.WaitGroup
	began := time.Now()
	for client, c := range conns {
		wg.Go(func() {
			buf := make([]byte, 4096)
			for i := client; i < n; i += clients {
				q := new(dns.Msg).SetQuestion(name(i), dns.TypeA)
				b, err := q.Pack()
				if err == nil {
					took[i], err = exchange(c, b, buf)
				}
				if err != nil {
					errs[client] = fmt.Errorf("ask %s for %s: %w", server, name(i), err)
					return
				}
			}
		})
	}
	wg.Wait()
	elapsed := time.Since(began)
	if err := errors.Join(errs...); err != nil {
		return answers{}, err
	}
	slices.Sort(took)
	return answers{float64(n) / elapsed.Seconds(), took[n/2], took[n*99/100]}, nil
}

// exchange sends one question and wants an answer with a record.
func exchange(c net.Conn, q, buf []byte) (time.Duration, error) {
	began := time.Now()
	_ = c.SetDeadline(began.Add(patience))
	if _, err := c.Write(q); err != nil {
		return 0, err
	}
	n, err := c.Read(buf)
	if err != nil {
		return 0, err
	}
	d := time.Since(began)
	if n < 12 || binary.BigEndian.Uint16(buf) != binary.BigEndian.Uint16(q) || buf[3]&0xf != 0 || binary.BigEndian.Uint16(buf[6:]) == 0 {
		return 0, fmt.Errorf("not the answer wanted: % x", buf[:min(n, 12)])
	}
	return d, nil
}

// upstream is a name server that knows every name.
func upstream(ctx context.Context, ns *netns.NS, at string) (stop func(), err error) {
	p, err := ns.ListenPacket(ctx, "udp", at)
	if err != nil {
		return nil, err
	}
	s := &dns.Server{PacketConn: p, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg).SetReply(q)
		if len(q.Question) == 1 && q.Question[0].Qtype == dns.TypeA {
			m.Answer = []dns.RR{&dns.A{
				Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 300}, A: net.IPv4(198, 51, 100, 1),
			}}
		}
		_ = w.WriteMsg(m)
	})}
	done := make(chan struct{})
	go func() { defer close(done); _ = s.ActivateAndServe() }()
	return func() { _ = p.Close(); <-done }, nil
}

// relay makes a port of the machine's loopback one of the namespace's.
func relay(ctx context.Context, ns *netns.NS, port string) (stop func(), err error) {
	at := net.JoinHostPort("127.0.0.1", port)
	l, err := ns.Listen(ctx, "tcp", at)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer func() { _ = in.Close() }()
				out, err := (&net.Dialer{}).DialContext(ctx, "tcp", at)
				if err != nil {
					return
				}
				defer func() { _ = out.Close() }()
				// Either end's close ends both, as does stop.
				defer context.AfterFunc(ctx, func() { _, _ = in.Close(), out.Close() })()
				wg.Go(func() { _, _ = io.Copy(out, in); _ = out.Close() })
				_, _ = io.Copy(in, out)
			})
		}
	})
	return func() { cancel(); _ = l.Close(); wg.Wait() }, nil
}
