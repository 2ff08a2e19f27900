package tenants

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// refusal is something asked for that must not be had: one message names what is wrong and
// what to do, and everything is as it was.
type refusal struct {
	// ask is YAML of an object; it may use NS, HOME and TENANT.
	ask string
	// says are words of the message, never those it must not have.
	says  []string
	never []string
}

// TestRefused asks for all that is refused outright.
func TestRefused(t *testing.T) {
	t.Parallel()
	c := up(t)
	tn := c.Tenant(t, "--runtime-class", "hyper,runc", "--quota", "namespaces=2,networks=3,ports=3,floatingips=0")
	other := c.Tenant(t, light...)
	tn.Network("second", "10.8.0.0/24")
	tn.Network("third", "10.9.0.0/24")
	n := tn.Namespace("web", "default")
	tn.Namespace("more", "default")
	other.Namespace("secret", "default")
	other.Network("theirs", "10.33.0.0/24")
	tn.Apply(join(
		claimed(tn.Home(), "default", "10.0.0.50"), claimed(tn.Home(), "second", "10.8.0.50"), claimed(tn.Home(), "third", "10.9.0.50"),
	))
	place := strings.NewReplacer("HOME", tn.Home(), "TENANT", tn.Name, "NS", n.Name, "OTHER", other.Name)
	before := state(t, tn, n)
	for name, r := range refusals {
		t.Run(name, func(t *testing.T) {
			file := manifestFile(t, place.Replace(r.ask))
			out, err := c.TryKubectl("create", "-f", file)
			if err == nil {
				t.Fatalf("it was had: %s", out)
			}
			message := err.Error()
			for _, w := range r.says {
				if w = place.Replace(w); !strings.Contains(message, w) {
					t.Errorf("%q misses %q", message, w)
				}
			}
			for _, w := range append(r.never, "try again", "panic", "<nil>: Invalid value: null") {
				if w = place.Replace(w); strings.Contains(message, w) {
					t.Errorf("%q has %q", message, w)
				}
			}
		})
	}
	t.Run("changes", func(t *testing.T) { refusedChanges(t, tn, n) })
	if after := state(t, tn, n); after != before {
		t.Errorf("what was refused changed something:\n%s\nbefore:\n%s", after, before)
	}
}

// state is what a tenant has, Pods too.
func state(t *testing.T, tn *testcluster.Tenant, n *testcluster.Namespace) string {
	t.Helper()
	const columns = "custom-columns=K:.kind,N:.metadata.name,S:.spec"
	return tn.Kubectl(t, "-n", tn.Home(), "get", "networks,ports,tenantnamespaces,floatingips", "-o", columns) +
		n.Kubectl("get", "pods,services", "-o", columns)
}

func claimed(home, network, address string) string {
	return fmt.Sprintf("apiVersion: hypernetes.io/v1alpha1\nkind: Port\nmetadata: {name: %s.%s, namespace: %s}\nspec: {network: %s, addresses: [%q], retain: true}\n",
		network, strings.ReplaceAll(address, ".", "-"), home, network, address)
}

// network asks for one with the spec.
func network(spec string) string {
	return "apiVersion: hypernetes.io/v1alpha1\nkind: Network\nmetadata: {name: bad, namespace: HOME}\nspec: " + spec + "\n"
}

// asking is a Pod with an annotation.
func asking(annotation, value string) string {
	return fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata:\n  name: bad\n  namespace: NS\n  annotations: {hypernetes.io/%s: '%s'}\nspec: {runtimeClassName: runc, containers: [{name: main, image: h8s.local/testbox:1}]}\n", annotation, value)
}

// withSpec is a Pod with more in its spec and its container.
func withSpec(spec, container string) string {
	return fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: bad, namespace: NS}\nspec: {%s containers: [{name: main, image: h8s.local/testbox:1%s}]}\n", spec, container)
}

