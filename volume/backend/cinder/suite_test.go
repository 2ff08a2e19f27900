package cinder

import (
	"context"
	"crypto/md5"
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"k8s.io/apimachinery/pkg/util/uuid"

	"github.com/hypernetes/hypernetes/network/openstack"
	"github.com/hypernetes/hypernetes/test/openstack/openstacktest"
	"github.com/hypernetes/hypernetes/volume/backend"
	"github.com/hypernetes/hypernetes/volume/backend/backendtest"
	"github.com/hypernetes/hypernetes/volume/backend/cinder/cindertest"
	"github.com/hypernetes/hypernetes/volume/record"
)

// tenants are projects by namespace.
type tenants map[string]string

// OwnerOf implements Projects.
func (t tenants) OwnerOf(_ context.Context, namespace string) (string, error) {
	if namespace == "poor" {
		return "", fmt.Errorf("tenant poor has no project: %w", errdefs.ErrFailedPrecondition)
	}
	return t[namespace], nil
}

// Owners implements Projects.
func (t tenants) Owners(context.Context) ([]string, error) {
	var all []string
	for _, p := range t {
		all = append(all, p)
	}
	return all, nil
}

// nodes is what a test says of nodes.
type nodes struct {
	use    map[Pair]Use
	wanted map[Pair]bool
}

// Use implements Nodes.
func (n *nodes) Use(_ context.Context, volume, node string) (Use, error) {
	if use, ok := n.use[Pair{volume, node}]; ok {
		return use, nil
	}
	return Released, nil
}

// Address implements Nodes.
func (n *nodes) Address(context.Context, string) (string, error) { return "10.0.0.9", nil }

// Wanted implements Nodes.
func (n *nodes) Wanted(context.Context) (map[Pair]bool, error) { return n.wanted, nil }

// world is a Cinder under test, the real one or the stand-in.
type world struct {
	*Backend
	t     *testing.T
	o     Options
	fake  *cindertest.Server
	nodes *nodes
	// typ is another type of volumes than what is made if nobody says, "" if there is none.
	typ string
}

func fake(t *testing.T, change ...func(*Options)) *world {
	s := cindertest.New(t)
	w := &world{t: t, fake: s, typ: cindertest.Quick}
	w.o = Options{
		Cloud:    openstack.Options{File: s.CloudsYAML(t), Name: "admin"},
		Projects: tenants{"blue": cindertest.Alpha, "red": cindertest.Beta},
		Keys:     map[string]string{"cinder": cindertest.Key},
		Exports:  map[string]string{"10.0.0.3:/srv/cinder": "/mnt/cinder"},
		Poll:     4 * time.Millisecond,
		Settle:   20 * time.Millisecond,
	}
	w.begin(change)
	return w
}

// live is the OpenStack of test/openstack.
func live(t *testing.T, change ...func(*Options)) *world {
	c := openstacktest.Up(t)
	w := &world{t: t}
	projects := tenants{}
	for namespace, cloud := range map[string]string{"blue": "alpha", "red": "beta"} {
		p, err := c.Provider(t.Context(), cloud)
		if err != nil {
			t.Fatal(err)
		}
		if projects[namespace], err = openstacktest.ProjectID(p); err != nil {
			t.Fatal(err)
		}
	}
	w.o = Options{
		Cloud:    openstack.Options{File: c.ConfigFile(), Name: "service", Transport: &http.Transport{DialContext: c.DialContext}},
		Projects: projects,
		Keys:     map[string]string{},
		Exports:  map[string]string{},
	}
	if shares, err := os.ReadFile(c.Dir + "/etc/nfs_shares"); err == nil {
		// Where its driver has it mounted: the MD5 sum of the export.
		share := strings.TrimSpace(string(shares))
		w.o.Exports[share] = fmt.Sprintf("%s/cinder/mnt/%x", c.Dir, md5.Sum([]byte(share)))
	}
	if keyring, err := os.ReadFile(c.Dir + "/ceph/ceph.client.cinder.keyring"); err == nil {
		if w.o.Keys, err = ParseKeyring(keyring); err != nil {
			t.Fatal(err)
		}
		w.o.Fence = &Ceph{
			Conf: c.Dir + "/ceph/ceph.conf", Keyring: c.Dir + "/ceph/ceph.client.cinder.keyring", User: "cinder", Command: inside(c),
		}
	}
	w.begin(change)
	if _, err := w.client(t.Context(), projects["blue"]); errdefs.IsNotFound(err) {
		t.Skipf("this OpenStack has no Cinder (H8S_OS_VOLUME=none): %v", err)
	}
	return w
}

func (w *world) begin(change []func(*Options)) {
	w.nodes = &nodes{use: map[Pair]Use{}, wanted: map[Pair]bool{}}
	w.o.Cluster, w.o.Nodes = string(uuid.NewUUID()), w.nodes
	for _, f := range change {
		f(&w.o)
	}
	w.restart()
}

