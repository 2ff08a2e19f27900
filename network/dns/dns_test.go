package dns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sort"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/miekg/dns"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	"github.com/hypernetes/hypernetes/network/netns"
)

func service(ns, name string, change func(*corev1.ServiceSpec), ips ...string) *corev1.Service {
	s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}}
	s.Spec.ClusterIPs = ips
	if len(ips) > 0 {
		s.Spec.ClusterIP = ips[0]
	}
	s.Spec.Ports = []corev1.ServicePort{{Name: "http", Port: 80, Protocol: corev1.ProtocolTCP}}
	if change != nil {
		change(&s.Spec)
	}
	return s
}

type ep struct {
	address, host string
	unready       bool
}

func slice(ns, svc string, family discoveryv1.AddressType, eps ...ep) *discoveryv1.EndpointSlice {
	s := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: ns, Labels: map[string]string{discoveryv1.LabelServiceName: svc}},
		AddressType: family,
		Ports:       []discoveryv1.EndpointPort{{Name: ptr.To("http"), Port: ptr.To[int32](8080), Protocol: ptr.To(corev1.ProtocolTCP)}},
	}
	for _, e := range eps {
		x := discoveryv1.Endpoint{Addresses: []string{e.address}, TargetRef: &corev1.ObjectReference{Kind: "Pod"}}
		x.Conditions.Ready = ptr.To(!e.unready)
		if e.host != "" {
			x.Hostname = ptr.To(e.host)
		}
		s.Endpoints = append(s.Endpoints, x)
	}
	return s
}

func external(name string) func(*corev1.ServiceSpec) {
	return func(s *corev1.ServiceSpec) { s.Type, s.ExternalName = corev1.ServiceTypeExternalName, name }
}

func view() View {
	v4, v6 := discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6
	many := slice("blue", "many", v4)
	for i := range 400 {
		many.Endpoints = append(many.Endpoints, discoveryv1.Endpoint{Addresses: []string{fmt.Sprintf("192.168.%d.%d", 10+i/200, 1+i%200)}})
	}
	portless := slice("blue", "peers", v4, ep{address: "192.168.0.30", host: "peer-0"})
	portless.Ports = nil
	return View{
		Namespaces: []string{"blue", "cyan"},
		Reverse:    []netip.Prefix{netip.MustParsePrefix("192.168.0.0/16"), netip.MustParsePrefix("10.96.0.0/12"), netip.MustParsePrefix("fd00:10:96::/108"), netip.MustParsePrefix("fd00:5::/64")},
		Services: []*corev1.Service{
			service("default", "kubernetes", func(s *corev1.ServiceSpec) { s.Ports[0].Name, s.Ports[0].Port = "https", 443 }, "10.96.0.1"),
			service("default", "other", nil, "10.96.0.66"), // must not be there
			service("red", "web", nil, "10.96.0.67"),       // nor this
			service("blue", "web", func(s *corev1.ServiceSpec) {
				s.Ports = append(s.Ports, corev1.ServicePort{Name: "dns", Port: 53, Protocol: corev1.ProtocolUDP})
			}, "10.96.1.1", "fd00:10:96::1"),
			service("blue", "pending", nil),
			service("blue", "db", nil, "None"),
			service("blue", "early", func(s *corev1.ServiceSpec) { s.PublishNotReadyAddresses = true }, "None"),
			service("blue", "empty", nil, "None"),
			service("blue", "many", nil, "None"),
			service("blue", "peers", func(s *corev1.ServiceSpec) { s.Ports = nil }, "None"),
			service("blue", "ext", external("www.example.com")),
			service("blue", "ext-slow", external("nowhere.example.com")),
			service("blue", "ext-in", external("Web.blue.svc.cluster.local.")),
			service("blue", "ext-other", external("web.red.svc.cluster.local")),
			service("blue", "ext-a", external("ext-b.blue.svc.cluster.local")),
			service("blue", "ext-b", external("ext-a.blue.svc.cluster.local")),
		},
		Slices: []*discoveryv1.EndpointSlice{
			slice("blue", "db", v4, ep{address: "192.168.0.10", host: "db-0"}, ep{address: "192.168.0.11", host: "db-1"}, ep{address: "192.168.0.12"}, ep{address: "192.168.0.13", host: "db-3", unready: true}),
			slice("blue", "db", v6, ep{address: "fd00:5::10", host: "db-0"}),
			slice("blue", "early", v4, ep{address: "192.168.0.13", host: "e", unready: true}),
			slice("blue", "web", v4, ep{address: "192.168.0.20"}),
			many, portless, nil,
		},
	}
}

// upstream is a resolver of the world.
type fakeUpstream struct {
	addr    netip.AddrPort
	asked   atomic.Int64
	tcp     atomic.Int64
	names   chan string
	handler func(w dns.ResponseWriter, m *dns.Msg, tcp bool)
}

