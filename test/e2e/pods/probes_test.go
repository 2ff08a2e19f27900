package pods

import (
	"strings"
	"testing"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// TestProbes makes containers unready and then unhealthy, by every mechanism, and
// sees each probe notice.
func TestProbes(t *testing.T) {
	t.Parallel()
	n := testcluster.Up(t).Namespace(t)
	n.Apply("testdata/probes.yaml")
	n.Ready("probes")
	for _, c := range n.Pod("probes").Status.ContainerStatuses {
		want(t, "restarts of "+c.Name+" before anything was wrong", c.RestartCount, 0)
	}

	ready := func(container, value string) {
		t.Helper()
		n.Wait("pod/probes", `jsonpath={.status.containerStatuses[?(@.name=="`+container+`")].ready}=`+value)
	}
	n.Shell("probes/exec", "rm /ready")
	ready("exec", "false")
	want(t, "Pod readiness", n.Get("pod/probes", `.status.conditions[?(@.type=="Ready")].status`), "False")
	n.Shell("probes/exec", "touch /ready")
	ready("exec", "true")

	// Each is broken in its own way; the probe must say so and the container restart.
	for _, broken := range []struct{ container, script string }{
		{"http", "wget -qO- http://127.0.0.1:8100/sick"},
		{"grpc", "wget -qO- http://127.0.0.1:8200/sick"},
		{"tcp", "kill $(cat /pid)"},
		{"exec", "rm /alive"},
	} {
		n.Shell("probes/"+broken.container, broken.script)
	}
	for _, container := range []string{"http", "grpc", "tcp", "exec"} {
		n.Restarts("probes", container, 1)
	}
	n.Ready("probes")
	events := n.Kubectl("get", "events", "--field-selector=involvedObject.name=probes", "-o", "jsonpath={range .items[*]}{.message}{'\\n'}{end}")
	// Texts of single failures are merged by the API server's event limits; these are not.
	for _, text := range []string{
		"HTTP probe failed with statuscode: 503",
		"Readiness probe failed:",
		"Container http failed liveness probe, will be restarted",
		"Container grpc failed liveness probe, will be restarted",
		"Container tcp failed liveness probe, will be restarted",
		"Container exec failed liveness probe, will be restarted",
	} {
		if !strings.Contains(events, text) {
			t.Errorf("no event says %q:\n%s", text, events)
		}
	}
}

// TestStartupProbe ends a container that does not start in time, without liveness
// probes in the meantime.
func TestStartupProbe(t *testing.T) {
	t.Parallel()
	n := testcluster.Up(t).Namespace(t)
	n.Apply("testdata/startup.yaml")
	n.Restarts("startup", "slow", 1)
	events := n.Kubectl("get", "events", "-o", "jsonpath={range .items[*]}{.message}{'\\n'}{end}")
	if !strings.Contains(events, "failed startup probe, will be restarted") || strings.Contains(events, "liveness was asked") {
		t.Errorf("unexpected events:\n%s", events)
	}
}
