package pods

import (
	"encoding/base64"
	"encoding/json"
	"strings"
	"syscall"
	"testing"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// TestTokenRotation sees a new service-account token arrive in a running container.
//
// The kubelet rotates a token at 80 % of its lifetime, which is at least ten minutes.
// It keeps tokens in memory only, so this test makes it fetch a new one by ending
// it: the supervisor starts it again, and it rewrites the volume through the same code
// as for an old token. The Pod must not notice. Not parallel: others need the kubelet.
func TestTokenRotation(t *testing.T) {
	c := testcluster.Up(t)
	n := c.Namespace(t)
	n.Apply("testdata/token.yaml")
	n.Ready("token")
	first := n.Exec("token/shell", "cat", "/token/token")
	claims := decodeToken(t, first)
	want(t, "audience", strings.Join(claims.Audience, ","), "e2e")
	want(t, "Pod the token is bound to", claims.Kubernetes.Pod.Name, "token")
	want(t, "lifetime in seconds", claims.Expires-claims.Issued, 600)
	root := n.Exec("token/shell", "cat", "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt")
	if !strings.Contains(root, "BEGIN CERTIFICATE") {
		t.Errorf("the default token volume has no CA: %q", root)
	}

	old := kubelet(t, c)
	if err := syscall.Kill(old, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	log := n.Start("logs", "-f", "token", "-c", "watcher")
	n.Until("the container has another token", testcluster.Patience, func() bool {
		token, err := n.Try("exec", "token", "-c", "shell", "--", "cat", "/token/token")
		return err == nil && token != "" && token != first
	})
	second := n.Exec("token/shell", "cat", "/token/token")
	after := decodeToken(t, second)
	if after.Issued <= claims.Issued || after.ID == claims.ID {
		t.Errorf("the new token is not newer: %+v after %+v", after, claims)
	}
	review := n.Kubectl("create", "-o", "jsonpath={.status.authenticated} {.status.user.username}", "-f", reviewOf(t, second))
	want(t, "the API server on the new token", review, "true system:serviceaccount:"+n.Name+":default")
	if strings.Contains(log.Output(), "no such file") {
		t.Errorf("the token was missing during the rotation:\n%s", log.Output())
	}
	if now := kubelet(t, c); now == old {
		t.Errorf("the kubelet was not restarted")
	}
	for _, container := range []string{"shell", "watcher"} {
		want(t, "restarts of "+container, n.Pod("token").Container(container).RestartCount, 0)
	}
}

func kubelet(t *testing.T, c *testcluster.Cluster) int {
	t.Helper()
	for _, p := range c.Processes(t) {
		if p.Is("kubelet") || strings.HasSuffix(p.Cgroup, "/kubelet") {
			return p.PID
		}
	}
	t.Fatal("no kubelet is running")
	return 0
}

type claims struct {
	ID         string   `json:"jti"`
	Audience   []string `json:"aud"`
	Issued     int      `json:"iat"`
	Expires    int      `json:"exp"`
	Kubernetes struct {
		Pod struct{ Name string }
	} `json:"kubernetes.io"`
}

func decodeToken(t *testing.T, token string) claims {
	t.Helper()
	parts := strings.Split(strings.TrimSpace(token), ".")
	if len(parts) != 3 {
		t.Fatalf("not a token: %q", token)
	}
	raw, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		t.Fatal(err)
	}
	var c claims
	if err := json.Unmarshal(raw, &c); err != nil {
		t.Fatal(err)
	}
	return c
}

// reviewOf writes a TokenReview and returns its file.
func reviewOf(t *testing.T, token string) string {
	t.Helper()
	return writeManifest(t, map[string]any{
		"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview",
		"spec": map[string]any{"token": token, "audiences": []string{"e2e"}},
	})
}