// bothListen takes a port that is free for UDP and TCP: of the two, one may be somebody's.
func bothListen(t testing.TB) (*net.UDPConn, net.Listener) {
	t.Helper()
	for range 50 {
		p, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		check(t, err)
		l, err := net.Listen("tcp", p.LocalAddr().String())
		if err == nil {
			return p, l
		}
		check(t, p.Close())
		if !errors.Is(err, syscall.EADDRINUSE) {
			t.Fatal(err)
		}
	}
	t.Fatal("no port is free for both UDP and TCP")
	return nil, nil
}

func newUpstream(t testing.TB) *fakeUpstream {
	p, l := bothListen(t)
	u := &fakeUpstream{addr: p.LocalAddr().(*net.UDPAddr).AddrPort(), names: make(chan string, 10000)}
	for _, s := range []*dns.Server{{PacketConn: p}, {Listener: l}} {
		started := make(chan struct{})
		s.NotifyStartedFunc = func() { close(started) }
		tcp := s.Listener != nil
		s.Handler = dns.HandlerFunc(func(w dns.ResponseWriter, m *dns.Msg) {
			u.asked.Add(1)
			if tcp {
				u.tcp.Add(1)
			}
			select {
			case u.names <- m.Question[0].Name:
			default:
			}
			if u.handler != nil {
				u.handler(w, m, tcp)
				return
			}
			world(w, m, tcp)
		})
		done := make(chan struct{})
		go func() { defer close(done); _ = s.ActivateAndServe() }()
		<-started
		t.Cleanup(func() { _ = s.Shutdown(); <-done })
	}
	return u
}

