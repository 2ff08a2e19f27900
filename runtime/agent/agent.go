// Package agent is the shim's end of the conversation with hyperstart, PID 1 of a Pod's
// VM: calls, events, streams and the heartbeat, over one channel.
//
// It owns deadlines and the distrust of answers. It must not know containerd nor what a
// container is beyond its id.
package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
	"github.com/hypernetes/hypernetes/guest/channel"
)

// ProtocolMinor is the minor version of hyperstart.v1 the shim speaks.
const ProtocolMinor = 1

// Client talks to one guest. Dial makes it; its methods may be called concurrently.
// Errors have classes of errdefs; when the channel is gone, errdefs.ErrUnavailable.
type Client struct {
	host       *channel.Host
	rpc        *ttrpc.Client
	sandbox    hyperstart.SandboxClient
	containers hyperstart.ContainersService
	// Hello is what the guest said of itself.
	Hello *hyperstart.HelloResponse
}

// Dial waits, until ctx ends, for the guest's agent to answer.
func Dial(ctx context.Context, host *channel.Host, version string) (*Client, error) {
	conn, err := host.Open(ctx, &hyperstart.StreamHeader{Kind: &hyperstart.StreamHeader_Rpc{Rpc: true}})
	if err != nil {
		return nil, fmt.Errorf("guest agent does not answer: %w", unavailable(err))
	}
	c := newClient(host, conn)
	c.Hello, err = c.sandbox.Hello(ctx, &hyperstart.HelloRequest{ProtocolMinor: ProtocolMinor, ShimVersion: version})
	if err != nil {
		_ = c.Close()
		return nil, fmt.Errorf("guest agent does not say hello: %w", native(err))
	}
	return c, nil
}

func newClient(host *channel.Host, conn net.Conn) *Client {
	rpc := ttrpc.NewClient(&impatient{conn}, ttrpc.WithUnaryClientInterceptor(abandon))
	return &Client{host: host, rpc: rpc, sandbox: hyperstart.NewSandboxClient(rpc), containers: hyperstart.NewContainersClient(rpc)}
}

// Close ends the calls; the channel stays.
func (c *Client) Close() error { return c.rpc.Close() }

// native gives an answered error its class, and a broken connection's.
func native(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ttrpc.ErrClosed), errors.Is(err, ttrpc.ErrStreamClosed), errors.Is(err, net.ErrClosed):
		return unavailable(err)
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return err
	}
	// Its code and text only: the details of a status are values of types the guest
	// would choose, and each becomes a line of its own in the error.
	st, _ := status.FromError(err)
	return errgrpc.ToNative(status.Error(st.Code(), clip(st.Message())))
}

func unavailable(err error) error {
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		return err
	}
	return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
}

// Sandbox calls.

func (c *Client) Configure(ctx context.Context, r *hyperstart.ConfigureRequest) error {
	_, err := c.sandbox.Configure(ctx, r)
	return native(err)
}

func (c *Client) PutFiles(ctx context.Context, puts []*hyperstart.PutFilesRequest) error {
	for _, p := range puts {
		if _, err := c.sandbox.PutFiles(ctx, p); err != nil {
			return fmt.Errorf("write volume %s: %w", p.Volume, native(err))
		}
	}
	return nil
}

// ReadFile returns at most limit bytes, whatever the guest sends.
func (c *Client) ReadFile(ctx context.Context, volume, path string, limit uint32) ([]byte, error) {
	out, err := c.sandbox.ReadFile(ctx, &hyperstart.ReadFileRequest{Volume: volume, Path: path, Limit: limit})
	if err != nil {
		return nil, native(err)
	}
	if uint32(len(out.Data)) > limit {
		return out.Data[uint32(len(out.Data))-limit:], nil
	}
	return out.Data, nil
}

func (c *Client) SandboxStats(ctx context.Context) (*hyperstart.SandboxStatsResponse, error) {
	out, err := c.sandbox.Stats(ctx, &hyperstart.SandboxStatsRequest{})
	return out, native(err)
}

// maxAbnormal bounds what a guest says against a volume, in bytes.
const maxAbnormal = 1 << 10

// VolumeStats returns what the guest says: only the text is bounded.
func (c *Client) VolumeStats(ctx context.Context, serial string) (*hyperstart.VolumeStatsResponse, error) {
	out, err := c.sandbox.VolumeStats(ctx, &hyperstart.VolumeStatsRequest{Serial: serial})
	if err != nil {
		return nil, native(err)
	}
	out.Abnormal = clip(out.Abnormal[:min(len(out.Abnormal), maxAbnormal/2)])
	return out, nil
}

func (c *Client) GrowVolume(ctx context.Context, serial string, size uint64) error {
	_, err := c.sandbox.GrowVolume(ctx, &hyperstart.GrowVolumeRequest{Serial: serial, SizeBytes: size})
	return native(err)
}

func (c *Client) Shutdown(ctx context.Context, grace time.Duration) error {
	_, err := c.sandbox.Shutdown(ctx, &hyperstart.ShutdownRequest{GraceSeconds: uint32(grace / time.Second)})
	return native(err)
}

// Container calls.

func (c *Client) Create(ctx context.Context, r *hyperstart.CreateRequest) error {
	_, err := c.containers.Create(ctx, r)
	return native(err)
}

