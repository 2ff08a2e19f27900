// Package prober asks the node daemon for probes and hooks that the guest has no part in:
// those of Pods whose addresses the host must not dial.
//
// It owns the connection, which lives as long as a question, and the distrust of answers.
// It must not know what a probe is.
package prober

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/status"

	api "github.com/hypernetes/hypernetes/api/probe/v1"
)

// Prober finds the node daemon at a socket.
type Prober struct{ Socket string }

// dialTimeout bounds the connection; the daemon is on this machine.
const dialTimeout = 5 * time.Second

// Dial connects to the node daemon.
//
// Errors: errdefs.ErrUnavailable if it is not there.
func (p Prober) Dial(ctx context.Context) (net.Conn, error) {
	conn, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, "unix", p.Socket)
	if err != nil {
		return nil, fmt.Errorf("network probe: the node daemon (kubestack) does not answer: %w: %w; remedy: see its log on this node", err, errdefs.ErrUnavailable)
	}
	return conn, nil
}

// Ask puts one question over conn and closes it; the daemon stops working on it when ctx
// ends. The answer is as an exec probe's: exit code 0 or 1, and at most api.MaxOutput
// bytes of output.
func Ask(ctx context.Context, conn net.Conn, r *api.ProbeRequest) (code uint32, output string) {
	c := ttrpc.NewClient(conn)
	defer c.Close()
	res, err := api.NewProberClient(c).Probe(ctx, r)
	if err != nil {
		return 1, clip("network probe: " + text(err))
	}
	if res.ExitCode != 0 {
		code = 1
	}
	return code, clip(res.Output)
}

// text is what the daemon has said, without the trappings of the protocol.
func text(err error) string {
	if errors.Is(err, ttrpc.ErrClosed) {
		return "the node daemon (kubestack) has ended meanwhile"
	}
	if st, ok := status.FromError(err); ok {
		return st.Message()
	}
	return err.Error()
}

func clip(s string) string {
	if len(s) > api.MaxOutput {
		s = strings.ToValidUTF8(s[:api.MaxOutput], "")
	}
	return s
}
