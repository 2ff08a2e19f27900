// Package keystonetest is for tests of what talks to Keystone: a Fake in memory, an Admin
// who prepares projects and users in any Keystone, and Conformance, which runs against the
// Fake and against a real one so that the Fake stays honest.
package keystonetest

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// Password of the Fake's first user, admin of domain Default, who has the role admin in
// project admin.
const Password = "fake-admin-password"

// Fake is the part of Keystone's API that is used here.
type Fake struct {
	URL string
	// Lifetime of tokens that are issued from now on.
	Lifetime time.Duration

	server *httptest.Server
	mu     sync.Mutex
	// Broken, if set, answers instead of Keystone.
	broken                                         http.HandlerFunc
	domains, projects, users, roles, creds, trusts map[string]*thing
	grants                                         map[grant]bool
	implies                                        map[[2]string]bool
	tokens                                         map[string]*issue
	count                                          map[string]int
}

type thing struct {
	ID, Name, Domain string
	Disabled         bool
	Tags             []string

	// Of users and credentials.
	secret string
	// Of credentials and trusts.
	user, other, project string
	roles                []string
	rules                []any
	unrestricted         bool
}

type grant struct{ kind, target, user, role string }

type issue struct {
	user, project, domain string
	system                bool
	methods               []string
	cred, trust           string
	issued, expires       time.Time
	audit                 string
	version               string // the password at the time
}

func newID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // cannot fail
	return hex.EncodeToString(b[:])
}

// NewFake starts a Keystone with a domain, roles, and an administrator.
func NewFake(t testing.TB) *Fake {
	t.Helper()
	f := &Fake{
		Lifetime: time.Hour,
		domains:  map[string]*thing{"default": {ID: "default", Name: "Default"}},
		projects: map[string]*thing{}, users: map[string]*thing{}, roles: map[string]*thing{}, creds: map[string]*thing{}, trusts: map[string]*thing{},
		grants: map[grant]bool{}, implies: map[[2]string]bool{}, tokens: map[string]*issue{}, count: map[string]int{},
	}
	role := map[string]string{}
	for _, name := range []string{"admin", "manager", "member", "reader", "service"} {
		role[name] = newID()
		f.roles[role[name]] = &thing{ID: role[name], Name: name}
	}
	f.implies[[2]string{role["admin"], role["manager"]}] = true
	f.implies[[2]string{role["manager"], role["member"]}] = true
	f.implies[[2]string{role["member"], role["reader"]}] = true
	p, u := newID(), newID()
	f.projects[p] = &thing{ID: p, Name: "admin", Domain: "default"}
	f.users[u] = &thing{ID: u, Name: "admin", Domain: "default", secret: Password}
	f.grants[grant{"projects", p, u, role["admin"]}] = true
	f.grants[grant{"system", "", u, role["admin"]}] = true
	f.server = httptest.NewServer(f)
	f.URL = f.server.URL + "/v3"
	t.Cleanup(f.server.Close)
	return f
}

// Break has every request answered by h; nil mends it.
func (f *Fake) Break(h http.HandlerFunc) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.broken = h
}

// Count is how often a method and path, IDs left out, were asked for: "GET auth/tokens".
func (f *Fake) Count(what string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.count[what]
}

type failure struct {
	code    int
	message string
}

func fail(code int, message string) { panic(failure{code, message}) }

func deny() { fail(401, "The request you have made requires authentication.") }

