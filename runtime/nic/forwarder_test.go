package nic

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// guestLoopback stands for the guest: TCP servers in a second namespace.
func guestLoopback(t *testing.T) (*testNS, Dialer) {
	t.Helper()
	g := newNS(t)
	if err := loopbackUp(g.ns); err != nil {
		t.Fatal(err)
	}
	return g, func(_ context.Context, port uint16, ipv6 bool) (c net.Conn, err error) {
		err = inNS(g.ns, func() error {
			host := "127.0.0.1"
			if ipv6 {
				host = "::1"
			}
			c, err = net.DialTimeout("tcp", net.JoinHostPort(host, fmt.Sprint(port)), time.Second)
			return err
		})
		return c, err
	}
}

// serve answers each connection in n: it reads to the end of file, then sends back
// what it read and closes.
func serve(t *testing.T, n *testNS, network, addr string) {
	t.Helper()
	var l net.Listener
	n.do(t, func() (err error) { l, err = net.Listen(network, addr); return err })
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				b, _ := io.ReadAll(c)
				_, _ = c.Write(b)
			}()
		}
	}()
	t.Cleanup(func() { _ = l.Close(); <-done })
}

func dialIn(t *testing.T, n *testNS, network, addr string) *net.TCPConn {
	t.Helper()
	var c net.Conn
	n.do(t, func() (err error) { c, err = net.DialTimeout(network, addr, 30*time.Second); return err })
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
	return c.(*net.TCPConn)
}

func echo(t *testing.T, c *net.TCPConn, size int) {
	t.Helper()
	want := bytes.Repeat([]byte("0123456789abcdef"), size/16)
	go func() {
		_, _ = c.Write(want)
		_ = c.CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("echo of %d bytes: got %d, %v", len(want), len(got), err)
	}
}

// mustRefuse wants a reset, which may come as early as the answer to the connect.
func mustRefuse(t *testing.T, n *testNS, addr string) {
	t.Helper()
	n.do(t, func() error {
		c, err := net.DialTimeout("tcp4", addr, 30*time.Second)
		if err == nil {
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(30 * time.Second))
			_, err = io.ReadAll(c)
		}
		if !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("want a reset, got %v", err)
		}
		return nil
	})
}

func TestPortForward(t *testing.T) {
	guest, dial := guestLoopback(t)
	serve(t, guest, "tcp4", "127.0.0.1:80")
	serve(t, guest, "tcp6", "[::1]:81") // an application on IPv6 only
	pod := newNS(t)
	p, err := NewPortForwarder(t.Context(), pod.path, dial)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })

	t.Run("half close", func(t *testing.T) { echo(t, dialIn(t, pod, "tcp4", "127.0.0.1:80"), 1<<20) })
	t.Run("other loopback address", func(t *testing.T) { echo(t, dialIn(t, pod, "tcp4", "127.9.8.7:80"), 1<<10) })
	t.Run("ipv6", func(t *testing.T) { echo(t, dialIn(t, pod, "tcp6", "[::1]:81"), 1<<20) })
	t.Run("ipv4 client of an ipv6 server", func(t *testing.T) { echo(t, dialIn(t, pod, "tcp4", "127.0.0.1:81"), 1<<10) })
	t.Run("listener's own port", func(t *testing.T) {
		port := p.listeners[0].Addr().(*net.TCPAddr).Port
		serve(t, guest, "tcp4", fmt.Sprintf("127.0.0.1:%d", port))
		echo(t, dialIn(t, pod, "tcp4", fmt.Sprintf("127.0.0.1:%d", port)), 1<<10)
	})
	t.Run("refused", func(t *testing.T) {
		mustRefuse(t, pod, "127.0.0.1:9")
	})
	t.Run("many at once", func(t *testing.T) {
		conns := make([]*net.TCPConn, maxForwards+20)
		for i := range conns {
			conns[i] = dialIn(t, pod, "tcp4", "127.0.0.1:80")
		}
		for _, c := range conns {
			echo(t, c, 1<<10)
		}
	})
	t.Run("close ends connections", func(t *testing.T) {
		c := dialIn(t, pod, "tcp4", "127.0.0.1:80")
		_, _ = c.Write([]byte("x"))
		start := time.Now()
		if err := errors.Join(p.Close(), p.Close()); err != nil {
			t.Error(err)
		}
		if d := time.Since(start); d > 5*time.Second {
			t.Errorf("Close took %v", d)
		}
		if _, err := io.ReadAll(c); errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("connection outlived Close: %v", err)
		}
		// And nothing is redirected any more.
		pod.do(t, func() error {
			if c, err := net.Dial("tcp4", "127.0.0.1:80"); err == nil {
				_ = c.Close()
				t.Error("the redirection outlived Close")
			}
			return nil
		})
	})
}
