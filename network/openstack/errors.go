package openstack

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/containerd/errdefs"
	"github.com/gophercloud/gophercloud/v2"
)

// Error is an answer that is no success. It unwraps to its class of package errdefs.
type Error struct {
	Status int
	// Type is the service's name for it: Neutron's, and Cinder's overLimit.
	Type    string
	Message string
	// After is how long the service wants to be left alone; 0 if it did not say.
	After time.Duration
	class error
}

var _ error = (*Error)(nil)

// Error implements error.
func (e *Error) Error() string {
	text := e.Message
	if text == "" {
		text = http.StatusText(e.Status)
	}
	if e.Type != "" {
		text = e.Type + ": " + text
	}
	return fmt.Sprintf("%s (HTTP %d)", text, e.Status)
}

// Unwrap is its class.
func (e *Error) Unwrap() error { return e.class }

// RetryAfter is how long to wait before asking again; 0 if the service did not say.
func (e *Error) RetryAfter() time.Duration { return e.After }

// TypeOf is what the service calls an error, "" if it has no name.
func TypeOf(err error) string {
	var e *Error
	if errors.As(err, &e) {
		return e.Type
	}
	return ""
}

const (
	maxMessage = 400
	// maxAfter bounds what a service may ask of us.
	maxAfter = 5 * time.Minute
)

// Classify gives an error of gophercloud its class.
func Classify(err error) error {
	if err == nil {
		return nil
	}
	var done *Error
	if errors.As(err, &done) {
		return err
	}
	var reauth *gophercloud.ErrUnableToReauthenticate
	if errors.As(err, &reauth) {
		return fmt.Errorf("log in at Keystone again: %w", Classify(reauth.ErrReauth))
	}
	var again *gophercloud.ErrErrorAfterReauthentication
	if errors.As(err, &again) {
		return Classify(again.ErrOriginal)
	}
	var answer gophercloud.ErrUnexpectedResponseCode
	if errors.As(err, &answer) {
		return of(answer.Actual, answer.Body, answer.ResponseHeader)
	}
	var pointer *gophercloud.ErrUnexpectedResponseCode
	if errors.As(err, &pointer) {
		return of(pointer.Actual, pointer.Body, pointer.ResponseHeader)
	}
	var network net.Error
	var syntax *json.SyntaxError
	switch {
	case errors.Is(err, context.Canceled):
		return err
	case errors.As(err, &network), errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("no answer: %w: %w", err, errdefs.ErrUnavailable)
	case errors.As(err, &syntax):
		return fmt.Errorf("an answer that is no JSON: %w: %w", err, errdefs.ErrUnavailable)
	case errdefs.IsUnavailable(err), errdefs.IsInvalidArgument(err), errdefs.IsNotFound(err):
		return err
	}
	return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
}

func of(status int, body []byte, header http.Header) *Error {
	e := &Error{Status: status}
	e.Type, e.Message = read(body)
	e.class = class(status, e.Type)
	if status == http.StatusTooManyRequests || status == http.StatusServiceUnavailable {
		e.After = after(header.Get("Retry-After"), time.Now())
	}
	return e
}

func class(status int, kind string) error {
	switch kind {
	case "OverQuota", "IpAddressGenerationFailure", "NoMoreIPs", "overLimit":
		return errdefs.ErrResourceExhausted
	case "IpAddressInUse", "IpAddressAlreadyAllocated", "MacAddressInUse":
		return errdefs.ErrAlreadyExists
	case "NetworkInUse", "SubnetInUse", "RouterInUse", "RouterInterfaceInUseByFloatingIP", "SecurityGroupInUse", "ServicePortInUse", "PortBound":
		return errdefs.ErrFailedPrecondition
	}
	switch status {
	case http.StatusBadRequest, http.StatusRequestEntityTooLarge, http.StatusUnprocessableEntity:
		return errdefs.ErrInvalidArgument
	case http.StatusUnauthorized:
		return errdefs.ErrUnauthenticated
	case http.StatusForbidden:
		return errdefs.ErrPermissionDenied
	case http.StatusNotFound, http.StatusGone:
		return errdefs.ErrNotFound
	case http.StatusConflict, http.StatusPreconditionFailed:
		return errdefs.ErrConflict
	case http.StatusNotImplemented, http.StatusMethodNotAllowed:
		return errdefs.ErrNotImplemented
	}
	return errdefs.ErrUnavailable
}

// read finds what services say went wrong: Neutron {"NeutronError": {"type", "message"}},
// Keystone {"error": {"title", "message"}}, Octavia {"faultstring"}, Cinder
// {"badRequest": {"code", "message"}} with one of several names, of which overLimit is a
// quota. Others' answers, a proxy's page for one, are not told.
func read(body []byte) (kind, message string) {
	var answer struct {
		Neutron json.RawMessage `json:"NeutronError"`
		Error   struct {
			Message string `json:"message"`
		} `json:"error"`
		Fault string `json:"faultstring"`
	}
	if json.Unmarshal(body, &answer) != nil {
		return "", ""
	}
	message = answer.Fault
	if answer.Error.Message != "" {
		message = answer.Error.Message
	}
	if len(answer.Neutron) > 0 {
		var e struct{ Type, Message string }
		if json.Unmarshal(answer.Neutron, &e) == nil {
			kind, message = e.Type, e.Message
		} else {
			_ = json.Unmarshal(answer.Neutron, &message)
		}
	}
	if kind == "" && message == "" {
		kind, message = cinder(body)
	}
	return clean(kind, 64), clean(message, maxMessage)
}

func cinder(body []byte) (kind, message string) {
	var answer map[string]json.RawMessage
	if json.Unmarshal(body, &answer) != nil || len(answer) != 1 {
		return "", ""
	}
	for name, raw := range answer {
		var e struct {
			Code    int    `json:"code"`
			Message string `json:"message"`
		}
		if json.Unmarshal(raw, &e) != nil || e.Code == 0 {
			return "", ""
		}
		message = e.Message
		if name == "overLimit" {
			kind = name
		}
	}
	return kind, message
}

// clean makes a text fit for a message: one line, bounded.
func clean(s string, most int) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsSpace(r) {
			return ' '
		}
		if !unicode.IsPrint(r) {
			return -1
		}
		return r
	}, strings.ToValidUTF8(s, ""))
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "…"
	}
	return strings.TrimSpace(s)
}

func after(s string, now time.Time) time.Duration {
	var d time.Duration
	if n, err := strconv.Atoi(strings.TrimSpace(s)); err == nil {
		d = time.Duration(min(max(n, 0), int(maxAfter/time.Second))) * time.Second
	} else if t, err := http.ParseTime(s); err == nil {
		d = t.Sub(now)
	}
	return min(max(d, 0), maxAfter)
}
