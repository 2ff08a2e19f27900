package hyperctl

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
)

// The remote command protocol, version 4: one stream each for errors and
// standard streams, and one for window sizes; the error stream ends with a
// status that has the exit code.
const (
	streamProtocol = "v4.channel.k8s.io"
	streamTimeout  = 30 * time.Second
	maxStatus      = 1 << 20
)

// streamOptions are what to connect; nil streams stay unconnected. With tty
// the process has only one output stream.
type streamOptions struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	tty            bool
	resize         <-chan windowSize
	// holdInput keeps the end of stdin to ourselves: to a process that others may attach
	// to as well, the runtime takes it for our leaving, output and all.
	holdInput bool
}

// exec runs a command in a container. A process that ran and failed is an
// *ExitError.
func (h *hyper) exec(ctx context.Context, id string, argv []string, o streamOptions) error {
	resp, err := h.pods.Exec(ctx, &cri.ExecRequest{
		ContainerId: id, Cmd: argv, Tty: o.tty,
		Stdin: o.stdin != nil, Stdout: o.stdout != nil, Stderr: o.stderr != nil && !o.tty,
	})
	if err != nil {
		return h.explain("exec", err)
	}
	return h.stream(ctx, resp.Url, o)
}

// attach connects to a container's first process.
func (h *hyper) attach(ctx context.Context, id string, o streamOptions) error {
	resp, err := h.pods.Attach(ctx, &cri.AttachRequest{
		ContainerId: id, Tty: o.tty,
		Stdin: o.stdin != nil, Stdout: o.stdout != nil, Stderr: o.stderr != nil && !o.tty,
	})
	if err != nil {
		return h.explain("attach", err)
	}
	return h.stream(ctx, resp.Url, o)
}

func (h *hyper) stream(ctx context.Context, address string, o streamOptions) error {
	conn, err := h.upgrade(ctx, address)
	if err != nil {
		return err
	}
	defer conn.Close()
	stopWatch := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stopWatch()
	s, err := openStreams(conn, o)
	if err != nil {
		return fmt.Errorf("stream: %w", err)
	}
	return s.copy(ctx, o)
}