// ServeHTTP implements http.Handler.
func (f *Fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	if b := f.broken; b != nil {
		f.mu.Unlock()
		b(w, r)
		return
	}
	defer f.mu.Unlock()
	defer func() {
		switch e := recover().(type) {
		case nil:
		case failure:
			answer(w, e.code, map[string]any{"error": map[string]any{"code": e.code, "message": e.message, "title": http.StatusText(e.code)}})
		default:
			panic(e)
		}
	}()
	path, ok := strings.CutPrefix(r.URL.Path, "/v3/")
	if !ok {
		fail(404, "(http://"+r.Host+r.URL.Path+"): The resource could not be found.")
	}
	var body map[string]any
	if text, _ := io.ReadAll(r.Body); len(text) > 0 && json.Unmarshal(text, &body) != nil {
		fail(400, "Expecting to find valid JSON in request body.")
	}
	parts := strings.Split(path, "/")
	if path == "auth/tokens" {
		f.count[r.Method+" "+path]++
		if r.Method == "POST" {
			f.issue(w, dig(body, "auth"))
			return
		}
		f.token(w, r)
		return
	}
	f.count[r.Method+" "+parts[0]]++
	caller := f.caller(r)
	f.manage(w, r, parts, body, caller)
}

func answer(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	if v != nil {
		_ = json.NewEncoder(w).Encode(v)
	}
}

func dig(v any, path ...string) map[string]any {
	for _, p := range path {
		m, _ := v.(map[string]any)
		v = m[p]
	}
	m, _ := v.(map[string]any)
	return m
}

func text(m map[string]any, key string) string {
	s, _ := m[key].(string)
	return s
}

// named finds by ID, or by name and domain.
func (f *Fake) named(kind map[string]*thing, m map[string]any) *thing {
	if id := text(m, "id"); id != "" {
		return kind[id]
	}
	d := dig(m, "domain")
	domain := text(d, "id")
	for _, x := range f.domains {
		if domain == "" && x.Name == text(d, "name") && x.Name != "" {
			domain = x.ID
		}
	}
	for _, x := range kind {
		if x.Name == text(m, "name") && x.Domain == domain && domain != "" {
			return x
		}
	}
	return nil
}

func (f *Fake) enabled(x *thing) bool {
	return x != nil && !x.Disabled && (x.Domain == "" || !f.domains[x.Domain].Disabled)
}

// issue is POST /v3/auth/tokens.
func (f *Fake) issue(w http.ResponseWriter, auth map[string]any) {
	identity := dig(auth, "identity")
	methods, _ := identity["methods"].([]any)
	if len(methods) != 1 {
		fail(400, "'methods' is a required property")
	}
	i := &issue{issued: time.Now().UTC(), audit: base64.RawURLEncoding.EncodeToString([]byte(newID()))[:22]}
	i.expires = i.issued.Add(f.Lifetime)
	var user *thing
	switch method := methods[0]; method {
	case "password":
		m := dig(identity, "password", "user")
		if user = f.named(f.users, m); user == nil || text(m, "password") != user.secret {
			deny()
		}
		i.methods = []string{"password"}
	case "token":
		old := f.tokens[text(dig(identity, "token"), "id")]
		if old == nil || f.render(old) == nil || old.cred != "" || old.trust != "" {
			deny()
		}
		user, i.methods, i.expires, i.audit = f.users[old.user], append([]string{"token"}, old.methods...), old.expires, old.audit
	case "application_credential":
		m := dig(identity, "application_credential")
		c := f.creds[text(m, "id")]
		if c == nil {
			u := f.named(f.users, dig(m, "user"))
			for _, x := range f.creds {
				if u != nil && x.user == u.ID && x.Name == text(m, "name") {
					c = x
				}
			}
		}
		if c == nil || c.secret != text(m, "secret") {
			deny()
		}
		user, i.cred, i.project, i.methods = f.users[c.user], c.ID, c.project, []string{"application_credential"}
	default:
		deny()
	}
	if !f.enabled(user) {
		deny()
	}
	i.user, i.version = user.ID, user.secret
	scope := dig(auth, "scope")
	switch {
	case auth["scope"] == "unscoped":
		i.project = ""
	case scope["project"] != nil:
		p := f.named(f.projects, dig(scope, "project"))
		if !f.enabled(p) {
			deny()
		}
		i.project = p.ID
	case scope["domain"] != nil:
		d := f.named(f.domains, dig(scope, "domain"))
		if d == nil {
			deny()
		}
		i.domain = d.ID
	case scope["system"] != nil:
		i.system = true
	case scope["OS-TRUST:trust"] != nil:
		tr := f.trusts[text(dig(scope, "OS-TRUST:trust"), "id")]
		if tr == nil || tr.other != user.ID {
			deny()
		}
		i.trust, i.project = tr.ID, tr.project
	}
	doc := f.render(i)
	if doc == nil {
		deny()
	}
	id := "gAAAAAB" + base64.RawURLEncoding.EncodeToString([]byte(newID() + newID() + newID() + newID()))[:170]
	f.tokens[id] = i
	w.Header().Set("X-Subject-Token", id)
	answer(w, 201, doc)
}

