package dns

import (
	"container/list"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sync/singleflight"
	"golang.org/x/time/rate"
)

const (
	// attemptTimeout bounds one upstream's answer, resolveTimeout all attempts: a client
	// asks again after five seconds.
	attemptTimeout, resolveTimeout = 1500 * time.Millisecond, 4500 * time.Millisecond
	// rounds is how often every upstream is asked.
	rounds = 2
	// penalty is how long an upstream that has not answered comes last.
	penalty = 10 * time.Second
	// positiveLimit and negativeLimit bound how long answers are kept, entrySize what is.
	positiveLimit, negativeLimit = time.Hour, 5 * time.Minute
	entrySize                    = 4 << 10
	// A socket is used for some questions one after the other and a short while: another
	// port is harder to guess, another socket costs.
	socketUses, socketAge, socketsIdle = 64, 5 * time.Second, 16
)

var (
	errRate = errors.New("too many questions")
	errNone = errors.New("no upstream")
)

// key is a question to an upstream. What changes an answer is part of it.
type key struct {
	name             string
	qtype            uint16
	edns, do, cd, ad bool
}

// forwarder asks upstreams and remembers.
type forwarder struct {
	upstreams []*upstream
	dial      func(ctx context.Context, network, address string) (net.Conn, error)
	limit     *rate.Limiter
	slots     chan struct{}
	flight    singleflight.Group
	cache     cache
}

func newForwarder(c Config) *forwarder {
	f := &forwarder{
		dial: c.UpstreamDial, limit: rate.NewLimiter(rate.Limit(c.Rate), 2*c.Rate), slots: make(chan struct{}, maxPending),
		cache: cache{max: c.CacheEntries, entries: map[key]*list.Element{}},
	}
	for _, a := range c.Upstreams {
		f.upstreams = append(f.upstreams, &upstream{address: a})
	}
	return f
}

// slot takes one of the places of those who wait.
func (f *forwarder) slot() (release func(), ok bool) {
	select {
	case f.slots <- struct{}{}:
		return func() { <-f.slots }, true
	default:
		return nil, false
	}
}

func (f *forwarder) cached(k key) *dns.Msg { return f.cache.get(k, time.Now()) }

// resolve returns an answer that must not be changed but in its header and slices.
func (f *forwarder) resolve(ctx context.Context, k key, m *dns.Msg) (*dns.Msg, error) {
	v, err, _ := f.flight.Do(fmt.Sprint(k), func() (any, error) {
		if res := f.cached(k); res != nil {
			return res, nil // it came while we were on our way
		}
		if len(f.upstreams) == 0 {
			return nil, errNone
		}
		if !f.limit.Allow() {
			return nil, errRate
		}
		ctx, cancel := context.WithTimeout(ctx, resolveTimeout)
		defer cancel()
		res, size, err := f.ask(ctx, m)
		if err != nil {
			return nil, err
		}
		f.cache.put(k, res, size, time.Now())
		return res, nil
	})
	if err != nil {
		return nil, err
	}
	return v.(*dns.Msg), nil
}

// ask tries the upstreams in turn until one knows.
func (f *forwarder) ask(ctx context.Context, m *dns.Msg) (res *dns.Msg, size int, err error) {
	order := f.order(time.Now())
	var unsure *dns.Msg
	unsureSize := 0
	for i := range rounds * len(order) {
		if ctx.Err() != nil {
			break
		}
		u := order[i%len(order)]
		actx, cancel := context.WithTimeout(ctx, attemptTimeout)
		r, n, aerr := f.exchange(actx, u, m)
		cancel()
		if aerr != nil {
			if ctx.Err() == nil {
				u.failed(time.Now())
			}
			err = aerr
			continue
		}
		u.answered()
		if r.Rcode == dns.RcodeServerFailure || r.Rcode == dns.RcodeRefused || r.Rcode == dns.RcodeNotImplemented {
			unsure, unsureSize = r, n
			if i+1 >= len(order) {
				break // each has been asked
			}
			continue
		}
		return r, n, nil
	}
	if unsure != nil {
		return unsure, unsureSize, nil
	}
	if err == nil {
		err = ctx.Err()
	}
	return nil, 0, err
}

// order is whom to ask: as configured, those that have not answered of late last.
func (f *forwarder) order(now time.Time) []*upstream {
	out := make([]*upstream, 0, len(f.upstreams))
	var late []*upstream
	for _, u := range f.upstreams {
		if u.down(now) {
			late = append(late, u)
		} else {
			out = append(out, u)
		}
	}
	return append(out, late...)
}

// exchange asks by UDP, and by TCP what does not fit.
func (f *forwarder) exchange(ctx context.Context, u *upstream, m *dns.Msg) (*dns.Msg, int, error) {
	m = m.Copy()
	m.Id = uint16(rand.Uint32())
	q, err := m.Pack()
	if err != nil {
		return nil, 0, err
	}
	res, n, err := f.udp(ctx, u, m, q)
	if err == nil && res.Truncated {
		return f.tcp(ctx, u, m, q)
	}
	return res, n, err
}

