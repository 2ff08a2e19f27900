package pods

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// TestKubectl uses every verb of kubectl that concerns a running Pod on one Pod.
func TestKubectl(t *testing.T) {
	t.Parallel()
	n := testcluster.Up(t).Namespace(t)
	n.Apply("testdata/verbs.yaml")
	n.Ready("verbs")
	for _, verb := range []struct {
		name string
		run  func(*testing.T, *testcluster.Namespace)
	}{
		{"get", get},
		{"describe", describe},
		{"logs", logs},
		{"exec", execute},
		{"exec with a terminal", execTerminal},
		{"exec of 20 MiB", execMuch},
		{"attach", attach},
		{"attach without a terminal", attachPipes},
		{"cp", copyFiles},
		{"port-forward", portForward},
		{"top", top},
		{"run", runOnce},
		{"delete", deletePod},
	} {
		t.Run(verb.name, func(t *testing.T) { verb.run(t, n.For(t)) })
	}
}

func get(t *testing.T, n *testcluster.Namespace) {
	out := n.Kubectl("get", "pod", "verbs", "-o", "wide")
	for _, part := range []string{"4/4", "Running", n.Node} {
		if !strings.Contains(out, part) {
			t.Errorf("kubectl get -o wide does not show %q:\n%s", part, out)
		}
	}
	want(t, "runtime class", n.Get("pod/verbs", ".spec.runtimeClassName"), "hyper")
	if n.Get("pod/verbs", ".spec.overhead.memory") == "" {
		t.Error("the Pod's overhead is not accounted for")
	}
}

func describe(t *testing.T, n *testcluster.Namespace) {
	out := n.Kubectl("describe", "pod", "verbs")
	for _, part := range []string{`Runtime Class Name: +hyper`, `Container ID: +containerd://`, `Successfully assigned`, `spec.containers\{web\}: Container started`} {
		if !regexp.MustCompile(part).MatchString(out) {
			t.Errorf("kubectl describe does not show %q:\n%s", part, out)
		}
	}
}

func logs(t *testing.T, n *testcluster.Namespace) {
	if out := n.Logs("verbs/web"); !strings.Contains(out, "testbox: serving") {
		t.Errorf("log of web: %q", out)
	}
	follow := n.Start("logs", "-f", "--tail=1", "verbs", "-c", "ticker")
	first := follow.Expect(`tick (\d+)\n`)
	second := follow.Expect(`tick (\d+)\n`)
	if first[1] == second[1] {
		t.Errorf("followed log repeats %q", first[0])
	}
	follow.Stop()
	if out := n.Kubectl("logs", "verbs", "--all-containers", "--prefix", "--tail=1"); !strings.Contains(out, "[pod/verbs/ticker]") {
		t.Errorf("logs of all containers: %q", out)
	}
}

func execute(t *testing.T, n *testcluster.Namespace) {
	want(t, "host name", n.Exec("verbs/web", "hostname"), "verbs")
	out, code := n.ExecCode("verbs/web", "sh", "-c", "echo out; echo err >&2; exit 42")
	want(t, "stdout", out, "out\n")
	want(t, "exit code", code, 42)
	_, code = n.ExecCode("verbs/web", "sh", "-c", "kill -9 $$")
	want(t, "exit code of a killed process", code, 137)
	if out, err := n.Try("exec", "verbs", "-c", "web", "--", "no-such-program"); err == nil {
		t.Errorf("exec of a missing program succeeded: %q", out)
	} else if !strings.Contains(err.Error(), "no-such-program") {
		t.Errorf("exec of a missing program does not name it: %v", err)
	}
}

func execTerminal(t *testing.T, n *testcluster.Namespace) {
	s := n.Terminal("exec", "-it", "verbs", "-c", "web", "--", "sh")
	s.Send("tty; stty size\n")
	s.Expect(`/dev/pts/\d+`)
	s.Expect(`24 80`)
	s.Resize(132, 43)
	s.Send("while [ \"$(stty size)\" != '43 132' ]; do sleep 0.2; done; echo re''sized\n")
	s.Expect(`resized`)
	// Ctrl-C must reach the foreground process, not kubectl.
	s.Send("sleep 1234\n")
	n.Until("the shell runs sleep", testcluster.Patience, func() bool {
		return strings.Contains(n.Exec("verbs/web", "ps"), "sleep 1234")
	})
	s.Send("\x03")
	s.Expect(`# `)
	s.Send("echo ali''ve\n")
	s.Expect(`alive`)
	s.Send("exit 3\n")
	want(t, "exit code of the shell", s.Exit(), 3)
}

