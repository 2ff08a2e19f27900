package openstack

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/applicationcredentials"

	"github.com/hypernetes/hypernetes/test/e2e/testcloud"
	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// bound is how long a revoked token may still work (docs/openstack.md), and what kubectl
// takes on a slow machine.
const bound = 130 * time.Second

// person is a user of a project who logged in.
type person struct {
	*testcloud.User
	c    *testcloud.Cloud
	env  []string
	file string
}

// logsIn runs h8s login with a cloud of a clouds.yaml.
func logsIn(t *testing.T, c *testcloud.Cloud, u *testcloud.User, auth map[string]string) *person {
	t.Helper()
	dir := t.TempDir()
	p := &person{User: u, c: c, file: filepath.Join(dir, "kubeconfig")}
	p.env = []string{"HOME=" + dir, "XDG_CACHE_HOME=" + filepath.Join(dir, "cache"), "OS_CLIENT_CONFIG_FILE=" + c.CloudsYAML(t, map[string]map[string]string{"mine": auth})}
	server := "https://" + strings.TrimSpace(c.Kubectl(t, "get", "node", c.Node, "-o", `jsonpath={.status.addresses[?(@.type=="InternalIP")].address}`)) + ":6443"
	out, err := inside(t, c, p.env, "login", "--cloud", "mine", "--kubeconfig", p.file, "--server", server, "--certificate-authority", filepath.Join("/var/lib/h8s", c.Node, "pki", "ca.crt"))
	if err != nil {
		t.Fatalf("h8s login: %v\n%s", err, out)
	}
	t.Logf("h8s login: %s", out)
	if text, err := os.ReadFile(p.file); err != nil || strings.Contains(string(text), auth["password"]) && auth["password"] != "" || strings.Contains(string(text), "token:") {
		t.Errorf("the kubeconfig holds a secret, or %v", err)
	}
	return p
}

// kubectl runs it as the person.
func (p *person) kubectl(t *testing.T, args ...string) (string, error) {
	t.Helper()
	return inside(t, p.c, p.env, append([]string{"kubectl", "--name", p.c.Node, "--kubeconfig", p.file}, args...)...)
}

func (p *person) may(t *testing.T, args ...string) {
	t.Helper()
	if out, err := p.kubectl(t, args...); err != nil {
		t.Errorf("%s: kubectl %s: %v\n%s", p.Name, strings.Join(args, " "), err, out)
	}
}

func (p *person) mayNot(t *testing.T, args ...string) {
	t.Helper()
	if out, err := p.kubectl(t, args...); err == nil || !strings.Contains(out, "orbidden") {
		t.Errorf("%s: kubectl %s: %v, want it forbidden\n%s", p.Name, strings.Join(args, " "), err, out)
	}
}

