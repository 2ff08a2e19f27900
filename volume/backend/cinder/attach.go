package cinder

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/hypernetes/hypernetes/network/openstack"
	"github.com/hypernetes/hypernetes/volume/backend"
	"github.com/hypernetes/hypernetes/volume/record"
)

// attachment is what is asked for of one.
type attachment struct {
	ID     string `json:"id"`
	Status string `json:"status"`
	// Server is whose it is in Nova's eyes; null, and so "", for ours.
	Server string          `json:"instance"`
	Volume string          `json:"volume_id"`
	Mode   string          `json:"attach_mode"`
	Info   json.RawMessage `json:"connection_info"`
}

// maxNode bounds a node's name, for Cinder's columns of 255.
const maxNode = 200

// mark is the beginning of our attachments' mountpoints.
func (b *Backend) mark() string {
	sum := sha256.Sum256([]byte(b.o.Cluster))
	return "h8s:" + hex.EncodeToString(sum[:6]) + ":"
}

// nodeOf is the node of an attachment of ours.
func (b *Backend) nodeOf(device string) (string, bool) {
	return strings.CutPrefix(device, b.mark())
}

// initiator is what a node calls itself to iSCSI targets, which let it in by that.
func (b *Backend) initiator(node string) string {
	return "iqn.2015-06.io.hypernetes:" + strings.Trim(b.mark()[4:], ":") + ":" + strings.ToLower(node)
}

// connector is a node as Cinder's drivers want it. host is what they know it by, and so is
// of this cluster: another one may have a node of the same name.
func (b *Backend) connector(node, address, mode string) map[string]any {
	if address == "" {
		address = "0.0.0.0"
	}
	return map[string]any{
		"host": "h8s-" + strings.Trim(b.mark()[4:], ":") + "-" + node, "initiator": b.initiator(node), "ip": address,
		"platform": "x86_64", "os_type": "linux", "multipath": false, "mountpoint": b.mark() + node, "mode": mode,
	}
}

// format says whether a volume may be formatted. One made from something has content; of
// any other, made here or elsewhere, the guest finds out by reading it.
func format(v *volume) string {
	if v.Snapshot != "" || v.Parent != "" || v.Bootable == "true" || len(v.Image) > 0 {
		return record.FormatNever
	}
	return record.FormatBlank
}

