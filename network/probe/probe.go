// Package probe owns probes and lifecycle hooks of Pods whose addresses no host may
// dial: how they are written as an exec of /.h8s/probe, and how they are carried out
// from the edge namespace with the kubelet's semantics. See DESIGN §3 and
// reference/tenancy-network.md §2.3.
//
// It must not know which Pod has which address, nor who asks.
package probe

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	api "github.com/hypernetes/hypernetes/api/probe/v1"
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

// Command is the exec that stands for r. Base64 keeps the kubelet from expanding a $(NAME)
// in it, which it does for commands of exec probes but not for paths and headers.
func Command(r Request) []string {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	// Strings, numbers and slices of them: nothing that cannot be encoded.
	_ = e.Encode(r)
	return []string{api.Program, base64.RawURLEncoding.EncodeToString(bytes.TrimSpace(b.Bytes()))}
}

// Decode reads a command's argument; untrusted. It takes what Command writes and no other
// spelling of it.
//
// Errors: errdefs.ErrInvalidArgument.
func Decode(argument string) (Request, error) {
	r, err := decode(argument)
	if err != nil {
		return Request{}, fmt.Errorf("argument of %s: %w: %w", api.Program, err, errdefs.ErrInvalidArgument)
	}
	return r, nil
}

func decode(argument string) (r Request, err error) {
	if len(argument) > api.MaxArgument {
		return r, fmt.Errorf("%d bytes are over the limit of %d", len(argument), api.MaxArgument)
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(argument)
	if err != nil {
		return r, err
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil {
		return r, fmt.Errorf("json: %w", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return r, fmt.Errorf("json: more than one value")
	}
	if err := r.validate(); err != nil {
		return r, err
	}
	if Command(r)[1] != argument {
		return r, fmt.Errorf("is not in the one form it may have")
	}
	return r, nil
}

// validate checks what the API server would of the handler itself.
func (r Request) validate() error {
	kinds := 0
	var port uint16
	if r.HTTP != nil {
		kinds, port = kinds+1, r.HTTP.Port
		if s := r.HTTP.Scheme; s != "" && s != string(corev1.URISchemeHTTP) && s != string(corev1.URISchemeHTTPS) {
			return fmt.Errorf("scheme %.20q: must be HTTP or HTTPS", s)
		}
		for _, h := range r.HTTP.Headers {
			if msgs := validation.IsHTTPHeaderName(h.Name); len(msgs) > 0 {
				return fmt.Errorf("header %.100q: %s", h.Name, strings.Join(msgs, ", "))
			}
		}
	}
	if r.TCP != nil {
		kinds, port = kinds+1, r.TCP.Port
	}
	if r.GRPC != nil {
		kinds, port = kinds+1, r.GRPC.Port
		if r.Hook {
			return fmt.Errorf("grpc: there is no such hook")
		}
	}
	switch {
	case kinds != 1:
		return fmt.Errorf("%d handlers: must be one of http, tcp and grpc", kinds)
	case port == 0:
		return fmt.Errorf("port 0: must be 1 to 65535")
	case r.TimeoutSeconds < 0:
		return fmt.Errorf("timeoutSeconds %d: must not be negative", r.TimeoutSeconds)
	}
	return nil
}
