package command

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/hypernetes/hypernetes/volume/backend/backendtest"
	"github.com/hypernetes/hypernetes/volume/driver"
)

// fakes are a driver of each kind.
func fakes(t *testing.T) []*Backend {
	near, attached := backendtest.Near{Keeper: &backendtest.Keeper{Dir: t.TempDir()}}, backendtest.Attached{Keeper: &backendtest.Keeper{}}
	return []*Backend{
		{
			Driver: "near.test",
			Controller: func(context.Context, ControllerEnv) (ControllerParts, error) {
				return ControllerParts{Volumes: near, TopologyKeys: []string{"near.test/node"}}, nil
			},
			Node: func(_ context.Context, e NodeEnv) (NodeParts, error) {
				return NodeParts{Files: near, Topology: map[string]string{"near.test/node": e.Node}, Run: func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }}, nil
			},
		},
		{
			Driver: "far.test",
			Controller: func(context.Context, ControllerEnv) (ControllerParts, error) {
				return ControllerParts{Volumes: attached, MultiNode: true, PublishedNodes: true}, nil
			},
			Node: func(context.Context, NodeEnv) (NodeParts, error) { return NodeParts{Tenants: true}, nil },
		},
	}
}

// dir is short enough for sockets.
func dir(t *testing.T) string {
	t.Helper()
	d, err := os.MkdirTemp("", "h8s-csi")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = unix.Unmount(filepath.Join(d, "run", "secrets"), unix.MNT_DETACH) // a node's, if /tmp is on a disk
		_ = os.RemoveAll(d)
	})
	kubeconfig := `{"apiVersion":"v1","kind":"Config","current-context":"c","clusters":[{"name":"c","cluster":{"server":"http://127.0.0.1:1"}}],"contexts":[{"name":"c","context":{"cluster":"c","user":"u"}}],"users":[{"name":"u","user":{}}]}`
	if err := os.WriteFile(filepath.Join(d, "kubeconfig"), []byte(kubeconfig), 0o600); err != nil {
		t.Fatal(err)
	}
	return d
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// start runs the command; stop ends it and returns its error.
func start(t *testing.T, backends []*Backend, args ...string) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	root := newRoot("test", backends)
	root.SetArgs(args)
	root.SetOut(io.Discard)
	done := make(chan error, 1)
	go func() { done <- root.ExecuteContext(ctx) }()
	ended := false
	stop = func() error {
		if ended {
			return nil
		}
		ended = true
		cancel()
		return <-done
	}
	t.Cleanup(func() { _ = stop() })
	return stop
}

