package keystonetest

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/hypernetes/hypernetes/identity/keystone/login"
)

// Keystone is one to test against.
type Keystone struct {
	Admin  login.Credentials
	Client *http.Client
	// Wrap is what package keystone's Service wants for reaching it; nil if it is nothing.
	Wrap func(http.RoundTripper) http.RoundTripper
}

// Of is the Fake as a Keystone.
func Of(f *Fake) Keystone {
	return Keystone{
		Admin: login.Credentials{Source: "fake", URL: f.URL, Method: login.Password, Username: "admin", UserDomainID: "default",
			Secret: Password, ProjectName: "admin", ProjectDomainID: "default"},
		Client: login.HTTP(&http.Transport{}),
	}
}

// Admin makes what a test needs, under names of its own, and takes it away at its end.
type Admin struct {
	Keystone
	t     testing.TB
	token string
	roles map[string]string
	// Suffix makes names unique.
	Suffix string
}

// NewAdmin logs in.
func NewAdmin(t testing.TB, k Keystone) *Admin {
	t.Helper()
	issued, err := k.Admin.Login(t.Context(), k.Client)
	if err != nil {
		t.Fatal(err)
	}
	a := &Admin{Keystone: k, t: t, token: issued.ID, roles: map[string]string{}, Suffix: "-t" + newID()[:8]}
	var list struct {
		Roles []struct{ ID, Name string }
	}
	a.Do(http.MethodGet, "/roles", nil, &list)
	for _, r := range list.Roles {
		a.roles[r.Name] = r.ID
	}
	return a
}

