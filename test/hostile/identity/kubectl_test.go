package identity

import (
	"bytes"
	"fmt"
	"net/http/httptest"
	"net/http/httputil"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hypernetes/hypernetes/cli"
	"github.com/hypernetes/hypernetes/identity/keystone/keystonetest"
	"github.com/hypernetes/hypernetes/test/artifacts"
)

// asH8s makes this program h8s: what h8s login writes is run as a program of its own.
const asH8s = "H8S_TEST_AS_H8S"

func TestMain(m *testing.M) {
	if os.Getenv(asH8s) != "" {
		os.Exit(cli.Main(os.Args[1:]))
	}
	os.Exit(m.Run())
}

// testKubectl: two users of two projects log in with password, token and application
// credential, and do their work with kubectl.
func testKubectl(t *testing.T, w *world, k keystonetest.Keystone, blue, red string, ann, bob keystonetest.User) {
	a := w.keystone
	dir := t.TempDir()
	clouds := "clouds:\n"
	var secrets []string
	add := func(name, auth string) {
		clouds += fmt.Sprintf("  %s: {auth: {auth_url: %q, %s}}\n", name, a.Admin.URL, auth)
	}
	for _, u := range []struct {
		keystonetest.User
		name, project string
	}{{ann, "ann", blue}, {bob, "bob", red}} {
		add(u.name+"-password", fmt.Sprintf("username: %s, password: %s, user_domain_id: default, project_id: %s", u.Name, u.Password, u.project))
		token := a.Token(a.Password(u.User, u.project)).ID
		add(u.name+"-token", "token: "+token)
		c := a.ApplicationCredential(u.User, u.project, "")
		add(u.name+"-app", fmt.Sprintf("application_credential_id: %s, application_credential_secret: %s", c.ApplicationCredentialID, c.Secret))
		secrets = append(secrets, u.Password, token, c.Secret)
	}
	// The program dials for itself; a real Keystone is in a network namespace.
	proxy := httptest.NewServer(&httputil.ReverseProxy{Rewrite: func(*httputil.ProxyRequest) {}, Transport: k.Client.Transport})
	t.Cleanup(proxy.Close)
	file := write(t, filepath.Join(dir, "clouds.yaml"), clouds)
	ca := write(t, filepath.Join(dir, "ca.crt"), string(w.cfg.CAData))
	kubeconfig := filepath.Join(dir, "kubeconfig")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	run := func(program string, args ...string) (string, error) {
		cmd := exec.CommandContext(t.Context(), program)
		cmd.Args, cmd.Dir = args, dir
		cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir, "OS_CLIENT_CONFIG_FILE=" + file, "KUBECONFIG=" + kubeconfig, "HTTP_PROXY=" + proxy.URL, asH8s + "=1"}
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		err := cmd.Run()
		return out.String(), err
	}
	for _, kind := range []string{"password", "token", "app"} {
		for _, u := range []struct{ name, id, tenant, role, other string }{{"ann", ann.ID, "blue", "manager", "red"}, {"bob", bob.ID, "red", "member", "blue"}} {
			cloud := u.name + "-" + kind
			out, err := run(self, "h8s", "login", "--cloud", cloud, "--server", w.cfg.Host, "--certificate-authority", ca, "--context", cloud, "--namespace", u.tenant+"-web")
			if err != nil || !strings.Contains(out, "You are keystone:"+u.id) || !strings.Contains(out, u.role+" of tenant "+u.tenant) || !strings.Contains(out, fmt.Sprintf("context is %q", cloud)) {
				t.Fatalf("login %s: %v %s", cloud, err, out)
			}
			kubectl := func(args ...string) (string, error) {
				return run(filepath.Join(artifacts.Dir(), "bin", "kubernetes"), append([]string{"kubectl", "--context", cloud}, args...)...)
			}
			if out, err := kubectl("auth", "whoami"); err != nil || !strings.Contains(out, "h8s:tenant:"+u.tenant+":"+u.role) || strings.Contains(out, "tenant:"+u.other) {
				t.Errorf("%s: %v %s", cloud, err, out)
			}
			if out, err := kubectl("create", "configmap", cloud, "--from-literal=a=b"); err != nil {
				t.Errorf("%s: its own work: %v %s", cloud, err, out)
			}
			if out, err := kubectl("-n", u.other+"-web", "get", "configmaps"); err == nil || !strings.Contains(out, "Forbidden") {
				t.Errorf("%s: the other's: %v %s", cloud, err, out)
			}
		}
	}
	text, err := os.ReadFile(kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range secrets {
		if strings.Contains(string(text), s) {
			t.Error("a secret is in the kubeconfig")
		}
	}
	// A cluster that does not know the project says what may be the cause; kubeconfig stays.
	plain := a.Project("default", "unclaimed")
	a.Grant(plain, ann, "member")
	add("ann-plain", fmt.Sprintf("user_id: %s, password: %s, project_id: %s", ann.ID, ann.Password, plain))
	write(t, file, clouds)
	out, err := run(self, "h8s", "login", "--cloud", "ann-plain", "--server", w.cfg.Host, "--certificate-authority", ca)
	if again, _ := os.ReadFile(kubeconfig); err == nil || !strings.Contains(out, "H8S_LOGIN") || !strings.Contains(out, "no tenant's") || !bytes.Equal(again, text) {
		t.Errorf("a project that is no tenant's: %v %s", err, out)
	}
	// A wrong password is one clear error, and no credential.
	add("ann-wrong", fmt.Sprintf("user_id: %s, password: nonsense, project_id: %s", ann.ID, blue))
	write(t, file, clouds)
	out, err = run(self, "h8s", "credential", "keystone", "--cloud", "ann-wrong")
	if err == nil || !strings.Contains(out, "H8S_LOGIN") || strings.Contains(out, "nonsense") || strings.Contains(out, "ExecCredential") {
		t.Errorf("a wrong password: %v %s", err, out)
	}
}
