// Package neutrontest owns a stand-in for Keystone and Neutron in tests: an HTTP server
// with what of their behaviour matters to who drives them, which is projects and policy,
// marks and filters, quotas, what is refused while it is in use, binding, and any answer a
// test wants instead. What a real one does is the real one's to say: the suite that runs
// against this runs against that too. It must not know who asks.
package neutrontest

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// Projects and users there are. Admin has the role admin in Service, Least the role
// h8s-network in Alpha and Beta, Alice is a member of Alpha; all have the password
// Password.
const (
	Alpha    = "a1fa0000000000000000000000000001"
	Beta     = "beda0000000000000000000000000002"
	Service  = "5e7f0000000000000000000000000003"
	Password = "secret"
	// External is the ID of the external network.
	External = "11111111-0000-4000-8000-000000000001"
	// ExternalCIDR is where floating IPs are from.
	ExternalCIDR = "172.24.4.0/24"
)

type resource = map[string]any

// Fault is an answer instead of the right one.
type Fault struct {
	// Times it is given; for ever if negative.
	Times int
	// Method and Path, a part of it, that it is given to; to all if empty.
	Method, Path string
	Status       int
	Body         string
	Header       map[string]string
	// Hang holds the answer back until the client goes, Cut ends the connection without one.
	Hang, Cut bool
	// Skip lets as many requests through first.
	Skip int
	// After lets the request take effect first: only the answer is lost.
	After bool
}

// Request is one that was made.
type Request struct{ Method, Path, User, Project string }

// Server is Keystone and Neutron.
type Server struct {
	*httptest.Server

	mu     sync.Mutex
	all    map[string][]resource
	tokens map[string]identity
	faults []*Fault
	// each are those of FailEach, which failed kinds of requests have had.
	each     []Fault
	round    int
	failed   map[string]bool
	requests []Request
	quotas   map[string]int
	// hosts that have an L2 agent, and the vif_type it makes.
	hosts map[string]string
	// wires says whether agents wire what they find.
	wires bool
	// atOnce is whether tags may go with a creation.
	atOnce   bool
	pageSize int
	octavia  bool
	hangs    bool
	macs     int
	quit     chan struct{}
}

type identity struct {
	user, project string
	roles         []string
}

func (i identity) admin() bool { return slices.Contains(i.roles, "admin") }

