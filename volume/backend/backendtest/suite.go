// Package backendtest is the one suite that every keeper of volumes passes, the fake in
// this package, the local files and Cinder alike, so that a test over the fake says
// something about the others.
package backendtest

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
)

// Subject is a keeper under test. It may hold volumes of others.
type Subject struct {
	Volumes backend.Volumes
	// Bytes is a size of which a few volumes fit and that is not rounded; 1 GiB if 0.
	Bytes int64
	// Parameters and Topologies of volumes to create.
	Parameters map[string]string
	Topologies []map[string]string
	// Nodes to attach to, two at least; nil if nothing is attached.
	Nodes []string
	// Mutable parameters that a volume may be given; nil if it is not mutable.
	Mutable map[string]string
	// Write puts content into a volume and Check finds it there; nil if a test cannot.
	Write, Check func(ctx context.Context, volume string, content []byte) error
	// Prefix of names that are made, so that runs can share a keeper.
	Prefix string
	// Timeout of a test; 2 minutes if 0.
	Timeout time.Duration
}

type suite struct {
	Subject
	t   *testing.T
	ctx context.Context
}

// Run is the suite. What is made is removed.
func Run(t *testing.T, s Subject) {
	if s.Bytes == 0 {
		s.Bytes = 1 << 30
	}
	if s.Timeout == 0 {
		s.Timeout = 2 * time.Minute
	}
	if s.Prefix == "" {
		s.Prefix = "suite"
	}
	for _, c := range []struct {
		name string
		run  func(*suite)
	}{
		{"Lifecycle", (*suite).lifecycle},
		{"CreateIsIdempotent", (*suite).idempotent},
		{"CreateAtOnce", (*suite).concurrent},
		{"BadSizes", (*suite).sizes},
		{"BadParameters", (*suite).parameters},
		{"List", (*suite).list},
		{"Expand", (*suite).expand},
		{"Clone", (*suite).clone},
		{"Snapshots", (*suite).snapshots},
		{"Capacity", (*suite).capacity},
		{"Modify", (*suite).modify},
		{"Attach", (*suite).attach},
		{"Files", (*suite).files},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), s.Timeout)
			defer cancel()
			c.run(&suite{s, t, ctx})
		})
	}
}

func (s *suite) name(n string) string {
	return s.Prefix + "-" + strings.ToLower(strings.ReplaceAll(s.t.Name(), "/", "-")) + "-" + n
}

func (s *suite) request(n string) backend.Create {
	return backend.Create{Name: s.name(n), MinBytes: s.Bytes, Parameters: s.Parameters, Topologies: s.Topologies, Namespace: "default", Claim: n}
}

func (s *suite) create(c backend.Create) backend.Volume {
	s.t.Helper()
	v, err := s.Volumes.Create(s.ctx, c)
	if err != nil {
		s.t.Fatalf("create %s: %v", c.Name, err)
	}
	s.cleanup(v.ID)
	if v.ID == "" || len(v.ID) > 128 || v.SizeBytes < c.MinBytes || c.MaxBytes != 0 && v.SizeBytes > c.MaxBytes || v.Snapshot != c.Snapshot || v.Parent != c.Parent {
		s.t.Fatalf("create %+v returned %+v", c, v)
	}
	return v
}

func (s *suite) cleanup(id string) {
	s.t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(s.ctx), s.Timeout)
		defer cancel()
		if a, ok := s.Volumes.(backend.Attachments); ok {
			if err := a.Detach(ctx, id, ""); err != nil {
				s.t.Errorf("clean up: detach %s: %v", id, err)
			}
		}
		if err := s.Volumes.Delete(ctx, id); err != nil {
			s.t.Errorf("clean up: delete %s: %v", id, err)
		}
	})
}

func (s *suite) want(what string, err error, is func(error) bool) {
	s.t.Helper()
	if err == nil || !is(err) {
		s.t.Errorf("%s: error %v is not of the class that is asked for", what, err)
	}
}

func (s *suite) ok(what string, err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatalf("%s: %v", what, err)
	}
}

// missing is an ID that no volume has but one could have.
const missing = "00000000-0000-4000-8000-000000000000"

