package tenants

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// TestPods: what a Pod that is a virtual machine can do anywhere, it can do in a tenant's
// Network.
func TestPods(t *testing.T) {
	t.Parallel()
	c := up(t)
	tn := c.Tenant(t, light...)
	tn.Network("dual", "10.20.0.0/24", "fd20::/64")
	tn.Network("second", "10.30.0.0/24")
	tn.Apply(fmt.Sprintf("apiVersion: hypernetes.io/v1alpha1\nkind: Network\nmetadata: {name: shut, namespace: %s}\nspec: {egress: None, subnets: {a: {cidr: 10.40.0.0/24}}}\n", tn.Home()))
	n, shut := tn.Namespace("dual", "dual"), tn.Namespace("shut", "shut")
	tn.Apply(join(
		// A machine with every probe and hook there is, and two NICs.
		fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata:
  name: vm
  namespace: %s
  labels: {app: vm}
  annotations: {hypernetes.io/networks: '[{"name": "second"}]'}
spec:
  hostname: given
  nodeSelector: {kubernetes.io/hostname: %s}
  terminationGracePeriodSeconds: 20
  containers:
  - name: main
    image: h8s.local/testbox:1
    args: [serve]
    stdin: true
    ports: [{name: http, containerPort: 8080}, {name: echo, containerPort: 8081}]
    env: [{name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}, {name: POD_IPS, valueFrom: {fieldRef: {fieldPath: status.podIPs}}}]
    startupProbe: {httpGet: {path: /healthz, port: http}, periodSeconds: 2, failureThreshold: 60, timeoutSeconds: 10}
    readinessProbe: {grpc: {port: 8082}, periodSeconds: 2, timeoutSeconds: 10}
    livenessProbe: {tcpSocket: {port: echo}, periodSeconds: 5, timeoutSeconds: 20}
  - name: hooked
    image: h8s.local/testbox:1
    args: [serve, -http, ":8180", -tcp, ":8181", -udp, ":8181", -grpc, ":8182"]
    readinessProbe: {exec: {command: [/testbox, get, "http://127.0.0.1:8180/healthz"]}, periodSeconds: 2, timeoutSeconds: 10}
    lifecycle:
      postStart: {httpGet: {path: /hostname, port: 8280}}
      preStop: {httpGet: {path: /hostname, port: 8280}}
  initContainers:
  - name: before
    image: h8s.local/testbox:1
    restartPolicy: Always
    args: [serve, -http, ":8280", -tcp, ":8281", -udp, ":8281", -grpc, ":8282"]
    startupProbe: {httpGet: {path: /healthz, port: 8280}, periodSeconds: 1, failureThreshold: 60, timeoutSeconds: 10}
`, n.Name, c.Node),
		pod{name: "peer", runtime: "runc"}.yaml(n.Name),
		fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata:
  name: second
  namespace: %s
  annotations: {hypernetes.io/networks: '[{"name": "second", "addresses": ["10.30.0.77"]}]'}
spec:
  runtimeClassName: runc
  terminationGracePeriodSeconds: 1
  containers: [{name: main, image: "h8s.local/testbox:1", args: [serve]}]
---
apiVersion: v1
kind: Service
metadata: {name: both, namespace: %[1]s}
spec: {ipFamilyPolicy: PreferDualStack, selector: {app: vm}, ports: [{port: 80, targetPort: http}]}
---
apiVersion: hypernetes.io/v1alpha1
kind: Port
metadata: {name: dual.10-20-0-99, namespace: %[2]s}
spec: {network: dual, addresses: ["10.20.0.99"], retain: true}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db, namespace: %[1]s}
spec:
  selector: {matchLabels: {app: db}}
  template:
    metadata:
      labels: {app: db}
      annotations: {hypernetes.io/address: port/dual.10-20-0-99}
    spec:
      runtimeClassName: runc
      terminationGracePeriodSeconds: 1
      containers: [{name: main, image: "h8s.local/testbox:1", args: [serve]}]
`, n.Name, tn.Home()),
		pod{name: "kept", runtime: "runc"}.yaml(shut.Name),
		pod{name: "kept2", runtime: "runc"}.yaml(shut.Name),
	))
	n.Ready("peer", "second")
	shut.Ready("kept", "kept2")
	t.Run("no egress", func(t *testing.T) { kept(t, shut.For(t), c) })
	t.Run("claimed address", func(t *testing.T) { keepsAddress(t, tn, n.For(t)) })
	n.Ready("vm")
	t.Run("itself", func(t *testing.T) { itself(t, n.For(t)) })
	t.Run("networks", func(t *testing.T) { networks(t, n.For(t)) })
	t.Run("verbs", func(t *testing.T) { verbs(t, n.For(t)) })
	t.Run("probes", func(t *testing.T) { probed(t, n.For(t)) })
	t.Run("sandbox made anew", func(t *testing.T) { anew(t, tn, n.For(t)) })
}

