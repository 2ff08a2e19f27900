package status

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Handler is what the socket serves.
type Handler struct {
	// Status returns the node's state now.
	Status func() Node
	// Down stops the node, telling report about it, and returns its last event.
	Down func(ctx context.Context, keepPods bool, report func(Event)) Event
}

// Serve answers on the unix socket at path (mode 0600) until ctx ends.
func Serve(ctx context.Context, path string, h Handler) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(h.Status())
	})
	mux.HandleFunc("POST /v1/down", func(w http.ResponseWriter, r *http.Request) {
		enc, flush := json.NewEncoder(w), http.NewResponseController(w)
		report := func(e Event) {
			_ = enc.Encode(e) // a client that went away does not stop the stop
			_ = flush.Flush()
		}
		report(h.Down(context.WithoutCancel(r.Context()), r.URL.Query().Get("keepPods") == "true", report))
	})
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	stop := context.AfterFunc(ctx, func() {
		// Let the answer to /v1/down be written.
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_ = srv.Shutdown(grace)
	})
	defer stop()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// Client talks to a node's daemon.
type Client struct{ http http.Client }

// NewClient returns a client of the socket at path.
func NewClient(path string) *Client {
	return &Client{http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		},
		DisableKeepAlives: true,
	}}}
}

// Status asks for the node's state; errdefs.ErrUnavailable means that no daemon runs.
func (c *Client) Status(ctx context.Context) (Node, error) {
	var n Node
	resp, err := c.do(ctx, http.MethodGet, "/v1/status")
	if err != nil {
		return n, err
	}
	defer resp.Body.Close()
	return n, gone(json.NewDecoder(resp.Body).Decode(&n))
}

// Down asks the daemon to stop the node and passes its progress on. It returns the
// last event.
func (c *Client) Down(ctx context.Context, keepPods bool, report func(Event)) (Event, error) {
	resp, err := c.do(ctx, http.MethodPost, fmt.Sprintf("/v1/down?keepPods=%t", keepPods))
	if err != nil {
		return Event{}, err
	}
	defer resp.Body.Close()
	return ReadEvents(resp.Body, report)
}

func (c *Client) do(ctx context.Context, method, path string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://h8s"+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	return resp, gone(err)
}

// gone turns the errors of talking to a daemon that is not there, or died while it
// answered, into errdefs.ErrUnavailable.
func gone(err error) error {
	for _, sign := range []error{unix.ECONNREFUSED, unix.ENOENT, unix.ECONNRESET, unix.EPIPE, io.EOF, io.ErrUnexpectedEOF} {
		if errors.Is(err, sign) {
			return fmt.Errorf("the node's daemon is not running: %w", errdefs.ErrUnavailable)
		}
	}
	return err
}

// ReadEvents reads a stream of events up to the Done or Fail that ends it.
func ReadEvents(r io.Reader, report func(Event)) (Event, error) {
	dec := json.NewDecoder(r)
	for {
		var e Event
		if err := dec.Decode(&e); err != nil {
			return Event{}, fmt.Errorf("the daemon ended without a word: %w", errors.Join(err, errdefs.ErrUnavailable))
		}
		if e.Kind == Done || e.Kind == Fail {
			return e, nil
		}
		report(e)
	}
}