// restart is what a crash leaves.
func (w *world) restart() {
	b, err := New(w.o)
	if err != nil {
		w.t.Fatal(err)
	}
	w.Backend = b
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// create makes a volume that goes with the test.
func (w *world) create(c backend.Create) backend.Volume {
	w.t.Helper()
	if c.MinBytes == 0 {
		c.MinBytes = gib
	}
	v, err := w.Create(w.t.Context(), c)
	w.must(err)
	w.gone(v.ID)
	return v
}

func (w *world) gone(id string) {
	w.t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		clear(w.nodes.use)
		if err := w.Detach(ctx, id, ""); err != nil {
			w.t.Error(err)
		}
		if err := w.Delete(ctx, id); err != nil {
			w.t.Error(err)
		}
	})
}

func least(o *Options) {
	o.Cloud.Name, o.Cloud.Profile = "least", openstack.Least
}

// TestSuite is what every keeper passes, on the stand-in and, where there is one, on a real
// Cinder.
func TestSuite(t *testing.T) {
	subject := func(w *world) backendtest.Subject {
		s := backendtest.Subject{Volumes: w, Nodes: []string{"node-1", "node-2"}, Prefix: "suite-" + w.o.Cluster[:8], Timeout: 10 * time.Minute}
		if w.typ != "" {
			s.Mutable = map[string]string{paramType: w.typ}
		}
		return s
	}
	t.Run("fake", func(t *testing.T) { backendtest.Run(t, subject(fake(t))) })
	t.Run("iscsi", func(t *testing.T) {
		w := fake(t)
		w.fake.Kind = "iscsi"
		backendtest.Run(t, subject(w))
	})
	t.Run("nfs", func(t *testing.T) {
		w := fake(t)
		w.fake.Kind = "nfs"
		backendtest.Run(t, subject(w))
	})
	t.Run("real", func(t *testing.T) { backendtest.Run(t, subject(live(t))) })
}

// TestTenants: whose volumes are, on the stand-in and on a real Cinder.
func TestTenants(t *testing.T) {
	for name, make := range map[string]func(*testing.T, ...func(*Options)) *world{"fake": fake, "real": live} {
		t.Run(name, func(t *testing.T) {
			w := make(t)
			own, err := w.ownProject(t.Context())
			w.must(err)
			mine := w.create(backend.Create{Name: "t-own", Namespace: "default"})
			blue := w.create(backend.Create{Name: "t-blue", Namespace: "blue", Claim: "data"})
			for id, want := range map[string]string{mine.ID: own, blue.ID: w.o.Projects.(tenants)["blue"]} {
				v, _, err := w.find(t.Context(), id)
				w.must(err)
				if v.Project != want || v.Metadata[metaCluster] != w.o.Cluster {
					t.Errorf("volume of project %s, want %s; metadata %v", v.Project, want, v.Metadata)
				}
				c, err := w.Attach(t.Context(), backend.Attach{Volume: id, Node: "node-1"})
				w.must(err)
				if c.Owner != want || c.OperatorOwned != (want == own) || c.Format != record.FormatBlank {
					t.Errorf("connection %+v", c)
				}
				w.must(w.Detach(t.Context(), id, "node-1"))
			}
			// The same name for another tenant is another volume's.
			red := w.create(backend.Create{Name: "t-blue", Namespace: "red"})
			if red.ID == blue.ID {
				t.Error("two tenants have one volume")
			}
			if _, err := w.Create(t.Context(), backend.Create{Name: "t-stolen", MinBytes: gib, Namespace: "red", Parent: blue.ID}); !errdefs.IsNotFound(err) {
				t.Errorf("a copy of another tenant's volume: %v", err)
			}
			shot, err := w.CreateSnapshot(t.Context(), "t-shot", blue.ID, nil)
			w.must(err)
			t.Cleanup(func() {
				if err := w.DeleteSnapshot(context.Background(), shot.ID); err != nil {
					t.Error(err)
				}
			})
			s, _, err := w.findSnapshot(t.Context(), shot.ID)
			w.must(err)
			if s.Project != w.o.Projects.(tenants)["blue"] {
				t.Errorf("the snapshot is of project %s", s.Project)
			}
			if _, err := w.Create(t.Context(), backend.Create{Name: "t-stolen", MinBytes: gib, Namespace: "red", Snapshot: shot.ID}); !errdefs.IsNotFound(err) {
				t.Errorf("a copy of another tenant's snapshot: %v", err)
			}
			if _, err := w.Create(t.Context(), backend.Create{Name: "t-poor", MinBytes: gib, Namespace: "poor"}); !errdefs.IsFailedPrecondition(err) {
				t.Errorf("a tenant without a project: %v", err)
			}
		})
	}
}

