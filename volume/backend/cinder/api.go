package cinder

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/network/openstack"
)

// Cinder's collections.
var (
	volumes     = openstack.Collection{Path: "volumes", Key: "volumes", One: "volume"}
	volumesFull = openstack.Collection{Path: "volumes/detail", Key: "volumes", One: "volume"}
	snaps       = openstack.Collection{Path: "snapshots", Key: "snapshots", One: "snapshot"}
	snapsFull   = openstack.Collection{Path: "snapshots/detail", Key: "snapshots", One: "snapshot"}
	attachments = openstack.Collection{Path: "attachments", Key: "attachments", One: "attachment"}
	volumeTypes = openstack.Collection{Path: "types", Key: "volume_types", One: "volume_type"}
	messages    = openstack.Collection{Path: "messages", Key: "messages", One: "message"}
	pools       = openstack.Collection{Path: "scheduler-stats/get_pools", Key: "pools", One: "pool"}
)

// Metadata of what we make, for finding it again and for people.
const (
	metaCluster   = "h8s-cluster"
	metaName      = "h8s-name"
	metaNamespace = "h8s-namespace"
	metaClaim     = "h8s-claim"
	// metaGiB is how large a copy is to become, if not as large as its original.
	metaGiB = "h8s-gib"
	// metaAttaching says, from before an attachment is made, for which node: an attachment
	// that is not complete and belongs to no server is ours if it is there.
	metaAttaching = "h8s-attaching"
)

// Statuses of a volume, a snapshot and an attachment.
const (
	available = "available"
	inUse     = "in-use"
	reserved  = "reserved"
	attached  = "attached"
	creating  = "creating"
	deleting  = "deleting"
	detaching = "detaching"

	errorExtending = "error_extending"
)

const gib = 1 << 30

type resource struct {
	ID   string `json:"id"`
	Name string `json:"name"`
}

// volume is what is asked for of one.
type volume struct {
	ID          string            `json:"id"`
	Name        string            `json:"name"`
	Status      string            `json:"status"`
	Size        int64             `json:"size"`
	Type        string            `json:"volume_type"`
	Zone        string            `json:"availability_zone"`
	CreatedAt   string            `json:"created_at"`
	Snapshot    string            `json:"snapshot_id"`
	Parent      string            `json:"source_volid"`
	Metadata    map[string]string `json:"metadata"`
	Image       map[string]any    `json:"volume_image_metadata"`
	Bootable    string            `json:"bootable"`
	Encrypted   bool              `json:"encrypted"`
	MultiAttach bool              `json:"multiattach"`
	Project     string            `json:"os-vol-tenant-attr:tenant_id"`
	// Attachments that are complete.
	Attachments []struct {
		Attachment string `json:"attachment_id"`
		Server     string `json:"server_id"`
		Device     string `json:"device"`
	} `json:"attachments"`
}

type snapshot struct {
	ID        string            `json:"id"`
	Name      string            `json:"name"`
	Status    string            `json:"status"`
	Volume    string            `json:"volume_id"`
	Size      int64             `json:"size"`
	CreatedAt string            `json:"created_at"`
	Metadata  map[string]string `json:"metadata"`
	Project   string            `json:"os-extended-snapshot-attributes:project_id"`
}

func query(pairs ...string) url.Values {
	q := url.Values{}
	for i := 0; i+1 < len(pairs); i += 2 {
		q.Set(pairs[i], pairs[i+1])
	}
	return q
}

// find returns a volume and a client for it. The error is errdefs.ErrNotFound if there is
// none: also for what cannot be an ID of Cinder's.
func (b *Backend) find(ctx context.Context, id string) (*volume, *openstack.Client, error) {
	return look[volume](ctx, b, volumes, "volume", id)
}

func (b *Backend) findSnapshot(ctx context.Context, id string) (*snapshot, *openstack.Client, error) {
	return look[snapshot](ctx, b, snaps, "snapshot", id)
}

func look[T any](ctx context.Context, b *Backend, x openstack.Collection, what, id string) (*T, *openstack.Client, error) {
	if !idPattern.MatchString(id) {
		return nil, nil, fmt.Errorf("%s %.64q: Cinder has none: IDs are UUIDs: %w", what, id, errdefs.ErrNotFound)
	}
	in := []string{""}
	if !b.anywhere() {
		all, err := b.projects(ctx)
		if err != nil {
			return nil, nil, err
		}
		// Where it was found the last time, first.
		b.mu.Lock()
		last := b.where[id]
		b.mu.Unlock()
		if i := slices.Index(all, last); i > 0 {
			all[0], all[i] = all[i], all[0]
		}
		in = all
	}
	var failed error
	for _, project := range in {
		c, err := b.client(ctx, project)
		if err == nil {
			var v *T
			if v, err = openstack.Get[T](ctx, c, x, id); v != nil {
				b.mu.Lock()
				if len(b.where) >= maxWhere {
					clear(b.where)
				}
				b.where[id] = project
				b.mu.Unlock()
				return v, c, nil
			}
		}
		if err != nil {
			failed = err
		}
	}
	if failed != nil {
		// It may be in a project that could not be asked.
		return nil, nil, explain(failed, what+" "+id)
	}
	return nil, nil, fmt.Errorf("%s %s: Cinder has none: %w", what, id, errdefs.ErrNotFound)
}

// everywhere lists what all projects have of a collection.
func everywhere[T any](ctx context.Context, b *Backend, x openstack.Collection, q url.Values) ([]T, error) {
	if b.anywhere() {
		c, err := b.client(ctx, "")
		if err != nil {
			return nil, err
		}
		q.Set("all_tenants", "1")
		all, err := openstack.List[T](ctx, c, x, q)
		return all, explain(err, "list "+x.Key)
	}
	in, err := b.projects(ctx)
	if err != nil {
		return nil, err
	}
	var all []T
	for _, project := range in {
		c, err := b.client(ctx, project)
		if err != nil {
			return nil, err
		}
		some, err := openstack.List[T](ctx, c, x, q)
		if err != nil {
			return nil, explain(err, "list "+x.Key+" of project "+project)
		}
		all = append(all, some...)
	}
	return all, nil
}

// act does an action on a resource.
func act(ctx context.Context, c *openstack.Client, x openstack.Collection, id, action string, body any) error {
	return c.Do(ctx, http.MethodPost, x.Path+"/"+id+"/action", nil, map[string]any{action: body}, nil)
}

// state says that what Cinder refuses as invalid is so because of how things are.
func state(err error) error {
	if errdefs.IsInvalidArgument(err) {
		return fmt.Errorf("%v: %w", err, errdefs.ErrFailedPrecondition)
	}
	return err
}

// why is what Cinder tells users about something that failed, "" if nothing.
func why(ctx context.Context, c *openstack.Client, id string) string {
	all, err := openstack.List[struct {
		Text    string `json:"user_message"`
		Created string `json:"created_at"`
	}](ctx, c, messages, query("resource_uuid", id))
	if err != nil || len(all) == 0 {
		return "its log says why"
	}
	last := all[0]
	for _, m := range all {
		if m.Created > last.Created {
			last = m
		}
	}
	if len(last.Text) > 300 {
		last.Text = last.Text[:300]
	}
	return strings.ToValidUTF8(last.Text, "")
}

// broken is a status that ends by itself no more.
func broken(status string) bool { return strings.HasPrefix(status, "error") }

func when(s string) int64 {
	t, err := time.Parse("2006-01-02T15:04:05.999999999", strings.TrimSuffix(s, "Z"))
	if err != nil {
		return 0
	}
	return t.Unix()
}
