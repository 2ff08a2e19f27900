package cinder

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/volume/backend"
	"github.com/hypernetes/hypernetes/volume/backend/cinder/cindertest"
	"github.com/hypernetes/hypernetes/volume/record"
)

// left are the attachments there are.
func (w *world) left() (all []cindertest.Attachment) {
	w.fake.Edit(func(_ map[string]*cindertest.Volume, _ map[string]*cindertest.Snapshot, attachments map[string]*cindertest.Attachment) {
		for _, a := range attachments {
			all = append(all, *a)
		}
	})
	return all
}

// TestCrash: the process dies at every request that it makes, before it arrives and after
// it took effect, and the next one finishes.
func TestCrash(t *testing.T) {
	type step struct {
		name string
		do   func(*world, context.Context, string) error
	}
	steps := []step{
		{"create", func(w *world, ctx context.Context, _ string) error {
			_, err := w.Create(ctx, backend.Create{Name: "crash", MinBytes: gib, Namespace: "blue"})
			return err
		}},
		{"attach", func(w *world, ctx context.Context, id string) error {
			_, err := w.Attach(ctx, backend.Attach{Volume: id, Node: "node-1"})
			return err
		}},
		{"copy", func(w *world, ctx context.Context, id string) error {
			v, err := w.Create(ctx, backend.Create{Name: "crash", MinBytes: 3 * gib, Namespace: "blue", Parent: id})
			if err == nil && v.SizeBytes != 3*gib {
				err = fmt.Errorf("the copy has %d bytes", v.SizeBytes)
			}
			return err
		}},
		{"snapshot", func(w *world, ctx context.Context, id string) error {
			_, err := w.CreateSnapshot(ctx, "crash", id, nil)
			return err
		}},
		{"expand", func(w *world, ctx context.Context, id string) error {
			_, err := w.Expand(ctx, id, 2*gib)
			return err
		}},
		{"detach", func(w *world, ctx context.Context, id string) error { return w.Detach(ctx, id, "node-1") }},
	}
	var writes []cindertest.Request
	for _, s := range steps {
		// What is asked for when nothing fails.
		w := fake(t)
		id := w.fake.Put(cindertest.Volume{Project: cindertest.Alpha})
		if s.name == "detach" {
			w.must(steps[1].do(w, t.Context(), id))
		}
		w.fake.Requests()
		w.must(s.do(w, t.Context(), id))
		writes = slices.DeleteFunc(w.fake.Requests(), func(r cindertest.Request) bool { return r.Method == "GET" })
		for i, r := range writes {
			for _, after := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/%d-%s-%t", s.name, i, r.Method, after), func(t *testing.T) {
					w := fake(t)
					id := w.fake.Put(cindertest.Volume{Project: cindertest.Alpha})
					if s.name == "detach" {
						w.must(steps[1].do(w, t.Context(), id))
					}
					path := r.Path[strings.LastIndex(r.Path, "/")+1:]
					if len(path) == 36 { // an ID, another one each time
						path = strings.Split(r.Path, "/")[4]
					}
					// Keystone's and Cinder's answers are lost, and so is the process.
					w.fake.Fail(cindertest.Fault{Times: 1, Method: r.Method, Path: path, Status: 503, After: after})
					if err := s.do(w, t.Context(), id); err == nil && r.Method != "DELETE" {
						t.Errorf("%s %s failed and nobody said so", r.Method, r.Path)
					}
					w.fake.Mend()
					w.restart()
					w.must(s.do(w, t.Context(), id))
					w.must(s.do(w, t.Context(), id))
					w.fake.Edit(func(volumes map[string]*cindertest.Volume, snapshots map[string]*cindertest.Snapshot, attachments map[string]*cindertest.Attachment) {
						v, a, x := 1, 0, 0
						switch s.name {
						case "create", "copy":
							v = 2
						case "attach":
							a = 1
						case "snapshot":
							x = 1
						}
						if len(volumes) != v || len(attachments) != a || len(snapshots) != x {
							t.Errorf("%d volumes, %d attachments, %d snapshots, want %d, %d, %d", len(volumes), len(attachments), len(snapshots), v, a, x)
						}
						if s.name == "detach" && volumes[id].Metadata[metaAttaching] != "" {
							t.Errorf("the mark stayed: %v", volumes[id].Metadata)
						}
					})
				})
			}
		}
	}
}

