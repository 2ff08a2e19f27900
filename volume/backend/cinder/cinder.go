// Package cinder owns volumes that OpenStack's Cinder keeps: making, copying, growing and
// deleting them in the right project, attaching them to nodes without Nova, and what ends a
// node's access for good.
//
// Whose a volume is. A volume is made in the Keystone project of the claim's tenant, with a
// token of that project, or in the operator's own for namespaces of no tenant. What is ours
// is known by metadata (h8s-cluster, h8s-name), looked at in that project only. Whose any
// volume is, static ones too, Cinder says, and every Connection tells it.
//
// Attaching. Cinder's attachments, without a server: reserving a volume is an exchange in
// Cinder's database, which is the lock between nodes and clusters. The attachment's
// mountpoint says whose it is (h8s:<cluster>:<node>); it is shown from the moment the
// attachment is complete, and nobody is told of a connection before. An attachment that is
// not complete was given to nobody: it is deleted and made anew.
//
// Detaching. It ends when the node cannot write any more: because the node itself said that
// it let go, because its RADOS clients were put on the blocklist, because the target refuses
// it, or because the operator says that the node is off. See fence.go.
//
// It must not know CSI or Kubernetes: Options.Projects and Options.Nodes answer for them.
package cinder

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/network/openstack"
	"github.com/hypernetes/hypernetes/volume/backend"
)

var (
	_ backend.Volumes     = (*Backend)(nil)
	_ backend.Snapshots   = (*Backend)(nil)
	_ backend.Attachments = (*Backend)(nil)
	_ backend.Capacity    = (*Backend)(nil)
	_ backend.Mutable     = (*Backend)(nil)
)

// Projects tells whose a namespace is.
type Projects interface {
	// OwnerOf is the Keystone project of a namespace's tenant, "" for a namespace of no
	// tenant. The error is errdefs.ErrFailedPrecondition if the tenant has no project.
	OwnerOf(ctx context.Context, namespace string) (string, error)
	// Owners are the projects of all tenants.
	Owners(ctx context.Context) ([]string, error)
}

// Options of a Backend.
type Options struct {
	// Cloud is the credential.
	Cloud openstack.Options
	// Cluster tells this cluster's volumes from others': the UID of kube-system.
	Cluster  string
	Projects Projects
	Nodes    Nodes
	// Role is what our account gives itself in a tenant's project where it has none, if its
	// profile is openstack.Full: member if empty.
	Role string
	// Exports are directories of nodes where NFS exports of Cinder are mounted, by export.
	Exports map[string]string
	// Keys are those of Ceph's users, by name without "client.", base64: Cinder does not give
	// them.
	Keys map[string]string
	// Fence ends the access of clients of Ceph; nil if there is no credential for that.
	Fence Fence
	// Poll is how often Cinder is asked whether something is done, Settle how long an
	// attachment that is not complete is given, Orphan after how long one that nobody wants is
	// taken away. There are defaults.
	Poll, Settle, Orphan time.Duration
}

// Backend is Cinder.
type Backend struct {
	o Options
	// cloud is our account, scoped the same account with tokens of one project each.
	cloud, scoped *openstack.Cloud
	// busy serialises work on a volume, or on a name.
	busy locks

	mu sync.Mutex
	// own is our account's project, asked once.
	own      string
	ownKnown bool
	// where volumes were found, of profile openstack.Least only.
	where map[string]string
	// fresh are attachments that are new, by ID.
	fresh map[string]fresh
	// orphans since when attachments are nobody's.
	orphans map[string]time.Time
}

const (
	defaultPoll   = 500 * time.Millisecond
	defaultSettle = 5 * time.Second
	defaultOrphan = 10 * time.Minute
	// maxWhere bounds what is remembered.
	maxWhere = 4096
)