// kept: Pods of a Network without egress reach each other and nobody outside.
func kept(t *testing.T, n *testcluster.Namespace, c *fabric) {
	beyond, _ := c.beyond()
	want(t, n, "kept", "http://"+n.Get("pod/kept2", ".status.podIP")+":8080/hostname", "kept2")
	if out, code := n.ExecCode("kept", "/testbox", "get", "-timeout", "3s", "http://"+beyond+":8080/hostname"); code == 0 {
		t.Errorf("it gets out: %s", out)
	}
}

// keepsAddress: a Pod made anew has the address that was claimed for it.
func keepsAddress(t *testing.T, tn *testcluster.Tenant, n *testcluster.Namespace) {
	n.Kubectl("rollout", "status", "statefulset/db", "--timeout="+testcluster.Patience.String())
	for range 2 {
		if ip := n.Get("pod/db-0", ".status.podIP"); ip != "10.20.0.99" {
			t.Errorf("db-0 has the address %s", ip)
		}
		want(t, n, "peer", "http://10.20.0.99:8080/hostname", "db-0")
		uid := n.Get("pod/db-0", ".metadata.uid")
		n.Kubectl("delete", "pod", "db-0")
		n.Until("db-0 is another", testcluster.Patience, func() bool {
			now, err := n.Try("get", "pod", "db-0", "-o", "jsonpath={.metadata.uid}")
			return err == nil && now != uid
		})
		n.Ready("db-0")
	}
	n.Kubectl("delete", "statefulset", "db")
	n.Kubectl("wait", "--for=delete", "pod/db-0", "--timeout="+testcluster.Patience.String())
	n.Until("the Port is claimed only", time.Minute, func() bool {
		return strings.TrimSpace(tn.Kubectl(t, "-n", tn.Home(), "get", "port", "dual.10-20-0-99", "-o", "jsonpath={.spec.pod.name}{.spec.node}")) == ""
	})
}

// itself is what the machine knows of itself.
func itself(t *testing.T, n *testcluster.Namespace) {
	ips := strings.Fields(n.Get("pod/vm", ".status.podIPs[*].ip"))
	if len(ips) != 2 || !strings.HasPrefix(ips[0], "10.20.0.") || !strings.HasPrefix(ips[1], "fd20::") {
		t.Errorf("podIPs: %q", ips)
	}
	about, _ := get(n, "vm/main", "http://127.0.0.1:8080/")
	for _, line := range []string{"hostname=given", "env POD_IP=" + n.Get("pod/vm", ".status.podIP"), "env POD_IPS=" + strings.Join(ips, ",")} {
		if !strings.Contains(about+"\n", line+"\n") {
			t.Errorf("%q is missing in:\n%s", line, about)
		}
	}
	for _, nic := range []string{"eth0", "net1"} {
		mtu, _ := get(n, "vm/main", "http://127.0.0.1:8080/file?path=/sys/class/net/"+nic+"/mtu")
		if mtu != "1450" {
			t.Errorf("MTU of %s is %q", nic, mtu)
		}
	}
}

// networks: both NICs reach, both families, and the Service of both.
func networks(t *testing.T, n *testcluster.Namespace) {
	want(t, n, "vm/main", "http://10.30.0.77:8080/hostname", "second")
	if ip, ok := get(n, "vm/main", "http://10.30.0.77:8080/clientip"); !ok || !strings.HasPrefix(ip, "10.30.0.") {
		t.Errorf("the second NIC is seen as %q", ip)
	}
	if out, code := n.ExecCode("peer", "/testbox", "get", "-timeout", "3s", "http://10.30.0.77:8080/hostname"); code == 0 {
		t.Errorf("a Pod without a second NIC gets into the second Network: %s", out)
	}
	for _, ip := range strings.Fields(n.Get("pod/vm", ".status.podIPs[*].ip")) {
		if strings.Contains(ip, ":") {
			ip = "[" + ip + "]"
		}
		want(t, n, "peer", "http://"+ip+":8080/hostname", "given")
	}
	ips := strings.Fields(n.Get("service/both", ".spec.clusterIPs[*]"))
	for _, ip := range ips {
		if strings.Contains(ip, ":") {
			ip = "[" + ip + "]"
		}
		want(t, n, "peer", "http://"+ip+"/hostname", "given")
	}
	if len(ips) != 2 {
		t.Errorf("the cluster has two families, the Service has %q", ips)
	}
	want(t, n, "peer", "http://both/hostname", "given")
}