// New starts one, with agents on the hosts n1 and n2.
func New(t testing.TB) *Server {
	s := &Server{
		all: map[string][]resource{}, tokens: map[string]identity{}, quotas: map[string]int{},
		hosts: map[string]string{"n1": "bridge", "n2": "bridge"}, wires: true, quit: make(chan struct{}),
	}
	s.all["networks"] = []resource{{"id": External, "name": "public", "project_id": Service, "router:external": true, "description": "", "tags": []any{}, "mtu": 1500.0, "subnets": []any{"11111111-0000-4000-8000-000000000002"}}}
	s.all["subnets"] = []resource{{"id": "11111111-0000-4000-8000-000000000002", "network_id": External, "cidr": ExternalCIDR, "gateway_ip": "172.24.4.1", "project_id": Service, "description": "", "tags": []any{}}}
	s.Server = httptest.NewServer(s)
	t.Cleanup(func() {
		close(s.quit)
		s.Server.CloseClientConnections()
		s.Server.Close()
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

// FailEach gives every kind of request, which is its method and its path without IDs, one of
// the faults once, and another one in another round. The faults' own Times are not looked at.
func (s *Server) FailEach(round int, faults ...Fault) {
	s.locked(func() { s.each, s.round, s.failed = faults, round, map[string]bool{} })
}

// Failed says how many kinds of requests FailEach has spoilt.
func (s *Server) Failed() (n int) {
	s.locked(func() { n = len(s.failed) })
	return n
}

// eachFault is what FailEach gives a request, nil if it has given it already. It is locked.
func (s *Server) eachFault(r *http.Request) *Fault {
	if len(s.each) == 0 {
		return nil
	}
	parts := strings.Split(r.URL.Path, "/")
	for i, p := range parts {
		if len(p) >= 32 && strings.Trim(p, "0123456789abcdef-") == "" {
			parts[i] = "ID"
		}
	}
	kind := r.Method + " " + strings.Join(parts, "/")
	if s.failed[kind] {
		return nil
	}
	s.failed[kind] = true
	h := fnv.New32a()
	_, _ = h.Write([]byte(kind))
	f := s.each[(int(h.Sum32()%uint32(len(s.each)))+s.round)%len(s.each)]
	return &f
}

// Mend takes all faults away and says whether any was left.
func (s *Server) Mend() (left bool) {
	s.locked(func() {
		left = slices.ContainsFunc(s.faults, func(f *Fault) bool { return f.Times != 0 })
		s.faults, s.each = nil, nil
	})
	return left
}

// Quota bounds what a project may have of a collection.
func (s *Server) Quota(collection string, n int) { s.locked(func() { s.quotas[collection] = n }) }

// NoQuota unbounds it.
func (s *Server) NoQuota() { s.locked(func() { clear(s.quotas) }) }

// Host sets what binding to a host makes; "" that it has no agent.
func (s *Server) Host(name, vif string) {
	s.locked(func() {
		if s.hosts[name] = vif; vif == "" {
			delete(s.hosts, name)
		}
	})
}

// Wires says whether agents make ports ACTIVE.
func (s *Server) Wires(on bool) { s.locked(func() { s.wires = on }) }

// TagsAtOnce says whether tags may go with a creation, as in newer Neutrons.
func (s *Server) TagsAtOnce(on bool) { s.locked(func() { s.atOnce = on }) }

// PageSize bounds what one answer lists; 0 for no bound.
func (s *Server) PageSize(n int) { s.locked(func() { s.pageSize = n }) }

// ExpireTokens makes every token given so far one that is refused.
func (s *Server) ExpireTokens() { s.locked(func() { clear(s.tokens) }) }

// Requests returns those made since the last call.
func (s *Server) Requests() []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := s.requests
	s.requests = nil
	return out
}

// Get returns copies of a collection's resources that f takes; of all if f is nil.
func (s *Server) Get(collection string, f func(map[string]any) bool) []map[string]any {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []map[string]any
	for _, r := range s.all[collection] {
		if f == nil || f(r) {
			out = append(out, clone(r))
		}
	}
	return out
}

// Edit changes resources behind everybody's back: f says whether it changed one.
func (s *Server) Edit(collection string, f func(map[string]any)) {
	s.locked(func() {
		for _, r := range s.all[collection] {
			f(r)
		}
	})
}

// Put adds a resource as it is.
func (s *Server) Put(collection string, r map[string]any) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r["id"] == nil {
		r["id"] = uuid()
	}
	for k, v := range map[string]any{"tags": []any{}, "description": "", "name": "", "created_at": now()} {
		if r[k] == nil {
			r[k] = v
		}
	}
	s.all[collection] = append(s.all[collection], normal(r))
	return r["id"].(string)
}

// Delete removes resources behind everybody's back, whoever uses them.
func (s *Server) Delete(collection string, f func(map[string]any) bool) {
	s.locked(func() { s.all[collection] = slices.DeleteFunc(s.all[collection], f) })
}

func clone(r resource) resource { return normal(r) }

// normal is r as JSON has it.
func normal(r resource) resource {
	b, err := json.Marshal(r)
	if err != nil {
		panic(err)
	}
	out := resource{}
	if err := json.Unmarshal(b, &out); err != nil {
		panic(err)
	}
	return out
}

func uuid() string {
	b := make([]byte, 16)
	_, _ = rand.Read(b)
	h := hex.EncodeToString(b)
	return h[:8] + "-" + h[8:12] + "-4" + h[13:16] + "-8" + h[17:20] + "-" + h[20:]
}

func now() string { return time.Now().UTC().Format("2006-01-02T15:04:05.000000000Z") }

// refusal is an answer that is an error.
type refusal struct {
	status        int
	kind, message string
}

func refuse(status int, kind, format string, args ...any) *refusal {
	return &refusal{status, kind, fmt.Sprintf(format, args...)}
}

func (s *Server) fault(r *http.Request) *Fault {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.faults {
		if f.Times != 0 && (f.Method == "" || f.Method == r.Method) && strings.Contains(r.URL.Path, f.Path) {
			if f.Skip > 0 {
				f.Skip--
				continue
			}
			f.Times--
			return f
		}
	}
	return s.eachFault(r)
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f := s.fault(r)
	if f != nil && !f.After {
		s.spoil(w, r, f)
		return
	}
	status, body, header := s.answer(r)
	if f != nil {
		s.spoil(w, r, f)
		return
	}
	for k, v := range header {
		w.Header().Set(k, v)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if body != nil {
		_ = json.NewEncoder(w).Encode(body)
	}
}

func (s *Server) spoil(w http.ResponseWriter, r *http.Request, f *Fault) {
	if f.Hang {
		select {
		case <-r.Context().Done():
		case <-s.quit:
		}
		return
	}
	if f.Cut {
		panic(http.ErrAbortHandler)
	}
	for k, v := range f.Header {
		w.Header().Set(k, v)
	}
	w.WriteHeader(f.Status)
	_, _ = w.Write([]byte(f.Body))
}

func (s *Server) answer(r *http.Request) (int, any, map[string]string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.URL.Path == "/v3/auth/tokens" && r.Method == http.MethodPost {
		return s.login(r)
	}
	if s.octavia && (r.URL.Path == "/lb" || r.URL.Path == "/lb/") {
		return http.StatusOK, resource{"versions": []any{resource{"id": "v2.0", "status": "CURRENT", "links": []any{resource{"rel": "self", "href": s.URL + "/lb/v2"}}}}}, nil
	}
	if r.URL.Path == "/" {
		return http.StatusOK, resource{"versions": []any{resource{"id": "v2.0", "status": "CURRENT", "links": []any{resource{"rel": "self", "href": s.URL + "/v2.0/"}}}}}, nil
	}
	who, ok := s.tokens[r.Header.Get("X-Auth-Token")]
	if !ok {
		return http.StatusUnauthorized, resource{"error": resource{"code": 401, "title": "Unauthorized", "message": "The request you have made requires authentication."}}, nil
	}
	s.requests = append(s.requests, Request{r.Method, r.URL.Path, who.user, who.project})
	if id, ok := strings.CutPrefix(r.URL.Path, "/v3/projects/"); ok {
		return http.StatusOK, resource{"project": resource{"id": id, "name": id[:4], "enabled": true, "domain_id": "default", "tags": []any{}}}, nil
	}
	body := resource{}
	if r.Body != nil {
		_ = json.NewDecoder(http.MaxBytesReader(nil, r.Body, 1<<20)).Decode(&body)
	}
	if path, ok := strings.CutPrefix(r.URL.Path, "/lb/v2.0/lbaas/"); ok {
		status, answer, bad := s.lbaas(r, who, strings.Split(strings.Trim(path, "/"), "/"), body)
		if bad != nil {
			return bad.status, resource{"faultcode": "Client", "faultstring": bad.message}, nil
		}
		return status, answer, nil
	}
	path, ok := strings.CutPrefix(r.URL.Path, "/v2.0/")
	if !ok {
		return http.StatusNotFound, resource{}, nil
	}
	parts := strings.Split(strings.Trim(path, "/"), "/")
	status, answer, bad := s.neutron(r, who, parts, body)
	if bad != nil {
		return bad.status, resource{"NeutronError": resource{"type": bad.kind, "message": bad.message, "detail": ""}}, nil
	}
	return status, answer, nil
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
	roles := map[string]map[string][]string{
		"admin": {Service: {"admin", "member"}},
		"least": {Alpha: {"h8s-network"}, Beta: {"h8s-network"}, "": nil},
		"alice": {Alpha: {"member"}},
	}[user.Name]
	have, ok := roles[project]
	if user.Password != Password || !ok {
		return http.StatusUnauthorized, resource{"error": resource{"code": 401, "title": "Unauthorized", "message": "The request you have made requires authentication."}}, nil
	}
	token := uuid()
	s.tokens[token] = identity{user.Name, project, have}
	entry := func(kind, url string) resource {
		return resource{"type": kind, "name": kind, "id": uuid(), "endpoints": []any{resource{"id": uuid(), "interface": "public", "region": "RegionOne", "region_id": "RegionOne", "url": url}}}
	}
	catalog := []any{entry("network", s.URL)}
	if s.octavia {
		catalog = append(catalog, entry("load-balancer", s.URL+"/lb"))
	}
	return http.StatusCreated, resource{"token": resource{
		"methods": []any{"password"}, "expires_at": time.Now().Add(time.Hour).UTC().Format("2006-01-02T15:04:05.000000Z"), "issued_at": now(),
		"user": resource{"id": user.Name, "name": user.Name}, "project": resource{"id": project, "name": project}, "catalog": catalog,
	}}, map[string]string{"X-Subject-Token": token}
}

func singular(collection string) string {
	return strings.TrimSuffix(strings.ReplaceAll(collection, "-", "_"), "s")
}

// neutron answers one request.
func (s *Server) neutron(r *http.Request, who identity, parts []string, body resource) (int, any, *refusal) {
	collection := parts[0]
	switch {
	case collection == "extensions":
		all := []any{resource{"alias": "standard-attr-tag"}, resource{"alias": "binding"}}
		if s.atOnce {
			all = append(all, resource{"alias": "tag-creation"})
		}
		return 200, resource{"extensions": all}, nil
	case collection == "agents":
		if !who.admin() {
			return 0, nil, forbidden("get_agent")
		}
		var all []any
		for h := range s.hosts {
			if q := r.URL.Query().Get("host"); q == "" || q == h {
				all = append(all, resource{"agent_type": "Linux bridge agent", "host": h, "alive": true})
			}
		}
		return 200, resource{"agents": all}, nil
	case !slices.Contains([]string{"networks", "subnets", "routers", "ports", "security-groups", "security-group-rules", "floatingips"}, collection):
		return 0, nil, refuse(404, "HTTPNotFound", "The resource could not be found.")
	}
	one := singular(collection)
	switch {
	case len(parts) == 1 && r.Method == http.MethodGet:
		return 200, s.list(r, who, collection), nil
	case len(parts) == 1 && r.Method == http.MethodPost:
		in, _ := body[one].(map[string]any)
		made, bad := s.create(who, collection, in)
		if bad != nil {
			return 0, nil, bad
		}
		return 201, resource{one: s.shown(who, collection, made)}, nil
	}
	if len(parts) < 2 {
		return 0, nil, refuse(405, "", "no such method")
	}
	have := s.find(who, collection, parts[1])
	if have == nil {
		return 0, nil, refuse(404, strings.ToUpper(one[:1])+one[1:]+"NotFound", "%s %s could not be found.", one, parts[1])
	}
	switch {
	case len(parts) == 3 && parts[2] == "tags" && r.Method == http.MethodPut:
		have["tags"] = body["tags"]
		return 200, resource{"tags": body["tags"]}, nil
	case len(parts) == 3 && collection == "routers" && r.Method == http.MethodPut:
		return s.router(who, have, parts[2], body)
	case len(parts) == 2 && r.Method == http.MethodGet:
		return 200, resource{one: s.shown(who, collection, have)}, nil
	case len(parts) == 2 && r.Method == http.MethodPut:
		in, _ := body[one].(map[string]any)
		if bad := s.update(who, collection, have, in); bad != nil {
			return 0, nil, bad
		}
		return 200, resource{one: s.shown(who, collection, have)}, nil
	case len(parts) == 2 && r.Method == http.MethodDelete:
		if bad := s.delete(who, collection, have); bad != nil {
			return 0, nil, bad
		}
		return 204, nil, nil
	}
	return 0, nil, refuse(405, "", "no such method")
}

func forbidden(rule string) *refusal {
	return refuse(403, "PolicyNotAuthorized", "(rule:%s) is disallowed by policy", rule)
}

func text(r resource, k string) string { v, _ := r[k].(string); return v }

func (s *Server) visible(who identity, r resource) bool {
	return who.admin() || text(r, "project_id") == who.project || r["router:external"] == true
}

func (s *Server) find(who identity, collection, id string) resource {
	for _, r := range s.all[collection] {
		if r["id"] == id && s.visible(who, r) {
			return r
		}
	}
	return nil
}

func (s *Server) list(r *http.Request, who identity, collection string) any {
	q := r.URL.Query()
	var all []any
	begun, last := q.Get("marker") == "", ""
	key := strings.ReplaceAll(collection, "-", "_")
	for _, x := range s.all[collection] {
		if !begun {
			begun = x["id"] == q.Get("marker")
			continue
		}
		if !s.visible(who, x) || !matches(x, q) {
			continue
		}
		if s.pageSize > 0 && len(all) == s.pageSize {
			q.Set("marker", last)
			return resource{key: all, key + "_links": []any{resource{"rel": "next", "href": s.URL + r.URL.Path + "?" + q.Encode()}}}
		}
		s.tick(collection, x)
		all = append(all, s.shown(who, collection, x))
		last = text(x, "id")
	}
	if all == nil {
		all = []any{}
	}
	return resource{key: all}
}

func matches(x resource, q map[string][]string) bool {
	for k, want := range q {
		switch k {
		case "fields", "marker", "limit", "host":
			continue
		case "tags":
			if !slices.Contains(x["tags"].([]any), any(want[0])) {
				return false
			}
			continue
		}
		have := fmt.Sprint(x[k])
		if x[k] == nil {
			have = ""
		}
		if !slices.Contains(want, have) {
			return false
		}
	}
	return true
}

// tick lets an agent do its work.
func (s *Server) tick(collection string, x resource) {
	if collection == "ports" && s.wires && x["binding:vif_type"] != nil && s.hosts[text(x, "binding:host_id")] != "" && x["binding:vif_type"] != "binding_failed" {
		x["status"] = "ACTIVE"
	}
}

// shown is what who sees of a resource, which then goes on.
func (s *Server) shown(who identity, collection string, x resource) resource {
	out := clone(x)
	s.tick(collection, x)
	if collection == "security-groups" {
		rules := []any{}
		for _, r := range s.all["security-group-rules"] {
			if r["security_group_id"] == x["id"] {
				rules = append(rules, clone(r))
			}
		}
		out["security_group_rules"] = rules
	}
	if collection == "ports" && !s.binds(who) {
		delete(out, "binding:host_id")
		delete(out, "binding:vif_type")
	}
	return out
}

func (s *Server) binds(who identity) bool {
	return who.admin() || slices.Contains(who.roles, "h8s-network")
}

func (s *Server) quota(collection, project string) *refusal {
	most, ok := s.quotas[collection]
	if !ok {
		return nil
	}
	n := 0
	for _, r := range s.all[collection] {
		if text(r, "project_id") == project {
			n++
		}
	}
	if n >= most {
		return refuse(409, "OverQuota", "Quota exceeded for resources: ['%s'].", singular(collection))
	}
	return nil
}

func (s *Server) create(who identity, collection string, in resource) (resource, *refusal) {
	if in == nil {
		return nil, refuse(400, "HTTPBadRequest", "Resource body required")
	}
	x := resource{"tags": []any{}, "description": "", "name": ""}
	for k, v := range in {
		x[k] = v
	}
	if _, ok := in["tags"]; ok && !s.atOnce {
		return nil, refuse(400, "HTTPBadRequest", "Unrecognized attribute(s) 'tags'")
	}
	if text(x, "project_id") == "" {
		x["project_id"] = who.project
	}
	if !who.admin() && text(x, "project_id") != who.project {
		return nil, forbidden("create_" + singular(collection))
	}
	if bad := s.quota(collection, text(x, "project_id")); bad != nil {
		return nil, bad
	}
	x["id"], x["created_at"] = uuid(), now()
	var bad *refusal
	switch collection {
	case "networks":
		x["status"], x["subnets"], x["port_security_enabled"] = "ACTIVE", []any{}, true
		if x["mtu"] == nil {
			x["mtu"] = 1450.0
		}
		bad = checkMTU(x)
	case "subnets":
		bad = s.newSubnet(who, x)
	case "routers":
		x["status"] = "ACTIVE"
		if x["external_gateway_info"] == nil {
			x["external_gateway_info"] = nil
		}
	case "ports":
		bad = s.newPort(who, x)
	case "security-groups":
		for _, family := range []string{"IPv4", "IPv6"} {
			s.all["security-group-rules"] = append(s.all["security-group-rules"], resource{
				"id": uuid(), "security_group_id": x["id"], "direction": "egress", "ethertype": family, "project_id": x["project_id"]})
		}
	case "security-group-rules":
		for _, r := range s.all[collection] {
			if r["security_group_id"] == x["security_group_id"] && r["direction"] == x["direction"] && r["ethertype"] == x["ethertype"] {
				return nil, refuse(409, "SecurityGroupRuleExists", "Security group rule already exists. Rule id is %s.", r["id"])
			}
		}
	case "floatingips":
		bad = s.newFloatingIP(x)
	}
	if bad != nil {
		return nil, bad
	}
	x = normal(x)
	s.all[collection] = append(s.all[collection], x)
	return x, nil
}

func checkMTU(x resource) *refusal {
	if m, ok := x["mtu"].(float64); ok && m > 1450 {
		return refuse(400, "InvalidInput", "Invalid input for operation: Requested MTU is too big, maximum is 1450.")
	}
	return nil
}

func (s *Server) newSubnet(who identity, x resource) *refusal {
	n := s.find(who, "networks", text(x, "network_id"))
	if n == nil {
		return refuse(404, "NetworkNotFound", "Network %s could not be found.", x["network_id"])
	}
	p, err := netip.ParsePrefix(text(x, "cidr"))
	if err != nil {
		return refuse(400, "HTTPBadRequest", "Invalid input for cidr")
	}
	for _, o := range s.all["subnets"] {
		if q, err := netip.ParsePrefix(text(o, "cidr")); err == nil && o["network_id"] == x["network_id"] && q.Overlaps(p) {
			return refuse(400, "InvalidInput", "Requested subnet with cidr: %s for network: %s overlaps with another subnet.", p, x["network_id"])
		}
	}
	if x["enable_dhcp"] == nil {
		x["enable_dhcp"] = true
	}
	n["subnets"] = append(n["subnets"].([]any), x["id"])
	return nil
}

// taken says who has an address of a network.
func (s *Server) taken(network, address string, but any) bool {
	for _, o := range s.all["ports"] {
		if o["network_id"] != network || o["id"] == but {
			continue
		}
		for _, f := range o["fixed_ips"].([]any) {
			if f.(map[string]any)["ip_address"] == address {
				return true
			}
		}
	}
	return false
}

func (s *Server) fixed(x resource, but any) *refusal {
	list, _ := normal(resource{"l": x["fixed_ips"]})["l"].([]any)
	for _, f := range list {
		m := f.(map[string]any)
		a, err := netip.ParseAddr(text(m, "ip_address"))
		ok := false
		for _, sub := range s.all["subnets"] {
			q, perr := netip.ParsePrefix(text(sub, "cidr"))
			if err == nil && perr == nil && sub["network_id"] == x["network_id"] && q.Contains(a) {
				m["subnet_id"], ok = sub["id"], true
			}
		}
		if !ok {
			return refuse(400, "InvalidIpForNetwork", "IP address %s is not a valid IP for any of the subnets on the specified network.", text(m, "ip_address"))
		}
		if s.taken(text(x, "network_id"), a.String(), but) {
			return refuse(409, "IpAddressInUse", "Unable to complete operation for network %s. The IP address %s is in use.", x["network_id"], a)
		}
	}
	x["fixed_ips"] = list
	return nil
}

func (s *Server) bind(x resource) {
	host := text(x, "binding:host_id")
	switch vif := s.hosts[host]; {
	case host == "":
		x["binding:host_id"], x["binding:vif_type"], x["status"] = "", "unbound", "DOWN"
	case vif == "":
		x["binding:vif_type"], x["status"] = "binding_failed", "DOWN"
	default:
		x["binding:vif_type"], x["status"] = vif, "DOWN"
	}
}

func (s *Server) newPort(who identity, x resource) *refusal {
	if x["binding:host_id"] != nil && !s.binds(who) {
		return forbidden("create_port and rule:create_port:binding:host_id")
	}
	if s.find(who, "networks", text(x, "network_id")) == nil {
		return refuse(404, "NetworkNotFound", "Network %s could not be found.", x["network_id"])
	}
	if bad := s.fixed(x, nil); bad != nil {
		return bad
	}
	if x["mac_address"] == nil {
		s.macs++
		x["mac_address"] = fmt.Sprintf("fa:16:3e:00:%02x:%02x", s.macs>>8, s.macs&255)
	}
	for _, o := range s.all["ports"] {
		if o["network_id"] == x["network_id"] && o["mac_address"] == x["mac_address"] {
			return refuse(409, "MacAddressInUse", "Unable to complete operation for network %s. The mac address %s is in use.", x["network_id"], x["mac_address"])
		}
	}
	for k, v := range map[string]any{"allowed_address_pairs": []any{}, "port_security_enabled": true, "device_id": "", "device_owner": "", "security_groups": []any{}, "admin_state_up": true} {
		if x[k] == nil {
			x[k] = v
		}
	}
	s.bind(x)
	return nil
}

// outward finds whether an address of a network is behind a router to the outside.
func (s *Server) outward(network, address string) bool {
	for _, o := range s.all["ports"] {
		if o["network_id"] != network || o["device_owner"] != "network:router_interface" {
			continue
		}
		for _, r := range s.all["routers"] {
			if r["id"] == o["device_id"] && r["external_gateway_info"] != nil {
				return true
			}
		}
	}
	return false
}

func (s *Server) newFloatingIP(x resource) *refusal {
	used := map[string]bool{"172.24.4.1": true}
	for _, f := range s.all["floatingips"] {
		used[text(f, "floating_ip_address")] = true
	}
	cidr := netip.MustParsePrefix(ExternalCIDR)
	if want := text(x, "floating_ip_address"); want != "" {
		a, err := netip.ParseAddr(want)
		if err != nil || !cidr.Contains(a) {
			return refuse(400, "InvalidIpForNetwork", "IP address %s is not a valid IP for any of the subnets on the specified network.", want)
		}
		if used[want] {
			return refuse(409, "IpAddressAlreadyAllocated", "IP address %s already allocated in subnet x", want)
		}
	} else {
		for a := cidr.Addr().Next(); cidr.Contains(a); a = a.Next() {
			if !used[a.String()] {
				x["floating_ip_address"] = a.String()
				break
			}
		}
	}
	if x["port_id"] == nil {
		x["port_id"], x["fixed_ip_address"] = nil, nil
	}
	return s.associate(x)
}

func (s *Server) associate(x resource) *refusal {
	id := text(x, "port_id")
	x["status"] = "DOWN"
	if id == "" {
		x["fixed_ip_address"], x["port_id"] = nil, nil
		return nil
	}
	for _, p := range s.all["ports"] {
		if p["id"] != id {
			continue
		}
		if !s.outward(text(p, "network_id"), text(x, "fixed_ip_address")) {
			return refuse(404, "ExternalGatewayForFloatingIPNotFound", "External network %s is not reachable from subnet x. Therefore, cannot associate Port %s with a Floating IP.", External, id)
		}
		for _, o := range s.all["floatingips"] {
			if o["id"] != x["id"] && o["port_id"] == id && o["fixed_ip_address"] == x["fixed_ip_address"] {
				return refuse(409, "FloatingIPPortAlreadyAssociated", "Cannot associate floating IP %s with port %s using fixed IP %s, as that fixed IP already has a floating IP on external network %s.", x["floating_ip_address"], id, x["fixed_ip_address"], External)
			}
		}
		x["status"] = "ACTIVE"
		return nil
	}
	return refuse(404, "PortNotFound", "Port %s could not be found.", id)
}

func (s *Server) update(who identity, collection string, have, in resource) *refusal {
	if _, ok := in["binding:host_id"]; ok && !s.binds(who) {
		return forbidden("update_port and rule:update_port:binding:host_id")
	}
	x := clone(have)
	for k, v := range in {
		x[k] = v
	}
	switch collection {
	case "networks":
		if bad := checkMTU(x); bad != nil {
			return bad
		}
	case "ports":
		if in["mac_address"] != nil && in["mac_address"] != have["mac_address"] && text(have, "binding:host_id") != "" {
			return refuse(409, "PortBound", "Unable to complete operation on port %s, port is already bound", have["id"])
		}
		if bad := s.fixed(x, have["id"]); bad != nil {
			return bad
		}
		if _, ok := in["binding:host_id"]; ok && (in["binding:host_id"] != have["binding:host_id"] || have["binding:vif_type"] == "binding_failed") {
			s.bind(x)
		}
	case "floatingips":
		if bad := s.associate(x); bad != nil {
			return bad
		}
	case "routers":
		if m, ok := x["external_gateway_info"].(map[string]any); ok && len(m) == 0 {
			x["external_gateway_info"] = nil
		}
	}
	for k, v := range normal(x) {
		have[k] = v
	}
	return nil
}

func (s *Server) router(who identity, r resource, action string, body resource) (int, any, *refusal) {
	switch action {
	case "add_router_interface":
		sub := s.find(who, "subnets", text(body, "subnet_id"))
		if sub == nil {
			return 0, nil, refuse(404, "SubnetNotFound", "Subnet %s could not be found.", body["subnet_id"])
		}
		for _, p := range s.all["ports"] {
			if p["device_id"] == r["id"] && p["fixed_ips"].([]any)[0].(map[string]any)["subnet_id"] == sub["id"] {
				return 0, nil, refuse(400, "BadRequest", "Bad router request: Router already has a port on subnet %s.", sub["id"])
			}
		}
		if s.taken(text(sub, "network_id"), text(sub, "gateway_ip"), nil) {
			return 0, nil, refuse(409, "IpAddressInUse", "Unable to complete operation for network %s. The IP address %s is in use.", sub["network_id"], sub["gateway_ip"])
		}
		id := uuid()
		s.all["ports"] = append(s.all["ports"], normal(resource{
			"id": id, "network_id": sub["network_id"], "device_id": r["id"], "device_owner": "network:router_interface", "project_id": r["project_id"],
			"fixed_ips": []any{resource{"subnet_id": sub["id"], "ip_address": sub["gateway_ip"]}}, "description": "", "tags": []any{}, "mac_address": "fa:16:3e:ff:" + id[:2] + ":" + id[2:4], "status": "ACTIVE",
		}))
		return 200, resource{"id": r["id"], "port_id": id, "subnet_id": sub["id"]}, nil
	case "remove_router_interface":
		for i, p := range s.all["ports"] {
			if p["device_id"] != r["id"] || p["id"] != body["port_id"] {
				continue
			}
			for _, f := range s.all["floatingips"] {
				for _, o := range s.all["ports"] {
					if f["port_id"] != nil && f["port_id"] == o["id"] && o["network_id"] == p["network_id"] {
						return 0, nil, refuse(409, "RouterInterfaceInUseByFloatingIP", "Router interface for subnet x on router %s cannot be deleted, as it is required by one or more floating IPs.", r["id"])
					}
				}
			}
			s.all["ports"] = slices.Delete(s.all["ports"], i, i+1)
			return 200, resource{}, nil
		}
		return 0, nil, refuse(404, "RouterInterfaceNotFound", "Router %s has no interface %s.", r["id"], body["port_id"])
	}
	return 0, nil, refuse(404, "HTTPNotFound", "The resource could not be found.")
}

func (s *Server) delete(who identity, collection string, have resource) *refusal {
	id := have["id"]
	in := func(collection string, f func(resource) bool) bool { return slices.ContainsFunc(s.all[collection], f) }
	switch collection {
	case "networks":
		if in("ports", func(p resource) bool { return p["network_id"] == id && p["device_owner"] != "network:dhcp" }) {
			return refuse(409, "NetworkInUse", "Unable to complete operation on network %s. There are one or more ports still in use on the network.", id)
		}
		s.all["ports"] = slices.DeleteFunc(s.all["ports"], func(p resource) bool { return p["network_id"] == id })
		s.all["subnets"] = slices.DeleteFunc(s.all["subnets"], func(p resource) bool { return p["network_id"] == id })
	case "routers":
		if in("ports", func(p resource) bool { return p["device_id"] == id && p["device_owner"] == "network:router_interface" }) {
			return refuse(409, "RouterInUse", "Router %s still has ports", id)
		}
	case "security-groups":
		if in("ports", func(p resource) bool {
			groups, _ := p["security_groups"].([]any)
			return slices.Contains(groups, id)
		}) {
			return refuse(409, "SecurityGroupInUse", "Security Group %s in use.", id)
		}
		s.all["security-group-rules"] = slices.DeleteFunc(s.all["security-group-rules"], func(p resource) bool { return p["security_group_id"] == id })
	case "ports":
		if o := text(have, "device_owner"); strings.HasPrefix(o, "network:router") {
			return refuse(409, "ServicePortInUse", "Port %s cannot be deleted directly via the port API: has device owner %s.", id, o)
		}
		for _, f := range s.all["floatingips"] {
			if f["port_id"] == id {
				f["port_id"], f["fixed_ip_address"], f["status"] = nil, nil, "DOWN"
			}
		}
	}
	s.all[collection] = slices.DeleteFunc(s.all[collection], func(p resource) bool { return p["id"] == id })
	return nil
}