// New checks the options. It asks nothing of the cloud.
func New(o Options) (*Backend, error) {
	if o.Cluster == "" || o.Projects == nil || o.Nodes == nil {
		return nil, fmt.Errorf("cinder: want a cluster, projects and nodes: %w", errdefs.ErrInvalidArgument)
	}
	if o.Role == "" {
		o.Role = "member"
	}
	o.Poll, o.Settle, o.Orphan = or(o.Poll, defaultPoll), or(o.Settle, defaultSettle), or(o.Orphan, defaultOrphan)
	b := &Backend{o: o, where: map[string]string{}, fresh: map[string]fresh{}, orphans: map[string]time.Time{}}
	var err error
	if b.cloud, err = openstack.New(o.Cloud); err != nil {
		return nil, err
	}
	b.scoped = b.cloud
	if b.cloud.Profile() == openstack.Full {
		scoped := o.Cloud
		scoped.Profile = openstack.Least
		if b.scoped, err = openstack.New(scoped); err != nil {
			// An application credential: it is of one project, and serves that.
			b.scoped = nil
		}
	}
	return b, nil
}

func or(d, other time.Duration) time.Duration {
	if d == 0 {
		return other
	}
	return d
}

// anywhere is a client that may ask for any project's things: of profile openstack.Full.
// Others ask project by project.
func (b *Backend) anywhere() bool { return b.cloud.Profile() == openstack.Full }

