// Package token owns what Keystone says of a token: the document of GET and POST
// /v3/auth/tokens, read strictly and within bounds. It must not know who may do what with
// one.
package token

import (
	"bytes"
	"encoding/json"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
)

// Limits of what is read.
const (
	// MaxBody is the largest document, which is some hundred bytes without the catalogue and
	// some ten kilobytes with that of a large cloud.
	MaxBody = 1 << 20
	// MaxItems bounds every list in it.
	MaxItems = 256
)

// Ref names something of Keystone's. Only the ID is unique: two domains may have a project
// or a user of the same name, and names change.
type Ref struct{ ID, Name string }

// Owned is something inside a domain.
type Owned struct {
	Ref
	Domain Ref
}

// Role is a role the token carries.
type Role struct {
	Ref
	// DomainID is set for a role that belongs to one domain, whose administrator chose its name.
	DomainID string
}

// ApplicationCredential is what the token was got with.
type ApplicationCredential struct {
	Ref
	// Restricted ones may not make further credentials.
	Restricted bool
	// AccessRules says that it is limited to certain requests to OpenStack's services.
	AccessRules bool
}

// Token is what Keystone says. It does not hold the token itself.
type Token struct {
	Methods           []string
	IssuedAt, Expires time.Time
	User              Owned
	// Project, Domain and System are the scope: at most one of them, and none for an unscoped
	// token.
	Project *Owned
	Domain  *Ref
	System  bool
	// IsDomain says that the project is a domain acting as one.
	IsDomain bool
	// Trust, OAuth1 and Bound say that it was delegated by a trust or an OAuth access token,
	// or is good only together with a client certificate.
	Trust, OAuth1, Bound  bool
	Roles                 []Role
	AuditIDs              []string
	ApplicationCredential *ApplicationCredential
}

type ref struct {
	ID       *string `json:"id"`
	Name     *string `json:"name"`
	Domain   *ref    `json:"domain"`
	DomainID *string `json:"domain_id"`
}

func (r *ref) plain() Ref {
	if r == nil {
		return Ref{}
	}
	return Ref{value(r.ID), value(r.Name)}
}

func (r *ref) owned() Owned { return Owned{r.plain(), r.Domain.plain()} }

func value(s *string) string {
	if s == nil {
		return ""
	}
	return *s
}

// said reports whether a field is there and not null. What is in it is not looked at:
// whatever it is, it narrows what the token is good for.
func said(m json.RawMessage) bool {
	m = bytes.TrimSpace(m)
	return len(m) > 0 && !bytes.Equal(m, []byte("null"))
}

// Decode reads the document. The error is errdefs.ErrInvalidArgument and does not repeat
// what was read.
func Decode(body []byte) (Token, error) {
	if len(body) > MaxBody {
		return Token{}, fmt.Errorf("the token's document has %d bytes, want at most %d: %w", len(body), MaxBody, errdefs.ErrInvalidArgument)
	}
	var d struct {
		Token *struct {
			Methods   []string        `json:"methods"`
			IssuedAt  *time.Time      `json:"issued_at"`
			ExpiresAt *time.Time      `json:"expires_at"`
			User      *ref            `json:"user"`
			Project   *ref            `json:"project"`
			Domain    *ref            `json:"domain"`
			System    json.RawMessage `json:"system"`
			IsDomain  bool            `json:"is_domain"`
			Trust     json.RawMessage `json:"OS-TRUST:trust"`
			OAuth1    json.RawMessage `json:"OS-OAUTH1"`
			Bind      json.RawMessage `json:"bind"`
			OAuth2    json.RawMessage `json:"oauth2_credential"`
			Roles     []ref           `json:"roles"`
			AuditIDs  []string        `json:"audit_ids"`
			AppCred   *struct {
				ref
				Restricted  *bool           `json:"restricted"`
				AccessRules json.RawMessage `json:"access_rules"`
			} `json:"application_credential"`
		} `json:"token"`
	}
	if err := json.Unmarshal(body, &d); err != nil {
		return Token{}, fmt.Errorf("the token's document is no JSON of the form wanted: %w", errdefs.ErrInvalidArgument)
	}
	t := d.Token
	switch {
	case t == nil:
		return Token{}, fmt.Errorf("the token's document has no token: %w", errdefs.ErrInvalidArgument)
	case t.User == nil || value(t.User.ID) == "":
		return Token{}, fmt.Errorf("the token's document has no user.id: %w", errdefs.ErrInvalidArgument)
	case t.ExpiresAt == nil:
		return Token{}, fmt.Errorf("the token's document has no expires_at: %w", errdefs.ErrInvalidArgument)
	case t.Project != nil && value(t.Project.ID) == "":
		return Token{}, fmt.Errorf("the token's document has a project without id: %w", errdefs.ErrInvalidArgument)
	case len(t.Roles) > MaxItems || len(t.AuditIDs) > MaxItems || len(t.Methods) > MaxItems:
		return Token{}, fmt.Errorf("the token's document has a list of more than %d items: %w", MaxItems, errdefs.ErrInvalidArgument)
	}
	out := Token{
		Methods: t.Methods, Expires: *t.ExpiresAt, User: t.User.owned(), AuditIDs: t.AuditIDs,
		System: said(t.System), IsDomain: t.IsDomain,
		Trust: said(t.Trust), OAuth1: said(t.OAuth1), Bound: said(t.Bind) || said(t.OAuth2),
	}
	if t.IssuedAt != nil {
		out.IssuedAt = *t.IssuedAt
	}
	if t.Project != nil {
		p := t.Project.owned()
		out.Project = &p
	}
	if t.Domain != nil {
		r := t.Domain.plain()
		out.Domain = &r
	}
	for _, r := range t.Roles {
		out.Roles = append(out.Roles, Role{r.plain(), value(r.DomainID)})
	}
	if c := t.AppCred; c != nil {
		out.ApplicationCredential = &ApplicationCredential{c.plain(), c.Restricted == nil || *c.Restricted, said(c.AccessRules)}
	}
	return out, nil
}
