package local

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/volume/backend"
)

// TopologyKey is the segment that says which node a volume is on.
const TopologyKey = "topology.block.hypernetes.io/node"

const (
	mebibyte = 1 << 20
	// MinBytes is the smallest volume: an ext4 of less has hardly any room.
	MinBytes = mebibyte
	// MaxBytes is the largest.
	MaxBytes = 16 << 40
)

const (
	// patience is how long a call waits for a node if its own deadline does not say.
	patience = time.Minute
	// look is how often it looks.
	look = 100 * time.Millisecond
)

// Keeper answers for all nodes, by their objects.
type Keeper struct{ client client.Client }

var (
	_ backend.Volumes   = (*Keeper)(nil)
	_ backend.Capacity  = (*Keeper)(nil)
	_ backend.Snapshots = (*Keeper)(nil)
)

// NewKeeper uses a client that does not cache.
func NewKeeper(c client.Client) *Keeper { return &Keeper{client: c} }

// ID of a LocalVolume or LocalSnapshot: its UID makes it another than that of an object
// of the same name made later.
func ID(o client.Object) string { return o.GetName() + "." + string(o.GetUID()) }

// nameOf is the name in an ID.
func nameOf(id string) string { return id[:max(0, strings.LastIndexByte(id, '.'))] }

var plainName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

// objectName is the name of the object of a volume that is asked for by name.
func objectName(name string) string {
	if plainName.MatchString(name) {
		return name
	}
	sum := sha256.Sum256([]byte(name))
	return "x-" + hex.EncodeToString(sum[:16])
}