// applicationCredential makes one of the user's.
func applicationCredential(t *testing.T, u *testcloud.User) map[string]string {
	t.Helper()
	provider, err := u.Provider(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	keystone, err := openstack.NewIdentityV3(provider, gophercloud.EndpointOpts{})
	if err != nil {
		t.Fatal(err)
	}
	made, err := applicationcredentials.Create(t.Context(), keystone, u.ID, applicationcredentials.CreateOpts{Name: "kubectl"}).Extract()
	if err != nil {
		t.Fatal(err)
	}
	return map[string]string{"auth_type": "v3applicationcredential", "application_credential_id": made.ID, "application_credential_secret": made.Secret}
}

// TestLogins: two users of two projects, a member and a reader, log in with password, token
// and application credential, do their role's work, and nothing in the other's project.
func TestLogins(t *testing.T) {
	c := testcloud.Up(t, 2)
	type side struct {
		*testcloud.User
		n *testcluster.Namespace
	}
	var sides []side
	for _, role := range []string{"member", "reader"} {
		p := c.Project(t)
		u := p.User(role)
		tn := c.TenantOf(t, p, light...)
		n := tn.Namespace("web", "default")
		tn.Apply(pod(n, "web", c.Nodes[0], false))
		sides = append(sides, side{u, n})
	}
	for i, s := range sides {
		s.n.Ready("web")
		other := sides[1-i]
		provider, err := s.Provider(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for method, auth := range map[string]map[string]string{
			"password":               s.Auth(),
			"token":                  {"auth_type": "v3token", "token": provider.Token(), "project_id": s.Project.ID},
			"application credential": applicationCredential(t, s.User),
		} {
			t.Run(s.Name+" by "+method, func(t *testing.T) {
				p := logsIn(t, c, s.User, auth)
				p.may(t, "-n", s.n.Name, "get", "pods")
				name := "x" + fmt.Sprint(time.Now().UnixNano())
				if i == 0 {
					p.may(t, "-n", s.n.Name, "create", "configmap", name)
					p.may(t, "-n", s.n.Name, "exec", "web", "--", "/testbox", "get", "http://127.0.0.1:8080/hostname")
					p.may(t, "-n", s.n.Name, "get", "secrets")
				} else {
					p.mayNot(t, "-n", s.n.Name, "create", "configmap", name)
					p.mayNot(t, "-n", s.n.Name, "exec", "web", "--", "/testbox", "get", "http://127.0.0.1:8080/hostname")
					p.mayNot(t, "-n", s.n.Name, "get", "secrets")
				}
				p.mayNot(t, "-n", other.n.Name, "get", "pods")
				p.mayNot(t, "-n", other.n.Name, "exec", "web", "--", "/testbox", "get", "http://127.0.0.1:8080/hostname")
				p.mayNot(t, "-n", other.n.Name, "create", "configmap", name)
				p.mayNot(t, "get", "pods", "-A")
				p.mayNot(t, "get", "nodes")
			})
		}
	}
}

// TestRevoked: a revoked token stops within the bound.
func TestRevoked(t *testing.T) {
	c := testcloud.Up(t, 2)
	p := c.Project(t)
	u := p.User("member")
	tn := c.TenantOf(t, p, light...)
	n := tn.Namespace("web", "default")
	provider, err := u.Provider(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	token := provider.Token()
	ask := func() (string, error) {
		return inside(t, c, []string{"HOME=" + t.TempDir()}, "kubectl", "--name", c.Node, "--kubeconfig", bearer(t, c, token), "-n", n.Name, "get", "pods")
	}
	testcloud.Until(t, "the token works", func() error {
		out, err := ask()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	keystone, err := openstack.NewIdentityV3(provider, gophercloud.EndpointOpts{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := keystone.Delete(t.Context(), keystone.ServiceURL("auth", "tokens"), &gophercloud.RequestOpts{MoreHeaders: map[string]string{"X-Subject-Token": token}, OkCodes: []int{204}}); err != nil {
		t.Fatal(err)
	}
	revoked := time.Now()
	for {
		out, err := ask()
		if err != nil {
			if !strings.Contains(out, "nauthorized") && !strings.Contains(out, "must be logged in") {
				t.Errorf("refused otherwise: %s", out)
			}
			break
		}
		if time.Since(revoked) > bound {
			t.Fatalf("%s after it was revoked, the token still works", bound)
		}
		time.Sleep(time.Second)
	}
	t.Logf("refused %.1f s after it was revoked", time.Since(revoked).Seconds())
}

// bearer is a kubeconfig of somebody who has a token and nothing else.
func bearer(t *testing.T, c *testcloud.Cloud, token string) string {
	t.Helper()
	server := "https://" + strings.TrimSpace(c.Kubectl(t, "get", "node", c.Node, "-o", `jsonpath={.status.addresses[?(@.type=="InternalIP")].address}`)) + ":6443"
	file := filepath.Join(t.TempDir(), "kubeconfig")
	text := fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: x
clusters: [{name: x, cluster: {server: %q, certificate-authority: /var/lib/h8s/%s/pki/ca.crt}}]
users: [{name: x, user: {token: %q}}]
contexts: [{name: x, context: {cluster: x, user: x}}]
`, server, c.Node, token)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}
