package agent

import (
	"context"
	"net"
	"strings"
	"time"
	"unicode"

	"github.com/containerd/ttrpc"
)

// writeLimit is how long a guest may leave a request unread, before it is taken for
// gone. A VM under software emulation on a busy node may stand still for long.
const writeLimit = 2 * time.Minute

// impatient is a stream whose reader must go on reading: ttrpc sends one request after
// the other and waits in that for as long as it takes, whatever the callers' contexts.
type impatient struct{ net.Conn }

// Write implements net.Conn.
func (c *impatient) Write(p []byte) (int, error) {
	if err := c.SetWriteDeadline(time.Now().Add(writeLimit)); err != nil {
		return 0, err
	}
	return c.Conn.Write(p)
}

// callLimit bounds every call, whatever its context: nothing a guest does takes longer.
const callLimit = 5 * time.Minute

// abandon has a call end with its context also while the request before it is being
// sent to a guest that does not read.
func abandon(ctx context.Context, q *ttrpc.Request, r *ttrpc.Response, _ *ttrpc.UnaryClientInfo, invoke ttrpc.Invoker) error {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	// What arrives late must not be written where the caller reads.
	answer := &ttrpc.Response{}
	done := make(chan error, 1)
	go func() { done <- invoke(ctx, q, answer) }() // ends at the latest writeLimit later
	select {
	case err := <-done:
		r.Status, r.Payload = answer.Status, answer.Payload
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// maxText bounds a guest's error text, in bytes: it goes to logs, users and Pod events.
const maxText = 2 << 10

// clip is a guest's text, bounded and printable.
func clip(s string) string {
	if len(s) > maxText {
		s = s[:maxText/2] + " ... " + s[len(s)-maxText/2:]
	}
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) && r != '\n' {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
}
