package nic

import (
	"context"
	"io"
	"net"
	"testing"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
	"github.com/hypernetes/hypernetes/guest/channel"
)

// halfCloser gives a stream of the guest channel, whose Close is a half-close, the
// method the forwarder looks for.
type halfCloser struct{ net.Conn }

func (h halfCloser) CloseWrite() error { return h.Conn.Close() }

// TestPortForwardOverChannel carries connections over the real guest channel.
func TestPortForwardOverChannel(t *testing.T) {
	a, b := net.Pipe()
	host, err := channel.NewHost(a)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = host.Close() })
	guest, err := channel.NewGuest(b)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = guest.Close() })
	go func() {
		for {
			c, err := guest.Accept()
			if err != nil {
				return
			}
			go answer(c)
		}
	}()
	pod := newNS(t)
	p, err := NewPortForwarder(t.Context(), pod.path, func(ctx context.Context, port uint16, ipv6 bool) (net.Conn, error) {
		c, err := host.Open(ctx, &hyperstart.StreamHeader{Kind: &hyperstart.StreamHeader_Dial{Dial: &hyperstart.Dial{Port: uint32(port), Ipv6: ipv6}}})
		if err != nil {
			return nil, err
		}
		return halfCloser{c}, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	for range 3 {
		echo(t, dialIn(t, pod, "tcp4", "127.0.0.1:8080"), 4<<20)
	}
	mustRefuse(t, pod, "127.0.0.1:9")
}

// answer is a guest whose port 8080 sends back what it read to the end of file.
func answer(c net.Conn) {
	defer c.Close()
	h, err := channel.ReadHeader(c)
	if err != nil {
		return
	}
	if h.GetDial().GetPort() != 8080 {
		_ = channel.Reply(c, io.ErrClosedPipe)
		return
	}
	if channel.Reply(c, nil) != nil {
		return
	}
	b, err := io.ReadAll(c)
	if err == nil {
		_, _ = c.Write(b)
	}
}
