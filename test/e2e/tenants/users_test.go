package tenants

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// side is one of two tenants with a user of every role.
type side struct {
	*testcluster.Tenant
	ns    *testcluster.Namespace
	users map[string]string // kubeconfigs by role
}

// TestUsers: users of every role of two tenants do their role's work, and can touch and
// see nothing of the other tenant's.
func TestUsers(t *testing.T) {
	t.Parallel()
	c := up(t)
	var sides []side
	for range 2 {
		tn := c.Tenant(t, light...)
		s := side{tn, tn.Namespace("web", "default"), map[string]string{}}
		for _, role := range []string{"reader", "member", "manager"} {
			s.users[role] = tn.Kubeconfig(role, role)
		}
		tn.Apply(pod{name: "web", runtime: "runc"}.yaml(s.ns.Name))
		sides = append(sides, s)
	}
	for _, s := range sides {
		s.ns.Ready("web")
	}
	a, b := sides[0], sides[1]
	t.Run("reader", func(t *testing.T) { a.reader(t) })
	t.Run("member", func(t *testing.T) { a.member(t) })
	t.Run("manager", func(t *testing.T) { a.manager(t) })
	t.Run("rights", func(t *testing.T) { t.Parallel(); a.rights(t, b) })
	t.Run("requests", func(t *testing.T) { t.Parallel(); a.requests(t, b) })
	t.Run("certificates", func(t *testing.T) { t.Parallel(); a.certificates(t, b) })
}

// may fails the test unless a command works, and returns what it printed.
func (s side) may(t *testing.T, role string, args ...string) string {
	t.Helper()
	out, err := s.As(s.users[role], args...)
	if err != nil {
		t.Errorf("%s: kubectl %s: %v\n%s", role, strings.Join(args, " "), err, out)
	}
	return out
}

// mayNot fails the test unless a command is refused with the text.
func (s side) mayNot(t *testing.T, role, why string, args ...string) {
	t.Helper()
	if out, err := s.As(s.users[role], args...); err == nil || !strings.Contains(out, why) {
		t.Errorf("%s: kubectl %s: %v, want a refusal saying %q\n%s", role, strings.Join(args, " "), err, why, out)
	}
}

func (s side) reader(t *testing.T) {
	n := s.ns.Name
	for _, what := range []string{"pods,services,deployments,networkpolicies", "events"} {
		s.may(t, "reader", "-n", n, "get", what)
	}
	s.may(t, "reader", "-n", s.Home(), "get", "networks,ports,tenantnamespaces,floatingips")
	if out := s.may(t, "reader", "-n", n, "logs", "web"); !strings.Contains(out, "serving") {
		t.Errorf("logs: %s", out)
	}
	s.may(t, "reader", "get", "tenant", s.Name)
	for _, args := range [][]string{
		{"get", "secrets"}, {"exec", "web", "--", "/testbox", "stat", "/"}, {"delete", "pod", "web"},
		{"create", "configmap", "x"}, {"port-forward", "web", ":8080"},
	} {
		s.mayNot(t, "reader", "orbidden", append([]string{"-n", n}, args...)...)
	}
}

func (s side) member(t *testing.T) {
	n := s.ns.Name
	s.may(t, "member", "-n", n, "apply", "-f", manifestFile(t, `apiVersion: apps/v1
kind: Deployment
metadata: {name: app}
spec:
  selector: {matchLabels: {app: app}}
  template:
    metadata: {labels: {app: app}}
    spec:
      runtimeClassName: runc
      terminationGracePeriodSeconds: 1
      containers: [{name: main, image: "h8s.local/testbox:1", args: [serve]}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: app}
spec: {podSelector: {matchLabels: {app: app}}, ingress: [{}]}
---
`+service(n, "app", "app")))
	s.may(t, "member", "-n", n, "rollout", "status", "deployment/app", "--timeout="+testcluster.Patience.String())
	s.may(t, "member", "-n", n, "logs", "deployment/app")
	if out := s.may(t, "member", "-n", n, "exec", "deployment/app", "--", "/testbox", "get", "http://127.0.0.1:8080/healthz"); !strings.Contains(out, "200 OK") {
		t.Errorf("exec: %s", out)
	}
	forward := s.ns.For(t).Start("--kubeconfig", s.users["member"], "port-forward", "deployment/app", ":8080")
	forward.Expect(`127\.0\.0\.1:(\d+) -> 8080`)
	forward.Stop()
	s.may(t, "member", "-n", n, "create", "secret", "generic", "own", "--from-literal=a=b")
	s.may(t, "member", "-n", n, "delete", "deployment/app", "service/app", "networkpolicy/app", "secret/own", "--wait=false")
	s.may(t, "member", "-n", s.Home(), "get", "networks")
	s.mayNot(t, "member", "orbidden", "-n", s.Home(), "delete", "network", "default")
	s.mayNot(t, "member", "orbidden", "-n", n, "create", "rolebinding", "x", "--clusterrole=h8s:tenant-reader", "--user=x")
}

