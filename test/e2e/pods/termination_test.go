package pods

import (
	"strings"
	"testing"
	"time"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// TestHooksAndGrace ends one Pod that obeys SIGTERM after its preStop hook, and one
// that ignores it until its grace period is over.
func TestHooksAndGrace(t *testing.T) {
	t.Parallel()
	n := testcluster.Up(t).Namespace(t)
	n.Apply("testdata/hooks.yaml")
	n.Ready("hooks", "stubborn")
	want(t, "file of the postStart hook", n.Exec("hooks/main", "cat", "/started"), "started")

	// A failing hook ends its container.
	n.Until("the container with a failing hook is restarted", testcluster.Patience, func() bool {
		events := n.Kubectl("get", "events", "--field-selector=involvedObject.name=unhooked", "-o", "jsonpath={.items[*].reason}")
		return strings.Contains(events, "FailedPostStartHook")
	})
	n.Kubectl("delete", "pod", "unhooked", "--wait=false")

	log := n.Start("logs", "-f", "hooks", "-c", "main")
	began := time.Now()
	n.Kubectl("delete", "pod", "hooks", "--wait=false")
	log.Expect(`preStop\n`)
	log.Expect(`preStop ends\n`)
	log.Expect(`signal terminated`)
	if strings.Contains(log.Output()[:strings.Index(log.Output(), "preStop ends")], "signal terminated") {
		t.Errorf("SIGTERM came before preStop had ended:\n%s", log.Output())
	}
	n.Wait("pod/hooks", "delete")
	if took := time.Since(began); took < 2*time.Second || took > 29*time.Second {
		t.Errorf("a Pod that obeys SIGTERM was gone after %s, with a hook of 2 s and a grace period of 30 s", took)
	}

	log = n.Start("logs", "-f", "stubborn")
	log.Expect(`ready`)
	began = time.Now()
	n.Kubectl("delete", "pod", "stubborn", "--wait=false")
	log.Expect(`signal terminated`)
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("SIGTERM came only after %s", took)
	}
	n.Wait("pod/stubborn", "delete")
	if took := time.Since(began); took < 6*time.Second || took > 40*time.Second {
		t.Errorf("a Pod that ignores SIGTERM was gone after %s, with a grace period of 6 s", took)
	}
}
