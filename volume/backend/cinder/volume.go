package cinder

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/network/openstack"
	"github.com/hypernetes/hypernetes/volume/backend"
)

// Parameters of a StorageClass, and of a VolumeAttributesClass.
const (
	paramType = "type"
	paramZone = "availability"
)

// maxGiB bounds sizes: Cinder keeps them in 32 bits.
const maxGiB = 1 << 30

// gibs is how large a volume must be, in Cinder's GiB.
func gibs(least, most int64) (int64, error) {
	n := (least-1)/gib + 1
	if least <= 0 {
		n = 1
	}
	if n > maxGiB || most > 0 && n > most/gib {
		return 0, fmt.Errorf("size of %d to %d bytes: Cinder's volumes are whole GiB, up to %d: ask for a size that has one in it: %w", least, most, maxGiB, errdefs.ErrOutOfRange)
	}
	return n, nil
}

// parameters of a class that are known, or an error that names the others.
func parameters(have map[string]string, known ...string) error {
	var odd []string
	for k := range have {
		if !slices.Contains(known, k) {
			odd = append(odd, k)
		}
	}
	if len(odd) == 0 {
		return nil
	}
	slices.Sort(odd)
	return fmt.Errorf("parameter %.128q is not known: the class may have %s: %w", odd[0], strings.Join(known, ", "), errdefs.ErrInvalidArgument)
}

// bound makes a text fit for Cinder's metadata.
func bound(s string) string {
	return s[:min(len(s), 255)]
}

// Create implements backend.Volumes.
func (b *Backend) Create(ctx context.Context, r backend.Create) (backend.Volume, error) {
	none := backend.Volume{}
	if err := parameters(r.Parameters, paramType, paramZone); err != nil {
		return none, err
	}
	if err := parameters(r.Mutable, paramType); err != nil {
		return none, err
	}
	if r.Name == "" || r.Snapshot != "" && r.Parent != "" {
		return none, fmt.Errorf("name %q, from snapshot %q and volume %q: want a name and one of them at most: %w", r.Name, r.Snapshot, r.Parent, errdefs.ErrInvalidArgument)
	}
	size, err := gibs(r.MinBytes, r.MaxBytes)
	if err != nil {
		return none, err
	}
	project, err := b.projectFor(ctx, r.Namespace)
	if err != nil {
		return none, err
	}
	release, err := b.busy.take(ctx, "volume "+r.Name)
	if err != nil {
		return none, err
	}
	defer release()
	c, err := b.maker(ctx, project)
	if err != nil {
		return none, err
	}
	v, err := b.named(ctx, c, project, r.Name)
	if err != nil {
		return none, err
	}
	if v == nil {
		if v, err = b.make(ctx, c, project, size, r); err != nil {
			return none, err
		}
	}
	// A copy that has not grown yet is one that was asked for so large.
	grows := v.Metadata[metaGiB] == strconv.FormatInt(size, 10)
	if v.Size < size && v.Status != creating && !grows || r.MaxBytes > 0 && v.Size*gib > r.MaxBytes || v.Snapshot != r.Snapshot || v.Parent != r.Parent {
		return none, fmt.Errorf("volume %s is called %q already, has %d GiB and was made from snapshot %q, volume %q: ask by another name: %w",
			v.ID, r.Name, v.Size, v.Snapshot, v.Parent, errdefs.ErrAlreadyExists)
	}
	out, err := b.made(ctx, c, v, r)
	if err == nil && out.SizeBytes < size*gib && grows {
		out.SizeBytes, err = b.Expand(ctx, out.ID, size*gib)
	}
	return out, err
}

