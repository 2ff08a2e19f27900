package testcluster

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// Patience is how long a test waits for a Pod to become something. VMs boot under
// TCG and share the machine with other tests.
const Patience = 180 * time.Second

// Namespace is a Kubernetes Namespace of one test's own. Its methods fail the test
// on errors and may be used by subtests one at a time.
type Namespace struct {
	*Cluster
	Name string
	t    testing.TB
}

// Namespace makes a Namespace that is deleted, with all Pods, when the test ends.
// Should the test have failed, its state is printed first.
func (c *Cluster) Namespace(t testing.TB) *Namespace {
	t.Helper()
	var raw [3]byte
	_, _ = rand.Read(raw[:])
	name := strings.ToLower(strings.NewReplacer("/", "-", "_", "-").Replace(strings.TrimPrefix(t.Name(), "Test")))
	n := &Namespace{Cluster: c, Name: fmt.Sprintf("%.40s-%s", name, hex.EncodeToString(raw[:])), t: t}
	n.Cluster.Kubectl(t, "create", "namespace", n.Name)
	t.Cleanup(func() {
		// t.Context is already cancelled here.
		ctx, cancel := context.WithTimeout(context.Background(), Patience)
		defer cancel()
		if t.Failed() {
			n.dump(ctx)
		}
		if _, err := c.try(ctx, "delete", "namespace", n.Name, "--ignore-not-found", "--wait", "--timeout="+Patience.String()); err != nil {
			t.Errorf("clean up: %v", err)
		}
	})
	n.awaitDefaultAccount()
	return n
}

// awaitDefaultAccount waits for what the controller manager puts into every new
// Namespace; Pods are refused before.
func (n *Namespace) awaitDefaultAccount() {
	n.t.Helper()
	n.Kubectl("wait", "--for=create", "serviceaccount/default", "--timeout=60s")
	n.Kubectl("wait", "--for=create", "configmap/kube-root-ca.crt", "--timeout=60s")
}

// For returns the same Namespace, reporting to a subtest.
func (n *Namespace) For(t testing.TB) *Namespace {
	return &Namespace{Cluster: n.Cluster, Name: n.Name, t: t}
}

// Kubectl runs kubectl in the Namespace and returns its stdout.
func (n *Namespace) Kubectl(args ...string) string {
	n.t.Helper()
	out, err := n.Try(args...)
	if err != nil {
		n.t.Fatal(err)
	}
	return out
}

// Try runs kubectl in the Namespace; a failure is the caller's to judge.
func (n *Namespace) Try(args ...string) (string, error) {
	return n.try(n.t.Context(), n.in(args)...)
}

func (n *Namespace) in(args []string) []string {
	return append([]string{"-n", n.Name}, args...)
}

// Apply applies a manifest file.
func (n *Namespace) Apply(file string) {
	n.t.Helper()
	n.Kubectl("apply", "-f", file)
}

// Wait waits, by a watch, until a resource meets a condition as `kubectl wait --for`
// knows it ("condition=Ready", "jsonpath={.status.phase}=Failed", "delete").
func (n *Namespace) Wait(resource, condition string) {
	n.t.Helper()
	n.Kubectl("wait", "--for="+condition, resource, "--timeout="+Patience.String())
}

// Ready waits until Pods are ready.
func (n *Namespace) Ready(pods ...string) {
	n.t.Helper()
	for _, pod := range pods {
		n.Wait("pod/"+pod, "condition=Ready")
	}
}

// Get returns a field of a resource by jsonpath without braces, e.g. ".status.podIP".
func (n *Namespace) Get(resource, path string) string {
	n.t.Helper()
	return n.Kubectl("get", resource, "-o", "jsonpath={"+path+"}")
}

// Exec runs a command in a container ("pod" or "pod/container") and returns its
// stdout without the final newline.
func (n *Namespace) Exec(target string, command ...string) string {
	n.t.Helper()
	return strings.TrimRight(n.Kubectl(execArgs(target, command)...), "\n")
}

// ExecCode runs a command in a container and returns its stdout and exit code.
func (n *Namespace) ExecCode(target string, command ...string) (string, int) {
	n.t.Helper()
	out, err := n.Try(execArgs(target, command)...)
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return out, exit.ExitCode()
	}
	if err != nil {
		n.t.Fatal(err)
	}
	return out, 0
}

// Shell runs a shell script in a container.
func (n *Namespace) Shell(target, script string) string {
	n.t.Helper()
	return n.Exec(target, "sh", "-c", script)
}

func execArgs(target string, command []string) []string {
	return append(append([]string{"exec"}, target2flags(target)...), append([]string{"--"}, command...)...)
}

// target2flags turns "pod/container" into kubectl's arguments.
func target2flags(target string) []string {
	pod, container, ok := strings.Cut(target, "/")
	if !ok {
		return []string{pod}
	}
	return []string{pod, "-c", container}
}

// Logs returns a container's log.
func (n *Namespace) Logs(target string, flags ...string) string {
	n.t.Helper()
	return n.Kubectl(append(append([]string{"logs"}, target2flags(target)...), flags...)...)
}

// Until calls probe every half second until it returns true; use it only for what
// cannot be watched, such as a file inside a guest. What says what was waited for.
func (n *Namespace) Until(what string, within time.Duration, probe func() bool) {
	n.t.Helper()
	deadline := time.NewTimer(within)
	defer deadline.Stop()
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for !probe() {
		select {
		case <-tick.C:
		case <-deadline.C:
			n.t.Fatalf("waited %s in vain: %s", within, what)
		}
	}
}