func execMuch(t *testing.T, n *testcluster.Namespace) {
	const size = 20 << 20
	out := n.Kubectl("exec", "verbs", "-c", "web", "--", "head", "-c", fmt.Sprint(size), "/dev/zero")
	want(t, "bytes from the guest", len(out), size)
	s := n.Start("exec", "-i", "verbs", "-c", "web", "--", "wc", "-c")
	go func() {
		_, _ = io.CopyN(s.Input(), zeros{}, size)
		s.CloseInput()
	}()
	want(t, "bytes into the guest", s.Expect(`(\d+)\s`)[1], fmt.Sprint(size))
	want(t, "exit code", s.Exit(), 0)
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

func attach(t *testing.T, n *testcluster.Namespace) {
	s := n.Terminal("attach", "-it", "verbs", "-c", "shell")
	s.Send("echo attached as $((6*7))\n")
	s.Expect(`attached as 42`)
	s.Stop()
	// The container and its shell outlive the terminal; the next one meets the same shell.
	s = n.Terminal("attach", "-it", "verbs", "-c", "shell")
	s.Send("echo again $((6*7+1))\n")
	s.Expect(`again 43`)
	s.Stop()
	want(t, "restarts of the attached container", n.Pod("verbs").Container("shell").RestartCount, 0)
}

func attachPipes(t *testing.T, n *testcluster.Namespace) {
	s := n.Start("attach", "-i", "verbs", "-c", "upper")
	s.Send("one\n")
	s.Expect(`got one`)
	s.Send("two\n")
	s.Expect(`got two`)
	s.Stop()
	want(t, "restarts of the attached container", n.Pod("verbs").Container("upper").RestartCount, 0)
}

func copyFiles(t *testing.T, n *testcluster.Namespace) {
	dir := t.TempDir()
	data := make([]byte, 3<<20)
	_, _ = rand.Read(data)
	sent := filepath.Join(dir, "sent")
	if err := os.MkdirAll(filepath.Join(sent, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a", "sub/b"} {
		if err := os.WriteFile(filepath.Join(sent, name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	n.Kubectl("cp", sent, "verbs:/tmp/got", "-c", "web")
	n.Kubectl("cp", "verbs:/tmp/got", filepath.Join(dir, "back"), "-c", "web")
	for _, name := range []string{"a", "sub/b"} {
		back, err := os.ReadFile(filepath.Join(dir, "back", name))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(back, data) {
			t.Errorf("file %s came back different", name)
		}
	}
}

func portForward(t *testing.T, n *testcluster.Namespace) {
	s := n.Start("port-forward", "pod/verbs", ":8080")
	port := s.Expect(`127\.0\.0\.1:(\d+) -> 8080`)[1]
	client := &http.Client{Timeout: 30 * time.Second}
	for range 3 {
		want(t, "answer through the port-forward", httpGet(t, client, "http://127.0.0.1:"+port+"/hostname"), "verbs\n")
	}
	const size = 4 << 20
	body := httpGet(t, client, fmt.Sprintf("http://127.0.0.1:%s/bytes?n=%d", port, size))
	want(t, "bytes through the port-forward", len(body), size)
	s.Stop()
}

func httpGet(t *testing.T, client *http.Client, url string) string {
	t.Helper()
	answer, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatalf("%s: %v", url, err)
	}
	return string(body)
}

func top(t *testing.T, n *testcluster.Namespace) {
	var out string
	n.Until("kubectl top pod has figures", testcluster.Patience, func() bool {
		var err error
		out, err = n.Try("top", "pod", "verbs", "--containers", "--no-headers")
		return err == nil && strings.Count(out, "verbs") == 4
	})
	if !regexp.MustCompile(`ticker +\d+m +[1-9]\d*Mi`).MatchString(out) && !regexp.MustCompile(`web +\d+m +[1-9]\d*Mi`).MatchString(out) {
		t.Errorf("no container uses memory:\n%s", out)
	}
	t.Logf("kubectl top pod --containers\n%s", out)
	n.Until("kubectl top node has figures", testcluster.Patience, func() bool {
		var err error
		out, err = n.Try("top", "node", n.Node, "--no-headers")
		return err == nil && regexp.MustCompile(`\d+m +\d+%? +\d+Mi`).MatchString(out)
	})
	t.Logf("kubectl top node\n%s", out)
}

// runOnce is a Pod made, attached to and removed by one command.
func runOnce(t *testing.T, n *testcluster.Namespace) {
	s := n.Start("run", "once", "--rm", "-i", "--quiet", "--restart=Never", "--image=h8s.local/busybox:1", "--", "sh", "-c", "cat; exit 7")
	s.Send("from standard input\n")
	s.Expect("from standard input")
	s.CloseInput()
	want(t, "exit code", s.Exit(), 7)
	if _, err := n.Try("get", "pod", "once"); err == nil {
		t.Error("kubectl run --rm left its Pod")
	}
}

func deletePod(t *testing.T, n *testcluster.Namespace) {
	n.Kubectl("delete", "pod", "verbs", "--timeout=60s")
	if _, err := n.Try("get", "pod", "verbs"); err == nil || !strings.Contains(err.Error(), "NotFound") {
		t.Errorf("the deleted Pod is still there: %v", err)
	}
}