func (f *forwarder) udp(ctx context.Context, u *upstream, m *dns.Msg, q []byte) (*dns.Msg, int, error) {
	s := u.take(time.Now())
	if s == nil {
		c, err := f.dial(ctx, "udp", u.address.String())
		if err != nil {
			return nil, 0, err
		}
		s = &socket{Conn: c, made: time.Now()}
	}
	s.uses++
	stop := interrupt(ctx, s)
	res, n, err := s.ask(m, q)
	if !stop() || err != nil {
		_ = s.Close() // an answer may come yet
		if err == nil {
			err = ctx.Err()
		}
		return nil, 0, err
	}
	u.give(s, time.Now())
	return res, n, nil
}

// interrupt ends a connection's reading and writing with ctx. stop is false if it has.
func interrupt(ctx context.Context, c net.Conn) (stop func() bool) {
	if d, ok := ctx.Deadline(); ok {
		_ = c.SetDeadline(d)
	}
	return context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
}

var buffers = sync.Pool{New: func() any { b := make([]byte, dns.MaxMsgSize); return &b }}

// ask reads until the answer to m: others are late ones, or somebody's guess.
func (s *socket) ask(m *dns.Msg, q []byte) (*dns.Msg, int, error) {
	if _, err := s.Write(q); err != nil {
		return nil, 0, err
	}
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	for range 100 {
		n, err := s.Read(*buf)
		if err != nil {
			return nil, 0, err
		}
		if res := parse(m, (*buf)[:n]); res != nil {
			return res, n, nil
		}
	}
	return nil, 0, errors.New("upstream answers other questions only")
}

func (f *forwarder) tcp(ctx context.Context, u *upstream, m *dns.Msg, q []byte) (*dns.Msg, int, error) {
	c, err := f.dial(ctx, "tcp", u.address.String())
	if err != nil {
		return nil, 0, err
	}
	defer c.Close()
	defer interrupt(ctx, c)()
	if _, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(q))), q...)); err != nil {
		return nil, 0, err
	}
	var size [2]byte
	if _, err := io.ReadFull(c, size[:]); err != nil {
		return nil, 0, err
	}
	b := make([]byte, binary.BigEndian.Uint16(size[:]))
	if _, err := io.ReadFull(c, b); err != nil {
		return nil, 0, err
	}
	res := parse(m, b)
	if res == nil {
		return nil, 0, errors.New("upstream answers another question")
	}
	return res, len(b), nil
}

// parse returns the answer to m, or nil.
func parse(m *dns.Msg, b []byte) *dns.Msg {
	if len(b) < 12 || binary.BigEndian.Uint16(b) != m.Id || b[2]&0x80 == 0 {
		return nil
	}
	res := &dns.Msg{}
	if err := res.Unpack(b); err != nil {
		if !res.Truncated { // what has been cut is asked again by TCP
			return nil
		}
	}
	if len(res.Question) != 1 || dns.CanonicalName(res.Question[0].Name) != m.Question[0].Name ||
		res.Question[0].Qtype != m.Question[0].Qtype || res.Question[0].Qclass != m.Question[0].Qclass {
		return nil
	}
	res.Extra = withoutOPT(res.Extra)
	return res
}

func withoutOPT(all []dns.RR) []dns.RR {
	out := all[:0]
	for _, r := range all {
		if t := r.Header().Rrtype; t != dns.TypeOPT && t != dns.TypeTSIG && t != dns.TypeSIG {
			out = append(out, r)
		}
	}
	return out
}

func (f *forwarder) close() {
	for _, u := range f.upstreams {
		u.close()
	}
}

// upstream is one server and the sockets to it.
type upstream struct {
	address netip.AddrPort

	mu        sync.Mutex
	failedAt  time.Time
	idle      []*socket
	forgotten bool
}

type socket struct {
	net.Conn
	made time.Time
	uses int
}

func (u *upstream) down(now time.Time) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return !u.failedAt.IsZero() && now.Sub(u.failedAt) < penalty
}

func (u *upstream) failed(now time.Time) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.failedAt = now
}

func (u *upstream) answered() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.failedAt = time.Time{}
}

func (u *upstream) take(now time.Time) *socket {
	u.mu.Lock()
	defer u.mu.Unlock()
	for len(u.idle) > 0 {
		s := u.idle[len(u.idle)-1]
		u.idle = u.idle[:len(u.idle)-1]
		if now.Sub(s.made) < socketAge {
			return s
		}
		_ = s.Close()
	}
	return nil
}

func (u *upstream) give(s *socket, now time.Time) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.forgotten || s.uses >= socketUses || len(u.idle) >= socketsIdle || now.Sub(s.made) >= socketAge {
		_ = s.Close()
		return
	}
	u.idle = append(u.idle, s)
}

func (u *upstream) close() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.forgotten = true
	for _, s := range u.idle {
		_ = s.Close()
	}
	u.idle = nil
}