// named is the volume of ours that has that name in a project, the eldest if several were
// made at once; nil if there is none.
func (b *Backend) named(ctx context.Context, c *openstack.Client, project, name string) (*volume, error) {
	all, err := openstack.List[volume](ctx, c, volumesFull, query("name", name))
	if err != nil {
		return nil, explain(err, "look for volume "+name)
	}
	all = slices.DeleteFunc(all, func(v volume) bool {
		return v.Metadata[metaCluster] != b.o.Cluster || v.Metadata[metaName] != name || v.Project != project || v.Status == deleting
	})
	if len(all) == 0 {
		return nil, nil
	}
	v := slices.MinFunc(all, func(x, y volume) int {
		return cmp.Or(cmp.Compare(x.CreatedAt, y.CreatedAt), cmp.Compare(x.ID, y.ID))
	})
	return &v, nil
}

func (b *Backend) make(ctx context.Context, c *openstack.Client, project string, size int64, r backend.Create) (*volume, error) {
	meta := map[string]string{metaCluster: b.o.Cluster, metaName: r.Name, metaNamespace: bound(r.Namespace), metaClaim: bound(r.Claim)}
	body := map[string]any{
		"name": r.Name, "size": size, "description": "made by Hypernetes for " + bound(r.Namespace+"/"+r.Claim), "metadata": meta,
	}
	// Some drivers, NFS for one, copy to what says to be larger than it is, and refuse to
	// attach that ever after. So a copy is made as large as its original, and grows.
	as := func(original int64) {
		if original < size {
			body["size"], meta[metaGiB] = original, strconv.FormatInt(size, 10)
		}
	}
	if t := cmp.Or(r.Mutable[paramType], r.Parameters[paramType]); t != "" {
		body["volume_type"] = t
	}
	if z := r.Parameters[paramZone]; z != "" {
		body["availability_zone"] = z
	}
	// A copy is of its original's project: an account with the role admin would see others'.
	switch {
	case r.Snapshot != "":
		s, _, err := b.findSnapshot(ctx, r.Snapshot)
		if err == nil && s.Project != project {
			err = fmt.Errorf("snapshot %s is of project %s, the claim's namespace of project %s: %w", s.ID, s.Project, project, errdefs.ErrNotFound)
		}
		if err != nil {
			return nil, err
		}
		if s.Status != available {
			return nil, fmt.Errorf("snapshot %s is %s: it can be restored from when it is %s: %w", s.ID, s.Status, available, errdefs.ErrFailedPrecondition)
		}
		if size < s.Size {
			return nil, fmt.Errorf("size of %d GiB: snapshot %s is of a volume of %d GiB: ask for as much: %w", size, s.ID, s.Size, errdefs.ErrOutOfRange)
		}
		body["snapshot_id"] = s.ID
		as(s.Size)
	case r.Parent != "":
		p, _, err := b.find(ctx, r.Parent)
		if err == nil && p.Project != project {
			err = fmt.Errorf("volume %s is of project %s, the claim's namespace of project %s: %w", p.ID, p.Project, project, errdefs.ErrNotFound)
		}
		if err != nil {
			return nil, err
		}
		if size < p.Size {
			return nil, fmt.Errorf("size of %d GiB: volume %s has %d GiB: ask for as much: %w", size, p.ID, p.Size, errdefs.ErrOutOfRange)
		}
		body["source_volid"] = p.ID
		as(p.Size)
	}
	v, err := openstack.Put[volume](ctx, c, volumes, "", body)
	if err != nil {
		if body["source_volid"] != nil {
			err = state(err)
		}
		return nil, explain(err, "make volume "+r.Name)
	}
	if v.Project == "" {
		v.Project = project
	}
	// Another controller may have made it at the same time: the eldest stays.
	first, err := b.named(ctx, c, project, r.Name)
	if err != nil {
		return nil, err
	}
	if first != nil && first.ID != v.ID {
		return first, b.remove(ctx, c, v.ID)
	}
	return v, nil
}

