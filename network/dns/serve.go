package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"time"

	"github.com/miekg/dns"
)

const (
	// maxConns bounds TCP connections, maxConnsEach those of one client, maxPending the
	// questions that wait for an upstream; what is beyond them is turned away.
	maxConns, maxConnsEach, maxPending = 128, 16, 256
	// idle is how long a TCP connection may say nothing, or not read its answer.
	idle = 5 * time.Second
	// maxUDP bounds answers over UDP whatever a client says it can take, ednsSize is what
	// we can.
	maxUDP, ednsSize = 4096, 1232
)

func (s *Server) serveUDP() {
	defer s.wg.Done()
	buf := make([]byte, dns.MaxMsgSize)
	for {
		n, from, err := s.packet.ReadFromUDPAddrPort(buf)
		if err != nil {
			if s.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			select { // of memory that is short for a moment, say
			case <-time.After(10 * time.Millisecond):
			case <-s.ctx.Done():
			}
			continue
		}
		q, done := s.begin(buf[:n], false)
		if done != nil {
			_, _ = s.packet.WriteToUDPAddrPort(done, from)
		}
		if q == nil {
			continue
		}
		s.wg.Add(1) // bounded by maxPending
		go func() {
			defer s.wg.Done()
			if out := s.finish(s.ctx, q); out != nil {
				_, _ = s.packet.WriteToUDPAddrPort(out, from)
			}
		}()
	}
}

func (s *Server) serveTCP() {
	defer s.wg.Done()
	for {
		c, err := s.listen.Accept()
		if err != nil {
			if s.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			select {
			case <-time.After(10 * time.Millisecond):
			case <-s.ctx.Done():
			}
			continue
		}
		s.mu.Lock()
		if s.ctx.Err() != nil || len(s.conns) >= maxConns || s.of(c.RemoteAddr()) >= maxConnsEach {
			s.mu.Unlock()
			_ = c.Close()
			continue
		}
		s.conns[c] = struct{}{}
		s.mu.Unlock()
		s.wg.Add(1)
		go func() {
			defer s.wg.Done()
			s.converse(c)
			s.mu.Lock()
			delete(s.conns, c)
			s.mu.Unlock()
			_ = c.Close()
		}()
	}
}

// of counts a client's connections; mu is held.
func (s *Server) of(client net.Addr) int {
	n := 0
	host := client.(*net.TCPAddr).AddrPort().Addr()
	for c := range s.conns {
		if c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr() == host {
			n++
		}
	}
	return n
}

// converse answers one question after the other.
func (s *Server) converse(c net.Conn) {
	for {
		_ = c.SetDeadline(time.Now().Add(idle))
		var size [2]byte
		if _, err := io.ReadFull(c, size[:]); err != nil {
			return
		}
		buf := make([]byte, binary.BigEndian.Uint16(size[:]))
		if _, err := io.ReadFull(c, buf); err != nil {
			return
		}
		q, out := s.begin(buf, true)
		if q != nil {
			out = s.finish(s.ctx, q)
		}
		if out == nil {
			return
		}
		_ = c.SetDeadline(time.Now().Add(idle))
		if _, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(out))), out...)); err != nil {
			return
		}
	}
}

// question is one that an upstream is to answer.
type question struct {
	client *dns.Msg
	tcp    bool
	key    key
	ask    *dns.Msg
	// prefix are the records that lead from the client's name to the one asked.
	prefix []dns.RR
	slot   func()
}

// begin answers a message if that takes no waiting, or returns what finish is to do. Both
// are nil for what deserves no answer.
func (s *Server) begin(raw []byte, tcp bool) (*question, []byte) {
	if len(raw) < 12 || raw[2]&0x80 != 0 {
		return nil, nil // an answer: two servers might go on for ever
	}
	s.counts.queries.Add(1)
	m := &dns.Msg{}
	if err := m.Unpack(raw); err != nil {
		f := &dns.Msg{MsgHdr: dns.MsgHdr{
			Id: binary.BigEndian.Uint16(raw), Response: true, Opcode: int(raw[2]>>3) & 0xf, Rcode: dns.RcodeFormatError,
		}}
		out, _ := f.Pack()
		return nil, out
	}
	if code := refusal(m); code != dns.RcodeSuccess {
		return nil, s.pack(m, &dns.Msg{MsgHdr: dns.MsgHdr{Rcode: code}}, tcp)
	}
	q := m.Question[0]
	name := dns.CanonicalName(q.Name)
	x := s.index.Load()
	if x == nil {
		return nil, s.fail(m, dns.RcodeServerFailure, tcp)
	}
	next := &question{client: m, tcp: tcp}
	if x.local(name) {
		limit := maxAnswersUDP
		if tcp {
			limit = maxAnswers
		}
		r := x.answer(q.Name, name, q.Qtype, limit)
		if r.chase == "" {
			s.counts.local.Add(1)
			return nil, s.pack(m, &dns.Msg{
				MsgHdr: dns.MsgHdr{Rcode: r.rcode, Authoritative: true}, Answer: r.answer, Ns: r.ns, Extra: r.extra,
			}, tcp)
		}
		name, next.prefix = r.chase, r.answer
	}
	next.key, next.ask = upstreamQuestion(m, name, q.Qtype)
	if res := s.forward.cached(next.key); res != nil {
		s.counts.cached.Add(1)
		return nil, s.compose(next, res)
	}
	var ok bool
	if next.slot, ok = s.forward.slot(); !ok {
		s.counts.refused.Add(1)
		return nil, s.fail(m, dns.RcodeRefused, tcp)
	}
	return next, nil
}

