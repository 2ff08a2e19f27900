// Package machine asks the VMs of Pods about the volumes they have, through their shims,
// whose addresses are in the node's records.
//
// It owns the calls and their deadlines. It must not know CSI or what a volume is.
package machine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	volumev1 "github.com/hypernetes/hypernetes/api/volume/v1"
)

// Deadlines: a shim answers Stats within two seconds, the guest's file system may grow
// for long.
const (
	dialTimeout  = 2 * time.Second
	statsTimeout = 4 * time.Second
	growTimeout  = 90 * time.Second

	throttleTimeout = 15 * time.Second
)

// Addresses tell where a Pod's shim listens; the error is errdefs.ErrNotFound if it has none.
type Addresses interface {
	Shim(podUID string) (address string, err error)
}

// Machines are a node's VMs.
type Machines struct{ Addresses Addresses }

// Stats measures what is on a volume. Errors: errdefs.ErrNotFound if the Pod has no VM,
// errdefs.ErrUnavailable if it does not answer now.
func (m Machines) Stats(ctx context.Context, podUID, key string) (*volumev1.StatsResponse, error) {
	var resp *volumev1.StatsResponse
	err := m.call(ctx, podUID, statsTimeout, func(ctx context.Context, c volumev1.VolumesService) (err error) {
		resp, err = c.Stats(ctx, &volumev1.StatsRequest{Key: key})
		return err
	})
	return resp, err
}

// Grow has the VM see a volume that has grown to bytes at least and returns the size it
// sees. Errors are those of Stats.
func (m Machines) Grow(ctx context.Context, podUID, key string, bytes int64) (int64, error) {
	var resp *volumev1.GrowResponse
	err := m.call(ctx, podUID, growTimeout, func(ctx context.Context, c volumev1.VolumesService) (err error) {
		resp, err = c.Grow(ctx, &volumev1.GrowRequest{Key: key, SizeBytes: uint64(max(bytes, 0))})
		return err
	})
	return int64(min(resp.GetDeviceBytes(), 1<<62)), err
}

// Throttle has the VM bound a volume's I/O as its record says. Errors are those of Stats,
// and errdefs.ErrNotImplemented of a shim that is older.
func (m Machines) Throttle(ctx context.Context, podUID, key string) error {
	return m.call(ctx, podUID, throttleTimeout, func(ctx context.Context, c volumev1.VolumesService) error {
		_, err := c.Throttle(ctx, &volumev1.ThrottleRequest{Key: key})
		return err
	})
}

func (m Machines) call(ctx context.Context, podUID string, timeout time.Duration, do func(context.Context, volumev1.VolumesService) error) error {
	address, err := m.Addresses.Shim(podUID)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	dialer := net.Dialer{Timeout: dialTimeout}
	conn, err := dialer.DialContext(ctx, "unix", strings.TrimPrefix(address, "unix://"))
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ECONNREFUSED):
		// It was killed, and its VM with it or soon.
		return fmt.Errorf("shim of pod %s is gone: %w", podUID, errdefs.ErrUnavailable)
	case err != nil:
		return fmt.Errorf("shim of pod %s: %w: %w", podUID, err, errdefs.ErrUnavailable)
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	err = do(ctx, volumev1.NewVolumesClient(client))
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ttrpc.ErrClosed), errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("shim of pod %s does not answer: %w: %w", podUID, errdefs.ErrUnavailable, err)
	}
	native := errgrpc.ToNative(err)
	if errdefs.IsNotFound(native) {
		// The shim has a VM, but no such volume: that is not "no VM".
		return fmt.Errorf("shim of pod %s: %v: %w", podUID, native, errdefs.ErrFailedPrecondition)
	}
	return fmt.Errorf("shim of pod %s: %w", podUID, native)
}