func ours(kind, name, home, spec string) string {
	return fmt.Sprintf("apiVersion: hypernetes.io/v1alpha1\nkind: %s\nmetadata: {name: %s, namespace: %s}\nspec: %s\n", kind, name, home, spec)
}

var refusals = map[string]refusal{
	"overlapping subnets":  {ask: network("{subnets: {a: {cidr: 10.1.0.0/16}, b: {cidr: 10.1.2.0/24}}}"), says: []string{"spec.subnets[b].cidr", "10.1.2.0/24", "overlaps with subnet a (10.1.0.0/16)", "choose"}},
	"Service range":        {ask: network("{subnets: {a: {cidr: 10.96.0.0/16}}}"), says: []string{"spec.subnets[a].cidr", "the cluster's Service range", "choose another"}},
	"reserved range":       {ask: network("{subnets: {a: {cidr: 100.64.0.0/24}}}"), says: []string{"reserved by the cluster's operator", "choose another"}},
	"metadata range":       {ask: network("{subnets: {a: {cidr: 169.254.0.0/16}}}"), says: []string{"link-local", "choose another"}},
	"host bits":            {ask: network("{subnets: {a: {cidr: 10.1.0.5/16}}}"), says: []string{"spec.subnets[a]", "10.1.0.5/16", "want a network like"}},
	"no CIDR":              {ask: network("{subnets: {a: {cidr: banana}}}"), says: []string{"banana", "want a network like"}},
	"too small":            {ask: network("{subnets: {a: {cidr: 10.1.0.0/31}}}"), says: []string{"10.1.0.0/31", "/8 to /29"}},
	"gateway outside":      {ask: network("{subnets: {a: {cidr: 10.1.0.0/16, gateway: 10.2.0.1}}}"), says: []string{"gateway: 10.2.0.1", "inside cidr 10.1.0.0/16"}},
	"gateway is network":   {ask: network("{subnets: {a: {cidr: 10.1.0.0/16, gateway: 10.1.0.0}}}"), says: []string{"gateway", "10.1.0.0", "want a host address"}},
	"no subnets":           {ask: network("{}"), says: []string{"give subnets"}},
	"misspelt field":       {ask: network("{subnets: {a: {cdir: 10.1.0.0/16}}}"), says: []string{`unknown field "spec.subnets.a.cdir"`}},
	"another's tenantID":   {ask: network("{tenantID: OTHER, subnets: {a: {cidr: 10.1.0.0/16}}}"), says: []string{"spec.tenantID: OTHER", "belongs to tenant TENANT"}},
	"Network quota":        {ask: network("{subnets: {a: {cidr: 10.1.0.0/16}}}"), says: []string{"quota of tenant TENANT: 3 of 3 Networks", "spec.quota.networks"}},
	"namespace quota":      {ask: ours("TenantNamespace", "TENANT-third", "HOME", "{network: default}"), says: []string{"2 of 2 namespaces", "spec.quota.namespaces"}},
	"Port quota":           {ask: ours("Port", "default.10-0-0-60", "HOME", "{network: default, addresses: [10.0.0.60], retain: true}"), says: []string{"3 of 3 Ports", "spec.quota.ports"}},
	"FloatingIP quota":     {ask: ours("FloatingIP", "bad", "HOME", "{}"), says: []string{"0 of 0 FloatingIPs", "spec.quota.floatingIPs"}},
	"another's namespace":  {ask: ours("TenantNamespace", "OTHER-secret", "HOME", "{network: default}"), says: []string{"metadata.name: OTHER-secret", "taken", "choose another"}, never: []string{"tenant-OTHER", "tenant OTHER"}},
	"the system's":         {ask: ours("TenantNamespace", "kube-public", "HOME", "{network: default}"), says: []string{"kube-public", "do not begin with kube-"}},
	"not a home":           {ask: ours("TenantNamespace", "bad", "default", "{network: default}"), says: []string{"metadata.namespace: default", "tenant's home namespace"}},
	"Port elsewhere":       {ask: ours("Port", "default.10-7-0-3", "HOME", "{network: default, addresses: [10.7.0.3], retain: true}"), says: []string{}},
	"Port misnamed":        {ask: ours("Port", "default.10-0-0-61", "HOME", "{network: default, addresses: [10.0.0.62], retain: true}"), says: []string{"want default.10-0-0-62"}},
	"Port without address": {ask: ours("Port", "default.x", "HOME", "{network: default, addresses: []}"), says: []string{"spec.addresses", "at least 1"}, never: []string{"index out of bounds"}},
	"Port claimed twice":   {ask: ours("Port", "default.10-0-0-50", "HOME", "{network: default, addresses: [10.0.0.50], retain: true}"), says: []string{}},
	"no such pool":         {ask: ours("FloatingIP", "bad", "HOME", "{pool: nowhere}"), says: []string{"spec.pool: nowhere", "no such AddressPool"}},
	"floating to another":  {ask: ours("FloatingIP", "bad", "HOME", "{pod: {namespace: OTHER-secret, name: x}}"), says: []string{"spec.pod.namespace: OTHER-secret", "name one of its own"}},
	"address outside":      {ask: asking("address", "10.9.0.5"), says: []string{"hypernetes.io/address", "10.9.0.5", "choose one of 10.0.0.0/16"}},
	"gateway's address":    {ask: asking("address", "10.0.0.1"), says: []string{"the gateway of Network default", "choose another"}},
	"no address":           {ask: asking("address", "banana"), says: []string{`"banana": want an IP address`}},
	"two addresses":        {ask: asking("address", "10.0.0.2,10.0.0.3"), says: []string{"at most one address of each family"}},
	"no such Port":         {ask: asking("address", "port/default.10-0-0-99"), says: []string{"port/default.10-0-0-99", "no Port of that name"}},
	"odd Port":             {ask: asking("address", "port/../x"), says: []string{"port/../x", "want port/<name of a Port>"}},
	"Port of another net":  {ask: asking("address", "port/second.10-8-0-50"), says: []string{"is in Network second"}},
	"networks no JSON":     {ask: asking("networks", "banana"), says: []string{"hypernetes.io/networks", "want a JSON list like"}},
	"networks misspelt":    {ask: asking("networks", `[{"name":"second","adresses":[]}]`), says: []string{`unknown field "adresses"`}},
	"no such Network":      {ask: asking("networks", `[{"name":"nope"}]`), says: []string{"[0].name: nope", "no Network of that name"}},
	"another's Network":    {ask: asking("networks", `[{"name":"theirs"}]`), says: []string{"[0].name: theirs", "no Network of that name"}, never: []string{"OTHER"}},
	"another's by path":    {ask: asking("networks", `[{"name":"tenant-OTHER/theirs"}]`), says: []string{"name a Network of your tenant"}},
	"taken interface":      {ask: asking("networks", `[{"name":"second","interface":"eth0"}]`), says: []string{"interface: eth0", "choose another"}},
	"hostPort":             {ask: withSpec("", ", ports: [{containerPort: 80, hostPort: 80}]"), says: []string{"hostPort", "80"}},
	"hostNetwork":          {ask: withSpec("hostNetwork: true,", ""), says: []string{"hostNetwork"}},
	"hostPath":             {ask: withSpec("volumes: [{name: x, hostPath: {path: /}}],", ""), says: []string{"hostPath", `"x"`}},
	"nodeName":             {ask: withSpec("nodeName: x,", ""), says: []string{"spec.nodeName", "nodeSelector"}},
	"RuntimeClass":         {ask: withSpec("runtimeClassName: nope,", ""), says: []string{"RuntimeClass", "nope"}},
	"probe of runc":        {ask: withSpec("runtimeClassName: runc,", ", readinessProbe: {tcpSocket: {port: 80}}"), says: []string{"readinessProbe", "use an exec probe"}},
}

