package cinder

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/hypernetes/hypernetes/network/openstack"
	"github.com/hypernetes/hypernetes/volume/backend"
	"github.com/hypernetes/hypernetes/volume/record"
)

// Use is what is known of a node's use of a volume.
type Use int

const (
	// InUse: the node has not said that it let go, and may be writing.
	InUse Use = iota
	// Released: the node itself said so, after its VM was gone.
	Released
	// Off: whoever runs the node says that it is off, or may be taken for it.
	Off
)

// Nodes tells of nodes.
type Nodes interface {
	Use(ctx context.Context, volume, node string) (Use, error)
	// Address of a node, "" if it has none.
	Address(ctx context.Context, node string) (string, error)
	// Wanted are the volumes that nodes are to have, by Pair.
	Wanted(ctx context.Context) (map[Pair]bool, error)
}

// Pair is a volume at a node.
type Pair struct{ Volume, Node string }

// Fence ends the access of clients of Ceph. A client is written as Ceph does: address,
// port, a slash and a number that is no other client's.
type Fence interface {
	// Clients that have an image open now.
	Clients(ctx context.Context, r record.RBD) ([]string, error)
	// Remember keeps clients with an image, under a name; Remembered returns them; Forget
	// drops them.
	Remember(ctx context.Context, r record.RBD, name string, clients []string) error
	Remembered(ctx context.Context, r record.RBD, name string) ([]string, error)
	Forget(ctx context.Context, r record.RBD, name string) error
	// Block refuses a client for years. It returns when the cluster has the order.
	Block(ctx context.Context, client string) error
}

// fence returns when a node cannot write to a volume any more, or cannot once the
// attachment is deleted. An error says what is missing.
//
// What the node said counts most: the kubelet reports a volume as in use from before the
// first VM has it until after our plugin let it go, which it does only when it has the
// lease, and so no VM and no storage daemon has it. Where the node did not say so, its
// clients are blocked, those that have the image
// open and those that were seen to have it: one that is cut off is not in Ceph's list after
// half a minute and writes again when it comes back, unless it is blocked.
func (b *Backend) fence(ctx context.Context, v *volume, a *attachment, node string) error {
	use, err := b.o.Nodes.Use(ctx, v.ID, node)
	if err != nil || use == Released {
		return err
	}
	in, err := parse(a.Info)
	if err != nil {
		return err
	}
	switch in.Type {
	case "rbd":
		return b.fenceRBD(ctx, v, a, in, node, use)
	case "iscsi":
		// The target forgets the initiator with the attachment, and its secret.
		return nil
	}
	if use == InUse {
		return fmt.Errorf("the node did not say that it let the volume go, and nothing but the node can keep it from writing to this kind (%s): %s: %w", in.Type, remedy(node, v.ID), errdefs.ErrFailedPrecondition)
	}
	return nil
}

// remedy is what an operator does.
func remedy(node, volume string) string {
	return fmt.Sprintf("if the node is off, say so: kubectl taint node %s node.kubernetes.io/out-of-service=nodeshutdown:NoExecute, or, if it is no Node any more, annotate the VolumeAttachment of volume %s with hypernetes.io/node-is-off=true", node, volume)
}

func (b *Backend) fenceRBD(ctx context.Context, v *volume, a *attachment, in *info, node string, use Use) error {
	if b.o.Fence == nil {
		if use == InUse {
			return fmt.Errorf("the node did not say that it let the volume go, and the cluster has no credential of Ceph's to shut it out with (ceph.conf of --cinder-config): %s: %w", remedy(node, v.ID), errdefs.ErrFailedPrecondition)
		}
		return nil
	}
	// Only the image counts here.
	var out connection
	if err := (translator{}).rbd(&info{Name: in.Name, Hosts: in.Hosts, Ports: in.Ports}, &out); err != nil {
		return err
	}
	image := *out.source.RBD
	condemned, err := b.o.Fence.Remembered(ctx, image, a.ID)
	if err != nil {
		return err
	}
	// Of a volume that is attached several times nobody knows whose the others are. Cinder
	// itself opens images for a moment; each time it is another client, so shutting that one
	// out harms that moment only.
	alone := len(v.Attachments) == 1
	if alone {
		now, err := b.o.Fence.Clients(ctx, image)
		if err != nil {
			return err
		}
		condemned = append(condemned, now...)
	}
	slices.Sort(condemned)
	condemned = slices.Compact(condemned)
	if use == InUse && len(condemned) == 0 {
		return fmt.Errorf("the node did not say that it let the volume go, and no client of its was ever seen at Ceph to shut it out: %s: %w", remedy(node, v.ID), errdefs.ErrFailedPrecondition)
	}
	for _, client := range condemned {
		if err := b.o.Fence.Block(ctx, client); err != nil {
			return fmt.Errorf("shut out client %s of Ceph: %w", client, err)
		}
		log.G(ctx).WithFields(log.Fields{"volume": v.ID, "attachment": a.ID, "node": node, "client": client}).Warn("a client of Ceph that did not let go is shut out")
	}
	if alone && len(condemned) > 0 {
		// Ceph drops a blocked client's interest in the image as soon as it knows.
		if err := b.poll(ctx, "clients of image "+image.Pool+"/"+image.Image+" that were shut out", func(ctx context.Context) (bool, error) {
			still, err := b.o.Fence.Clients(ctx, image)
			return !slices.ContainsFunc(still, func(c string) bool { return slices.Contains(condemned, c) }), err
		}); err != nil {
			return err
		}
	}
	return b.o.Fence.Forget(ctx, image, a.ID)
}

