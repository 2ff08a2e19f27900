package testcluster

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Tenant is a tenant of one test's own.
type Tenant struct {
	*Cluster
	Name string
	t    testing.TB
}

// Tenant makes a tenant, given further flags of `h8s tenant create`, which is deleted
// with all that it has when the test ends.
func (c *Cluster) Tenant(t testing.TB, flags ...string) *Tenant {
	t.Helper()
	var raw [3]byte
	_, _ = rand.Read(raw[:])
	tn := &Tenant{Cluster: c, Name: "t" + hex.EncodeToString(raw[:]), t: t}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), Patience)
		defer cancel()
		if t.Failed() {
			tn.dump(ctx)
		}
		if out, err := c.TryH8S("tenant", "delete", tn.Name, "--yes"); err != nil && !strings.Contains(out, "H8S_NOT_FOUND") {
			t.Errorf("clean up: h8s tenant delete %s: %v\n%s", tn.Name, err, out)
		}
	})
	// What is half made is cleaned up, too.
	c.H8S(t, append([]string{"tenant", "create", tn.Name, "--wait"}, flags...)...)
	return tn
}

// Home is the tenant's home namespace.
func (tn *Tenant) Home() string { return "tenant-" + tn.Name }

// Network makes a Network with the given CIDRs and waits for it.
func (tn *Tenant) Network(name string, cidrs ...string) {
	tn.t.Helper()
	var subnets strings.Builder
	for i, cidr := range cidrs {
		fmt.Fprintf(&subnets, "    s%d: {cidr: %q}\n", i, cidr)
	}
	tn.Apply(fmt.Sprintf("apiVersion: hypernetes.io/v1alpha1\nkind: Network\nmetadata: {name: %s, namespace: %s}\nspec:\n  subnets:\n%s", name, tn.Home(), &subnets))
	tn.Kubectl(tn.t, "-n", tn.Home(), "wait", "network/"+name, "--for=jsonpath={.status.phase}=Active", "--timeout="+Patience.String())
}

// Apply applies manifests as the operator.
func (tn *Tenant) Apply(manifests string) {
	tn.t.Helper()
	ApplyText(tn.t, tn.Cluster, manifests)
}

// ApplyText applies manifests.
func ApplyText(t testing.TB, c *Cluster, manifests string) {
	t.Helper()
	if err := TryApplyText(t, c, manifests); err != nil {
		t.Fatal(err)
	}
}

// TryApplyText applies manifests; a refusal is the caller's to judge.
func TryApplyText(t testing.TB, c *Cluster, manifests string) error {
	t.Helper()
	file := filepath.Join(t.TempDir(), "manifests.yaml")
	if err := os.WriteFile(file, []byte(manifests), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := c.try(t.Context(), "apply", "--server-side", "--force-conflicts", "-f", file)
	return err
}

// Namespace makes a Namespace of the tenant, bound to a Network. It goes with the tenant.
func (tn *Tenant) Namespace(suffix, network string) *Namespace {
	tn.t.Helper()
	n := &Namespace{Cluster: tn.Cluster, Name: tn.Name + "-" + suffix, t: tn.t}
	tn.Apply(fmt.Sprintf("apiVersion: hypernetes.io/v1alpha1\nkind: TenantNamespace\nmetadata: {name: %s, namespace: %s}\nspec: {network: %s}\n", n.Name, tn.Home(), network))
	tn.Kubectl(tn.t, "-n", tn.Home(), "wait", "tenantnamespace/"+n.Name, "--for=jsonpath={.status.phase}=Bound", "--timeout="+Patience.String())
	n.awaitDefaultAccount()
	tn.t.Cleanup(func() {
		if tn.t.Failed() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			n.dump(ctx)
		}
	})
	return n
}

// Kubeconfig is a kubeconfig of a user of the tenant.
func (tn *Tenant) Kubeconfig(user, role string) string {
	tn.t.Helper()
	file := filepath.Join(tn.t.TempDir(), user+".kubeconfig")
	tn.H8S(tn.t, "tenant", "kubeconfig", tn.Name, "--user", user, "--role", role, "-o", file)
	return file
}

// TryKubectl runs kubectl, also when the test is over.
func (c *Cluster) TryKubectl(args ...string) (string, error) {
	return c.try(context.Background(), args...)
}

// As runs kubectl with a kubeconfig and returns stdout and stderr together.
func (c *Cluster) As(kubeconfig string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := c.command(ctx, append([]string{"kubectl", "--name", c.Node, "--kubeconfig", kubeconfig}, args...)...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// dump prints what there is of the tenant.
func (tn *Tenant) dump(ctx context.Context) {
	for _, args := range [][]string{
		{"describe", "tenant", tn.Name},
		{"-n", tn.Home(), "get", "networks,ports,tenantnamespaces,floatingips", "-o", "wide"},
		{"-n", tn.Home(), "get", "events", "--sort-by=.lastTimestamp"},
	} {
		out, err := tn.try(ctx, args...)
		if err != nil {
			out += err.Error()
		}
		tn.t.Logf("kubectl %s\n%s", strings.Join(args, " "), tail(out, 16<<10))
	}
	for _, log := range []string{"kubestack.log", "h8s-controller.log"} {
		if b, err := os.ReadFile(filepath.Join("/var/lib/h8s", tn.Node, "log", log)); err == nil {
			tn.t.Logf("%s ends with:\n%s", log, tail(string(b), 8<<10))
		}
	}
}