func (c *Client) Start(ctx context.Context, container, exec string) error {
	_, err := c.containers.Start(ctx, &hyperstart.ProcessRequest{ContainerId: container, ExecId: exec})
	return native(err)
}

func (c *Client) Exec(ctx context.Context, r *hyperstart.ExecRequest) error {
	_, err := c.containers.Exec(ctx, r)
	return native(err)
}

func (c *Client) Signal(ctx context.Context, container, exec string, signal uint32, all bool) error {
	_, err := c.containers.Signal(ctx, &hyperstart.SignalRequest{ContainerId: container, ExecId: exec, Signal: signal, All: all})
	return native(err)
}

func (c *Client) Resize(ctx context.Context, container, exec string, width, height uint32) error {
	_, err := c.containers.Resize(ctx, &hyperstart.ResizeRequest{ContainerId: container, ExecId: exec, Width: width, Height: height})
	return native(err)
}

func (c *Client) Delete(ctx context.Context, container, exec string) error {
	_, err := c.containers.Delete(ctx, &hyperstart.ProcessRequest{ContainerId: container, ExecId: exec})
	return native(err)
}

func (c *Client) Stats(ctx context.Context, container string) (*hyperstart.StatsResponse, error) {
	out, err := c.containers.Stats(ctx, &hyperstart.ContainerRequest{ContainerId: container})
	return out, native(err)
}

func (c *Client) Update(ctx context.Context, container string, resources []byte) error {
	_, err := c.containers.Update(ctx, &hyperstart.UpdateRequest{ContainerId: container, Resources: resources})
	return native(err)
}

func (c *Client) Pause(ctx context.Context, container string) error {
	_, err := c.containers.Pause(ctx, &hyperstart.ContainerRequest{ContainerId: container})
	return native(err)
}

func (c *Client) Resume(ctx context.Context, container string) error {
	_, err := c.containers.Resume(ctx, &hyperstart.ContainerRequest{ContainerId: container})
	return native(err)
}

// Stdio opens one standard stream (0, 1 or 2) of a process.
func (c *Client) Stdio(ctx context.Context, container, exec string, fd uint32) (net.Conn, error) {
	conn, err := c.host.Open(ctx, &hyperstart.StreamHeader{Kind: &hyperstart.StreamHeader_Stdio{
		Stdio: &hyperstart.Stdio{ContainerId: container, ExecId: exec, Fd: fd}}})
	if err != nil {
		return nil, fmt.Errorf("open stream %d of process %q: %w", fd, exec, unavailable(err))
	}
	return conn, nil
}

// DialPort connects to a TCP port of the guest's loopback.
func (c *Client) DialPort(ctx context.Context, port uint16, ipv6 bool) (net.Conn, error) {
	return c.host.Open(ctx, &hyperstart.StreamHeader{Kind: &hyperstart.StreamHeader_Dial{
		Dial: &hyperstart.Dial{Port: uint32(port), Ipv6: ipv6}}})
}

// Events calls handle with every event of the guest, once and in order, until ctx ends
// or the channel is gone. A stream that breaks is opened again where it stopped.
func (c *Client) Events(ctx context.Context, handle func(*hyperstart.Event)) error {
	var after uint64
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		progress, err := c.follow(ctx, &after, handle)
		if progress {
			pause = 10 * time.Millisecond
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-c.host.Done():
			return fmt.Errorf("channel to the guest is gone: %w", errdefs.ErrUnavailable)
		default:
		}
		if errors.Is(err, errdefs.ErrUnavailable) {
			return err
		}
		log.G(ctx).WithError(err).Debug("event stream ended, opening it again")
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
		}
	}
}

func (c *Client) follow(ctx context.Context, after *uint64, handle func(*hyperstart.Event)) (progress bool, err error) {
	// Not the channel's life but the stream's: leaving must end it in the guest too.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.sandbox.Events(ctx, &hyperstart.EventsRequest{After: *after})
	if err != nil {
		return false, native(err)
	}
	for {
		e, err := stream.Recv()
		if err != nil {
			return progress, native(err)
		}
		if e.Seq <= *after {
			continue // a guest that repeats itself
		}
		*after, progress = e.Seq, true
		handle(e)
	}
}

// Heartbeat asks the guest every so often and returns an error when an answer is late
// by more than late, or nil when ctx ends or the channel is gone (others see that).
func (c *Client) Heartbeat(ctx context.Context, every, late time.Duration) error {
	t := time.NewTicker(every)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-c.host.Done():
			return nil
		case <-t.C:
		}
		if err := c.Ping(ctx, late); err != nil {
			if ctx.Err() != nil || errors.Is(err, errdefs.ErrUnavailable) {
				return nil
			}
			return err
		}
	}
}

// Ping asks once.
func (c *Client) Ping(ctx context.Context, late time.Duration) error {
	pctx, cancel := context.WithTimeout(ctx, late)
	defer cancel()
	_, err := c.sandbox.Ping(pctx, &emptypb.Empty{})
	if err != nil && pctx.Err() != nil && ctx.Err() == nil {
		return fmt.Errorf("guest agent has not answered for %v: %w", late, errdefs.ErrAborted)
	}
	return native(err)
}
