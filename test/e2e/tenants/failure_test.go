package tenants

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// failures is a tenant with connections that last through everything that is done to the
// cluster.
type failures struct {
	*fabric
	tn    *testcluster.Tenant
	n     *testcluster.Namespace
	flows map[string]func() string // the last line each has printed
	t     *testing.T
}

// TestFailures kills what serves tenants' Networks, one after another. Established
// connections live on, what is new comes once it can, and in the end nothing is left.
func TestFailures(t *testing.T) {
	c := up(t)
	n := (&testcluster.Namespace{Cluster: c.Cluster}).For(t)
	// Each node learns of the others in its own time.
	for _, name := range c.nodes {
		n.Until(name+" knows all nodes", testcluster.Patience, func() bool {
			out, err := exec.Command("nsenter", fmt.Sprintf("--net=/proc/%d/ns/net", c.Further(name).AnchorPID(t)), "nft", "list", "set", "inet", "h8s_host", "nodes4").Output()
			return err == nil && strings.Count(string(out), "100.64.0.") == len(c.nodes)
		})
	}
	before := stock(t, c)
	t.Run("tenant", func(t *testing.T) { everythingFails(t, c) })
	var left string
	defer func() {
		if left != "" {
			t.Logf("not as before:\n%s", left)
		}
	}()
	n.Until("the nodes have nothing that they had not before", testcluster.Patience, func() bool {
		left = difference(before, stock(t, c))
		return left == ""
	})
}

func everythingFails(t *testing.T, c *fabric) {
	f := &failures{fabric: c, tn: c.Tenant(t, light...), flows: map[string]func() string{}, t: t}
	f.n = f.tn.Namespace("web", "default")
	testcluster.ApplyText(t, c.Cluster, fmt.Sprintf(`apiVersion: hypernetes.io/v1alpha1
kind: AddressPool
metadata: {name: %[1]s}
spec: {addresses: ["100.64.0.220-100.64.0.229"], tenants: [%[1]s], quarantineSeconds: 0}
`, f.tn.Name))
	t.Cleanup(func() {
		if out, err := c.TryKubectl("delete", "addresspool", f.tn.Name, "--wait=false"); err != nil {
			t.Errorf("clean up: %v\n%s", err, out)
		}
	})
	f.tn.Apply(join(f.server("a", c.nodes[0]), f.server("b", c.nodes[1]), pod{name: "third", node: c.nodes[2], runtime: "runc"}.yaml(f.n.Name),
		pod{name: "client", node: c.nodes[0], runtime: "runc"}.yaml(f.n.Name), f.service("web", "ClusterIP")))
	f.n.Ready("a", "b", "third", "client")
	staying, moving := f.balancers()
	f.flow("same-node", f.n.Get("pod/a", ".status.podIP")+":8081")
	f.flow("cross-node", f.n.Get("pod/b", ".status.podIP")+":8081")
	f.flow("service", f.n.Get("service/web", ".spec.clusterIP")+":82")
	f.fromOutside(staying + ":82")
	f.unharmed()

	for _, node := range c.nodes[:2] {
		f.run("kubestack of "+node, func(f *failures) { f.killed(node, "kubestack"); f.newcomer(node) })
	}
	f.run("controller", func(f *failures) { f.killed(c.Node, "h8s-controller"); f.newAddress() })
	f.run("control plane", func(f *failures) { f.killed(c.Node, "etcd", "kube-apiserver"); f.newcomer(c.nodes[1]) })
	f.run("supervisor", (*failures).supervisor)
	f.run("Service update", (*failures).update)
	f.run("NetworkPolicy", (*failures).policy)
	f.run("kubestack hangs", (*failures).hangs)
	f.run("node", func(f *failures) { f.node(c.nodes[2], moving) })
	f.portsAreThoseOfPods()
}

func (f *failures) run(name string, test func(f *failures)) {
	f.t.Run(name, func(t *testing.T) {
		sub := *f
		sub.t, sub.n = t, f.n.For(t)
		test(&sub)
		sub.unharmed()
	})
}

// server is a Pod behind the Service web. What connects for good must not end up on the
// third node, which is going to be killed: its Pod is not one.
func (f *failures) server(name, node string) string {
	return pod{name: name, app: "web", node: node, runtime: "runc"}.yaml(f.n.Name)
}