// made waits until a volume can be used.
func (b *Backend) made(ctx context.Context, c *openstack.Client, v *volume, r backend.Create) (backend.Volume, error) {
	err := b.poll(ctx, "volume "+v.ID+" of name "+r.Name, func(ctx context.Context) (bool, error) {
		now, err := openstack.Get[volume](ctx, c, volumes, v.ID)
		switch {
		case err != nil:
			return false, explain(err, "volume "+v.ID)
		case now == nil:
			return false, fmt.Errorf("volume %s of name %s was deleted while it was made: %w", v.ID, r.Name, errdefs.ErrUnavailable)
		}
		v = now
		if v.Status != "error" {
			return v.Status == available || v.Status == inUse || v.Status == reserved, nil
		}
		// Nothing is in it: the next attempt begins anew.
		text := why(ctx, c, v.ID)
		return false, errors.Join(fmt.Errorf("volume %s of name %s, type %q, could not be made: %s: %w", v.ID, r.Name, v.Type, text, errdefs.ErrResourceExhausted),
			b.remove(ctx, c, v.ID))
	})
	if err != nil {
		return backend.Volume{}, err
	}
	if r.MultiAttach && !v.MultiAttach {
		return backend.Volume{}, errors.Join(fmt.Errorf("parameter %s: volumes of type %q cannot be attached several times: name one whose extra specs have multiattach=\"<is> True\": %w",
			paramType, v.Type, errdefs.ErrInvalidArgument), b.remove(ctx, c, v.ID))
	}
	return b.seen(v), nil
}

// seen is a volume as package backend has it.
func (b *Backend) seen(v *volume) backend.Volume {
	out := backend.Volume{ID: v.ID, Name: v.Metadata[metaName], SizeBytes: v.Size * gib, Snapshot: v.Snapshot, Parent: v.Parent}
	for _, a := range v.Attachments {
		switch node, ok := b.nodeOf(a.Device); {
		case !ok:
		case out.Node == "":
			out.Node = node
		default:
			out.Others = append(out.Others, node)
		}
	}
	if broken(v.Status) {
		out.Degraded = "Cinder says its status is " + v.Status
	}
	return out
}

// Delete implements backend.Volumes.
func (b *Backend) Delete(ctx context.Context, id string) error {
	release, err := b.busy.take(ctx, id)
	if err != nil {
		return err
	}
	defer release()
	v, c, err := b.find(ctx, id)
	if errdefs.IsNotFound(err) {
		return nil
	} else if err != nil {
		return err
	}
	switch v.Status {
	case inUse, reserved, "attaching", detaching:
		at := b.seen(v).Node
		if at == "" {
			at = "something that is not this cluster's"
		}
		return fmt.Errorf("volume %s is %s, at %s: it can be deleted when it is detached: %w", id, v.Status, at, errdefs.ErrFailedPrecondition)
	}
	return b.remove(ctx, c, id)
}

// remove deletes a volume and waits until it is gone.
func (b *Backend) remove(ctx context.Context, c *openstack.Client, id string) error {
	asked := false
	return b.poll(ctx, "delete volume "+id, func(ctx context.Context) (bool, error) {
		v, err := openstack.Get[volume](ctx, c, volumes, id)
		switch {
		case err != nil:
			return false, explain(err, "volume "+id)
		case v == nil:
			return true, nil
		case v.Status == deleting:
			asked = true
			return false, nil
		case asked && broken(v.Status):
			return false, fmt.Errorf("volume %s could not be deleted, its status is %s: %s: %w", id, v.Status, why(ctx, c, id), errdefs.ErrUnavailable)
		case asked:
			// Some drivers make it available again when something else needs it.
			return false, fmt.Errorf("volume %s was not deleted, its status is %s: %s: %w", id, v.Status, why(ctx, c, id), errdefs.ErrFailedPrecondition)
		case v.Status == "error_deleting":
			// It wants to be told by force; the operator's reset-state does as well.
			if err := act(ctx, c, volumes, id, "os-force_delete", map[string]any{}); err != nil {
				return false, explain(state(err), "delete volume "+id)
			}
			asked = true
			return false, nil
		}
		asked = true
		return false, explain(state(openstack.Remove(ctx, c, volumes, id, nil)), "delete volume "+id)
	})
}

// Get implements backend.Volumes.
func (b *Backend) Get(ctx context.Context, id string) (backend.Volume, error) {
	v, _, err := b.find(ctx, id)
	if err != nil {
		return backend.Volume{}, err
	}
	return b.seen(v), nil
}

