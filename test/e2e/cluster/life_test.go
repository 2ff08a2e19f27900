package cluster

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const podTemplate = `apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec:
  runtimeClassName: %s
  terminationGracePeriodSeconds: 1
  containers:
  - name: web
    image: h8s.local/busybox:1
    command: [sh, -c, "hostname > /tmp/index.html; exec httpd -f -p 8080 -h /tmp"]
    ports: [{containerPort: 8080, hostPort: %s}]
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: NodePort
  selector: {app: web}
  ports: [{port: 80, targetPort: 8080, nodePort: 30077}]
`

const bare = `apiVersion: v1
kind: Pod
metadata: {name: bare}
spec: {containers: [{name: c, image: x}]}
`

// TestLifeOfVirtualMachines repeats with a virtual machine what concerns Pods.
func TestLifeOfVirtualMachines(t *testing.T) {
	n := newNode(t, "e2e-vm", freePort(t))
	n.class = "hyper"
	for _, need := range []string{"bin/containerd-shim-hyper-v2", "share/vmlinux", "share/initramfs.img"} {
		if _, err := os.Stat(filepath.Join(n.out, need)); err != nil {
			t.Skipf("%s is missing (run `make build`)", filepath.Join(n.out, need))
		}
	}
	before := n.inventory()
	n.h8s("up", "--api-port", n.port, "--publish", n.hostPort, "--publish", n.nodePort+":30077")
	n.startPod(t)
	n.killComponents(t)
	n.killDaemon(t)
	n.keepPods(t)
	n.downAndUp(t)
	n.h8s("down", "--keep-pods")
	n.h8s("down")
	n.h8s("reset", "--yes")
	if left := added(before, n.inventory()); len(left) > 0 {
		t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
	}
}

// TestLife takes one node through all an operator does to it. The steps build on
// each other, as a cluster start per step would take most of the time.
func TestLife(t *testing.T) {
	n := newNode(t, "e2e-life", freePort(t))
	before := n.inventory()

	text := n.up("--publish", n.hostPort, "--publish", n.nodePort+":30077")
	for _, want := range []string{"✓ etcd", "✓ kube-apiserver", "✓ node ready", "Ready in ", "Next: h8s kubectl"} {
		if !strings.Contains(text, want) {
			t.Errorf("h8s up did not say %q:\n%s", want, text)
		}
	}
	t.Logf("h8s up:\n%s", text)
	step := func(name string, f func(*testing.T)) {
		if !t.Failed() {
			t.Run(name, func(t *testing.T) {
				n.t = t
				defer func() { n.t = t }()
				f(t)
			})
		}
		n.t = t
	}
	step("second up does nothing", n.secondUp)
	step("default runtime class", n.defaultRuntimeClass)
	step("pod, hostPort and NodePort", n.startPod)
	step("killed components come back", n.killComponents)
	step("killed daemon is replaced", n.killDaemon)
	step("down keeping pods", n.keepPods)
	step("host untouched while up", func(t *testing.T) {
		for _, e := range added(before, n.inventory()) {
			if strings.HasPrefix(e, "mount ") || strings.HasPrefix(e, "link ") || strings.HasPrefix(e, "file ") || strings.HasPrefix(e, "loop ") {
				t.Errorf("the node shows on the machine: %s", e)
			}
		}
	})
	step("port taken", n.portTaken)
	step("down, up again", n.downAndUp)
	step("reset", func(t *testing.T) {
		if text := n.h8s("reset", "--dry-run"); !strings.Contains(text, "directory  /var/lib/h8s/e2e-life") {
			t.Errorf("dry run does not list the state directory:\n%s", text)
		}
		n.h8s("reset", "--yes")
		if left := added(before, n.inventory()); len(left) > 0 {
			t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
		}
		if text := n.h8s("reset", "--yes"); !strings.Contains(text, "nothing to do") {
			t.Errorf("second reset: %s", text)
		}
	})
}

func (n *node) secondUp(t *testing.T) {
	began, pids := time.Now(), n.pids()
	if text := n.up("--publish", n.hostPort, "--publish", n.nodePort+":30077"); !strings.Contains(text, "nothing to do") {
		t.Errorf("it said %q", text)
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("it took %s", took)
	}
	if now := n.pids(); fmt.Sprint(now) != fmt.Sprint(pids) {
		t.Errorf("processes changed: %v, then %v", pids, now)
	}
}

func (n *node) defaultRuntimeClass(t *testing.T) {
	eventually(t, 30*time.Second, func() error {
		out, err := n.kubectl(bare, "create", "--dry-run=server", "-f", "-", "-o", "jsonpath={.spec.runtimeClassName} {.spec.overhead.memory}")
		if err != nil {
			return err
		}
		if class, overhead, _ := strings.Cut(out, " "); class != "hyper" || overhead == "" {
			return fmt.Errorf("a Pod without a class got class %q and overhead %q", class, overhead)
		}
		return nil
	})
}

func (n *node) startPod(t *testing.T) {
	eventually(t, 30*time.Second, func() error {
		_, err := n.kubectl(fmt.Sprintf(podTemplate, n.class, n.hostPort), "apply", "-f", "-")
		return err
	})
	n.must("", "wait", "--for=condition=Ready", "pod/web", "--timeout=90s")
	for _, port := range []string{n.hostPort, n.nodePort} {
		eventually(t, 20*time.Second, func() error { return get(port, "web\n") })
	}
	if out := n.must("", "exec", "web", "--", "cat", "/tmp/index.html"); out != "web\n" {
		t.Errorf("exec: %q", out)
	}
}

