// Package faultproxy stands between somebody and HTTP services and spoils requests: by
// rules it answers otherwise, late, or not at all, before or after the request was carried
// out. It must not know who asks what.
package faultproxy

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"slices"
	"strings"
	"sync"
	"time"
)

// maxBody bounds a request that is spoilt.
const maxBody = 16 << 20

// Rule is what becomes of some requests. The first one that fits decides.
type Rule struct {
	// Name tells it from others in Counts.
	Name string
	// Method, Host and Path, of which the request's contains the latter two; any if empty.
	Method, Host, Path string
	// Skip lets so many through first, Times spoils so many then; 0 is all.
	Skip, Times int
	// Each counts anew for each kind of request: method, host and path without what looks
	// like an ID. With Times 1 every kind is spoilt once.
	Each bool
	// Pick says of which kinds; of all if nil.
	Pick func(kind string) bool

	// Delay is how long the request is kept.
	Delay time.Duration
	// After has it carried out first, and loses the answer only.
	After bool
	// Status, Body and Header of the answer. Without a Status the request is only delayed,
	// or, with Cut, the connection is ended.
	Status int
	Body   string
	Header map[string]string
	Cut    bool
}

// Proxy forwards requests to the host they name.
type Proxy struct {
	forward *httputil.ReverseProxy

	mu     sync.Mutex
	rules  []Rule
	seen   []map[string]int // requests that fitted, by rule and kind
	counts map[string]int
	kinds  map[string]int
}

var _ http.Handler = (*Proxy)(nil)

// New makes one that connects by dial.
func New(dial func(ctx context.Context, network, address string) (net.Conn, error)) *Proxy {
	p := &Proxy{counts: map[string]int{}, kinds: map[string]int{}}
	p.forward = &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host, r.Out.Host = "http", r.In.Host, r.In.Host
		},
		// A connection that its server ended meanwhile would be a fault nobody asked for.
		Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true, DisableCompression: true},
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, _ error) {
			if r.Context().Err() == nil {
				w.WriteHeader(http.StatusBadGateway)
			}
		},
	}
	return p
}

// Set replaces the rules. What was counted begins anew.
func (p *Proxy) Set(rules ...Rule) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rules, p.seen = slices.Clone(rules), make([]map[string]int, len(rules))
	for i := range p.seen {
		p.seen[i] = map[string]int{}
	}
	clear(p.counts)
	clear(p.kinds)
}

// Counts says how many requests each rule has spoilt.
func (p *Proxy) Counts() map[string]int { return p.copied(p.counts) }

// Kinds says which kinds of requests there were since Set, and how many of each.
func (p *Proxy) Kinds() map[string]int { return p.copied(p.kinds) }

func (p *Proxy) copied(m map[string]int) map[string]int {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := map[string]int{}
	for k, v := range m {
		out[k] = v
	}
	return out
}

// Kind of a request.
func Kind(r *http.Request) string {
	parts := strings.Split(r.URL.Path, "/")
	for i, s := range parts {
		if len(s) >= 32 && strings.Trim(s, "0123456789abcdef-") == "" {
			parts[i] = "ID"
		}
	}
	return r.Method + " " + r.Host + strings.Join(parts, "/")
}

func (p *Proxy) rule(r *http.Request) (Rule, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	kind := Kind(r)
	p.kinds[kind]++
	for i, x := range p.rules {
		if x.Method != "" && x.Method != r.Method || !strings.Contains(r.Host, x.Host) || !strings.Contains(r.URL.Path, x.Path) || x.Pick != nil && !x.Pick(kind) {
			continue
		}
		key := ""
		if x.Each {
			key = kind
		}
		n := p.seen[i][key]
		if n < x.Skip || x.Times > 0 && n >= x.Skip+x.Times {
			p.seen[i][key]++
			continue
		}
		p.seen[i][key]++
		p.counts[x.Name]++
		return x, true
	}
	return Rule{}, false
}

// ServeHTTP implements http.Handler.
func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	x, spoilt := p.rule(r)
	if !spoilt {
		p.forward.ServeHTTP(w, r)
		return
	}
	// Only who has read all of a request is told that the client went.
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	if x.After {
		p.forward.ServeHTTP(&lost{header: http.Header{}}, r)
	}
	if x.Delay > 0 {
		t := time.NewTimer(x.Delay)
		defer t.Stop()
		select {
		case <-t.C:
		case <-r.Context().Done():
			panic(http.ErrAbortHandler)
		}
	}
	switch {
	case x.Cut:
		panic(http.ErrAbortHandler)
	case x.Status == 0 && x.After:
		panic(http.ErrAbortHandler)
	case x.Status == 0:
		p.forward.ServeHTTP(w, r)
		return
	}
	for k, v := range x.Header {
		w.Header().Set(k, v)
	}
	w.WriteHeader(x.Status)
	_, _ = w.Write([]byte(x.Body))
}

// lost is an answer nobody gets.
type lost struct{ header http.Header }

// Header implements http.ResponseWriter.
func (l *lost) Header() http.Header { return l.header }

// Write implements http.ResponseWriter.
func (l *lost) Write(b []byte) (int, error) { return len(b), nil }

// WriteHeader implements http.ResponseWriter.
func (l *lost) WriteHeader(int) {}