// TestRace: nodes race for a volume; Cinder lets one have it.
func TestRace(t *testing.T) {
	w := fake(t)
	for round := range 20 {
		id := w.fake.Put(cindertest.Volume{Project: cindertest.Alpha})
		other := *w // another controller, that holds no lock of ours
		other.restart()
		var all sync.WaitGroup
		var mu sync.Mutex
		var have []string
		for i := range 6 {
			b := []*world{w, &other}[i%2]
			all.Go(func() {
				node := fmt.Sprintf("node-%d", i)
				if _, err := b.Attach(t.Context(), backend.Attach{Volume: id, Node: node}); err == nil {
					mu.Lock()
					defer mu.Unlock()
					have = append(have, node)
				}
			})
		}
		all.Wait()
		// A controller may take away what the other began, so none may win; never two.
		if len(have) > 1 {
			t.Fatalf("round %d: nodes %v have the volume", round, have)
		}
	}
}

// TestForeign: what others did with a volume stays.
func TestForeign(t *testing.T) {
	w := fake(t)
	for name, a := range map[string]cindertest.Attachment{
		"server":         {Server: "11111111-0000-4000-8000-000000000001", Status: "attached", Connector: map[string]any{"mountpoint": "/dev/vdb"}, Info: map[string]any{}},
		"server begun":   {Server: "11111111-0000-4000-8000-000000000001", Status: "reserved"},
		"no server":      {Status: "attached", Connector: map[string]any{"mountpoint": "/dev/vdb"}},
		"begun":          {Status: "attaching"},
		"other cluster":  {Status: "attached", Connector: map[string]any{"mountpoint": "h8s:000000000000:node-1"}},
		"almost":         {Status: "attached", Connector: map[string]any{"mountpoint": "h8s:node-1"}},
		"no mountpoint":  {Status: "attached"},
		"another's mark": {Status: "reserved"},
	} {
		meta := map[string]string{}
		if name == "another's mark" {
			meta[metaAttaching] = "another-cluster/node-1"
		}
		id := w.fake.Put(cindertest.Volume{Project: cindertest.Alpha, Status: "in-use", Metadata: meta})
		if a.Status != "attached" {
			w.fake.Edit(func(v map[string]*cindertest.Volume, _ map[string]*cindertest.Snapshot, _ map[string]*cindertest.Attachment) {
				v[id].Status = "reserved"
			})
		}
		a.ID, a.Volume, a.Project = "22222222-0000-4000-8000-"+id[24:], id, cindertest.Alpha
		w.fake.Edit(func(_ map[string]*cindertest.Volume, _ map[string]*cindertest.Snapshot, all map[string]*cindertest.Attachment) {
			clear(all)
			all[a.ID] = &a
		})
		if _, err := w.Attach(t.Context(), backend.Attach{Volume: id, Node: "node-1"}); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s: attach: %v", name, err)
		}
		w.o.Orphan = -1
		w.restart()
		w.must(w.Sweep(t.Context()))
		w.must(w.Detach(t.Context(), id, ""))
		if len(w.left()) != 1 {
			t.Errorf("%s: somebody else's attachment was deleted", name)
		}
		if err := w.Delete(t.Context(), id); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s: delete: %v", name, err)
		}
	}
}

// TestSweep: attachments that nobody wants go, after a while.
func TestSweep(t *testing.T) {
	w := fake(t, func(o *Options) { o.Orphan = time.Hour })
	kept, lost, begun := w.create(backend.Create{Name: "kept"}), w.create(backend.Create{Name: "lost"}), w.create(backend.Create{Name: "begun"})
	for _, v := range []backend.Volume{kept, lost} {
		_, err := w.Attach(t.Context(), backend.Attach{Volume: v.ID, Node: "node-1"})
		w.must(err)
	}
	w.fake.Fail(cindertest.Fault{Times: -1, Path: "/action", Status: 500})
	w.fake.Fail(cindertest.Fault{Times: -1, Method: "DELETE", Status: 500})
	if _, err := w.Attach(t.Context(), backend.Attach{Volume: begun.ID, Node: "node-2"}); err == nil {
		t.Fatal("attached without an answer")
	}
	w.fake.Mend()
	w.nodes.wanted = map[Pair]bool{{kept.ID, "node-1"}: true}
	w.must(w.Sweep(t.Context()))
	if n := len(w.left()); n != 3 {
		t.Fatalf("%d attachments are left before their time", n)
	}
	w.mu.Lock()
	for id := range w.orphans {
		w.orphans[id] = time.Now().Add(-2 * time.Hour)
	}
	w.mu.Unlock()
	// The node of one that is lost does not say that it let go.
	w.nodes.use[Pair{lost.ID, "node-1"}] = InUse
	if err := w.Sweep(t.Context()); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a node that may write lost its attachment: %v", err)
	}
	if all := w.left(); len(all) != 2 {
		t.Errorf("%d attachments are left", len(all))
	}
	delete(w.nodes.use, Pair{lost.ID, "node-1"})
	w.must(w.Sweep(t.Context()))
	if all := w.left(); len(all) != 1 || all[0].Volume != kept.ID {
		t.Errorf("left: %+v", all)
	}
}

