package local

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/test/controlplane"
	"github.com/hypernetes/hypernetes/volume/backend"
	"github.com/hypernetes/hypernetes/volume/backend/backendtest"
	"github.com/hypernetes/hypernetes/volume/driver/drivertest"
	"github.com/hypernetes/hypernetes/volume/record"
)

const driverName = "block.hypernetes.io"

type cluster struct {
	rest   *rest.Config
	client client.Client
	keeper *Keeper
	// limits are told of limits on any node.
	limits atomic.Pointer[backend.Limits]
}

func start(t *testing.T) *cluster {
	t.Helper()
	cfg := controlplane.Start(t)
	c, err := client.New(cfg, client.Options{Scheme: controlplane.Scheme()})
	if err != nil {
		t.Fatal(err)
	}
	return &cluster{rest: cfg, client: c, keeper: NewKeeper(c)}
}

// node adds one, with its plugin, to the cluster, until stop is called or the test ends.
func (c *cluster) node(t *testing.T, name, dir string) (n *Node, records record.Store, stop func()) {
	t.Helper()
	err := c.client.Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}})
	if client.IgnoreAlreadyExists(err) != nil {
		t.Fatal(err)
	}
	records = record.Store{Root: filepath.Join(dir, "records")}
	n, err = NewNode(NodeOptions{Name: name, Driver: driverName, Dir: filepath.Join(dir, "local"), Records: records, REST: c.rest, Client: c.client})
	if err != nil {
		t.Fatal(err)
	}
	n.Tell(func(ctx context.Context, volume string, t *record.Throttle) error {
		if l := c.limits.Load(); l != nil {
			return (*l)(ctx, volume, t)
		}
		return nil
	})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- n.Run(ctx) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(stop)
	c.await(t, "the store of "+name, func() bool {
		s := &v1alpha1.LocalStore{}
		return c.client.Get(t.Context(), client.ObjectKey{Name: name}, s) == nil && s.Status.AvailableBytes > 0
	})
	return n, records, stop
}