// verbs are kubectl's that open a stream.
func verbs(t *testing.T, n *testcluster.Namespace) {
	if log := n.Logs("vm/main"); !strings.Contains(log, "serving") {
		t.Errorf("logs: %q", log)
	}
	forward := n.Start("port-forward", "pod/vm", ":8080")
	port := forward.Expect(`127\.0\.0\.1:(\d+) -> 8080`)[1]
	if resp, err := http.Get("http://127.0.0.1:" + port + "/hostname"); err != nil {
		t.Errorf("through the port-forward: %v", err)
	} else {
		body, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if strings.TrimSpace(string(body)) != "given" {
			t.Errorf("through the port-forward: %q", body)
		}
	}
	forward.Stop()
	from, to := filepath.Join(t.TempDir(), "sent"), filepath.Join(t.TempDir(), "back")
	if err := os.WriteFile(from, []byte("carried"), 0o600); err != nil {
		t.Fatal(err)
	}
	n.Kubectl("run", "box", "--image=h8s.local/busybox:1", "--stdin", "--attach=false", "--restart=Never", "--command", "--", "sh", "-c", "while read l; do echo got $l; done; sleep infinity")
	n.Ready("box")
	n.Kubectl("cp", from, "box:/sent")
	n.Kubectl("cp", "box:/sent", to)
	if b, err := os.ReadFile(to); err != nil || string(b) != "carried" {
		t.Errorf("cp: %q %v", b, err)
	}
	attach := n.Start("attach", "box", "-i")
	attach.Send("hello\n")
	attach.Expect("got hello")
	attach.Stop()
	n.Kubectl("delete", "pod", "box", "--grace-period=1", "--wait=false")
}

// probed: the edge's probes notice, through the named port of the right container.
func probed(t *testing.T, n *testcluster.Namespace) {
	get(n, "vm/main", "http://127.0.0.1:8080/sick")
	n.Wait("pod/vm", "condition=Ready=false")
	get(n, "vm/main", "http://127.0.0.1:8080/well")
	n.Ready("vm")
	if r := n.Get("pod/vm", ".status.containerStatuses[*].restartCount"); r != "0 0" {
		t.Errorf("restarts: %s", r)
	}
}

