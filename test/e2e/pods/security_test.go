package pods

import (
	"regexp"
	"strings"
	"testing"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// TestSecurityContext reads every setting back from inside the containers.
func TestSecurityContext(t *testing.T) {
	t.Parallel()
	n := testcluster.Up(t).Namespace(t)
	n.Apply("testdata/security.yaml")
	n.Ready("secure")
	status := func(container, field string) string {
		t.Helper()
		out := n.Exec("secure/"+container, "cat", "/proc/1/status")
		m := regexp.MustCompile(`(?m)^` + field + `:\s+(.*)$`).FindStringSubmatch(out)
		if m == nil {
			t.Fatalf("no %s in the status of %s:\n%s", field, container, out)
		}
		return strings.Join(strings.Fields(m[1]), " ")
	}
	want(t, "user", status("user", "Uid"), "1000 1000 1000 1000")
	want(t, "group", status("user", "Gid"), "3000 3000 3000 3000")
	if groups := status("user", "Groups"); !strings.Contains(groups, "4321") {
		t.Errorf("supplemental groups: %q", groups)
	}
	want(t, "capabilities after drop ALL", status("user", "CapBnd"), "0000000000000000")
	want(t, "no new privileges", status("user", "NoNewPrivs"), "1")
	want(t, "seccomp with RuntimeDefault", status("user", "Seccomp"), "2")
	want(t, "seccomp of an exec", n.Shell("secure/user", "awk '/^Seccomp:/ {print $2}' /proc/self/status"), "2")
	want(t, "capabilities of an exec", n.Shell("secure/user", "awk '/^CapBnd:/ {print $2}' /proc/self/status"), "0000000000000000")
	want(t, "user of an exec", n.Exec("secure/user", "id", "-u"), "1000")

	want(t, "capabilities with NET_ADMIN only", status("readonly", "CapBnd"), "0000000000001000")
	if out, code := n.ExecCode("secure/readonly", "sh", "-c", "touch /file 2>&1"); code == 0 || !strings.Contains(out, "Read-only") {
		t.Errorf("touch on a read-only root: %q, exit code %d", out, code)
	}
	if out, code := n.ExecCode("secure/readonly", "sh", "-c", "mount -t tmpfs x /mnt 2>&1 || unshare -m true 2>&1"); code == 0 {
		t.Errorf("mount without CAP_SYS_ADMIN succeeded: %q", out)
	}

	want(t, "seccomp with Unconfined", status("unconfined", "Seccomp"), "0")
	want(t, "masked file", n.Exec("secure/unconfined", "sh", "-c", "head -c 1 /proc/kcore 2>/dev/null | wc -c"), "0")

	// Privileged is privileged in a kernel of the Pod's own.
	out := n.Shell("secure/privileged", "mkdir /m && mount -t tmpfs x /m && echo mounted")
	want(t, "mount in a privileged container", out, "mounted")
	want(t, "sysctl of the Pod", n.Exec("secure/user", "cat", "/proc/sys/net/ipv4/ip_unprivileged_port_start"), "80")

	n.Wait("pod/refused", "jsonpath={.status.containerStatuses[0].state.waiting.reason}=CreateContainerConfigError")
	if m := n.Get("pod/refused", ".status.containerStatuses[0].state.waiting.message"); !strings.Contains(m, "runAsNonRoot") {
		t.Errorf("the refusal does not name runAsNonRoot: %q", m)
	}
}
