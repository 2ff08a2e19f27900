package keystonetest

import (
	"context"
	"net/http"
	"net/url"
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/identity/keystone/login"
	"github.com/hypernetes/hypernetes/identity/keystone/token"
)

// Asker is what package keystone's Service does that Conformance checks.
type Asker interface {
	Validate(ctx context.Context, subject string) (token.Token, error)
}

// Accessible is one access rule.
func Accessible() any {
	return map[string]any{"path": "/v2.0/networks", "method": "GET", "service": "network"}
}

// ServiceUser makes a user who may validate tokens and nothing else.
func (a *Admin) ServiceUser() login.Credentials {
	a.t.Helper()
	project := a.Project("default", "service")
	u := a.User("default", "webhook")
	a.Grant(project, u, "service")
	return a.Password(u, project)
}

// Conformance is how a Keystone behaves as far as we rely on it. ask is made with the
// credentials of a user with the role service.
func Conformance(t *testing.T, k Keystone, service func(login.Credentials) Asker) {
	a := NewAdmin(t, k)
	ask := service(a.ServiceUser())
	other := a.Domain("dom")
	blue, red := a.Project("default", "blue", "hypernetes"), a.Project("default", "red")
	// The same names, in another domain.
	alien := a.Project(other, "blue")
	ann, zoe := a.User("default", "ann"), a.User(other, "ann")
	a.Grant(blue, ann, "manager")
	a.Grant(red, ann, "reader")
	a.Grant(alien, zoe, "member")

	validate := func(t *testing.T, id string) token.Token {
		t.Helper()
		got, err := ask.Validate(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	gone := func(t *testing.T, id string) {
		t.Helper()
		if got, err := ask.Validate(t.Context(), id); !errdefs.IsNotFound(err) {
			t.Errorf("%+v %v, want not found", got, err)
		}
	}
	roles := func(x token.Token) (names []string) {
		for _, r := range x.Roles {
			names = append(names, r.Name)
		}
		slices.Sort(names)
		return slices.Compact(names)
	}

	t.Run("password", func(t *testing.T) {
		issued := a.Token(a.Password(ann, blue))
		got := validate(t, issued.ID)
		if got.User.ID != ann.ID || got.User.Domain.ID != "default" || got.Project == nil || got.Project.ID != blue || got.Project.Domain.ID != "default" ||
			got.System || got.Domain != nil || got.Trust || got.IsDomain || got.ApplicationCredential != nil || len(got.AuditIDs) == 0 || !slices.Equal(got.Methods, []string{"password"}) {
			t.Errorf("%+v", got)
		}
		if d := time.Until(got.Expires); d < 5*time.Minute || d > 48*time.Hour || !got.Expires.Equal(issued.Expires) {
			t.Errorf("ends in %s", d)
		}
		if r := roles(got); !slices.Contains(r, "manager") {
			t.Errorf("roles %v", r)
		}
	})
	t.Run("by name and domain", func(t *testing.T) {
		for _, c := range []struct {
			u       User
			project string
		}{{ann, blue}, {zoe, alien}} {
			cred := a.Password(c.u, "")
			cred.UserID, cred.Username, cred.UserDomainID = "", c.u.Name, c.u.Domain
			cred.ProjectName, cred.ProjectDomainID = "blue"+a.Suffix, c.u.Domain
			if got := a.Token(cred); got.User.ID != c.u.ID || got.Project.ID != c.project {
				t.Errorf("%+v, want user %s of project %s", got.Token, c.u.ID, c.project)
			}
			cred.Secret = "wrong"
			if _, err := cred.Login(t.Context(), a.Client); !errdefs.IsUnauthorized(err) {
				t.Errorf("a wrong password: %v", err)
			}
		}
	})
	t.Run("several projects", func(t *testing.T) {
		first := a.Token(a.Password(ann, blue))
		// A token is good for a token of another project.
		c := login.Credentials{Source: "test", URL: a.Keystone.Admin.URL, Method: login.Token, Secret: first.ID, ProjectID: red}
		second := a.Token(c)
		if got := validate(t, second.ID); got.Project.ID != red || slices.Contains(roles(got), "manager") {
			t.Errorf("%+v", got)
		}
		c.ProjectID = ""
		if got := a.Token(c); got.ID != first.ID || got.Project.ID != blue {
			t.Errorf("a token as it is: %+v", got)
		}
		loose := c
		loose.Secret = a.Raw(ann, "unscoped")
		if got, err := loose.Login(t.Context(), a.Client); !errdefs.IsInvalidArgument(err) {
			t.Errorf("a token of no project: %+v %v", got, err)
		}
		// Logging in with a token and no scope does not keep the token's.
		var again struct {
			Token struct{ Project *struct{ ID string } }
		}
		a.Try("", http.MethodPost, "/auth/tokens?nocatalog", map[string]any{"auth": map[string]any{"identity": map[string]any{"methods": []string{"token"}, "token": map[string]any{"id": first.ID}}}}, &again)
		if again.Token.Project != nil {
			t.Errorf("scoped to %s", again.Token.Project.ID)
		}
		c.ProjectID = alien
		if _, err := c.Login(t.Context(), a.Client); !errdefs.IsUnauthorized(err) {
			t.Errorf("a project of others: %v", err)
		}
		if err := c.Check(t.Context(), a.Client, second.ID); err != nil {
			t.Error(err)
		}
	})
	t.Run("application credential", func(t *testing.T) {
		c := a.ApplicationCredential(ann, blue, "manager")
		issued := a.Token(c)
		got := validate(t, issued.ID)
		if got.Project.ID != blue || got.ApplicationCredential == nil || got.ApplicationCredential.ID != c.ApplicationCredentialID ||
			!got.ApplicationCredential.Restricted || got.ApplicationCredential.AccessRules {
			t.Errorf("%+v", got)
		}
		c.Secret = "wrong"
		if _, err := c.Login(t.Context(), a.Client); !errdefs.IsUnauthorized(err) {
			t.Errorf("a wrong secret: %v", err)
		}
		if code, _ := a.Try(a.Token(a.Password(ann, blue)).ID, http.MethodDelete, "/users/"+ann.ID+"/application_credentials/"+c.ApplicationCredentialID, nil, nil); code != http.StatusNoContent {
			t.Fatalf("delete: HTTP %d", code)
		}
		gone(t, issued.ID)
	})
	t.Run("access rules", func(t *testing.T) {
		got := validate(t, a.Token(a.ApplicationCredential(ann, blue, "manager", Accessible())).ID)
		if got.ApplicationCredential == nil || !got.ApplicationCredential.AccessRules {
			t.Errorf("%+v", got)
		}
	})
	t.Run("scopes", func(t *testing.T) {
		if got := validate(t, a.Raw(ann, "unscoped")); got.Project != nil || got.Domain != nil || got.System || len(got.Roles) > 0 {
			t.Errorf("unscoped: %+v", got)
		}
		root := a.User("default", "root")
		a.Do(http.MethodPut, "/system/users/"+root.ID+"/roles/"+a.Role("reader"), nil, nil)
		if got := validate(t, a.Raw(root, map[string]any{"system": map[string]any{"all": true}})); !got.System || got.Project != nil {
			t.Errorf("system: %+v", got)
		}
		a.Do(http.MethodPut, "/domains/"+other+"/users/"+root.ID+"/roles/"+a.Role("manager"), nil, nil)
		if got := validate(t, a.Raw(root, map[string]any{"domain": map[string]any{"id": other}})); got.Domain == nil || got.Domain.ID != other || got.Project != nil {
			t.Errorf("domain: %+v", got)
		}
		if got := validate(t, a.Trust(ann, root, blue, "manager")); !got.Trust || got.Project == nil || got.User.ID != ann.ID {
			t.Errorf("trust: %+v", got)
		}
	})
	t.Run("garbage", func(t *testing.T) {
		for _, id := range []string{"gAAAAABgarbagegarbagegarbage", newID(), "eyJhbGciOiJFUzI1NiJ9.e30.c2ln"} {
			gone(t, id)
		}
	})
	t.Run("revoked", func(t *testing.T) {
		issued := a.Token(a.Password(ann, blue))
		a.RevokeToken(issued.ID)
		gone(t, issued.ID)
		if err := a.Password(ann, blue).Check(t.Context(), a.Client, issued.ID); !errdefs.IsUnauthorized(err) {
			t.Errorf("its bearer is told: %v", err)
		}
	})
	t.Run("role taken away", func(t *testing.T) {
		u := a.User("default", "bob")
		a.Grant(blue, u, "member")
		a.Grant(blue, u, "manager")
		id := a.Token(a.Password(u, blue)).ID
		a.Revoke(blue, u, "manager")
		// Keystone may have the token end altogether, which is as good.
		if got, err := ask.Validate(t.Context(), id); err == nil && slices.Contains(roles(got), "manager") {
			t.Errorf("the token has the role still: %v", roles(got))
		} else if err != nil && !errdefs.IsNotFound(err) {
			t.Error(err)
		}
	})
	t.Run("project disabled", func(t *testing.T) {
		p := a.Project("default", "short")
		a.Grant(p, ann, "member")
		id := a.Token(a.Password(ann, p)).ID
		a.Enable("project", p, false)
		gone(t, id)
		if _, err := a.Password(ann, p).Login(t.Context(), a.Client); !errdefs.IsUnauthorized(err) {
			t.Errorf("log in: %v", err)
		}
	})
	t.Run("user disabled", func(t *testing.T) {
		u := a.User("default", "eve")
		a.Grant(blue, u, "member")
		id := a.Token(a.Password(u, blue)).ID
		a.Enable("user", u.ID, false)
		gone(t, id)
	})
	t.Run("projects", func(t *testing.T) {
		full := service(k.Admin)
		p, ok := full.(interface {
			Project(ctx context.Context, id string) (name string, enabled bool, err error)
			Tagged(ctx context.Context, query url.Values) ([]string, error)
		})
		if !ok {
			t.Fatalf("%T does not ask for projects", full)
		}
		if name, enabled, err := p.Project(t.Context(), blue); err != nil || !enabled || name != "blue"+a.Suffix {
			t.Errorf("%q %t %v", name, enabled, err)
		}
		if _, _, err := p.Project(t.Context(), newID()); !errdefs.IsNotFound(err) {
			t.Errorf("none: %v", err)
		}
		a.Do(http.MethodPatch, "/projects/"+red, map[string]any{"project": map[string]any{"name": "renamed" + a.Suffix}}, nil)
		a.Enable("project", red, false)
		if name, enabled, err := p.Project(t.Context(), red); err != nil || enabled || name != "renamed"+a.Suffix {
			t.Errorf("%q %t %v", name, enabled, err)
		}
		ids, err := p.Tagged(t.Context(), url.Values{"tags": {"hypernetes"}})
		if err != nil || !slices.Contains(ids, blue) || slices.Contains(ids, red) {
			t.Errorf("tagged: %v %v", ids, err)
		}
		if ids, err = p.Tagged(t.Context(), url.Values{"domain_id": {other}}); err != nil || !slices.Equal(ids, []string{alien}) {
			t.Errorf("of a domain: %v %v", ids, err)
		}
	})
}
