package pods

import (
	"strings"
	"testing"
	"time"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// TestTwentyPods brings up a Deployment of 20 Pods and takes it away; nothing may be
// left. It is not parallel, because it compares the whole machine before and after.
func TestTwentyPods(t *testing.T) {
	c := testcluster.Up(t)
	n := c.Namespace(t)
	// The image is unpacked on its first use and stays; that is no leak.
	n.Kubectl("run", "first", "--image=h8s.local/busybox:1", "--restart=Never", "--command", "--", "true")
	n.Wait("pod/first", "jsonpath={.status.phase}=Succeeded")
	n.Kubectl("delete", "pod", "first")
	before := settled(t, c)
	processes := c.Processes(t)

	began := time.Now()
	n.Apply("testdata/twenty.yaml")
	n.Kubectl("rollout", "status", "deployment/twenty", "--timeout=8m")
	t.Logf("20 Pods ready after %.1f s", time.Since(began).Seconds())
	during := c.Inventory(t)
	t.Logf("with 20 Pods: %s", during.Counts())
	want(t, "running Pods", len(strings.Fields(n.Kubectl("get", "pods", "--field-selector=status.phase=Running", "-o", "name"))), 20)
	addresses := map[string]bool{}
	for _, ip := range strings.Fields(n.Get("pods", ".items[*].status.podIP")) {
		addresses[ip] = true
	}
	want(t, "distinct Pod addresses", len(addresses), 20)
	// Programs that run for a moment (`shim start`, CNI plugins) come and go.
	n.Until("one shim and one VM per Pod and nothing else", time.Minute, func() bool {
		shims, vms, others := newProcesses(processes, c.Processes(t))
		return len(shims) == 20 && len(vms) == 20 && len(others) == 0
	})

	began = time.Now()
	n.Kubectl("delete", "deployment", "twenty", "--cascade=foreground", "--timeout=4m")
	n.Kubectl("wait", "--for=delete", "pod", "-l", "app=twenty", "--timeout=4m")
	t.Logf("gone after %.1f s", time.Since(began).Seconds())
	c.NothingLeft(t, before, 90*time.Second)
}

// settled takes stock once two inventories in a row are the same: a Pod that was
// just deleted is still being collected.
func settled(t *testing.T, c *testcluster.Cluster) testcluster.Inventory {
	t.Helper()
	deadline := time.Now().Add(60 * time.Second)
	last := c.Inventory(t)
	tick := time.NewTicker(3 * time.Second)
	defer tick.Stop()
	for range tick.C {
		now := c.Inventory(t)
		if len(now.Added(last)) == 0 && len(last.Added(now)) == 0 {
			return now
		}
		if time.Now().After(deadline) {
			t.Fatalf("the machine does not come to rest: %q, %q", now.Added(last), last.Added(now))
		}
		last = now
	}
	panic("unreachable")
}
