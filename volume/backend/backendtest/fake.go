package backendtest

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/volume/backend"
	"github.com/hypernetes/hypernetes/volume/record"
)

// Keeper is what every fake is: volumes in memory, with files if Dir is set.
type Keeper struct {
	// Dir is where a volume's sparse file is made; none if empty.
	Dir string
	// Nodes are those that exist; every one does if it is nil.
	Nodes []string
	// Owner is whose the volumes are.
	Owner string
	// Fail, if set, is asked at the begin of each method by its name.
	Fail func(method string) error

	mu        sync.Mutex
	made      int
	volumes   map[string]*fakeVolume
	snapshots map[string]*backend.Snapshot
}

type fakeVolume struct {
	backend.Volume
	asked    backend.Create
	attached map[string]backend.Attach
}

// Total is what all volumes of a fake take together, Largest one of them.
const (
	Total   = 64 << 30
	Largest = 32 << 30
)

// Mutable is the parameter that volumes of a fake have, Immutable one that they do not.
const (
	Mutable   = "iops"
	Immutable = "speed"
)

// Attached is a fake whose volumes are attached to nodes.
type Attached struct{ *Keeper }

// Near is a fake whose volumes are files of the node.
type Near struct{ *Keeper }

var (
	_ backend.Volumes     = (*Keeper)(nil)
	_ backend.Capacity    = (*Keeper)(nil)
	_ backend.Snapshots   = (*Keeper)(nil)
	_ backend.Mutable     = (*Keeper)(nil)
	_ backend.Attachments = Attached{}
	_ backend.Files       = Near{}
)

func (k *Keeper) begin(ctx context.Context, method string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if k.Fail != nil {
		return k.Fail(method)
	}
	return nil
}

// id is never used twice.
func (k *Keeper) id(kind string) string {
	k.made++
	return fmt.Sprintf("%s-%06d", kind, k.made)
}

