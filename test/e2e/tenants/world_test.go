package tenants

import (
	"cmp"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/hypernetes/hypernetes/test/e2e/testcloud"
	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
	"github.com/hypernetes/hypernetes/test/openstack/openstacktest"
)

// fabric is the cluster of three nodes all tests here use, and a machine outside it.
type fabric struct {
	*testcluster.Cluster
	nodes []string
	out   *outside
	// cloud carries the Networks; nil for the built-in provider.
	cloud *testcloud.Cloud
}

// onNeutron says that all tests here are to run with Networks that Neutron carries, in the
// OpenStack at $H8S_OPENSTACK.
func onNeutron() bool { return os.Getenv("H8S_E2E_PROVIDER") == "neutron" }

// Tenant makes a tenant; with Neutron it has a project.
func (f *fabric) Tenant(t testing.TB, flags ...string) *testcluster.Tenant {
	t.Helper()
	if f.cloud != nil {
		return f.cloud.Tenant(t, flags...)
	}
	return f.Cluster.Tenant(t, flags...)
}

// beyond is an address outside the cluster that Pods reach, where a testbox serves, and how
// the addresses begin that they have there.
func (f *fabric) beyond() (address, from string) {
	if f.cloud != nil {
		return openstacktest.Outside, "172.24.4."
	}
	return outsideAddress, "100.64.0."
}

// getFloating fetches a URL of a floating address from outside.
func (f *fabric) getFloating(url string) (string, bool) {
	if f.cloud != nil {
		return f.cloud.Outside.Get(url)
	}
	return f.out.get(url)
}

// world is made once, by the first test that asks for it.
var world struct {
	sync.Mutex
	fabric *fabric
	dir    string
}

func TestMain(m *testing.M) {
	testcluster.Main(m, func() {
		w := world.fabric
		if w == nil {
			return
		}
		w.out.remove()
		_ = os.RemoveAll(world.dir)
		if w.cloud != nil {
			testcloud.Down()
			return
		}
		if out, err := w.Scale(1); err != nil { // other packages take stock of one node
			fmt.Printf("back to one node: %v\n%s", err, out)
		}
	})
}

func up(t testing.TB) *fabric {
	t.Helper()
	var cloud *testcloud.Cloud
	var c *testcluster.Cluster
	if onNeutron() {
		cloud = testcloud.Up(t, 3)
		c = cloud.Cluster
	} else {
		c = testcluster.Up(t)
	}
	world.Lock()
	defer world.Unlock()
	if world.fabric != nil {
		f := *world.fabric
		f.cloud = cloud // whose connection is the test's own
		return &f
	}
	if cloud == nil {
		if out, err := c.Scale(3); err != nil {
			t.Fatalf("three nodes: %v\n%s", err, out)
		}
	}
	dir, err := os.MkdirTemp("", "h8s-tenants")
	if err != nil {
		t.Fatal(err)
	}
	world.dir = dir
	world.fabric = &fabric{c, []string{c.Node, c.Node + "-2", c.Node + "-3"}, newOutside(t, c, dir), cloud}
	return world.fabric
}

// pod is a Pod of testbox that serves; extra is YAML of its spec, two spaces deep.
type pod struct {
	name, node, address, runtime string
	// app is its label, its name by default.
	app   string
	env   map[string]string
	extra string
}

func (p pod) yaml(namespace string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "apiVersion: v1\nkind: Pod\nmetadata:\n  name: %s\n  namespace: %s\n  labels: {app: %s}\n", p.name, namespace, cmp.Or(p.app, p.name))
	if p.address != "" {
		fmt.Fprintf(&b, "  annotations: {hypernetes.io/address: %q}\n", p.address)
	}
	b.WriteString("spec:\n  terminationGracePeriodSeconds: 1\n")
	if p.node != "" {
		fmt.Fprintf(&b, "  nodeSelector: {kubernetes.io/hostname: %q}\n", p.node)
	}
	if p.runtime != "" {
		fmt.Fprintf(&b, "  runtimeClassName: %s\n", p.runtime)
	}
	b.WriteString(p.extra)
	b.WriteString("  containers:\n  - name: main\n    image: h8s.local/testbox:1\n    args: [serve]\n    resources: {requests: {cpu: 10m, memory: 32Mi}, limits: {memory: 64Mi}}\n")
	if len(p.env) > 0 {
		b.WriteString("    env:\n")
		for k, v := range p.env {
			fmt.Fprintf(&b, "    - {name: %s, value: %q}\n", k, v)
		}
	}
	if p.runtime == "" {
		b.WriteString("    readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 2, timeoutSeconds: 5}\n")
	}
	return b.String()
}

