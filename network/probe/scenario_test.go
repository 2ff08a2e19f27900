package probe

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

// This file is also compiled by testdata/record, which asks upstream's prober packages
// the same questions: it must not use package testing nor this package.

// scenario is one handler against one server.
type scenario struct {
	name    string
	kind    string // http, tcp, grpc, hook
	scheme  string
	port    int
	path    string
	headers [][2]string
	service string
}

// mark makes a text comparable: ports are the system's choice.
func mark(s string, port int) string {
	s = strings.ReplaceAll(s, ":"+strconv.Itoa(port), ":PORT")
	// Of a dial that failed half way the local port is told as well.
	if i := strings.Index(s, "127.0.0.1:"); i >= 0 && strings.Contains(s[i:], "->") {
		if j := strings.Index(s[i:], "->"); j > 0 {
			s = s[:i] + "127.0.0.1:LOCAL" + s[i+j:]
		}
	}
	return s
}

func listen() net.Listener {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	return l
}

func port(l net.Listener) int { return l.Addr().(*net.TCPAddr).Port }

func page(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case "/echo":
		fmt.Fprintf(w, "%s %s host=%s ua=%q accept=%q/%v encoding=%q connection=%q x=%q", r.Method, r.URL.RequestURI(),
			strings.Split(r.Host, ":")[0], r.UserAgent(), r.Header.Get("Accept"), len(r.Header["Accept"]),
			r.Header.Get("Accept-Encoding"), r.Header.Get("Connection"), r.Header["X-H"])
	case "/proto":
		fmt.Fprint(w, r.Proto)
	case "/503":
		w.WriteHeader(503)
		fmt.Fprint(w, "secret")
	case "/404":
		w.WriteHeader(404)
	case "/204":
		w.WriteHeader(204)
	case "/304":
		w.WriteHeader(304)
	case "/301-none":
		w.WriteHeader(301)
		fmt.Fprint(w, "nowhere")
	case "/local":
		http.Redirect(w, r, "/echo?a=b", http.StatusFound)
	case "/local-503":
		http.Redirect(w, r, "/503", http.StatusFound)
	case "/away":
		w.Header().Set("Location", "http://192.0.2.1/x")
		w.WriteHeader(302)
		fmt.Fprint(w, "gone away")
	case "/loop":
		http.Redirect(w, r, "/loop", http.StatusFound)
	case "/reflect": // shows in a hook's error what it sent
		w.Header().Set("Location", fmt.Sprintf("http://[::1 %s ua=%s accept=%s encoding=%s connection=%s", r.Proto, r.UserAgent(),
			r.Header.Get("Accept"), r.Header.Get("Accept-Encoding"), r.Header.Get("Connection")))
		w.WriteHeader(302)
	case "/bad-location":
		w.Header().Set("Location", "http://[::1")
		w.WriteHeader(302)
	case "/big":
		fmt.Fprint(w, strings.Repeat("0123456789", 5000))
	case "/hang":
		<-r.Context().Done()
	case "/stall":
		fmt.Fprint(w, "half")
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	case "/short":
		w.Header().Set("Content-Length", "100")
		fmt.Fprint(w, "half")
	default:
		fmt.Fprintf(w, "ok %s", r.URL.Path)
	}
}