func (s *suite) lifecycle() {
	v := s.create(s.request("a"))
	got, err := s.Volumes.Get(s.ctx, v.ID)
	s.ok("get", err)
	if got.ID != v.ID || got.SizeBytes != v.SizeBytes || got.Node != "" || got.Degraded != "" {
		s.t.Errorf("get returned %+v, create %+v", got, v)
	}
	s.ok("delete", s.Volumes.Delete(s.ctx, v.ID))
	_, err = s.Volumes.Get(s.ctx, v.ID)
	s.want("get what was deleted", err, errdefs.IsNotFound)
	s.ok("delete again", s.Volumes.Delete(s.ctx, v.ID))
	s.ok("delete what never was", s.Volumes.Delete(s.ctx, missing))
	s.ok("delete what cannot be", s.Volumes.Delete(s.ctx, "../no volume\n"))
	_, err = s.Volumes.Get(s.ctx, "../no volume\n")
	s.want("get what cannot be", err, errdefs.IsNotFound)
	if again := s.create(s.request("a")); again.ID == v.ID {
		s.t.Errorf("ID %s was given twice", v.ID)
	}
	ctx, cancel := context.WithCancel(s.ctx)
	cancel()
	if v, err := s.Volumes.Create(ctx, s.request("late")); err == nil {
		s.cleanup(v.ID)
		s.t.Error("a cancelled call created a volume")
	}
}

func (s *suite) idempotent() {
	c := s.request("a")
	v := s.create(c)
	again, err := s.Volumes.Create(s.ctx, c)
	s.ok("create again", err)
	if again.ID != v.ID {
		s.t.Errorf("created %s and %s by one name", v.ID, again.ID)
	}
	larger := c
	larger.MinBytes = v.SizeBytes * 2
	_, err = s.Volumes.Create(s.ctx, larger)
	s.want("create larger by the same name", err, errdefs.IsAlreadyExists)
	long := s.request("long")
	long.Name += strings.Repeat("x", 128-len(long.Name))
	s.create(long)
}

func (s *suite) concurrent() {
	c := s.request("a")
	ids := make([]string, 4)
	var all sync.WaitGroup
	for i := range ids {
		all.Go(func() {
			v, err := s.Volumes.Create(s.ctx, c)
			if err != nil && !errdefs.IsAborted(err) && !errdefs.IsUnavailable(err) {
				s.t.Errorf("create: %v", err)
			}
			ids[i] = v.ID
		})
	}
	all.Wait()
	v := s.create(c)
	for _, id := range ids {
		if id != "" && id != v.ID {
			s.cleanup(id)
			s.t.Errorf("volumes %s and %s by one name", id, v.ID)
		}
	}
}

func (s *suite) sizes() {
	c := s.request("a")
	c.MinBytes, c.MaxBytes = s.Bytes+1, s.Bytes+1
	switch v, err := s.Volumes.Create(s.ctx, c); {
	case err == nil && v.SizeBytes == s.Bytes+1:
		s.cleanup(v.ID)
	case err == nil:
		s.cleanup(v.ID)
		s.t.Errorf("asked for exactly %d bytes, got %d", s.Bytes+1, v.SizeBytes)
	default:
		s.want("a size that does not fit", err, errdefs.IsOutOfRange)
	}
	c = s.request("huge")
	c.MinBytes = 1 << 62
	v, err := s.Volumes.Create(s.ctx, c)
	if err == nil {
		s.cleanup(v.ID)
	}
	s.want("a huge volume", err, func(err error) bool { return errdefs.IsOutOfRange(err) || errdefs.IsResourceExhausted(err) })
}

func (s *suite) parameters() {
	c := s.request("a")
	c.Parameters = map[string]string{"no-such-parameter": "x"}
	v, err := s.Volumes.Create(s.ctx, c)
	if err == nil {
		s.cleanup(v.ID)
	}
	s.want("an unknown parameter", err, errdefs.IsInvalidArgument)
	if err != nil && !strings.Contains(err.Error(), "no-such-parameter") {
		s.t.Errorf("the error does not name the parameter: %v", err)
	}
}

