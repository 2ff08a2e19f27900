package volumes

import (
	"strings"
	"testing"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// TestRestart stops the node and starts it again, as a machine that is rebooted: Pods come
// back to their data, and records of volumes, which are in memory, are made anew. It runs
// alone.
func TestRestart(t *testing.T) {
	c := testcluster.Up(t)
	n := c.Namespace(t)
	start(t, n, all{
		claim{Name: "files"}, claim{Name: "raw", Mode: "Block", Size: "64Mi"}, claim{Name: "unused"},
		pod{Name: "a", Claim: "files", Mount: "subPath: sub"}, pod{Name: "b", Claim: "raw", Block: true},
	}, "a", "b")
	n.Shell("a", "echo kept > /data/f; sync")
	n.Shell("b", "echo kept | dd of=/dev/vol conv=notrunc,fsync 2>/dev/null")
	uid := n.Get("pod/a", ".metadata.uid")
	c.H8S(t, "down")
	for _, m := range c.HostMounts(t) {
		if strings.Contains(m.Source, "h8s-vol") || strings.Contains(m.Target, "kubernetes.io~csi") {
			t.Errorf("mounted on the machine while the node is down: %+v", m)
		}
	}
	c.UpAgain(t)
	n.Until("the Pods' containers have started again", testcluster.Patience, func() bool {
		out, err := n.Try("get", "pods", "-o", `jsonpath={range .items[*]}{.status.containerStatuses[0].restartCount}{.status.containerStatuses[0].ready} {end}`)
		return err == nil && out == "1true 1true "
	})
	want(t, "the Pod", n.Get("pod/a", ".metadata.uid"), uid)
	want(t, "a file", n.Exec("a", "cat", "/data/f"), "kept")
	want(t, "a disk", n.Shell("b", "head -n 1 /dev/vol"), "kept")
	// Volumes work on as before.
	start(t, n, pod{Name: "c", Claim: "unused"}, "c")
	n.Shell("c", "echo x > /data/f")
	stop(n, "a", "b", "c")
	n.Kubectl("delete", "pvc", "files", "raw", "unused")
	n.Until("no volume is left", testcluster.Patience, func() bool {
		return n.Cluster.Kubectl(t, "get", "persistentvolumes,localvolumes", "-o", "name") == ""
	})
}
