package keystone

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics of reviews.
type Metrics struct {
	reviews  *prometheus.CounterVec
	answers  *prometheus.CounterVec
	failures prometheus.Counter
	latency  prometheus.Histogram
	breaker  prometheus.Gauge
}

// NewMetrics registers them, if r is not nil. Those that are registered already are used.
func NewMetrics(r prometheus.Registerer) *Metrics {
	return &Metrics{
		reviews: register(r, prometheus.NewCounterVec(prometheus.CounterOpts{Name: "h8s_keystone_reviews_total",
			Help: "Tokens reviewed, by where the answer came from: hit, negative hit, miss, implausible."}, []string{"from"})),
		answers: register(r, prometheus.NewCounterVec(prometheus.CounterOpts{Name: "h8s_keystone_answers_total",
			Help: "Answers to the API server: authenticated, unknown, refused, unavailable, malformed."}, []string{"answer"})),
		failures: register(r, prometheus.NewCounter(prometheus.CounterOpts{Name: "h8s_keystone_failures_total",
			Help: "Questions Keystone did not answer, or that were not put because it did not answer before."})),
		latency: register(r, prometheus.NewHistogram(prometheus.HistogramOpts{Name: "h8s_keystone_request_seconds",
			Help: "How long Keystone took to validate a token.", Buckets: prometheus.ExponentialBuckets(0.005, 2, 11)})),
		breaker: register(r, prometheus.NewGauge(prometheus.GaugeOpts{Name: "h8s_keystone_breaker_open",
			Help: "1 while Keystone is not asked because it did not answer."})),
	}
}

func register[C prometheus.Collector](r prometheus.Registerer, c C) C {
	if r == nil {
		return c
	}
	var there prometheus.AlreadyRegisteredError
	if err := r.Register(c); errors.As(err, &there) {
		if old, ok := there.ExistingCollector.(C); ok {
			return old
		}
	}
	return c
}