func world(w dns.ResponseWriter, m *dns.Msg, tcp bool) {
	r := new(dns.Msg).SetReply(m)
	q := m.Question[0]
	rr := func(s string) dns.RR { x, _ := dns.NewRR(s); return x }
	soa := rr("example.com. 60 IN SOA ns. host. 1 2 3 4 30")
	switch {
	case q.Name == "www.example.com." && q.Qtype == dns.TypeA:
		r.Answer = []dns.RR{rr("www.example.com. 60 IN A 203.0.113.1")}
	case q.Name == "www.example.com.":
		r.Ns = []dns.RR{soa}
	case q.Name == "big.example.com.":
		for i := range 200 {
			r.Answer = append(r.Answer, rr(fmt.Sprintf("big.example.com. 60 IN A 203.0.113.%d", i)))
		}
		if !tcp {
			r.Truncate(512)
		}
	case q.Name == "short.example.com.":
		r.Answer = []dns.RR{rr("short.example.com. 0 IN A 203.0.113.1")}
	case q.Name == "servfail.example.com.":
		r.Rcode = dns.RcodeServerFailure
	case q.Name == "silent.example.com.":
		return
	case q.Name == "do.example.com.":
		o := m.IsEdns0()
		r.Answer = []dns.RR{rr(fmt.Sprintf(`do.example.com. 60 IN TXT "edns=%v do=%v cd=%v options=%d"`, o != nil, o != nil && o.Do(), m.CheckingDisabled, func() int {
			if o == nil {
				return 0
			}
			return len(o.Option)
		}()))}
	case strings.HasPrefix(q.Name, "ok"):
		r.Answer = []dns.RR{rr(q.Name + " 60 IN A 203.0.113.2")}
	default:
		r.Rcode = dns.RcodeNameError
		r.Ns = []dns.RR{soa}
	}
	_ = w.WriteMsg(r)
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// resolver serves a view on a port of the loopback.
func resolver(t testing.TB, change func(*Config), ups ...*fakeUpstream) (*Server, string) {
	t.Helper()
	c := Config{Address: netip.MustParseAddr("10.96.0.10"), Domain: "cluster.local", UpstreamDial: (&net.Dialer{}).DialContext}
	for _, u := range ups {
		c.Upstreams = append(c.Upstreams, u.addr)
	}
	if change != nil {
		change(&c)
	}
	s, err := newServer(c)
	check(t, err)
	p, l := bothListen(t)
	s.Update(view())
	s.serve(p, l)
	t.Cleanup(func() { check(t, s.Close()) })
	return s, p.LocalAddr().String()
}

func ask(t testing.TB, at, name string, qtype uint16, change ...func(*dns.Msg)) *dns.Msg {
	t.Helper()
	return askBy(t, "udp", at, name, qtype, change...)
}

func askBy(t testing.TB, network, at, name string, qtype uint16, change ...func(*dns.Msg)) *dns.Msg {
	t.Helper()
	m := new(dns.Msg).SetQuestion(dns.Fqdn(name), qtype)
	for _, f := range change {
		f(m)
	}
	c := &dns.Client{Net: network, Timeout: 10 * time.Second}
	r, _, err := c.Exchange(m, at)
	check(t, err)
	return r
}

// text is an answer's records without what is the same everywhere.
func text(rrs []dns.RR) string {
	var out []string
	for _, r := range rrs {
		h := r.Header()
		out = append(out, strings.TrimSuffix(h.Name, "cluster.local.")+" "+dns.TypeToString[h.Rrtype]+" "+strings.ReplaceAll(strings.TrimPrefix(r.String(), h.String()), "cluster.local.", ""))
	}
	sort.Strings(out)
	return strings.Join(out, "; ")
}

func TestAnswers(t *testing.T) {
	u := newUpstream(t)
	_, at := resolver(t, nil, u)
	nx, no := dns.RcodeNameError, dns.RcodeSuccess
	A, AAAA, SRV, PTR := dns.TypeA, dns.TypeAAAA, dns.TypeSRV, dns.TypePTR
	for _, c := range []struct {
		name  string
		qtype uint16
		rcode int
		want  string // sorted; "" is none
	}{
		{"web.blue.svc", A, no, "web.blue.svc. A 10.96.1.1"},
		{"web.blue.svc", AAAA, no, "web.blue.svc. AAAA fd00:10:96::1"},
		{"WEB.Blue.svc", A, no, "WEB.Blue.svc. A 10.96.1.1"},
		{"web.blue.svc", dns.TypeMX, no, ""},
		{"web.blue.svc", dns.TypeSRV, no, "web.blue.svc. SRV 0 50 53 web.blue.svc.; web.blue.svc. SRV 0 50 80 web.blue.svc."},
		{"_http._tcp.web.blue.svc", SRV, no, "_http._tcp.web.blue.svc. SRV 0 100 80 web.blue.svc."},
		{"_dns._udp.web.blue.svc", SRV, no, "_dns._udp.web.blue.svc. SRV 0 100 53 web.blue.svc."},
		{"_http._udp.web.blue.svc", SRV, nx, ""},
		{"_tcp.web.blue.svc", SRV, no, ""},
		{"_http._tcp.web.blue.svc", A, no, ""},
		{"x.web.blue.svc", A, nx, ""},
		{"pending.blue.svc", A, no, ""},
		{"kubernetes.default.svc", A, no, "kubernetes.default.svc. A 10.96.0.1"},
		{"_https._tcp.kubernetes.default.svc", SRV, no, "_https._tcp.kubernetes.default.svc. SRV 0 100 443 kubernetes.default.svc."},
		{"default.svc", A, no, ""},
		{"other.default.svc", A, nx, ""},
		{"web.red.svc", A, nx, ""},
		{"red.svc", A, nx, ""},
		{"nosuch.svc", A, nx, ""},
		{"blue.svc", A, no, ""},
		{"cyan.svc", A, no, ""},
		{"svc", A, no, ""},
		{"", A, no, ""},
		{"", dns.TypeNS, no, " NS ns.dns."},
		{"ns.dns", A, no, "ns.dns. A 10.96.0.10"},
		{"dns-version", dns.TypeTXT, no, `dns-version. TXT "1.1.0"`},
		{"nosuch", A, nx, ""},
		{"www.example.com", A, nx, ""}, // as a search domain makes it
		{"db.blue.svc", A, no, "db.blue.svc. A 192.168.0.10; db.blue.svc. A 192.168.0.11; db.blue.svc. A 192.168.0.12"},
		{"db.blue.svc", AAAA, no, "db.blue.svc. AAAA fd00:5::10"},
		{"db-0.db.blue.svc", A, no, "db-0.db.blue.svc. A 192.168.0.10"},
		{"192-168-0-12.db.blue.svc", A, no, "192-168-0-12.db.blue.svc. A 192.168.0.12"},
		{"db-3.db.blue.svc", A, nx, ""},
		{"e.early.blue.svc", A, no, "e.early.blue.svc. A 192.168.0.13"},
		{"early.blue.svc", A, no, "early.blue.svc. A 192.168.0.13"},
		{"empty.blue.svc", A, no, ""},
		{"_http._tcp.db.blue.svc", SRV, no, "_http._tcp.db.blue.svc. SRV 0 33 8080 192-168-0-12.db.blue.svc.; _http._tcp.db.blue.svc. SRV 0 33 8080 db-0.db.blue.svc.; _http._tcp.db.blue.svc. SRV 0 33 8080 db-1.db.blue.svc."},
		{"peers.blue.svc", SRV, no, "peers.blue.svc. SRV 0 100 0 peer-0.peers.blue.svc."},
		{"192-168-0-77.blue.pod", A, no, "192-168-0-77.blue.pod. A 192.168.0.77"},
		{"192-168-0-77.blue.pod", AAAA, no, ""},
		{"fd00-5--7.blue.pod", AAAA, no, "fd00-5--7.blue.pod. AAAA fd00:5::7"},
		{"fd00-0005-0000-0000-0000-0000-0000-0007.blue.pod", AAAA, no, "fd00-0005-0000-0000-0000-0000-0000-0007.blue.pod. AAAA fd00:5::7"},
		{"8-8-8-8.blue.pod", A, nx, ""},
		{"192-168-0-77.red.pod", A, nx, ""},
		{"192-168-0.blue.pod", A, nx, ""},
		{"red.pod", A, nx, ""},
		{"blue.pod", A, no, ""},
		{"ext.blue.svc", A, no, "ext.blue.svc. CNAME www.example.com.; www.example.com. A 203.0.113.1"},
		{"ext.blue.svc", AAAA, no, "ext.blue.svc. CNAME www.example.com."},
		{"ext.blue.svc", dns.TypeCNAME, no, "ext.blue.svc. CNAME www.example.com."},
		{"ext-slow.blue.svc", A, nx, "ext-slow.blue.svc. CNAME nowhere.example.com."},
		{"ext-in.blue.svc", A, no, "ext-in.blue.svc. CNAME web.blue.svc.; web.blue.svc. A 10.96.1.1"},
		{"ext-other.blue.svc", A, nx, "ext-other.blue.svc. CNAME web.red.svc."},
		{"ext-a.blue.svc", A, dns.RcodeServerFailure, ""},
		{"1.1.96.10.in-addr.arpa.", PTR, no, "1.1.96.10.in-addr.arpa. PTR web.blue.svc."},
		{"1.0.96.10.in-addr.arpa.", PTR, no, "1.0.96.10.in-addr.arpa. PTR kubernetes.default.svc."},
		{"66.0.96.10.in-addr.arpa.", PTR, nx, ""},
		{"67.0.96.10.in-addr.arpa.", PTR, nx, ""},
		{"10.0.168.192.in-addr.arpa.", PTR, no, "10.0.168.192.in-addr.arpa. PTR db-0.db.blue.svc."},
		{"20.0.168.192.in-addr.arpa.", PTR, no, "20.0.168.192.in-addr.arpa. PTR 192-168-0-20.blue.pod."},
		{"99.0.168.192.in-addr.arpa.", PTR, nx, ""},
		{"168.192.in-addr.arpa.", PTR, no, ""},
		{"10.in-addr.arpa.", dns.TypeSOA, no, ""},
		{"x.1.96.10.in-addr.arpa.", PTR, nx, ""},
		{"b._dns-sd._udp.0.168.192.in-addr.arpa.", PTR, nx, ""},
		{"1.1.300.10.in-addr.arpa.", PTR, nx, ""},
		{"1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.6.9.0.0.0.1.0.0.0.0.d.f.ip6.arpa.", PTR, no, "1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.6.9.0.0.0.1.0.0.0.0.d.f.ip6.arpa. PTR web.blue.svc."},
		{"0.1.0.0.0.0.d.f.ip6.arpa.", PTR, no, ""},
		{"1.113.0.203.in-addr.arpa.", PTR, nx, ""}, // the world's
	} {
		name := c.name
		if !strings.HasSuffix(name, "arpa.") {
			name = strings.TrimPrefix(name+".cluster.local.", ".")
		}
		t.Run(dns.TypeToString[c.qtype]+"/"+name, func(t *testing.T) {
			for _, network := range []string{"udp", "tcp"} {
				r := askBy(t, network, at, name, c.qtype)
				if r.Rcode != c.rcode || text(r.Answer) != c.want {
					t.Errorf("%s: %s %q, want %s %q", network, dns.RcodeToString[r.Rcode], text(r.Answer), dns.RcodeToString[c.rcode], c.want)
				}
				if (c.want == "" || c.rcode == nx) && c.rcode != dns.RcodeServerFailure && len(r.Ns) != 1 {
					t.Errorf("%s: authority %v", network, r.Ns)
				}
				for _, rr := range r.Answer {
					if strings.HasSuffix(rr.Header().Name, "cluster.local.") && rr.Header().Ttl != ttl {
						t.Errorf("ttl of %v", rr)
					}
				}
			}
		})
	}
	close(u.names)
	for name := range u.names {
		if strings.HasSuffix(name, "cluster.local.") || strings.HasSuffix(name, "10.in-addr.arpa.") || strings.HasSuffix(name, "168.192.in-addr.arpa.") {
			t.Errorf("upstream was asked for %s", name)
		}
	}
	// With addresses of what SRV names.
	r := ask(t, at, "_http._tcp.db.blue.svc.cluster.local", SRV, func(m *dns.Msg) { m.SetEdns0(4096, false) })
	if got := text(r.Extra[:len(r.Extra)-1]); !strings.Contains(got, "db-0.db.blue.svc. A 192.168.0.10") || !strings.Contains(got, "db-0.db.blue.svc. AAAA fd00:5::10") {
		t.Errorf("extra %s", got)
	}
}

// TestOthersAreNothing compares what is said of another tenant's names and of none.
func TestOthersAreNothing(t *testing.T) {
	_, at := resolver(t, nil)
	for _, pair := range [][2]string{
		{"web.red.svc.cluster.local.", "web.zzz.svc.cluster.local."}, {"red.svc.cluster.local.", "zzz.svc.cluster.local."},
		{"67.0.96.10.in-addr.arpa.", "68.0.96.10.in-addr.arpa."}, {"1-1-1-1.red.pod.cluster.local.", "1-1-1-1.zzz.pod.cluster.local."},
		{"other.default.svc.cluster.local.", "nosuch.default.svc.cluster.local."},
	} {
		for _, q := range []uint16{dns.TypeA, dns.TypeAAAA, dns.TypeSRV, dns.TypePTR, dns.TypeTXT} {
			a, b := ask(t, at, pair[0], q), ask(t, at, pair[1], q)
			b.Id = a.Id
			if strings.ReplaceAll(b.String(), pair[1], pair[0]) != a.String() || a.Rcode != dns.RcodeNameError {
				t.Errorf("%s and %s differ:\n%v\n%v", pair[0], pair[1], a, b)
			}
		}
	}
}

func TestUpdateReplaces(t *testing.T) {
	s, at := resolver(t, nil)
	s.Update(View{Namespaces: []string{"red"}, Services: view().Services})
	if r := ask(t, at, "web.blue.svc.cluster.local", dns.TypeA); r.Rcode != dns.RcodeNameError {
		t.Errorf("old names: %v", r)
	}
	if r := ask(t, at, "web.red.svc.cluster.local", dns.TypeA); len(r.Answer) != 1 {
		t.Errorf("new names: %v", r)
	}
	s.index.Store(nil)
	if r := ask(t, at, "web.red.svc.cluster.local", dns.TypeA); r.Rcode != dns.RcodeServerFailure {
		t.Errorf("without a view: %v", r)
	}
}

func TestSizes(t *testing.T) {
	u := newUpstream(t)
	_, at := resolver(t, nil, u)
	for _, name := range []string{"many.blue.svc.cluster.local", "big.example.com"} {
		for size, want := range map[uint16]int{0: 512, 100: 512, 1232: 1232, 4096: 4096, 65535: 4096} {
			m := new(dns.Msg).SetQuestion(dns.Fqdn(name), dns.TypeA)
			if size > 0 {
				m.SetEdns0(size, false)
			}
			c, err := net.Dial("udp", at)
			check(t, err)
			b, err := m.Pack()
			check(t, err)
			_, err = c.Write(b)
			check(t, err)
			buf := make([]byte, 65535)
			check(t, c.SetDeadline(time.Now().Add(10*time.Second)))
			n, err := c.Read(buf)
			check(t, err)
			_ = c.Close()
			r := new(dns.Msg)
			check(t, r.Unpack(buf[:n]))
			if all := len(r.Answer) == 200; n > want || r.Truncated == all || (r.IsEdns0() != nil) != (size > 0) || len(r.Answer) == 0 {
				t.Errorf("%s, size %d: %d bytes, %d answers, truncated %v", name, size, n, len(r.Answer), r.Truncated)
			}
		}
		want := 400
		if name == "big.example.com" {
			want = 200
		}
		if r := askBy(t, "tcp", at, name, dns.TypeA); len(r.Answer) != want || r.Truncated {
			t.Errorf("%s by tcp: %d answers", name, len(r.Answer))
		}
	}
	if u.tcp.Load() == 0 {
		t.Error("upstream was not asked by tcp")
	}
}

func TestRefusals(t *testing.T) {
	_, at := resolver(t, nil)
	for name, c := range map[string]struct {
		change func(*dns.Msg)
		want   int
	}{
		"axfr":   {func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeAXFR }, dns.RcodeRefused},
		"ixfr":   {func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeIXFR }, dns.RcodeRefused},
		"any":    {func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeANY }, dns.RcodeNotImplemented},
		"chaos":  {func(m *dns.Msg) { m.Question[0].Qclass, m.Question[0].Name = dns.ClassCHAOS, "version.bind." }, dns.RcodeRefused},
		"update": {func(m *dns.Msg) { m.Opcode = dns.OpcodeUpdate }, dns.RcodeNotImplemented},
		"notify": {func(m *dns.Msg) { m.Opcode = dns.OpcodeNotify }, dns.RcodeNotImplemented},
		"none":   {func(m *dns.Msg) { m.Question = nil }, dns.RcodeFormatError},
		"two":    {func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) }, dns.RcodeFormatError},
		"edns1":  {func(m *dns.Msg) { m.SetEdns0(1232, false).IsEdns0().SetVersion(1) }, dns.RcodeBadVers},
		"world":  {func(m *dns.Msg) { m.Question[0].Name = "www.example.com." }, dns.RcodeServerFailure}, // no upstream
	} {
		for _, network := range []string{"udp", "tcp"} {
			m := new(dns.Msg).SetQuestion("cluster.local.", dns.TypeA)
			c.change(m)
			conn, err := dns.Dial(network, at)
			check(t, err)
			check(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
			check(t, conn.WriteMsg(m))
			r, err := conn.ReadMsg()
			check(t, err)
			_ = conn.Close()
			if r.Rcode != c.want || len(r.Answer) > 0 || r.Id != m.Id {
				t.Errorf("%s by %s: %v", name, network, r)
			}
		}
	}
}