// upgrade turns an HTTP request for the URL the runtime gave into a SPDY
// connection.
func (h *hyper) upgrade(ctx context.Context, address string) (httpstream.Connection, error) {
	u, err := url.Parse(address)
	if err != nil || u.Scheme != "http" {
		return nil, fmt.Errorf("the runtime's streaming address %q is not an http URL: %w", address, errdefs.ErrUnavailable)
	}
	conn, err := h.dialNode(ctx, u.Host)
	if err != nil {
		return nil, fmt.Errorf("streaming server of the runtime: %w", err)
	}
	fail := func(err error) (httpstream.Connection, error) { return nil, errors.Join(err, conn.Close()) }
	if err := conn.SetDeadline(time.Now().Add(streamTimeout)); err != nil {
		return fail(err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, address, nil)
	if err != nil {
		return fail(err)
	}
	req.Header.Set(httpstream.HeaderConnection, httpstream.HeaderUpgrade)
	req.Header.Set(httpstream.HeaderUpgrade, spdy.HeaderSpdy31)
	req.Header.Set(httpstream.HeaderProtocolVersion, streamProtocol)
	if err := req.Write(conn); err != nil {
		return fail(fmt.Errorf("streaming server of the runtime: %w", err))
	}
	r := bufio.NewReader(conn)
	resp, err := http.ReadResponse(r, req)
	if err != nil {
		return fail(fmt.Errorf("streaming server of the runtime: %w", err))
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
		return fail(fmt.Errorf("streaming server of the runtime: %s: %s", resp.Status, strings.TrimSpace(string(text))))
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return fail(err)
	}
	return spdy.NewClientConnection(&bufferedConn{Conn: conn, r: r})
}

// bufferedConn reads what was read ahead of the upgrade first.
type bufferedConn struct {
	net.Conn
	r *bufio.Reader
}

func (c *bufferedConn) Read(p []byte) (int, error) { return c.r.Read(p) }

// streams are the channels of one command; nil when not connected.
type streams struct {
	status, stdin, stdout, stderr, resize httpstream.Stream
}

func openStreams(conn httpstream.Connection, o streamOptions) (*streams, error) {
	var s streams
	for _, c := range []struct {
		kind string
		want bool
		to   *httpstream.Stream
	}{
		{"error", true, &s.status},
		{"stdin", o.stdin != nil, &s.stdin},
		{"stdout", o.stdout != nil, &s.stdout},
		{"stderr", o.stderr != nil && !o.tty, &s.stderr},
		{"resize", o.tty, &s.resize},
	} {
		if !c.want {
			continue
		}
		header := http.Header{}
		header.Set("streamType", c.kind)
		stream, err := conn.CreateStream(header)
		if err != nil {
			return nil, fmt.Errorf("open %s: %w", c.kind, err)
		}
		*c.to = stream
	}
	return &s, nil
}

// copy moves bytes until the process's output and status have ended. The
// goroutine that reads standard input may outlive the call: a read from a
// terminal cannot be taken back.
func (s *streams) copy(ctx context.Context, o streamOptions) error {
	inputEnd := make(chan error, 1)
	if s.stdin != nil {
		go func() {
			_, err := io.Copy(s.stdin, o.stdin)
			if !o.holdInput {
				_ = s.stdin.Close()
			}
			inputEnd <- err
		}()
	}
	done := make(chan struct{})
	var resizing sync.WaitGroup
	if s.resize != nil {
		resizing.Go(func() { s.sendSizes(o.resize, done) })
	}
	var output sync.WaitGroup
	for _, c := range []struct {
		from httpstream.Stream
		to   io.Writer
	}{{s.stdout, o.stdout}, {s.stderr, o.stderr}} {
		if c.from != nil {
			output.Go(func() {
				_, _ = io.Copy(c.to, c.from)
				_, _ = io.Copy(io.Discard, c.from) // a full stream would block the others
			})
		}
	}
	result := make(chan error, 1)
	go func() {
		output.Wait()
		text, err := io.ReadAll(io.LimitReader(s.status, maxStatus))
		if err != nil {
			result <- fmt.Errorf("stream: %w", err)
			return
		}
		result <- decodeStatus(text)
	}()
	defer resizing.Wait()
	defer close(done)
	for {
		select {
		case err := <-inputEnd:
			if errors.Is(err, errDetached) {
				return errDetached
			}
			inputEnd = nil
		case err := <-result:
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (s *streams) sendSizes(sizes <-chan windowSize, done <-chan struct{}) {
	enc := json.NewEncoder(s.resize)
	for {
		select {
		case size := <-sizes:
			if enc.Encode(size) != nil {
				return
			}
		case <-done:
			return
		}
	}
}

// decodeStatus reads what the error stream ended with: nothing or a success,
// a process's exit code, or a message.
func decodeStatus(text []byte) error {
	if len(text) == 0 {
		return nil
	}
	var st struct {
		Status, Message, Reason string
		Details                 struct {
			Causes []struct{ Reason, Message string }
		}
	}
	if err := json.Unmarshal(text, &st); err != nil {
		return fmt.Errorf("stream: %s", strings.TrimSpace(string(text)))
	}
	if st.Status == "Success" {
		return nil
	}
	if st.Reason == "NonZeroExitCode" {
		for _, c := range st.Details.Causes {
			if c.Reason != "ExitCode" {
				continue
			}
			code, err := strconv.ParseUint(c.Message, 10, 8)
			if err != nil {
				return fmt.Errorf("stream: exit code %q is not a number of 0 to 255", c.Message)
			}
			return &ExitError{Code: int(code)}
		}
	}
	return notStarted(errors.New(wrapping.ReplaceAllString(st.Message, "")))
}

// wrapping is what layers of the runtime put before the reason why a program did not start.
var wrapping = regexp.MustCompile(`^.*start (exec|process) "[0-9a-f]{64}": `)