// Create implements backend.Volumes.
func (k *Keeper) Create(ctx context.Context, c backend.Create) (backend.Volume, error) {
	limits, err := chosen(c)
	if err != nil {
		return backend.Volume{}, err
	}
	if c.MultiAttach {
		return backend.Volume{}, fmt.Errorf("access mode: a local volume is on one node, no other can have it: %w", errdefs.ErrInvalidArgument)
	}
	bytes, err := size(c.MinBytes, c.MaxBytes)
	if err != nil {
		return backend.Volume{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	v := &v1alpha1.LocalVolume{}
	err = k.client.Get(ctx, client.ObjectKey{Name: objectName(c.Name)}, v)
	if apierrors.IsNotFound(err) {
		v, err = k.begin(ctx, c, bytes, limits)
	}
	if err != nil {
		return backend.Volume{}, apiError(err)
	}
	if err := compatible(v, c); err != nil {
		return backend.Volume{}, err
	}
	for {
		switch {
		case !v.DeletionTimestamp.IsZero():
			return backend.Volume{}, fmt.Errorf("volume %s is being deleted: %w", v.Name, errdefs.ErrUnavailable)
		case v.Status.Phase == v1alpha1.LocalReady:
			return volumeOf(v), nil
		case v.Status.Phase == v1alpha1.LocalFailed:
			// Another try begins anew, perhaps on another node.
			if err := k.client.Delete(ctx, v, client.Preconditions{UID: &v.UID}); client.IgnoreNotFound(err) != nil {
				return backend.Volume{}, apiError(err)
			}
			return backend.Volume{}, failure(v.Spec.Node, v.Status.Reason, v.Status.Message)
		}
		if err := wait(ctx, v.Spec.Node, "has not made the volume yet"); err != nil {
			return backend.Volume{}, err
		}
		if err := k.client.Get(ctx, client.ObjectKeyFromObject(v), v); err != nil {
			return backend.Volume{}, apiError(err)
		}
	}
}

// begin writes the object of a new volume.
func (k *Keeper) begin(ctx context.Context, c backend.Create, bytes int64, limits *v1alpha1.LocalThrottle) (*v1alpha1.LocalVolume, error) {
	v := &v1alpha1.LocalVolume{
		ObjectMeta: metav1.ObjectMeta{Name: objectName(c.Name), Finalizers: []string{v1alpha1.FinalizerLocal}},
		Spec:       v1alpha1.LocalVolumeSpec{Name: c.Name, SizeBytes: bytes, Throttle: limits},
	}
	if c.Namespace != "" && c.Claim != "" {
		v.Spec.Claim = c.Namespace + "/" + c.Claim
	}
	switch {
	case c.Snapshot != "":
		s, err := k.snapshot(ctx, c.Snapshot)
		if err != nil {
			return nil, err
		}
		if s.Status.Phase != v1alpha1.LocalReady {
			return nil, fmt.Errorf("snapshot %s is not ready: %w", c.Snapshot, errdefs.ErrUnavailable)
		}
		if bytes, err = atLeast(s.Status.SizeBytes, bytes, c, "snapshot "+c.Snapshot); err != nil {
			return nil, err
		}
		v.Spec.Node, v.Spec.SizeBytes, v.Spec.Source = s.Spec.Node, bytes, &v1alpha1.LocalSource{Snapshot: c.Snapshot}
	case c.Parent != "":
		p, err := k.volume(ctx, c.Parent)
		if err != nil {
			return nil, err
		}
		if bytes, err = atLeast(p.Status.SizeBytes, bytes, c, "volume "+c.Parent); err != nil {
			return nil, err
		}
		v.Spec.Node, v.Spec.SizeBytes, v.Spec.Source = p.Spec.Node, bytes, &v1alpha1.LocalSource{Volume: c.Parent}
	default:
		node, err := k.place(ctx, c.Topologies, bytes)
		if err != nil {
			return nil, err
		}
		v.Spec.Node = node
	}
	if !reaches(c.Topologies, v.Spec.Node) {
		return nil, fmt.Errorf("the source is on node %s, and local volumes do not move: the Pod must run there: %w", v.Spec.Node, errdefs.ErrResourceExhausted)
	}
	err := k.client.Create(ctx, v)
	if apierrors.IsAlreadyExists(err) {
		err = k.client.Get(ctx, client.ObjectKeyFromObject(v), v)
	}
	return v, err
}

// size chooses one: whole MiB where that is allowed.
func size(least, most int64) (int64, error) {
	switch {
	case least > MaxBytes:
		return 0, fmt.Errorf("size: %d bytes: a local volume has at most %d (16Ti): ask for less: %w", least, int64(MaxBytes), errdefs.ErrOutOfRange)
	case most > 0 && (most < MinBytes || least > most):
		return 0, fmt.Errorf("size: %d to %d bytes: a local volume has at least %d (1Mi): ask for more: %w", least, most, int64(MinBytes), errdefs.ErrOutOfRange)
	}
	least = max(least, MinBytes)
	for _, unit := range []int64{mebibyte, 4096, 512} {
		if n := (least + unit - 1) / unit * unit; most <= 0 || n <= most {
			return n, nil
		}
	}
	return 0, fmt.Errorf("size: no multiple of 512 bytes is between %d and %d: %w", least, most, errdefs.ErrOutOfRange)
}

// atLeast is the size of a copy: at least the source's.
func atLeast(source, asked int64, c backend.Create, what string) (int64, error) {
	if asked >= source {
		return asked, nil
	}
	return 0, fmt.Errorf("size: %d bytes: %s has %d, and a copy is not smaller: %w", c.MinBytes, what, source, errdefs.ErrOutOfRange)
}

// place chooses the first preferred node with room, or the one with the most.
func (k *Keeper) place(ctx context.Context, topologies []map[string]string, bytes int64) (string, error) {
	stores := &v1alpha1.LocalStoreList{}
	if err := k.client.List(ctx, stores); err != nil {
		return "", err
	}
	slices.SortFunc(stores.Items, func(a, b v1alpha1.LocalStore) int {
		if a.Status.AvailableBytes != b.Status.AvailableBytes {
			return int(min(1, max(-1, b.Status.AvailableBytes-a.Status.AvailableBytes)))
		}
		return strings.Compare(a.Name, b.Name)
	})
	available := map[string]int64{}
	var order []string
	for _, s := range stores.Items {
		available[s.Name] = s.Status.AvailableBytes
		order = append(order, s.Name)
	}
	if topologies != nil {
		order = nil
		for _, t := range topologies {
			order = append(order, t[TopologyKey])
		}
	}
	var tried []string
	for _, node := range order {
		free, known := available[node]
		if known && free >= bytes {
			return node, nil
		}
		if !known {
			tried = append(tried, fmt.Sprintf("node %s has no store of local volumes (yet)", node))
		} else {
			tried = append(tried, fmt.Sprintf("node %s has %d bytes left", node, free))
		}
	}
	if len(tried) == 0 {
		return "", fmt.Errorf("no node keeps local volumes (is h8s-csi-node running?): %w", errdefs.ErrUnavailable)
	}
	return "", fmt.Errorf("no room for %d bytes: %s: %w", bytes, strings.Join(tried, "; "), errdefs.ErrResourceExhausted)
}

func reaches(topologies []map[string]string, node string) bool {
	return topologies == nil || slices.ContainsFunc(topologies, func(t map[string]string) bool {
		at, ok := t[TopologyKey]
		return !ok || at == node
	})
}

// compatible checks that a volume which is there already is what is asked for.
func compatible(v *v1alpha1.LocalVolume, c backend.Create) error {
	var was v1alpha1.LocalSource
	if v.Spec.Source != nil {
		was = *v.Spec.Source
	}
	switch {
	case v.Spec.Name != c.Name:
		return fmt.Errorf("volume %s is named %q: %w", v.Name, v.Spec.Name, errdefs.ErrAlreadyExists)
	case was != v1alpha1.LocalSource{Volume: c.Parent, Snapshot: c.Snapshot}:
		return fmt.Errorf("volume %s is there and has another source: %w", c.Name, errdefs.ErrAlreadyExists)
	case v.Spec.SizeBytes < c.MinBytes || (c.MaxBytes > 0 && v.Spec.SizeBytes > c.MaxBytes):
		return fmt.Errorf("volume %s is there and has %d bytes, not %d to %d: %w", c.Name, v.Spec.SizeBytes, c.MinBytes, c.MaxBytes, errdefs.ErrAlreadyExists)
	case !reaches(c.Topologies, v.Spec.Node):
		return fmt.Errorf("volume %s is there, on node %s: %w", c.Name, v.Spec.Node, errdefs.ErrAlreadyExists)
	}
	return nil
}

func volumeOf(v *v1alpha1.LocalVolume) backend.Volume {
	out := backend.Volume{
		ID: ID(v), Name: v.Spec.Name, SizeBytes: v.Status.SizeBytes, Topology: map[string]string{TopologyKey: v.Spec.Node},
	}
	if s := v.Spec.Source; s != nil {
		out.Snapshot, out.Parent = s.Snapshot, s.Volume
	}
	if v.Status.Phase == v1alpha1.LocalFailed {
		out.Degraded = v.Status.Message
	}
	return out
}

// volume is the object of an ID. Errors: errdefs.ErrNotFound.
func (k *Keeper) volume(ctx context.Context, id string) (*v1alpha1.LocalVolume, error) {
	v := &v1alpha1.LocalVolume{}
	if err := k.get(ctx, id, v); err != nil {
		return nil, fmt.Errorf("volume %.140q: %w", id, err)
	}
	return v, nil
}

func (k *Keeper) snapshot(ctx context.Context, id string) (*v1alpha1.LocalSnapshot, error) {
	s := &v1alpha1.LocalSnapshot{}
	if err := k.get(ctx, id, s); err != nil {
		return nil, fmt.Errorf("snapshot %.140q: %w", id, err)
	}
	return s, nil
}

func (k *Keeper) get(ctx context.Context, id string, o client.Object) error {
	if checkID(id) != nil || !plainName.MatchString(nameOf(id)) {
		return errdefs.ErrNotFound // not one of ours
	}
	if err := k.client.Get(ctx, client.ObjectKey{Name: nameOf(id)}, o); err != nil {
		return apiError(err)
	}
	if ID(o) != id {
		return errdefs.ErrNotFound
	}
	return nil
}

// Delete implements backend.Volumes.
func (k *Keeper) Delete(ctx context.Context, id string) error {
	v, err := k.volume(ctx, id)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	return k.delete(ctx, v, v.Spec.Node, func() error {
		if v.Status.Reason == v1alpha1.LocalInUse {
			return fmt.Errorf("volume %s is in use: %s: %w", id, v.Status.Message, errdefs.ErrFailedPrecondition)
		}
		return nil
	})
}

// delete removes an object and waits until its node has let it go. busy is why it might
// not.
func (k *Keeper) delete(ctx context.Context, o client.Object, node string, busy func() error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	uid := o.GetUID()
	if o.GetDeletionTimestamp().IsZero() {
		if err := k.client.Delete(ctx, o, client.Preconditions{UID: &uid}); err != nil {
			return apiError(client.IgnoreNotFound(err))
		}
	}
	for {
		err := k.client.Get(ctx, client.ObjectKeyFromObject(o), o)
		if apierrors.IsNotFound(err) || (err == nil && o.GetUID() != uid) {
			return nil
		}
		if err != nil {
			return apiError(err)
		}
		if !o.GetDeletionTimestamp().IsZero() {
			if err := busy(); err != nil {
				return err
			}
			if gone, err := k.forget(ctx, o, node); gone || err != nil {
				return err
			}
		}
		if err := wait(ctx, node, "has not removed it yet"); err != nil {
			return err
		}
	}
}

// forget lets an object go whose node is no node of the cluster any more: nobody else
// would.
func (k *Keeper) forget(ctx context.Context, o client.Object, node string) (bool, error) {
	err := k.client.Get(ctx, client.ObjectKey{Name: node}, &corev1.Node{})
	if !apierrors.IsNotFound(err) {
		return false, apiError(err)
	}
	before := o.DeepCopyObject().(client.Object)
	controllerutil.RemoveFinalizer(o, v1alpha1.FinalizerLocal)
	err = k.client.Patch(ctx, o, client.MergeFrom(before))
	return true, apiError(client.IgnoreNotFound(err))
}

// Get implements backend.Volumes.
func (k *Keeper) Get(ctx context.Context, id string) (backend.Volume, error) {
	v, err := k.volume(ctx, id)
	if err != nil {
		return backend.Volume{}, err
	}
	return volumeOf(v), nil
}

// List implements backend.Volumes.
func (k *Keeper) List(ctx context.Context, after string, limit int) ([]backend.Volume, error) {
	l := &v1alpha1.LocalVolumeList{}
	if err := k.client.List(ctx, l); err != nil {
		return nil, apiError(err)
	}
	var out []backend.Volume
	for i := range l.Items {
		if v := volumeOf(&l.Items[i]); v.SizeBytes > 0 && l.Items[i].DeletionTimestamp.IsZero() {
			out = append(out, v)
		}
	}
	return page(out, func(v backend.Volume) string { return v.ID }, after, limit), nil
}

// page sorts and cuts a list.
func page[T any](all []T, id func(T) string, after string, limit int) []T {
	slices.SortFunc(all, func(a, b T) int { return strings.Compare(id(a), id(b)) })
	all = slices.DeleteFunc(all, func(t T) bool { return id(t) <= after })
	if limit > 0 && len(all) > limit {
		all = all[:limit]
	}
	return all
}

// Expand implements backend.Volumes.
func (k *Keeper) Expand(ctx context.Context, id string, bytes int64) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	v, err := k.volume(ctx, id)
	if err != nil {
		return 0, err
	}
	want, err := size(bytes, 0)
	if err != nil {
		return 0, err
	}
	if v.Spec.SizeBytes < want {
		before := v.DeepCopy()
		v.Spec.SizeBytes = want
		if err := k.client.Patch(ctx, v, client.MergeFrom(before)); err != nil {
			return 0, apiError(err)
		}
	}
	for v.Status.SizeBytes < want {
		if v.Status.Reason != "" && (v.Status.ObservedBytes >= want || v.Status.Phase == v1alpha1.LocalFailed) {
			return 0, failure(v.Spec.Node, v.Status.Reason, v.Status.Message)
		}
		if err := wait(ctx, v.Spec.Node, "has not grown the volume yet"); err != nil {
			return 0, err
		}
		if v, err = k.volume(ctx, id); err != nil {
			return 0, err
		}
	}
	return v.Status.SizeBytes, nil
}

// Capacity implements backend.Capacity.
func (k *Keeper) Capacity(ctx context.Context, _, topology map[string]string) (available, largest int64, err error) {
	l := &v1alpha1.LocalStoreList{}
	if err := k.client.List(ctx, l); err != nil {
		return 0, 0, apiError(err)
	}
	at, one := topology[TopologyKey]
	known := !one
	for _, s := range l.Items {
		if one && at != s.Name {
			continue
		}
		known = true
		available += s.Status.AvailableBytes
		largest = max(largest, s.Status.AvailableBytes)
	}
	if !known {
		// Asked again soon; nothing would be believed for a while.
		return 0, 0, fmt.Errorf("node %s has not said yet what it has for local volumes: %w", at, errdefs.ErrUnavailable)
	}
	return available, min(largest, MaxBytes), nil
}

// CreateSnapshot implements backend.Snapshots.
func (k *Keeper) CreateSnapshot(ctx context.Context, name, volume string, parameters map[string]string) (backend.Snapshot, error) {
	for p := range parameters {
		return backend.Snapshot{}, fmt.Errorf("parameters: %q: snapshots of local volumes have none: %w", p, errdefs.ErrInvalidArgument)
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	s := &v1alpha1.LocalSnapshot{}
	err := k.client.Get(ctx, client.ObjectKey{Name: objectName(name)}, s)
	if apierrors.IsNotFound(err) {
		var v *v1alpha1.LocalVolume
		if v, err = k.volume(ctx, volume); err != nil {
			return backend.Snapshot{}, err
		}
		s = &v1alpha1.LocalSnapshot{
			ObjectMeta: metav1.ObjectMeta{Name: objectName(name), Finalizers: []string{v1alpha1.FinalizerLocal}},
			Spec:       v1alpha1.LocalSnapshotSpec{Name: name, Node: v.Spec.Node, Volume: volume},
		}
		if err = k.client.Create(ctx, s); apierrors.IsAlreadyExists(err) {
			err = k.client.Get(ctx, client.ObjectKeyFromObject(s), s)
		}
	}
	if err != nil {
		return backend.Snapshot{}, apiError(err)
	}
	if s.Spec.Name != name || s.Spec.Volume != volume {
		return backend.Snapshot{}, fmt.Errorf("snapshot %s is there, and of volume %s: %w", name, s.Spec.Volume, errdefs.ErrAlreadyExists)
	}
	for {
		switch {
		case !s.DeletionTimestamp.IsZero():
			return backend.Snapshot{}, fmt.Errorf("snapshot %s is being deleted: %w", name, errdefs.ErrUnavailable)
		case s.Status.Phase == v1alpha1.LocalReady:
			return snapshotOf(s), nil
		case s.Status.Phase == v1alpha1.LocalFailed:
			if err := k.client.Delete(ctx, s, client.Preconditions{UID: &s.UID}); client.IgnoreNotFound(err) != nil {
				return backend.Snapshot{}, apiError(err)
			}
			return backend.Snapshot{}, failure(s.Spec.Node, s.Status.Reason, s.Status.Message)
		}
		if err := wait(ctx, s.Spec.Node, "has not made the snapshot yet"); err != nil {
			return backend.Snapshot{}, err
		}
		if err := k.client.Get(ctx, client.ObjectKeyFromObject(s), s); err != nil {
			return backend.Snapshot{}, apiError(err)
		}
	}
}

func snapshotOf(s *v1alpha1.LocalSnapshot) backend.Snapshot {
	out := backend.Snapshot{
		ID: ID(s), Name: s.Spec.Name, Volume: s.Spec.Volume, SizeBytes: s.Status.SizeBytes, Ready: s.Status.Phase == v1alpha1.LocalReady,
	}
	if s.Status.CreatedAt != nil {
		out.CreatedAt = s.Status.CreatedAt.Unix()
	}
	return out
}

// DeleteSnapshot implements backend.Snapshots.
func (k *Keeper) DeleteSnapshot(ctx context.Context, id string) error {
	s, err := k.snapshot(ctx, id)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	return k.delete(ctx, s, s.Spec.Node, func() error { return nil })
}

// GetSnapshot implements backend.Snapshots.
func (k *Keeper) GetSnapshot(ctx context.Context, id string) (backend.Snapshot, error) {
	s, err := k.snapshot(ctx, id)
	if err != nil {
		return backend.Snapshot{}, err
	}
	return snapshotOf(s), nil
}

// ListSnapshots implements backend.Snapshots.
func (k *Keeper) ListSnapshots(ctx context.Context, volume, after string, limit int) ([]backend.Snapshot, error) {
	l := &v1alpha1.LocalSnapshotList{}
	if err := k.client.List(ctx, l); err != nil {
		return nil, apiError(err)
	}
	var out []backend.Snapshot
	for i := range l.Items {
		s := snapshotOf(&l.Items[i])
		if (volume == "" || s.Volume == volume) && s.CreatedAt != 0 && l.Items[i].DeletionTimestamp.IsZero() {
			out = append(out, s)
		}
	}
	return page(out, func(s backend.Snapshot) string { return s.ID }, after, limit), nil
}

// wait lets some time pass, or says that a node is late.
func wait(ctx context.Context, node, what string) error {
	select {
	case <-ctx.Done():
		return fmt.Errorf("node %s %s (is it up, and its h8s-csi-node running?): %w", node, what, errdefs.ErrUnavailable)
	case <-time.After(look):
		return nil
	}
}

// failure is what a node said.
func failure(node, reason, message string) error {
	var class error = errdefs.ErrInternal
	switch reason {
	case v1alpha1.LocalNoSpace:
		class = errdefs.ErrResourceExhausted
	case v1alpha1.LocalInUse:
		class = errdefs.ErrFailedPrecondition
	case v1alpha1.LocalInvalid:
		class = errdefs.ErrNotFound
	}
	return fmt.Errorf("node %s: %s: %w", node, message, class)
}

// apiError gives errors of the API server their class.
func apiError(err error) error {
	var class error = errdefs.ErrUnavailable
	switch {
	case err == nil:
		return nil
	case errdefs.IsNotFound(err), errdefs.IsUnavailable(err), errdefs.IsResourceExhausted(err), errdefs.IsInvalidArgument(err),
		errdefs.IsOutOfRange(err), errdefs.IsFailedPrecondition(err), errdefs.IsAlreadyExists(err):
		return err
	case apierrors.IsNotFound(err):
		class = errdefs.ErrNotFound
	case apierrors.IsInvalid(err), apierrors.IsBadRequest(err), apierrors.IsForbidden(err):
		// Our own fault, or rights that are yet to be given: a claim is not to blame, and
		// would not be tried again if it were.
		class = errdefs.ErrInternal
	}
	return fmt.Errorf("%w: %w", err, class)
}
