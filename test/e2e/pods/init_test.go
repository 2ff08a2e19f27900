package pods

import (
	"strings"
	"testing"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// TestInitContainers runs init containers, a sidecar among them, in their order.
func TestInitContainers(t *testing.T) {
	t.Parallel()
	n := testcluster.Up(t).Namespace(t)
	n.Apply("testdata/init.yaml")
	n.Ready("init")
	order := strings.Fields(n.Exec("init/main", "cat", "/shared/order"))
	want(t, "order of the containers", strings.Join(order, " "), "first sidecar second main")
	pod := n.Pod("init")
	for _, name := range []string{"first", "second"} {
		if end := pod.Container(name).State.Terminated; end == nil || end.ExitCode != 0 || end.Reason != "Completed" {
			t.Errorf("init container %s: %+v", name, pod.Container(name))
		}
	}
	if !pod.Container("sidecar").Ready {
		t.Errorf("the sidecar is not ready: %+v", pod.Container("sidecar"))
	}

	// A sidecar that ends is restarted, the main container is not.
	n.Kubectl("exec", "init", "-c", "main", "--", "sh", "-c", "wget -qO- 'http://127.0.0.1:8080/exit?code=3' 2>/dev/null; true")
	n.Restarts("init", "sidecar", 1)
	want(t, "exit code of the sidecar", n.Pod("init").Container("sidecar").LastState.Terminated.ExitCode, 3)
	want(t, "restarts of main", n.Pod("init").Container("main").RestartCount, 0)
	n.Ready("init")

	log := n.Start("logs", "-f", "init", "-c", "main")
	n.Kubectl("delete", "pod", "init", "--wait=false")
	log.Expect("sidecar outlives main")
	n.Wait("pod/init", "delete")
}

// TestFailingInitContainer keeps the main container from ever starting.
func TestFailingInitContainer(t *testing.T) {
	t.Parallel()
	n := testcluster.Up(t).Namespace(t)
	n.Apply("testdata/badinit.yaml")
	n.Wait("pod/badinit", "jsonpath={.status.phase}=Failed")
	pod := n.Pod("badinit")
	want(t, "exit code of the init container", pod.Container("fails").State.Terminated.ExitCode, 5)
	if pod.Container("main").State.Running != nil || pod.Container("main").ContainerID != "" {
		t.Errorf("the main container was started: %+v", pod.Container("main"))
	}
}