// Attach implements backend.Attachments.
func (b *Backend) Attach(ctx context.Context, a backend.Attach) (backend.Connection, error) {
	none := backend.Connection{}
	if a.Node == "" || len(a.Node) > maxNode {
		return none, fmt.Errorf("node %.64q: want a name of 1 to %d bytes: %w", a.Node, maxNode, errdefs.ErrInvalidArgument)
	}
	release, err := b.busy.take(ctx, a.Volume)
	if err != nil {
		return none, err
	}
	defer release()
	v, c, err := b.find(ctx, a.Volume)
	if err != nil {
		return none, err
	}
	if v.Project == "" {
		return none, fmt.Errorf("volume %s: Cinder does not tell whose it is: its policy volume_extension:volume_tenant_attribute must let the cluster's account know: %w", v.ID, errdefs.ErrFailedPrecondition)
	}
	mode := "rw"
	if a.ReadOnly {
		mode = "ro"
	}
	for _, have := range v.Attachments {
		node, ours := b.nodeOf(have.Device)
		switch {
		case !ours || node != a.Node:
			if !a.Shared || !v.MultiAttach {
				return none, held(v, node, have.Server)
			}
		default:
			got, err := openstack.Get[attachment](ctx, c, attachments, have.Attachment)
			if err != nil {
				return none, explain(err, "attachment "+have.Attachment)
			}
			if got == nil {
				return none, fmt.Errorf("attachment %s of volume %s was deleted meanwhile: %w", have.Attachment, v.ID, errdefs.ErrUnavailable)
			}
			if got.Mode != mode {
				return none, fmt.Errorf("volume %s is attached to node %s already, %s and not %s: detach it first: %w", v.ID, a.Node, got.Mode, mode, errdefs.ErrAlreadyExists)
			}
			return b.connection(ctx, v, got, a)
		}
	}
	if v.Status != available {
		if err := b.sweepVolume(ctx, c, v); err != nil {
			return none, err
		}
	}
	if v.Status == errorExtending {
		if err := b.reset(ctx, c, v); err != nil {
			return none, err
		}
	}
	if broken(v.Status) {
		return none, fmt.Errorf("volume %s is %s: the cloud's operator looks and resets it (openstack volume set --state): %w", v.ID, v.Status, errdefs.ErrFailedPrecondition)
	}
	if v.Status != available && (v.Status != inUse || !v.MultiAttach || !a.Shared) {
		return none, fmt.Errorf("volume %s is %s, and not by this cluster: it can be attached when it is %s: %w", v.ID, v.Status, available, errdefs.ErrFailedPrecondition)
	}
	// From here on, whatever is found of ours that is not complete may be deleted.
	if want := bound(b.o.Cluster + "/" + a.Node); v.Metadata[metaAttaching] != want {
		err := c.Do(ctx, http.MethodPost, volumes.Path+"/"+v.ID+"/metadata", nil, map[string]any{"metadata": map[string]string{metaAttaching: want}}, nil)
		if err != nil {
			return none, explain(state(err), "mark volume "+v.ID)
		}
	}
	address, err := b.o.Nodes.Address(ctx, a.Node)
	if err != nil {
		return none, err
	}
	made, err := openstack.Put[attachment](ctx, c, attachments, "", map[string]any{
		"volume_uuid": v.ID, "connector": b.connector(a.Node, address, mode), "mode": mode,
	})
	if err != nil {
		if errdefs.IsInvalidArgument(err) {
			// Reserved by somebody else a moment ago: what is begun is theirs.
			b.unmark(context.WithoutCancel(ctx), c, v)
			err = fmt.Errorf("%v: %w", err, errdefs.ErrFailedPrecondition)
		}
		return none, explain(err, "attach volume "+v.ID+" to node "+a.Node)
	}
	// Understood before it is complete: what cannot be used is not kept.
	connection, err := b.connection(ctx, v, made, a)
	if err == nil {
		err = explain(act(ctx, c, attachments, made.ID, "os-complete", map[string]any{}), "complete attachment "+made.ID)
	}
	if errdefs.IsNotFound(err) {
		err = fmt.Errorf("%v: %w", err, errdefs.ErrUnavailable)
	}
	if err != nil {
		return none, errors.Join(err, b.drop(context.WithoutCancel(ctx), c, made.ID))
	}
	b.watch(connection)
	return connection, nil
}

// held says who has a volume.
func held(v *volume, node, server string) error {
	switch {
	case node != "":
		return fmt.Errorf("volume %s is attached to node %s: %w", v.ID, node, errdefs.ErrFailedPrecondition)
	case server != "":
		return fmt.Errorf("volume %s is attached to server %s of Nova's: %w", v.ID, server, errdefs.ErrFailedPrecondition)
	}
	return fmt.Errorf("volume %s is attached by something that is not this cluster's: %w", v.ID, errdefs.ErrFailedPrecondition)
}

// connection makes one of an attachment.
func (b *Backend) connection(ctx context.Context, v *volume, a *attachment, asked backend.Attach) (backend.Connection, error) {
	own, err := b.ownProject(ctx)
	if err != nil {
		return backend.Connection{}, err
	}
	t := translator{exports: b.o.Exports, keys: b.o.Keys, initiator: b.initiator(asked.Node)}
	got, err := t.translate(a.Info)
	if err != nil {
		if errdefs.IsNotImplemented(err) || errdefs.IsInvalidArgument(err) {
			// The call was right; the volume is not.
			err = fmt.Errorf("%v: %w", err, errdefs.ErrFailedPrecondition)
		}
		return backend.Connection{}, fmt.Errorf("volume %s: %w", v.ID, err)
	}
	out := backend.Connection{
		Attachment: a.ID, SizeBytes: v.Size * gib, ReadOnly: asked.ReadOnly || got.readOnly || a.Mode == "ro", Format: format(v),
		Source: got.source, Throttle: got.throttle, Owner: v.Project, OperatorOwned: own != "" && v.Project == own,
		Shared: asked.Shared && v.MultiAttach,
	}
	if len(got.secrets) > 0 {
		out.Secrets = got.secrets
	}
	if out.ReadOnly {
		out.Format = record.FormatNever
	}
	return out, nil
}