// Belongs tells whether a volume is a project's. known is false if there is none of that
// ID, or, with a credential of profile openstack.Least, none in that project.
func Belongs(ctx context.Context, cloud *openstack.Cloud, id, project string) (own, known bool, err error) {
	c, err := cloud.Client(ctx, openstack.Volume, project)
	if err != nil {
		return false, false, explain(err, "Cinder")
	}
	v, err := openstack.Get[volume](ctx, c, volumes, id)
	if err != nil || v == nil {
		return false, false, explain(err, "volume "+id)
	}
	return v.Project == project, v.Project != "", nil
}

// List implements backend.Volumes: the cluster's own, and others that are attached here.
func (b *Backend) List(ctx context.Context, after string, limit int) ([]backend.Volume, error) {
	all, err := everywhere[volume](ctx, b, volumesFull, query())
	if err != nil {
		return nil, err
	}
	var out []backend.Volume
	for i := range all {
		v := &all[i]
		seen := b.seen(v)
		if v.Status != deleting && v.ID > after && (v.Metadata[metaCluster] == b.o.Cluster || seen.Node != "") {
			out = append(out, seen)
		}
	}
	slices.SortFunc(out, func(x, y backend.Volume) int { return strings.Compare(x.ID, y.ID) })
	if limit > 0 && len(out) > limit {
		out = out[:limit]
	}
	return out, nil
}

// Expand implements backend.Volumes.
func (b *Backend) Expand(ctx context.Context, id string, bytes int64) (int64, error) {
	size, err := gibs(bytes, 0)
	if err != nil {
		return 0, err
	}
	release, err := b.busy.take(ctx, id)
	if err != nil {
		return 0, err
	}
	defer release()
	v, c, err := b.find(ctx, id)
	if err != nil {
		return 0, err
	}
	if v.Status == errorExtending {
		if err := b.reset(ctx, c, v); err != nil {
			return 0, err
		}
	}
	asked := false
	err = b.poll(ctx, "grow volume "+id, func(ctx context.Context) (bool, error) {
		if asked {
			now, err := openstack.Get[volume](ctx, c, volumes, id)
			switch {
			case err != nil:
				return false, explain(err, "volume "+id)
			case now == nil:
				return false, fmt.Errorf("volume %s was deleted: %w", id, errdefs.ErrNotFound)
			}
			v = now
		}
		switch {
		case v.Status == errorExtending:
			text := why(ctx, c, id)
			return false, errors.Join(fmt.Errorf("volume %s could not grow and is as it was: %s. Some back ends, NFS for one, cannot while it is attached: %w",
				id, text, errdefs.ErrFailedPrecondition), b.reset(ctx, c, v))
		case v.Status == "extending":
			asked = true
			return false, nil
		case v.Size >= size:
			return true, nil
		case asked:
			return false, fmt.Errorf("volume %s did not grow, it has %d GiB and its status is %s: %s: %w", id, v.Size, v.Status, why(ctx, c, id), errdefs.ErrFailedPrecondition)
		case v.Status != available && v.Status != inUse:
			return false, fmt.Errorf("volume %s is %s: it can grow when it is %s or %s: %w", id, v.Status, available, inUse, errdefs.ErrFailedPrecondition)
		}
		asked = true
		return false, explain(state(act(ctx, c, volumes, id, "os-extend", map[string]any{"new_size": size})), "grow volume "+id)
	})
	return v.Size * gib, err
}

// reset gives a volume whose growing failed the status that it had before: in any other it
// could not be attached any more, and nothing of it has changed.
func (b *Backend) reset(ctx context.Context, c *openstack.Client, v *volume) error {
	to := available
	if len(v.Attachments) > 0 {
		to = inUse
	}
	if err := act(ctx, c, volumes, v.ID, "os-reset_status", map[string]any{"status": to}); err != nil {
		return fmt.Errorf("volume %s is %s and the cluster's account may not mend that: the cloud's operator does (openstack volume set --state %s %s): %v: %w",
			v.ID, v.Status, to, v.ID, err, errdefs.ErrFailedPrecondition)
	}
	v.Status = to
	return nil
}