func (s side) manager(t *testing.T) {
	s.may(t, "manager", "apply", "-f", manifestFile(t, fmt.Sprintf(`apiVersion: hypernetes.io/v1alpha1
kind: Network
metadata: {name: own, namespace: %[1]s}
spec: {subnets: {a: {cidr: 172.20.0.0/24}}}
---
apiVersion: hypernetes.io/v1alpha1
kind: TenantNamespace
metadata: {name: %[2]s-own, namespace: %[1]s}
spec: {network: own}
`, s.Home(), s.Name)))
	s.may(t, "manager", "-n", s.Home(), "wait", "tenantnamespace/"+s.Name+"-own", "--for=jsonpath={.status.phase}=Bound", "--timeout=60s")
	s.may(t, "manager", "-n", s.Home(), "apply", "-f", manifestFile(t, fmt.Sprintf("apiVersion: hypernetes.io/v1alpha1\nkind: FloatingIP\nmetadata: {name: own}\nspec: {pod: {namespace: %s, name: web}}\n", s.ns.Name)))
	s.may(t, "manager", "-n", s.ns.Name, "create", "rolebinding", "guest", "--clusterrole=h8s:tenant-reader", "--user=guest")
	s.may(t, "manager", "-n", s.ns.Name, "delete", "rolebinding", "guest")
	s.may(t, "manager", "-n", s.Home(), "delete", "floatingip/own")
	// Nothing beyond the own rights can be given away, and the namespace's own bindings are
	// the controller's.
	s.mayNot(t, "manager", "orbidden", "-n", s.ns.Name, "create", "rolebinding", "root", "--clusterrole=cluster-admin", "--user=guest")
	s.mayNot(t, "manager", "orbidden", "-n", s.ns.Name, "create", "role", "proxy", "--verb=get", "--resource=pods/proxy")
	// Users of the own tenant, by a manager's own kubeconfig.
	file := t.TempDir() + "/guest.kubeconfig"
	s.H8S(t, "tenant", "kubeconfig", s.Name, "--user", "guest", "--role", "reader", "-o", file, "--kubeconfig", s.users["manager"])
	if out, err := s.As(file, "-n", s.ns.Name, "get", "pods"); err != nil {
		t.Errorf("the guest's: %v %s", err, out)
	}
}

// rights asks for a table of verbs and resources: of the other tenant nothing is allowed
// to any role, and in the own namespaces what is nobody's is not either.
func (s side) rights(t *testing.T, other side) {
	// All rights one has in a namespace are one answer, so that the table costs few requests.
	list := func(role, namespace string) string {
		return s.may(t, role, "auth", "can-i", "--list", "--no-headers", "-n", namespace)
	}
	for _, role := range []string{"reader", "member", "manager"} {
		nowhere := list(role, "kube-system")
		for _, namespace := range []string{other.ns.Name, other.Home(), "default", "h8s-system"} {
			// The order is not fixed.
			if got := list(role, namespace); !same(got, nowhere) {
				t.Errorf("%s in %s has rights:\n%s\nmore than in kube-system:\n%s", role, namespace, got, nowhere)
			}
		}
		for _, resource := range []string{"pods", "secrets", "configmaps", "services", "deployments", "networks", "rolebindings"} {
			for line := range strings.Lines(nowhere) {
				if name, _, _ := strings.Cut(line, " "); name == resource || strings.HasPrefix(name, resource+".") || strings.HasPrefix(name, "*") {
					t.Errorf("%s has rights in kube-system: %s", role, line)
				}
			}
		}
	}
	for _, verb := range []string{"get", "create", "delete", "patch", "impersonate"} {
		for _, resource := range []string{"namespaces", "nodes", "pods/proxy", "services/proxy", "endpointslices", "users"} {
			if verb == "get" && resource == "endpointslices" {
				continue // what a Service leads to may be seen
			}
			resource, sub, _ := strings.Cut(resource, "/")
			args := []string{"auth", "can-i", verb, resource, "-n", s.ns.Name}
			if sub != "" {
				args = append(args, "--subresource="+sub)
			}
			if out, err := s.As(s.users["manager"], args...); err == nil || !strings.Contains(out, "no") {
				t.Errorf("a manager may %s %s/%s: %s", verb, resource, sub, out)
			}
		}
	}
}

// same says whether two texts have the same lines.
func same(a, b string) bool {
	lines := func(s string) []string {
		l := strings.Split(strings.TrimSpace(s), "\n")
		slices.Sort(l)
		return l
	}
	return slices.Equal(lines(a), lines(b))
}