// service leads to the Pods of web: 80 to HTTP and 82 to the echo server.
func (f *failures) service(name, kind string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Service
metadata: {name: %s, namespace: %s}
spec: {type: %s, selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}, {name: echo, port: 82, targetPort: 8081}]}
`, name, f.n.Name, kind)
}

// flow keeps a connection of a Pod on the first node busy.
func (f *failures) flow(name, address string) {
	f.tn.Apply(fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: %s}
spec:
  runtimeClassName: runc
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  nodeSelector: {kubernetes.io/hostname: %q}
  containers: [{name: main, image: "h8s.local/testbox:1", args: [flow, %q], resources: {requests: {cpu: 1m, memory: 8Mi}}}]
`, name, f.n.Name, f.nodes[0], address))
	f.n.Ready(name)
	f.flows[name] = func() string {
		out, _ := f.n.Try("logs", name, "--tail=1")
		return strings.TrimSpace(out)
	}
}

// fromOutside keeps a connection of the machine outside busy.
func (f *failures) fromOutside(address string) {
	file := filepath.Join(f.t.TempDir(), "flow")
	out, err := os.Create(file)
	if err != nil {
		f.t.Fatal(err)
	}
	cmd := exec.Command("ip", "netns", "exec", f.out.name, f.out.box, "flow", address)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		_ = out.Close()
	})
	f.flows["outside"] = func() string {
		text, _ := os.ReadFile(file)
		lines := strings.Split(strings.TrimSpace(string(text)), "\n")
		return lines[len(lines)-1]
	}
}

// rounds is how many round trips a flow has made; it fails the test if the flow broke.
func (f *failures) rounds(name string) int {
	f.t.Helper()
	line := f.flows[name]()
	if line == "" {
		return 0 // not now
	}
	n, err := strconv.Atoi(strings.TrimPrefix(line, "flow "))
	if err != nil {
		f.t.Fatalf("the connection %s: %s", name, line)
	}
	return n
}

// lasts waits until every connection has made so many round trips more.
func (f *failures) lasts(more int) {
	f.t.Helper()
	for _, name := range slices.Sorted(maps.Keys(f.flows)) {
		now := 0
		f.n.Until("the connection "+name+" is alive", testcluster.Patience, func() bool {
			n := f.rounds(name)
			if now == 0 {
				now = n
			}
			return now > 0 && n >= now+more
		})
	}
}

func (f *failures) unharmed() {
	f.t.Helper()
	f.lasts(3)
}

// balancers makes LoadBalancers until one is announced by the third node, and one by
// another.
func (f *failures) balancers() (staying, moving string) {
	for i := 0; i < 9 && (staying == "" || moving == ""); i++ {
		name := fmt.Sprint("lb", i)
		f.tn.Apply(f.service(name, "LoadBalancer"))
		ip := external(f.n, name)
		f.answers(ip)
		if f.announces(f.nodes[2], ip) {
			moving = ip
		} else {
			staying = ip
		}
	}
	if staying == "" || moving == "" {
		f.t.Fatalf("nine addresses, and all are announced by one node: %q %q", staying, moving)
	}
	return staying, moving
}

// answers waits for an answer at an address, seen from outside.
func (f *failures) answers(ip string) {
	f.t.Helper()
	f.n.Until("the address "+ip+" answers from outside", testcluster.Patience, func() bool {
		_, ok := f.out.get("http://" + ip + "/hostname")
		return ok
	})
}

func (f *failures) announces(node, ip string) bool {
	return slices.Contains(strings.Fields(inNode(f.t, f.Further(node), "ip", "neigh", "show", "proxy")), ip)
}

// pids of a node's components, by name.
func pids(t testing.TB, node *testcluster.Cluster, name string) []int {
	var out []int
	for _, p := range node.Processes(t) {
		if p.Cgroup == "/system/"+name && p.Is(name) {
			out = append(out, p.PID)
		}
	}
	return out
}

// killed kills components of a node and waits for others in their place.
func (f *failures) killed(node string, names ...string) {
	f.t.Helper()
	on := f.Further(node)
	old := map[string][]int{}
	for _, name := range names {
		if old[name] = pids(f.t, on, name); len(old[name]) != 1 {
			f.t.Fatalf("processes of %s: %v", name, old[name])
		}
		if err := unix.Kill(old[name][0], unix.SIGKILL); err != nil {
			f.t.Fatal(err)
		}
	}
	for _, name := range names {
		f.n.Until(name+" is back", testcluster.Patience, func() bool {
			now := pids(f.t, on, name)
			return len(now) == 1 && now[0] != old[name][0]
		})
	}
	f.n.Until("the API server answers", testcluster.Patience, func() bool {
		_, err := f.n.Try("get", "--raw", "/readyz")
		return err == nil
	})
}

