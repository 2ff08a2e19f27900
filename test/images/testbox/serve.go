package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sort"
	"strconv"
	"sync/atomic"
	"syscall"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
)

// serve runs every server until SIGTERM or SIGINT.
func serve(args []string) int {
	fs := flag.NewFlagSet("serve", flag.ExitOnError)
	httpAddr := fs.String("http", ":8080", "HTTP address")
	tcpAddr := fs.String("tcp", ":8081", "TCP echo address")
	udpAddr := fs.String("udp", ":8081", "UDP echo address")
	grpcAddr := fs.String("grpc", ":8082", "gRPC health address")
	_ = fs.Parse(args)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	checks := health.NewServer()
	failed := make(chan error, 4)
	go func() { failed <- http.ListenAndServe(*httpAddr, newHandler(checks)) }()
	go func() { failed <- echoTCP(*tcpAddr) }()
	go func() { failed <- echoUDP(*udpAddr) }()
	go func() { failed <- serveGRPC(*grpcAddr, checks) }()
	fmt.Println("testbox: serving")
	select {
	case err := <-failed:
		fmt.Fprintln(os.Stderr, "testbox:", err)
		return 1
	case <-ctx.Done():
		fmt.Println("testbox: terminated")
		return 0
	}
}

func newHandler(checks *health.Server) http.Handler {
	var sick atomic.Bool
	mux := http.NewServeMux()
	mux.HandleFunc("/{$}", describe)
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) {
		if sick.Load() {
			http.Error(w, "sick", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("/sick", func(http.ResponseWriter, *http.Request) {
		sick.Store(true)
		checks.SetServingStatus("", grpc_health_v1.HealthCheckResponse_NOT_SERVING)
	})
	mux.HandleFunc("/well", func(http.ResponseWriter, *http.Request) {
		sick.Store(false)
		checks.SetServingStatus("", grpc_health_v1.HealthCheckResponse_SERVING)
	})
	mux.HandleFunc("/clientip", func(w http.ResponseWriter, r *http.Request) {
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		fmt.Fprintln(w, host)
	})
	mux.HandleFunc("/hostname", func(w http.ResponseWriter, _ *http.Request) {
		name, _ := os.Hostname()
		fmt.Fprintln(w, name)
	})
	mux.HandleFunc("/file", func(w http.ResponseWriter, r *http.Request) {
		http.ServeFile(w, r, r.FormValue("path"))
	})
	mux.HandleFunc("/exit", func(_ http.ResponseWriter, r *http.Request) {
		code, _ := strconv.Atoi(r.FormValue("code"))
		os.Exit(code)
	})
	mux.HandleFunc("/bytes", func(w http.ResponseWriter, r *http.Request) {
		n, _ := strconv.ParseInt(r.FormValue("n"), 10, 64)
		_, _ = io.CopyN(w, zeros{}, n)
	})
	mux.HandleFunc("/upload", func(w http.ResponseWriter, r *http.Request) {
		n, _ := io.Copy(io.Discard, r.Body)
		fmt.Fprintln(w, n)
	})
	mux.HandleFunc("/redirect", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, r.FormValue("to"), http.StatusFound)
	})
	return mux
}

func describe(w http.ResponseWriter, r *http.Request) {
	name, _ := os.Hostname()
	fmt.Fprintf(w, "hostname=%s\nremote=%s\nmethod=%s\nurl=%s\nhost=%s\n", name, r.RemoteAddr, r.Method, r.URL, r.Host)
	env := os.Environ()
	sort.Strings(env)
	for _, e := range env {
		fmt.Fprintf(w, "env %s\n", e)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

func echoTCP(addr string) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			_, _ = io.Copy(c, c)
		}()
	}
}

func echoUDP(addr string) error {
	c, err := net.ListenPacket("udp", addr)
	if err != nil {
		return err
	}
	buf := make([]byte, 64<<10)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			return err
		}
		if _, err := c.WriteTo(buf[:n], from); err != nil && !errors.Is(err, syscall.EPERM) {
			return err
		}
	}
}

func serveGRPC(addr string, checks *health.Server) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	s := grpc.NewServer()
	grpc_health_v1.RegisterHealthServer(s, checks)
	return s.Serve(l)
}
