package gateway

import (
	"bufio"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
)

// Proxy serves an HTTP proxy (CONNECT and absolute-URI requests) on l and dials on
// the host, through the host's own proxy if its environment names one. It takes
// ownership of l and returns at once.
func (g *Gateway) Proxy(l net.Listener) {
	p := &proxy{gateway: g, transport: &http.Transport{
		Proxy: http.ProxyFromEnvironment, IdleConnTimeout: 30 * time.Second, DialContext: dialTransport,
	}}
	srv := &http.Server{Handler: p, ReadHeaderTimeout: 10 * time.Second, BaseContext: func(net.Listener) context.Context { return g.ctx }}
	g.own(srv)
	g.wg.Go(func() {
		if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			log.G(g.ctx).WithError(err).Error("proxy for image pulls ended")
		}
		p.transport.CloseIdleConnections()
	})
}

type proxy struct {
	gateway   *Gateway
	transport *http.Transport
}

func (p *proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodConnect {
		p.connect(w, r)
		return
	}
	if !r.URL.IsAbs() {
		http.Error(w, "this is a proxy: send an absolute URI or CONNECT", http.StatusBadRequest)
		return
	}
	out := r.Clone(r.Context())
	out.RequestURI = ""
	for _, h := range []string{"Proxy-Connection", "Proxy-Authorization", "Connection", "Te", "Upgrade"} {
		out.Header.Del(h)
	}
	resp, err := p.transport.RoundTrip(out)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	defer resp.Body.Close()
	for k, v := range resp.Header {
		w.Header()[k] = v
	}
	w.WriteHeader(resp.StatusCode)
	_, _ = io.Copy(w, resp.Body)
}

func (p *proxy) connect(w http.ResponseWriter, r *http.Request) {
	out, err := dialOut(r.Context(), r.Host)
	if err != nil {
		refuse(w, r.Host, err)
		return
	}
	in, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		_ = out.Close()
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	if _, err := io.WriteString(in, "HTTP/1.1 200 Connection established\r\n\r\n"); err != nil || buffered.Reader.Buffered() > 0 {
		// A client that speaks before it is told it may is broken or smuggling.
		_ = in.Close()
		_ = out.Close()
		return
	}
	p.gateway.splice(in, out)
}

// refuse answers a CONNECT in the reason phrase: of all of an answer that is the one
// part Go's clients repeat, so it is what people see in the events of a Pod.
func refuse(w http.ResponseWriter, host string, cause error) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, cause.Error(), http.StatusBadGateway)
		return
	}
	defer conn.Close()
	reason := fmt.Sprintf("registry %.100s cannot be reached from this machine: %.300s; without a registry, load the image: h8s image load FILE.tar", host, cause)
	reason = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, reason)
	_, _ = fmt.Fprintf(conn, "HTTP/1.1 502 %s\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", reason)
}

// outward refuses addresses that mean this machine or its surroundings only: whoever
// names an image chooses where the proxy connects to, and must not reach what the
// machine serves to itself. It looks at addresses after names are resolved.
var outward = net.Dialer{Timeout: dialTimeout, Control: func(_, address string, _ syscall.RawConn) error {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	ip := ap.Addr().Unmap()
	if ip.IsLoopback() || ip.IsUnspecified() || ip.IsLinkLocalUnicast() || ip.IsMulticast() {
		return fmt.Errorf("%s is this machine's own or link-local, where images are not fetched from: %w", ip, errdefs.ErrPermissionDenied)
	}
	return nil
}}

// dialOutward is outward for names too. localhost is refused by name: a machine without
// /etc/hosts would ask a name server for it, whose answer nobody should rely on
// (RFC 6761 §6.3).
func dialOutward(ctx context.Context, network, address string) (net.Conn, error) {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	if name := strings.TrimSuffix(strings.ToLower(host), "."); name == "localhost" || strings.HasSuffix(name, ".localhost") {
		return nil, fmt.Errorf("%s is this machine itself, where images are not fetched from: %w", host, errdefs.ErrPermissionDenied)
	}
	return outward.DialContext(ctx, network, address)
}

// dialTransport dials for plain HTTP; the machine's own proxy may be on its loopback.
func dialTransport(ctx context.Context, network, address string) (net.Conn, error) {
	up, err := http.ProxyFromEnvironment(&http.Request{URL: &url.URL{Scheme: "http", Host: "registry.invalid"}})
	if err == nil && up != nil && hostPort(up) == address {
		return (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, network, address)
	}
	return dialOutward(ctx, network, address)
}

// dialOut connects to host:port, by way of the host's proxy if there is one for it.
func dialOut(ctx context.Context, address string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	up, err := http.ProxyFromEnvironment(&http.Request{URL: &url.URL{Scheme: "https", Host: address}})
	if err != nil {
		return nil, err
	}
	if up == nil {
		return dialOutward(ctx, "tcp", address)
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", hostPort(up))
	if err != nil {
		return nil, fmt.Errorf("proxy %s: %w", up.Host, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	req := &http.Request{Method: http.MethodConnect, URL: &url.URL{Opaque: address}, Host: address, Header: http.Header{}}
	if u := up.User; u != nil {
		pass, _ := u.Password()
		req.Header.Set("Proxy-Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(u.Username()+":"+pass)))
	}
	if err := req.Write(conn); err != nil {
		_ = conn.Close()
		return nil, err
	}
	resp, err := http.ReadResponse(bufio.NewReaderSize(conn, 16), req)
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		_ = conn.Close()
		return nil, fmt.Errorf("proxy %s: CONNECT %s: %s", up.Host, address, resp.Status)
	}
	return conn, nil
}

func hostPort(u *url.URL) string {
	if u.Port() != "" {
		return u.Host
	}
	return net.JoinHostPort(u.Hostname(), "80")
}
