package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/cluster/kubeconfig"
	"github.com/hypernetes/hypernetes/identity/keystone/keystonetest"
)

// TestCredentialKeystone: what kubectl reads, and that it is kept.
func TestCredentialKeystone(t *testing.T) {
	f := keystonetest.NewFake(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "clouds.yaml")
	text := fmt.Sprintf(`clouds: {admin: {auth: {auth_url: %q, username: admin, password: %s, user_domain_id: default, project_name: admin, project_domain_id: default}}}`, f.URL, keystonetest.Password)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"OS_CLOUD", "OS_AUTH_URL", execInfo} {
		t.Setenv(name, "")
	}
	t.Setenv("OS_CLIENT_CONFIG_FILE", file)
	t.Setenv("XDG_CACHE_HOME", filepath.Join(dir, "cache"))
	run := func(args ...string) (string, error) {
		var out bytes.Buffer
		root := newRoot()
		root.SetOut(&out)
		root.SetErr(&out)
		root.SetArgs(args)
		err := root.ExecuteContext(t.Context())
		return out.String(), err
	}
	t.Setenv(execInfo, `{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","spec":{"interactive":false}}`)
	first, err := run("credential", "keystone", "--cloud", "admin")
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		APIVersion, Kind string
		Status           struct {
			Token               string
			ExpirationTimestamp time.Time
		}
	}
	if err := json.Unmarshal([]byte(first), &got); err != nil || got.APIVersion != execVersion || got.Kind != "ExecCredential" || !strings.HasPrefix(got.Status.Token, "gAAAA") || time.Until(got.Status.ExpirationTimestamp) < 50*time.Minute {
		t.Errorf("%s %v", first, err)
	}
	if second, err := run("credential", "keystone", "--cloud", "admin"); err != nil || second != first {
		t.Errorf("not kept: %v", err)
	}
	if third, err := run("credential", "keystone", "--cloud", "admin", "--fresh"); err != nil || third == first {
		t.Errorf("kept: %v", err)
	}
	if n := f.Count("POST auth/tokens"); n != 2 {
		t.Errorf("%d logins", n)
	}
	t.Setenv(execInfo, `{"apiVersion":"client.authentication.k8s.io/v1beta1"}`)
	if out, err := run("credential", "keystone", "--cloud", "admin"); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "v1beta1") || strings.Contains(out, "token") {
		t.Errorf("another version: %s %v", out, err)
	}
	t.Setenv(execInfo, "")
	for cloud, class := range map[string]func(error) bool{"beta": errdefs.IsNotFound, "": errdefs.IsNotFound} {
		if out, err := run("credential", "keystone", "--cloud", cloud); !class(err) || strings.Contains(out, "token") {
			t.Errorf("cloud %q: %s %v", cloud, out, err)
		}
	}
	for _, args := range [][]string{
		{"login", "--cloud", "admin", "--server", "https://192.0.2.1:6443"},
		{"login", "--cloud", "admin", "--server", "http://192.0.2.1:6443", "--certificate-authority", file},
		{"login", "--cloud", "admin", "--server", "https://192.0.2.1:6443", "--certificate-authority", file + "x"},
	} {
		if out, err := run(args...); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v: %s %v", args, out, err)
		}
	}
	// What login writes, without a cluster to ask.
	ca := filepath.Join(dir, "ca.crt")
	config := filepath.Join(dir, "config")
	if err := os.WriteFile(ca, []byte("-----BEGIN CERTIFICATE-----\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := run("login", "--cloud", "admin", "--server", "https://192.0.2.1:6443/", "--certificate-authority", ca, "--check=false", "--kubeconfig", config, "--namespace", "web"); err != nil || !strings.Contains(out, `"cluster-admin"`) {
		t.Errorf("%s %v", out, err)
	}
	written, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"apiVersion: " + execVersion, "- credential", "- keystone", "- admin", "value: " + file, "interactiveMode: Never", "server: https://192.0.2.1:6443\n", "namespace: web", "current-context: cluster-admin"} {
		if !strings.Contains(string(written), want) {
			t.Errorf("no %q in\n%s", want, written)
		}
	}
	if strings.Contains(string(written), keystonetest.Password) || strings.Contains(string(written), "gAAAA") {
		t.Error("a secret is in the kubeconfig")
	}
	if _, err := kubeconfig.Load(config); !errdefs.IsNotImplemented(err) {
		t.Errorf("our own commands: %v", err)
	}
}
