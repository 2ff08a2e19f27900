package probe

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"

	corev1 "k8s.io/api/core/v1"

	api "github.com/hypernetes/hypernetes/api/probe/v1"
)

var _ Dialer = (*net.Dialer)(nil)

var loopback = netip.MustParseAddr("127.0.0.1")

func (s scenario) request() Request {
	switch s.kind {
	case "tcp":
		return Request{TCP: &TCP{Port: uint16(s.port)}, TimeoutSeconds: 1}
	case "grpc":
		return Request{GRPC: &GRPC{Port: uint16(s.port), Service: s.service}, TimeoutSeconds: 1}
	}
	h := &HTTP{Scheme: s.scheme, Port: uint16(s.port), Path: s.path}
	for _, p := range s.headers {
		h.Headers = append(h.Headers, corev1.HTTPHeader{Name: p[0], Value: p[1]})
	}
	if s.kind == "hook" {
		return Request{HTTP: h, Hook: true}
	}
	return Request{HTTP: h, TimeoutSeconds: 1}
}

// TestRunAsUpstream compares with what upstream's packages said (testdata/record).
func TestRunAsUpstream(t *testing.T) {
	b, err := os.ReadFile("testdata/upstream.json")
	if err != nil {
		t.Fatal(err)
	}
	var upstream map[string]struct{ Result, Output string }
	if err := json.Unmarshal(b, &upstream); err != nil {
		t.Fatal(err)
	}
	all, stop := scenarios()
	t.Run("all", func(t *testing.T) {
		for _, s := range all {
			t.Run(s.name, func(t *testing.T) {
				t.Parallel()
				want, ok := upstream[s.name]
				if !ok {
					t.Fatal("not recorded; run testdata/record/record.sh")
				}
				code, output := Run(context.Background(), &net.Dialer{}, loopback, s.request())
				if passes := want.Result == "success" || want.Result == "warning"; passes != (code == 0) {
					t.Errorf("code %d, upstream %s", code, want.Result)
				}
				if got := mark(output, s.port); late(s, got) != late(s, want.Output) {
					t.Errorf("\n got %.300q\nwant %.300q", got, want.Output)
				}
			})
		}
	})
	stop()
	if len(upstream) != len(all) {
		t.Errorf("%d scenarios, %d recorded", len(all), len(upstream))
	}
}

var lateTail = regexp.MustCompile(`(net/http: request canceled( while waiting for connection)?|context deadline exceeded)( \(Client\.Timeout[^)]*\))?$`)

// late makes the ends of HTTPS time-outs equal: upstream's differ from one recording to
// the next, by which of its timers is first.
func late(s scenario, text string) string {
	if s.scheme == "HTTPS" {
		return lateTail.ReplaceAllString(text, "TIMEOUT")
	}
	return text
}

func TestRunGoesToThePodOnly(t *testing.T) {
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("dialled") }))
	defer other.Close()
	otherPort := other.Listener.Addr().(*net.TCPAddr).Port
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, fmt.Sprintf("http://localhost:%d/", otherPort), http.StatusFound)
	}))
	defer s.Close()
	p := uint16(s.Listener.Addr().(*net.TCPAddr).Port)
	for _, r := range []Request{{HTTP: &HTTP{Port: p}, TimeoutSeconds: 1}, {HTTP: &HTTP{Port: p}, Hook: true}} {
		if code, out := Run(context.Background(), &net.Dialer{}, loopback, r); code != 0 {
			t.Errorf("%d %q", code, out)
		}
	}
	x := &execution{dialer: &net.Dialer{}, pod: loopback}
	if _, err := x.dial(context.Background(), "tcp", fmt.Sprintf("127.0.0.2:%d", otherPort)); err == nil {
		t.Error("dialled another address")
	}
}

func TestRunEndsWithItsContext(t *testing.T) {
	l := listen()
	defer l.Close()
	for name, r := range map[string]Request{
		"http": {HTTP: &HTTP{Port: uint16(port(l))}, TimeoutSeconds: 3600},
		"grpc": {GRPC: &GRPC{Port: uint16(port(l))}, TimeoutSeconds: 3600},
		"hook": {HTTP: &HTTP{Port: uint16(port(l))}, Hook: true},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(context.Background())
			go func() {
				c, err := l.Accept()
				cancel()
				if err == nil {
					t.Cleanup(func() { _ = c.Close() })
				}
			}()
			if code, out := Run(ctx, &net.Dialer{}, loopback, r); code != 1 || !strings.Contains(out, "cancel") {
				t.Errorf("%d %q", code, out)
			}
		})
	}
}

func TestRunHostile(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/binary":
			_, _ = w.Write([]byte(strings.Repeat("a\xff\xfe€", 4000)))
		case "/header":
			for range 300 {
				w.Header().Add("X", strings.Repeat("x", 1<<10))
			}
		}
	}))
	defer s.Close()
	p := uint16(s.Listener.Addr().(*net.TCPAddr).Port)
	for path, code := range map[string]int32{"/binary": 0, "/header": 1} {
		got, out := Run(context.Background(), &net.Dialer{}, loopback, Request{HTTP: &HTTP{Port: p, Path: path}, TimeoutSeconds: 5})
		if got != code || !utf8.ValidString(out) || len(out) > api.MaxOutput {
			t.Errorf("%s: %d, %d bytes, %.100q", path, got, len(out), out)
		}
	}
	for _, r := range []Request{{}, {TCP: &TCP{}}, {TCP: &TCP{Port: 1}, GRPC: &GRPC{Port: 1}}, {GRPC: &GRPC{Port: 1}, Hook: true}} {
		if code, out := Run(context.Background(), &net.Dialer{}, loopback, r); code != 1 || out == "" {
			t.Errorf("%+v: %d %q", r, code, out)
		}
	}
	if code, out := Run(context.Background(), &net.Dialer{}, loopback, Request{TCP: &TCP{Port: p}, Hook: true}); code != 1 || !strings.Contains(out, "invalid handler") {
		t.Errorf("tcp hook: %d %q", code, out)
	}
}
