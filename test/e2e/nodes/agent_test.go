package nodes

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// machine stands for another machine: a network namespace with an address on the nodes'
// network, in which h8s agent runs as on a machine's own network.
type machine struct {
	t    *testing.T
	c    *testcluster.Cluster
	name string // of the node and of the namespace
	ip   string
}

func newMachine(t *testing.T, c *testcluster.Cluster, k int) *machine {
	t.Helper()
	m := &machine{t: t, c: c, name: fmt.Sprintf("%s-a%d", c.Node, k), ip: fmt.Sprintf("100.64.0.%d", 100+k)}
	anchor := fmt.Sprint(c.AnchorPID(t))
	port := fmt.Sprintf("agent%d", k)
	m.run("ip", "netns", "add", m.name)
	t.Cleanup(func() {
		if out, err := exec.Command("ip", "netns", "del", m.name).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	node := func(args ...string) {
		m.run("nsenter", append([]string{"--net=/proc/" + anchor + "/ns/net"}, args...)...)
	}
	m.run("ip", "netns", "exec", m.name, "ip", "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", anchor)
	node("ip", "link", "set", port, "master", "h8s0", "up")
	for _, args := range [][]string{{"link", "set", "lo", "up"}, {"addr", "add", m.ip + "/24", "dev", "eth0"}, {"link", "set", "eth0", "up"}} {
		m.run("ip", append([]string{"-n", m.name}, args...)...)
	}
	return m
}

func (m *machine) run(name string, args ...string) {
	m.t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		m.t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
}

// h8s is the command line of h8s on the machine.
func (m *machine) h8s(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--net=/run/netns/" + m.name, filepath.Join(m.c.Out, "bin", "h8s")}, args...)...)
	cmd.Env = append(os.Environ(), "H8S_OUT="+m.c.Out)
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// join runs h8s agent, which is to fail, and returns what it printed.
func (m *machine) join(token string, args ...string) (string, int) {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := m.h8s(ctx, append([]string{
		"agent", "--name", m.name, "--node-ip", m.ip, "--server", "https://100.64.0.1:6443", "--token-file", "-", "--ignore-preflight",
	}, args...)...)
	cmd.Stdin = strings.NewReader(token)
	out, _ := cmd.CombinedOutput()
	m.reset()
	return string(out), cmd.ProcessState.ExitCode()
}

func (m *machine) reset() {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if out, err := m.h8s(ctx, "reset", "--name", m.name, "--yes").CombinedOutput(); err != nil {
		m.t.Errorf("reset: %v: %s", err, out)
	}
	gone(m.t, m.name)
}

// running waits until the agent has started.
func (m *machine) running(out *output, ended <-chan error) {
	m.t.Helper()
	node := m.c.Further(m.name)
	tick, deadline := time.NewTicker(200*time.Millisecond), time.NewTimer(lossPatience)
	defer tick.Stop()
	defer deadline.Stop()
	for {
		if text, err := node.TryH8S("status"); err == nil && strings.Contains(text, "node "+m.name+": running") {
			return
		}
		select {
		case <-tick.C:
		case err := <-ended:
			m.t.Fatalf("h8s agent ended: %v\n%s", err, out)
		case <-deadline.C:
			m.t.Fatalf("h8s agent is not ready:\n%s", out)
		}
	}
}

// output is what a long-lived process prints.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// agent joins another machine: not with what is wrong, then with a token.
func agent(t *testing.T, c *testcluster.Cluster, names []string) {
	m := newMachine(t, c, 1)
	good := newToken(t, c)
	cut := good[:len(good)-1]
	other := "h8s1." + strings.Repeat("0a", 32) + good[strings.Index(good[5:], ".")+5:]
	revoked, expired := newToken(t, c), newToken(t, c)
	c.H8S(t, "token", "revoke", revoked)
	c.Kubectl(t, "-n", "kube-system", "patch", "secret", "bootstrap-token-"+strings.Split(expired, ".")[2],
		"-p", `{"stringData":{"expiration":"2020-01-01T00:00:00Z"}}`)
	for name, x := range map[string]struct {
		token, want string
		exit        int
	}{
		"none":              {"", "was given no token", 2},
		"cut off":           {cut, "cut off", 2},
		"another cluster's": {other, "authority is not the one the token names", 21},
		"revoked":           {revoked, "does not accept the token", 21},
		"expired":           {expired, "does not accept the token", 21},
	} {
		out, exit := m.join(x.token)
		if exit != x.exit || !strings.Contains(out, x.want) {
			t.Errorf("a token %s: exit %d, want %d and %q:\n%s", name, exit, x.exit, x.want, out)
		}
	}
	if out, exit := m.join(good, "--server", "https://100.64.0.250:6443"); exit != 21 || !strings.Contains(out, "no API server answers") {
		t.Errorf("nobody there: exit %d:\n%s", exit, out)
	}
	if out, exit := m.join(good, "--server", "https://server:6443"); exit != 2 || !strings.Contains(out, "IP address") {
		t.Errorf("a name: exit %d:\n%s", exit, out)
	}
	var out output
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	cmd := m.h8s(ctx, "agent", "--name", m.name, "--node-ip", m.ip, "--server", "https://100.64.0.1:6443", "--token", good, "--ignore-preflight")
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	defer m.reset()
	m.running(&out, ended)
	awaitReady(t, c, m.name, "True")
	for _, p := range c.Further(m.name).Processes(t) {
		if strings.Contains(p.Command, "h8s1.") {
			t.Errorf("the token is on the command line of %s", p.Command)
		}
	}
	if line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", cmd.Process.Pid)); err != nil || strings.Contains(string(line), good) {
		t.Errorf("the token is on the command line of h8s agent: %q %v", line, err)
	}
	if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Errorf("h8s agent on SIGTERM: %v\n%s", err, out.String())
	}
	c.H8S(t, "token", "revoke", good)
	// Joined is joined: neither token nor server are needed.
	again := m.h8s(ctx, "agent", "--name", m.name, "--node-ip", m.ip, "--ignore-preflight")
	again.Stdout, again.Stderr = &out, &out
	if err := again.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { ended <- again.Wait() }()
	m.running(&out, ended)
	if err := again.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	<-ended
	c.H8S(t, "node", "remove", m.name, "--force")
	allReady(t, c, names...)
}

func newToken(t *testing.T, c *testcluster.Cluster) string {
	t.Helper()
	out, code := c.Exit(t, "", "token", "create", "--name", c.Node, "--ttl", "10m")
	for line := range strings.Lines(out) {
		if strings.HasPrefix(line, "h8s1.") {
			return strings.TrimSpace(line)
		}
	}
	t.Fatalf("h8s token create: exit %d: %s", code, out)
	return ""
}