func eventually(t *testing.T, what string, is func() error) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		err := is()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func get(url string) (int, string, error) {
	r, err := http.Get(url)
	if err != nil {
		return 0, "", err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	return r.StatusCode, string(b), err
}

// kubelet does what a kubelet does at its start: it looks for sockets and asks.
func kubelet(t *testing.T, root, driverName string) (nodeID string, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	dial := func(path string) *grpc.ClientConn {
		conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		return conn
	}
	conn := dial(filepath.Join(root, "plugins_registry", driverName+"-reg.sock"))
	defer conn.Close()
	r := registration.NewRegistrationClient(conn)
	info, err := r.GetInfo(ctx, &registration.InfoRequest{})
	if err != nil {
		return "", err
	}
	if info.GetName() != driverName || info.GetEndpoint() != filepath.Join(root, "plugins", driverName, "csi.sock") {
		return "", fmt.Errorf("info %v", info)
	}
	plugin := dial(info.GetEndpoint())
	defer plugin.Close()
	n, err := csi.NewNodeClient(plugin).NodeGetInfo(ctx, &csi.NodeGetInfoRequest{})
	if err != nil {
		return "", err
	}
	_, err = r.NotifyRegistrationStatus(ctx, &registration.RegistrationStatus{PluginRegistered: true})
	return n.GetNodeId(), err
}

func TestNode(t *testing.T) {
	d := dir(t)
	health := freeAddress(t)
	args := []string{"node", "--node=node-1", "--kubeconfig=" + d + "/kubeconfig", "--kubelet-root=" + d + "/kubelet", "--state-dir=" + d + "/state", "--run-dir=" + d + "/run", "--health-address=" + health, "--max-volumes=7"}
	backends := fakes(t)
	stop := start(t, backends, args...)
	root := d + "/kubelet"
	eventually(t, "healthy", func() error { _, _, err := get("http://" + health + "/healthz"); return err })
	if code, text, err := get("http://" + health + "/readyz"); err != nil || code != http.StatusServiceUnavailable || !strings.Contains(text, "near.test: the kubelet did not ask yet") {
		t.Errorf("not registered, but readyz says %d %s %v", code, text, err)
	}
	var first string
	eventually(t, "registration", func() (err error) {
		if _, err = kubelet(t, root, "near.test"); err != nil {
			return err
		}
		first, err = kubelet(t, root, "far.test")
		return err
	})
	if node, _, err := driver.ParseNodeID(first); err != nil || node != "node-1" {
		t.Errorf("node ID %q: %v", first, err)
	}
	if code, text, err := get("http://" + health + "/readyz"); err != nil || code != http.StatusOK {
		t.Errorf("registered, but readyz says %d %s %v", code, text, err)
	}
	if _, text, _ := get("http://" + health + "/metrics"); !strings.Contains(text, `h8s_csi_registered{driver="far.test"} 1`) || !strings.Contains(text, `h8s_csi_call_seconds_count{code="OK",driver="far.test",method="NodeGetInfo"}`) {
		t.Errorf("metrics lack registrations or calls:\n%s", text)
	}
	// The kubelet restarts: it finds the sockets again, even in a directory made anew.
	if _, err := kubelet(t, root, "near.test"); err != nil {
		t.Error(err)
	}
	if err := os.RemoveAll(root); err != nil {
		t.Fatal(err)
	}
	eventually(t, "registration with a new directory", func() error { _, err := kubelet(t, root, "near.test"); return err })

	// A second one does not get in the way.
	second := start(t, backends, append(args, "--health-address=")...)
	eventually(t, "the second ends", func() error {
		if err := second(); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "another h8s-csi node") {
			t.Errorf("second: %v", err)
		}
		return nil
	})
	if err := stop(); err != nil {
		t.Errorf("stop: %v", err)
	}
	// It restarts: the kubelet sees no gap, and the node keeps its key.
	if _, err := os.Lstat(filepath.Join(root, "plugins_registry", "near.test-reg.sock")); err != nil {
		t.Error(err)
	}
	stop = start(t, backends, args...)
	eventually(t, "registration after a restart", func() error {
		id, err := kubelet(t, root, "far.test")
		if err == nil && id != first {
			t.Errorf("node ID %q became %q", first, id)
		}
		return err
	})
	if err := stop(); err != nil {
		t.Errorf("stop: %v", err)
	}
}

