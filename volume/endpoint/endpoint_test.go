package endpoint

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

func TestParse(t *testing.T) {
	for _, s := range []string{"unix:///run/csi.sock", "/run/csi.sock"} {
		if p, err := Parse(s); err != nil || p != "/run/csi.sock" {
			t.Errorf("%s: %s, %v", s, p, err)
		}
	}
	for _, s := range []string{"", "unix://", "tcp://1.2.3.4:1", "unix://csi.sock", "/run/../csi.sock", "/" + strings.Repeat("a", 110)} {
		if _, err := Parse(s); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", s, err)
		}
	}
}

// ask is what the kubelet does with a socket that it finds.
func ask(t *testing.T, path string) (*registration.PluginInfo, error) {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	c := registration.NewRegistrationClient(conn)
	info, err := c.GetInfo(ctx, &registration.InfoRequest{})
	if err != nil {
		return nil, err
	}
	_, err = c.NotifyRegistrationStatus(ctx, &registration.RegistrationStatus{PluginRegistered: true})
	return info, err
}

// TestServe goes through what a kubelet and an operator do to a plugin's socket.
func TestServe(t *testing.T) {
	dir, err := os.MkdirTemp("", "reg")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := filepath.Join(dir, "registry", "d-reg.sock")
	run := func() (stop func(), changes chan bool) {
		ctx, cancel := context.WithCancel(t.Context())
		changes = make(chan bool, 16)
		r := NewRegistration("d.example", "/run/csi.sock", func(ok bool) { changes <- ok })
		ready, done := make(chan struct{}), make(chan error, 1)
		go func() { done <- Serve(ctx, r.Server(), path, func() { close(ready) }) }()
		select {
		case <-ready:
		case err := <-done:
			t.Fatal(err)
		}
		return func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		}, changes
	}
	stop, changes := run()
	info, err := ask(t, path)
	if err != nil || info.GetName() != "d.example" || info.GetType() != registration.CSIPlugin || info.GetEndpoint() != "/run/csi.sock" {
		t.Fatalf("%v, %v", info, err)
	}
	if !<-changes {
		t.Error("not registered")
	}
	if mode, err := os.Stat(path); err != nil || mode.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", mode.Mode(), err)
	}
	// The kubelet's directory is made anew.
	if err := os.RemoveAll(filepath.Dir(path)); err != nil {
		t.Fatal(err)
	}
	wait(t, "the socket comes back", func() bool { _, err := os.Stat(path); return err == nil })
	if _, err := ask(t, path); err != nil {
		t.Error(err)
	}
	stop()
	// What a stopped or killed one left is replaced, never removed: the kubelet sees no gap.
	if _, err := os.Stat(path); err != nil {
		t.Error(err)
	}
	stop, _ = run()
	if _, err := ask(t, path); err != nil {
		t.Error(err)
	}
	// Two at a time, as in an update: the last one has the socket.
	stop2, changes2 := run()
	if _, err := ask(t, path); err != nil || !<-changes2 {
		t.Error(err)
	}
	stop()
	stop2()

	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Serve(t.Context(), grpc.NewServer(), file, func() {}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a file at the path: %v", err)
	}
}

func wait(t *testing.T, what string, is func() bool) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for !is() {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain: %s", what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