func TestCache(t *testing.T) {
	u := newUpstream(t)
	s, at := resolver(t, func(c *Config) { c.CacheEntries = 3 }, u)
	asked := func(want int64, name string, qtype uint16, change ...func(*dns.Msg)) *dns.Msg {
		t.Helper()
		before := u.asked.Load()
		r := ask(t, at, name, qtype, change...)
		if got := u.asked.Load() - before; got != want {
			t.Errorf("%s: upstream was asked %d times, want %d", name, got, want)
		}
		return r
	}
	asked(1, "www.example.com", dns.TypeA)
	asked(0, "WWW.example.com", dns.TypeA)
	asked(1, "www.example.com", dns.TypeAAAA) // NODATA
	asked(0, "www.example.com", dns.TypeAAAA)
	asked(1, "nosuch.example.com", dns.TypeA) // NXDOMAIN
	if r := asked(0, "nosuch.example.com", dns.TypeA); r.Rcode != dns.RcodeNameError || len(r.Ns) != 1 {
		t.Errorf("negative: %v", r)
	}
	asked(1, "short.example.com", dns.TypeA) // ttl 0
	asked(1, "short.example.com", dns.TypeA)
	asked(2, "servfail.example.com", dns.TypeA, func(*dns.Msg) { u.asked.Add(1) })
	asked(1, "ok1.example.com", dns.TypeA) // the first goes
	asked(1, "www.example.com", dns.TypeA)
	cookie := func(m *dns.Msg) {
		m.SetEdns0(1232, true)
		m.IsEdns0().Option = append(m.IsEdns0().Option, &dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0102030405060708"})
		m.CheckingDisabled = true
	}
	r := asked(1, "do.example.com", dns.TypeTXT, cookie)
	if got := text(r.Answer); !strings.Contains(got, "edns=true do=true cd=true options=0") || !r.IsEdns0().Do() || !r.CheckingDisabled {
		t.Errorf("edns: %v", r)
	}
	asked(0, "do.example.com", dns.TypeTXT, cookie)
	if r := asked(1, "do.example.com", dns.TypeTXT); !strings.Contains(text(r.Answer), "edns=false") || r.IsEdns0() != nil {
		t.Errorf("plain: %v", r)
	}
	if n := len(s.forward.cache.entries); n != 3 || s.forward.cache.used.Len() != 3 {
		t.Errorf("%d entries", n)
	}
	if st := s.Stats(); st.Cached != 4 || st.Queries == 0 || st.Forwarded == 0 {
		t.Errorf("%+v", st)
	}
}

func TestCacheAges(t *testing.T) {
	c := cache{max: 2, entries: newForwarder(Config{Rate: 1}).cache.entries}
	rr, _ := dns.NewRR("x. 10 IN A 1.2.3.4")
	m := &dns.Msg{Answer: []dns.RR{rr}}
	now := time.Unix(1000, 0)
	c.put(key{name: "x."}, m, 100, now)
	if r := c.get(key{name: "x."}, now.Add(4*time.Second)); r == nil || r.Answer[0].Header().Ttl != 6 || rr.Header().Ttl != 10 {
		t.Errorf("%v", r)
	}
	if r := c.get(key{name: "x."}, now.Add(10*time.Second)); r != nil || len(c.entries) != 0 {
		t.Errorf("lives on: %v", r)
	}
	c.put(key{name: "x."}, m, entrySize+1, now)
	if len(c.entries) != 0 {
		t.Error("kept a large answer")
	}
}

func TestUpstreamFails(t *testing.T) {
	bad, good := newUpstream(t), newUpstream(t)
	bad.handler = func(w dns.ResponseWriter, m *dns.Msg, tcp bool) {
		// Of others: another id, another question; then nothing.
		r := new(dns.Msg).SetReply(m)
		r.Id++
		_ = w.WriteMsg(r)
		r.Id--
		r.Question[0].Name = "evil.example.com."
		_ = w.WriteMsg(r)
	}
	s, at := resolver(t, nil, bad, good)
	if r := ask(t, at, "www.example.com", dns.TypeA); len(r.Answer) != 1 {
		t.Errorf("second upstream: %v", r)
	}
	before := bad.asked.Load()
	if r := ask(t, at, "ok2.example.com", dns.TypeA); len(r.Answer) != 1 || bad.asked.Load() != before {
		t.Errorf("it is asked first still: %v", r)
	}
	if r := ask(t, at, "servfail.example.com", dns.TypeA); r.Rcode != dns.RcodeServerFailure {
		t.Errorf("%v", r)
	}
	if r := ask(t, at, "silent.example.com", dns.TypeA); r.Rcode != dns.RcodeServerFailure || s.Stats().Failed != 1 {
		t.Errorf("%v %+v", r, s.Stats())
	}
}

func TestSingleFlightAndRate(t *testing.T) {
	u := newUpstream(t)
	release := make(chan struct{})
	u.handler = func(w dns.ResponseWriter, m *dns.Msg, tcp bool) {
		<-release
		world(w, m, tcp)
	}
	s, at := resolver(t, func(c *Config) { c.Rate = 1 }, u)
	const clients = 20
	done := make(chan *dns.Msg, clients)
	for range clients {
		go func() {
			m := new(dns.Msg).SetQuestion("www.example.com.", dns.TypeA)
			r, _, _ := (&dns.Client{Timeout: 10 * time.Second}).Exchange(m, at)
			done <- r
		}()
	}
	for s.Stats().Queries < clients { // all are in, and wait
		runtime.Gosched()
	}
	close(release)
	for range clients {
		if r := <-done; r == nil || len(r.Answer) != 1 {
			t.Errorf("%v", r)
		}
	}
	if n := u.asked.Load(); n != 1 {
		t.Errorf("asked %d times", n)
	}
	refused := 0
	for i := range 10 {
		if r := ask(t, at, fmt.Sprintf("ok%d.example.com", i), dns.TypeA); r.Rcode == dns.RcodeRefused {
			refused++
		}
	}
	if refused < 5 || s.Stats().Refused != uint64(refused) {
		t.Errorf("%d refused, %+v", refused, s.Stats())
	}
	if r := ask(t, at, "web.blue.svc.cluster.local", dns.TypeA); len(r.Answer) != 1 {
		t.Errorf("local: %v", r)
	}
}

func TestPendingIsBounded(t *testing.T) {
	u := newUpstream(t)
	u.handler = func(dns.ResponseWriter, *dns.Msg, bool) {}
	s, at := resolver(t, func(c *Config) { c.Rate = 10000 }, u)
	c, err := net.Dial("udp", at)
	check(t, err)
	defer c.Close()
	for i := range maxPending + 50 {
		b, err := new(dns.Msg).SetQuestion(fmt.Sprintf("q%d.example.com.", i), dns.TypeA).Pack()
		check(t, err)
		_, err = c.Write(b)
		check(t, err)
	}
	buf := make([]byte, 512)
	check(t, c.SetReadDeadline(time.Now().Add(10*time.Second)))
	for range 50 {
		n, err := c.Read(buf)
		check(t, err)
		r := new(dns.Msg)
		check(t, r.Unpack(buf[:n]))
		if r.Rcode != dns.RcodeRefused {
			t.Fatalf("%v", r)
		}
	}
	check(t, s.Close()) // in the middle of it
}

func TestTCPConnections(t *testing.T) {
	_, at := resolver(t, nil)
	c, err := dns.Dial("tcp", at)
	check(t, err)
	defer c.Close()
	for range 3 {
		m := new(dns.Msg).SetQuestion("web.blue.svc.cluster.local.", dns.TypeA)
		check(t, c.WriteMsg(m))
		if r, err := c.ReadMsg(); err != nil || len(r.Answer) != 1 {
			t.Fatal(r, err)
		}
	}
	var conns []net.Conn
	for range maxConnsEach + 5 {
		c, err := net.Dial("tcp", at)
		check(t, err)
		conns = append(conns, c)
	}
	closed := 0
	for _, c := range conns[maxConnsEach:] {
		check(t, c.SetReadDeadline(time.Now().Add(30*time.Second)))
		if _, err := c.Read(make([]byte, 1)); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			closed++
		}
	}
	if closed != 5 {
		t.Errorf("%d connections were closed", closed)
	}
	for _, c := range conns {
		_ = c.Close()
	}
}