func TestController(t *testing.T) {
	for _, b := range fakes(t) {
		d := dir(t)
		health := freeAddress(t)
		stop := start(t, fakes(t), "controller", "--driver="+b.Driver, "--endpoint=unix://"+d+"/csi.sock", "--kubeconfig="+d+"/kubeconfig", "--leader-elect=false", "--health-address="+health)
		eventually(t, "ready", func() error {
			code, text, err := get("http://" + health + "/readyz")
			if err == nil && code != http.StatusOK {
				err = fmt.Errorf("%d %s", code, text)
			}
			return err
		})
		conn, err := grpc.NewClient("unix://"+d+"/csi.sock", grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		info, err := csi.NewIdentityClient(conn).GetPluginInfo(t.Context(), &csi.GetPluginInfoRequest{})
		if err != nil || info.GetName() != b.Driver || info.GetVendorVersion() != "test" {
			t.Errorf("%v, %v", info, err)
		}
		caps, err := csi.NewControllerClient(conn).ControllerGetCapabilities(t.Context(), &csi.ControllerGetCapabilitiesRequest{})
		attaches := strings.Contains(caps.String(), "PUBLISH_UNPUBLISH_VOLUME") && strings.Contains(caps.String(), "LIST_VOLUMES_PUBLISHED_NODES")
		if err != nil || attaches != (b.Driver == "far.test") {
			t.Errorf("%s: %v, %v", b.Driver, caps, err)
		}
		_ = conn.Close()
		if err := stop(); err != nil {
			t.Errorf("stop: %v", err)
		}
	}
}

func TestBadFlags(t *testing.T) {
	d := dir(t)
	if err := os.Symlink(d, d+"/link"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(d+"/broken", []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	node := []string{"node", "--node=n", "--kubeconfig=" + d + "/kubeconfig", "--kubelet-root=" + d, "--state-dir=" + d + "/s", "--run-dir=" + d + "/r", "--health-address="}
	controller := []string{"controller", "--driver=near.test", "--endpoint=" + d + "/s", "--kubeconfig=" + d + "/kubeconfig", "--health-address="}
	for _, c := range []struct {
		args  []string
		words []string
	}{
		{[]string{"nodes"}, []string{`"nodes"`, "--help"}},
		{[]string{"node", "x"}, []string{`"x"`, "--help"}},
		{[]string{"node"}, []string{`--node ""`, "name this node"}},
		{append(node, "--node=Node_1"), []string{`--node "Node_1"`}},
		{append(node, "--node="+strings.Repeat("n", 149)), []string{"--node", "148"}},
		{append(node, "--kubeconfig="), []string{"--kubeconfig", "name the file"}},
		{append(node, "--kubeconfig="+d+"/none"), []string{"--kubeconfig", "none", "no such file"}},
		{append(node, "--kubeconfig="+d+"/broken"), []string{"--kubeconfig", "broken"}},
		{append(node, "--kubelet-root=kubelet"), []string{"--kubelet-root", "absolute"}},
		{append(node, "--kubelet-root="+d+"/link"), []string{"--kubelet-root", "symbolic link", "--root-dir"}},
		{append(node, "--state-dir=/a/../b"), []string{"--state-dir", "/a/../b"}},
		{append(node, "--run-dir=/"), []string{"--run-dir"}},
		{append(node, "--drivers=bogus"), []string{"--drivers", "bogus", "near.test, far.test"}},
		{append(node, "--drivers="), []string{"--drivers"}},
		{append(node, "--max-volumes=-1"), []string{"--max-volumes", "-1"}},
		{append(node, "--max-volumes=many"), []string{"--max-volumes", "many"}},
		{append(node, "--collect-interval=1ms"), []string{"--collect-interval", "1s"}},
		{append(controller, "--driver="), []string{"--driver", "near.test, far.test"}},
		{append(controller, "--endpoint=tcp://127.0.0.1:1"), []string{"--endpoint", "tcp://127.0.0.1:1", "unix://"}},
	} {
		root := newRoot("test", fakes(t))
		var out bytes.Buffer
		root.SetArgs(c.args)
		root.SetOut(&out)
		root.SetErr(&out)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		err := root.ExecuteContext(ctx)
		cancel()
		if !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v: %v", c.args, err)
			continue
		}
		for _, w := range c.words {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%v: %q does not say %q", c.args, err, w)
			}
		}
		if out.Len() > 0 {
			t.Errorf("%v: the error is not all that is said: %s", c.args, out.String())
		}
	}
}

// TestHelp: every flag of every backend of this build is explained once.
func TestHelp(t *testing.T) {
	for _, args := range [][]string{{"--help"}, {"node", "--help"}, {"controller", "--help"}} {
		var out, errs bytes.Buffer
		if code := Main(t.Context(), args, "test", &out, &errs); code != 0 || out.Len() == 0 || errs.Len() > 0 {
			t.Errorf("%v: %d %s %s", args, code, out.String(), errs.String())
		}
	}
	var out, errs bytes.Buffer
	if code := Main(t.Context(), []string{"node"}, "test", &out, &errs); code != 2 || !strings.HasPrefix(errs.String(), "error: --node") {
		t.Errorf("%d %s", code, errs.String())
	}
}
