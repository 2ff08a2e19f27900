package tenants

import (
	"fmt"
	"strings"
	"testing"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// twin is one of two tenants that have the same of everything.
type twin struct {
	*testcluster.Tenant
	ns *testcluster.Namespace
}

// TestTwins: two tenants with the same CIDR and Pods with the same addresses, on the same
// node and on another. Each sees its own Services, DNS, probes, egress and the API server.
func TestTwins(t *testing.T) {
	t.Parallel()
	c := up(t)
	var twins []twin
	for range 2 {
		tn := c.Tenant(t, "--cidr", "192.168.0.0/24")
		twins = append(twins, twin{tn, tn.Namespace("web", "default")})
	}
	for _, w := range twins {
		var docs []string
		for i, node := range c.nodes[:2] {
			for j := range 2 {
				docs = append(docs, pod{
					name: fmt.Sprintf("p%d%d", i, j), node: node, address: fmt.Sprintf("192.168.0.%d", 10+10*i+j),
					app: "web", env: map[string]string{"OWNER": w.Name},
				}.yaml(w.ns.Name))
			}
		}
		w.Apply(join(append(docs, service(w.ns.Name, "web", "web"))...))
	}
	for _, w := range twins {
		w.ns.Ready("p00", "p01", "p10", "p11")
	}
	for i, w := range twins {
		t.Run(fmt.Sprintf("tenant %d", i), func(t *testing.T) { w.sees(t, c) })
	}
	t.Run("crossing", func(t *testing.T) { crossing(t, twins[0], twins[1]) })
	t.Run("probes", func(t *testing.T) { probesApart(t, twins[0], twins[1]) })
}

// strangers asks URLs from a Pod, all in one go, and says what answers were not its tenant's.
func (w twin) strangers(n *testcluster.Namespace, from string, urls ...string) string {
	out, code := n.ExecCode(from, append([]string{"/testbox", "get"}, urls...)...)
	own, all := strings.Count(out, "env OWNER="+w.Name+"\n"), strings.Count(out, "env OWNER=")
	if code == 0 && own == len(urls) && all == own {
		return ""
	}
	return fmt.Sprintf("of %d questions %d were answered, %d by its own (exit code %d): %s", len(urls), all, own, code, out)
}

func (w twin) sees(t *testing.T, c *fabric) {
	beyond, leaving := c.beyond()
	n := w.ns.For(t)
	for pod, want := range map[string]string{"p00": "192.168.0.10", "p01": "192.168.0.11", "p10": "192.168.0.20", "p11": "192.168.0.21"} {
		if ip := n.Get("pod/"+pod, ".status.podIP"); ip != want {
			t.Errorf("%s has the address %s, want %s", pod, ip, want)
		}
	}
	for _, from := range []string{"p00", "p10"} {
		var urls []string
		for _, to := range []string{"192.168.0.10:8080", "192.168.0.11:8080", "192.168.0.20:8080", "192.168.0.21:8080", "web", "web." + n.Name, "web." + n.Name + ".svc.cluster.local"} {
			urls = append(urls, "http://"+to+"/")
		}
		if got := w.strangers(n, from, urls...); got != "" {
			t.Errorf("%s: %s", from, got)
		}
		if line := n.Exec(from, "/testbox", "dial", "udp", "web:81"); line != "hello" {
			t.Errorf("%s: UDP through the Service: %q", from, line)
		}
		want(t, n, from, "http://192.168.0.11:8080/clientip", n.Get("pod/"+from, ".status.podIP"))
		// Out, under a node's address or the router's.
		if ip, ok := get(n, from, "http://"+beyond+":8080/clientip"); !ok || !strings.HasPrefix(ip, leaving) {
			t.Errorf("%s: egress: %q %v", from, ip, ok)
		}
		sa := "/var/run/secrets/kubernetes.io/serviceaccount/"
		answer, code := n.ExecCode(from, "/testbox", "get", "-ca", sa+"ca.crt", "-token", sa+"token", "https://kubernetes.default/version")
		if code != 0 || !strings.Contains(answer, "gitVersion") {
			t.Errorf("%s: API server: %s", from, answer)
		}
	}
	if got, ok := c.out.get("http://192.168.0.10:8080/"); ok {
		t.Errorf("a Pod's address answers from outside: %s", got)
	}
	if log := n.Logs("p00"); !strings.Contains(log, "serving") {
		t.Errorf("logs: %q", log)
	}
	forward := n.Start("port-forward", "pod/p10", ":8080")
	defer forward.Stop()
	forward.Expect(`127\.0\.0\.1:(\d+) -> 8080`)
}

// crossing looks for anything of one tenant that the other can see.
func crossing(t *testing.T, a, b twin) {
	for _, dir := range [][2]twin{{a, b}, {b, a}} {
		from, to := dir[0].ns.For(t), dir[1].ns
		ip := to.Get("service/web", ".spec.clusterIP")
		silent(t, from, "p00", "http://"+ip+"/")
		for _, name := range []string{"web." + to.Name, "web." + to.Name + ".svc.cluster.local", "kube-dns.kube-system.svc.cluster.local"} {
			if out, code := from.ExecCode("p00", "/testbox", "lookup", name); code == 0 {
				t.Errorf("%s is known as %s", name, out)
			}
		}
		if out, code := from.ExecCode("p00", "/testbox", "lookup", "-type", "PTR", ip); code == 0 {
			t.Errorf("%s is known as %s", ip, out)
		}
	}
	report, err := a.TryH8S("network", "check", a.ns.Name+"/p00", b.ns.Name+"/p00", "--port", "8080")
	if err == nil || !strings.Contains(report, "Networks do not reach each other") {
		t.Errorf("h8s network check: %v\n%s", err, report)
	}
}

// probesApart makes one of two Pods with the same address on the same node sick: only its
// own readiness changes.
func probesApart(t *testing.T, a, b twin) {
	sick, well := a.ns.For(t), b.ns.For(t)
	get(sick, "p01", "http://192.168.0.10:8080/sick")
	sick.Wait("pod/p00", "condition=Ready=false")
	if got := well.Get("pod/p00", `.status.conditions[?(@.type=="Ready")].status`); got != "True" {
		t.Errorf("the other tenant's Pod of the same address is Ready=%s", got)
	}
	sick.Until("the Service no longer leads to the sick Pod", testcluster.Patience, func() bool {
		return !strings.Contains(sick.Kubectl("get", "endpointslices", "-o", `jsonpath={.items[*].endpoints[?(@.conditions.ready==true)].addresses[0]}`), "192.168.0.10")
	})
	events := sick.Kubectl("get", "events", "--field-selector", "involvedObject.name=p00,reason=Unhealthy", "-o", "jsonpath={.items[*].message}")
	if !strings.Contains(events, "statuscode: 503") {
		t.Errorf("the event does not say what the kubelet would: %q", events)
	}
}
