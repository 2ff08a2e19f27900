package pods

import (
	"strings"
	"testing"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// TestEmptyDir writes to emptyDirs on disk and in memory: they outlive a container
// and die with the Pod.
func TestEmptyDir(t *testing.T) {
	t.Parallel()
	n := testcluster.Up(t).Namespace(t)
	n.Apply("testdata/emptydir.yaml")
	n.Ready("scratch")

	n.Shell("scratch/mortal", "echo kept > /disk/kept; echo kept > /memory/kept; echo deep > /sub/file; sync")
	want(t, "a subPath of an emptyDir", n.Exec("scratch/other", "cat", "/disk/deep/er/file"), "deep")
	want(t, "file system of a memory emptyDir", n.Exec("scratch/mortal", "stat", "-f", "-c", "%T", "/memory"), "tmpfs")
	want(t, "group of an emptyDir with fsGroup", n.Exec("scratch/mortal", "stat", "-c", "%g", "/disk"), "2345")
	n.Shell("scratch/other", "echo unprivileged > /disk/by-1234 && echo unprivileged > /memory/by-1234")
	out, code := n.ExecCode("scratch/mortal", "sh", "-c", "head -c 6000000 /dev/zero > /memory/big 2>&1")
	if code == 0 {
		t.Errorf("6 MB fit into a memory emptyDir with sizeLimit 4Mi: %s", out)
	}
	n.Shell("scratch/mortal", "rm -f /memory/big; : > /disk/end")
	n.Restarts("scratch", "mortal", 1)
	n.Until("the restarted container has started", testcluster.Patience, func() bool {
		return strings.Contains(n.Logs("scratch/mortal"), "entries: 2")
	})
	want(t, "disk emptyDir after a restart", n.Exec("scratch/mortal", "cat", "/disk/kept"), "kept")
	want(t, "memory emptyDir after a restart", n.Exec("scratch/mortal", "cat", "/memory/kept"), "kept")
	want(t, "subPath after a restart", n.Exec("scratch/mortal", "cat", "/sub/file"), "deep")
	// The container's own layer, though, is new.
	want(t, "layers' files", n.Shell("scratch/mortal", "ls / | grep -c in-the-layer"), "1")

	n.Kubectl("delete", "pod", "scratch")
	n.Apply("testdata/emptydir.yaml")
	n.Ready("scratch")
	want(t, "files of the former Pod", n.Shell("scratch/mortal", "ls /disk /memory | grep -c kept || true"), "0")
}