// refusedChanges are those of what is there.
func refusedChanges(t *testing.T, tn *testcluster.Tenant, n *testcluster.Namespace) {
	for _, r := range []struct {
		args []string
		says []string
	}{
		{[]string{"patch", "network", "second", "--type=merge", "-p", `{"spec":{"subnets":{"s0":null,"z":{"cidr":"10.12.0.0/24"}}}}`}, []string{"cannot be removed", "add another"}},
		{[]string{"patch", "network", "second", "--type=merge", "-p", `{"spec":{"subnets":{"s0":{"cidr":"10.8.0.0/23"}}}}`}, []string{"immutable"}},
		{[]string{"patch", "tenantnamespace", n.Name, "--type=merge", "-p", `{"spec":{"network":"second"}}`}, []string{"spec.network", "immutable", "make it anew"}},
		{[]string{"patch", "port", "default.10-0-0-50", "--type=merge", "-p", `{"spec":{"addresses":["10.0.0.51"]}}`}, []string{"immutable"}},
		{[]string{"delete", "network", "default", "--wait=false"}, []string{"network default is in use by", "namespace " + n.Name, "port default.10-0-0-50", "delete these first"}},
		{[]string{"delete", "network", "second", "--wait=false"}, []string{"port second.10-8-0-50"}},
	} {
		out, err := tn.TryKubectl(append([]string{"-n", tn.Home()}, r.args...)...)
		if err == nil {
			t.Errorf("%s: it was done: %s", strings.Join(r.args, " "), out)
			continue
		}
		for _, w := range r.says {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s: %q misses %q", strings.Join(r.args, " "), err, w)
			}
		}
	}
}

