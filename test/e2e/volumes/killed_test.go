package volumes

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// TestKilled kills what makes, publishes and mounts volumes, again and again, while Pods
// come and go: a Pod that has its volume notices nothing, those that come get theirs, and
// nothing is left in the end. It runs alone.
func TestKilled(t *testing.T) {
	c := testcluster.Up(t)
	n := c.Namespace(t)
	// The first ones have the kubelet make directories that stay.
	own := pod{Name: "c", Volume: "csi: {driver: block.hypernetes.io, volumeAttributes: {size: 64Mi}}"}
	start(t, n, all{claim{Name: "files"}, claim{Name: "raw", Mode: "Block"}, pod{Name: "a", Claim: "files"}, pod{Name: "b", Claim: "raw", Block: true}, own}, "a", "b", "c")
	stop(n, "a", "b", "c")
	n.Kubectl("delete", "pvc", "files", "raw")
	none := func() {
		n.Until("no volume is left", testcluster.Patience, func() bool {
			return n.Cluster.Kubectl(t, "get", "persistentvolumes,localvolumes", "-o", "name") == ""
		})
	}
	none()
	before := c.Inventory(t)
	start(t, n, all{claim{Name: "steady"}, pod{Name: "steady", Claim: "steady", Command: "i=0; while echo $i >> /data/n; do i=$((i+1)); sync; sleep 0.1; done; echo broken"}}, "steady")
	for _, victim := range []string{"h8s-csi node", "kubelet ", "h8s-csi controller"} {
		t.Run(strings.TrimSpace(victim), func(t *testing.T) {
			n := n.For(t)
			names := []string{"a", "b"}
			objects := all{}
			for i, name := range names {
				mode := []string{"", "Block"}[i%2]
				objects = append(objects, claim{Name: name, Mode: mode}, pod{Name: name, Claim: name, Block: mode == "Block"})
			}
			objects, names = append(objects, own), append(names, own.Name)
			// Pods come while it dies, and go while it dies.
			apply(t, n, objects.String())
			dying(t, c, victim)
			n.Ready(names...)
			n.Shell("a", "echo here > /data/f; sync")
			n.Kubectl(append([]string{"delete", "pod", "--wait=false"}, names...)...)
			dying(t, c, victim)
			for _, name := range names {
				n.Kubectl("wait", "--for=delete", "pod/"+name, "--timeout="+testcluster.Patience.String())
			}
			start(t, n, pod{Name: "again", Claim: "a"}, "again")
			want(t, "what the Pod before wrote", n.Exec("again", "cat", "/data/f"), "here")
			stop(n, "again")
			n.Kubectl("delete", "pvc", "a", "b")
			want(t, "phase of the Pod that has its volume", n.Get("pod/steady", ".status.phase"), "Running")
		})
	}
	// Not a line is missing, and not one is there twice.
	lines := strings.Fields(n.Exec("steady", "cat", "/data/n"))
	for i, line := range lines {
		if line != fmt.Sprint(i) {
			t.Fatalf("line %d of %d is %q", i, len(lines), line)
		}
	}
	n.Kubectl("delete", "pod", "steady", "--grace-period=1")
	n.Kubectl("delete", "pvc", "steady")
	none()
	c.NothingLeft(t, before, time.Minute)
}

// dying kills a program a few times within what it takes to start a Pod.
func dying(t *testing.T, c *testcluster.Cluster, command string) {
	t.Helper()
	var once sync.Once
	for range 4 {
		killed := false
		for _, p := range c.Processes(t) {
			if strings.HasPrefix(p.Command+" ", command) {
				killed = unix.Kill(p.PID, unix.SIGKILL) == nil || killed
			}
		}
		if killed {
			once.Do(func() { t.Logf("killed %s", command) })
		}
		// A moment for the next one to begin with something.
		time.Sleep(700 * time.Millisecond)
	}
}
