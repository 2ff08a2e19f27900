package examples

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// tenant removes what an example makes, before (an earlier run's) and after.
func tenant(t *testing.T, c *testcluster.Cluster, name string) {
	t.Helper()
	remove := func() {
		if out, err := c.TryH8S("tenant", "delete", name, "--yes"); err != nil && !strings.Contains(out, "no tenant") {
			t.Errorf("h8s tenant delete %s: %v\n%s", name, err, out)
		}
	}
	remove()
	t.Cleanup(remove)
}

// inside fails the test unless all addresses are of the CIDR.
func inside(t *testing.T, cidr, addresses string, count int) {
	t.Helper()
	all := strings.Fields(addresses)
	if len(all) != count {
		t.Errorf("want %d addresses, there are %q", count, all)
	}
	for _, a := range all {
		if ip, err := netip.ParseAddr(a); err != nil || !netip.MustParsePrefix(cidr).Contains(ip) {
			t.Errorf("%s is not of %s", a, cidr)
		}
	}
}

func TestTenantNetwork(t *testing.T) {
	t.Parallel()
	c := testcluster.Up(t)
	// A second tenant has the same of everything, under other names.
	other := t.TempDir()
	for _, file := range []string{"namespace.yaml", "network.yaml", "nginx.yaml"} {
		text, err := os.ReadFile(manifest("tenant-network", file))
		if err != nil {
			t.Fatal(err)
		}
		changed := strings.NewReplacer("ns1", "ns2", "065f210a2ca9442aad898ab129426350", "green", "replicas: 2", "replicas: 1").Replace(string(text))
		if err := os.WriteFile(filepath.Join(other, file), []byte(changed), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	pods := map[string]string{}
	spaces := []struct {
		tenant, namespace, folder string
		flags                     []string
		replicas                  int
	}{
		{"blue", "ns1", manifest("tenant-network"), []string{"--project-id", "065f210a2ca9442aad898ab129426350"}, 2},
		{"green", "ns2", other, nil, 1},
	}
	for _, s := range spaces {
		tenant(t, c, s.tenant)
		c.H8S(t, append([]string{"tenant", "create", s.tenant, "--wait"}, s.flags...)...)
		contains(t, "notes", c.H8S(t, "apply", "-f", s.folder),
			"became networks.hypernetes.io net1 in tenant-"+s.tenant,
			"became tenantnamespaces.hypernetes.io "+s.namespace+" in tenant-"+s.tenant)
		contains(t, "networks", c.Kubectl(t, "-n", "tenant-"+s.tenant, "get", "networks", "net1"), "net1", "192.168.0.0/24", "Active")
	}
	for _, s := range spaces {
		in := func(args ...string) string { return c.Kubectl(t, append([]string{"-n", s.namespace}, args...)...) }
		in("rollout", "status", "deployment/nginx", "--timeout="+testcluster.Patience.String())
		inside(t, "192.168.0.0/24", in("get", "pods", "-o", "jsonpath={.items[*].status.podIP}"), s.replicas)
		contains(t, "page", in("exec", "deploy/nginx", "--", "wget", "-qO-", "http://nginx:8078/"), "Welcome to nginx!")
		pods[s.namespace] = s.namespace + "/" + in("get", "pods", "-o", "jsonpath={.items[0].metadata.name}")
	}
	report, err := c.TryH8S("network", "check", pods["ns1"], pods["ns2"])
	if err == nil {
		t.Error("h8s network check finds a way to another tenant's Pod")
	}
	contains(t, "h8s network check", report, "Networks do not reach each other")
}

func TestStackube(t *testing.T) {
	t.Parallel()
	c := testcluster.Up(t)
	tenant(t, c, "test")
	contains(t, "notes", c.H8S(t, "apply", "-f", manifest("stackube")),
		"became tenants.hypernetes.io test", "spec.password dropped", "h8s tenant kubeconfig test --user test --role manager")
	contains(t, "networks", c.Kubectl(t, "-n", "tenant-test", "get", "networks", "test"), "192.168.244.0/24", "Active")
	c.Kubectl(t, "-n", "test", "wait", "--for=condition=Ready", "pod/web", "--timeout="+testcluster.Patience.String())
	inside(t, "192.168.244.0/24", c.Kubectl(t, "-n", "test", "get", "pod", "web", "-o", "jsonpath={.status.podIP}"), 1)
	contains(t, "page", c.Kubectl(t, "-n", "test", "exec", "web", "--", "wget", "-qO-", "http://web/"), "Welcome to nginx!")
	file := filepath.Join(t.TempDir(), "test.kubeconfig")
	c.H8S(t, "tenant", "kubeconfig", "test", "--user", "test", "--role", "manager", "-o", file)
	if out, err := c.As(file, "-n", "test", "get", "pods"); err != nil || !strings.Contains(out, "web") {
		t.Errorf("the user's get pods: %v %s", err, out)
	}
	if out, err := c.As(file, "get", "namespaces"); err == nil || !strings.Contains(out, "Forbidden") {
		t.Errorf("the user's get namespaces: %v %s", err, out)
	}
}

func TestInjection(t *testing.T) {
	t.Parallel()
	c := testcluster.Up(t)
	n := c.Namespace(t)
	contains(t, "notes", c.H8S(t, "apply", "--namespace", n.Name, "-f", manifest("injection")), "helloworld-with-annotation: apps/v1beta1 is not served any more; became apps/v1")
	for _, name := range []string{"helloworld", "helloworld-with-annotation"} {
		n.Kubectl("rollout", "status", "deployment/"+name, "--timeout="+testcluster.Patience.String())
		contains(t, "pods of "+name, n.Kubectl("get", "pods", "-l", "app="+name), "2/2")
		if names := n.Get("deployment/"+name, ".spec.template.spec.containers[*].name"); names != "helloworld" {
			t.Errorf("deployment/%s did not stay as written: %s", name, names)
		}
	}
	n.Until("the agent prints what the application wrote", time.Minute, func() bool {
		out, err := n.Try("logs", "deployment/helloworld", "-c", "logging-agent")
		return err == nil && strings.HasPrefix(out, "helloworld.log:")
	})
	// It cannot be read: the next Pod comes as written, and the Deployment says why.
	n.Kubectl("patch", "configmap", "logging-agent-initializer", "-p", `{"data":{"config":"containers: [{name: UPPER"}}`)
	n.Kubectl("scale", "deployment/helloworld", "--replicas=0")
	n.Kubectl("wait", "--for=delete", "pod", "-l", "app=helloworld", "--timeout="+testcluster.Patience.String())
	n.Kubectl("scale", "deployment/helloworld", "--replicas=1")
	n.Kubectl("rollout", "status", "deployment/helloworld", "--timeout="+testcluster.Patience.String())
	contains(t, "pods", n.Kubectl("get", "pods", "-l", "app=helloworld"), "1/1")
	n.Until("the Deployment has an event", time.Minute, func() bool {
		out := n.Kubectl("describe", "deployment", "helloworld")
		return strings.Contains(out, "InjectionFailed") && strings.Contains(out, "ConfigMap logging-agent-initializer") && strings.Contains(out, "created as written")
	})
}
