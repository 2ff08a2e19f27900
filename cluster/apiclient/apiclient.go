// Package apiclient owns the little h8s itself says to the API server: get, list,
// create, server-side apply, merge and delete. It speaks JSON over HTTP instead of importing
// client-go, which would cost every `h8s` command some 50 ms before its first line.
package apiclient

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// maxBody bounds an answer; lists of Pods of a busy node stay far below.
const maxBody = 64 << 20

// Config says where the server is and who we are.
type Config struct {
	Server        string // https://host:port
	CA, Cert, Key []byte // PEM
	// Token is sent instead of a client certificate if there is none.
	Token string
	// Dial reaches the server; net.Dialer's if nil.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// Client is safe for concurrent use.
type Client struct {
	server string
	token  string
	http   http.Client
}

// New checks the credentials and returns a client. It does not connect.
func New(c Config) (*Client, error) {
	var pairs []tls.Certificate
	if len(c.Cert) > 0 || c.Token == "" {
		pair, err := tls.X509KeyPair(c.Cert, c.Key)
		if err != nil {
			return nil, fmt.Errorf("client certificate: %w", err)
		}
		pairs = append(pairs, pair)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(c.CA) {
		return nil, fmt.Errorf("certificate authority: no PEM certificate: %w", errdefs.ErrInvalidArgument)
	}
	return &Client{server: c.Server, token: c.Token, http: http.Client{Transport: &http.Transport{
		DialContext:         c.Dial,
		TLSClientConfig:     &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots, Certificates: pairs},
		ForceAttemptHTTP2:   true,
		IdleConnTimeout:     30 * time.Second,
		TLSHandshakeTimeout: 5 * time.Second,
	}}}, nil
}

// Close drops idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// StatusError is an answer other than success.
type StatusError struct {
	Code    int
	Message string
}

func (e *StatusError) Error() string { return fmt.Sprintf("HTTP %d: %s", e.Code, e.Message) }

// Unwrap classes the answer.
func (e *StatusError) Unwrap() error {
	switch e.Code {
	case http.StatusNotFound:
		return errdefs.ErrNotFound
	case http.StatusBadRequest, http.StatusUnprocessableEntity:
		return errdefs.ErrInvalidArgument
	case http.StatusForbidden, http.StatusUnauthorized:
		return errdefs.ErrPermissionDenied
	case http.StatusConflict:
		return errdefs.ErrConflict
	case http.StatusInternalServerError:
		// What kube-apiserver says of a field that a custom resource does not have, or of
		// one of another type, when it is applied.
		if strings.HasPrefix(e.Message, "failed to create typed patch object") {
			return errdefs.ErrInvalidArgument
		}
	}
	return errdefs.ErrUnavailable
}

// Get reads path into out, which may be nil.
func (c *Client) Get(ctx context.Context, path string, out any) error {
	return c.do(ctx, http.MethodGet, path, "", nil, out)
}

// Create posts object to the collection at path and reads the answer into out, which may
// be nil.
func (c *Client) Create(ctx context.Context, path string, object, out any) error {
	return c.send(ctx, http.MethodPost, path, "application/json", object, out)
}

// Put replaces what is at path.
func (c *Client) Put(ctx context.Context, path string, object any) error {
	return c.send(ctx, http.MethodPut, path, "application/json", object, nil)
}

// Merge applies a JSON merge patch at path.
func (c *Client) Merge(ctx context.Context, path string, patch any) error {
	return c.send(ctx, http.MethodPatch, path, "application/merge-patch+json", patch, nil)
}

func (c *Client) send(ctx context.Context, method, path, contentType string, object, out any) error {
	b, err := json.Marshal(object)
	if err != nil {
		return err
	}
	return c.do(ctx, method, path, contentType, b, out)
}

// Delete deletes the object at path; one that is not there is no error.
func (c *Client) Delete(ctx context.Context, path string) error {
	err := c.do(ctx, http.MethodDelete, path, "", nil, nil)
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// Apply applies object server-side at path as owner manager.
func (c *Client) Apply(ctx context.Context, path, manager string, object any) error {
	b, err := json.Marshal(object)
	if err != nil {
		return err
	}
	return c.do(ctx, http.MethodPatch, path+"?fieldManager="+manager+"&force=true", "application/apply-patch+yaml", b, nil)
}

func (c *Client) do(ctx context.Context, method, path, contentType string, body []byte, out any) error {
	for attempt := 1; ; attempt++ {
		resp, b, err := c.once(ctx, method, path, contentType, body)
		if err != nil {
			return err
		}
		if resp.StatusCode == http.StatusTooManyRequests && attempt < attempts {
			// Nothing was done, and the server says when to come again: it is busy, or a CRD is new.
			if err := pause(ctx, resp.Header.Get("Retry-After")); err != nil {
				return err
			}
			continue
		}
		if resp.StatusCode/100 != 2 {
			return statusError(resp.StatusCode, b)
		}
		if out == nil {
			return nil
		}
		return json.Unmarshal(b, out)
	}
}

// attempts bounds how often one request is made.
const attempts = 10

// pause waits for as many seconds as a Retry-After says, at least 0.1 and at most 5.
func pause(ctx context.Context, after string) error {
	seconds, err := strconv.Atoi(after)
	if err != nil {
		seconds = 1
	}
	timer := time.NewTimer(min(max(time.Duration(seconds)*time.Second, 100*time.Millisecond), 5*time.Second))
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

// once makes a request and reads the answer.
func (c *Client) once(ctx context.Context, method, path, contentType string, body []byte) (*http.Response, []byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.server+path, bytes.NewReader(body))
	if err != nil {
		return nil, nil, err
	}
	req.Header.Set("Accept", "application/json")
	if c.token != "" {
		req.Header.Set("Authorization", "Bearer "+c.token)
	}
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	return resp, b, err
}

func statusError(code int, body []byte) error {
	var s struct {
		Message string `json:"message"`
	}
	if err := json.Unmarshal(body, &s); err != nil || s.Message == "" {
		s.Message = string(body[:min(len(body), 300)])
	}
	return &StatusError{code, s.Message}
}

// Answered reports whether err is an answer of the server, as against a failure to
// reach it.
func Answered(err error) bool {
	var s *StatusError
	return errors.As(err, &s)
}