func TestServe(t *testing.T) {
	for name, c := range map[string]Config{
		"Address": {Domain: "cluster.local"},
		"Domain":  {Address: netip.MustParseAddr("127.0.0.1"), Domain: ""},
	} {
		if _, err := newServerOrServe(c); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if os.Geteuid() != 0 {
		t.Skip("skipped: port 53 in a network namespace needs root")
	}
	path := t.TempDir() + "/ns"
	ns, err := netns.Create(path)
	check(t, err)
	defer func() { _ = ns.Close(); check(t, netns.Remove(path)) }()
	h, err := ns.Netlink()
	check(t, err)
	defer h.Close()
	lo, err := h.LinkByName("lo")
	check(t, err)
	check(t, h.LinkSetUp(lo))
	c := Config{NS: ns, Address: netip.MustParseAddr("127.0.0.1"), Domain: "cluster.local."}
	for range 3 { // as kubestack restarts
		s, err := Serve(context.Background(), c)
		check(t, err)
		s.Update(view())
		if _, err := Serve(context.Background(), c); err == nil {
			t.Error("served twice")
		}
		for _, network := range []string{"udp", "tcp"} {
			conn, err := ns.DialContext(context.Background(), network, "127.0.0.1:53")
			check(t, err)
			d := &dns.Conn{Conn: conn}
			check(t, d.WriteMsg(new(dns.Msg).SetQuestion("web.blue.svc.cluster.local.", dns.TypeA)))
			if r, err := d.ReadMsg(); err != nil || len(r.Answer) != 1 {
				t.Errorf("%v %v", r, err)
			}
			defer conn.Close() // after the restart
		}
		check(t, s.Close())
		check(t, s.Close())
	}
}

func newServerOrServe(c Config) (*Server, error) {
	if c.Domain == "" {
		return newServer(c)
	}
	return Serve(context.Background(), c)
}

func TestReserveOnTheSamePort(t *testing.T) {
	s, at := resolver(t, nil)
	c, err := net.Dial("tcp", at)
	check(t, err)
	defer c.Close()
	check(t, s.Close())
	l, err := net.Listen("tcp", at)
	check(t, err)
	p, err := net.ListenPacket("udp", at)
	check(t, err)
	n, err := newServer(Config{Domain: "cluster.local"})
	check(t, err)
	n.Update(view())
	n.serve(p.(*net.UDPConn), l)
	if r := ask(t, at, "web.blue.svc.cluster.local", dns.TypeA); len(r.Answer) != 1 {
		t.Error(r)
	}
	check(t, n.Close())
}

// FuzzHandle feeds anything to the handler: it must not panic, nor let a name of the
// cluster out.
func FuzzHandle(f *testing.F) {
	s, err := newServer(Config{
		Address: netip.MustParseAddr("10.96.0.10"), Domain: "cluster.local", Upstreams: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:1")},
		UpstreamDial: func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("no") },
	})
	check(f, err)
	s.Update(view())
	for _, name := range []string{"web.blue.svc.cluster.local.", "_http._tcp.db.blue.svc.cluster.local.", "ext.blue.svc.cluster.local.", "1.1.96.10.in-addr.arpa.", "1.0.ip6.arpa.", "fd00--1.blue.pod.cluster.local.", `a\.b.cluster.local.`, "."} {
		for _, t := range []uint16{dns.TypeA, dns.TypeSRV, dns.TypePTR, dns.TypeSOA, dns.TypeAXFR} {
			b, err := new(dns.Msg).SetQuestion(name, t).SetEdns0(4096, true).Pack()
			check(f, err)
			f.Add(b, false)
			f.Add(b, true)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte, tcp bool) {
		q, out := s.begin(b, tcp)
		if q != nil {
			if strings.HasSuffix(q.key.name, "cluster.local.") || strings.HasSuffix(q.key.name, ".168.192.in-addr.arpa.") {
				t.Errorf("%q goes upstream", q.key.name)
			}
			if out != nil {
				t.Error("answered twice")
			}
			out = s.finish(context.Background(), q)
		}
		if out == nil {
			return
		}
		if !tcp && len(out) > maxUDP {
			t.Errorf("%d bytes", len(out))
		}
		if err := new(dns.Msg).Unpack(out); err != nil {
			t.Errorf("cannot be read: %v", err)
		}
	})
}

// FuzzUpstream has an upstream say anything.
func FuzzUpstream(f *testing.F) {
	s, err := newServer(Config{Domain: "cluster.local"})
	check(f, err)
	m := new(dns.Msg).SetQuestion("www.example.com.", dns.TypeA)
	m.Id = 7
	r := new(dns.Msg).SetReply(m)
	rr, _ := dns.NewRR("www.example.com. 60 IN A 203.0.113.1")
	r.Answer = []dns.RR{rr}
	b, err := r.Pack()
	check(f, err)
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		res := parse(m, b)
		if res == nil {
			return
		}
		lifetime(res)
		for _, tcp := range []bool{true, false} {
			if out := s.compose(&question{client: m, tcp: tcp}, aged(res, 5)); !tcp && len(out) > 512 {
				t.Errorf("%d bytes", len(out))
			}
		}
	})
}
