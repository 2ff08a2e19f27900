package tenants

import (
	"fmt"
	"strings"
	"testing"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// light are the flags of a tenant whose Pods may be plain containers: what is looked at
// is the network, which does not care, and they start at once.
var light = []string{"--runtime-class", "hyper", "--runtime-class", "runc"}

// TestServices goes through what a Service can be, in one tenant on two nodes.
func TestServices(t *testing.T) {
	t.Parallel()
	c := up(t)
	tn := c.Tenant(t, light...)
	n := tn.Namespace("web", "default")
	testcluster.ApplyText(t, c.Cluster, fmt.Sprintf(`apiVersion: hypernetes.io/v1alpha1
kind: AddressPool
metadata: {name: %s}
spec: {addresses: ["100.64.0.210-100.64.0.219"], tenants: [%s], quarantineSeconds: 0}
`, tn.Name, tn.Name))
	t.Cleanup(func() {
		if out, err := c.TryKubectl("delete", "addresspool", tn.Name, "--wait=false"); err != nil {
			t.Errorf("clean up: %v\n%s", err, out)
		}
	})
	tn.Apply(join(
		pod{name: "a", node: c.Node, app: "web", runtime: "runc"}.yaml(n.Name),
		pod{name: "b", node: c.Node + "-2", app: "web", runtime: "runc"}.yaml(n.Name),
		pod{name: "client", node: c.Node, runtime: "runc"}.yaml(n.Name),
		service(n.Name, "web", "web"),
		fmt.Sprintf(`apiVersion: v1
kind: Service
metadata: {name: headless, namespace: %[1]s}
spec: {clusterIP: None, selector: {app: web}, ports: [{name: http, port: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: elsewhere, namespace: %[1]s}
spec: {type: ExternalName, externalName: web.%[1]s.svc.cluster.local}
---
apiVersion: v1
kind: Service
metadata: {name: sticky, namespace: %[1]s}
spec: {selector: {app: web}, sessionAffinity: ClientIP, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: front, namespace: %[1]s}
spec:
  type: LoadBalancer
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: 8080}, {name: echo, port: 81, targetPort: 8081, protocol: UDP}]
---
apiVersion: v1
kind: Service
metadata: {name: local, namespace: %[1]s}
spec:
  type: LoadBalancer
  externalTrafficPolicy: Local
  selector: {app: web}
  ports: [{port: 80, targetPort: 8080}]
---
apiVersion: v1
kind: Service
metadata: {name: guarded, namespace: %[1]s}
spec:
  type: LoadBalancer
  loadBalancerSourceRanges: [198.51.100.0/24]
  selector: {app: web}
  ports: [{port: 80, targetPort: 8080}]
`, n.Name)))
	n.Ready("a", "b", "client")
	n.Until("both Pods are endpoints", testcluster.Patience, func() bool {
		return len(strings.Fields(n.Kubectl("get", "endpointslices", "-l", "kubernetes.io/service-name=web", "-o", "jsonpath={.items[*].endpoints[*].addresses[0]}"))) == 2
	})
	t.Run("spread", func(t *testing.T) {
		seen := map[string]int{}
		n.For(t).Until("the Service leads to both", testcluster.Patience, func() bool {
			name, _ := get(n, "client", "http://web/hostname")
			seen[name]++
			return seen["a"] > 0 && seen["b"] > 0
		})
	})
	t.Run("affinity", func(t *testing.T) {
		first, _ := get(n, "client", "http://sticky/hostname")
		for range 8 {
			want(t, n.For(t), "client", "http://sticky/hostname", first)
		}
	})
	t.Run("names", func(t *testing.T) { names(t, n.For(t)) })
	t.Run("hairpin", func(t *testing.T) {
		n.For(t).Until("a Pod reaches itself through its Service", testcluster.Patience, func() bool {
			name, ok := get(n, "a", "http://web/hostname")
			return ok && name == "a"
		})
	})
	t.Run("load balancer", func(t *testing.T) { balanced(t, n.For(t), c.out) })
	t.Run("floating address", func(t *testing.T) { floating(t, tn, n.For(t), c) })
	t.Run("refused", func(t *testing.T) { refusedServices(t, n.For(t)) })
}

func names(t *testing.T, n *testcluster.Namespace) {
	a, b := n.Get("pod/a", ".status.podIP"), n.Get("pod/b", ".status.podIP")
	lookup := func(args ...string) string {
		return n.Exec("client", append([]string{"/testbox", "lookup"}, args...)...)
	}
	if got := lookup("headless"); !strings.Contains(got, a) || !strings.Contains(got, b) {
		t.Errorf("headless is %q, want %s and %s", got, a, b)
	}
	if got := lookup("-type", "SRV", "_http._tcp.headless."+n.Name+".svc.cluster.local"); strings.Count(got, ":8080") != 2 {
		t.Errorf("SRV of headless: %q", got)
	}
	ip := n.Get("service/web", ".spec.clusterIP")
	if got := lookup("-type", "PTR", ip); got != "web."+n.Name+".svc.cluster.local." {
		t.Errorf("PTR of %s: %q", ip, got)
	}
	if got := lookup("elsewhere"); got != ip {
		t.Errorf("ExternalName is %q, want %s", got, ip)
	}
}

// external waits for the address of a Service from its pool.
func external(n *testcluster.Namespace, name string) string {
	n.Wait("service/"+name, "jsonpath={.status.loadBalancer.ingress[0].ip}")
	return n.Get("service/"+name, ".status.loadBalancer.ingress[0].ip")
}

func balanced(t *testing.T, n *testcluster.Namespace, out *outside) {
	front, local, guarded := external(n, "front"), external(n, "local"), external(n, "guarded")
	for _, ip := range []string{front, local} {
		n.Until("the address "+ip+" answers from outside", testcluster.Patience, func() bool {
			name, ok := out.get("http://" + ip + "/hostname")
			return ok && (name == "a" || name == "b")
		})
	}
	if line, err := out.run("dial", "udp", front+":81"); err != nil || line != "hello" {
		t.Errorf("UDP from outside: %q %v", line, err)
	}
	if ip, ok := out.get("http://" + local + "/clientip"); !ok || ip != outsideAddress {
		t.Errorf("externalTrafficPolicy Local: the Pod sees %q, want %s", ip, outsideAddress)
	}
	if got, ok := out.get("http://" + guarded + "/hostname"); ok {
		t.Errorf("loadBalancerSourceRanges let it through to %s", got)
	}
	if name, ok := get(n, "client", "http://"+front+"/hostname"); !ok || name != "a" && name != "b" {
		t.Errorf("from inside: %q %v", name, ok)
	}
}

func floating(t *testing.T, tn *testcluster.Tenant, n *testcluster.Namespace, c *fabric) {
	beyond, _ := c.beyond()
	tn.Apply(fmt.Sprintf("apiVersion: hypernetes.io/v1alpha1\nkind: FloatingIP\nmetadata: {name: b, namespace: %s}\nspec: {pod: {namespace: %s, name: b}}\n", tn.Home(), n.Name))
	tn.Kubectl(t, "-n", tn.Home(), "wait", "floatingip/b", "--for=jsonpath={.status.phase}=Active", "--timeout=60s")
	ip := strings.TrimSpace(tn.Kubectl(t, "-n", tn.Home(), "get", "floatingip/b", "-o", "jsonpath={.status.address}"))
	n.Until("the floating address answers from outside", testcluster.Patience, func() bool {
		name, ok := c.getFloating("http://" + ip + ":8080/hostname")
		return ok && name == "b"
	})
	want(t, n, "b", "http://"+beyond+":8080/clientip", ip)
}

func refusedServices(t *testing.T, n *testcluster.Namespace) {
	for field, spec := range map[string]string{
		"externalIPs": "externalIPs: [8.8.8.8]", "NodePort": "type: NodePort",
	} {
		out, err := n.Try("create", "--dry-run=server", "-f", manifestFile(t, fmt.Sprintf("apiVersion: v1\nkind: Service\nmetadata: {name: x}\nspec:\n  %s\n  selector: {app: web}\n  ports: [{port: 80}]\n", spec)))
		if err == nil || !strings.Contains(err.Error()+out, field) {
			t.Errorf("%s: %s %v", field, out, err)
		}
	}
}

// TestLoadBalancerOfNobody: a Service outside tenants' namespaces has an address that
// answers, too. Not beside others: its pool is everybody's.
func TestLoadBalancerOfNobody(t *testing.T) {
	c := up(t)
	n := c.Namespace(t)
	testcluster.ApplyText(t, c.Cluster, fmt.Sprintf(`apiVersion: hypernetes.io/v1alpha1
kind: AddressPool
metadata: {name: %[1]s}
spec: {addresses: ["100.64.0.205-100.64.0.207"]}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: %[1]s, labels: {app: web}}
spec:
  runtimeClassName: runc
  terminationGracePeriodSeconds: 1
  containers: [{name: main, image: "h8s.local/testbox:1", args: [serve]}]
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: %[1]s}
spec: {type: LoadBalancer, selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
`, n.Name))
	defer c.Kubectl(t, "delete", "addresspool", n.Name, "--wait=false")
	n.Ready("web")
	ip := external(n, "web")
	answers := func() bool {
		name, ok := c.out.get("http://" + ip + "/hostname")
		return ok && name == "web"
	}
	n.Until("the address "+ip+" answers from outside", testcluster.Patience, answers)
	n.Kubectl("delete", "service", "web")
	n.Until("the address "+ip+" does not answer any more", testcluster.Patience, func() bool { return !answers() })
}
