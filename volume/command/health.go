package command

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"google.golang.org/grpc/codes"

	"github.com/hypernetes/hypernetes/volume/driver"
)

// metrics of one process.
type metrics struct {
	registry                  *prometheus.Registry
	calls                     *prometheus.HistogramVec
	registrations             *prometheus.GaugeVec
	publications, placeholder prometheus.Gauge
}

func newMetrics() *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		calls: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "h8s_csi_call_seconds", Help: "Time of CSI calls.", Buckets: prometheus.ExponentialBuckets(0.001, 3, 12),
		}, []string{"driver", "method", "code"}),
		registrations: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "h8s_csi_registered", Help: "1 if the kubelet has the driver."}, []string{"driver"}),
		publications:  prometheus.NewGauge(prometheus.GaugeOpts{Name: "h8s_csi_publications", Help: "Volumes that Pods of this node have, as last collected."}),
		placeholder:   prometheus.NewGauge(prometheus.GaugeOpts{Name: "h8s_csi_placeholders", Help: "Placeholders on this node, as last collected."}),
	}
	m.registry.MustRegister(m.calls, m.registrations, m.publications, m.placeholder,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

func (m *metrics) observe(name string) driver.Observe {
	return func(method string, code codes.Code, took time.Duration) {
		m.calls.WithLabelValues(name, method, code.String()).Observe(took.Seconds())
	}
}

func (m *metrics) registered(name string) func(bool) {
	gauge := m.registrations.WithLabelValues(name)
	return func(ok bool) {
		gauge.Set(0)
		if ok {
			gauge.Set(1)
		}
	}
}

func (m *metrics) collected(publications, placeholders int) {
	m.publications.Set(float64(publications))
	m.placeholder.Set(float64(placeholders))
}

// serveHealth serves until ctx ends: /healthz is that the process answers, /readyz that
// what it is for works.
func serveHealth(ctx context.Context, address string, m *metrics, ready func() error) error {
	if address == "" {
		<-ctx.Done()
		return nil
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("/readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	mux.Handle("/metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{}))
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
	if err != nil {
		return fmt.Errorf("--health-address: %w", err)
	}
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second, MaxHeaderBytes: 16 << 10}
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	select {
	case <-ctx.Done():
		_ = server.Close()
		<-done
		return nil
	case err := <-done:
		if errors.Is(err, http.ErrServerClosed) {
			return nil
		}
		return fmt.Errorf("--health-address: %w", err)
	}
}
