package driver

import (
	"context"
	"errors"
	"path"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// maxMessage bounds an error's text: it ends in events.
const maxMessage = 2000

// Code is the CSI code of an error.
func Code(err error) codes.Code {
	switch {
	case err == nil:
		return codes.OK
	case errors.Is(err, context.Canceled):
		return codes.Canceled
	case errors.Is(err, context.DeadlineExceeded):
		return codes.DeadlineExceeded
	}
	switch errdefs.Resolve(err) {
	case errdefs.ErrInvalidArgument:
		return codes.InvalidArgument
	case errdefs.ErrNotFound:
		return codes.NotFound
	case errdefs.ErrAlreadyExists:
		return codes.AlreadyExists
	case errdefs.ErrPermissionDenied:
		return codes.PermissionDenied
	case errdefs.ErrUnauthenticated:
		return codes.Unauthenticated
	case errdefs.ErrResourceExhausted:
		return codes.ResourceExhausted
	case errdefs.ErrFailedPrecondition:
		return codes.FailedPrecondition
	case errdefs.ErrAborted, errdefs.ErrConflict:
		return codes.Aborted
	case errdefs.ErrOutOfRange:
		return codes.OutOfRange
	case errdefs.ErrNotImplemented:
		return codes.Unimplemented
	case errdefs.ErrUnavailable:
		return codes.Unavailable
	case errdefs.ErrDataLoss:
		return codes.DataLoss
	}
	switch {
	case apierrors.IsServerTimeout(err), apierrors.IsTimeout(err), apierrors.IsTooManyRequests(err), apierrors.IsServiceUnavailable(err):
		return codes.Unavailable
	case apierrors.IsConflict(err):
		return codes.Aborted
	}
	return codes.Internal
}

// Observe is told of each call that ended.
type Observe func(method string, code codes.Code, took time.Duration)

// Interceptor is what the services need around them: it turns their errors into statuses,
// bounds calls and logs what failed.
func Interceptor(driver string, observe Observe) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		method := path.Base(info.FullMethod)
		ctx = log.WithLogger(ctx, log.G(ctx).WithFields(log.Fields{"driver": driver, "call": method}))
		ctx, cancel := context.WithTimeout(ctx, maxCall)
		defer cancel()
		began := time.Now()
		resp, err := handler(ctx, req)
		code := Code(err)
		if observe != nil {
			observe(method, code, time.Since(began))
		}
		if err == nil {
			return resp, nil
		}
		entry := log.G(ctx).WithError(err).WithField("code", code.String())
		if v, ok := req.(interface{ GetVolumeId() string }); ok {
			entry = entry.WithField("volume", bounded(v.GetVolumeId()))
		}
		switch code {
		case codes.Internal, codes.DataLoss:
			entry.Error("call failed")
		case codes.Canceled, codes.Aborted, codes.Unavailable, codes.NotFound:
			entry.Debug("call failed")
		default:
			entry.Warn("call failed")
		}
		text := err.Error()
		if len(text) > maxMessage {
			text = text[:maxMessage] + " …"
		}
		return nil, status.Error(code, text)
	}
}

// maxCall bounds a call whatever its caller allows: Cinder copies a volume in minutes.
const maxCall = 10 * time.Minute

func bounded(s string) string {
	if len(s) > maxID {
		return s[:maxID] + "…"
	}
	return s
}

// Locks are operations under way: one for each volume at a time.
type Locks struct {
	mu   sync.Mutex
	busy map[string]bool
}

// Try takes the lock of a name; the error is errdefs.ErrAborted if it is taken, and the
// caller tries again later.
func (l *Locks) Try(name string) (unlock func(), err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.busy[name] {
		return nil, busyError(name)
	}
	if l.busy == nil {
		l.busy = map[string]bool{}
	}
	l.busy[name] = true
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.busy, name)
	}, nil
}

type busyError string

// Error implements error.
func (e busyError) Error() string {
	return "another operation on " + bounded(string(e)) + " is under way: wait and repeat"
}

// Unwrap is its class.
func (busyError) Unwrap() error { return errdefs.ErrAborted }
