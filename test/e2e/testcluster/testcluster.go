package testcluster

import (
	"bytes"
	"cmp"
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hypernetes/hypernetes/test/artifacts"
)

// PublishedPort is a port of the node that is published on the host's loopback
// under the same number, for tests of hostPort.
var PublishedPort = cmp.Or(os.Getenv("H8S_E2E_PUBLISH"), "18001")

// upTimeout is for a first start under load: unpacking images, starting etcd.
const upTimeout = 10 * time.Minute

// Cluster is a running single-node cluster.
type Cluster struct {
	// Out is the directory of built programs, Node the node's name.
	Out, Node string
	port      string
}

// starting runs `h8s up` once per test process.
var starting = sync.OnceValues(start)

// Main runs a package's tests with more of them in parallel than this machine has
// CPUs: they spend their time waiting for VMs that boot, not computing. It does not
// return. What is in after is called when all tests are over.
func Main(m *testing.M, after ...func()) {
	flag.Parse()
	if f := flag.Lookup("test.parallel"); f.Value.String() == fmt.Sprint(runtime.GOMAXPROCS(0)) {
		_ = f.Value.Set("5")
	}
	code := m.Run()
	for _, f := range after {
		f()
	}
	os.Exit(code)
}

// Up returns the cluster, starting it first if it is not running. It skips or fails
// the test if it cannot run here.
func Up(t testing.TB) *Cluster {
	t.Helper()
	c := configured()
	if reason := c.missing(); reason != "" {
		if os.Getenv("CI") != "" || os.Getenv("H8S_E2E") == "required" {
			t.Fatalf("end-to-end tests are required but %s", reason)
		}
		t.Skipf("end-to-end tests need a cluster, but %s", reason)
	}
	if _, err := starting(); err != nil {
		t.Fatal(err)
	}
	return c
}

// Anew is Up for a package whose cluster needs flags of its own: the node is removed first,
// and the package removes it with Reset when its tests are over.
func Anew(t testing.TB, flags ...string) *Cluster {
	t.Helper()
	c := configured()
	if reason := c.missing(); reason != "" {
		if os.Getenv("CI") != "" || os.Getenv("H8S_E2E") == "required" {
			t.Fatalf("end-to-end tests are required but %s", reason)
		}
		t.Skipf("end-to-end tests need a cluster, but %s", reason)
	}
	if !Keep() {
		if out, err := c.Reset(); err != nil {
			t.Fatalf("reset %s: %v\n%s", c.Node, err, out)
		}
	}
	if _, err := c.start(flags...); err != nil {
		t.Fatal(err)
	}
	return c
}

// Keep says that clusters made by Anew are to stay, for who works on their tests:
// $H8S_E2E_KEEP is set.
func Keep() bool { return os.Getenv("H8S_E2E_KEEP") != "" }

// Reset removes the node.
func (c *Cluster) Reset() (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), upTimeout)
	defer cancel()
	out, err := c.command(ctx, "reset", "--name", c.Node, "--yes").CombinedOutput()
	return string(out), err
}

func configured() *Cluster {
	c := &Cluster{Out: artifacts.Dir(), Node: "e2e", port: "16443"}
	if v := os.Getenv("H8S_E2E_NODE"); v != "" {
		c.Node = v
	}
	if v := os.Getenv("H8S_E2E_PORT"); v != "" {
		c.port = v
	}
	return c
}

func (c *Cluster) missing() string {
	if os.Getuid() != 0 {
		return "this process is not root"
	}
	for _, file := range []string{"bin/h8s", "bin/kubernetes", "bin/containerd-shim-hyper-v2", "share/vmlinux", "share/initramfs.img"} {
		if _, err := os.Stat(filepath.Join(c.Out, file)); err != nil {
			return fmt.Sprintf("%s is missing (run `make build`)", filepath.Join(c.Out, file))
		}
	}
	return ""
}

func start() (*Cluster, error) { return configured().start() }

func (c *Cluster) start(flags ...string) (*Cluster, error) {
	ctx, cancel := context.WithTimeout(context.Background(), upTimeout)
	defer cancel()
	cmd := c.command(ctx, "up", "--name", c.Node, "--api-port", c.port, "--publish", PublishedPort)
	cmd.Args = append(cmd.Args, flags...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	began := time.Now()
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("h8s up --name %s: %w\n%s", c.Node, err, out.String())
	}
	fmt.Printf("cluster %s is up after %.1f s\n", c.Node, time.Since(began).Seconds())
	// The node is Ready before its DNS Pod is; tests that count Pods' traces need quiet.
	_, err := c.try(ctx, "-n", "kube-system", "rollout", "status", "deployment/coredns", "--timeout="+Patience.String())
	return c, err
}

// H8S runs an h8s command against this node and returns what it printed; name and
// flags come before the node is added.
func (c *Cluster) H8S(t testing.TB, args ...string) string {
	t.Helper()
	out, err := c.TryH8S(args...)
	if err != nil {
		t.Fatalf("h8s %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// TryH8S is H8S for commands that may fail and for the end of a test.
func (c *Cluster) TryH8S(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute) // h8s gives up before
	defer cancel()
	out, err := c.command(ctx, append(args, "--name", c.Node)...).CombinedOutput()
	return string(out), err
}

func (c *Cluster) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(c.Out, "bin", "h8s"), args...)
	cmd.Env = append(os.Environ(), "H8S_OUT="+c.Out)
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// kubectl is the command line `h8s kubectl ARGS` for this node.
func (c *Cluster) kubectl(ctx context.Context, args ...string) *exec.Cmd {
	return c.command(ctx, append([]string{"kubectl", "--name", c.Node}, args...)...)
}

// Kubectl runs kubectl outside any Namespace of a test.
func (c *Cluster) Kubectl(t testing.TB, args ...string) string {
	t.Helper()
	out, err := c.try(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// try runs kubectl and returns its stdout; the error holds the command and stderr.
func (c *Cluster) try(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	var stdout, stderr bytes.Buffer
	cmd := c.kubectl(ctx, args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}
