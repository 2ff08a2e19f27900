package pods

import (
	"fmt"
	"strings"
	"testing"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// TestConfiguration follows ConfigMaps, Secrets, the downward API and projections of
// them from the API into a running container and through updates.
func TestConfiguration(t *testing.T) {
	t.Parallel()
	n := testcluster.Up(t).Namespace(t)
	n.Apply("testdata/config.yaml")
	n.Ready("config")

	want(t, "environment from a Secret", n.Shell("config/shell", "echo $PASSWORD"), "first")
	want(t, "environment from a ConfigMap", n.Shell("config/shell", "echo $SETTING_a"), "1")
	want(t, "Secret file", n.Exec("config/shell", "cat", "/password/word"), "first")
	want(t, "mode of a Secret file", n.Exec("config/shell", "stat", "-L", "-c", "%a", "/password/word"), "400")
	want(t, "projected ConfigMap", n.Exec("config/shell", "cat", "/everything/from-config/a"), "1")
	want(t, "projected Secret", n.Exec("config/shell", "cat", "/everything/word"), "first")
	want(t, "projected label", n.Exec("config/shell", "cat", "/everything/labels"), `shade="light"`)
	want(t, "subPath of a ConfigMap", n.Exec("config/shell", "cat", "/etc/single.conf"), "1")
	want(t, "what a subPath of a file is", n.Exec("config/shell", "stat", "-c", "%F", "/etc/single.conf"), "regular file")
	if out, code := n.ExecCode("config/shell", "sh", "-c", "echo x > /password/new 2>&1"); code == 0 {
		t.Errorf("a Secret volume can be written to: %s", out)
	}

	t.Run("ConfigMap updates are atomic", func(t *testing.T) { updateConfigMap(t, n.For(t)) })
	t.Run("Secret and label updates arrive", func(t *testing.T) { updateSecret(t, n.For(t)) })
	t.Run("a subPath keeps its content", func(t *testing.T) {
		want(t, "subPath after the update", n.For(t).Exec("config/shell", "cat", "/etc/single.conf"), "1")
	})
	want(t, "restarts", n.Pod("config").Container("reader").RestartCount, 0)
}

// updateConfigMap changes two keys at once, again and again. An annotation makes the
// kubelet look at the Pod now rather than at its next periodic sync.
func updateConfigMap(t *testing.T, n *testcluster.Namespace) {
	log := n.Start("logs", "-f", "config", "-c", "reader")
	log.Expect(`saw 1\n`)
	for i := 2; i <= 8; i++ {
		n.Kubectl("patch", "configmap", "settings", "-p", fmt.Sprintf(`{"data":{"a":"%d","b":"%d"}}`, i, i))
		n.Kubectl("annotate", "pod", "config", fmt.Sprintf("sync=%d", i), "--overwrite")
		if i%3 == 2 { // the others may be overtaken
			log.Expect(fmt.Sprintf(`saw %d\n`, i))
		}
	}
	if out := log.Output(); strings.Contains(out, "MIX") {
		t.Errorf("the reader saw half an update:\n%s", out)
	}
	n.Until("the projection is updated as well", testcluster.Patience, func() bool {
		return n.Exec("config/shell", "cat", "/everything/from-config/a") == "8"
	})
}

func updateSecret(t *testing.T, n *testcluster.Namespace) {
	log := n.Start("logs", "-f", "config", "-c", "watcher")
	log.Expect(`first\n`)
	n.Kubectl("patch", "secret", "password", "-p", `{"stringData":{"word":"second"}}`)
	n.Kubectl("label", "pod", "config", "shade=dark", "--overwrite")
	log.Expect(`second\n`)
	n.Until("the Secret volume is updated", testcluster.Patience, func() bool {
		return n.Exec("config/shell", "cat", "/password/word") == "second"
	})
	n.Until("the label is updated", testcluster.Patience, func() bool {
		return n.Exec("config/shell", "cat", "/everything/labels") == `shade="dark"`
	})
	want(t, "mode of an updated Secret file", n.Exec("config/shell", "stat", "-L", "-c", "%a", "/password/word"), "400")
	want(t, "environment after the update", n.Shell("config/shell", "echo $PASSWORD"), "first")
}