// unfinished are the attachments of a volume that are not complete and that we began, if
// the volume says that we did.
func (b *Backend) unfinished(ctx context.Context, c *openstack.Client, v *volume) ([]attachment, error) {
	if node, ours := strings.CutPrefix(v.Metadata[metaAttaching], b.o.Cluster+"/"); !ours || node == "" {
		return nil, nil
	}
	q := query("volume_id", v.ID)
	if b.anywhere() {
		q.Set("all_tenants", "1")
	}
	all, err := openstack.List[attachment](ctx, c, attachments, q)
	if err != nil {
		return nil, explain(err, "list attachments of volume "+v.ID)
	}
	var out []attachment
	for _, a := range all {
		if a.Volume == v.ID && a.Status != attached && a.Status != detaching && a.Status != "detached" && a.Server == "" {
			out = append(out, a)
		}
	}
	return out, nil
}

// sweepVolume deletes what we began and did not complete.
func (b *Backend) sweepVolume(ctx context.Context, c *openstack.Client, v *volume) error {
	all, err := b.unfinished(ctx, c, v)
	if err != nil || len(all) == 0 {
		return err
	}
	// Another controller, of before a change of leaders, may be about to complete it.
	t := time.NewTimer(b.o.Settle)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
		return ctx.Err()
	}
	again, err := b.unfinished(ctx, c, v)
	if err != nil {
		return err
	}
	all = slices.DeleteFunc(all, func(a attachment) bool {
		return !slices.ContainsFunc(again, func(x attachment) bool { return x.ID == a.ID })
	})
	for _, a := range all {
		log.G(ctx).WithFields(log.Fields{"volume": v.ID, "attachment": a.ID, "status": a.Status}).Info("an attachment that was begun and not completed is deleted")
		if err := b.drop(ctx, c, a.ID); err != nil {
			return err
		}
	}
	now, err := openstack.Get[volume](ctx, c, volumes, v.ID)
	if err != nil || now == nil {
		return errors.Join(explain(err, "volume "+v.ID), errdefs.ErrUnavailable)
	}
	*v = *now
	return nil
}

// drop deletes an attachment.
func (b *Backend) drop(ctx context.Context, c *openstack.Client, id string) error {
	return explain(state(openstack.Remove(ctx, c, attachments, id, nil)), "delete attachment "+id)
}

// Detach implements backend.Attachments.
func (b *Backend) Detach(ctx context.Context, id, node string) error {
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
	return b.detach(ctx, c, v, node)
}

func (b *Backend) detach(ctx context.Context, c *openstack.Client, v *volume, node string) error {
	for _, have := range v.Attachments {
		at, ours := b.nodeOf(have.Device)
		if !ours || node != "" && at != node {
			continue
		}
		a, err := openstack.Get[attachment](ctx, c, attachments, have.Attachment)
		if err != nil {
			return explain(err, "attachment "+have.Attachment)
		}
		if a == nil {
			continue
		}
		if err := b.fence(ctx, v, a, at); err != nil {
			return fmt.Errorf("detach volume %s from node %s: %w", v.ID, at, err)
		}
		if err := b.drop(ctx, c, a.ID); err != nil {
			return err
		}
		b.mu.Lock()
		delete(b.fresh, a.ID)
		b.mu.Unlock()
	}
	attaching := strings.TrimPrefix(v.Metadata[metaAttaching], b.o.Cluster+"/")
	if attaching == v.Metadata[metaAttaching] || node != "" && attaching != node {
		return nil
	}
	if err := b.sweepVolume(ctx, c, v); err != nil {
		return err
	}
	b.unmark(ctx, c, v)
	return nil
}

// unmark takes back that an attachment is begun. Where it stays it says nothing that is
// not known, mostly: the next attachment overwrites it.
func (b *Backend) unmark(ctx context.Context, c *openstack.Client, v *volume) {
	err := c.Do(ctx, http.MethodDelete, volumes.Path+"/"+v.ID+"/metadata/"+metaAttaching, nil, nil, nil)
	if err != nil && !errdefs.IsNotFound(err) {
		log.G(ctx).WithError(err).WithField("volume", v.ID).Debug("the mark of an attachment stays")
	}
}
