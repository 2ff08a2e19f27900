package hyperctl

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netns"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hypernetes/hypernetes/cluster/image"
	"github.com/hypernetes/hypernetes/cluster/layout"
	"github.com/hypernetes/hypernetes/proc"
)

// maxMessage bounds what a runtime may answer, in bytes.
const maxMessage = 16 << 20

// hyper is a connection to a node's runtime. Safe for concurrent use.
type hyper struct {
	conn   *grpc.ClientConn
	pods   cri.RuntimeServiceClient
	images cri.ImageServiceClient

	socket       string
	netns        string // "" for our own
	logs         string // directory for container logs, the same inside the node
	cgroupParent string
	snapshotter  string // that unpacks what is loaded; "" for the runtime's default
}

// connect opens the runtime, starting our node if that is the one meant and
// it is not up. Progress of the start goes to progress.
func (o *options) connect(ctx context.Context, progress io.Writer) (*hyper, error) {
	h := &hyper{netns: o.netns, logs: "/var/log/hyperctl"}
	if o.endpoint != "" {
		h.socket = strings.TrimPrefix(o.endpoint, "unix://")
		if !filepath.IsAbs(h.socket) {
			return nil, fmt.Errorf("runtime-endpoint %q: want an absolute path, as unix:///run/containerd/containerd.sock: %w", o.endpoint, errdefs.ErrInvalidArgument)
		}
		return h, h.dial()
	}
	l, err := layout.NewNode(o.node)
	if err != nil {
		return nil, err
	}
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("node %s belongs to root: run hyperctl as root, for example with sudo: %w", l.Name, errdefs.ErrPermissionDenied)
	}
	h.snapshotter = "erofs"
	h.socket, h.logs, h.cgroupParent = l.ContainerdSocket(), l.StatePath("log", "hyperctl"), l.Cgroup()+"/hyperctl"
	if !answers(h.socket) {
		if err := startNode(ctx, l, progress); err != nil {
			return nil, err
		}
	}
	if h.netns, err = nodeNetns(l); err != nil {
		return nil, err
	}
	return h, h.dial()
}

// answers reports whether something listens on the socket.
func answers(socket string) bool {
	c, err := net.DialTimeout("unix", socket, 2*time.Second)
	if err != nil {
		return false
	}
	return c.Close() == nil
}

func startNode(ctx context.Context, l layout.Node, progress io.Writer) error {
	artifacts, err := layout.FindArtifacts()
	if err != nil {
		return err
	}
	fmt.Fprintf(progress, "node %s is not running; starting it (h8s up --runtime-only --name %s)\n", l.Name, l.Name)
	cmd := exec.CommandContext(ctx, artifacts.Bin("h8s"), "up", "--runtime-only", "--name", l.Name)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = io.MultiWriter(progress, &said), io.MultiWriter(progress, &said)
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("start node %s: %w; `h8s doctor` says what is missing: %w", l.Name, err, errdefs.ErrUnavailable)
	}
	if !answers(l.ContainerdSocket()) {
		return fmt.Errorf("node %s: containerd does not answer at %s; see `h8s logs --name %s containerd`: %w",
			l.Name, l.ContainerdSocket(), l.Name, errdefs.ErrUnavailable)
	}
	return nil
}

// nodeNetns is the network namespace the node's loopback is in.
func nodeNetns(l layout.Node) (string, error) {
	b, err := os.ReadFile(l.Record("anchor"))
	if errors.Is(err, os.ErrNotExist) {
		return "", nil // a node on the host's own network
	}
	if err != nil {
		return "", fmt.Errorf("node %s: %w", l.Name, err)
	}
	var id proc.ID
	if err := json.Unmarshal(b, &id); err != nil {
		return "", fmt.Errorf("node %s: %s: %w", l.Name, l.Record("anchor"), err)
	}
	if !id.Alive() {
		return "", fmt.Errorf("node %s: its namespaces are gone; run `h8s down --name %s` and try again: %w", l.Name, l.Name, errdefs.ErrUnavailable)
	}
	return fmt.Sprintf("/proc/%d/ns/net", id.PID), nil
}

func (h *hyper) dial() error {
	conn, err := grpc.NewClient("unix://"+h.socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)))
	if err != nil {
		return fmt.Errorf("runtime %s: %w", h.socket, err)
	}
	h.conn, h.pods, h.images = conn, cri.NewRuntimeServiceClient(conn), cri.NewImageServiceClient(conn)
	return nil
}

func (h *hyper) close() { _ = h.conn.Close() }

// store is the node's image store.
func (h *hyper) store() (image.Store, error) {
	artifacts, err := layout.FindArtifacts()
	if err != nil {
		return image.Store{}, err
	}
	return image.Store{Socket: h.socket, Containerd: artifacts.Bin("containerd"), Snapshotter: h.snapshotter}, nil
}

// dialNode connects to an address of the node's loopback. The thread that
// entered the node's namespace is thrown away rather than brought back.
func (h *hyper) dialNode(ctx context.Context, address string) (net.Conn, error) {
	if h.netns == "" {
		return new(net.Dialer).DialContext(ctx, "tcp", address)
	}
	type result struct {
		conn net.Conn
		err  error
	}
	done := make(chan result, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		ns, err := netns.GetFromPath(h.netns)
		if err != nil {
			done <- result{err: fmt.Errorf("node's network namespace: %w", err)}
			return
		}
		defer ns.Close()
		if err := netns.Set(ns); err != nil {
			done <- result{err: fmt.Errorf("enter the node's network namespace: %w", err)}
			return
		}
		// Numeric address and one family: the dialer needs no second thread.
		c, err := new(net.Dialer).DialContext(ctx, "tcp4", address)
		done <- result{c, err}
	}()
	r := <-done
	return r.conn, r.err
}

// explain words a CRI error for people; what says what was being done.
func (h *hyper) explain(what string, err error) error {
	if err == nil {
		return nil
	}
	st, ok := status.FromError(err)
	if !ok {
		return fmt.Errorf("%s: %w", what, err)
	}
	switch st.Code() {
	case codes.Unavailable:
		return fmt.Errorf("%s: no container runtime answers at %s: %w", what, h.socket, errdefs.ErrUnavailable)
	case codes.NotFound:
		return fmt.Errorf("%s: %s: %w", what, st.Message(), errdefs.ErrNotFound)
	}
	return fmt.Errorf("%s: %s", what, st.Message())
}
