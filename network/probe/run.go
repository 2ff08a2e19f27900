package probe

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	api "github.com/hypernetes/hypernetes/api/probe/v1"
)

// The kubelet this one stands for.
const (
	probeAgent = "kube-probe/1.36"
	hookAgent  = "kube-lifecycle/1.36"
)

const (
	// maxBody is how much of an answer the kubelet reads.
	maxBody = 10 << 10
	// maxHeader and maxMessage bound what a Pod can have us hold beyond it.
	maxHeader, maxMessage = 256 << 10, 64 << 10
	// maxTries is how often the kubelet asks while it cannot tell the result.
	maxTries = 3
	// hookLimit bounds hooks, which the kubelet does not: it is beyond any sensible
	// terminationGracePeriodSeconds. A hook's caller ends it with the container.
	hookLimit = time.Hour
)

// Dialer dials from the Pod's edge namespace.
type Dialer interface {
	DialContext(ctx context.Context, network, address string) (net.Conn, error)
}

// Run carries r out against the Pod's address and returns what an exec probe would: exit
// code 0 or 1 and the text the kubelet would have written, valid UTF-8 of at most
// api.MaxOutput bytes.
//
// One thing an exec cannot express: a redirect to another host is a success with the
// text of the kubelet's warning, but without its event.
func Run(ctx context.Context, d Dialer, pod netip.Addr, r Request) (code int32, output string) {
	err := r.validate()
	if err != nil {
		return 1, bounded(err.Error())
	}
	x := &execution{dialer: d, pod: pod, timeout: time.Duration(max(r.TimeoutSeconds, 1)) * time.Second}
	ok := false
	switch {
	case r.Hook:
		ctx, cancel := context.WithTimeout(ctx, hookLimit)
		defer cancel()
		ok, output = x.hook(ctx, r)
	default:
		ctx, cancel := context.WithTimeout(ctx, early(x.timeout))
		defer cancel()
		ok, output = x.probe(ctx, r)
	}
	if !ok {
		code = 1
	}
	return code, bounded(output)
}

// early is a little before the probe's timeout, when the kubelet gives up on the exec:
// so it hears why.
func early(timeout time.Duration) time.Duration {
	return timeout - min(timeout/10, 500*time.Millisecond)
}

func bounded(s string) string {
	s = strings.ToValidUTF8(s, "\uFFFD")
	if len(s) <= api.MaxOutput {
		return s
	}
	s = s[:api.MaxOutput]
	for len(s) > 0 {
		if r, n := utf8.DecodeLastRuneInString(s); r != utf8.RuneError || n != 1 {
			break
		}
		s = s[:len(s)-1]
	}
	return s
}

// execution is one probe or hook of one Pod.
type execution struct {
	dialer  Dialer
	pod     netip.Addr
	timeout time.Duration
}

func (x *execution) address(port uint16) string {
	return netip.AddrPortFrom(x.pod, port).String()
}

// dial connects to the Pod and nowhere else, whatever an answer of it says.
func (x *execution) dial(ctx context.Context, network, address string) (net.Conn, error) {
	if to, err := netip.ParseAddrPort(address); err != nil || to.Addr() != x.pod {
		return nil, fmt.Errorf("dial %s %s: not the pod's address", network, address)
	}
	c, err := x.dialer.DialContext(ctx, network, address)
	if t, ok := c.(*net.TCPConn); ok && err == nil {
		// As the kubelet: TIME-WAIT of a second, as probes are many.
		_ = t.SetLinger(1)
	}
	return c, err
}

func (x *execution) probe(ctx context.Context, r Request) (ok bool, output string) {
	switch {
	case r.HTTP != nil:
		var err error
		for range maxTries {
			if ok, output, err = x.httpProbe(ctx, r.HTTP); err == nil {
				return ok, output
			}
			if ctx.Err() != nil {
				break
			}
		}
		return false, err.Error()
	case r.TCP != nil:
		c, err := x.dial(ctx, "tcp", x.address(r.TCP.Port))
		if err != nil {
			return false, err.Error()
		}
		_ = c.Close()
		return true, ""
	default:
		return x.grpcProbe(ctx, r.GRPC)
	}
}

// httpProbe fails with an error if the kubelet would ask again.
func (x *execution) httpProbe(ctx context.Context, h *HTTP) (ok bool, output string, err error) {
	req, err := x.request(h, probeAgent)
	if err != nil {
		return false, "", err
	}
	t := &http.Transport{
		TLSClientConfig:   &tls.Config{InsecureSkipVerify: true},
		DisableKeepAlives: true, DisableCompression: true, ForceAttemptHTTP2: true,
		DialContext: x.dial, TLSHandshakeTimeout: 10 * time.Second,
		MaxResponseHeaderBytes: maxHeader,
	}
	defer t.CloseIdleConnections()
	// The client's own time-out and not the context's: its errors say so.
	c := &http.Client{Transport: t, CheckRedirect: redirect}
	if deadline, set := ctx.Deadline(); set {
		if c.Timeout = time.Until(deadline); c.Timeout <= 0 {
			return false, "", context.DeadlineExceeded
		}
	}
	stop, cancel := withoutDeadline(ctx)
	defer cancel()
	res, err := c.Do(req.WithContext(stop))
	if err != nil {
		return false, err.Error(), nil
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, maxBody))
	switch {
	case err != nil:
		return false, "", err
	case res.StatusCode < http.StatusOK || res.StatusCode >= http.StatusBadRequest:
		return false, fmt.Sprintf("HTTP probe failed with statuscode: %d", res.StatusCode), nil
	case res.StatusCode >= http.StatusMultipleChoices:
		return true, "Probe terminated redirects, Response body: " + string(body), nil
	}
	return true, string(body), nil
}