func (f *Fake) ref(kind map[string]*thing, id string) map[string]any {
	x := kind[id]
	return map[string]any{"id": x.ID, "name": x.Name, "domain": map[string]any{"id": x.Domain, "name": f.domains[x.Domain].Name}}
}

// render is the token's document, or nil if it is not good (any more): like Fernet tokens,
// it is worked out each time.
func (f *Fake) render(i *issue) map[string]any {
	user := f.users[i.user]
	if !f.enabled(user) || user.secret != i.version || !time.Now().Before(i.expires) {
		return nil
	}
	const stamp = "2006-01-02T15:04:05.000000Z"
	t := map[string]any{
		"methods": i.methods, "audit_ids": []string{i.audit}, "user": f.ref(f.users, i.user),
		"issued_at": i.issued.Format(stamp), "expires_at": i.expires.UTC().Format(stamp),
	}
	holder, target := i.user, grant{kind: "projects", target: i.project}
	switch {
	case i.system:
		t["system"], target = map[string]any{"all": true}, grant{kind: "system"}
	case i.domain != "":
		t["domain"], target = map[string]any{"id": i.domain, "name": f.domains[i.domain].Name}, grant{kind: "domains", target: i.domain}
	case i.project != "":
		if !f.enabled(f.projects[i.project]) {
			return nil
		}
		t["project"], t["is_domain"] = f.ref(f.projects, i.project), false
	default:
		return map[string]any{"token": t}
	}
	var only []string
	if i.trust != "" {
		tr := f.trusts[i.trust]
		if tr == nil {
			return nil
		}
		holder, only = tr.user, tr.roles
		t["user"] = f.ref(f.users, tr.user)
		t["OS-TRUST:trust"] = map[string]any{"id": tr.ID, "impersonation": true, "trustor_user": map[string]any{"id": tr.user}, "trustee_user": map[string]any{"id": tr.other}}
	}
	if i.cred != "" {
		c := f.creds[i.cred]
		if c == nil {
			return nil
		}
		only = c.roles
		a := map[string]any{"id": c.ID, "name": c.Name, "restricted": !c.unrestricted}
		if len(c.rules) > 0 {
			a["access_rules"] = c.rules
		}
		t["application_credential"] = a
	}
	has := map[string]bool{}
	for g := range f.grants {
		if g.kind == target.kind && g.target == target.target && g.user == holder {
			f.expand(has, g.role)
		}
	}
	if only != nil {
		narrowed := map[string]bool{}
		for _, r := range only {
			if has[r] {
				f.expand(narrowed, r)
			}
		}
		has = narrowed
	}
	if len(has) == 0 {
		return nil
	}
	var roles []any
	for _, id := range slices.Sorted(maps.Keys(has)) {
		roles = append(roles, map[string]any{"id": id, "name": f.roles[id].Name})
	}
	t["roles"] = roles
	return map[string]any{"token": t}
}

func (f *Fake) expand(into map[string]bool, role string) {
	if into[role] {
		return
	}
	into[role] = true
	for pair := range f.implies {
		if pair[0] == role {
			f.expand(into, pair[1])
		}
	}
}

