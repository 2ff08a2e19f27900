package gateway

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

// echoUpper answers all it is sent, in upper case, once the client has ended.
func echoUpper(t *testing.T) string {
	l := listen(t)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				b, err := io.ReadAll(c)
				if err == nil {
					_, _ = c.Write([]byte(strings.ToUpper(string(b))))
				}
			}()
		}
	}()
	return l.Addr().String()
}

func TestForwardPassesHalfClose(t *testing.T) {
	g := New(t.Context())
	defer g.Close()
	l := listen(t)
	g.Forward(l, (&net.Dialer{}).DialContext, echoUpper(t))
	c, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); err != nil || string(b) != "HELLO" {
		t.Errorf("%q %v", b, err)
	}
}

func TestForwardToNobody(t *testing.T) {
	g := New(t.Context())
	defer g.Close()
	l := listen(t)
	g.Forward(l, func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("gone") }, "x")
	c, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if b, err := io.ReadAll(c); len(b) > 0 || (err != nil && !errors.Is(err, unix.ECONNRESET)) {
		t.Errorf("%q %v", b, err)
	}
}

func TestCloseEndsConnections(t *testing.T) {
	g := New(t.Context())
	l := listen(t)
	g.Forward(l, (&net.Dialer{}).DialContext, echoUpper(t))
	c, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	done := make(chan struct{})
	go func() { g.Close(); close(done) }()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Fatal("Close waits for a connection that does not end by itself")
	}
}

func TestListenLoopbackNamesOwner(t *testing.T) {
	l := listen(t)
	port := l.Addr().(*net.TCPAddr).Port
	_, err := ListenLoopback(port)
	var used *PortInUseError
	if !errors.As(err, &used) || !errors.Is(err, unix.EADDRINUSE) {
		t.Fatalf("error %v", err)
	}
	if want := fmt.Sprintf("(pid %d)", os.Getpid()); !strings.Contains(err.Error(), want) || used.Port != port {
		t.Errorf("%q does not name %s", err, want)
	}
}

func TestListeningInode(t *testing.T) {
	const table = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1
   1: 0100007F:0016 0100007F:1F90 01 00000000:00000000 00:00000000 00000000     0        0 4712 1
short`
	if got := listeningInode(strings.NewReader(table), 8080); got != "4711" {
		t.Errorf("8080: %q", got)
	}
	if got := listeningInode(strings.NewReader(table), 22); got != "" {
		t.Errorf("22 only has a connection: %q", got)
	}
}

func proxyOf(t *testing.T) (*url.URL, *Gateway) {
	t.Helper()
	g := New(t.Context())
	t.Cleanup(g.Close)
	l := listen(t)
	g.Proxy(l)
	return &url.URL{Scheme: "http", Host: l.Addr().String()}, g
}

func TestProxy(t *testing.T) {
	t.Setenv("HTTPS_PROXY", "")
	t.Setenv("HTTP_PROXY", "")
	hello := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello") })
	plain, secure := httptest.NewServer(hello), httptest.NewTLSServer(hello)
	defer plain.Close()
	defer secure.Close()
	guard := outward.Control
	outward.Control = nil // the servers of this test are on loopback
	defer func() { outward.Control = guard }()
	p, g := proxyOf(t)
	defer g.Close() // before the guard is back
	for _, srv := range []*httptest.Server{plain, secure} {
		client := srv.Client()
		client.Transport.(*http.Transport).Proxy = http.ProxyURL(p)
		resp, err := client.Get(srv.URL)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if err != nil || string(b) != "hello" {
			t.Errorf("%s: %q %v", srv.URL, b, err)
		}
	}
}

func TestProxyRefusesTheMachineItself(t *testing.T) {
	t.Setenv("HTTPS_PROXY", "")
	t.Setenv("HTTP_PROXY", "")
	l := listen(t)
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	for _, host := range []string{"127.0.0.1", "localhost", "Registry.LocalHost.", "0.0.0.0", "::1", "::ffff:127.0.0.1", "169.254.169.254", "fe80::1%lo"} {
		address := net.JoinHostPort(host, port)
		if _, err := dialOut(t.Context(), address); !errors.Is(err, errdefs.ErrPermissionDenied) {
			t.Errorf("CONNECT %s: %v", address, err)
		}
		if _, err := dialTransport(t.Context(), "tcp", address); !errors.Is(err, errdefs.ErrPermissionDenied) {
			t.Errorf("GET http://%s: %v", address, err)
		}
	}
}

func TestProxyRefuses(t *testing.T) {
	p, _ := proxyOf(t)
	for request, want := range map[string]string{
		"GET / HTTP/1.1\r\nHost: x\r\n\r\n":                             "400",
		"CONNECT 127.0.0.1:1 HTTP/1.1\r\nHost: 127.0.0.1:1\r\n\r\n":     "502",
		"GET http://127.0.0.1:1/ HTTP/1.1\r\nHost: 127.0.0.1:1\r\n\r\n": "502",
	} {
		c, err := net.Dial("tcp4", p.Host)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(c, request); err != nil {
			t.Fatal(err)
		}
		line, err := bufio.NewReader(c).ReadString('\n')
		_ = c.Close()
		if err != nil || !strings.Contains(line, want) {
			t.Errorf("%q: %q %v", request, line, err)
		}
	}
}