// ownProject is the operator's, "" if the account has none.
func (b *Backend) ownProject(ctx context.Context) (string, error) {
	b.mu.Lock()
	own, known := b.own, b.ownKnown
	b.mu.Unlock()
	if known {
		return own, nil
	}
	c, err := b.cloud.Client(ctx, openstack.Volume, "")
	switch {
	case errdefs.IsNotFound(err) && !b.anywhere():
		// The catalogue of a token without a project has no Cinder.
	case err != nil:
		return "", explain(err, "Cinder")
	default:
		if _, own, err = c.Account(); err != nil {
			return "", err
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.own, b.ownKnown = own, true
	return own, nil
}

// client is one for what a project has.
func (b *Backend) client(ctx context.Context, project string) (*openstack.Client, error) {
	if b.anywhere() {
		project = ""
	} else if own, err := b.ownProject(ctx); err != nil {
		return nil, err
	} else if project == own {
		project = ""
	}
	c, err := b.cloud.Client(ctx, openstack.Volume, project)
	return c, explain(err, "Cinder")
}

// maker is a client for making things in a project: with a token of it, as a volume is of
// the project of the token it was made with.
func (b *Backend) maker(ctx context.Context, project string) (*openstack.Client, error) {
	own, err := b.ownProject(ctx)
	if err != nil {
		return nil, err
	}
	if project == own {
		c, err := b.cloud.Client(ctx, openstack.Volume, "")
		return c, explain(err, "Cinder")
	}
	if b.scoped == nil {
		return nil, fmt.Errorf("project %s: the cluster's credential is an application credential, which is of one project: the operator gives --openstack-cloud a user's password: %w",
			project, errdefs.ErrFailedPrecondition)
	}
	c, err := b.scoped.Client(ctx, openstack.Volume, project)
	if errdefs.IsUnauthorized(err) && b.anywhere() {
		if err := b.grant(ctx, project); err != nil {
			return nil, err
		}
		c, err = b.scoped.Client(ctx, openstack.Volume, project)
	}
	if errdefs.IsUnauthorized(err) {
		return nil, fmt.Errorf("project %s: the cluster's account gets no token for it: the operator gives it a role there that may make volumes (openstack role add --user … --project %s %s): %w",
			project, project, b.o.Role, errdefs.ErrFailedPrecondition)
	}
	return c, explain(err, "Cinder")
}

// grant gives our account its role in a project.
func (b *Backend) grant(ctx context.Context, project string) error {
	c, err := b.cloud.Client(ctx, openstack.Identity, "")
	if err != nil {
		return explain(err, "Keystone")
	}
	user, _, err := c.Account()
	if err != nil {
		return err
	}
	roles, err := openstack.List[resource](ctx, c, openstack.Collection{Path: "roles", Key: "roles", One: "role"}, query("name", b.o.Role))
	if err != nil {
		return explain(err, "Keystone")
	}
	if len(roles) == 0 {
		return fmt.Errorf("role %q, which the cluster's account is to get in project %s: Keystone has none of that name: %w", b.o.Role, project, errdefs.ErrFailedPrecondition)
	}
	path := "projects/" + project + "/users/" + user + "/roles/" + roles[0].ID
	return explain(c.Do(ctx, "PUT", path, nil, nil, nil), "give the cluster's account role "+b.o.Role+" in project "+project)
}

// projectFor is the project of a claim's namespace.
func (b *Backend) projectFor(ctx context.Context, namespace string) (string, error) {
	project := ""
	var err error
	if namespace != "" {
		if project, err = b.o.Projects.OwnerOf(ctx, namespace); err != nil {
			return "", err
		}
	}
	if project == "" {
		if project, err = b.ownProject(ctx); err != nil {
			return "", err
		}
	}
	switch {
	case project == "":
		return "", fmt.Errorf("namespace %q is no tenant's and the cluster's account has no project of its own: make the claim in a tenant's namespace: %w", namespace, errdefs.ErrFailedPrecondition)
	case !projectPattern.MatchString(project):
		return "", fmt.Errorf("project %q is none of Keystone's: want 32 of 0-9 and a-f: %w", project, errdefs.ErrFailedPrecondition)
	}
	return project, nil
}

// projects are all that may have volumes of ours.
func (b *Backend) projects(ctx context.Context) ([]string, error) {
	own, err := b.ownProject(ctx)
	if err != nil {
		return nil, err
	}
	all, err := b.o.Projects.Owners(ctx)
	if err != nil {
		return nil, err
	}
	out := []string{}
	seen := map[string]bool{}
	for _, p := range append([]string{own}, all...) {
		if projectPattern.MatchString(p) && !seen[p] {
			out, seen[p] = append(out, p), true
		}
	}
	return out, nil
}

var (
	idPattern      = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)
	projectPattern = regexp.MustCompile(`^[0-9a-zA-Z_-]{1,64}$`)
)

// explain says who can do something about an error, and keeps its class fit for package
// backend.
func explain(err error, what string) error {
	switch {
	case err == nil, errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errdefs.IsUnauthorized(err):
		return fmt.Errorf("%s: the cloud refuses the cluster's credential: the operator mends --openstack-cloud-config: %v: %w", what, err, errdefs.ErrUnavailable)
	case errdefs.IsPermissionDenied(err):
		return fmt.Errorf("%s: the cloud's policy forbids it to the cluster's account (docs/storage.md, Cinder): %v: %w", what, err, errdefs.ErrFailedPrecondition)
	case errdefs.IsResourceExhausted(err):
		return fmt.Errorf("%s: the project's quota at Cinder is used up: delete what is not needed, or ask the cloud's operator for more: %w", what, err)
	case errdefs.IsConflict(err):
		return fmt.Errorf("%s: %v: %w", what, err, errdefs.ErrFailedPrecondition)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// locks are by name.
type locks struct {
	mu   sync.Mutex
	held map[string]chan struct{}
}

// take waits for a name and returns what gives it back.
func (l *locks) take(ctx context.Context, name string) (func(), error) {
	for {
		l.mu.Lock()
		if l.held == nil {
			l.held = map[string]chan struct{}{}
		}
		other := l.held[name]
		if other == nil {
			mine := make(chan struct{})
			l.held[name] = mine
			l.mu.Unlock()
			return func() {
				l.mu.Lock()
				delete(l.held, name)
				l.mu.Unlock()
				close(mine)
			}, nil
		}
		l.mu.Unlock()
		select {
		case <-other:
		case <-ctx.Done():
			return nil, fmt.Errorf("%s: another request about it is at work: %w: %w", name, ctx.Err(), errdefs.ErrUnavailable)
		}
	}
}

// poll asks until done says so or fails.
func (b *Backend) poll(ctx context.Context, what string, done func(context.Context) (bool, error)) error {
	wait := b.o.Poll / 4
	for {
		ok, err := done(ctx)
		if ok || err != nil {
			return err
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return fmt.Errorf("%s: not done yet: %w: %w", what, ctx.Err(), errdefs.ErrUnavailable)
		}
		wait = min(wait*2, b.o.Poll)
	}
}