// Try sends a request as the bearer of token, the administrator if it is empty.
func (a *Admin) Try(token, method, path string, in, out any) (int, http.Header) {
	a.t.Helper()
	if token == "" {
		token = a.token
	}
	var body io.Reader
	if in != nil {
		text, err := json.Marshal(in)
		if err != nil {
			a.t.Fatal(err)
		}
		body = bytes.NewReader(text)
	}
	// Not the test's context: it has ended when things are taken away.
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, a.Keystone.Admin.URL+path, body)
	if err != nil {
		a.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("X-Auth-Token", token)
	resp, err := a.Client.Do(req)
	if err != nil {
		a.t.Fatalf("%s %s: %v", method, path, err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		a.t.Fatalf("%s %s: %v", method, path, err)
	}
	if out != nil && resp.StatusCode < 300 {
		if err := json.Unmarshal(text, out); err != nil {
			a.t.Fatalf("%s %s: %v: %s", method, path, err, text)
		}
	}
	if resp.StatusCode >= 300 {
		a.t.Logf("%s %s: HTTP %d %s", method, path, resp.StatusCode, text)
	}
	return resp.StatusCode, resp.Header
}

// Do is Try as administrator; it must succeed.
func (a *Admin) Do(method, path string, in, out any) {
	a.t.Helper()
	if code, _ := a.Try("", method, path, in, out); code >= 300 {
		a.t.Fatalf("%s %s: HTTP %d", method, path, code)
	}
}

func (a *Admin) create(kind string, object map[string]any) string {
	a.t.Helper()
	out := map[string]struct{ ID string }{}
	a.Do(http.MethodPost, "/"+kind+"s", map[string]any{kind: object}, &out)
	id := out[kind].ID
	a.t.Cleanup(func() {
		if kind == "domain" {
			a.Try("", http.MethodPatch, "/domains/"+id, map[string]any{"domain": map[string]any{"enabled": false}}, nil)
		}
		a.Try("", http.MethodDelete, "/"+kind+"s/"+id, nil, nil)
	})
	return id
}

// Domain makes one and returns its ID.
func (a *Admin) Domain(name string) string {
	a.t.Helper()
	return a.create("domain", map[string]any{"name": name + a.Suffix})
}

// Project makes one and returns its ID.
func (a *Admin) Project(domain, name string, tags ...string) string {
	a.t.Helper()
	return a.create("project", map[string]any{"name": name + a.Suffix, "domain_id": domain, "tags": append([]string{}, tags...)})
}

// User of a domain.
type User struct{ ID, Name, Domain, Password string }

// User makes one.
func (a *Admin) User(domain, name string) User {
	a.t.Helper()
	u := User{Name: name + a.Suffix, Domain: domain, Password: "pw-" + newID()}
	u.ID = a.create("user", map[string]any{"name": u.Name, "domain_id": domain, "password": u.Password})
	return u
}

// Role makes sure that there is one of that name, and returns its ID.
func (a *Admin) Role(name string) string {
	a.t.Helper()
	if a.roles[name] == "" {
		out := map[string]struct{ ID string }{}
		a.Do(http.MethodPost, "/roles", map[string]any{"role": map[string]any{"name": name}}, &out)
		a.roles[name] = out["role"].ID
	}
	return a.roles[name]
}

// Grant gives a user a role in a project.
func (a *Admin) Grant(project string, u User, role string) {
	a.t.Helper()
	a.Do(http.MethodPut, "/projects/"+project+"/users/"+u.ID+"/roles/"+a.Role(role), nil, nil)
}

// Revoke takes it away.
func (a *Admin) Revoke(project string, u User, role string) {
	a.t.Helper()
	a.Do(http.MethodDelete, "/projects/"+project+"/users/"+u.ID+"/roles/"+a.Role(role), nil, nil)
}

// Group makes a group of that very name with a member.
func (a *Admin) Group(domain, name string, u User) {
	a.t.Helper()
	out := map[string]struct{ ID string }{}
	a.Do(http.MethodPost, "/groups", map[string]any{"group": map[string]any{"name": name, "domain_id": domain}}, &out)
	id := out["group"].ID
	a.t.Cleanup(func() { a.Try("", http.MethodDelete, "/groups/"+id, nil, nil) })
	a.Do(http.MethodPut, "/groups/"+id+"/users/"+u.ID, nil, nil)
}

// Enable switches a project or domain on or off.
func (a *Admin) Enable(kind, id string, enabled bool) {
	a.t.Helper()
	a.Do(http.MethodPatch, "/"+kind+"s/"+id, map[string]any{kind: map[string]any{"enabled": enabled}}, nil)
}

// Password is how u logs in to a project.
func (a *Admin) Password(u User, project string) login.Credentials {
	return login.Credentials{Source: "test", URL: a.Keystone.Admin.URL, Method: login.Password, UserID: u.ID, Secret: u.Password, ProjectID: project}
}

// Token logs in.
func (a *Admin) Token(c login.Credentials) login.Issued {
	a.t.Helper()
	issued, err := c.Login(a.t.Context(), a.Client)
	if err != nil {
		a.t.Fatalf("log in: %v", err)
	}
	return issued
}

// Raw logs in with any scope.
func (a *Admin) Raw(u User, scope any) string {
	a.t.Helper()
	auth := map[string]any{"identity": map[string]any{"methods": []string{"password"},
		"password": map[string]any{"user": map[string]any{"id": u.ID, "password": u.Password}}}, "scope": scope}
	code, header := a.Try("", http.MethodPost, "/auth/tokens?nocatalog", map[string]any{"auth": auth}, nil)
	if code != http.StatusCreated {
		a.t.Fatalf("log in for scope %v: HTTP %d", scope, code)
	}
	return header.Get("X-Subject-Token")
}

// ApplicationCredential makes one of u's, of that role or of all, with access rules if any.
func (a *Admin) ApplicationCredential(u User, project, role string, rules ...any) login.Credentials {
	a.t.Helper()
	token := a.Token(a.Password(u, project)).ID
	object := map[string]any{"name": "ac-" + newID()}
	if role != "" {
		object["roles"] = []any{map[string]any{"name": role}}
	}
	if len(rules) > 0 {
		object["access_rules"] = rules
	}
	var out struct {
		Cred struct{ ID, Secret string } `json:"application_credential"`
	}
	// A Keystone that is busy with others' grants now and then says for a moment that an implied
	// role is not assigned.
	tick := time.NewTicker(300 * time.Millisecond)
	defer tick.Stop()
	for tries := 0; ; tries++ {
		code, _ := a.Try(token, http.MethodPost, "/users/"+u.ID+"/application_credentials", map[string]any{"application_credential": object}, &out)
		if code == http.StatusCreated {
			break
		}
		if code != http.StatusBadRequest || tries == 10 {
			a.t.Fatalf("application credential: HTTP %d", code)
		}
		<-tick.C
	}
	return login.Credentials{Source: "test", URL: a.Keystone.Admin.URL, Method: login.ApplicationCredential, ApplicationCredentialID: out.Cred.ID, Secret: out.Cred.Secret}
}

// Trust has trustor lend a role in a project, and returns the trustee's token for it.
func (a *Admin) Trust(trustor, trustee User, project, role string) string {
	a.t.Helper()
	var out struct{ Trust struct{ ID string } }
	token := a.Token(a.Password(trustor, project)).ID
	if code, _ := a.Try(token, http.MethodPost, "/OS-TRUST/trusts", map[string]any{"trust": map[string]any{
		"trustor_user_id": trustor.ID, "trustee_user_id": trustee.ID, "project_id": project, "impersonation": true, "roles": []any{map[string]any{"name": role}},
	}}, &out); code != http.StatusCreated {
		a.t.Fatalf("trust: HTTP %d", code)
	}
	return a.Raw(trustee, map[string]any{"OS-TRUST:trust": map[string]any{"id": out.Trust.ID}})
}

// RevokeToken is what openstack token revoke does.
func (a *Admin) RevokeToken(id string) {
	a.t.Helper()
	req, err := http.NewRequestWithContext(a.t.Context(), http.MethodDelete, a.Keystone.Admin.URL+"/auth/tokens", nil)
	if err != nil {
		a.t.Fatal(err)
	}
	req.Header.Set("X-Auth-Token", a.token)
	req.Header.Set("X-Subject-Token", id)
	resp, err := a.Client.Do(req)
	if err != nil {
		a.t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusNoContent {
		a.t.Fatal(fmt.Errorf("revoke: HTTP %d", resp.StatusCode))
	}
}