// event waits for an event of an object whose text has the words.
func event(n *testcluster.Namespace, namespace, object, reason, words string) {
	kind, name, _ := strings.Cut(object, "/")
	n.Until(reason+" at "+object+": "+words, testcluster.Patience, func() bool {
		out, err := n.TryKubectl("-n", namespace, "get", "events", "--field-selector", "involvedObject.kind="+kind+",involvedObject.name="+name+",reason="+reason, "-o", "jsonpath={.items[*].message}")
		return err == nil && strings.Contains(out, words)
	})
}

// TestExhausted runs out of addresses, of Ports and of a pool: who waits says so, and goes
// on when there is room.
func TestExhausted(t *testing.T) {
	t.Parallel()
	c := up(t)
	tn := c.Tenant(t, append([]string{"--quota", "loadbalancers=2,pods=8"}, light...)...)
	tn.Network("small", "10.7.0.0/29") // five addresses beside the gateway
	n := tn.Namespace("web", "small")
	t.Run("addresses", func(t *testing.T) {
		n := n.For(t)
		first := pod{name: "p0", runtime: "runc", address: "10.7.0.2"}
		tn.Apply(first.yaml(n.Name))
		n.Ready("p0")
		late := pod{name: "late", runtime: "runc", address: "10.7.0.2"}
		tn.Apply(late.yaml(n.Name))
		event(n, n.Name, "Pod/late", "AddressInUse", "10.7.0.2 is in use by Pod "+n.Name+"/p0: choose another")
		n.Kubectl("delete", "pod", "p0", "--wait=false")
		n.Ready("late") // it has the address that was freed
		var docs []string
		for i := range 4 {
			docs = append(docs, pod{name: fmt.Sprintf("q%d", i), runtime: "runc"}.yaml(n.Name))
		}
		tn.Apply(join(docs...))
		n.Ready("q0", "q1", "q2", "q3")
		tn.Apply(pod{name: "over", runtime: "runc"}.yaml(n.Name))
		event(n, n.Name, "Pod/over", "AddressesExhausted", "10.7.0.0/29")
		event(n, tn.Home(), "Network/small", "AddressesExhausted", "add a subnet")
		n.Kubectl("delete", "pod", "q3", "--wait=false")
		n.Ready("over")
		// Pods of a quota that is used up are refused by Kubernetes, in words one can read.
		tn.H8S(t, "tenant", "quota", tn.Name, "pods=5")
		n.Wait("resourcequota/h8s-tenant", "jsonpath={.status.hard.pods}=5")
		out, err := n.Try("create", "-f", manifestFile(t, pod{name: "sixth", runtime: "runc"}.yaml(n.Name)))
		if err == nil || !strings.Contains(err.Error(), "exceeded quota: h8s-tenant, requested: pods=1, used: pods=5, limited: pods=5") {
			t.Errorf("a Pod over the quota: %s %v", out, err)
		}
		tn.H8S(t, "tenant", "quota", tn.Name, "pods=")
	})
	t.Run("pool", func(t *testing.T) {
		n := n.For(t)
		testcluster.ApplyText(t, c.Cluster, fmt.Sprintf("apiVersion: hypernetes.io/v1alpha1\nkind: AddressPool\nmetadata: {name: %[1]s}\nspec: {addresses: [100.64.0.230], tenants: [%[1]s], quarantineSeconds: 0}\n", tn.Name))
		t.Cleanup(func() {
			if out, err := c.TryKubectl("delete", "addresspool", tn.Name, "--wait=false"); err != nil {
				t.Errorf("clean up: %v\n%s", err, out)
			}
		})
		balancer := func(name string) string {
			return fmt.Sprintf("apiVersion: v1\nkind: Service\nmetadata: {name: %s, namespace: %s}\nspec: {type: LoadBalancer, selector: {app: x}, ports: [{port: 80}]}\n", name, n.Name)
		}
		tn.Apply(balancer("lb1"))
		external(n, "lb1")
		tn.Apply(join(balancer("lb2"), ours("FloatingIP", "f", tn.Home(), "{pool: "+tn.Name+"}")))
		event(n, n.Name, "Service/lb2", "PoolExhausted", "no external address")
		event(n, tn.Home(), "FloatingIP/f", "PoolExhausted", tn.Name)
		n.Kubectl("delete", "floatingip", "f", "-n", tn.Home())
		n.Kubectl("delete", "service", "lb1")
		external(n, "lb2")
		tn.H8S(t, "tenant", "quota", tn.Name, "loadbalancers=1")
		tn.Apply(balancer("lb3"))
		event(n, n.Name, "Service/lb3", "QuotaExceeded", "tenant "+tn.Name+" has 1 of 1 external addresses of Services: delete one, or ask the operator for more")
	})
}

