// Package projects owns what becomes of Keystone's projects here: how those are that
// Tenants claim, and Tenants for those that a rule selects. It deletes nothing. It must not
// know who logs in.
package projects

import (
	"context"
	"fmt"
	"net/url"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/identity/keystone"
	"github.com/hypernetes/hypernetes/identity/tenant"
)

// LabelAuto marks a Tenant made for a project.
const LabelAuto = "hypernetes.io/made-for-project"

// every is how often Keystone is asked.
const every = 30 * time.Second

// askTimeout bounds one question.
const askTimeout = 10 * time.Second

// Keystone is asked for projects.
type Keystone interface {
	Project(ctx context.Context, id string) (keystone.Project, error)
	Projects(ctx context.Context, query url.Values) ([]keystone.Project, error)
	DomainEnabled(ctx context.Context, id string) (bool, error)
}

var _ Keystone = (*keystone.Service)(nil)

// Rule says which projects get a Tenant: those with a tag, or those of a domain. None if
// both are empty.
type Rule struct{ Tag, Domain string }

var ruleValue = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)

// ParseRule reads "tag=NAME" or "domain=ID".
func ParseRule(text string) (Rule, error) {
	kind, value, _ := strings.Cut(text, "=")
	switch {
	case text == "":
		return Rule{}, nil
	case !ruleValue.MatchString(value):
	case kind == "tag":
		return Rule{Tag: value}, nil
	case kind == "domain":
		return Rule{Domain: value}, nil
	}
	return Rule{}, fmt.Errorf("%q: want tag=NAME or domain=ID: %w", text, errdefs.ErrInvalidArgument)
}

func (r Rule) query() url.Values {
	switch {
	case r.Tag != "":
		return url.Values{"tags": {r.Tag}}
	case r.Domain != "":
		return url.Values{"domain_id": {r.Domain}}
	}
	return nil
}

type state struct {
	status          metav1.ConditionStatus
	reason, message string
}

var _ tenant.Projects = (*Watcher)(nil)

// Watcher asks Keystone now and then. It is safe for concurrent use.
type Watcher struct {
	// Every is how often Keystone is asked: half a minute, unless it is set before Start.
	Every time.Duration

	changed  chan event.GenericEvent
	keystone Keystone
	client   client.Client
	rule     Rule

	mu   sync.Mutex
	seen map[string]state
}

// New makes a Watcher, which is a manager.Runnable of the leader.
func New(k Keystone, c client.Client, rule Rule) *Watcher {
	return &Watcher{Every: every, changed: make(chan event.GenericEvent), keystone: k, client: c, rule: rule, seen: map[string]state{}}
}

// Project implements tenant.Projects.
func (w *Watcher) Project(id string) (metav1.ConditionStatus, string, string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	s, ok := w.seen[id]
	if !ok {
		return "", "", ""
	}
	return s.status, s.reason, s.message
}

// Changed implements tenant.Projects.
func (w *Watcher) Changed() <-chan event.GenericEvent { return w.changed }

