// Package probe owns probes and lifecycle hooks of Pods whose addresses no host may
// dial: how they are written as an exec of /.h8s/probe, and how they are carried out
// from the edge namespace with the kubelet's semantics. See DESIGN §3 and
// reference/tenancy-network.md §2.3.
package probe

import (
	"context"
	"net"
	"net/netip"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
)

// Request is one probe or hook, the JSON behind the argument of /.h8s/probe.
type Request struct {
	HTTP *HTTP `json:"http,omitempty"`
	TCP  *TCP  `json:"tcp,omitempty"`
	GRPC *GRPC `json:"grpc,omitempty"`
	// Hook is a postStart or preStop handler, whose answer's status does not matter to the
	// kubelet beyond an HTTP response being there.
	Hook bool `json:"hook,omitempty"`
	// TimeoutSeconds of the probe; 0 for hooks.
	TimeoutSeconds int32 `json:"timeoutSeconds,omitempty"`
}

// HTTP is an httpGet.
type HTTP struct {
	Scheme  string              `json:"scheme,omitempty"`
	Port    uint16              `json:"port"`
	Path    string              `json:"path,omitempty"`
	Headers []corev1.HTTPHeader `json:"headers,omitempty"`
}

// TCP is a tcpSocket.
type TCP struct {
	Port uint16 `json:"port"`
}

// GRPC is a grpc probe (grpc.health.v1).
type GRPC struct {
	Port    uint16 `json:"port"`
	Service string `json:"service,omitempty"`
}

// Command is the exec that stands for r.
func Command(r Request) []string { return nil }

// Decode reads a command's argument; untrusted.
func Decode(argument string) (Request, error) { return Request{}, errdefs.ErrNotImplemented }

// Rewrite replaces every httpGet, tcpSocket and grpc probe and every httpGet and
// tcpSocket hook of a Pod, keeping the originals in its annotation
// hypernetes.io/probes. It is idempotent. It fails, changing nothing, with
// errdefs.ErrInvalidArgument naming the field if a handler sets a host or names a port
// its container does not have.
func Rewrite(pod *corev1.Pod) error { return errdefs.ErrNotImplemented }

// Dialer dials from the Pod's edge namespace.
type Dialer interface {
	DialContext(ctx context.Context, network, address string) (net.Conn, error)
}

// Run carries r out against the Pod's address and returns what an exec probe would: exit
// code 0 or 1 and the text the kubelet would have written.
func Run(ctx context.Context, d Dialer, pod netip.Addr, r Request) (code int32, output string) {
	return 1, errdefs.ErrNotImplemented.Error()
}
