package nodes

import (
	"cmp"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// lossPatience is how long the cluster may take to see that a node is lost or back.
const lossPatience = 2 * time.Minute

// clusterNode is what h8s node list says of a node.
type clusterNode struct {
	Name, Ready, Address string
	Roles, PodCIDRs      []string
	Unschedulable        bool
}

func list(t *testing.T, c *testcluster.Cluster) map[string]clusterNode {
	t.Helper()
	var nodes []clusterNode
	if err := json.Unmarshal([]byte(c.H8S(t, "node", "list", "-o", "json")), &nodes); err != nil {
		t.Fatal(err)
	}
	out := map[string]clusterNode{}
	for _, n := range nodes {
		out[n.Name] = n
	}
	return out
}

// allReady checks that exactly these nodes are there, and ready.
func allReady(t *testing.T, c *testcluster.Cluster, names ...string) {
	t.Helper()
	nodes := list(t, c)
	if len(nodes) != len(names) {
		t.Errorf("nodes %v, want %v", nodes, names)
	}
	for _, name := range names {
		if nodes[name].Ready != "True" {
			t.Errorf("node %s: %+v", name, nodes[name])
		}
	}
}

// awaitReady waits for the node's Ready condition to be as told.
func awaitReady(t *testing.T, c *testcluster.Cluster, name, status string) {
	t.Helper()
	c.Kubectl(t, "wait", "--for=condition=Ready="+status, "node/"+name, "--timeout="+lossPatience.String())
}

// TestNodes is one story, because a cluster of several nodes takes its time to make.
func TestNodes(t *testing.T) {
	shared := cmp.Or(os.Getenv("H8S_E2E_NODE"), "e2e")
	c := testcluster.Own(t, shared+"-n", cmp.Or(os.Getenv("H8S_E2E_NODES_PORT"), "16447"))
	names := c.Nodes(t, 3)
	t.Run("Ready", func(t *testing.T) { ready(t, c, names) })
	n := c.Namespace(t)
	n.Apply("testdata/web.yaml")
	t.Run("Traffic", func(t *testing.T) { traffic(t, n.For(t), names) })
	t.Run("Drain", func(t *testing.T) { drain(t, n.For(t), names[2]) })
	t.Run("ComponentsKilled", func(t *testing.T) { componentsKilled(t, n.For(t), names[1]) })
	t.Run("Lost", func(t *testing.T) { lost(t, n.For(t), names[2]) })
	t.Run("Agent", func(t *testing.T) { agent(t, c, names) })
	t.Run("DownAndUp", func(t *testing.T) {
		c.H8S(t, "down")
		if out, code := c.Exit(t, "", "up", "--name", names[1]); code != 13 || !strings.Contains(out, "h8s up --name "+c.Node) {
			t.Errorf("a further node without its first: exit %d: %s", code, out)
		}
		c.UpAgain(t)
		for _, name := range names {
			awaitReady(t, c, name, "True")
		}
		traffic(t, n.For(t), names)
	})
	t.Run("Remove", func(t *testing.T) {
		c.H8S(t, "node", "remove", names[2], "--force")
		allReady(t, c, names[:2]...)
		gone(t, names[2])
		if out, code := c.Exit(t, "", "node", "remove", c.Node, "--name", c.Node); code != 2 || !strings.Contains(out, "control plane") {
			t.Errorf("the first node: exit %d: %s", code, out)
		}
		if out, code := c.Exit(t, "", "node", "drain", "no-such", "--name", c.Node); code != 19 {
			t.Errorf("an unknown node: exit %d: %s", code, out)
		}
	})
	t.Run("ScaleDown", func(t *testing.T) {
		c.H8S(t, "dev", "nodes", "1")
		allReady(t, c, c.Node)
		gone(t, names[1])
		if list := c.H8S(t, "token", "list"); strings.Count(list, "\n") != 1 {
			t.Errorf("tokens of h8s dev nodes are left:\n%s", list)
		}
	})
	t.Run("ResetTakesAll", func(t *testing.T) {
		c.H8S(t, "dev", "nodes", "2")
		c.H8S(t, "reset", "--yes")
		for _, name := range names {
			gone(t, name)
		}
		c.UpAgain(t) // for the clean-ups that come
	})
}

func ready(t *testing.T, c *testcluster.Cluster, names []string) {
	allReady(t, c, names...)
	nodes := list(t, c)
	addresses := map[string]bool{}
	for i, name := range names {
		n := nodes[name]
		if n.Address != fmt.Sprintf("100.64.0.%d", i+1) || len(n.PodCIDRs) != 1 || addresses[n.PodCIDRs[0]] {
			t.Errorf("%s: %+v", name, n)
		}
		addresses[n.PodCIDRs[0]] = true
		if (len(n.Roles) > 0) != (i == 0) {
			t.Errorf("%s has the roles %v", name, n.Roles)
		}
	}
	status := c.H8S(t, "status")
	for _, name := range names[1:] {
		if !strings.Contains(status, "further node: "+name+" running") {
			t.Errorf("status does not tell of %s:\n%s", name, status)
		}
	}
	// What could be read in the process list must not join.
	for _, name := range names[1:] {
		for _, p := range c.Further(name).Processes(t) {
			if strings.Contains(p.Command, "h8s1.") {
				t.Errorf("a token is on the command line of %s", p.Command)
			}
		}
		if _, err := os.Stat("/var/lib/h8s/" + name + "/kubeconfigs/bootstrap.kubeconfig"); err == nil {
			t.Errorf("%s keeps the token it joined with", name)
		}
	}
}

// traffic has each node's Pod fetch from each other's, through the Service and by its
// name in DNS; logs and exec go through each kubelet.
func traffic(t *testing.T, n *testcluster.Namespace, names []string) {
	for _, from := range names {
		for _, to := range names {
			fetch(n, from, func() string { return "http://" + onNode(n, to, ".status.podIP") + ":8080/" })
		}
		for range 3 {
			fetch(n, from, func() string { return "http://web." + n.Name + ".svc.cluster.local/" })
		}
		n.Logs(onNode(n, from, ".metadata.name"))
	}
	// A virtual machine on the last node, and back from it.
	last := names[len(names)-1]
	n.Kubectl("run", "vm", "--image=h8s.local/testbox:1", "--overrides="+fmt.Sprintf(`{"spec":{"nodeName":%q,"terminationGracePeriodSeconds":1}}`, last), "--", "serve")
	n.Ready("vm")
	n.Exec("vm", "/testbox", "get", "http://web/")
	fetch(n, names[0], func() string { return "http://" + n.Get("pod/vm", ".status.podIP") + ":8080/" })
	n.Kubectl("delete", "pod", "vm", "--wait")
}

// onNode is a field of the ready Pod of the DaemonSet on a node, empty if there is none now:
// one that was there when the node stopped may be replaced.
func onNode(n *testcluster.Namespace, node, field string) string {
	out, err := n.Try("get", "pods", "-l", "app=web", "--field-selector", "status.phase=Running,spec.nodeName="+node,
		"-o", "jsonpath={.items[0]"+field+"}")
	if err != nil {
		return ""
	}
	return out
}

// fetch has the Pod on a node ask until it is answered: a Service is programmed on every
// node in its own time.
func fetch(n *testcluster.Namespace, from string, url func() string) {
	n.Until("a Pod on "+from+" fetches "+url(), testcluster.Patience, func() bool {
		_, err := n.Try("exec", onNode(n, from, ".metadata.name"), "--", "/testbox", "get", url())
		return err == nil
	})
}

func drain(t *testing.T, n *testcluster.Namespace, node string) {
	n.Apply("testdata/budget.yaml")
	n.Kubectl("rollout", "status", "deployment/two", "--timeout="+testcluster.Patience.String())
	// One replica too few to let any go.
	on := n.Kubectl("get", "pods", "-l", "app=two", "-o", "jsonpath={.items[0].spec.nodeName}")
	out, code := n.Exit(t, "", "node", "drain", on, "--name", n.Node, "--timeout", "20s")
	if code != 22 || !strings.Contains(out, "PodDisruptionBudget") || !strings.Contains(out, n.Name+"/two-") {
		t.Errorf("a budget in the way: exit %d: %s", code, out)
	}
	n.H8S(t, "node", "uncordon", on)
	n.Kubectl("delete", "pdb", "two")
	n.H8S(t, "node", "drain", node)
	if !list(t, n.Cluster)[node].Unschedulable {
		t.Error("a drained node takes Pods")
	}
	left := n.Kubectl("get", "pods", "-l", "app=two", "--field-selector", "spec.nodeName="+node, "-o", "name")
	if left != "" {
		t.Errorf("left on the drained node: %s", left)
	}
	n.Kubectl("rollout", "status", "deployment/two", "--timeout="+testcluster.Patience.String())
	n.H8S(t, "node", "uncordon", node)
	n.Kubectl("delete", "deployment", "two", "--wait")
}

// componentsKilled kills components of a further node; its Pod goes on.
func componentsKilled(t *testing.T, n *testcluster.Namespace, node string) {
	further := n.Further(node)
	pod := n.Kubectl("get", "pods", "-l", "app=web", "--field-selector", "spec.nodeName="+node, "-o", "jsonpath={.items[0].metadata.name} {.items[0].metadata.uid}")
	for _, component := range []string{"kubelet", "containerd", "kubestack", "kube-proxy"} {
		killed := 0
		for _, p := range further.Processes(t) {
			if p.Cgroup == "/system/"+component && p.Is(component) {
				_ = unix.Kill(p.PID, unix.SIGKILL)
				killed++
			}
		}
		if killed != 1 {
			t.Errorf("%d processes of %s", killed, component)
		}
	}
	n.Until("the components of "+node+" are back", lossPatience, func() bool {
		out, err := further.TryH8S("status", "-o", "json")
		var st struct {
			Phase      string
			Components []struct {
				Name     string
				Restarts int
			}
		}
		if err != nil || json.Unmarshal([]byte(out), &st) != nil || st.Phase != "running" {
			return false
		}
		restarted := 0
		for _, c := range st.Components {
			if c.Restarts > 0 {
				restarted++
			}
		}
		return restarted == 4
	})
	awaitReady(t, n.Cluster, node, "True")
	if again := n.Kubectl("get", "pods", "-l", "app=web", "--field-selector", "spec.nodeName="+node, "-o", "jsonpath={.items[0].metadata.name} {.items[0].metadata.uid}"); again != pod {
		t.Errorf("the Pod is another: %s, was %s", again, pod)
	}
	fetch(n, node, func() string { return "http://web/" })
}

// lost kills everything of a node; the cluster notices, and h8s up brings it back.
func lost(t *testing.T, n *testcluster.Namespace, node string) {
	further := n.Further(node)
	for range 3 { // those started while others were killed too
		for _, p := range further.Processes(t) {
			_ = unix.Kill(p.PID, unix.SIGKILL)
		}
	}
	awaitReady(t, n.Cluster, node, "Unknown")
	if out := n.H8S(t, "dev", "nodes"); !strings.Contains(out, "absent") {
		t.Errorf("h8s dev nodes says:\n%s", out)
	}
	if out := n.UpAgain(t); !strings.Contains(out, "node "+node) {
		t.Errorf("h8s up says:\n%s", out)
	}
	awaitReady(t, n.Cluster, node, "True")
	n.Kubectl("rollout", "status", "daemonset/web", "--timeout="+testcluster.Patience.String())
}

// gone checks that nothing is left of a node.
func gone(t *testing.T, name string) {
	t.Helper()
	paths := []string{"/var/lib/h8s/" + name, "/run/h8s/" + name, "/sys/fs/cgroup/h8s/" + name}
	more, _ := filepath.Glob("/sys/fs/cgroup/*/h8s/" + name)
	for _, path := range append(paths, more...) {
		if _, err := os.Lstat(path); err == nil {
			t.Errorf("%s is left", path)
		}
	}
}