func (s *suite) list() {
	var want []string
	for i := range 3 {
		want = append(want, s.create(s.request(fmt.Sprint(i))).ID)
	}
	all, err := s.Volumes.List(s.ctx, "", 0)
	s.ok("list", err)
	var got []string
	for _, v := range all {
		got = append(got, v.ID)
	}
	for _, id := range want {
		if !slices.Contains(got, id) {
			s.t.Errorf("list %v lacks %s", got, id)
		}
	}
	// Others may make volumes meanwhile; what was there is seen once each.
	seen := map[string]int{}
	after := ""
	for range len(all) + 20 {
		page, err := s.Volumes.List(s.ctx, after, 2)
		s.ok("list after "+after, err)
		if len(page) > 2 {
			s.t.Fatalf("a page of %d", len(page))
		}
		for _, v := range page {
			seen[v.ID]++
			after = v.ID
		}
		if len(page) == 0 {
			break
		}
	}
	for _, id := range want {
		if seen[id] != 1 {
			s.t.Errorf("volume %s is on %d pages", id, seen[id])
		}
	}
}

func (s *suite) expand() {
	v := s.create(s.request("a"))
	size, err := s.Volumes.Expand(s.ctx, v.ID, 2*s.Bytes)
	s.ok("expand", err)
	if size < 2*s.Bytes {
		s.t.Errorf("expanded to %d, not %d", size, 2*s.Bytes)
	}
	for _, bytes := range []int64{2 * s.Bytes, s.Bytes} {
		again, err := s.Volumes.Expand(s.ctx, v.ID, bytes)
		s.ok("expand again", err)
		if again != size {
			s.t.Errorf("expanded to %d, then to %d", size, again)
		}
	}
	got, err := s.Volumes.Get(s.ctx, v.ID)
	s.ok("get", err)
	if got.SizeBytes != size {
		s.t.Errorf("get says %d bytes, expand %d", got.SizeBytes, size)
	}
	_, err = s.Volumes.Expand(s.ctx, missing, 2*s.Bytes)
	s.want("expand what is not there", err, errdefs.IsNotFound)
	_, err = s.Volumes.Expand(s.ctx, v.ID, 1<<62)
	s.want("expand to a huge size", err, func(err error) bool { return errdefs.IsOutOfRange(err) || errdefs.IsResourceExhausted(err) })
}

func (s *suite) write(id, content string) {
	s.t.Helper()
	if s.Write != nil {
		s.ok("write", s.Write(s.ctx, id, []byte(content)))
	}
}

func (s *suite) check(id, content string) {
	s.t.Helper()
	if s.Check != nil {
		if err := s.Check(s.ctx, id, []byte(content)); err != nil {
			s.t.Errorf("volume %s: %v", id, err)
		}
	}
}

func (s *suite) clone() {
	v := s.create(s.request("a"))
	s.write(v.ID, "first")
	c := s.request("copy")
	c.Parent = v.ID
	copied := s.create(c)
	s.write(v.ID, "second")
	s.check(copied.ID, "first")
	again, err := s.Volumes.Create(s.ctx, c)
	s.ok("clone again", err)
	if again.ID != copied.ID {
		s.t.Errorf("clones %s and %s by one name", copied.ID, again.ID)
	}
	c.Parent = ""
	_, err = s.Volumes.Create(s.ctx, c)
	s.want("the name of a clone for an empty volume", err, errdefs.IsAlreadyExists)
	c = s.request("other")
	c.Parent = missing
	_, err = s.Volumes.Create(s.ctx, c)
	s.want("clone what is not there", err, errdefs.IsNotFound)
	larger := s.request("larger")
	larger.Parent, larger.MinBytes = v.ID, 2*s.Bytes
	s.check(s.create(larger).ID, "second")
}