// withoutDeadline is cancelled with ctx, but not by its deadline.
func withoutDeadline(ctx context.Context) (context.Context, context.CancelFunc) {
	out, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() {
		if !errors.Is(ctx.Err(), context.DeadlineExceeded) {
			cancel()
		}
	})
	return out, func() { stop(); cancel() }
}

// redirect follows within the Pod only.
func redirect(req *http.Request, via []*http.Request) error {
	if req.URL.Hostname() != via[0].URL.Hostname() {
		return http.ErrUseLastResponse
	}
	if len(via) >= 10 {
		return errors.New("stopped after 10 redirects")
	}
	return nil
}

func (x *execution) request(h *HTTP, agent string) (*http.Request, error) {
	u, err := url.Parse(h.Path)
	if err != nil {
		u = &url.URL{Path: h.Path} // as the kubelet: it is too late to refuse it
	}
	u.Scheme = "http"
	if h.Scheme != "" {
		u.Scheme = strings.ToLower(h.Scheme)
	}
	u.Host = net.JoinHostPort(x.pod.String(), strconv.Itoa(int(h.Port)))
	req, err := http.NewRequest(http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	for _, header := range h.Headers {
		req.Header.Add(header.Name, header.Value)
	}
	if _, set := req.Header["User-Agent"]; !set {
		req.Header.Set("User-Agent", agent)
	}
	if _, set := req.Header["Accept"]; !set {
		req.Header.Set("Accept", "*/*")
	} else if req.Header.Get("Accept") == "" {
		req.Header.Del("Accept")
	}
	req.Host = req.Header.Get("Host")
	return req, nil
}

func (x *execution) grpcProbe(ctx context.Context, g *GRPC) (ok bool, output string) {
	address := x.address(g.Port)
	conn, err := grpc.NewClient("passthrough:///"+address,
		grpc.WithUserAgent(probeAgent), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy(),
		grpc.WithMaxHeaderListSize(maxMessage), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
		grpc.WithDisableServiceConfig(), grpc.WithIdleTimeout(0),
		grpc.WithContextDialer(func(ctx context.Context, a string) (net.Conn, error) { return x.dial(ctx, "tcp", a) }))
	if err != nil {
		return false, fmt.Sprintf("error: failed to connect service at %q: %+v", address, err)
	}
	defer conn.Close()
	conn.Connect()
	for s := conn.GetState(); s != connectivity.Ready; s = conn.GetState() {
		if s == connectivity.Idle {
			conn.Connect()
		}
		if !conn.WaitForStateChange(ctx, s) {
			err := ctx.Err()
			if errors.Is(err, context.DeadlineExceeded) {
				return false, fmt.Sprintf("timeout: failed to connect service %q within %v: %+v", address, x.timeout, err)
			}
			return false, fmt.Sprintf("error: failed to connect service at %q: %+v", address, err)
		}
	}
	res, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{Service: g.Service})
	if err != nil {
		switch s := status.Convert(err); s.Code() {
		case codes.Unimplemented:
			return false, "error: this server does not implement the grpc health protocol (grpc.health.v1.Health): " + s.Message()
		case codes.DeadlineExceeded:
			return false, fmt.Sprintf("timeout: health rpc did not complete within %v", x.timeout)
		}
		return false, fmt.Sprintf("error: health rpc probe failed: %+v", err)
	}
	if s := res.GetStatus(); s != healthpb.HealthCheckResponse_SERVING {
		return false, fmt.Sprintf("service unhealthy (responded with %q)", s.String())
	}
	return true, "service healthy"
}

// hook succeeds with any HTTP answer. An HTTPS hook that is answered in plain HTTP is
// asked again so, without its credentials.
func (x *execution) hook(ctx context.Context, r Request) (ok bool, output string) {
	if r.HTTP == nil {
		// The kubelet has never carried this one out, it fails there as well.
		return false, "invalid handler: tcpSocket is not supported as a lifecycle hook; remedy: use httpGet or exec"
	}
	req, err := x.request(r.HTTP, hookAgent)
	if err != nil {
		return false, err.Error()
	}
	t := &http.Transport{
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DialContext: x.dial,
		MaxResponseHeaderBytes: maxHeader,
	}
	defer t.CloseIdleConnections()
	c := &http.Client{Transport: t, CheckRedirect: redirect}
	err = answered(c, req.WithContext(ctx))
	var failed *url.Error
	if errors.As(err, &failed) && strings.Contains(failed.Err.Error(), "server gave HTTP response to HTTPS client") {
		plain := req.Clone(ctx)
		plain.URL.Scheme = "http"
		plain.Header.Del("Authorization")
		if answered(c, plain) == nil {
			err = nil
		}
	}
	if err != nil {
		return false, err.Error()
	}
	return true, ""
}

func answered(c *http.Client, req *http.Request) error {
	res, err := c.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(res.Body, maxBody))
	return nil
}