// newcomer has a Pod come on a node and find the others.
func (f *failures) newcomer(node string) {
	f.t.Helper()
	// An API server that has just started refuses what admission cannot judge yet: it
	// says so while it has not read the parameters of policies, here the Tenants.
	f.n.Until("the API server takes the newcomer", testcluster.Patience, func() bool {
		err := testcluster.TryApplyText(f.t, f.Cluster, pod{name: "late", node: node, runtime: "runc"}.yaml(f.n.Name))
		if err != nil {
			f.t.Logf("not yet: %v", err)
		}
		return err == nil
	})
	f.n.Ready("late")
	f.n.Until("the newcomer finds the Service", testcluster.Patience, func() bool {
		return answers(f.n, "late", "http://web/hostname")
	})
	f.n.Kubectl("delete", "pod", "late", "--wait")
}

// newAddress has a new LoadBalancer.
func (f *failures) newAddress() {
	f.t.Helper()
	f.tn.Apply(f.service("late", "LoadBalancer"))
	f.answers(external(f.n, "late"))
	f.n.Kubectl("delete", "service", "late")
}

func (f *failures) supervisor() {
	var st struct{ PID int }
	if err := json.Unmarshal([]byte(f.H8S(f.t, "status", "-o", "json")), &st); err != nil || st.PID <= 1 {
		f.t.Fatalf("status: %v, %+v", err, st)
	}
	if err := unix.Kill(st.PID, unix.SIGKILL); err != nil {
		f.t.Fatal(err)
	}
	f.UpAgain(f.t)
	f.newcomer(f.nodes[0])
}

// update adds an endpoint to the Services and takes it out again.
func (f *failures) update() {
	f.tn.Apply(f.server("extra", f.nodes[1]))
	f.n.Ready("extra")
	f.n.Until("the Service leads to the new Pod too", testcluster.Patience, func() bool {
		name, _ := get(f.n, "client", "http://web/hostname")
		return name == "extra"
	})
	f.unharmed()
	f.n.Kubectl("delete", "pod", "extra", "--wait")
	f.n.Until("the endpoint is gone", testcluster.Patience, func() bool {
		ips := f.n.Kubectl("get", "endpointslices", "-l", "kubernetes.io/service-name=web", "-o", "jsonpath={.items[*].endpoints[*].addresses[0]}")
		return len(strings.Fields(ips)) == 2
	})
}

// policy allows what the connections do, from a time when all was allowed.
func (f *failures) policy() {
	f.n.Kubectl("apply", "-f", manifestFile(f.t, `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: echo-only}
spec: {podSelector: {matchLabels: {app: web}}, ingress: [{ports: [{port: 8081}]}]}
`))
	f.n.Until("the policy is in force", testcluster.Patience, func() bool {
		return !answers(f.n, "client", "http://web/hostname")
	})
	f.unharmed()
	f.n.Kubectl("delete", "networkpolicy", "echo-only")
	f.n.Until("the policy is not any more", testcluster.Patience, func() bool {
		return answers(f.n, "client", "http://web/hostname")
	})
}

// hangs stops kubestack for half a minute, counted in round trips: connections are not
// its business, and a new Pod waits for it.
func (f *failures) hangs() {
	all := pids(f.t, f.Further(f.nodes[1]), "kubestack")
	if len(all) != 1 {
		f.t.Fatalf("processes of kubestack: %v", all)
	}
	if err := unix.Kill(all[0], unix.SIGSTOP); err != nil {
		f.t.Fatal(err)
	}
	defer func() { _ = unix.Kill(all[0], unix.SIGCONT) }()
	f.tn.Apply(pod{name: "waits", node: f.nodes[1], runtime: "runc"}.yaml(f.n.Name))
	began := time.Now()
	f.lasts(80)
	f.t.Logf("kubestack was stopped for %.0f s", time.Since(began).Seconds())
	if err := unix.Kill(all[0], unix.SIGCONT); err != nil {
		f.t.Logf("continue kubestack: %v", err) // the supervisor may have replaced it
	}
	f.n.Ready("waits")
	f.n.Kubectl("delete", "pod", "waits", "--wait")
}

