// Package channel is the byte channel between the shim and hyperstart: one
// virtio-serial port or vsock connection carrying many streams, each with its own
// credit (yamux: 256 KiB a stream), so a slow reader stops its writer and nobody else.
//
// It owns framing and limits. It must not know what the streams mean: that is
// hyperstart.v1.StreamHeader, which both ends exchange at the head of a stream.
// The host opens every stream, the guest only accepts, so a hostile guest can
// neither start a conversation nor make the host allocate beyond the windows.
package channel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"
	"unicode"

	"github.com/hashicorp/yamux"
	"google.golang.org/protobuf/proto"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
)

const (
	// PortName is the name of the virtio-serial port (/sys/class/virtio-ports/*/name).
	PortName = "io.hypernetes.hyperstart"
	// VsockPort is the host port a guest with vsock connects to (CID 2).
	VsockPort = 1024
	// MaxHeader bounds a stream header or reply on the wire, in bytes.
	MaxHeader = 4096
	// window is each stream's receive window: yamux's least, and its default.
	window = 256 << 10
	// writeTimeout is how long one frame may wait for the other side's queue. A VM
	// under software emulation on a busy node may stand still for seconds.
	writeTimeout = 2 * time.Minute
)

func config() *yamux.Config {
	c := yamux.DefaultConfig()
	c.AcceptBacklog = 256
	// Liveness is the shim's Ping with its own deadline, not yamux's keepalive, which
	// would take a stopped VM (a debugger, a template) for a dead one.
	c.EnableKeepAlive = false
	c.ConnectionWriteTimeout = writeTimeout
	c.MaxStreamWindowSize = window
	// A stream whose other end never answers its open or close is dropped by these.
	c.StreamOpenTimeout = 0
	c.StreamCloseTimeout = 5 * time.Minute
	c.LogOutput = io.Discard
	return c
}

// Host is the shim's end. It may be used from several goroutines.
type Host struct{ session *yamux.Session }

// NewHost starts the multiplexer on conn and owns it from then on. It returns
// before the guest is up: what is written waits in the VMM until the guest reads. A
// guest that opens streams or pings has its channel closed.
func NewHost(conn io.ReadWriteCloser) (*Host, error) {
	s, err := yamux.Client(&checked{ReadWriteCloser: conn}, config())
	if err != nil {
		return nil, fmt.Errorf("open channel: %w", err)
	}
	return &Host{session: s}, nil
}

// Open opens a stream, sends header and waits for the guest's reply until ctx ends.
func (h *Host) Open(ctx context.Context, header *hyperstart.StreamHeader) (net.Conn, error) {
	conn, err := h.stream(ctx)
	if err != nil {
		return nil, fmt.Errorf("open stream: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	err = exchange(conn, header)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		_ = conn.Close()
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, err
	}
	return conn, nil
}

// stream opens a stream until ctx ends. yamux knows no context, and waits for a guest
// that does not read, or that has left too many streams unanswered.
func (h *Host) stream(ctx context.Context) (net.Conn, error) {
	type opened struct {
		conn net.Conn
		err  error
	}
	ch := make(chan opened)
	go func() { // ends at the latest writeTimeout later, or with the channel
		conn, err := h.session.OpenStream()
		select {
		case ch <- opened{conn, err}:
		case <-ctx.Done():
			if err == nil {
				_ = conn.Close()
			}
		}
	}()
	select {
	case o := <-ch:
		return o.conn, o.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func exchange(conn net.Conn, header *hyperstart.StreamHeader) error {
	if err := writeMessage(conn, header); err != nil {
		return fmt.Errorf("send stream header: %w", err)
	}
	var reply hyperstart.StreamReply
	if err := readMessage(conn, &reply); err != nil {
		return fmt.Errorf("read stream reply: %w", err)
	}
	if reply.Error != "" {
		return fmt.Errorf("guest refused stream: %s", printable(reply.Error))
	}
	return nil
}

// printable is a guest's text in one line: it goes to logs and users.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, s)
}

// Done is closed when the channel is gone.
func (h *Host) Done() <-chan struct{} { return h.session.CloseChan() }

// Close closes every stream and the connection below.
func (h *Host) Close() error { return h.session.Close() }

// Guest is hyperstart's end.
type Guest struct{ session *yamux.Session }

// NewGuest starts the multiplexer on conn and owns it from then on.
func NewGuest(conn io.ReadWriteCloser) (*Guest, error) {
	s, err := yamux.Server(conn, config())
	if err != nil {
		return nil, fmt.Errorf("open channel: %w", err)
	}
	return &Guest{session: s}, nil
}

// Accept waits for the next stream; the caller reads its header with ReadHeader.
// It returns io.EOF when the channel is gone.
func (g *Guest) Accept() (net.Conn, error) {
	c, err := g.session.AcceptStream()
	if errors.Is(err, yamux.ErrSessionShutdown) {
		return nil, io.EOF
	}
	return c, err
}

// Close closes every stream and the connection below.
func (g *Guest) Close() error { return g.session.Close() }

// ReadHeader reads the header of a stream just accepted. It must be answered with Reply.
func ReadHeader(conn net.Conn) (*hyperstart.StreamHeader, error) {
	var h hyperstart.StreamHeader
	if err := readMessage(conn, &h); err != nil {
		return nil, fmt.Errorf("read stream header: %w", err)
	}
	return &h, nil
}

// Reply answers a stream's header: with nil the stream is open, else the text of
// err is sent and the caller closes conn.
func Reply(conn net.Conn, err error) error {
	var r hyperstart.StreamReply
	if err != nil {
		r.Error = err.Error()
		if len(r.Error) > MaxHeader/2 {
			r.Error = r.Error[:MaxHeader/2]
		}
	}
	return writeMessage(conn, &r)
}

func writeMessage(w io.Writer, m proto.Message) error {
	b, err := proto.Marshal(m)
	if err != nil {
		return err
	}
	if len(b) > MaxHeader {
		return fmt.Errorf("message of %d bytes is over the limit of %d", len(b), MaxHeader)
	}
	out := binary.BigEndian.AppendUint32(make([]byte, 0, 4+len(b)), uint32(len(b)))
	_, err = w.Write(append(out, b...))
	return err
}

func readMessage(r io.Reader, m proto.Message) error {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > MaxHeader {
		return fmt.Errorf("message of %d bytes is over the limit of %d", n, MaxHeader)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return err
	}
	return proto.Unmarshal(b, m)
}
