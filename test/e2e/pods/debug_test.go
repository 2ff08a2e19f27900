package pods

import (
	"strings"
	"testing"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// TestDebugTarget gives an ephemeral container the processes of one container and
// not those of the others.
func TestDebugTarget(t *testing.T) {
	t.Parallel()
	n := testcluster.Up(t).Namespace(t)
	n.Apply("testdata/debugtarget.yaml")
	n.Ready("target")
	if ps := n.Exec("target/main", "ps"); strings.Contains(ps, "222222") {
		t.Errorf("main sees other's processes:\n%s", ps)
	}
	n.Kubectl("debug", "target", "--image=h8s.local/busybox:1", "--container=debugger", "--target=main", "--profile=general", "--", "sleep", "infinity")
	n.Wait("pod/target", `jsonpath={.status.ephemeralContainerStatuses[0].state.running.startedAt}`)
	ps := n.Exec("target/debugger", "ps")
	if !strings.Contains(ps, "111111") || strings.Contains(ps, "222222") {
		t.Errorf("the debugger of main should see 111111 and not 222222:\n%s", ps)
	}
}