// TestWire is what Cinder is sent: no server, the node's name, a mode.
func TestWire(t *testing.T) {
	w := fake(t)
	v := w.create(backend.Create{Name: "wire", Namespace: "blue", Claim: "data"})
	w.fake.Requests()
	_, err := w.Attach(t.Context(), backend.Attach{Volume: v.ID, Node: "node-1", ReadOnly: true})
	w.must(err)
	all := w.fake.Requests()
	i := slices.IndexFunc(all, func(r cindertest.Request) bool {
		return r.Method == "POST" && strings.HasSuffix(r.Path, "/attachments")
	})
	if i < 0 || strings.Contains(all[i].Body, "instance_uuid") {
		t.Fatalf("requests %+v", all)
	}
	for _, want := range []string{`"mode":"ro"`, `"mountpoint":"` + w.mark() + `node-1"`, `"ip":"10.0.0.9"`, `"multipath":false`, `"platform":"x86_64"`} {
		if !strings.Contains(all[i].Body, want) {
			t.Errorf("the attachment lacks %s: %s", want, all[i].Body)
		}
	}
	if len(all) > 4 {
		t.Errorf("attaching takes %d requests: %+v", len(all), all)
	}
	w.fake.Edit(func(v map[string]*cindertest.Volume, _ map[string]*cindertest.Snapshot, _ map[string]*cindertest.Attachment) {
		for _, x := range v {
			if m := x.Metadata; m[metaNamespace] != "blue" || m[metaClaim] != "data" || m[metaName] != "wire" {
				t.Errorf("metadata %v", m)
			}
		}
	})
}

