// Package cindertest owns a stand-in for Keystone and Cinder in tests: an HTTP server with
// what of their behaviour matters to who drives them, which is projects and policy, states
// that take their time, what is refused in which, the exchange that reserves a volume, what
// the attachments' schema takes, and any answer a test wants instead. What a real one does
// is the real one's to say: the suite that runs against this runs against that too. It must
// not know who asks.
package cindertest

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// Projects there are. Users: admin has the role admin in Service, least the role member in
// Alpha and no project of its own, alice is a member of Alpha; all have the password
// Password.
const (
	Alpha    = "a1fa0000000000000000000000000001"
	Beta     = "beda0000000000000000000000000002"
	Service  = "5e7f0000000000000000000000000003"
	Password = "secret"
)

// Types of volumes: Plain is what is made if nobody says, Quick another on the same back
// end, Multi may be attached several times, Broken cannot be made.
const (
	Plain, Quick, Multi, Broken = "plain", "quick", "multi", "broken"
)

// Key is that of Ceph's user cinder.
const Key = "AQBvQkRjAAAAABAAo3yF8v7J0S0hXkWzq3l0Ng=="

// Fault is an answer instead of the right one.
type Fault struct {
	// Times it is given; for ever if negative.
	Times int
	// Method and Path, a part of it, that it is given to; to all if empty.
	Method, Path string
	Status       int
	Body         string
	// After lets the request take effect first: only the answer is lost.
	After bool
}

// Request is one that was made.
type Request struct{ Method, Path, User, Project, Body string }

// Volume, Snapshot and Attachment are as the server has them.
type (
	Volume struct {
		ID, Name, Status, Type, Project, Snapshot, Parent, Zone string
		Size                                                    int64
		Created                                                 time.Time
		Metadata                                                map[string]string
		Multi, Bootable, Encrypted                              bool
		// next is the status it is about to have, after so many looks.
		next  string
		looks int
		grow  int64
		kind  string
	}
	Snapshot struct {
		ID, Name, Status, Volume, Project string
		Size                              int64
		Created                           time.Time
		Metadata                          map[string]string
		next                              string
		looks                             int
	}
	Attachment struct {
		ID, Volume, Status, Server, Mode, Project string
		Connector                                 map[string]any
		Info                                      map[string]any
	}
)

// Server is Keystone and Cinder.
type Server struct {
	*httptest.Server
	// Kind of connections that its driver makes: rbd, iscsi, nfs or any other.
	Kind string
	// Extra is added to connections.
	Extra map[string]any
	// Looks is how often a state that passes is seen.
	Looks int

	mu          sync.Mutex
	roles       map[string]map[string][]string
	tokens      map[string]identity
	volumes     map[string]*Volume
	snapshots   map[string]*Snapshot
	attachments map[string]*Attachment
	quota       map[string]int64
	faults      []*Fault
	requests    []Request
}

type identity struct{ user, project string }

// New starts one.
func New(t testing.TB) *Server {
	s := &Server{
		Kind: "rbd", Looks: 1, tokens: map[string]identity{}, volumes: map[string]*Volume{}, snapshots: map[string]*Snapshot{},
		attachments: map[string]*Attachment{}, quota: map[string]int64{},
		roles: map[string]map[string][]string{
			"admin": {Service: {"admin", "member"}}, "least": {Alpha: {"member"}}, "alice": {Alpha: {"member"}},
		},
	}
	s.Server = httptest.NewServer(s)
	t.Cleanup(func() {
		s.CloseClientConnections()
		s.Close()
	})
	return s
}

