package pods

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// TestResources finds the Pod's limits as the size of its VM and in the cgroups of
// its containers.
func TestResources(t *testing.T) {
	t.Parallel()
	n := testcluster.Up(t).Namespace(t)
	n.Apply("testdata/resources.yaml")
	n.Ready("sized")
	read := func(container, file string) string {
		t.Helper()
		return n.Exec("sized/"+container, "cat", "/sys/fs/cgroup/"+file)
	}
	want(t, "memory.max of small", read("small", "memory.max"), strconv.Itoa(64<<20))
	want(t, "memory.max of large", read("large", "memory.max"), strconv.Itoa(192<<20))
	want(t, "cpu.max of small", read("small", "cpu.max"), "50000 100000")
	want(t, "cpu.max of large", read("large", "cpu.max"), "150000 100000")
	want(t, "CPUs of the VM", n.Exec("sized/small", "nproc"), "2")

	m := regexp.MustCompile(`MemTotal:\s+(\d+) kB`).FindStringSubmatch(n.Exec("sized/small", "cat", "/proc/meminfo"))
	total, err := strconv.Atoi(m[1])
	if err != nil {
		t.Fatal(err)
	}
	if mib := total >> 10; mib < 192 || mib > 512 {
		t.Errorf("the VM has %d MiB of memory, the Pod's limits are 256 MiB", mib)
	}

	t.Run("shareProcessNamespace", func(t *testing.T) {
		n := n.For(t)
		if ps := n.Exec("sized/small", "ps"); !strings.Contains(ps, "sleep 100000") {
			t.Errorf("small does not see large's process:\n%s", ps)
		}
		// Signals from inside cannot kill the first process of a process namespace;
		// here it is another's.
		for i, signal := range []int{15, 9} {
			n.Shell("sized/small", fmt.Sprintf(`kill -%d $(ps | awk '/[s]leep 100000/ {print $1}')`, signal))
			n.Restarts("sized", "large", i+1)
			end := n.Pod("sized").Container("large").LastState.Terminated
			want(t, "exit code of a process ended by a signal", end.ExitCode, 128+signal)
		}
	})
	t.Run("resize in place", func(t *testing.T) {
		n := n.For(t)
		n.Kubectl("patch", "pod", "sized", "--subresource=resize", "-p",
			`{"spec":{"containers":[{"name":"small","resources":{"limits":{"cpu":"750m","memory":"96Mi"}}}]}}`)
		n.Until("the container has its new limits", testcluster.Patience, func() bool {
			return read("small", "memory.max") == strconv.Itoa(96<<20) && read("small", "cpu.max") == "75000 100000"
		})
		want(t, "restarts", n.Pod("sized").Container("small").RestartCount, 0)
	})
	t.Run("ephemeral debug container", func(t *testing.T) { debug(t, n.For(t)) })
}

// debug adds an ephemeral container to the running Pod.
func debug(t *testing.T, n *testcluster.Namespace) {
	n.Kubectl("debug", "sized", "--image=h8s.local/testbox:1", "--container=debugger", "--profile=general", "--", "/testbox", "serve")
	n.Wait("pod/sized", `jsonpath={.status.ephemeralContainerStatuses[0].state.running.startedAt}`)
	if ps := n.Exec("sized/debugger", "ps"); !strings.Contains(ps, "sleep infinity") {
		t.Errorf("the debugger does not see the Pod's processes:\n%s", ps)
	}
	want(t, "the debugger through the Pod's loopback", n.Exec("sized/small", "wget", "-qO-", "http://127.0.0.1:8080/hostname"), "sized")
}