// How often Run looks at all attachments, how often at those that are new, and for how
// long those are.
const (
	every     = time.Minute
	everyNew  = 3 * time.Second
	newForNow = 5 * time.Minute
)

// fresh is an attachment that a client of Ceph is about to use.
type fresh struct {
	image record.RBD
	until time.Time
}

// watch has an attachment's first clients noted soon: they must be known before their node
// is cut off.
func (b *Backend) watch(c backend.Connection) {
	if b.o.Fence == nil || c.Source.RBD == nil || c.Shared {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fresh[c.Attachment] = fresh{*c.Source.RBD, time.Now().Add(newForNow)}
}

// noteNew notes the clients of new attachments.
func (b *Backend) noteNew(ctx context.Context, now time.Time) error {
	b.mu.Lock()
	all := maps.Clone(b.fresh)
	for id, f := range b.fresh {
		if now.After(f.until) {
			delete(b.fresh, id)
		}
	}
	b.mu.Unlock()
	var errs []error
	for id, f := range all {
		errs = append(errs, b.noteImage(ctx, f.image, id))
	}
	return errors.Join(errs...)
}

// Run does what no request asks for until ctx ends: it notes which clients of Ceph have
// the volumes that are attached, and takes away attachments that nobody wants.
func (b *Backend) Run(ctx context.Context) error {
	all, some := time.NewTicker(every), time.NewTicker(everyNew)
	defer all.Stop()
	defer some.Stop()
	for {
		var err error
		select {
		case <-ctx.Done():
			return nil
		case <-all.C:
			err = b.Sweep(ctx)
		case now := <-some.C:
			err = b.noteNew(ctx, now)
		}
		if err != nil && ctx.Err() == nil {
			log.G(ctx).WithError(err).Warn("look after attachments")
		}
	}
}

// Sweep looks after attachments once.
func (b *Backend) Sweep(ctx context.Context) error {
	// First what is wanted, then what there is: what was asked for meanwhile is not an orphan.
	all, err := everywhere[volume](ctx, b, volumesFull, query())
	if err != nil {
		return err
	}
	wanted, err := b.o.Nodes.Wanted(ctx)
	if err != nil {
		return err
	}
	now := time.Now()
	seen := map[string]bool{}
	var errs []error
	for i := range all {
		v := &all[i]
		for _, have := range v.Attachments {
			node, ours := b.nodeOf(have.Device)
			switch {
			case !ours:
			case wanted[Pair{v.ID, node}]:
				if b.o.Fence != nil && len(v.Attachments) == 1 {
					errs = append(errs, b.note(ctx, v, have.Attachment))
				}
			default:
				seen[have.Attachment] = true
				if b.orphan(have.Attachment, now) {
					log.G(ctx).WithFields(log.Fields{"volume": v.ID, "attachment": have.Attachment, "node": node}).Warn("an attachment that no VolumeAttachment is about is taken away")
					errs = append(errs, b.Detach(ctx, v.ID, node))
				}
			}
		}
		errs = append(errs, b.begun(ctx, v, wanted, seen, now))
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for id := range b.orphans {
		if !seen[id] {
			delete(b.orphans, id)
		}
	}
	return errors.Join(errs...)
}

// begun takes away what was begun for a node that does not want it any more.
func (b *Backend) begun(ctx context.Context, v *volume, wanted map[Pair]bool, seen map[string]bool, now time.Time) error {
	if v.Status == available || v.Status == inUse && !v.MultiAttach {
		return nil
	}
	prefix := b.o.Cluster + "/"
	if len(v.Metadata[metaAttaching]) <= len(prefix) || v.Metadata[metaAttaching][:len(prefix)] != prefix {
		return nil
	}
	node := v.Metadata[metaAttaching][len(prefix):]
	key := "begun " + v.ID
	if wanted[Pair{v.ID, node}] {
		return nil
	}
	seen[key] = true
	if !b.orphan(key, now) {
		return nil
	}
	return b.Detach(ctx, v.ID, node)
}

// orphan says whether what nobody wants was so for long.
func (b *Backend) orphan(id string, now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	since, ok := b.orphans[id]
	if !ok {
		b.orphans[id] = now
		return b.o.Orphan < 0
	}
	return now.Sub(since) >= b.o.Orphan
}

// maxClients bounds what is remembered of an attachment.
const maxClients = 64

// note remembers who has a volume open.
func (b *Backend) note(ctx context.Context, v *volume, id string) error {
	c, err := b.client(ctx, v.Project)
	if err != nil {
		return err
	}
	a, err := openstack.Get[attachment](ctx, c, attachments, id)
	if err != nil || a == nil || a.Status != attached {
		return explain(err, "attachment "+id)
	}
	in, err := parse(a.Info)
	if err != nil || in.Type != "rbd" {
		return err
	}
	var out connection
	if err := (translator{}).rbd(&info{Name: in.Name, Hosts: in.Hosts, Ports: in.Ports}, &out); err != nil {
		return err
	}
	return b.noteImage(ctx, *out.source.RBD, id)
}

func (b *Backend) noteImage(ctx context.Context, image record.RBD, id string) error {
	now, err := b.o.Fence.Clients(ctx, image)
	if err != nil || len(now) == 0 {
		return err
	}
	past, err := b.o.Fence.Remembered(ctx, image, id)
	if err != nil {
		return err
	}
	all := past
	for _, client := range now {
		if !slices.Contains(all, client) {
			all = append(all, client)
		}
	}
	if len(all) == len(past) {
		return nil
	}
	return b.o.Fence.Remember(ctx, image, id, all[max(0, len(all)-maxClients):])
}
