package pods

import (
	"strings"
	"testing"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// TestRollout restarts, updates and undoes a Deployment.
func TestRollout(t *testing.T) {
	t.Parallel()
	n := testcluster.Up(t).Namespace(t)
	status := func() {
		t.Helper()
		n.Kubectl("rollout", "status", "deployment/web", "--timeout="+testcluster.Patience.String())
	}
	edition := func() string {
		t.Helper()
		return strings.TrimSpace(n.Kubectl("exec", "deployment/web", "--", "sh", "-c", "echo $EDITION"))
	}
	n.Apply("testdata/rollout.yaml")
	status()
	first := n.Get("pods", ".items[0].metadata.name")
	want(t, "edition at first", edition(), "first")

	n.Kubectl("rollout", "restart", "deployment/web")
	status()
	if names := n.Kubectl("get", "pods", "--field-selector=status.phase=Running", "-o", "name"); strings.TrimSpace(names) == "pod/"+first {
		t.Errorf("rollout restart kept Pod %s", first)
	}
	n.Wait("pod/"+first, "delete")

	n.Kubectl("set", "env", "deployment/web", "EDITION=second")
	status()
	n.Until("only the new Pod is left", testcluster.Patience, func() bool {
		return len(strings.Fields(n.Kubectl("get", "pods", "-o", "name"))) == 1
	})
	want(t, "edition after the update", edition(), "second")

	n.Kubectl("rollout", "undo", "deployment/web")
	status()
	n.Until("only the old edition is left", testcluster.Patience, func() bool {
		return len(strings.Fields(n.Kubectl("get", "pods", "-o", "name"))) == 1
	})
	want(t, "edition after undo", edition(), "first")
	if out := n.Kubectl("rollout", "history", "deployment/web"); len(strings.Split(strings.TrimSpace(out), "\n")) < 4 {
		t.Errorf("rollout history is too short:\n%s", out)
	}
}
