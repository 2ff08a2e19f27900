package service

import (
	"errors"
	"fmt"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
)

// TestErrorsArriveInOneLine sends errors that wrap several to containerd and back.
func TestErrorsArriveInOneLine(t *testing.T) {
	for text, err := range map[string]error{
		"disk: no such file: not found": fmt.Errorf("disk: %w: %w", errors.New("no such file"), errdefs.ErrNotFound),
		"a\nb: unavailable":             fmt.Errorf("%w: %w", errors.Join(errors.New("a"), errors.New("b")), errdefs.ErrUnavailable),
		"odd: unknown":                  errors.New("odd"),
	} {
		for range 3 { // as many hops do not add to it
			err = errgrpc.ToNative(wire(classify(err)))
		}
		if err.Error() != text {
			t.Errorf("%q, want %q", err, text)
		}
	}
	if err := wire(nil); err != nil {
		t.Errorf("no error becomes %v", err)
	}
}