func certificate() tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	// Of another name, and expired: nobody asks.
	t := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"other.example"}, NotAfter: time.Unix(1, 0)}
	der, err := x509.CreateCertificate(rand.Reader, t, t, &key.PublicKey, key)
	if err != nil {
		panic(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

type slowHealth struct {
	healthpb.UnimplementedHealthServer
}

func (slowHealth) Check(ctx context.Context, _ *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// scenarios starts every server; stop ends them.
func scenarios() (all []scenario, stop func()) {
	var stops []func()
	quiet := log.New(io.Discard, "", 0)
	plain := httptest.NewServer(http.HandlerFunc(page))
	secure := httptest.NewUnstartedServer(http.HandlerFunc(page))
	secure.Config.ErrorLog = quiet
	secure.TLS = &tls.Config{Certificates: []tls.Certificate{certificate()}}
	secure.EnableHTTP2 = true
	secure.StartTLS()
	stops = append(stops, func() { plain.CloseClientConnections(); plain.Close(); secure.CloseClientConnections(); secure.Close() })
	plainPort, securePort := port(plain.Listener), port(secure.Listener)

	closed := listen()
	closedPort := port(closed)
	_ = closed.Close()

	// Accepts, then says nothing.
	mute := listen()
	var held []net.Conn
	stops = append(stops, func() { _ = mute.Close() })
	go func() {
		for {
			c, err := mute.Accept()
			if err != nil {
				return
			}
			held = append(held, c) // else the collector would close it
		}
	}()
	// Hangs up, and answers nonsense.
	for _, s := range []string{"", "hello\n"} {
		l := listen()
		stops = append(stops, func() { _ = l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				buf := make([]byte, 4096)
				_, _ = c.Read(buf)
				_, _ = c.Write([]byte(s))
				_ = c.Close()
			}
		}()
		name := "hang-up"
		if s != "" {
			name = "nonsense"
		}
		all = append(all, scenario{name: "http/" + name, kind: "http", port: port(l)}, scenario{name: "hook/" + name, kind: "hook", port: port(l)})
	}
	// Never completes a handshake: its queue is full.
	fullPort, closeFull := full()
	stops = append(stops, closeFull)

	serve := func(register func(*grpc.Server)) int {
		s, l := grpc.NewServer(), listen()
		register(s)
		go func() { _ = s.Serve(l) }()
		stops = append(stops, s.Stop)
		return port(l)
	}
	h := health.NewServer()
	h.SetServingStatus("good", healthpb.HealthCheckResponse_SERVING)
	h.SetServingStatus("bad", healthpb.HealthCheckResponse_NOT_SERVING)
	healthPort := serve(func(s *grpc.Server) { healthpb.RegisterHealthServer(s, h) })
	noHealthPort := serve(func(*grpc.Server) {})
	slowPort := serve(func(s *grpc.Server) { healthpb.RegisterHealthServer(s, slowHealth{}) })

	for _, p := range []string{"ok", "echo", "echo?q=1&r=%20", "503", "404", "204", "304", "301-none", "local", "local-503", "away", "loop", "bad-location", "reflect", "big", "hang", "stall", "short", "proto"} {
		all = append(all,
			scenario{name: "http/" + p, kind: "http", scheme: "HTTP", port: plainPort, path: "/" + p},
			scenario{name: "https/" + p, kind: "http", scheme: "HTTPS", port: securePort, path: "/" + p})
		if p != "hang" && p != "stall" { // a hook waits for ever
			all = append(all, scenario{name: "hook/" + p, kind: "hook", scheme: "HTTP", port: plainPort, path: "/" + p},
				scenario{name: "hook-https/" + p, kind: "hook", scheme: "HTTPS", port: securePort, path: "/" + p})
		}
	}
	headers := [][2]string{{"Host", "virtual.example"}, {"X-H", "1"}, {"X-H", "2"}, {"User-Agent", "mine"}, {"Accept", ""}}
	all = append(all,
		scenario{name: "http/headers", kind: "http", port: plainPort, path: "/echo", headers: headers},
		scenario{name: "https/headers", kind: "http", scheme: "HTTPS", port: securePort, path: "/echo", headers: headers},
		scenario{name: "http/headers-redirect", kind: "http", port: plainPort, path: "/local", headers: headers},
		scenario{name: "http/relative-path", kind: "http", port: plainPort, path: "echo"},
		scenario{name: "http/absolute-path", kind: "http", port: plainPort, path: "http://192.0.2.7/echo"},
		scenario{name: "http/opaque-path", kind: "http", port: plainPort, path: "mailto:echo"},
		scenario{name: "http/broken-path", kind: "http", port: plainPort, path: "/%zz"},
		scenario{name: "http/empty-user-agent", kind: "http", port: plainPort, path: "/echo", headers: [][2]string{{"User-Agent", ""}}},
		scenario{name: "http/refused", kind: "http", port: closedPort, path: "/"},
		scenario{name: "https/refused", kind: "http", scheme: "HTTPS", port: closedPort, path: "/"},
		scenario{name: "http/mute", kind: "http", port: port(mute), path: "/"},
		scenario{name: "https/mute", kind: "http", scheme: "HTTPS", port: port(mute), path: "/"},
		scenario{name: "http/no-handshake", kind: "http", port: fullPort, path: "/"},
		scenario{name: "http/is-https", kind: "http", scheme: "HTTP", port: securePort, path: "/ok"},
		scenario{name: "https/is-http", kind: "http", scheme: "HTTPS", port: plainPort, path: "/ok"},
		scenario{name: "hook/refused", kind: "hook", port: closedPort, path: "/"},
		scenario{name: "hook/is-https", kind: "hook", scheme: "HTTP", port: securePort, path: "/ok"},
		scenario{name: "hook-https/is-http", kind: "hook", scheme: "HTTPS", port: plainPort, path: "/ok"},
		scenario{name: "hook-https/is-http-reflect", kind: "hook", scheme: "HTTPS", port: plainPort, path: "/reflect"},
		scenario{name: "hook-https/is-http-503", kind: "hook", scheme: "HTTPS", port: plainPort, path: "/503"},
		scenario{name: "hook-https/refused", kind: "hook", scheme: "HTTPS", port: closedPort, path: "/"},
		scenario{name: "tcp/ok", kind: "tcp", port: plainPort},
		scenario{name: "tcp/refused", kind: "tcp", port: closedPort},
		scenario{name: "tcp/no-handshake", kind: "tcp", port: fullPort},
		scenario{name: "grpc/ok", kind: "grpc", port: healthPort},
		scenario{name: "grpc/good", kind: "grpc", port: healthPort, service: "good"},
		scenario{name: "grpc/not-serving", kind: "grpc", port: healthPort, service: "bad"},
		scenario{name: "grpc/unknown-service", kind: "grpc", port: healthPort, service: "none"},
		scenario{name: "grpc/unimplemented", kind: "grpc", port: noHealthPort},
		scenario{name: "grpc/slow", kind: "grpc", port: slowPort},
		scenario{name: "grpc/refused", kind: "grpc", port: closedPort},
		scenario{name: "grpc/mute", kind: "grpc", port: port(mute)},
		scenario{name: "grpc/no-handshake", kind: "grpc", port: fullPort},
		scenario{name: "grpc/is-http", kind: "grpc", port: plainPort},
	)
	return all, func() {
		for _, f := range stops {
			f()
		}
	}
}

// full listens with a queue of one and fills it.
func full() (int, func()) {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err == nil {
		err = syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
	}
	if err == nil {
		err = syscall.Listen(fd, 0)
	}
	if err != nil {
		panic(os.NewSyscallError("listen", err))
	}
	sa, err := syscall.Getsockname(fd)
	if err != nil {
		panic(err)
	}
	p := sa.(*syscall.SockaddrInet4).Port
	var conns []net.Conn
	for {
		c, err := net.DialTimeout("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(p)), 200*time.Millisecond)
		if err != nil {
			break
		}
		conns = append(conns, c)
	}
	return p, func() {
		for _, c := range conns {
			_ = c.Close()
		}
		_ = syscall.Close(fd)
	}
}