func checkMutable(parameters map[string]string) error {
	for name, value := range parameters {
		if name != Mutable {
			return fmt.Errorf("parameter %q: a fake has only %q: %w", name, Mutable, errdefs.ErrInvalidArgument)
		}
		if value == "" {
			return fmt.Errorf("parameter %q is empty: %w", name, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// Create implements backend.Volumes.
func (k *Keeper) Create(ctx context.Context, c backend.Create) (backend.Volume, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.begin(ctx, "Create"); err != nil {
		return backend.Volume{}, err
	}
	for name := range c.Parameters {
		if name != "type" {
			return backend.Volume{}, fmt.Errorf("parameter %q: a fake has only \"type\": %w", name, errdefs.ErrInvalidArgument)
		}
	}
	if err := checkMutable(c.Mutable); err != nil {
		return backend.Volume{}, err
	}
	for _, v := range k.volumes {
		if v.Name != c.Name {
			continue
		}
		if v.SizeBytes < c.MinBytes || c.MaxBytes != 0 && v.SizeBytes > c.MaxBytes || v.Snapshot != c.Snapshot || v.Parent != c.Parent {
			return backend.Volume{}, fmt.Errorf("volume %s has %d bytes or another source: %w", c.Name, v.SizeBytes, errdefs.ErrAlreadyExists)
		}
		return v.Volume, nil
	}
	var size int64
	if c.Snapshot != "" {
		s := k.snapshots[c.Snapshot]
		if s == nil {
			return backend.Volume{}, fmt.Errorf("snapshot %s: %w", c.Snapshot, errdefs.ErrNotFound)
		}
		size = s.SizeBytes
	}
	if c.Parent != "" {
		p := k.volumes[c.Parent]
		if p == nil {
			return backend.Volume{}, fmt.Errorf("volume %s: %w", c.Parent, errdefs.ErrNotFound)
		}
		size = p.SizeBytes
	}
	size = max(size, c.MinBytes)
	if c.MaxBytes != 0 && size > c.MaxBytes || size > Largest {
		return backend.Volume{}, fmt.Errorf("size %d: %w", size, errdefs.ErrOutOfRange)
	}
	if size > k.free() {
		return backend.Volume{}, fmt.Errorf("size %d, %d are free: %w", size, k.free(), errdefs.ErrResourceExhausted)
	}
	v := &fakeVolume{asked: c, attached: map[string]backend.Attach{}, Volume: backend.Volume{
		ID: k.id("volume"), Name: c.Name, SizeBytes: size, Snapshot: c.Snapshot, Parent: c.Parent,
	}}
	if len(c.Topologies) > 0 {
		v.Topology = maps.Clone(c.Topologies[0])
	}
	if err := k.size(v.ID, size); err != nil {
		return backend.Volume{}, err
	}
	if k.volumes == nil {
		k.volumes = map[string]*fakeVolume{}
	}
	k.volumes[v.ID] = v
	return v.Volume, nil
}

func (k *Keeper) path(id string) string { return filepath.Join(k.Dir, id+".raw") }

func (k *Keeper) size(id string, bytes int64) error {
	if k.Dir == "" {
		return nil
	}
	f, err := os.OpenFile(k.path(id), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Truncate(bytes)
}

func (k *Keeper) free() int64 {
	free := int64(Total)
	for _, v := range k.volumes {
		free -= v.SizeBytes
	}
	return free
}

// Delete implements backend.Volumes.
func (k *Keeper) Delete(ctx context.Context, id string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.begin(ctx, "Delete"); err != nil {
		return err
	}
	v := k.volumes[id]
	if v == nil {
		return nil
	}
	if v.Node != "" {
		return fmt.Errorf("volume %s is attached to node %s: %w", id, v.Node, errdefs.ErrFailedPrecondition)
	}
	if k.Dir != "" {
		if err := os.Remove(k.path(id)); err != nil && !os.IsNotExist(err) {
			return err
		}
	}
	delete(k.volumes, id)
	return nil
}

func (k *Keeper) get(id string) (*fakeVolume, error) {
	if v := k.volumes[id]; v != nil {
		return v, nil
	}
	return nil, fmt.Errorf("volume %s: %w", id, errdefs.ErrNotFound)
}

// Get implements backend.Volumes.
func (k *Keeper) Get(ctx context.Context, id string) (backend.Volume, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.begin(ctx, "Get"); err != nil {
		return backend.Volume{}, err
	}
	v, err := k.get(id)
	if err != nil {
		return backend.Volume{}, err
	}
	return v.Volume, nil
}

// List implements backend.Volumes.
func (k *Keeper) List(ctx context.Context, after string, limit int) ([]backend.Volume, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.begin(ctx, "List"); err != nil {
		return nil, err
	}
	var out []backend.Volume
	for _, id := range slices.Sorted(maps.Keys(k.volumes)) {
		if id > after && (limit <= 0 || len(out) < limit) {
			out = append(out, k.volumes[id].Volume)
		}
	}
	return out, nil
}

// Expand implements backend.Volumes.
func (k *Keeper) Expand(ctx context.Context, id string, bytes int64) (int64, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.begin(ctx, "Expand"); err != nil {
		return 0, err
	}
	v, err := k.get(id)
	if err != nil {
		return 0, err
	}
	if bytes <= v.SizeBytes {
		return v.SizeBytes, nil
	}
	if bytes > Largest {
		return 0, fmt.Errorf("size %d: %w", bytes, errdefs.ErrOutOfRange)
	}
	if err := k.size(id, bytes); err != nil {
		return 0, err
	}
	v.SizeBytes = bytes
	return bytes, nil
}

// Modify implements backend.Mutable.
func (k *Keeper) Modify(ctx context.Context, id string, parameters map[string]string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.begin(ctx, "Modify"); err != nil {
		return err
	}
	v, err := k.get(id)
	if err != nil {
		return err
	}
	if err := checkMutable(parameters); err != nil {
		return err
	}
	v.asked.Mutable = maps.Clone(parameters)
	return nil
}

// Capacity implements backend.Capacity.
func (k *Keeper) Capacity(ctx context.Context, _, _ map[string]string) (available, largest int64, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.begin(ctx, "Capacity"); err != nil {
		return 0, 0, err
	}
	return k.free(), min(k.free(), Largest), nil
}

// CreateSnapshot implements backend.Snapshots.
func (k *Keeper) CreateSnapshot(ctx context.Context, name, volume string, _ map[string]string) (backend.Snapshot, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.begin(ctx, "CreateSnapshot"); err != nil {
		return backend.Snapshot{}, err
	}
	for _, s := range k.snapshots {
		if s.Name == name && s.Volume == volume {
			return *s, nil
		} else if s.Name == name {
			return backend.Snapshot{}, fmt.Errorf("snapshot %s is of volume %s: %w", name, s.Volume, errdefs.ErrAlreadyExists)
		}
	}
	v, err := k.get(volume)
	if err != nil {
		return backend.Snapshot{}, err
	}
	s := &backend.Snapshot{ID: k.id("snapshot"), Name: name, Volume: volume, SizeBytes: v.SizeBytes, CreatedAt: 1790000000, Ready: true}
	if k.snapshots == nil {
		k.snapshots = map[string]*backend.Snapshot{}
	}
	k.snapshots[s.ID] = s
	return *s, nil
}

// DeleteSnapshot implements backend.Snapshots.
func (k *Keeper) DeleteSnapshot(ctx context.Context, id string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.begin(ctx, "DeleteSnapshot"); err != nil {
		return err
	}
	delete(k.snapshots, id)
	return nil
}

// GetSnapshot implements backend.Snapshots.
func (k *Keeper) GetSnapshot(ctx context.Context, id string) (backend.Snapshot, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.begin(ctx, "GetSnapshot"); err != nil {
		return backend.Snapshot{}, err
	}
	if s := k.snapshots[id]; s != nil {
		return *s, nil
	}
	return backend.Snapshot{}, fmt.Errorf("snapshot %s: %w", id, errdefs.ErrNotFound)
}

// ListSnapshots implements backend.Snapshots.
func (k *Keeper) ListSnapshots(ctx context.Context, volume, after string, limit int) ([]backend.Snapshot, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.begin(ctx, "ListSnapshots"); err != nil {
		return nil, err
	}
	var out []backend.Snapshot
	for _, id := range slices.Sorted(maps.Keys(k.snapshots)) {
		s := k.snapshots[id]
		if id > after && (volume == "" || s.Volume == volume) && (limit <= 0 || len(out) < limit) {
			out = append(out, *s)
		}
	}
	return out, nil
}

func (k *Keeper) connection(v *fakeVolume) backend.Connection {
	c := backend.Connection{SizeBytes: v.SizeBytes, Owner: k.Owner, OperatorOwned: k.Owner == ""}
	if v.Snapshot == "" && v.Parent == "" {
		c.Format = record.FormatBlank
	}
	if k.Dir != "" {
		c.Source.File = &record.File{Path: k.path(v.ID)}
		return c
	}
	c.Source.RBD = &record.RBD{Pool: "volumes", Image: v.ID, Monitors: []string{"[::1]:6789"}, User: "fake"}
	c.Secrets = map[string][]byte{record.SecretKey: []byte("c2VjcmV0")}
	return c
}

// Attach implements backend.Attachments.
func (a Attached) Attach(ctx context.Context, at backend.Attach) (backend.Connection, error) {
	k := a.Keeper
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.begin(ctx, "Attach"); err != nil {
		return backend.Connection{}, err
	}
	v, err := k.get(at.Volume)
	if err != nil {
		return backend.Connection{}, err
	}
	if k.Nodes != nil && !slices.Contains(k.Nodes, at.Node) {
		return backend.Connection{}, fmt.Errorf("node %s: %w", at.Node, errdefs.ErrNotFound)
	}
	if was, ok := v.attached[at.Node]; ok && was != at {
		return backend.Connection{}, fmt.Errorf("volume %s is attached to node %s with readOnly %t: %w", v.ID, at.Node, was.ReadOnly, errdefs.ErrAlreadyExists)
	} else if !ok && len(v.attached) > 0 && !at.Shared {
		return backend.Connection{}, fmt.Errorf("volume %s is attached to node %s: %w", v.ID, v.Node, errdefs.ErrFailedPrecondition)
	}
	v.attached[at.Node] = at
	v.where()
	c := k.connection(v)
	c.Attachment, c.ReadOnly, c.Shared = v.ID+"@"+at.Node, at.ReadOnly, at.Shared
	return c, nil
}

// Detach implements backend.Attachments.
func (a Attached) Detach(ctx context.Context, volume, node string) error {
	k := a.Keeper
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.begin(ctx, "Detach"); err != nil {
		return err
	}
	v := k.volumes[volume]
	if v == nil {
		return nil
	}
	if node == "" {
		clear(v.attached)
	}
	delete(v.attached, node)
	v.where()
	return nil
}

// where tells which nodes have it.
func (v *fakeVolume) where() {
	v.Node, v.Others = "", nil
	if nodes := slices.Sorted(maps.Keys(v.attached)); len(nodes) > 0 {
		v.Node, v.Others = nodes[0], nodes[1:]
	}
}

// Connect implements backend.Files.
func (n Near) Connect(ctx context.Context, volume string) (backend.Connection, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := n.begin(ctx, "Connect"); err != nil {
		return backend.Connection{}, err
	}
	v, err := n.get(volume)
	if err != nil {
		return backend.Connection{}, err
	}
	return n.connection(v), nil
}