func (s *suite) snapshots() {
	snaps, ok := s.Volumes.(backend.Snapshots)
	if !ok {
		s.t.Skip("this keeper has no snapshots")
	}
	v, other := s.create(s.request("a")), s.create(s.request("b"))
	s.write(v.ID, "first")
	take := func(name, volume string) backend.Snapshot {
		s.t.Helper()
		shot, err := snaps.CreateSnapshot(s.ctx, s.name(name), volume, nil)
		s.ok("snapshot", err)
		s.t.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(s.ctx), s.Timeout)
			defer cancel()
			if err := snaps.DeleteSnapshot(ctx, shot.ID); err != nil {
				s.t.Errorf("clean up: delete snapshot %s: %v", shot.ID, err)
			}
		})
		if shot.ID == "" || shot.Volume != volume || shot.SizeBytes < s.Bytes || shot.CreatedAt == 0 {
			s.t.Fatalf("snapshot %+v", shot)
		}
		for !shot.Ready {
			select {
			case <-s.ctx.Done():
				s.t.Fatalf("snapshot %s does not become ready", shot.ID)
			case <-time.After(50 * time.Millisecond):
			}
			shot, err = snaps.GetSnapshot(s.ctx, shot.ID)
			s.ok("get snapshot", err)
		}
		return shot
	}
	one := take("one", v.ID)
	if again := take("one", v.ID); again.ID != one.ID {
		s.t.Errorf("snapshots %s and %s by one name", one.ID, again.ID)
	}
	_, err := snaps.CreateSnapshot(s.ctx, s.name("one"), other.ID, nil)
	s.want("a snapshot's name for another volume", err, errdefs.IsAlreadyExists)
	_, err = snaps.CreateSnapshot(s.ctx, s.name("none"), missing, nil)
	s.want("snapshot of what is not there", err, errdefs.IsNotFound)
	two := take("two", v.ID)
	take("three", other.ID)

	got, err := snaps.GetSnapshot(s.ctx, one.ID)
	s.ok("get snapshot", err)
	if got.ID != one.ID || got.Volume != v.ID || got.CreatedAt != one.CreatedAt {
		s.t.Errorf("get returned %+v, create %+v", got, one)
	}
	_, err = snaps.GetSnapshot(s.ctx, missing)
	s.want("get a snapshot that is not there", err, errdefs.IsNotFound)
	of, err := snaps.ListSnapshots(s.ctx, v.ID, "", 0)
	s.ok("list snapshots of a volume", err)
	var ids []string
	for _, shot := range of {
		ids = append(ids, shot.ID)
	}
	if len(ids) != 2 || !slices.Contains(ids, one.ID) || !slices.Contains(ids, two.ID) {
		s.t.Errorf("snapshots of %s are %v, not %s and %s", v.ID, ids, one.ID, two.ID)
	}
	if len(ids) == 2 {
		rest, err := snaps.ListSnapshots(s.ctx, v.ID, ids[0], 1)
		s.ok("list snapshots after one", err)
		if len(rest) != 1 || rest[0].ID != ids[1] {
			s.t.Errorf("after %s comes %+v, not %s", ids[0], rest, ids[1])
		}
	}

	s.write(v.ID, "second")
	c := s.request("restored")
	c.Snapshot = one.ID
	restored := s.create(c)
	s.check(restored.ID, "first")
	c = s.request("lost")
	c.Snapshot = missing
	_, err = s.Volumes.Create(s.ctx, c)
	s.want("restore what is not there", err, errdefs.IsNotFound)
	s.ok("delete a snapshot", snaps.DeleteSnapshot(s.ctx, two.ID))
	s.ok("delete it again", snaps.DeleteSnapshot(s.ctx, two.ID))
	s.ok("delete what cannot be", snaps.DeleteSnapshot(s.ctx, "../no snapshot\n"))
}

func (s *suite) capacity() {
	c, ok := s.Volumes.(backend.Capacity)
	if !ok {
		s.t.Skip("this keeper does not tell its capacity")
	}
	var place map[string]string
	if len(s.Topologies) > 0 {
		place = s.Topologies[0]
	}
	available, largest, err := c.Capacity(s.ctx, s.Parameters, place)
	s.ok("capacity", err)
	if available < s.Bytes || largest < 0 {
		s.t.Errorf("capacity %d, largest volume %d", available, largest)
	}
}

func (s *suite) modify() {
	m, ok := s.Volumes.(backend.Mutable)
	if !ok || s.Mutable == nil {
		s.t.Skip("volumes of this keeper do not change")
	}
	v := s.create(s.request("a"))
	s.ok("modify", m.Modify(s.ctx, v.ID, s.Mutable))
	s.ok("modify again", m.Modify(s.ctx, v.ID, s.Mutable))
	s.want("modify by an unknown parameter", m.Modify(s.ctx, v.ID, map[string]string{"no-such-parameter": "x"}), errdefs.IsInvalidArgument)
	s.want("modify what is not there", m.Modify(s.ctx, missing, s.Mutable), errdefs.IsNotFound)
	c := s.request("b")
	c.Mutable = s.Mutable
	s.create(c)
}

