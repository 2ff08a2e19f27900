package cli

import (
	"bytes"
	"strings"
	"testing"

	"github.com/hypernetes/hypernetes/test/controlplane"
)

// TestAgainstAPIServer has the real server accept what the commands write, and they read
// what it answers. No controller runs, so nothing is waited for.
func TestAgainstAPIServer(t *testing.T) {
	file := controlplane.Kubeconfig(t, controlplane.Start(t))
	run := func(want, stdin string, args ...string) {
		t.Helper()
		var out bytes.Buffer
		root := newRoot()
		root.SetArgs(append(args, "--kubeconfig", file))
		root.SetIn(strings.NewReader(stdin))
		root.SetOut(&out)
		root.SetErr(&out)
		err := root.ExecuteContext(t.Context())
		if err != nil {
			out.WriteString(err.Error())
		}
		if !strings.Contains(out.String(), want) {
			t.Errorf("h8s %s: %s\nwant %q", strings.Join(args, " "), out.String(), want)
		}
	}
	run("tenant blue created", "", "tenant", "create", "blue", "--wait=false", "--project-id", "065f210a2ca9442aad898ab129426350", "--cidr", "192.168.0.0/24",
		"--cidr", "fd00:7::/64", "--quota", "networks=2,cpu=8,container.limit.memory=1Gi", "--owner", "ann", "--pod-security", "restricted", "--runtime-class", "hyper")
	run("tenant blue is there already", "", "tenant", "create", "blue", "--wait=false")
	run("is not a tenant's user", "", "tenant", "create", "red", "--wait=false", "--owner", "system:admin")
	run("2     the tenant", "", "tenant", "quota", "blue")
	run("3     the tenant", "", "tenant", "quota", "blue", "networks=3", "cpu=", "container.limit.memory=", "pods=7")
	run("Pod security:    restricted", "", "tenant", "describe", "blue")
	run("065f210a2ca9442aad898ab129426350", "", "tenant", "list")
	run("namespaces/tenant-blue applied", "{apiVersion: v1, kind: Namespace, metadata: {name: tenant-blue}}", "apply", "-f", "-")
	run("tenant-blue/networks/net1 applied", "", "apply", "-f", "../examples/tenant-network/network.yaml", "--wait=false")
	run("tenant-blue/tenantnamespaces/ns1 applied", "", "apply", "-f", "../examples/tenant-network/namespace.yaml", "--wait=false")
	run("default/deployments/helloworld-with-annotation applied", "", "apply", "-f", "../examples/injection/seed.yaml")
	run("cidr: 10.0.0.1/8: want a network like", "{apiVersion: v1, kind: Network, metadata: {name: bad}, spec: {tenantID: blue, subnets: {a: {cidr: 10.0.0.1/8}}}}", "apply", "-f", "-")
	run("192.168.0.0/24", "", "network", "list", "-A")
	run("Tenant:          blue", "", "network", "describe", "net1")
	run("tenants/test would be applied", "{apiVersion: stackube.kubernetes.io/v1, kind: Tenant, metadata: {name: test}, spec: {username: u, password: p}}", "apply", "-f", "-", "--dry-run", "--tenant", "blue")
	run("tenants/test applied", "{apiVersion: stackube.kubernetes.io/v1, kind: Tenant, metadata: {name: test}, spec: {username: u, password: p}}", "apply", "-f", "-", "--timeout", "20ms")
	run("nobody approved certificate request h8s-blue-", "", "tenant", "kubeconfig", "blue", "--user", "ann", "--role", "member", "--timeout", "20ms")
	run("there is no Pod default/a", "", "network", "check", "a", "b")
	run("tenant blue is gone", "", "tenant", "delete", "blue", "--yes")
}