// Modify implements backend.Mutable.
func (b *Backend) Modify(ctx context.Context, id string, params map[string]string) error {
	if err := parameters(params, paramType); err != nil {
		return err
	}
	want := params[paramType]
	release, err := b.busy.take(ctx, id)
	if err != nil {
		return err
	}
	defer release()
	v, c, err := b.find(ctx, id)
	if err != nil || want == "" || v.Type == want {
		return err
	}
	if v.Status != available && v.Status != inUse && v.Status != "retyping" {
		return fmt.Errorf("volume %s is %s: its type can change when it is %s or %s: %w", id, v.Status, available, inUse, errdefs.ErrFailedPrecondition)
	}
	if v.Status != "retyping" {
		// Never by moving its content: whoever has it open would go on writing to the old place.
		if err := act(ctx, c, volumes, id, "os-retype", map[string]any{"new_type": want, "migration_policy": "never"}); err != nil {
			if errdefs.IsNotFound(err) {
				err = fmt.Errorf("%v: %w", err, errdefs.ErrInvalidArgument)
			}
			return explain(err, fmt.Sprintf("change volume %s to type %q", id, want))
		}
	}
	return b.poll(ctx, "change the type of volume "+id, func(ctx context.Context) (bool, error) {
		v, err := openstack.Get[volume](ctx, c, volumes, id)
		switch {
		case err != nil:
			return false, explain(err, "volume "+id)
		case v == nil:
			return false, fmt.Errorf("volume %s was deleted: %w", id, errdefs.ErrNotFound)
		case v.Status == "retyping":
			return false, nil
		case v.Type != want:
			return false, fmt.Errorf("parameter %s: Cinder did not change volume %s to %q, which is of %q as before: %s: %w", paramType, id, want, v.Type, why(ctx, c, id), errdefs.ErrInvalidArgument)
		}
		return true, nil
	})
}

// Capacity implements backend.Capacity. Only an account that sees the pools knows.
func (b *Backend) Capacity(ctx context.Context, params, _ map[string]string) (available, largest int64, err error) {
	if err := parameters(params, paramType, paramZone); err != nil {
		return 0, 0, err
	}
	c, err := b.client(ctx, "")
	if err != nil {
		return 0, 0, err
	}
	backendName := ""
	if t := params[paramType]; t != "" {
		all, err := openstack.List[struct {
			resource
			Extra map[string]string `json:"extra_specs"`
		}](ctx, c, volumeTypes, query())
		if err != nil {
			return 0, 0, explain(err, "list Cinder's types")
		}
		i := slices.IndexFunc(all, func(x struct {
			resource
			Extra map[string]string `json:"extra_specs"`
		}) bool {
			return x.Name == t || x.ID == t
		})
		if i < 0 {
			return 0, 0, fmt.Errorf("parameter %s: Cinder has no type %.128q: %w", paramType, t, errdefs.ErrInvalidArgument)
		}
		backendName = all[i].Extra["volume_backend_name"]
	}
	all, err := openstack.List[struct {
		Capabilities struct {
			Backend string `json:"volume_backend_name"`
			// Free is a number, or the word infinite or unknown.
			Free any `json:"free_capacity_gb"`
		} `json:"capabilities"`
	}](ctx, c, pools, query("detail", "true"))
	if err != nil {
		return 0, 0, explain(err, "list Cinder's pools")
	}
	for _, p := range all {
		if backendName != "" && p.Capabilities.Backend != backendName {
			continue
		}
		var free int64
		switch f := p.Capabilities.Free.(type) {
		case float64:
			free = int64(min(max(f, 0), maxGiB)) * gib
		case string:
			free = maxGiB * gib
		}
		available = min(available, maxGiB*gib) + free
		largest = max(largest, free)
	}
	return available, largest, nil
}
