package command

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/hypernetes/hypernetes/volume/backend"
	"github.com/hypernetes/hypernetes/volume/placeholder"
	"github.com/hypernetes/hypernetes/volume/record"
)

// childFlag has the test's binary be the node's plugin.
const childFlag = "H8S_CSI_TEST_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(childFlag) == "" {
		os.Exit(m.Run())
	}
	root := newRoot("test", []*Backend{{Driver: "near.test", Node: func(context.Context, NodeEnv) (NodeParts, error) { return NodeParts{Files: anyFile{}}, nil }}})
	root.SetArgs(os.Args[1:])
	if err := root.Execute(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// anyFile has every volume.
type anyFile struct{}

// Connect implements backend.Files.
func (anyFile) Connect(_ context.Context, volume string) (backend.Connection, error) {
	return backend.Connection{SizeBytes: 1 << 30, Source: record.Source{File: &record.File{Path: "/no/" + volume}}}, nil
}

// TestKilled kills the plugin again and again amid calls, as an out-of-memory killer does,
// while a kubelet's part is played: what it is told to be done is done, and in the end
// nothing is left.
func TestKilled(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("placeholders are mounted by root only")
	}
	d := dir(t)
	store, places := record.Store{Root: d + "/run"}, placeholder.Places{Dir: d + "/run/placeholders"}
	socket := d + "/kubelet/plugins/near.test/csi.sock"
	rounds := 40
	if testing.Short() {
		rounds = 8
	}
	volumes := make([]*killedVolume, 4)
	for i := range volumes {
		volumes[i] = &killedVolume{id: fmt.Sprint("volume-", i), block: i%2 == 1, dir: d + "/kubelet"}
	}
	t.Cleanup(func() { // of a test that failed
		for _, v := range volumes {
			_ = places.Remove(record.Key("near.test", v.id), v.target())
		}
	})
	for round := range rounds + 1 {
		last := round == rounds
		child := exec.Command("/proc/self/exe", "node", "--node=n", "--kubeconfig="+d+"/kubeconfig", "--kubelet-root="+d+"/kubelet",
			"--state-dir="+d+"/state", "--run-dir="+d+"/run", "--health-address=", "--collect-interval=1s")
		child.Env = append(os.Environ(), childFlag+"=1")
		log, err := os.CreateTemp(d, "log")
		if err != nil {
			t.Fatal(err)
		}
		child.Stderr = log
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 10 * time.Millisecond, Multiplier: 1, MaxDelay: 10 * time.Millisecond}}))
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, "the plugin answers", func() error {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			_, err := csi.NewIdentityClient(conn).Probe(ctx, &csi.ProbeRequest{})
			return err
		})
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		var all sync.WaitGroup
		for _, v := range volumes {
			all.Go(func() {
				for ctx.Err() == nil {
					if !v.step(ctx, t, csi.NewNodeClient(conn), last) {
						return
					}
				}
			})
		}
		if !last {
			select {
			case <-time.After(time.Duration(rand.IntN(60)) * time.Millisecond):
			case <-ctx.Done():
			}
			_ = child.Process.Kill()
			cancel()
		}
		all.Wait()
		cancel()
		_ = conn.Close()
		_ = child.Process.Signal(os.Interrupt)
		_ = child.Wait()
		text, _ := os.ReadFile(log.Name())
		if strings.Contains(string(text), "panic") || strings.Contains(string(text), "code=Internal") {
			t.Fatalf("the plugin says:\n%s", text)
		}
		_ = log.Close()
	}
	if keys, err := store.Keys(); err != nil || len(keys) != 0 {
		t.Errorf("records are left: %v, %v", keys, err)
	}
	list, err := places.List()
	if err != nil {
		t.Error(err)
	}
	for _, h := range list {
		if h.Target == "" || strings.HasPrefix(h.Target, d) {
			t.Errorf("placeholder is left: %+v", h)
		}
	}
	if files, _ := os.ReadDir(places.Dir); len(files) != 0 {
		t.Errorf("files of loop devices are left: %v", files)
	}
}

// killedVolume is what the kubelet knows of a volume: the last call that it was told to
// have succeeded.
type killedVolume struct {
	id, dir string
	block   bool
	done    int // calls of a life that succeeded: 0 nothing, 1 staged, 2 published, 3 unpublished
}

func (v *killedVolume) target() string { return filepath.Join(v.dir, "pods", "pod", v.id, "mount") }

// step does the next call of the volume's life; a call that failed is done again. It
// returns false at the end of a life if that is the last.
func (v *killedVolume) step(ctx context.Context, t *testing.T, c csi.NodeClient, last bool) bool {
	vc := &csi.VolumeCapability{
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}},
	}
	if v.block {
		vc.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
	}
	staging := v.dir + "/staging"
	var err error
	switch v.done {
	case 0:
		_, err = c.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: v.id, StagingTargetPath: staging, VolumeCapability: vc})
	case 1:
		_, err = c.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{VolumeId: v.id, StagingTargetPath: staging, TargetPath: v.target(), VolumeCapability: vc,
			VolumeContext: map[string]string{"csi.storage.k8s.io/pod.uid": "pod", "csi.storage.k8s.io/pod.namespace": "default"}})
		if err == nil {
			v.check(t)
		}
	case 2:
		_, err = c.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: v.id, TargetPath: v.target()})
		if err == nil {
			if _, err := os.Lstat(v.target()); err == nil {
				t.Errorf("volume %s was unpublished, and its target is there", v.id)
			}
		}
	case 3:
		_, err = c.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: staging})
	}
	if err == nil {
		v.done = (v.done + 1) % 4
	}
	return !last || v.done != 0
}

// check looks at what a Pod that was told that it has the volume finds.
func (v *killedVolume) check(t *testing.T) {
	key := record.Key("near.test", v.id)
	p, err := record.Store{Root: filepath.Dir(v.dir) + "/run"}.Publication(key, "pod")
	if err != nil {
		t.Errorf("volume %s was published: %v", v.id, err)
		return
	}
	list, err := placeholder.Places{Dir: filepath.Dir(v.dir) + "/run/placeholders"}.List()
	if err != nil {
		t.Error(err)
	}
	for _, h := range list {
		if h.Key == key && h.Target == p.Target && h.Device == p.Device {
			return
		}
	}
	t.Errorf("volume %s was published at %s as device %d, and there is no such placeholder: %+v", v.id, p.Target, p.Device, list)
}
