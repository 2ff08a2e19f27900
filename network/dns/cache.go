package dns

import (
	"container/list"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// cache keeps upstream answers while their records live; the longest unused go first.
type cache struct {
	mu      sync.Mutex
	max     int
	entries map[key]*list.Element
	used    list.List // of *entry, the last used first
}

type entry struct {
	key        key
	msg        *dns.Msg
	kept, ends time.Time
}

// get returns an answer with what is left of its records' lives, or nil.
func (c *cache) get(k key, now time.Time) *dns.Msg {
	c.mu.Lock()
	e := c.entries[k]
	if e == nil {
		c.mu.Unlock()
		return nil
	}
	v := e.Value.(*entry)
	if !now.Before(v.ends) {
		c.used.Remove(e)
		delete(c.entries, k)
		c.mu.Unlock()
		return nil
	}
	c.used.MoveToFront(e)
	c.mu.Unlock()
	return aged(v.msg, uint32(now.Sub(v.kept)/time.Second))
}

// aged copies an answer some seconds later.
func aged(m *dns.Msg, seconds uint32) *dns.Msg {
	out := &dns.Msg{MsgHdr: m.MsgHdr, Answer: m.Answer, Ns: m.Ns, Extra: m.Extra}
	if seconds == 0 {
		return out
	}
	for _, section := range []*[]dns.RR{&out.Answer, &out.Ns, &out.Extra} {
		rrs := make([]dns.RR, len(*section))
		for i, r := range *section {
			rrs[i] = dns.Copy(r)
			h := rrs[i].Header()
			h.Ttl -= min(h.Ttl, seconds)
		}
		*section = rrs
	}
	return out
}

func (c *cache) put(k key, m *dns.Msg, size int, now time.Time) {
	life := lifetime(m)
	if life <= 0 || size > entrySize || c.max <= 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.entries[k]; e != nil {
		c.used.Remove(e)
		delete(c.entries, k)
	}
	for len(c.entries) >= c.max {
		last := c.used.Back()
		delete(c.entries, last.Value.(*entry).key)
		c.used.Remove(last)
	}
	c.entries[k] = c.used.PushFront(&entry{key: k, msg: m, kept: now, ends: now.Add(life)})
}

// lifetime is how long an answer may be given again: as its shortest-lived record, or as
// the zone says of what does not exist (RFC 2308).
func lifetime(m *dns.Msg) time.Duration {
	if m.Truncated || m.Rcode != dns.RcodeSuccess && m.Rcode != dns.RcodeNameError {
		return 0
	}
	negative := m.Rcode == dns.RcodeNameError || len(m.Answer) == 0
	limit, told := positiveLimit, false
	if negative {
		limit = negativeLimit
	}
	for _, section := range [][]dns.RR{m.Answer, m.Ns, m.Extra} {
		for _, r := range section {
			limit, told = min(limit, time.Duration(r.Header().Ttl)*time.Second), true
		}
	}
	if !negative {
		if !told {
			return 0
		}
		return limit
	}
	for _, r := range m.Ns {
		if soa, ok := r.(*dns.SOA); ok {
			return min(limit, time.Duration(soa.Minttl)*time.Second)
		}
	}
	return 0
}