// TestErrors are what goes wrong at Cinder and whose it is.
func TestErrors(t *testing.T) {
	w := fake(t)
	w.fake.Quota(cindertest.Alpha, 3)
	w.create(backend.Create{Name: "one", Namespace: "blue", MinBytes: 2 * gib})
	for name, x := range map[string]struct {
		create backend.Create
		is     func(error) bool
		text   string
	}{
		"quota":      {backend.Create{Name: "two", Namespace: "blue", MinBytes: 2 * gib}, errdefs.IsResourceExhausted, "quota"},
		"no room":    {backend.Create{Name: "three", MinBytes: 500 * gib}, errdefs.IsResourceExhausted, "Could not find any available weighted backend"},
		"broken":     {backend.Create{Name: "four", Parameters: map[string]string{"type": cindertest.Broken}}, errdefs.IsResourceExhausted, "broken"},
		"no type":    {backend.Create{Name: "five", Parameters: map[string]string{"type": "gold"}}, errdefs.IsNotFound, "gold"},
		"not shared": {backend.Create{Name: "six", MultiAttach: true}, errdefs.IsInvalidArgument, "multiattach"},
	} {
		if x.create.MinBytes == 0 {
			x.create.MinBytes = gib
		}
		_, err := w.Create(t.Context(), x.create)
		if !x.is(err) || !strings.Contains(err.Error(), x.text) {
			t.Errorf("%s: %v", name, err)
		}
	}
	w.fake.Edit(func(v map[string]*cindertest.Volume, _ map[string]*cindertest.Snapshot, _ map[string]*cindertest.Attachment) {
		if len(v) != 1 {
			t.Errorf("%d volumes are left, want 1", len(v))
		}
	})
	for status, is := range map[int]func(error) bool{401: errdefs.IsUnavailable, 403: errdefs.IsFailedPrecondition, 429: errdefs.IsUnavailable, 500: errdefs.IsUnavailable, 503: errdefs.IsUnavailable} {
		w.fake.Fail(cindertest.Fault{Times: -1, Path: "/volume/", Status: status, Body: "<html>"})
		if _, err := w.Get(t.Context(), "11111111-0000-4000-8000-000000000001"); !is(err) {
			t.Errorf("%d: %v", status, err)
		}
		if err := w.Delete(t.Context(), "11111111-0000-4000-8000-000000000001"); err == nil {
			t.Errorf("%d: deleted without an answer", status)
		}
		w.fake.Mend()
	}
	// A volume may be shared where its type says so.
	shared := w.create(backend.Create{Name: "shared", MultiAttach: true, Parameters: map[string]string{"type": cindertest.Multi}})
	for _, node := range []string{"node-1", "node-2"} {
		c, err := w.Attach(t.Context(), backend.Attach{Volume: shared.ID, Node: node, Shared: true})
		w.must(err)
		if !c.Shared {
			t.Error("the connection does not say that it is shared")
		}
	}
	if _, err := w.Attach(t.Context(), backend.Attach{Volume: shared.ID, Node: "node-3"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("alone, of a volume that others have: %v", err)
	}
	w.must(w.Detach(t.Context(), shared.ID, "node-1"))
	if v, err := w.Get(t.Context(), shared.ID); err != nil || v.Node != "node-2" {
		t.Errorf("%+v %v", v, err)
	}
}

// TestRoles: our account gets itself into a tenant's project, or says who must.
func TestRoles(t *testing.T) {
	w := fake(t)
	w.create(backend.Create{Name: "red", Namespace: "red"})
	w.o.Role = "nobody"
	w.fake.Grant("admin", cindertest.Alpha)
	w.restart()
	if _, err := w.Create(t.Context(), backend.Create{Name: "blue", MinBytes: gib, Namespace: "blue"}); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "nobody") {
		t.Errorf("no such role: %v", err)
	}

	l := fake(t, least)
	v := l.create(backend.Create{Name: "blue", Namespace: "blue"})
	for name, namespace := range map[string]string{"no role there": "red", "no project of its own": "default"} {
		if _, err := l.Create(t.Context(), backend.Create{Name: "x", MinBytes: gib, Namespace: namespace}); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	l.fake.Grant("least", cindertest.Beta, "member")
	red := l.create(backend.Create{Name: "red", Namespace: "red"})
	for _, id := range []string{v.ID, red.ID} {
		c, err := l.Attach(t.Context(), backend.Attach{Volume: id, Node: "node-1"})
		l.must(err)
		if c.OperatorOwned {
			t.Error("a tenant's volume is the operator's")
		}
	}
	all, err := l.List(t.Context(), "", 0)
	l.must(err)
	if len(all) != 2 {
		t.Errorf("list %+v", all)
	}
	// One project that cannot be asked: what is not found may be there.
	l.fake.Grant("least", cindertest.Beta)
	l.restart()
	if _, err := l.Get(t.Context(), "11111111-0000-4000-8000-000000000001"); !errdefs.IsUnavailable(err) {
		t.Errorf("%v", err)
	}
	if _, err := l.Get(t.Context(), v.ID); err != nil {
		t.Error(err)
	}
	l.fake.Grant("least", cindertest.Beta, "member")
}

// fences is a Fence in memory.
type fences struct {
	open, past map[string][]string
	blocked    []string
	fail       error
}

func (c *fences) Clients(_ context.Context, r record.RBD) ([]string, error) {
	return slices.Clone(c.open[r.Image]), c.fail
}

func (c *fences) Remember(_ context.Context, r record.RBD, name string, clients []string) error {
	c.past[r.Image+name] = clients
	return c.fail
}

func (c *fences) Remembered(_ context.Context, r record.RBD, name string) ([]string, error) {
	return slices.Clone(c.past[r.Image+name]), c.fail
}

func (c *fences) Forget(_ context.Context, r record.RBD, name string) error {
	delete(c.past, r.Image+name)
	return c.fail
}

func (c *fences) Block(_ context.Context, client string) error {
	c.blocked = append(c.blocked, client)
	for image, all := range c.open {
		c.open[image] = slices.DeleteFunc(all, func(x string) bool { return x == client })
	}
	return c.fail
}

// TestFence: what a node that did not let go is kept from.
func TestFence(t *testing.T) {
	const one, two = "10.0.0.1:0/11", "10.0.0.1:0/22"
	for name, x := range map[string]struct {
		kind       string
		use        Use
		noCeph     bool
		open, past []string
		fail       error
		detached   bool
		blocked    []string
		text       string
	}{
		"let go":                {kind: "rbd", use: Released, open: []string{one}, detached: true},
		"let go, no ceph":       {kind: "rbd", use: Released, noCeph: true, detached: true},
		"open":                  {kind: "rbd", use: InUse, open: []string{one}, detached: true, blocked: []string{one}},
		"cut off":               {kind: "rbd", use: InUse, past: []string{two}, detached: true, blocked: []string{two}},
		"open and before":       {kind: "rbd", use: InUse, open: []string{one}, past: []string{one, two}, detached: true, blocked: []string{one, two}},
		"nothing known":         {kind: "rbd", use: InUse, text: "out-of-service"},
		"nothing known, off":    {kind: "rbd", use: Off, detached: true},
		"off, open":             {kind: "rbd", use: Off, open: []string{one}, detached: true, blocked: []string{one}},
		"no ceph":               {kind: "rbd", use: InUse, noCeph: true, text: "ceph.conf of --cinder-config"},
		"no ceph, off":          {kind: "rbd", use: Off, noCeph: true, detached: true},
		"ceph does not answer":  {kind: "rbd", use: InUse, open: []string{one}, fail: errdefs.ErrUnavailable, text: "unavailable"},
		"file":                  {kind: "nfs", use: InUse, text: "out-of-service"},
		"file, off":             {kind: "nfs", use: Off, detached: true},
		"the target forgets it": {kind: "iscsi", use: InUse, detached: true},
	} {
		t.Run(name, func(t *testing.T) {
			f := &fences{open: map[string][]string{}, past: map[string][]string{}}
			w := fake(t, func(o *Options) {
				if !x.noCeph {
					o.Fence = f
				}
			})
			w.fake.Kind = x.kind
			id := w.fake.Put(cindertest.Volume{Project: cindertest.Alpha})
			c, err := w.Attach(t.Context(), backend.Attach{Volume: id, Node: "node-1"})
			w.must(err)
			f.open["volume-"+id], f.past["volume-"+id+c.Attachment], f.fail = x.open, x.past, x.fail
			w.nodes.use[Pair{id, "node-1"}] = x.use
			err = w.Detach(t.Context(), id, "node-1")
			if (err == nil) != x.detached || (len(w.left()) == 0) != x.detached {
				t.Errorf("detached %t: %v", len(w.left()) == 0, err)
			}
			if err != nil && !strings.Contains(err.Error(), x.text) {
				t.Errorf("%v", err)
			}
			if x.fail == nil && !slices.Equal(f.blocked, x.blocked) {
				t.Errorf("blocked %v, want %v", f.blocked, x.blocked)
			}
		})
	}
}

// TestNote: clients are remembered while they have the volume.
func TestNote(t *testing.T) {
	f := &fences{open: map[string][]string{}, past: map[string][]string{}}
	w := fake(t, func(o *Options) { o.Fence = f })
	v := w.create(backend.Create{Name: "note"})
	c, err := w.Attach(t.Context(), backend.Attach{Volume: v.ID, Node: "node-1"})
	w.must(err)
	w.nodes.wanted[Pair{v.ID, "node-1"}] = true
	image := "volume-" + v.ID
	for _, client := range []string{"10.0.0.1:0/1", "10.0.0.1:0/2", "10.0.0.1:0/2"} {
		f.open[image] = []string{client}
		if client == "10.0.0.1:0/1" {
			w.must(w.noteNew(t.Context(), time.Now()))
		} else {
			w.must(w.Sweep(t.Context()))
		}
	}
	if got := f.past[image+c.Attachment]; !slices.Equal(got, []string{"10.0.0.1:0/1", "10.0.0.1:0/2"}) {
		t.Errorf("remembered %v", got)
	}
	w.must(w.noteNew(t.Context(), time.Now().Add(time.Hour)))
	w.must(w.Detach(t.Context(), v.ID, "node-1"))
	if len(w.fresh) != 0 {
		t.Errorf("still new: %v", w.fresh)
	}
	if len(f.blocked) != 0 {
		t.Errorf("a node that let go was shut out: %v", f.blocked)
	}
}