// Start implements manager.Runnable.
func (w *Watcher) Start(ctx context.Context) error {
	tick := time.NewTicker(w.Every)
	defer tick.Stop()
	for {
		for _, t := range w.Round(ctx) {
			select {
			case w.changed <- event.GenericEvent{Object: t}:
			case <-ctx.Done():
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// Round asks once for everything and returns the Tenants of whom there is news.
func (w *Watcher) Round(ctx context.Context) (news []*v1alpha1.Tenant) {
	list := &v1alpha1.TenantList{}
	if err := w.client.List(ctx, list); err != nil {
		log.G(ctx).WithError(err).Warn("Keystone's projects: the Tenants cannot be read")
		return nil
	}
	claimed, domains := map[string]bool{}, map[string]state{}
	seen := map[string]state{}
	var down error
	for i := range list.Items {
		k := list.Items[i].Spec.Keystone
		if k == nil || claimed[k.ProjectID] {
			continue
		}
		claimed[k.ProjectID] = true
		if down != nil {
			seen[k.ProjectID] = w.unknown(k.ProjectID, down)
			continue
		}
		s, err := w.ask(ctx, k.ProjectID, domains)
		if err != nil {
			down = err
			s = w.unknown(k.ProjectID, err)
		}
		seen[k.ProjectID] = s
	}
	w.mu.Lock()
	for i := range list.Items {
		if t := &list.Items[i]; t.Spec.Keystone != nil && seen[t.Spec.Keystone.ProjectID] != w.seen[t.Spec.Keystone.ProjectID] {
			news = append(news, t)
		}
	}
	w.seen = seen
	w.mu.Unlock()
	if down == nil && w.rule != (Rule{}) {
		if err := w.make(ctx, claimed); err != nil {
			log.G(ctx).WithError(err).Warn("Keystone's projects: Tenants cannot be made for them")
		}
	}
	return news
}

// unknown keeps what was known of a project that is not good: that Keystone is away mends
// nothing.
func (w *Watcher) unknown(id string, err error) state {
	w.mu.Lock()
	defer w.mu.Unlock()
	if s, ok := w.seen[id]; ok && s.status == metav1.ConditionFalse {
		return s
	}
	return state{metav1.ConditionUnknown, "KeystoneUnavailable", err.Error()}
}

// ask returns an error if Keystone does not answer.
func (w *Watcher) ask(ctx context.Context, id string, domains map[string]state) (state, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	p, err := w.keystone.Project(ctx, id)
	switch {
	case errdefs.IsNotFound(err):
		return state{metav1.ConditionFalse, "ProjectNotFound",
			"spec.keystone.projectID: " + id + ": Keystone has no such project: its users cannot log in; what the tenant has stays until the Tenant is deleted"}, nil
	case errdefs.IsPermissionDenied(err):
		return state{metav1.ConditionUnknown, "NotAllowed", err.Error()}, nil
	case err != nil:
		return state{}, err
	case p.IsDomain:
		return state{metav1.ConditionFalse, "ProjectIsDomain", "spec.keystone.projectID: " + id + " is a domain: name a project in it"}, nil
	case !p.Enabled:
		return state{metav1.ConditionFalse, "ProjectDisabled",
			"project " + p.Name + " is disabled: its users cannot log in; what runs goes on"}, nil
	}
	d, known := domains[p.DomainID]
	if !known {
		enabled, err := w.keystone.DomainEnabled(ctx, p.DomainID)
		d = state{status: metav1.ConditionTrue}
		if err == nil && !enabled {
			d = state{metav1.ConditionFalse, "DomainDisabled", "domain " + p.DomainID + " is disabled: the users of its projects cannot log in; what runs goes on"}
		}
		domains[p.DomainID] = d
	}
	if d.status == metav1.ConditionFalse {
		return d, nil
	}
	// The name is for people, and may change.
	return state{metav1.ConditionTrue, "Enabled", "project " + p.Name + " of domain " + p.DomainID}, nil
}

// make makes Tenants for the projects of the rule that have none.
func (w *Watcher) make(ctx context.Context, claimed map[string]bool) error {
	ask, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	list, err := w.keystone.Projects(ask, w.rule.query())
	if err != nil {
		return err
	}
	for _, p := range list {
		if !p.Enabled || p.IsDomain || claimed[p.ID] || !projectID.MatchString(p.ID) {
			continue
		}
		t := &v1alpha1.Tenant{
			ObjectMeta: metav1.ObjectMeta{Name: Name(p), Labels: map[string]string{LabelAuto: "true"}},
			Spec: v1alpha1.TenantSpec{
				Description: description(p), Keystone: &v1alpha1.KeystoneProject{ProjectID: p.ID},
			},
		}
		err := w.client.Create(ctx, t)
		switch {
		case apierrors.IsAlreadyExists(err):
			// The cache is behind, or the operator took the project from this Tenant.
		case err != nil:
			return fmt.Errorf("tenant %s of project %s: %w", t.Name, p.ID, err)
		default:
			log.G(ctx).WithFields(log.Fields{"tenant": t.Name, "project": p.ID}).Info("made a Tenant for a Keystone project")
		}
	}
	return nil
}

var (
	projectID = regexp.MustCompile(`^[0-9a-f]{32}$`)
	notLabel  = regexp.MustCompile(`[^a-z0-9]+`)
)

// Name of the Tenant of a project: from its name, for people, and its ID, because names are
// neither unique nor anybody's for good: who makes a project called as a tenant was must
// not come by that one's rights.
func Name(p keystone.Project) string {
	name := strings.Trim(notLabel.ReplaceAllString(strings.ToLower(p.Name), "-"), "-")
	if len(name) > 31 {
		name = strings.TrimRight(name[:31], "-")
	}
	if name == "" {
		name = "project"
	}
	return name + "-" + p.ID[:8]
}

func description(p keystone.Project) string {
	text := fmt.Sprintf("Keystone project %q of domain %s", p.Name, p.DomainID)
	if len(text) > 256 {
		text = strings.ToValidUTF8(text[:250], "") + "…"
	}
	return text
}
