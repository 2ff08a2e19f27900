package channel

import (
	"encoding/binary"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
)

// The part of yamux's framing that a guest's frames are held against: a header of
// version, type, flags, stream and length, and for data as many bytes as length says.
const (
	frameHeader = 12

	frameData   = 0
	frameWindow = 1
	framePing   = 2
	frameGoAway = 3

	flagSYN = 1
)

// checked reads a guest's frames and fails at the first a guest has no business to send.
// yamux answers every ping in a goroutine of its own and keeps every stream its peer
// opens with what is sent on it: to a hostile guest both are memory of the host.
type checked struct {
	io.ReadWriteCloser
	header [frameHeader]byte
	have   int    // bytes of header read so far
	body   uint32 // bytes of data still to come
	err    error
}

// Read implements io.Reader.
func (c *checked) Read(p []byte) (int, error) {
	if c.err != nil {
		return 0, c.err
	}
	n, err := c.ReadWriteCloser.Read(p)
	if c.err = c.scan(p[:n]); c.err != nil {
		return 0, c.err
	}
	return n, err
}

func (c *checked) scan(b []byte) error {
	for len(b) > 0 {
		if c.body > 0 {
			skip := min(uint32(len(b)), c.body)
			b, c.body = b[skip:], c.body-skip
			continue
		}
		n := copy(c.header[c.have:], b)
		b, c.have = b[n:], c.have+n
		if c.have < frameHeader {
			return nil
		}
		c.have = 0
		if err := c.frame(); err != nil {
			return err
		}
	}
	return nil
}

func (c *checked) frame() error {
	kind, flags := c.header[1], binary.BigEndian.Uint16(c.header[2:])
	length := binary.BigEndian.Uint32(c.header[8:])
	switch {
	case kind == framePing:
		return fmt.Errorf("guest pings: %w", errdefs.ErrInvalidArgument)
	case flags&flagSYN != 0:
		return fmt.Errorf("guest opens a stream: %w", errdefs.ErrInvalidArgument)
	case kind == frameData && length > window:
		return fmt.Errorf("guest sends a frame of %d bytes, at most %d have room: %w", length, window, errdefs.ErrInvalidArgument)
	case kind == frameData:
		c.body = length
	case kind != frameWindow && kind != frameGoAway:
		return fmt.Errorf("guest sends a frame of unknown type %d: %w", kind, errdefs.ErrInvalidArgument)
	}
	return nil
}