// TestStatic: volumes that others made, as the seeds' inline ones.
func TestStatic(t *testing.T) {
	for name, make := range map[string]func(*testing.T, ...func(*Options)) *world{"fake": fake, "real": live} {
		t.Run(name, func(t *testing.T) {
			w := make(t)
			project := w.o.Projects.(tenants)["blue"]
			c, err := w.maker(t.Context(), project)
			w.must(err)
			v, err := openstack.Put[volume](t.Context(), c, volumes, "", map[string]any{"name": "by hand", "size": 1})
			w.must(err)
			w.gone(v.ID)
			w.must(w.poll(t.Context(), "by hand", func(ctx context.Context) (bool, error) {
				v, err := openstack.Get[volume](ctx, c, volumes, v.ID)
				return err == nil && v.Status == available, err
			}))
			got, err := w.Attach(t.Context(), backend.Attach{Volume: v.ID, Node: "node-1"})
			w.must(err)
			if got.Owner != project || got.Format != record.FormatBlank {
				t.Errorf("connection %+v", got)
			}
			all, err := w.List(t.Context(), "", 0)
			w.must(err)
			if len(all) != 1 || all[0].ID != v.ID || all[0].Node != "node-1" {
				t.Errorf("the list does not have what is attached: %+v", all)
			}
			w.must(w.Detach(t.Context(), v.ID, "node-1"))
			if all, err = w.List(t.Context(), "", 0); err != nil || len(all) != 0 {
				t.Errorf("the list has what is not ours: %+v %v", all, err)
			}
			// Made from something, and larger: never formatted.
			ask := backend.Create{Name: "s-copy", Namespace: "blue", Parent: v.ID, MinBytes: 2 * gib}
			copied := w.create(ask)
			if again := w.create(ask); copied.SizeBytes != 2*gib || again.ID != copied.ID {
				t.Errorf("copies %+v and %+v", copied, again)
			}
			ask.MinBytes = 3 * gib
			if _, err := w.Create(t.Context(), ask); !errdefs.IsAlreadyExists(err) {
				t.Errorf("a larger one of the same name: %v", err)
			}
			got, err = w.Attach(t.Context(), backend.Attach{Volume: copied.ID, Node: "node-1"})
			w.must(err)
			if got.Format != record.FormatNever || got.SizeBytes != 2*gib {
				t.Errorf("a copy may be formatted, or is not as large as it is: %+v", got)
			}
		})
	}
}

// TestExpandAttached: a volume grows while a node has it, or, where its driver cannot, is
// as it was.
func TestExpandAttached(t *testing.T) {
	for name, make := range map[string]func(*testing.T, ...func(*Options)) *world{
		"fake": fake, "real": live, "nfs": func(t *testing.T, change ...func(*Options)) *world {
			w := fake(t, change...)
			w.fake.Kind = "nfs"
			return w
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := make(t)
			v := w.create(backend.Create{Name: "grow"})
			at := backend.Attach{Volume: v.ID, Node: "node-1"}
			first, err := w.Attach(t.Context(), at)
			w.must(err)
			size, err := w.Expand(t.Context(), v.ID, 2*gib)
			if first.Source.File != nil {
				if !errdefs.IsFailedPrecondition(err) {
					t.Errorf("a file grows while it is attached: %v", err)
				}
				w.must(w.Detach(t.Context(), v.ID, "node-1"))
				size, err = w.Expand(t.Context(), v.ID, 2*gib)
			}
			w.must(err)
			again, err := w.Attach(t.Context(), at)
			w.must(err)
			if size != 2*gib || again.SizeBytes != 2*gib {
				t.Errorf("grown to %d, the connection says %d", size, again.SizeBytes)
			}
		})
	}
}

// TestLeast: an account that has a role in a tenant's project and no other.
func TestLeast(t *testing.T) {
	for name, make := range map[string]func(*testing.T, ...func(*Options)) *world{"fake": fake, "real": live} {
		t.Run(name, func(t *testing.T) {
			w := make(t, least, func(o *Options) { delete(o.Projects.(tenants), "red") })
			v := w.create(backend.Create{Name: "least", Namespace: "blue"})
			c, err := w.Attach(t.Context(), backend.Attach{Volume: v.ID, Node: "node-1"})
			w.must(err)
			if c.OperatorOwned || c.Owner != w.o.Projects.(tenants)["blue"] {
				t.Errorf("connection %+v", c)
			}
			if got, err := w.Get(t.Context(), v.ID); err != nil || got.Node != "node-1" {
				t.Errorf("%+v %v", got, err)
			}
			w.must(w.Detach(t.Context(), v.ID, "node-1"))
			if size, err := w.Expand(t.Context(), v.ID, 2*gib); err != nil || size != 2*gib {
				t.Errorf("grown to %d: %v", size, err)
			}
		})
	}
}