// caller is who asks.
func (f *Fake) caller(r *http.Request) *issue {
	i := f.tokens[r.Header.Get("X-Auth-Token")]
	if i == nil || f.render(i) == nil {
		deny()
	}
	return i
}

func (f *Fake) may(i *issue, roles ...string) bool {
	list, _ := f.render(i)["token"].(map[string]any)["roles"].([]any)
	for _, r := range list {
		if slices.Contains(roles, r.(map[string]any)["name"].(string)) {
			return true
		}
	}
	return false
}

// token is GET, HEAD and DELETE /v3/auth/tokens.
func (f *Fake) token(w http.ResponseWriter, r *http.Request) {
	caller, id := f.caller(r), r.Header.Get("X-Subject-Token")
	if id != r.Header.Get("X-Auth-Token") && !f.may(caller, "admin", "service") {
		fail(403, "You are not authorized to perform the requested action: identity:validate_token.")
	}
	i := f.tokens[id]
	if i == nil {
		fail(404, "Could not recognize Fernet token")
	}
	doc := f.render(i)
	if doc == nil {
		fail(404, "Could not find token: "+id)
	}
	if i.cred != "" && len(f.creds[i.cred].rules) > 0 && r.Header.Get("OpenStack-Identity-Access-Rules") == "" && r.Method != "DELETE" {
		fail(404, "Failed to validate token")
	}
	w.Header().Set("X-Subject-Token", id)
	switch r.Method {
	case "DELETE":
		delete(f.tokens, id)
		w.WriteHeader(204)
	case "GET", "HEAD":
		answer(w, 200, doc)
	default:
		fail(405, "Method not allowed")
	}
}

func shown(x *thing) map[string]any {
	return map[string]any{"id": x.ID, "name": x.Name, "domain_id": x.Domain, "enabled": !x.Disabled, "tags": append([]string{}, x.Tags...), "is_domain": false}
}