// finish asks upstream.
func (s *Server) finish(ctx context.Context, q *question) []byte {
	defer q.slot()
	res, err := s.forward.resolve(ctx, q.key, q.ask)
	switch {
	case errors.Is(err, errRate):
		s.counts.refused.Add(1)
		return s.fail(q.client, dns.RcodeRefused, q.tcp)
	case err != nil:
		s.counts.failed.Add(1)
		return s.fail(q.client, dns.RcodeServerFailure, q.tcp)
	}
	s.counts.forwarded.Add(1)
	return s.compose(q, res)
}

// compose makes an upstream's answer the client's.
func (s *Server) compose(q *question, res *dns.Msg) []byte {
	out := &dns.Msg{MsgHdr: res.MsgHdr, Ns: res.Ns, Extra: res.Extra}
	out.Authoritative, out.Truncated = false, false
	out.Answer = append(append(make([]dns.RR, 0, len(q.prefix)+len(res.Answer)), q.prefix...), res.Answer...)
	return s.pack(q.client, out, q.tcp)
}

// refusal is why a message is not looked at further.
func refusal(m *dns.Msg) int {
	if m.Opcode != dns.OpcodeQuery {
		return dns.RcodeNotImplemented
	}
	if len(m.Question) != 1 || len(m.Answer)+len(m.Ns) > 0 {
		return dns.RcodeFormatError
	}
	if o := m.IsEdns0(); o != nil && o.Version() != 0 {
		return dns.RcodeBadVers
	}
	switch q := m.Question[0]; {
	case q.Qclass != dns.ClassINET:
		return dns.RcodeRefused
	case q.Qtype == dns.TypeANY:
		return dns.RcodeNotImplemented // RFC 8482 lets a server not answer with everything
	case q.Qtype == dns.TypeAXFR, q.Qtype == dns.TypeIXFR, q.Qtype == dns.TypeMAILA, q.Qtype == dns.TypeMAILB,
		q.Qtype == dns.TypeOPT, q.Qtype == dns.TypeTSIG, q.Qtype == dns.TypeTKEY, q.Qtype == 0:
		return dns.RcodeRefused
	}
	return dns.RcodeSuccess
}

func (s *Server) fail(m *dns.Msg, code int, tcp bool) []byte {
	return s.pack(m, &dns.Msg{MsgHdr: dns.MsgHdr{Rcode: code}}, tcp)
}

// pack addresses an answer to the client that asked m, in the size it takes.
func (s *Server) pack(m, out *dns.Msg, tcp bool) []byte {
	out.Id, out.Response, out.Opcode = m.Id, true, m.Opcode
	out.RecursionDesired, out.RecursionAvailable, out.CheckingDisabled = m.RecursionDesired, true, m.CheckingDisabled
	out.Compress = true
	if len(m.Question) > 0 {
		out.Question = m.Question[:1]
	}
	size := dns.MinMsgSize
	if o := m.IsEdns0(); o != nil {
		size = max(size, min(int(o.UDPSize()), maxUDP))
		extra := make([]dns.RR, 0, len(out.Extra)+1)
		for _, r := range out.Extra {
			if r.Header().Rrtype != dns.TypeOPT {
				extra = append(extra, r)
			}
		}
		opt := &dns.OPT{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeOPT}}
		opt.SetUDPSize(ednsSize)
		opt.SetDo(o.Do())
		out.Extra = append(extra, opt)
	} else if out.Rcode > 0xf {
		out.Rcode = dns.RcodeServerFailure // it could not read another
	}
	if tcp {
		size = dns.MaxMsgSize - 1
	}
	out.Truncate(size)
	b, err := out.Pack()
	if err != nil {
		// An upstream's records that can be read but not written.
		f := &dns.Msg{MsgHdr: dns.MsgHdr{Id: m.Id, Response: true, Opcode: m.Opcode, Rcode: dns.RcodeServerFailure}, Question: out.Question}
		if b, err = f.Pack(); err != nil {
			return nil
		}
	}
	return b
}

// upstreamQuestion is what is asked for a client: its question with its wishes about
// DNSSEC, but nothing that tells clients apart (cookies, subnets): the answer is everybody's.
func upstreamQuestion(m *dns.Msg, name string, qtype uint16) (key, *dns.Msg) {
	k := key{name: name, qtype: qtype, cd: m.CheckingDisabled}
	out := &dns.Msg{MsgHdr: dns.MsgHdr{RecursionDesired: true, CheckingDisabled: k.cd, AuthenticatedData: m.AuthenticatedData}}
	out.Question = []dns.Question{{Name: name, Qtype: qtype, Qclass: dns.ClassINET}}
	if o := m.IsEdns0(); o != nil {
		k.edns, k.do = true, o.Do()
		out.SetEdns0(ednsSize, k.do)
	}
	k.ad = out.AuthenticatedData
	return k, out
}