// CloudsYAML writes a configuration with the clouds admin, least and alice.
func (s *Server) CloudsYAML(t testing.TB) string {
	t.Helper()
	text := "clouds:\n"
	for name, scope := range map[string]string{"admin": Service, "least": "", "alice": Alpha} {
		text += fmt.Sprintf("  %s:\n    region_name: RegionOne\n    auth:\n      auth_url: %s/v3\n      username: %s\n      password: %s\n      user_domain_name: Default\n", name, s.URL, name, Password)
		if scope != "" {
			text += "      project_id: " + scope + "\n"
		}
	}
	path := filepath.Join(t.TempDir(), "clouds.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func (s *Server) locked(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

// Fail makes it answer otherwise.
func (s *Server) Fail(f Fault) { s.locked(func() { s.faults = append(s.faults, &f) }) }

// Mend takes all faults away.
func (s *Server) Mend() { s.locked(func() { s.faults = nil }) }

// Grant gives a user a role in a project; without roles it takes them.
func (s *Server) Grant(user, project string, roles ...string) {
	s.locked(func() { s.roles[user][project] = roles })
}

// Quota bounds the GiB of a project.
func (s *Server) Quota(project string, gib int64) { s.locked(func() { s.quota[project] = gib }) }

// Requests returns those made since the last call.
func (s *Server) Requests() []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := s.requests
	s.requests = nil
	return out
}

// Edit changes what there is behind everybody's back.
func (s *Server) Edit(f func(volumes map[string]*Volume, snapshots map[string]*Snapshot, attachments map[string]*Attachment)) {
	s.locked(func() { f(s.volumes, s.snapshots, s.attachments) })
}

// Put adds a volume as it is and returns its ID.
func (s *Server) Put(v Volume) string {
	if v.ID == "" {
		v.ID = uuid()
	}
	if v.Status == "" {
		v.Status = "available"
	}
	if v.Size == 0 {
		v.Size = 1
	}
	if v.Metadata == nil {
		v.Metadata = map[string]string{}
	}
	v.Created = time.Now()
	s.locked(func() { s.volumes[v.ID] = &v })
	return v.ID
}

func uuid() string {
	b := make([]byte, 16)
	_, _ = rand.Read(b)
	h := hex.EncodeToString(b)
	return h[:8] + "-" + h[8:12] + "-4" + h[13:16] + "-8" + h[17:20] + "-" + h[20:]
}

type object = map[string]any

// refusal is an answer that is an error, as Cinder writes it.
type refusal struct {
	status        int
	kind, message string
}

func invalid(format string, args ...any) *refusal {
	return &refusal{http.StatusBadRequest, "badRequest", fmt.Sprintf(format, args...)}
}

func missing(what, id string) *refusal {
	return &refusal{http.StatusNotFound, "itemNotFound", fmt.Sprintf("%s %s could not be found.", what, id)}
}

func forbidden(rule string) *refusal {
	return &refusal{http.StatusForbidden, "forbidden", "Policy doesn't allow " + rule + " to be performed."}
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f := s.fault(r)
	if f == nil || f.After {
		status, body, header := s.answer(r)
		if f == nil {
			for k, v := range header {
				w.Header().Set(k, v)
			}
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(status)
			if body != nil {
				_ = json.NewEncoder(w).Encode(body)
			}
			return
		}
	}
	w.WriteHeader(f.Status)
	_, _ = w.Write([]byte(f.Body))
}

func (s *Server) fault(r *http.Request) *Fault {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.faults {
		if f.Times != 0 && (f.Method == "" || f.Method == r.Method) && strings.Contains(r.URL.Path, f.Path) {
			f.Times--
			return f
		}
	}
	return nil
}

func (s *Server) answer(r *http.Request) (int, any, map[string]string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.URL.Path == "/v3/auth/tokens" && r.Method == http.MethodPost {
		return s.login(r)
	}
	who, ok := s.tokens[r.Header.Get("X-Auth-Token")]
	if !ok {
		return unauthorised()
	}
	body := object{}
	var text strings.Builder
	if r.Body != nil {
		var raw json.RawMessage
		if json.NewDecoder(http.MaxBytesReader(nil, r.Body, 1<<20)).Decode(&raw) == nil {
			_ = json.Unmarshal(raw, &body)
			text.Write(raw)
		}
	}
	s.requests = append(s.requests, Request{r.Method, r.URL.Path, who.user, who.project, text.String()})
	if path, ok := strings.CutPrefix(r.URL.Path, "/v3/"); ok {
		return s.keystone(r, who, strings.Split(path, "/"))
	}
	path, ok := strings.CutPrefix(r.URL.Path, "/volume/v3/"+who.project+"/")
	if !ok {
		return http.StatusBadRequest, object{"badRequest": object{"code": 400, "message": "Malformed request url"}}, nil
	}
	status, answer, bad := s.cinder(r, who, strings.Split(path, "/"), body)
	if bad != nil {
		return bad.status, object{bad.kind: object{"code": bad.status, "message": bad.message}}, nil
	}
	return status, answer, nil
}

func unauthorised() (int, any, map[string]string) {
	return http.StatusUnauthorized, object{"error": object{"code": 401, "title": "Unauthorized", "message": "The request you have made requires authentication."}}, nil
}

func (s *Server) login(r *http.Request) (int, any, map[string]string) {
	var q struct {
		Auth struct {
			Identity struct {
				Password struct {
					User struct{ Name, Password string }
				}
			}
			Scope struct{ Project struct{ ID string } }
		}
	}
	_ = json.NewDecoder(http.MaxBytesReader(nil, r.Body, 1<<20)).Decode(&q)
	user, project := q.Auth.Identity.Password.User, q.Auth.Scope.Project.ID
	have := s.roles[user.Name][project]
	if user.Password != Password || s.roles[user.Name] == nil || project != "" && len(have) == 0 {
		return unauthorised()
	}
	token := uuid()
	s.tokens[token] = identity{user.Name, project}
	entry := func(kind, url string) object {
		return object{"type": kind, "name": kind, "id": uuid(), "endpoints": []any{object{"id": uuid(), "interface": "public", "region": "RegionOne", "region_id": "RegionOne", "url": url}}}
	}
	out := object{
		"methods": []any{"password"}, "expires_at": time.Now().Add(time.Hour).UTC().Format("2006-01-02T15:04:05.000000Z"),
		"issued_at": time.Now().UTC().Format("2006-01-02T15:04:05.000000Z"), "user": object{"id": "id-" + user.Name, "name": user.Name},
	}
	if project != "" {
		out["project"] = object{"id": project, "name": project}
		out["catalog"] = []any{entry("identity", s.URL+"/v3"), entry("volumev3", s.URL+"/volume/v3/"+project)}
	}
	return http.StatusCreated, object{"token": out}, map[string]string{"X-Subject-Token": token}
}

func (s *Server) admin(who identity) bool {
	return slices.Contains(s.roles[who.user][who.project], "admin")
}

func (s *Server) keystone(r *http.Request, who identity, parts []string) (int, any, map[string]string) {
	refuse := func(status int, title string) (int, any, map[string]string) {
		return status, object{"error": object{"code": status, "title": title, "message": title}}, nil
	}
	if !s.admin(who) {
		return refuse(http.StatusForbidden, "Forbidden")
	}
	switch {
	case parts[0] == "roles" && r.Method == http.MethodGet:
		all := []any{}
		for _, name := range []string{"admin", "member", "reader"} {
			if q := r.URL.Query().Get("name"); q == "" || q == name {
				all = append(all, object{"id": "role-" + name, "name": name})
			}
		}
		return http.StatusOK, object{"roles": all}, nil
	case len(parts) == 6 && parts[0] == "projects" && parts[2] == "users" && parts[4] == "roles" && r.Method == http.MethodPut:
		project, user, role := parts[1], strings.TrimPrefix(parts[3], "id-"), strings.TrimPrefix(parts[5], "role-")
		if !slices.Contains([]string{Alpha, Beta, Service}, project) || s.roles[user] == nil {
			return refuse(http.StatusNotFound, "Not Found")
		}
		s.roles[user][project] = append(s.roles[user][project], role)
		return http.StatusNoContent, nil, nil
	}
	return refuse(http.StatusNotFound, "Not Found")
}
