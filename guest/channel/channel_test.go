package channel

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"testing"
	"testing/iotest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/hashicorp/yamux"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
)

func rpcHeader() *hyperstart.StreamHeader {
	return &hyperstart.StreamHeader{Kind: &hyperstart.StreamHeader_Rpc{Rpc: true}}
}

// pair returns both ends of a channel.
func pair(t *testing.T) (*Host, *Guest) {
	t.Helper()
	a, b := net.Pipe()
	g, err := NewGuest(b)
	if err != nil {
		t.Fatal(err)
	}
	h, err := NewHost(a)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = h.Close(); _ = g.Close() })
	return h, g
}

func TestStream(t *testing.T) {
	h, g := pair(t)
	const size = 3 * window
	go func() {
		c, err := g.Accept()
		if err != nil {
			return
		}
		if _, err := ReadHeader(c); err == nil && Reply(c, nil) == nil {
			_, _ = c.Write(make([]byte, size))
		}
		_ = c.Close()
	}()
	c, err := h.Open(t.Context(), rpcHeader())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if n, err := io.Copy(io.Discard, c); n != size || err != nil {
		t.Errorf("%d bytes, %v", n, err)
	}
}

func TestRefusedStream(t *testing.T) {
	h, g := pair(t)
	go func() {
		if c, err := g.Accept(); err == nil {
			_, _ = ReadHeader(c)
			_ = Reply(c, errors.New("no such\nprocess"))
		}
	}()
	_, err := h.Open(t.Context(), rpcHeader())
	if err == nil || bytes.ContainsRune([]byte(err.Error()), '\n') {
		t.Errorf("got %v, want the guest's refusal in one line", err)
	}
}

// TestOpenEndsWithContext: the guest reads nothing at all, so not even a stream's first
// frame gets through.
func TestOpenEndsWithContext(t *testing.T) {
	a, b := net.Pipe()
	defer b.Close()
	h, err := NewHost(a)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	began := time.Now()
	if _, err := h.Open(ctx, rpcHeader()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	if d := time.Since(began); d > 10*time.Second {
		t.Errorf("open took %v", d)
	}
}

func TestGuestMayNotStartConversations(t *testing.T) {
	for name, attack := range map[string]func(*yamux.Session){
		"open": func(s *yamux.Session) { _, _ = s.OpenStream() },
		"ping": func(s *yamux.Session) { _, _ = s.Ping() },
	} {
		t.Run(name, func(t *testing.T) {
			a, b := net.Pipe()
			s, err := yamux.Server(b, config())
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			h, err := NewHost(a)
			if err != nil {
				t.Fatal(err)
			}
			defer h.Close()
			go attack(s)
			select {
			case <-h.Done():
			case <-time.After(20 * time.Second):
				t.Error("the channel is still open")
			}
		})
	}
}

func frame(kind byte, flags uint16, length uint32) []byte {
	b := make([]byte, frameHeader)
	b[1] = kind
	binary.BigEndian.PutUint16(b[2:], flags)
	binary.BigEndian.PutUint32(b[8:], length)
	return b
}

type readOnly struct{ io.Reader }

func (readOnly) Write(p []byte) (int, error) { return len(p), nil }
func (readOnly) Close() error                { return nil }

func TestFrames(t *testing.T) {
	// What looks like a ping is data here.
	data := append(frame(frameData, 0, frameHeader), frame(framePing, flagSYN, 0)...)
	for name, tc := range map[string]struct {
		b  []byte
		ok bool
	}{
		"data":        {data, true},
		"window":      {append(frame(frameWindow, 2, window), data...), true},
		"go away":     {frame(frameGoAway, 0, 0), true},
		"ping":        {append(append([]byte{}, data...), frame(framePing, flagSYN, 0)...), false},
		"open":        {frame(frameWindow, flagSYN, 0), false},
		"open, data":  {frame(frameData, flagSYN|2, 0), false},
		"endless":     {frame(frameData, 0, window+1), false},
		"unknown":     {frame(9, 0, 0), false},
		"cut short":   {data[:15], true},
		"nothing yet": {nil, true},
	} {
		for _, r := range []io.Reader{bytes.NewReader(tc.b), iotest.OneByteReader(bytes.NewReader(tc.b))} {
			_, err := io.ReadAll(&checked{ReadWriteCloser: readOnly{r}})
			if (err == nil) != tc.ok || err != nil && !errdefs.IsInvalidArgument(err) {
				t.Errorf("%s: got %v, want ok %v", name, err, tc.ok)
			}
		}
	}
}

// FuzzFrames: however a guest's bytes arrive, the verdict is the same.
func FuzzFrames(f *testing.F) {
	f.Add(append(frame(frameData, 0, 3), 'a', 'b', 'c'))
	f.Add(frame(framePing, flagSYN, 0))
	f.Fuzz(func(t *testing.T, b []byte) {
		_, whole := io.ReadAll(&checked{ReadWriteCloser: readOnly{bytes.NewReader(b)}})
		_, bytewise := io.ReadAll(&checked{ReadWriteCloser: readOnly{iotest.OneByteReader(bytes.NewReader(b))}})
		if (whole == nil) != (bytewise == nil) {
			t.Errorf("at once: %v, by bytes: %v", whole, bytewise)
		}
	})
}

// FuzzReadMessage: a guest's reply never allocates beyond MaxHeader nor panics.
func FuzzReadMessage(f *testing.F) {
	f.Add([]byte{0, 0, 0, 0})
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 1})
	f.Fuzz(func(_ *testing.T, b []byte) {
		var r hyperstart.StreamReply
		_ = readMessage(bytes.NewReader(b), &r)
	})
}