// TestCommandsRefused gives h8s what it cannot take: the exit code and one line say so.
func TestCommandsRefused(t *testing.T) {
	t.Parallel()
	c := up(t)
	tn := c.Tenant(t, light...)
	dir := t.TempDir()
	file := func(name, text string) string {
		f := filepath.Join(dir, name)
		if err := os.WriteFile(f, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return f
	}
	for _, r := range []struct {
		args string
		code int
		says string
	}{
		{"tenant create UPPER", 2, `tenant name "UPPER"`},
		{"tenant create " + tn.Name, 1, "is there already; h8s tenant describe"},
		{"tenant create x --cidr 10.0.0.1/8", 2, `--cidr "10.0.0.1/8"`},
		{"tenant create x --cidr 10.0.0.0/8 --gateway 11.0.0.1", 2, "--gateway 11.0.0.1"},
		{"tenant create x --quota cpu=lots", 2, `cpu="lots"`},
		{"tenant create x --pod-security lax", 2, "--pod-security"},
		{"tenant describe nobody", 19, "nobody"},
		{"tenant quota nobody", 19, "nobody"},
		{"tenant quota " + tn.Name + " networks=-1", 2, "networks"},
		{"tenant delete nobody --yes", 19, "nobody"},
		{"tenant delete " + tn.Name, 2, "--yes goes ahead"},
		{"tenant kubeconfig " + tn.Name + " --user ann --role king", 2, "--role"},
		{"tenant kubeconfig nobody --user ann --role member", 19, "nobody"},
		{"tenant kubeconfig " + tn.Name + " --user system:ann --role member", 2, "--user"},
		{"network describe nothing", 19, "nothing"},
		{"network describe nothing --tenant " + tn.Name, 19, "has no Network nothing"},
		{"network check a/b/c d", 2, "NAMESPACE/POD"},
		{"network check nowhere/a nowhere/b", 19, "nowhere"},
		{"network check a b --port 99999", 2, "99999"},
		{"apply", 2, "-f FILE"},
		{"apply -f " + filepath.Join(dir, "none.yaml"), 2, "none.yaml"},
		{"apply -f " + file("broken.yaml", "a: ["), 2, "broken.yaml"},
		{"apply -f " + file("empty.yaml", "---\n"), 2, "no objects there"},
		{"convert -f " + file("nokind.yaml", "{metadata: {name: x}}"), 2, "kind"},
		{"convert -f " + file("whose.yaml", "{apiVersion: v1, kind: Namespace, metadata: {name: x}, spec: {network: nets}}"), 19, "nets"},
		{"apply -f " + file("nobodys.yaml", "{apiVersion: v1, kind: Network, metadata: {name: x}, spec: {tenantID: nobody, subnets: {a: {cidr: 10.1.0.0/24}}}}"), 0, "nobody"},
	} {
		t.Run(r.args, func(t *testing.T) {
			out, code := c.Exit(t, "", append(strings.Fields(r.args), "--name", c.Node)...)
			if (r.code == 0) != (code != 0) && code != r.code || !strings.Contains(out, r.says) {
				t.Errorf("exit code %d, want %d with %q:\n%s", code, r.code, r.says, out)
			}
		})
	}
	if out := c.H8S(t, "tenant", "list"); strings.Contains(out, "UPPER") || !strings.Contains(out, tn.Name) {
		t.Errorf("tenants afterwards:\n%s", out)
	}
}

// TestTenantDeleted: what is in use goes with its tenant, what blocks it is said, and
// nothing is left.
func TestTenantDeleted(t *testing.T) {
	t.Parallel()
	c := up(t)
	tn := c.Tenant(t, light...)
	n := tn.Namespace("web", "default")
	tn.Apply(join(
		pod{name: "a", runtime: "runc"}.yaml(n.Name), claimed(tn.Home(), "default", "10.0.0.50"),
		fmt.Sprintf("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: stuck, namespace: %s, finalizers: [example.org/stuck]}\n", n.Name),
	))
	n.Ready("a")
	out, err := c.TryH8S("tenant", "delete", tn.Name, "--yes", "--timeout", "10s")
	if err == nil || !strings.Contains(out, "namespace "+n.Name+" with 1 Pod") || !strings.Contains(out, "TenantNamespace "+n.Name) || !strings.Contains(out, "H8S_NOT_READY") {
		t.Errorf("the deletion that is blocked: %v\n%s", err, out)
	}
	n.Until("what blocks it is said", testcluster.Patience, func() bool {
		out, err := c.TryH8S("tenant", "describe", tn.Name)
		return err == nil && strings.Contains(out, "example.org/stuck")
	})
	n.Kubectl("patch", "configmap", "stuck", "--type=merge", "-p", `{"metadata":{"finalizers":null}}`)
	c.Kubectl(t, "wait", "tenant/"+tn.Name, "--for=delete", "--timeout="+testcluster.Patience.String())
	for _, ns := range []string{tn.Home(), n.Name} {
		if out, err := c.TryKubectl("get", "namespace", ns); err == nil {
			t.Errorf("left: %s", out)
		}
	}
}
