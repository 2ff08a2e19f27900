package openstack

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/hypernetes/hypernetes/test/e2e/testcloud"
	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// TestFaults kills parts of OpenStack while Pods come and go. What runs is not disturbed,
// somebody says what is wrong, and when the part is back all ends as it should, with a port
// for each Pod and no other.
func TestFaults(t *testing.T) {
	c := testcloud.Up(t, 2)
	p := c.Project(t)
	user := p.User("member")
	tn := c.TenantOf(t, p, append([]string{"--cidr", "192.168.9.0/24"}, light...)...)
	n := tn.Namespace("web", "default")
	tn.Apply(join(pod(n, "a", c.Nodes[0], true), pod(n, "b", c.Nodes[1], false)))
	n.Ready("a", "b")
	certificate := tn.Kubeconfig("ann", "member")
	for _, service := range []string{"keystone", "neutron-server", "rabbitmq", "agent-" + c.Nodes[0]} {
		t.Run(service, func(t *testing.T) {
			f := fault{c, p, tn, n.For(t), service}
			f.run(t, user, certificate)
		})
	}
}

type fault struct {
	c       *testcloud.Cloud
	p       *testcloud.Project
	tn      *testcluster.Tenant
	n       *testcluster.Namespace
	service string
}

func (f fault) run(t *testing.T, user *testcloud.User, certificate string) {
	c, n := f.c, f.n
	name := strings.ReplaceAll(f.service, ".", "-")
	// One that ends and one that begins while the part is away.
	f.tn.Apply(pod(n, "old-"+name, c.Nodes[0], false))
	n.Ready("old-" + name)
	c.OpenStack.Script(t, "kill", f.service)
	back := false
	start := func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*testcloud.Patience)
		defer cancel()
		if err := c.OpenStack.TryScript(ctx, "start", f.service); err != nil {
			t.Error(err)
		}
		back = true
	}
	defer func() {
		if !back {
			start()
		}
	}()
	killed := time.Now()
	f.tn.Apply(pod(n, "new-"+name, c.Nodes[0], false))
	n.Kubectl("delete", "pod", "old-"+name, "--wait=false")
	// What runs goes on.
	reaches(t, n, "a", url(n, "b", "/hostname"), "b")
	reaches(t, n, "b", url(n, "a", "/hostname"), "a")
	if out, err := c.As(certificate, "-n", n.Name, "get", "pods"); err != nil {
		t.Errorf("a user with a certificate: %v\n%s", err, out)
	}
	if f.service == "keystone" {
		if out, err := inside(t, c, []string{"HOME=" + t.TempDir()}, "kubectl", "--name", c.Node, "--kubeconfig", bearer(t, c, "gAAAAABnobody"), "get", "pods"); err == nil {
			t.Errorf("a token that nobody can check is taken: %s", out)
		}
	}
	if f.service == "keystone" || f.service == "neutron-server" {
		if out, err := c.TryH8S("doctor"); !strings.Contains(out, "H8S_OPENSTACK") && !strings.Contains(strings.ToLower(out), "keystone") {
			t.Errorf("h8s doctor says nothing of it: %v\n%s", err, out)
		}
		out, _ := c.TryH8S("status")
		if !strings.Contains(out, "OpenStack: ") || strings.Contains(out, " answer\n") {
			t.Errorf("h8s status says nothing of it:\n%s", out)
		}
	}
	// Somebody says what is wrong, where one looks: at the Pod that does not begin.
	if f.service != "keystone" && f.service != "rabbitmq" { // with a token and a wired agent in hand it may begin
		testcloud.Until(t, "an event tells why the Pod does not begin", func() error {
			events := n.Kubectl("get", "events", "--field-selector", "involvedObject.name=new-"+name, "-o", `jsonpath={range .items[*]}{.reason} {.message}{"\n"}{end}`)
			for _, word := range []string{"Neutron", "neutron", "provider"} {
				if strings.Contains(events, word) {
					t.Logf("the Pod's events:\n%s", events)
					return nil
				}
			}
			return fmt.Errorf("events: %s", events)
		})
	}
	start()
	t.Logf("%s was away for %s", f.service, time.Since(killed).Round(time.Second))
	n.Ready("new-" + name)
	reaches(t, n, "new-"+name, url(n, "b", "/hostname"), "b")
	reaches(t, n, "b", url(n, "new-"+name, "/hostname"), "new-"+name)
	portOf(t, f.p, n, "new-"+name, c.Nodes[0])
	testcloud.Until(t, "each Pod has its port, and there are no others", func() error {
		have, err := ports(f.p)
		if err != nil {
			return err
		}
		ips := strings.Fields(n.Kubectl("get", "pods", "-o", "jsonpath={.items[*].status.podIP}"))
		for _, ip := range ips {
			if have[ip].Text("status") != "ACTIVE" {
				return fmt.Errorf("%s: %v", ip, have[ip])
			}
		}
		if len(have) != len(ips) {
			return fmt.Errorf("%d Pods, %d ports", len(ips), len(have))
		}
		return nil
	})
	testcloud.Until(t, "a user of Keystone's can work", func() error {
		provider, err := user.Provider(t.Context())
		if err != nil {
			return err
		}
		out, err := inside(t, c, []string{"HOME=" + t.TempDir()}, "kubectl", "--name", c.Node, "--kubeconfig", bearer(t, c, provider.Token()), "-n", n.Name, "get", "pods")
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
}
