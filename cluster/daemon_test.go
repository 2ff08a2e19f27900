package cluster

import (
	"errors"
	"fmt"
	"os"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/cluster/gateway"
	"github.com/hypernetes/hypernetes/cluster/layout"
)

func TestLockNode(t *testing.T) {
	l := layout.Node{Name: "x", Run: t.TempDir()}
	first, err := lockNode(l)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lockNode(l); !errdefs.IsAlreadyExists(err) {
		t.Errorf("two hold it: %v", err)
	}
	// The way a daemon ends.
	if err := errors.Join(os.Remove(l.RunPath("lock")), first.Close()); err != nil {
		t.Fatal(err)
	}
	again, err := lockNode(l)
	if err != nil {
		t.Fatal(err)
	}
	_ = again.Close()
}

func TestReasonOf(t *testing.T) {
	for want, err := range map[string]error{
		"H8S_PORT_IN_USE":  fmt.Errorf("x: %w", &gateway.PortInUseError{Port: 1, Err: unix.EADDRINUSE}),
		"H8S_BUSY":         fmt.Errorf("x: %w", errdefs.ErrAlreadyExists),
		"H8S_DISK_FULL":    errors.New("etcd keeps failing: write: no space left on device"),
		"H8S_PERMISSION":   fmt.Errorf("x: %w", unix.EPERM),
		"H8S_NOT_RUNNING":  fmt.Errorf("x: %w", errStopped),
		"H8S_START_FAILED": errors.New("x"),
	} {
		if got := ReasonOf(err); got != want {
			t.Errorf("%v: %s, want %s", err, got, want)
		}
	}
}
