package openstack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hypernetes/hypernetes/test/e2e/testcloud"
	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

func TestMain(m *testing.M) { testcluster.Main(m, testcloud.Down) }

// light are the flags of a tenant whose Pods may be plain containers.
var light = []string{"--runtime-class", "hyper", "--runtime-class", "runc"}

// pod is a Pod of testbox that serves on a node, as a container or, if vm, as a machine.
func pod(n *testcluster.Namespace, name, node string, vm bool) string {
	class := "runc"
	if vm {
		class = "hyper"
	}
	return fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: %s, labels: {app: %s}}
spec:
  runtimeClassName: %s
  terminationGracePeriodSeconds: 1
  nodeSelector: {kubernetes.io/hostname: %q}
  containers:
  - {name: main, image: "h8s.local/testbox:1", args: [serve], resources: {requests: {cpu: 10m, memory: 32Mi}, limits: {memory: 64Mi}}}
`, name, n.Name, name, class, node)
}

func join(docs ...string) string { return strings.Join(docs, "\n---\n") }

// get fetches a URL from a Pod.
func get(n *testcluster.Namespace, from, url string) (string, error) {
	out, code := n.ExecCode(from, "/testbox", "get", "-timeout", "5s", url)
	_, body, _ := strings.Cut(out, "\n")
	if code != 0 {
		return "", fmt.Errorf("%s GET %s: %s", from, url, out)
	}
	return strings.TrimSpace(body), nil
}

// reaches waits until a Pod gets the body.
func reaches(t *testing.T, n *testcluster.Namespace, from, url, body string) {
	t.Helper()
	testcloud.Until(t, url+" answers "+from, func() error {
		got, err := get(n, from, url)
		if err == nil && got != body {
			err = fmt.Errorf("%s GET %s: %q, want %q", from, url, got, body)
		}
		return err
	})
}

// url of a Pod's testbox.
func url(n *testcluster.Namespace, pod, path string) string {
	return "http://" + n.Get("pod/"+pod, ".status.podIP") + ":8080" + path
}

// ports are those of Pods, by address.
func ports(p *testcloud.Project) (map[string]testcloud.Object, error) {
	all, err := p.Try("ports")
	out := map[string]testcloud.Object{}
	for _, o := range all {
		if a := o.Addresses(); len(a) > 0 && !strings.HasPrefix(o.Text("device_owner"), "network:") {
			out[a[0]] = o
		}
	}
	return out, err
}

// portOf waits for the Neutron port of a Pod that is as it should be.
func portOf(t *testing.T, p *testcloud.Project, n *testcluster.Namespace, pod, node string) testcloud.Object {
	t.Helper()
	ip, uid := n.Get("pod/"+pod, ".status.podIP"), n.Get("pod/"+pod, ".metadata.uid")
	var o testcloud.Object
	testcloud.Until(t, "one ACTIVE port for "+pod, func() error {
		all, err := p.Try("ports", "device_id", uid)
		if err != nil || len(all) != 1 {
			return fmt.Errorf("%d ports: %v", len(all), err)
		}
		o = all[0]
		if a := o.Addresses(); len(a) != 1 || a[0] != ip || o.Text("status") != "ACTIVE" || o.Text("binding:host_id") != node || o.Text("binding:vif_type") != "bridge" || o.Text("device_owner") != "hypernetes:pod" {
			return fmt.Errorf("%v: want %s, ACTIVE, on %s", o, ip, node)
		}
		return nil
	})
	return o
}

// home reads fields of an object in a tenant's home.
func home(t *testing.T, tn *testcluster.Tenant, object, path string) string {
	t.Helper()
	return strings.TrimSpace(tn.Kubectl(t, "-n", tn.Home(), "get", object, "-o", "jsonpath={"+path+"}"))
}

// bare runs the openstack client, as a user who knows nothing of us.
func bare(t *testing.T, c *testcloud.Cloud, clouds string, args ...string) string {
	t.Helper()
	script := filepath.Join("..", "..", "openstack", "openstack.sh")
	cmd := exec.Command(script, append([]string{"exec", "openstack"}, args...)...)
	cmd.Env = append(os.Environ(), "H8S_OPENSTACK="+c.OpenStack.Dir, "OS_CLIENT_CONFIG_FILE="+clouds, "OS_CLOUD=user")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("openstack %s: %v\n%s", strings.Join(args, " "), err, stderr.String())
	}
	return strings.TrimSpace(string(out))
}

// inside runs a program of ours in the first node's network, from where both Keystone and
// the API server can be reached, and returns stdout and stderr together.
func inside(t *testing.T, c *testcloud.Cloud, env []string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{fmt.Sprintf("--net=/proc/%d/ns/net", c.AnchorPID(t)), filepath.Join(c.Out, "bin", "h8s")}, args...)...)
	cmd.Env = append(append(os.Environ(), "H8S_OUT="+c.Out), env...)
	out, err := cmd.CombinedOutput()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatalf("h8s %s: %v", strings.Join(args, " "), err)
	}
	return string(out), err
}
