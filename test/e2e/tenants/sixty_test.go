package tenants

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// TestSixty runs 60 virtual machines of two tenants with equal addresses on three nodes,
// and lets each find all of its own and none of the other's.
func TestSixty(t *testing.T) {
	c := up(t)
	const each = 30
	began := time.Now()
	var twins []twin
	for range 2 {
		tn := c.Tenant(t, "--cidr", "192.168.0.0/24")
		w := twin{tn, tn.Namespace("many", "default")}
		twins = append(twins, w)
		w.Apply(join(fmt.Sprintf(`apiVersion: apps/v1
kind: Deployment
metadata: {name: many, namespace: %s}
spec:
  replicas: %d
  selector: {matchLabels: {app: many}}
  template:
    metadata: {labels: {app: many}}
    spec:
      terminationGracePeriodSeconds: 1
      topologySpreadConstraints:
      - {maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: DoNotSchedule, labelSelector: {matchLabels: {app: many}}}
      containers:
      - name: main
        image: h8s.local/testbox:1
        args: [serve]
        env: [{name: OWNER, value: %s}]
        resources: {requests: {cpu: 1m, memory: 16Mi}, limits: {memory: 48Mi}}
`, w.ns.Name, each, w.Name), service(w.ns.Name, "many", "many")))
	}
	for _, w := range twins {
		w.ns.Until("60 Pods are ready", 15*time.Minute, func() bool {
			_, err := w.ns.Try("rollout", "status", "deployment/many", "--timeout=2m")
			return err == nil
		})
	}
	t.Logf("60 Pods ready after %.0f s", time.Since(began).Seconds())
	for _, w := range twins {
		n := w.ns
		ips := strings.Fields(n.Kubectl("get", "pods", "-l", "app=many", "-o", "jsonpath={.items[*].status.podIP}"))
		names := strings.Fields(n.Kubectl("get", "pods", "-l", "app=many", "-o", "jsonpath={.items[*].metadata.name}"))
		if len(ips) != each {
			t.Fatalf("%s has %d Pods", n.Name, len(ips))
		}
		var urls []string
		for _, ip := range ips {
			urls = append(urls, "http://"+ip+":8080/")
		}
		for range 10 {
			urls = append(urls, "http://many/")
		}
		if got := w.strangers(n, names[0], urls...); got != "" {
			t.Errorf("%s: %s", n.Name, got)
		}
	}
	before := time.Now()
	for _, w := range twins {
		w.ns.Kubectl("delete", "deployment", "many", "--cascade=foreground", "--timeout=5m")
		w.ns.Kubectl("wait", "pods", "--for=delete", "-l", "app=many", "--timeout=5m")
	}
	t.Logf("60 Pods gone after %.0f s", time.Since(before).Seconds())
	for _, w := range twins {
		w.ns.Until("their Ports are released", testcluster.Patience, func() bool {
			return strings.TrimSpace(w.Cluster.Kubectl(t, "-n", w.Home(), "get", "ports", "-o", "name")) == ""
		})
	}
}
