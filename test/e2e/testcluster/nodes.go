package testcluster

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

// Nodes makes the cluster one of n nodes of this machine, called as its first with "-2",
// "-3" and so on, until the test ends: other packages' tests take stock of one node.
// Names are those of all its nodes, the first first.
func (c *Cluster) Nodes(t testing.TB, n int) (names []string) {
	t.Helper()
	t.Cleanup(func() {
		if out, err := c.Scale(1); err != nil {
			t.Errorf("back to one node: %v\n%s", err, out)
		}
	})
	if out, err := c.Scale(n); err != nil {
		t.Fatalf("h8s dev nodes %d: %v\n%s", n, err, out)
	}
	names = []string{c.Node}
	for k := 2; k <= n; k++ {
		names = append(names, fmt.Sprintf("%s-%d", c.Node, k))
	}
	return names
}

// Scale is h8s dev nodes N.
func (c *Cluster) Scale(n int) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), upTimeout)
	defer cancel()
	out, err := c.command(ctx, "dev", "nodes", fmt.Sprint(n), "--name", c.Node).CombinedOutput()
	return string(out), err
}

// Further is a cluster's node seen as one of its own: its processes, namespaces and
// files. What talks to the API server is the first node's.
func (c *Cluster) Further(name string) *Cluster {
	return &Cluster{Out: c.Out, Node: name, port: c.port}
}

// Own makes a cluster of the test's own beside the shared one, for tests that stop it or
// break it. It is removed when the test ends.
func Own(t testing.TB, name, port string) *Cluster {
	t.Helper()
	c := configured()
	if reason := c.missing(); reason != "" {
		if os.Getenv("CI") != "" || os.Getenv("H8S_E2E") == "required" {
			t.Fatalf("end-to-end tests are required but %s", reason)
		}
		t.Skipf("end-to-end tests need a cluster, but %s", reason)
	}
	c.Node, c.port = name, port
	reset := func() (string, error) {
		ctx, cancel := context.WithTimeout(context.Background(), upTimeout)
		defer cancel()
		out, err := c.command(ctx, "reset", "--name", name, "--yes").CombinedOutput()
		return string(out), err
	}
	if out, err := reset(); err != nil { // what an earlier run left
		t.Fatalf("reset %s: %v\n%s", name, err, out)
	}
	t.Cleanup(func() {
		if t.Failed() {
			for _, component := range []string{"h8s", "kubelet", "kubestack", "h8s-controller"} {
				text, _ := c.TryH8S("logs", component, "--tail", "20")
				t.Logf("log of %s:\n%s", component, text)
			}
		}
		if out, err := reset(); err != nil {
			t.Errorf("reset %s: %v\n%s", name, err, out)
		}
	})
	c.UpAgain(t)
	return c
}

// UpAgain runs h8s up and returns what it printed.
func (c *Cluster) UpAgain(t testing.TB) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), upTimeout)
	defer cancel()
	args := []string{"up", "--name", c.Node}
	if c.port != "" {
		args = append(args, "--api-port", c.port)
	}
	out, err := c.command(ctx, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("h8s up --name %s: %v\n%s", c.Node, err, out)
	}
	return string(out)
}

// Exit runs an h8s command, given in full, with text on its standard input, and returns
// what it printed and its exit code.
func (c *Cluster) Exit(t testing.TB, stdin string, args ...string) (string, int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	cmd := c.command(ctx, args...)
	var out bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &out
	err := cmd.Run()
	if cmd.ProcessState == nil {
		t.Fatalf("h8s %s: %v", strings.Join(args, " "), err)
	}
	return out.String(), cmd.ProcessState.ExitCode()
}

// Change gives the node other settings, as an operator does: its Pods run on.
func (c *Cluster) Change(t testing.TB, flags ...string) {
	t.Helper()
	if out, err := c.TryChange(flags...); err != nil {
		t.Fatalf("change %s to %v: %v\n%s", c.Node, flags, err, out)
	}
}

// TryChange is Change for the end of a test.
func (c *Cluster) TryChange(flags ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), upTimeout)
	defer cancel()
	var all bytes.Buffer
	for _, args := range [][]string{
		{"down", "--name", c.Node, "--keep-pods"},
		append([]string{"up", "--name", c.Node, "--api-port", c.port}, flags...),
	} {
		out, err := c.command(ctx, args...).CombinedOutput()
		all.Write(out)
		if err != nil {
			return all.String(), fmt.Errorf("h8s %s: %w", args[0], err)
		}
	}
	return all.String(), nil
}
