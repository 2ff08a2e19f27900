package reaper

import (
	"context"
	"errors"
	"strings"
	"testing"
)

func TestCommand(t *testing.T) {
	r := running(t)
	st, out, err := r.Command(t.Context(), "/bin/sh", "-c", "echo a; echo b >&2; exit 7")
	if err != nil || st != 7 || out != "a\nb\n" {
		t.Errorf("%d %q %v", st, out, err)
	}
	st, out, err = r.Command(t.Context(), "/bin/sh", "-c", "i=0; while [ $i -lt 5000 ]; do echo line $i; i=$((i+1)); done")
	if err != nil || st != 0 || len(out) != maxOutput || !strings.HasSuffix(out, "line 4999\n") {
		t.Errorf("%d, %d bytes, %v", st, len(out), err)
	}
	if _, _, err = r.Command(t.Context(), "/nonexistent"); err == nil {
		t.Error("ran what is not there")
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		_, _, err := r.Command(ctx, "/bin/sh", "-c", "exec sleep 1000")
		done <- err
	}()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("killed: %v", err)
	}
}
