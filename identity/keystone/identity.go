package keystone

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/containerd/errdefs"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/identity/keystone/token"
)

// UserPrefix begins the names of Keystone's users.
const UserPrefix = "keystone:"

// Keys of what a user's extra fields hold, for audit. Nothing is decided by them.
const (
	ExtraProject       = "hypernetes.io/project"
	ExtraProjectName   = "hypernetes.io/project-name"
	ExtraProjectDomain = "hypernetes.io/project-domain"
	ExtraDomain        = "hypernetes.io/domain"
	ExtraUserName      = "hypernetes.io/user-name"
	ExtraRoles         = "hypernetes.io/roles"
	ExtraAuditIDs      = "hypernetes.io/audit-ids"
	ExtraCredential    = "hypernetes.io/credential"
	ExtraTenant        = "hypernetes.io/tenant"
)

// Refusal is why a token that is good for Keystone is not good here.
type Refusal struct{ Reason string }

func (r *Refusal) Error() string { return r.Reason }

// Is classes it.
func (r *Refusal) Is(target error) bool { return target == errdefs.ErrPermissionDenied }

func refusef(format string, args ...any) error { return &Refusal{fmt.Sprintf(format, args...)} }

// Roles says which role of a tenant a Keystone role stands for, by its name or its ID.
// Roles that are not in it stand for nothing, admin among them: who is administrator of
// some project in OpenStack may do anything there, and is nobody here.
type Roles map[string]v1alpha1.Role

// StandardRoles are those Keystone itself begins with.
func StandardRoles() Roles {
	return Roles{"reader": v1alpha1.RoleReader, "member": v1alpha1.RoleMember, "manager": v1alpha1.RoleManager}
}

// ParseRoles reads "member=manager,9fe2ff9e=reader": Keystone's name or ID, then ours.
func ParseRoles(text string) (Roles, error) {
	if text == "" {
		return StandardRoles(), nil
	}
	out := Roles{}
	for pair := range strings.SplitSeq(text, ",") {
		theirs, ours, ok := strings.Cut(strings.TrimSpace(pair), "=")
		if !ok || theirs == "" || !slices.Contains(order, v1alpha1.Role(ours)) {
			return nil, fmt.Errorf("%q: want KEYSTONE-ROLE=ROLE, ROLE being reader, member or manager: %w", pair, errdefs.ErrInvalidArgument)
		}
		if _, twice := out[theirs]; twice {
			return nil, fmt.Errorf("%q: role %q is mapped twice: %w", pair, theirs, errdefs.ErrInvalidArgument)
		}
		out[theirs] = v1alpha1.Role(ours)
	}
	return out, nil
}

var order = []v1alpha1.Role{v1alpha1.RoleReader, v1alpha1.RoleMember, v1alpha1.RoleManager}

// id is what Keystone's IDs look like: 32 or 64 hexadecimal digits of its own making, and
// what an LDAP directory has for its users. No colon: a name made of one has a prefix and
// nothing that looks like another.
var id = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.@-]{0,127}$`)

// Identity is who a token is, before its project's tenant is known.
type Identity struct {
	User, Project string
	Roles         []v1alpha1.Role
	Extra         map[string][]string
	Expires       time.Time
}

// Identify decides on what Keystone says of a token. Names decide nothing, as two domains
// may have the same ones and administrators of a domain choose them; only the names of
// global roles do, which are unique.
func (m Roles) Identify(t token.Token, now time.Time) (Identity, error) {
	switch {
	case !t.Expires.After(now):
		return Identity{}, refusef("the token ended at %s", t.Expires.UTC().Format(time.RFC3339))
	case !id.MatchString(t.User.ID):
		return Identity{}, refusef("the ID of the token's user is none that can be taken: want 1 to 128 letters, digits and _ . @ -")
	case t.System:
		return Identity{}, refusef("user %s: the token is scoped to the system: want one scoped to a project", t.User.ID)
	case t.Domain != nil:
		return Identity{}, refusef("user %s: the token is scoped to a domain: want one scoped to a project", t.User.ID)
	case t.Project == nil:
		return Identity{}, refusef("user %s: the token is not scoped: want one scoped to a project", t.User.ID)
	case t.IsDomain:
		return Identity{}, refusef("user %s: the token is scoped to a domain acting as project %s: want one scoped to a project", t.User.ID, clean(t.Project.ID))
	case !id.MatchString(t.Project.ID):
		return Identity{}, refusef("user %s: the ID of the token's project is none that can be taken", t.User.ID)
	case t.Trust:
		return Identity{}, refusef("user %s: the token is of a trust, which shows the trustor for the one who acts: use an application credential", t.User.ID)
	case t.OAuth1:
		return Identity{}, refusef("user %s: the token is of an OAuth delegation, which shows another for the one who acts: use an application credential", t.User.ID)
	case t.Bound:
		return Identity{}, refusef("user %s: the token is bound to a client certificate, which cannot be checked here: use an application credential", t.User.ID)
	case t.ApplicationCredential != nil && t.ApplicationCredential.AccessRules:
		return Identity{}, refusef("user %s: application credential %s has access rules, which name requests to OpenStack's services and cannot be held to here: make one without, with fewer roles",
			t.User.ID, clean(t.ApplicationCredential.ID))
	}
	out := Identity{User: t.User.ID, Project: t.Project.ID, Expires: t.Expires, Extra: map[string][]string{}}
	var names []string
	for _, r := range t.Roles {
		role, ok := m[r.ID]
		// A domain's own role may be called like a global one.
		if !ok && r.DomainID == "" {
			role, ok = m[r.Name]
		}
		if ok && !slices.Contains(out.Roles, role) {
			out.Roles = append(out.Roles, role)
		}
		names = append(names, r.Name)
	}
	if len(out.Roles) == 0 {
		return Identity{}, refusef("user %s: none of the token's roles in project %s stands for a role of a tenant (reader, member, manager unless configured): %s",
			t.User.ID, t.Project.ID, clean(strings.Join(names, ", ")))
	}
	slices.SortFunc(out.Roles, func(a, b v1alpha1.Role) int { return slices.Index(order, a) - slices.Index(order, b) })
	put := func(key string, values ...string) {
		for _, v := range values {
			// Whoever reads them must not take one for Kubernetes' own.
			if v = clean(v); v != "" && !strings.HasPrefix(v, "system:") && len(out.Extra[key]) < 32 {
				out.Extra[key] = append(out.Extra[key], v)
			}
		}
	}
	put(ExtraProject, t.Project.ID)
	put(ExtraProjectName, t.Project.Name)
	put(ExtraProjectDomain, t.Project.Domain.ID)
	put(ExtraDomain, t.User.Domain.ID)
	put(ExtraUserName, t.User.Name)
	put(ExtraRoles, names...)
	put(ExtraAuditIDs, t.AuditIDs...)
	if c := t.ApplicationCredential; c != nil {
		put(ExtraCredential, c.ID)
	}
	return out, nil
}

// clean makes a text of Keystone's fit for logs: printable, and bounded.
func clean(s string) string {
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	if len(s) > 255 {
		s = strings.ToValidUTF8(s[:252], "") + "…"
	}
	return s
}