// service of port 80 to testbox's HTTP, and 81 UDP to its echo.
func service(namespace, name, app string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Service
metadata: {name: %s, namespace: %s}
spec:
  selector: {app: %s}
  ports:
  - {name: http, port: 80, targetPort: 8080}
  - {name: echo, port: 81, targetPort: 8081, protocol: UDP}
`, name, namespace, app)
}

func join(docs ...string) string { return strings.Join(docs, "\n---\n") }

// get fetches a URL from a Pod.
func get(n *testcluster.Namespace, from, url string) (string, bool) {
	out, code := n.ExecCode(from, "/testbox", "get", url)
	_, body, _ := strings.Cut(out, "\n")
	return strings.TrimSpace(body), code == 0
}

// silent fails the test if a URL answers.
func silent(t *testing.T, n *testcluster.Namespace, from, url string) {
	t.Helper()
	if out, code := n.ExecCode(from, "/testbox", "get", "-timeout", "3s", url); code == 0 {
		t.Errorf("%s/%s GET %s: it answers: %s", n.Name, from, url, out)
	}
}

// answers tells whether a URL answers soon.
func answers(n *testcluster.Namespace, from, url string) bool {
	_, code := n.ExecCode(from, "/testbox", "get", "-timeout", "3s", url)
	return code == 0
}

// want fails the test unless the URL gives the body.
func want(t *testing.T, n *testcluster.Namespace, from, url, body string) {
	t.Helper()
	if got, ok := get(n, from, url); !ok || got != body {
		t.Errorf("%s/%s GET %s: %q, %v; want %q", n.Name, from, url, got, ok, body)
	}
}

// outside is a machine on the fabric that is no node, a port of the first node's bridge.
type outside struct {
	name, box string
	server    *exec.Cmd
}

// outsideAddress is where it serves; addresses of pools are in the same range.
const outsideAddress = "100.64.0.200"

// newOutside makes it, with testbox serving in it.
func newOutside(t testing.TB, c *testcluster.Cluster, dir string) *outside {
	t.Helper()
	o := &outside{name: "h8s-out-" + c.Node, box: filepath.Join(dir, "testbox")}
	build := exec.Command("go", "build", "-o", o.box, "./test/images/testbox")
	build.Dir = filepath.Join("..", "..", "..")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build testbox: %v\n%s", err, out)
	}
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			o.remove()
			t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	o.remove() // what a killed run left
	pid := fmt.Sprint(c.AnchorPID(t))
	run("ip", "netns", "add", o.name)
	run("ip", "-n", o.name, "link", "add", "eth0", "type", "veth", "peer", "name", "outside", "netns", pid)
	run("nsenter", "--net=/proc/"+pid+"/ns/net", "ip", "link", "set", "outside", "master", "h8s0", "up")
	run("ip", "-n", o.name, "link", "set", "lo", "up")
	run("ip", "-n", o.name, "addr", "add", outsideAddress+"/24", "dev", "eth0")
	run("ip", "-n", o.name, "link", "set", "eth0", "up")
	o.server = exec.Command("ip", "netns", "exec", o.name, o.box, "serve")
	if err := o.server.Start(); err != nil {
		t.Fatal(err)
	}
	return o
}

func (o *outside) remove() {
	if o.server != nil {
		_ = o.server.Process.Kill()
		_ = o.server.Wait()
	}
	_ = exec.Command("ip", "netns", "del", o.name).Run() // takes the link along
}

// run runs testbox in it and returns its output.
func (o *outside) run(args ...string) (string, error) {
	out, err := exec.Command("ip", append([]string{"netns", "exec", o.name, o.box}, args...)...).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// get fetches a URL from it.
func (o *outside) get(url string) (string, bool) {
	out, err := o.run("get", "-timeout", "5s", url)
	_, body, _ := strings.Cut(out, "\n")
	return strings.TrimSpace(body), err == nil
}

// manifestFile writes a manifest to a file of the test's.
func manifestFile(t testing.TB, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "manifest.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}