// node kills everything of a node: its addresses move, and its Pods come back with it.
func (f *failures) node(node, moving string) {
	further := f.Further(node)
	for range 3 { // those started while others were killed too
		for _, p := range further.Processes(f.t) {
			_ = unix.Kill(p.PID, unix.SIGKILL)
		}
	}
	f.Kubectl(f.t, "wait", "--for=condition=Ready=Unknown", "node/"+node, "--timeout="+testcluster.Patience.String())
	f.answers(moving)
	if !f.announces(f.nodes[0], moving) && !f.announces(f.nodes[1], moving) {
		f.t.Errorf("nobody announces %s", moving)
	}
	f.unharmed()
	f.UpAgain(f.t)
	f.Kubectl(f.t, "wait", "--for=condition=Ready=True", "node/"+node, "--timeout="+testcluster.Patience.String())
	f.n.Until("the Pod of the node is back", testcluster.Patience, func() bool {
		name, ok := get(f.n, "client", "http://"+f.n.Get("pod/third", ".status.podIP")+":8080/hostname")
		return ok && name == "third"
	})
	f.newcomer(node)
}

// portsAreThoseOfPods waits until there is one Port for each Pod and no other.
func (f *failures) portsAreThoseOfPods() {
	f.t.Helper()
	var ports, pods []string
	defer func() {
		if !slices.Equal(ports, pods) {
			f.t.Logf("Ports are of %v, Pods are %v", ports, pods)
		}
	}()
	f.n.Until("there is one Port for each Pod", testcluster.Patience, func() bool {
		ports = strings.Fields(f.Kubectl(f.t, "-n", f.tn.Home(), "get", "ports", "-o", `jsonpath={range .items[*]}{.spec.pod.name}={.spec.addresses[0]} {end}`))
		pods = strings.Fields(f.n.Kubectl("get", "pods", "-o", `jsonpath={range .items[*]}{.metadata.name}={.status.podIP} {end}`))
		slices.Sort(ports)
		slices.Sort(pods)
		return slices.Equal(ports, pods)
	})
}

// inNode runs a command in a node's network namespace.
func inNode(t testing.TB, node *testcluster.Cluster, args ...string) string {
	t.Helper()
	out, err := exec.Command("nsenter", append([]string{fmt.Sprintf("--net=/proc/%d/ns/net", node.AnchorPID(t))}, args...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

var counters = regexp.MustCompile(`packets \d+ bytes \d+`)

// stock is all of tenants' Networks that there is, line by line.
func stock(t testing.TB, c *fabric) []string {
	t.Helper()
	var out []string
	add := func(what, text string) {
		for line := range strings.Lines(text) {
			if line = strings.TrimSpace(line); line != "" {
				out = append(out, what+": "+line)
			}
		}
	}
	for _, name := range c.nodes {
		node := c.Further(name)
		for _, dir := range []string{"edges", "attachments"} {
			files, _ := filepath.Glob(filepath.Join(node.NodeRoot(t), "run/kubestack", dir, "*"))
			for _, file := range files {
				add(name+" "+dir, filepath.Base(file))
			}
		}
		for line := range strings.Lines(inNode(t, node, "ip", "-o", "link")) {
			if _, rest, ok := strings.Cut(line, ": "); ok && (strings.HasPrefix(rest, "h-") || strings.HasPrefix(rest, "vx-")) {
				add(name+" link", rest)
			}
		}
		add(name+" proxy", inNode(t, node, "ip", "neigh", "show", "proxy"))
		add(name+" nft", counters.ReplaceAllString(inNode(t, node, "nft", "list", "table", "inet", "h8s_host"), ""))
		for line := range strings.Lines(inNode(t, node, "ip", "rule")) {
			add(name+" rule", line)
		}
	}
	add("port", c.Kubectl(t, "get", "ports", "-A", "-o", "name"))
	add("lease", c.Kubectl(t, "-n", "h8s-system", "get", "leases", "-l", "hypernetes.io/claim", "-o", "name"))
	slices.Sort(out)
	return out
}

// difference says what one list has more often than another.
func difference(before, after []string) string {
	count := map[string]int{}
	for _, l := range after {
		count[l]++
	}
	for _, l := range before {
		count[l]--
	}
	var out []string
	for l, n := range count {
		if n != 0 {
			out = append(out, fmt.Sprintf("%+d %s", n, l))
		}
	}
	slices.Sort(out)
	return strings.Join(out, "\n")
}