// anew: a container that ends is started again in the same machine; a machine that dies
// is replaced, and the Pod is reached again. Its hooks let it go.
func anew(t *testing.T, tn *testcluster.Tenant, n *testcluster.Namespace) {
	ip := n.Get("pod/vm", ".status.podIP")
	_, _ = get(n, "vm/main", "http://127.0.0.1:8080/exit?code=3")
	n.Restarts("vm", "main", 1)
	n.Ready("vm")
	if now := n.Get("pod/vm", ".status.podIP"); now != ip {
		t.Errorf("the address was %s and is %s", ip, now)
	}
	want(t, n, "peer", "http://"+ip+":8080/hostname", "given")

	machine := func() (id string, vmm int) {
		id = strings.TrimSpace(tn.Kubectl(t, "-n", tn.Home(), "get", "ports", "-l", "hypernetes.io/network=second", "-o", `jsonpath={.items[?(@.spec.pod.name=="vm")].spec.pod.sandbox}`))
		shim, processes := 0, tn.Processes(t)
		for _, p := range processes {
			if id != "" && p.Is("containerd-shim-hyper-v2") && strings.Contains(p.Command, id) {
				shim = p.PID
			}
		}
		for _, p := range processes {
			if shim != 0 && p.Is("qemu-system-x86_64") && p.Parent == shim {
				vmm = p.PID
			}
		}
		return id, vmm
	}
	before, vmm := machine()
	if vmm <= 1 {
		t.Fatalf("sandbox %q has no machine", before)
	}
	if err := unix.Kill(vmm, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	n.Until("the Pod has another machine", testcluster.Patience, func() bool {
		id, vmm := machine()
		return id != before && vmm != 0
	})
	n.Until("the Pod is reached again", testcluster.Patience, func() bool {
		name, ok := get(n, "peer", "http://both/hostname")
		return ok && name == "given"
	})
	want(t, n, "vm/main", "http://10.30.0.77:8080/hostname", "second")
	n.Kubectl("delete", "pod", "vm", "--timeout="+testcluster.Patience.String())
}

// TestRouted: the nodes reach the Pods of a Network with hostAccess Routed, and no others.
// Only the built-in provider has it: see docs/openstack.md.
func TestRouted(t *testing.T) {
	t.Parallel()
	c := up(t)
	tn := c.Tenant(t, light...)
	tn.Apply(fmt.Sprintf("apiVersion: hypernetes.io/v1alpha1\nkind: Network\nmetadata: {name: open, namespace: %s}\nspec: {provider: builtin, hostAccess: Routed, subnets: {a: {cidr: 10.77.0.0/24}}}\n", tn.Home()))
	open, closed := tn.Namespace("open", "open"), tn.Namespace("closed", "default")
	tn.Apply(join(pod{name: "web", runtime: "runc", node: c.Node}.yaml(open.Name), pod{name: "web", runtime: "runc", node: c.Node}.yaml(closed.Name)))
	open.Ready("web")
	closed.Ready("web")
	dial := func(ip string) error {
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		conn, err := c.DialInNode(ctx, "tcp", ip+":8080")
		if err == nil {
			_ = conn.Close()
		}
		return err
	}
	ip := open.Get("pod/web", ".status.podIP")
	open.Until("the node reaches "+ip, time.Minute, func() bool { return dial(ip) == nil })
	if ip := closed.Get("pod/web", ".status.podIP"); dial(ip) == nil {
		t.Errorf("the node reaches %s of an isolated Network", ip)
	}
}

// TestRollout: a Deployment's Service is answered by ready Pods only, throughout a rollout.
func TestRollout(t *testing.T) {
	t.Parallel()
	c := up(t)
	tn := c.Tenant(t, light...)
	n := tn.Namespace("app", "default")
	version := func(name, command string) string {
		return fmt.Sprintf(`apiVersion: apps/v1
kind: Deployment
metadata: {name: app, namespace: %s}
spec:
  replicas: 2
  strategy: {rollingUpdate: {maxUnavailable: 0, maxSurge: 1}}
  selector: {matchLabels: {app: app}}
  template:
    metadata: {labels: {app: app}}
    spec:
      runtimeClassName: runc
      terminationGracePeriodSeconds: 1
      containers:
      - name: main
        image: h8s.local/testbox:1
        args: [serve]
        env: [{name: OWNER, value: %s}]
        readinessProbe: {exec: {command: %s}, periodSeconds: 2, timeoutSeconds: 10}
`, n.Name, name, command)
	}
	const well, never = `[/testbox, get, "http://127.0.0.1:8080/healthz"]`, "[/testbox, exit, \"1\"]"
	tn.Apply(join(pod{name: "client", runtime: "runc"}.yaml(n.Name), version("one", well), service(n.Name, "app", "app")))
	n.Ready("client")
	n.Kubectl("rollout", "status", "deployment/app", "--timeout="+testcluster.Patience.String())
	n.Until("the Service answers", time.Minute, func() bool { return owner(n, "client", "http://app/") == "one" })
	tn.Apply(version("two", never))
	n.Until("a Pod of the second version runs", testcluster.Patience, func() bool {
		return strings.Count(n.Kubectl("get", "pods", "-l", "app=app", "--field-selector=status.phase=Running", "-o", "name"), "pod/") == 3
	})
	for range 5 {
		if got := owner(n, "client", "http://app/"); got != "one" {
			t.Errorf("before the second version is ready the Service is answered by %s", got)
		}
	}
	tn.Apply(version("three", well))
	n.Kubectl("rollout", "status", "deployment/app", "--timeout="+testcluster.Patience.String())
	n.Until("the third version answers alone", time.Minute, func() bool { return owner(n, "client", "http://app/") == "three" })
}

// owner is who answers at a URL, by the environment it shows.
func owner(n *testcluster.Namespace, from, url string) string {
	body, ok := get(n, from, url)
	if !ok {
		return "nobody: " + body
	}
	for line := range strings.Lines(body) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "env OWNER="); ok {
			return v
		}
	}
	return "somebody else: " + body
}