func (s *suite) attach() {
	a, ok := s.Volumes.(backend.Attachments)
	if !ok || len(s.Nodes) < 2 {
		s.t.Skip("volumes of this keeper are not attached")
	}
	v := s.create(s.request("a"))
	at := backend.Attach{Volume: v.ID, Node: s.Nodes[0]}
	first, err := a.Attach(s.ctx, at)
	s.ok("attach", err)
	again, err := a.Attach(s.ctx, at)
	s.ok("attach again", err)
	if again.Attachment != first.Attachment {
		s.t.Errorf("attachments %q and %q of one volume to one node", first.Attachment, again.Attachment)
	}
	set := 0
	for _, is := range []bool{first.Source.File != nil, first.Source.RBD != nil, first.Source.ISCSI != nil} {
		if is {
			set++
		}
	}
	if set != 1 || first.SizeBytes != v.SizeBytes || first.ReadOnly {
		s.t.Errorf("connection has %d sources, %d bytes, readOnly %t", set, first.SizeBytes, first.ReadOnly)
	}
	if first.Owner == "" && !first.OperatorOwned {
		s.t.Error("the connection does not say whose the volume is")
	}
	got, err := s.Volumes.Get(s.ctx, v.ID)
	s.ok("get", err)
	if got.Node != "" && got.Node != s.Nodes[0] {
		s.t.Errorf("get says node %q, it is attached to %q", got.Node, s.Nodes[0])
	}
	_, err = a.Attach(s.ctx, backend.Attach{Volume: v.ID, Node: s.Nodes[1]})
	s.want("attach to a second node", err, errdefs.IsFailedPrecondition)
	if err != nil && !strings.Contains(err.Error(), s.Nodes[0]) {
		s.t.Errorf("the error does not name the node that has the volume: %v", err)
	}
	_, err = a.Attach(s.ctx, backend.Attach{Volume: v.ID, Node: s.Nodes[0], ReadOnly: true})
	s.want("attach otherwise", err, errdefs.IsAlreadyExists)
	s.want("delete what is attached", s.Volumes.Delete(s.ctx, v.ID), errdefs.IsFailedPrecondition)
	s.ok("detach from a node that does not have it", a.Detach(s.ctx, v.ID, s.Nodes[1]))
	if _, err = a.Attach(s.ctx, backend.Attach{Volume: v.ID, Node: s.Nodes[1]}); err == nil {
		s.t.Error("detaching from one node took the volume from another")
	}
	s.ok("detach", a.Detach(s.ctx, v.ID, s.Nodes[0]))
	s.ok("detach again", a.Detach(s.ctx, v.ID, s.Nodes[0]))
	s.ok("detach what is not there", a.Detach(s.ctx, missing, s.Nodes[0]))
	read, err := a.Attach(s.ctx, backend.Attach{Volume: v.ID, Node: s.Nodes[1], ReadOnly: true})
	s.ok("attach read-only", err)
	if !read.ReadOnly {
		s.t.Error("attached read-only, but the connection may write")
	}
	s.ok("detach from every node", a.Detach(s.ctx, v.ID, ""))
	got, err = s.Volumes.Get(s.ctx, v.ID)
	s.ok("get", err)
	if got.Node != "" {
		s.t.Errorf("detached, but get says node %q", got.Node)
	}
	_, err = a.Attach(s.ctx, backend.Attach{Volume: missing, Node: s.Nodes[0]})
	s.want("attach what is not there", err, errdefs.IsNotFound)
}

func (s *suite) files() {
	f, ok := s.Volumes.(backend.Files)
	if !ok {
		s.t.Skip("volumes of this keeper are not files of a node")
	}
	v := s.create(s.request("a"))
	c, err := f.Connect(s.ctx, v.ID)
	s.ok("connect", err)
	if c.Source.File == nil || c.SizeBytes != v.SizeBytes {
		s.t.Errorf("connection %+v of volume %+v", c, v)
	}
	_, err = f.Connect(s.ctx, missing)
	s.want("connect what is not there", err, errdefs.IsNotFound)
}
