package kubestack

import (
	"github.com/prometheus/client_golang/prometheus"
	"sigs.k8s.io/controller-runtime/pkg/metrics"
)

var (
	networksGauge = prometheus.NewGauge(prometheus.GaugeOpts{Name: "h8s_kubestack_networks", Help: "Networks present on this node."})
	portsGauge    = prometheus.NewGauge(prometheus.GaugeOpts{Name: "h8s_kubestack_ports", Help: "Ports of those Networks, on all nodes."})
	servicesGauge = prometheus.NewGauge(prometheus.GaugeOpts{Name: "h8s_kubestack_services", Help: "Services programmed, summed over Networks."})
	syncSeconds   = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "h8s_kubestack_sync_seconds", Help: "Time to apply a Network's state.", Buckets: prometheus.ExponentialBuckets(0.001, 2, 14),
	})
	syncErrors  = prometheus.NewCounter(prometheus.CounterOpts{Name: "h8s_kubestack_sync_errors_total", Help: "Syncs of Networks that failed."})
	callSeconds = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "h8s_kubestack_call_seconds", Help: "Time of calls of the CNI plugin.", Buckets: prometheus.ExponentialBuckets(0.001, 2, 14),
	}, []string{"verb", "code"})
)

func init() {
	metrics.Registry.MustRegister(networksGauge, portsGauge, servicesGauge, syncSeconds, syncErrors, callSeconds)
}