// manage is everything an administrator does.
func (f *Fake) manage(w http.ResponseWriter, r *http.Request, parts []string, body map[string]any, caller *issue) {
	kinds := map[string]map[string]*thing{"domains": f.domains, "projects": f.projects, "users": f.users, "roles": f.roles, "groups": {}}
	kind := parts[0]
	one := strings.TrimSuffix(kind, "s")
	mine := kind == "users" && len(parts) > 2 && parts[1] == caller.user || kind == "OS-TRUST"
	if !mine && !f.may(caller, "admin") {
		verb := map[string]string{"GET": "get", "POST": "create", "PATCH": "update", "DELETE": "delete"}[r.Method]
		fail(403, "You are not authorized to perform the requested action: identity:"+verb+"_"+one+".")
	}
	m := dig(body, one)
	switch {
	case kind == "OS-TRUST" && r.Method == "POST":
		m = dig(body, "trust")
		x := &thing{ID: newID(), user: text(m, "trustor_user_id"), other: text(m, "trustee_user_id"), project: text(m, "project_id"), roles: f.roleIDs(m["roles"])}
		f.trusts[x.ID] = x
		answer(w, 201, map[string]any{"trust": map[string]any{"id": x.ID}})
	case kind == "users" && len(parts) == 3 && parts[2] == "application_credentials" && r.Method == "POST":
		m = dig(body, "application_credential")
		if caller.cred != "" && !f.creds[caller.cred].unrestricted {
			fail(403, "You are not authorized to perform the requested action: identity:create_application_credential.")
		}
		x := &thing{ID: newID(), Name: text(m, "name"), user: caller.user, project: caller.project, secret: newID(), roles: f.roleIDs(m["roles"])}
		x.rules, _ = m["access_rules"].([]any)
		x.unrestricted, _ = m["unrestricted"].(bool)
		if x.roles == nil {
			list, _ := f.render(caller)["token"].(map[string]any)["roles"].([]any)
			x.roles = f.roleIDs(list)
		}
		f.creds[x.ID] = x
		answer(w, 201, map[string]any{"application_credential": map[string]any{"id": x.ID, "secret": x.secret}})
	case kind == "users" && len(parts) == 4 && parts[2] == "application_credentials" && r.Method == "DELETE":
		delete(f.creds, parts[3])
		w.WriteHeader(204)
	case kind == "roles" && len(parts) == 4 && parts[2] == "implies":
		f.implies[[2]string{parts[1], parts[3]}] = true
		answer(w, 201, map[string]any{})
	case kind == "groups" && len(parts) == 4:
		w.WriteHeader(204)
	case kind == "system" && len(parts) == 5:
		f.grants[grant{"system", "", parts[2], parts[4]}] = r.Method == "PUT"
		w.WriteHeader(204)
	case (kind == "projects" || kind == "domains") && len(parts) == 6:
		g := grant{kind, parts[1], parts[3], parts[5]}
		delete(f.grants, g)
		if r.Method == "PUT" {
			f.grants[g] = true
		}
		w.WriteHeader(204)
	case kind == "projects" && len(parts) == 4 && parts[2] == "tags":
		x := f.projects[parts[1]]
		if x == nil {
			fail(404, "Could not find project: "+parts[1]+".")
		}
		x.Tags = slices.DeleteFunc(x.Tags, func(t string) bool { return t == parts[3] })
		if r.Method == "PUT" {
			x.Tags = append(x.Tags, parts[3])
			w.WriteHeader(201)
			return
		}
		w.WriteHeader(204)
	case kinds[kind] == nil:
		fail(404, "The resource could not be found.")
	case len(parts) == 1 && r.Method == "POST":
		x := &thing{ID: newID(), Name: text(m, "name"), Domain: text(m, "domain_id"), secret: text(m, "password")}
		if tags, ok := m["tags"].([]any); ok {
			for _, t := range tags {
				x.Tags = append(x.Tags, t.(string))
			}
		}
		for _, other := range kinds[kind] {
			if other.Name == x.Name && other.Domain == x.Domain {
				fail(409, "Conflict occurred attempting to store "+one+" - Duplicate entry found with name "+x.Name+".")
			}
		}
		kinds[kind][x.ID] = x
		answer(w, 201, map[string]any{one: shown(x)})
	case len(parts) == 1 && r.Method == "GET":
		list := []any{}
		q := r.URL.Query()
		for _, id := range slices.Sorted(maps.Keys(kinds[kind])) {
			x := kinds[kind][id]
			if (q.Has("name") && x.Name != q.Get("name")) || (q.Has("domain_id") && x.Domain != q.Get("domain_id")) || (q.Has("tags") && !slices.Contains(x.Tags, q.Get("tags"))) {
				continue
			}
			list = append(list, shown(x))
		}
		answer(w, 200, map[string]any{kind: list, "links": map[string]any{"next": nil}})
	case len(parts) == 2:
		x := kinds[kind][parts[1]]
		if x == nil {
			fail(404, "Could not find "+one+": "+parts[1]+".")
		}
		switch r.Method {
		case "GET":
			answer(w, 200, map[string]any{one: shown(x)})
		case "PATCH":
			if v, ok := m["enabled"].(bool); ok {
				x.Disabled = !v
			}
			if v := text(m, "name"); v != "" {
				x.Name = v
			}
			if v := text(m, "password"); v != "" {
				x.secret = v
			}
			answer(w, 200, map[string]any{one: shown(x)})
		case "DELETE":
			delete(kinds[kind], x.ID)
			w.WriteHeader(204)
		}
	default:
		fail(404, "The resource could not be found.")
	}
}

func (f *Fake) roleIDs(v any) []string {
	list, _ := v.([]any)
	var out []string
	for _, item := range list {
		m, _ := item.(map[string]any)
		for id, r := range f.roles {
			if id == text(m, "id") || r.Name == text(m, "name") {
				out = append(out, id)
			}
		}
	}
	return out
}