// get asks a published port of the machine.
func get(port, want string) error {
	url := "http://127.0.0.1:" + port + "/"
	client := http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get(url)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
	if err != nil || string(b) != want {
		return fmt.Errorf("%s answered %q, %w", url, b, err)
	}
	return nil
}

// container is the identity of the Pod's container: its id and restart count.
func (n *node) container() string {
	n.t.Helper()
	return n.must("", "get", "pod", "web", "-o", "jsonpath={.status.containerStatuses[0].containerID} {.status.containerStatuses[0].restartCount}")
}

func (n *node) killComponents(t *testing.T) {
	was := n.container()
	for _, name := range []string{"kubelet", "containerd", "kube-proxy", "kube-scheduler", "kube-controller-manager", "kube-apiserver", "etcd", "metrics-server"} {
		old := n.pids()[name]
		if err := unix.Kill(old, unix.SIGKILL); err != nil {
			t.Fatalf("kill %s: %v", name, err)
		}
		eventually(t, 60*time.Second, func() error {
			for _, c := range n.status().Components {
				if c.Name == name && (c.State != "ready" || c.PID == old || c.PID == 0) {
					return fmt.Errorf("%s (was %d) is %+v", name, old, c)
				}
			}
			return nil
		})
	}
	eventually(t, 60*time.Second, func() error {
		_, err := n.kubectl("", "get", "pod", "web")
		return err
	})
	if now := n.container(); now != was {
		t.Errorf("the Pod did not survive: container %s, then %s", was, now)
	}
	eventually(t, 20*time.Second, func() error { return get(n.hostPort, "web\n") })
}

func (n *node) killDaemon(t *testing.T) {
	st, was := n.status(), n.container()
	pids := n.pids()
	if err := unix.Kill(st.PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, 10*time.Second, func() error {
		if phase := n.status().Phase; phase != "headless" {
			return fmt.Errorf("phase %s", phase)
		}
		return nil
	})
	for name, pid := range pids {
		if !alive(pid) {
			t.Errorf("%s died with the daemon", name)
		}
	}
	text := n.up()
	if !strings.Contains(text, "was running") {
		t.Errorf("nothing was adopted:\n%s", text)
	}
	if now := n.pids(); fmt.Sprint(now) != fmt.Sprint(pids) {
		t.Errorf("processes were replaced: %v, then %v", pids, now)
	}
	if now := n.container(); now != was {
		t.Errorf("the Pod did not survive: %s, then %s", was, now)
	}
	// An adopted process that dies is respawned like a child.
	old := n.pids()["kube-scheduler"]
	if err := unix.Kill(old, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, 30*time.Second, func() error {
		if pid := n.pids()["kube-scheduler"]; pid == old || pid == 0 {
			return fmt.Errorf("scheduler is %d, was %d", pid, old)
		}
		return nil
	})
}

func (n *node) keepPods(t *testing.T) {
	was := n.container()
	n.h8s("down", "--keep-pods")
	if phase := n.status().Phase; phase != "headless" {
		t.Errorf("phase %s", phase)
	}
	n.up()
	eventually(t, 30*time.Second, func() error {
		if now := n.container(); now != was {
			return fmt.Errorf("the Pod did not survive: %s, then %s", was, now)
		}
		return nil
	})
	eventually(t, 20*time.Second, func() error { return get(n.hostPort, "web\n") })
}

func (n *node) portTaken(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	other := newNode(t, "e2e-port", fmt.Sprint(l.Addr().(*net.TCPAddr).Port))
	before := other.inventory()
	text, err := other.try("up", "--api-port", other.port, "--ignore-preflight")
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 12 {
		t.Errorf("exit: %v", err)
	}
	for _, want := range []string{"H8S_PORT_IN_USE", fmt.Sprintf("(pid %d)", os.Getpid()), "--api-port"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in:\n%s", want, text)
		}
	}
	for _, e := range added(before, other.inventory()) {
		if !strings.HasPrefix(e, "directory /var/lib/h8s") { // its log stays for the reader
			t.Errorf("left behind: %s", e)
		}
	}
}

func (n *node) downAndUp(t *testing.T) {
	n.must("", "create", "configmap", "kept", "--from-literal=a=b")
	n.h8s("down")
	if st := n.status(); st.Phase != "absent" {
		t.Errorf("phase %s after down", st.Phase)
	}
	if text := n.h8s("down"); !strings.Contains(text, "nothing to do") {
		t.Errorf("second down: %s", text)
	}
	n.processes(func(_, what string) { t.Errorf("a process is left: %s", what) })
	n.h8s("up", "--ignore-preflight") // settings are remembered
	if out := n.must("", "get", "configmap", "kept", "-o", "jsonpath={.data.a}"); out != "b" {
		t.Errorf("state was lost: %q", out)
	}
	n.must("", "wait", "--for=condition=Ready", "pod/web", "--timeout=90s")
	eventually(t, 30*time.Second, func() error { return get(n.hostPort, "web\n") })
}