// requests tries what the rights say.
func (s side) requests(t *testing.T, other side) {
	for _, args := range [][]string{
		{"get", "pods"}, {"get", "secrets"}, {"logs", "web"}, {"exec", "web", "--", "/testbox", "stat", "/"},
		{"port-forward", "web", ":8080"}, {"delete", "pod", "web"}, {"create", "configmap", "x"}, {"get", "services"},
		{"create", "token", "default"}, {"get", "pods", "--as=system:admin"},
	} {
		s.mayNot(t, "manager", "orbidden", append([]string{"-n", other.ns.Name}, args...)...)
	}
	s.mayNot(t, "manager", "orbidden", "-n", other.Home(), "get", "networks,ports,tenantnamespaces,floatingips")
	s.mayNot(t, "manager", "orbidden", "-n", other.Home(), "delete", "network", "default")
	s.mayNot(t, "manager", "orbidden", "get", "tenant", other.Name)
	for _, args := range [][]string{
		{"get", "tenants"}, {"get", "namespaces"}, {"get", "namespace", s.ns.Name}, {"create", "namespace", s.Name + "-x"},
		{"label", "namespace", s.ns.Name, "a=b"}, {"delete", "namespace", s.ns.Name}, {"get", "nodes"}, {"get", "pods", "-A"},
		{"get", "csr"}, {"get", "leases", "-n", "h8s-system"},
		{"get", "--raw", "/api/v1/namespaces/" + s.ns.Name + "/pods/web/proxy/"},
		{"get", "--raw", "/api/v1/namespaces/" + s.ns.Name + "/services/kubernetes/proxy/"},
	} {
		s.mayNot(t, "manager", "orbidden", args...)
	}
	// A namespace that is another's cannot be bound, by whatever name it is asked for.
	out, err := s.As(s.users["manager"], "apply", "-f", manifestFile(t, fmt.Sprintf(
		"apiVersion: hypernetes.io/v1alpha1\nkind: TenantNamespace\nmetadata: {name: %s, namespace: %s}\nspec: {network: default}\n", other.ns.Name, s.Home())))
	if err == nil {
		// Then it must never be bound.
		phase := s.Kubectl(t, "-n", s.Home(), "wait", "tenantnamespace/"+other.ns.Name, "--for=jsonpath={.status.phase}=Failed", "--timeout=60s")
		s.may(t, "manager", "-n", s.Home(), "delete", "tenantnamespace", other.ns.Name)
		t.Logf("admitted and failed: %s", phase)
	} else if !strings.Contains(out, other.ns.Name) {
		t.Errorf("the refusal names nothing: %s", out)
	}
}

// certificates asks for those of others.
func (s side) certificates(t *testing.T, other side) {
	for name, ask := range map[string]struct {
		user, cn, org string
		seconds       int
	}{
		"another tenant's": {"manager", other.Name + ":x", "h8s:tenant:" + other.Name + ":manager", 0},
		"masters":          {"manager", "x", "system:masters", 0},
		"a node":           {"manager", "system:node:" + s.Node, "system:nodes", 0},
		"kubestack":        {"manager", "h8s:kubestack:" + s.Node, "h8s:kubestacks", 0},
		"volume plugin":    {"manager", "h8s:csi-node:" + s.Node, "h8s:csi-nodes", 0},
		"the controller":   {"manager", "h8s:controller", "h8s:controllers", 0},
		"no such role":     {"manager", s.Name + ":x", "h8s:tenant:" + s.Name + ":owner", 0},
		"for ten years":    {"manager", s.Name + ":x", "h8s:tenant:" + s.Name + ":reader", 10 * 366 * 24 * 3600},
		"by a member":      {"member", s.Name + ":x", "h8s:tenant:" + s.Name + ":manager", 0},
	} {
		t.Run(name, func(t *testing.T) {
			object := fmt.Sprintf("%s-%d", s.Name, time.Now().UnixNano())
			text := fmt.Sprintf("apiVersion: certificates.k8s.io/v1\nkind: CertificateSigningRequest\nmetadata: {name: %s}\nspec:\n  request: %s\n  signerName: kubernetes.io/kube-apiserver-client\n  usages: [client auth]\n",
				object, forged(t, ask.cn, ask.org))
			if ask.seconds > 0 {
				text += fmt.Sprintf("  expirationSeconds: %d\n", ask.seconds)
			}
			out, err := s.As(s.users[ask.user], "create", "-f", manifestFile(t, text))
			if err != nil {
				if !strings.Contains(out, "orbidden") && !strings.Contains(out, "denied") {
					t.Errorf("refused without a reason: %s", out)
				}
				return
			}
			defer s.Kubectl(t, "delete", "csr", object)
			s.Kubectl(t, "wait", "csr/"+object, "--for=condition=Denied", "--timeout=60s")
			if why := s.Kubectl(t, "get", "csr", object, "-o", `jsonpath={.status.conditions[0].message}{.status.certificate}`); len(why) < 10 || strings.Contains(why, "LS0t") {
				t.Errorf("denied without a reason, or signed: %q", why)
			}
		})
	}
}

// forged is a request for a certificate, in base64 of PEM.
func forged(t *testing.T, cn, org string) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: cn, Organization: []string{org}}}, key)
	if err != nil {
		t.Fatal(err)
	}
	return base64.StdEncoding.EncodeToString(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
}
