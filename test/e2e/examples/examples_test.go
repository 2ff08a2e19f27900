// Package examples holds every example to what its README says.
package examples

import (
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

func TestMain(m *testing.M) { testcluster.Main(m) }

// manifest is the path of an example's file.
func manifest(parts ...string) string {
	return filepath.Join(append([]string{"..", "..", "..", "examples"}, parts...)...)
}

// contains fails the test unless text has all the parts.
func contains(t *testing.T, what, text string, parts ...string) {
	t.Helper()
	for _, p := range parts {
		if !strings.Contains(text, p) {
			t.Errorf("%s: %q is missing in:\n%s", what, p, text)
		}
	}
}

// hostKernel is the machine's `uname -r`.
func hostKernel(t *testing.T) string {
	t.Helper()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	return unix.ByteSliceToString(u.Release[:])
}

func TestDemo(t *testing.T) {
	t.Parallel()
	n := testcluster.Up(t).Namespace(t)
	n.Apply(manifest("demo", "demo.yaml"))
	n.Ready("demo")
	contains(t, "page", n.Exec("demo", "wget", "-qO-", "127.0.0.1:80"), "Welcome to nginx!")
	if guest := n.Exec("demo", "uname", "-r"); guest == hostKernel(t) {
		t.Errorf("uname -r in the Pod is the host's: %s", guest)
	}
	contains(t, "log", n.Logs("demo"), "GET / HTTP/1.1")
	if console := n.H8S(t, "logs", "--pod", n.Name+"/demo"); strings.Contains(console, "panic") {
		t.Errorf("the console of the Pod's VM:\n%s", console)
	}
	forward := n.Start("port-forward", "pod/demo", ":80")
	body, err := get("http://127.0.0.1:" + forward.Expect(`127\.0\.0\.1:(\d+) -> 80`)[1])
	if err != nil {
		t.Errorf("through the port-forward: %v", err)
	}
	contains(t, "page through the port-forward", body, "Welcome to nginx!")
	ready := n.Get("endpointslices", ".items[0].endpoints[0].addresses[0]")
	if ip := n.Get("pod/demo", ".status.podIP"); ready != ip {
		t.Errorf("the Service leads to %q, the Pod has %q", ready, ip)
	}
}

func TestJavaweb2(t *testing.T) {
	t.Parallel()
	n := testcluster.Up(t).Namespace(t)
	// The test's cluster publishes another port than the README's.
	text, err := os.ReadFile(manifest("javaweb-2", "javaweb-2.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	changed := strings.Replace(string(text), "hostPort: 8001", "hostPort: "+testcluster.PublishedPort, 1)
	file := filepath.Join(t.TempDir(), "javaweb-2.yaml")
	if err := os.WriteFile(file, []byte(changed), 0o600); err != nil {
		t.Fatal(err)
	}
	n.Apply(file)
	n.Ready("javaweb-2")
	if code := n.Ended("javaweb-2", "war").ExitCode; code != 0 {
		t.Errorf("init container war: exit code %d", code)
	}
	contains(t, "webapps", n.Exec("javaweb-2", "ls", "/root/apache-tomcat-7.0.42-v2/webapps"), "sample.war")
	url := "http://127.0.0.1:" + testcluster.PublishedPort + "/sample/"
	n.Until(url+" answers", time.Minute, func() bool {
		body, err := get(url)
		return err == nil && strings.Contains(body, "Hello from sample.war")
	})
}

func get(url string) (string, error) {
	client := http.Client{Timeout: 10 * time.Second}
	resp, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", url, resp.Status)
	}
	return string(body), err
}

func TestLoggingAgent(t *testing.T) {
	t.Parallel()
	n := testcluster.Up(t).Namespace(t)
	n.Apply(manifest("logging-agent", "helloworld.yaml"))
	contains(t, "rollout", n.Kubectl("rollout", "status", "deployment/helloworld", "--timeout="+testcluster.Patience.String()), "successfully rolled out")
	pod := n.Get("pods", ".items[0].metadata.name")
	contains(t, "answer", n.Exec(pod+"/logging-agent", "wget", "-qO-", "127.0.0.1:8080/hi"), "Hello, World!", pod)
	n.Until("the agent prints the request", time.Minute, func() bool {
		log := n.Logs(pod + "/logging-agent")
		return strings.Contains(log, "GET /hi") && strings.Contains(log, "helloworld.log: ")
	})
	if log := n.Logs(pod + "/helloworld"); strings.TrimSpace(log) != "" {
		t.Errorf("helloworld itself printed: %s", log)
	}
}

func TestConfig(t *testing.T) {
	t.Parallel()
	n := testcluster.Up(t).Namespace(t)
	n.Apply(manifest("config", "config.yaml"))
	n.Ready("config")
	n.Until("the Pod prints all", time.Minute, func() bool { return strings.Contains(n.Logs("config"), "size=42") })
	contains(t, "log", n.Logs("config"), "greeting=Hello", "password=s3cret",
		"pod ip="+n.Get("pod/config", ".status.podIP")+"\n", "pod name=config", `app="config"`, "colour=blue")
	n.Kubectl("patch", "configmap", "config", "-p", `{"data":{"greeting":"Bonjour"}}`)
	n.Until("the file is updated", 3*time.Minute, func() bool {
		return n.Exec("config", "cat", "/etc/config/greeting") == "Bonjour"
	})
	if v := n.Exec("config", "sh", "-c", "echo $GREETING"); v != "Hello" {
		t.Errorf("the variable changed to %q", v)
	}
}

func TestKernel(t *testing.T) {
	t.Parallel()
	n := testcluster.Up(t).Namespace(t)
	n.Apply(manifest("kernel", "kernel.yaml"))
	host := hostKernel(t)
	for pod, same := range map[string]bool{"kernel-own": false, "kernel-shared": true} {
		n.Wait("pod/"+pod, "jsonpath={.status.phase}=Succeeded")
		if release := strings.TrimSpace(n.Logs(pod)); release == "" || (release == host) != same {
			t.Errorf("%s prints %q; the host has %q", pod, release, host)
		}
	}
}

// TestForkbomb is not parallel: it measures how fast others are answered.
func TestForkbomb(t *testing.T) {
	n := testcluster.Up(t).Namespace(t)
	n.Apply(manifest("forkbomb", "forkbomb.yaml"))
	n.Ready("neighbour")
	n.Wait("pod/forkbomb", "jsonpath={.status.phase}=Running")
	const bearable = 15 * time.Second // kubectl, exec and a VM under TCG, on a busy machine
	for range 5 {
		start := time.Now()
		contains(t, "neighbour", n.Exec("neighbour", "wget", "-qO-", "127.0.0.1"), "Welcome to nginx!")
		contains(t, "nodes", n.Kubectl("get", "nodes"), " Ready ")
		if took := time.Since(start); took > bearable {
			t.Errorf("the neighbour and the node took %s to answer", took)
		}
	}
	start := time.Now()
	n.Kubectl("delete", "pod", "forkbomb", "--timeout=90s")
	t.Logf("the fork bomb was gone after %s", time.Since(start).Round(time.Second))
}