func (c *cluster) await(t *testing.T, what string, is func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !is() {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within a minute", what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// The suite that every keeper passes, on a real API server and real files.
func TestConformance(t *testing.T) {
	c := start(t)
	n, _, _ := c.node(t, "n1", t.TempDir())
	content := func(ctx context.Context, id string, flag int, f func(*os.File) error) error {
		got, err := n.Connect(ctx, id)
		if err != nil {
			return err
		}
		file, err := os.OpenFile(got.Source.File.Path, flag, 0)
		if err != nil {
			return err
		}
		return errors.Join(f(file), file.Close())
	}
	backendtest.Run(t, backendtest.Subject{
		Volumes: both{c.keeper, n}, Bytes: 64 << 20, Mutable: map[string]string{"readIOPS": "100", "bytesPerSecond": "10Mi"},
		Write: func(ctx context.Context, id string, b []byte) error {
			return content(ctx, id, os.O_RDWR, func(f *os.File) error { _, err := f.WriteAt(b, 1<<20); return err })
		},
		Check: func(ctx context.Context, id string, b []byte) error {
			return content(ctx, id, os.O_RDONLY, func(f *os.File) error {
				got := make([]byte, len(b))
				if _, err := f.ReadAt(got, 1<<20); err != nil {
					return err
				}
				if string(got) != string(b) {
					return fmt.Errorf("has %.40q, not %.40q", got, b)
				}
				return nil
			})
		},
	})
	ids, err := n.store.IDs()
	if snapshots, _ := n.store.ids(snapshotsDir); err != nil || len(ids)+len(snapshots) > 0 {
		t.Errorf("files are left: %v %v (%v)", ids, snapshots, err)
	}
}

// both is a keeper with the node's side.
type both struct {
	*Keeper
	*Node
}

func TestNodes(t *testing.T) {
	outer := t
	c := start(t)
	dirs := []string{t.TempDir(), t.TempDir()}
	n1, records, stop1 := c.node(t, "n1", dirs[0])
	_, _, _ = c.node(t, "n2", dirs[1])
	ctx := t.Context()
	at := func(nodes ...string) (out []map[string]string) {
		for _, n := range nodes {
			out = append(out, map[string]string{TopologyKey: n})
		}
		return out
	}
	create := func(t *testing.T, r backend.Create) backend.Volume {
		t.Helper()
		v, err := c.keeper.Create(ctx, r)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}

	t.Run("Placement", func(t *testing.T) {
		for name, nodes := range map[string][]string{"on-1": {"n1", "n2"}, "on-2": {"n2", "n1"}, "on-2-only": {"n9", "n2"}} {
			v := create(t, backend.Create{Name: name, MinBytes: 1 << 20, Topologies: at(nodes...)})
			if got, want := v.Topology[TopologyKey], "n"+strings.Split(name, "-")[1]; got != want {
				t.Errorf("%s: on %s, want %s", name, got, want)
			}
		}
		// What is on one node is not made of what is on another.
		v := create(t, backend.Create{Name: "src", MinBytes: 1 << 20, Topologies: at("n2")})
		_, err := c.keeper.Create(ctx, backend.Create{Name: "elsewhere", Parent: v.ID, MinBytes: 1 << 20, Topologies: at("n1")})
		if !errdefs.IsResourceExhausted(err) {
			t.Errorf("clone on another node: %v", err)
		}
		_, err = c.keeper.Create(ctx, backend.Create{Name: "src", MinBytes: 1 << 20, Topologies: at("n1")})
		if !errdefs.IsAlreadyExists(err) {
			t.Errorf("the same on another node: %v", err)
		}
	})

	t.Run("Room", func(t *testing.T) {
		room, err := n1.store.Room()
		if err != nil {
			t.Fatal(err)
		}
		_, err = c.keeper.Create(ctx, backend.Create{Name: "huge", MinBytes: room.AvailableBytes * 3, Topologies: at("n1", "n2")})
		if !errdefs.IsResourceExhausted(err) || !strings.Contains(fmt.Sprint(err), "left") {
			t.Errorf("more than there is: %v", err)
		}
		// What the store's object said may be old; the node decides.
		stale := &v1alpha1.LocalVolume{
			ObjectMeta: metav1.ObjectMeta{Name: "stale", Finalizers: []string{v1alpha1.FinalizerLocal}},
			Spec:       v1alpha1.LocalVolumeSpec{Name: "stale", Node: "n1", SizeBytes: room.AvailableBytes * 3},
		}
		if err := c.client.Create(ctx, stale); err != nil {
			t.Fatal(err)
		}
		_, err = c.keeper.Create(ctx, backend.Create{Name: "stale", MinBytes: room.AvailableBytes * 3})
		if !errdefs.IsResourceExhausted(err) || !strings.Contains(fmt.Sprint(err), "n1") {
			t.Errorf("more than there is, on the node: %v", err)
		}
		v := create(t, backend.Create{Name: "grows", MinBytes: 1 << 20, Topologies: at("n1")})
		if _, err := c.keeper.Expand(ctx, v.ID, room.AvailableBytes*3); !errdefs.IsResourceExhausted(err) {
			t.Errorf("grown to more than there is: %v", err)
		}
		if got, err := c.keeper.Get(ctx, v.ID); err != nil || got.SizeBytes != 1<<20 {
			t.Errorf("after that: %+v, %v", got, err)
		}
	})

	t.Run("Inline", func(t *testing.T) {
		before, err := n1.store.Room()
		if err != nil {
			t.Fatal(err)
		}
		v := backend.Inline{ID: "csi-" + strings.Repeat("a", 64), Owner: dirs[0] + "/pods/1"}
		for range 2 {
			con, err := n1.CreateInline(ctx, v, 1<<30)
			if err != nil || con.SizeBytes != 1<<30 || con.Format != record.FormatBlank {
				t.Fatalf("inline: %+v, %v", con, err)
			}
		}
		after, err := n1.store.Room()
		if err != nil || after.AvailableBytes > before.AvailableBytes-(1<<30)+(16<<20) || after.Volumes != before.Volumes+1 {
			t.Errorf("room before %+v, after %+v, %v", before, after, err)
		}
		if all, err := n1.ListInline(); err != nil || len(all) != 1 || all[0] != v {
			t.Errorf("list: %v, %v", all, err)
		}
		if _, err := n1.Connect(ctx, v.ID); !errdefs.IsNotFound(err) {
			t.Errorf("connected as a claim's: %v", err)
		}
		more := func(letter string, bytes int64) error {
			_, err := n1.CreateInline(ctx, backend.Inline{ID: "csi-" + strings.Repeat(letter, 64)}, bytes)
			return err
		}
		if err := more("b", 17<<30); !errdefs.IsOutOfRange(err) || !strings.Contains(err.Error(), "16Gi on node n1") {
			t.Errorf("larger than the operator allows: %v", err)
		}
		s := &v1alpha1.LocalStore{}
		if err := c.client.Get(ctx, client.ObjectKey{Name: "n1"}, s); err != nil {
			t.Fatal(err)
		}
		base := s.DeepCopy()
		s.Spec.InlineMax = new(resource.MustParse("900Ti"))
		if err := c.client.Patch(ctx, s, client.MergeFrom(base)); err != nil {
			t.Fatal(err)
		}
		if err := more("b", 3*before.AvailableBytes); !errdefs.IsResourceExhausted(err) {
			t.Errorf("more than there is: %v", err)
		}
		for range 2 {
			if err := n1.DeleteInline(ctx, v.ID); err != nil {
				t.Error(err)
			}
		}
		if all, err := n1.ListInline(); err != nil || len(all) > 0 {
			t.Errorf("list: %v, %v", all, err)
		}
	})

	t.Run("Limits", func(t *testing.T) {
		v := create(t, backend.Create{Name: "limited", MinBytes: 1 << 20, Topologies: at("n1"), Parameters: map[string]string{"iops": "500"}})
		is := func(what string, want *record.Throttle) {
			t.Helper()
			con, err := n1.Connect(ctx, v.ID)
			if err != nil || !reflect.DeepEqual(con.Throttle, want) {
				t.Errorf("%s: %+v, %v; want %+v", what, con.Throttle, err, want)
			}
		}
		is("by its class", &record.Throttle{IOPS: 500})
		var told []*record.Throttle
		busy := 1
		var mu sync.Mutex
		c.limits.Store(new(backend.Limits(func(_ context.Context, id string, limits *record.Throttle) error {
			mu.Lock()
			defer mu.Unlock()
			if id != v.ID {
				return nil
			}
			if busy--; busy >= 0 {
				return errdefs.ErrAborted
			}
			told = append(told, limits)
			return nil
		})))
		defer c.limits.Store(nil)
		if err := c.keeper.Modify(ctx, v.ID, map[string]string{"writeBytesPerSecond": "1Mi"}); err != nil {
			t.Fatal(err)
		}
		is("modified", &record.Throttle{WriteBPS: 1 << 20})
		mu.Lock()
		if len(told) == 0 || !reflect.DeepEqual(told[len(told)-1], &record.Throttle{WriteBPS: 1 << 20}) {
			t.Errorf("told %+v", told)
		}
		mu.Unlock()
		if err := c.keeper.Modify(ctx, v.ID, nil); err != nil {
			t.Fatal(err)
		}
		is("without limits", nil)
		v = create(t, backend.Create{Name: "classed", MinBytes: 1 << 20, Topologies: at("n1"), Parameters: map[string]string{"iops": "500"}, Mutable: map[string]string{"readIOPS": "20"}})
		is("by its VolumeAttributesClass", &record.Throttle{ReadIOPS: 20})
		for says, bad := range map[string]map[string]string{
			`"type"`: {"type": "fast"}, `iops "0"`: {"iops": "0"}, `iops "1"`: {"iops": "1"}, `iops "-5"`: {"iops": "-5"}, `"many"`: {"iops": "many"},
			`"1e15"`: {"iops": "1e15"}, `"10"`: {"bytesPerSecond": "10"}, "leave it out, or readIOPS": {"iops": "100", "readIOPS": "100"},
			"or readBytesPerSecond": {"bytesPerSecond": "1Mi", "writeBytesPerSecond": "1Mi"},
		} {
			if _, err := c.keeper.Create(ctx, backend.Create{Name: "bad", MinBytes: 1 << 20, Parameters: bad}); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), says) {
				t.Errorf("parameters %v: %v", bad, err)
			}
			if err := c.keeper.Modify(ctx, v.ID, bad); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), says) {
				t.Errorf("modified by %v: %v", bad, err)
			}
		}
		is("after that", &record.Throttle{ReadIOPS: 20})
	})

	t.Run("InUse", func(t *testing.T) {
		v := create(t, backend.Create{Name: "used", MinBytes: 1 << 20, Topologies: at("n1")})
		con, err := n1.Connect(ctx, v.ID)
		if err != nil || con.Format != record.FormatBlank {
			t.Fatalf("connect: %+v, %v", con, err)
		}
		staged := record.Staged{Driver: driverName, Volume: v.ID, Serial: record.Serial(driverName, v.ID), SizeBytes: con.SizeBytes, Format: con.Format, Source: con.Source}
		if err := records.Stage(staged, nil); err != nil {
			t.Fatal(err)
		}
		lease, err := records.Lease(staged.Key(), true)
		if err != nil {
			t.Fatal(err)
		}
		_, err = c.keeper.CreateSnapshot(ctx, "of-used", v.ID, nil)
		if n1.store.Reflink() {
			if err != nil {
				t.Errorf("snapshot of what is in use, with reflinks: %v", err)
			}
		} else if !errdefs.IsFailedPrecondition(err) || !strings.Contains(fmt.Sprint(err), "stop its Pod") {
			t.Errorf("snapshot of what is in use: %v", err)
		}
		if err := c.keeper.Delete(ctx, v.ID); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("delete of what is in use: %v", err)
		}
		if _, err := os.Stat(con.Source.File.Path); err != nil {
			t.Errorf("the file in use is gone: %v", err)
		}
		if err := errors.Join(lease.Close(), records.Unstage(staged.Key())); err != nil {
			t.Fatal(err)
		}
		c.await(t, "removal", func() bool { _, err := c.keeper.Get(ctx, v.ID); return errdefs.IsNotFound(err) })
		if _, err := os.Stat(filepath.Dir(con.Source.File.Path)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the file is left: %v", err)
		}
	})

	t.Run("Restart", func(t *testing.T) {
		v := create(t, backend.Create{Name: "stays", MinBytes: 1 << 20, Topologies: at("n1")})
		gone := create(t, backend.Create{Name: "vanishes", MinBytes: 1 << 20, Topologies: at("n1")})
		stop1()
		half := filepath.Join(dirs[0], "local", volumesDir, tmpPrefix+"half")
		if err := os.Mkdir(half, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.RemoveAll(filepath.Join(dirs[0], "local", volumesDir, gone.ID)); err != nil {
			t.Fatal(err)
		}
		short, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
		defer cancel()
		if err := c.keeper.Delete(short, v.ID); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "n1") {
			t.Errorf("delete on a node that is down: %v", err)
		}
		n1, _, stop1 = c.node(outer, "n1", dirs[0])
		c.await(t, "removal", func() bool { _, err := c.keeper.Get(ctx, v.ID); return errdefs.IsNotFound(err) })
		if _, err := os.Stat(half); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("half made file is left: %v", err)
		}
		// Data that is lost is told, and not replaced by nothing.
		c.await(t, "loss", func() bool { got, err := c.keeper.Get(ctx, gone.ID); return err == nil && got.Degraded != "" })
		if _, err := n1.Connect(ctx, gone.ID); !errdefs.IsNotFound(err) {
			t.Errorf("connect of what is lost: %v", err)
		}
	})

	t.Run("NodeIsGone", func(t *testing.T) {
		v := create(t, backend.Create{Name: "orphan", MinBytes: 1 << 20, Topologies: at("n1")})
		stop1()
		if err := c.client.Delete(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}}); err != nil {
			t.Fatal(err)
		}
		if err := c.keeper.Delete(ctx, v.ID); err != nil {
			t.Error(err)
		}
	})
}

// TestSanity runs csi-sanity over local volumes.
func TestSanity(t *testing.T) {
	drivertest.NeedRoot(t)
	c := start(t)
	dir := t.TempDir()
	n, _, _ := c.node(t, "node-1", dir)
	drivertest.Sanity(t, drivertest.Subject{
		Name: "local", Driver: driverName, Volumes: both{c.keeper, n}, Topology: map[string]string{TopologyKey: "node-1"},
		Parameters: map[string]string{"iops": "1000"}, Mutable: map[string]string{"writeIOPS": "100"},
	})
}
