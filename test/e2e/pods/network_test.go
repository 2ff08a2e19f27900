package pods

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// TestNetwork sends traffic between two VMs, by address, Service and name, and from
// the machine's loopback to a hostPort.
func TestNetwork(t *testing.T) {
	t.Parallel()
	n := testcluster.Up(t).Namespace(t)
	n.Apply(withPublishedPort(t, "testdata/network.yaml"))
	n.Ready("server", "client")
	server := n.Pod("server")
	ip := server.Status.PodIP

	t.Run("downward API", func(t *testing.T) {
		n := n.For(t)
		want(t, "status.podIP", n.Shell("server", "echo $POD_IP"), ip)
		want(t, "status.hostIP", n.Shell("server", "echo $HOST_IP"), server.Status.HostIP)
		want(t, "metadata.name", n.Shell("server", "echo $POD_NAME"), "server")
		want(t, "limits.memory", n.Shell("server", "echo $MEMORY"), fmt.Sprint(96<<20))
		if out := n.Exec("server", "ip", "-o", "addr"); !strings.Contains(out, " "+ip+"/") {
			t.Errorf("the guest has not the Pod's address %s:\n%s", ip, out)
		}
	})
	t.Run("names", func(t *testing.T) {
		n := n.For(t)
		want(t, "host name", n.Exec("server", "hostname"), "the-server")
		hosts := n.Exec("server", "cat", "/etc/hosts")
		for _, part := range []string{"aliased", "the-server.headless." + n.Name + ".svc.cluster.local", ip} {
			if !strings.Contains(hosts, part) {
				t.Errorf("/etc/hosts has no %q:\n%s", part, hosts)
			}
		}
		resolv := n.Exec("client", "cat", "/etc/resolv.conf")
		for _, part := range []string{"nameserver 10.96.0.10", n.Name + ".svc.cluster.local", "ndots:5"} {
			if !strings.Contains(resolv, part) {
				t.Errorf("/etc/resolv.conf has no %q:\n%s", part, resolv)
			}
		}
	})
	fetch := func(n *testcluster.Namespace, url string) string {
		return n.Exec("client", "timeout", "20", "wget", "-qO-", url)
	}
	t.Run("Pod to Pod", func(t *testing.T) {
		n := n.For(t)
		want(t, "answer", fetch(n, "http://"+ip+":8080/hostname"), "the-server")
		want(t, "client address that the server sees", fetch(n, "http://"+ip+":8080/clientip"), n.Pod("client").Status.PodIP)
		n.Exec("client", "ping", "-c", "1", "-W", "10", ip)
		const size = 8 << 20
		want(t, "bytes", n.Shell("client", fmt.Sprintf("timeout 60 wget -qO- 'http://%s:8080/bytes?n=%d' | wc -c", ip, size)), fmt.Sprint(size))
	})
	t.Run("Service and DNS", func(t *testing.T) {
		n := n.For(t)
		for _, name := range []string{"web", "web." + n.Name, "web." + n.Name + ".svc.cluster.local", "headless:8080", "the-server.headless:8080", n.Get("service/web", ".spec.clusterIP")} {
			want(t, "answer of "+name, fetch(n, "http://"+name+"/hostname"), "the-server")
		}
		want(t, "echo by TCP", n.Exec("client", "/testbox", "dial", "tcp", "web:7"), "hello")
		want(t, "echo by UDP", n.Exec("client", "/testbox", "dial", "udp", "web:7"), "hello")
		want(t, "a Pod reaching itself through its Service", n.Exec("server", "timeout", "20", "wget", "-qO-", "http://web/hostname"), "the-server")
		if out, code := n.ExecCode("client", "nslookup", "no-such-name."+n.Name+".svc.cluster.local"); code == 0 {
			t.Errorf("a name that does not exist resolves: %s", out)
		}
		if out := n.Exec("client", "nslookup", "kubernetes.default.svc.cluster.local"); !strings.Contains(out, "10.96.0.1") {
			t.Errorf("kubernetes.default: %s", out)
		}
	})
	t.Run("API server from a Pod", func(t *testing.T) {
		const account = "/var/run/secrets/kubernetes.io/serviceaccount/"
		out := n.For(t).Exec("client", "/testbox", "get", "-ca", account+"ca.crt", "-token", account+"token", "https://kubernetes.default.svc/version")
		if !strings.Contains(out, "gitVersion") {
			t.Errorf("answer: %q", out)
		}
	})
	t.Run("hostPort", func(t *testing.T) { hostPort(t, n.For(t), server.Status.HostIP) })
}

func hostPort(t *testing.T, n *testcluster.Namespace, hostIP string) {
	inNode := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DialContext: n.DialInNode}}
	defer inNode.CloseIdleConnections()
	want(t, "answer inside the node", httpGet(t, inNode, "http://"+hostIP+":"+testcluster.PublishedPort+"/hostname"), "the-server\n")
	outside := &http.Client{Timeout: 20 * time.Second}
	defer outside.CloseIdleConnections()
	want(t, "answer on the machine's loopback", httpGet(t, outside, "http://127.0.0.1:"+testcluster.PublishedPort+"/hostname"), "the-server\n")
}

// withPublishedPort copies a manifest that has 18001 as hostPort with the port that is
// published in this run.
func withPublishedPort(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), filepath.Base(file))
	text = bytes.ReplaceAll(text, []byte("hostPort: 18001"), []byte("hostPort: "+testcluster.PublishedPort))
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
