// Package testcloud owns a cluster that belongs to the OpenStack of test/openstack: its
// nodes are Neutron's hosts, its Networks Neutron's, its tenants projects of Keystone. It
// must not know what is tested with it.
//
// The node is named as for package testcluster, but removed before and after: other
// packages' clusters belong to no cloud.
package testcloud

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
	"github.com/hypernetes/hypernetes/test/openstack/openstacktest"
)

const underlay = "10.250.0.0/24"

// firstHost is the first node's number there; the others follow. $H8S_E2E_HOST is another
// one, for who works on tests beside others.
var firstHost = func() int {
	if n, err := strconv.Atoi(os.Getenv("H8S_E2E_HOST")); err == nil {
		return n
	}
	return 221
}()

// Patience is how long what Neutron's agents do may take here.
const Patience = 8 * time.Minute

// Cloud is the cluster and its OpenStack.
type Cloud struct {
	*testcluster.Cluster
	OpenStack *openstacktest.Cloud
	Nodes     []string
	// Outside is a client on the external network, where a testbox serves.
	Outside *Outside
}

// world is made once, by the first test that asks for it.
var world struct {
	sync.Mutex
	cluster *testcluster.Cluster
	script  func(ctx context.Context, args ...string) error
	nodes   []string
	out     *Outside
	dir     string
}

// Up is the cluster, of that many nodes. It skips the test where there is no OpenStack.
func Up(t testing.TB, nodes int) *Cloud {
	t.Helper()
	o := openstacktest.Up(t)
	world.Lock()
	defer world.Unlock()
	if world.cluster == nil {
		start(t, o, nodes)
	}
	return &Cloud{world.cluster, o, world.nodes, world.out}
}

func start(t testing.TB, o *openstacktest.Cloud, nodes int) {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "h8s-cloud")
	if err != nil {
		t.Fatal(err)
	}
	c := testcluster.Anew(t, "--cinder-config", filepath.Join(o.Dir, "cinder.yaml"), "--openstack-cloud-config", o.ConfigFile(), "--openstack-cloud", "service",
		"--openstack-external-network", openstacktest.ExternalNetwork, "--network-provider", "neutron", "--reserve-cidr", underlay)
	world.cluster, world.script = c, o.TryScript
	if out, err := c.Scale(nodes); err != nil {
		t.Fatalf("%d nodes: %v\n%s", nodes, err, out)
	}
	for i := range nodes {
		name := c.Node
		if i > 0 {
			name = fmt.Sprintf("%s-%d", c.Node, i+1)
		}
		pid := c.Further(name).AnchorPID(t)
		world.nodes = append(world.nodes, name)
		o.Script(t, "agent-up", name, fmt.Sprintf("/proc/%d/ns/net", pid), fmt.Sprintf("10.250.0.%d", firstHost+i))
	}
	world.dir, world.out = dir, newOutside(t, o, dir)
	deadline := time.Now().Add(Patience)
	for {
		out, err := c.TryH8S("doctor")
		if strings.Contains(out, "and Neutron at") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("OpenStack does not answer to the node: %v\n%s", err, out)
		}
		time.Sleep(time.Second)
	}
}

// Down ends it: a package's tests are over.
func Down() {
	world.Lock()
	defer world.Unlock()
	if world.cluster == nil {
		return
	}
	world.out.remove()
	if testcluster.Keep() {
		return
	}
	_ = os.RemoveAll(world.dir)
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	for _, n := range world.nodes {
		if err := world.script(ctx, "agent-down", n); err != nil {
			fmt.Println("clean up:", err)
		}
	}
	if out, err := world.cluster.Reset(); err != nil {
		fmt.Printf("h8s reset: %v\n%s", err, out)
	}
	world.cluster, world.nodes = nil, nil
}

// Tenant makes a tenant whose project is one of its own. When the test ends it is deleted,
// and nothing may be left of it at Neutron.
func (c *Cloud) Tenant(t testing.TB, flags ...string) *testcluster.Tenant {
	t.Helper()
	return c.TenantOf(t, c.Project(t), flags...)
}

// TenantOf makes a tenant of a project.
func (c *Cloud) TenantOf(t testing.TB, p *Project, flags ...string) *testcluster.Tenant {
	t.Helper()
	return c.Cluster.Tenant(t, append([]string{"--project-id", p.ID, "--timeout", Patience.String()}, flags...)...)
}

// Underlay is the address that Neutron's agents know a node by.
func (c *Cloud) Underlay(node int) string { return fmt.Sprintf("10.250.0.%d", firstHost+node) }

// Until waits until probe, which is asked every second, has nothing to complain of.
func Until(t testing.TB, what string, probe func() error) {
	t.Helper()
	deadline := time.NewTimer(Patience)
	defer deadline.Stop()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		err := probe()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-t.Context().Done():
			t.Fatalf("%s: %v", what, err)
		case <-deadline.C:
			t.Fatalf("waited %s in vain: %s: %v", Patience, what, err)
		}
	}
}

// Outside is a client on Neutron's external network.
type Outside struct {
	ns, box string
	server  *exec.Cmd
}

func newOutside(t testing.TB, o *openstacktest.Cloud, dir string) *Outside {
	t.Helper()
	out := &Outside{ns: o.OutsideNetNS(), box: filepath.Join(dir, "testbox")}
	build := exec.Command("go", "build", "-o", out.box, "github.com/hypernetes/hypernetes/test/images/testbox")
	if text, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build testbox: %v\n%s", err, text)
	}
	out.server = out.command("serve")
	if err := out.server.Start(); err != nil {
		t.Fatal(err)
	}
	return out
}

func (o *Outside) remove() {
	if o != nil && o.server.Process != nil {
		_ = o.server.Process.Kill()
		_ = o.server.Wait()
	}
}

func (o *Outside) command(args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"--net=" + o.ns, o.box}, args...)...)
}

// Run runs testbox there and returns its output.
func (o *Outside) Run(args ...string) (string, error) {
	out, err := o.command(args...).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// Get fetches a URL from there.
func (o *Outside) Get(url string) (string, bool) {
	out, err := o.Run("get", "-timeout", "5s", url)
	_, body, _ := strings.Cut(out, "\n")
	return strings.TrimSpace(body), err == nil
}

// unique is a name nobody else has.
func unique(prefix string) string {
	var raw [4]byte
	_, _ = rand.Read(raw[:])
	return prefix + hex.EncodeToString(raw[:])
}
