package neutrontest

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
)

// Balancers puts Octavia into the catalogue; it must be said before anybody logs in.
func (s *Server) Balancers(on bool) { s.locked(func() { s.octavia = on }) }

// Hangs makes it leave the parts of load balancers that are made whole unfinished, as that
// of OpenStack Zed does with drivers that do nothing.
func (s *Server) Hangs(on bool) { s.locked(func() { s.hangs = on }) }

func immutable(id any) *refusal {
	return refuse(409, "", "Load Balancer %s is immutable and cannot be updated.", id)
}

// settle lets Octavia do its work: what was pending when it was last looked at is done.
func (s *Server) settle(b resource) {
	switch text(b, "provisioning_status") {
	case "PENDING_DELETE":
		s.drop("loadbalancers", b["id"])
		for _, kind := range []string{"listeners", "pools", "members"} {
			s.all[kind] = slices.DeleteFunc(s.all[kind], func(r resource) bool { return r["loadbalancer"] == b["id"] })
		}
		s.all["ports"] = slices.DeleteFunc(s.all["ports"], func(r resource) bool { return r["id"] == b["vip_port_id"] })
	case "PENDING_CREATE", "PENDING_UPDATE":
		b["provisioning_status"] = "ACTIVE"
	}
}

func (s *Server) drop(kind string, id any) {
	s.all[kind] = slices.DeleteFunc(s.all[kind], func(r resource) bool { return r["id"] == id })
}

func (s *Server) byID(who identity, kind string, id any) resource {
	for _, r := range s.all[kind] {
		if r["id"] == id && s.visible(who, r) {
			return r
		}
	}
	return nil
}

// lbaas answers for Octavia; path is below lbaas.
func (s *Server) lbaas(r *http.Request, who identity, parts []string, body resource) (int, any, *refusal) {
	kind := parts[0]
	one := strings.TrimSuffix(kind, "s")
	in, _ := body[one].(map[string]any)
	q := r.URL.Query()
	switch {
	case len(parts) == 1 && r.Method == http.MethodGet:
		all := []any{}
		for _, x := range slices.Clone(s.all[kind]) {
			ok := s.visible(who, x)
			for k, want := range q {
				have := fmt.Sprint(x[map[string]string{"loadbalancer_id": "loadbalancer", "load_balancer_id": "loadbalancer"}[k]])
				if k == "project_id" || k == "description" {
					have = text(x, k)
				}
				ok = ok && have == want[0]
			}
			if ok {
				all = append(all, clone(x))
				if kind == "loadbalancers" {
					s.settle(x)
				}
			}
		}
		return 200, resource{kind: all}, nil
	case len(parts) == 1 && r.Method == http.MethodPost && kind == "loadbalancers":
		return s.newBalancer(who, in)
	case len(parts) == 3 && parts[2] == "members":
		p := s.byID(who, "pools", parts[1])
		if p == nil {
			return 0, nil, refuse(404, "", "pool %s not found.", parts[1])
		}
		if r.Method == http.MethodGet {
			all := []any{}
			for _, m := range s.all["members"] {
				if m["pool"] == p["id"] {
					all = append(all, clone(m))
				}
			}
			return 200, resource{"members": all}, nil
		}
		b := s.byID(who, "loadbalancers", p["loadbalancer"])
		if b["provisioning_status"] != "ACTIVE" {
			return 0, nil, immutable(b["id"])
		}
		b["provisioning_status"] = "PENDING_UPDATE"
		s.all["members"] = slices.DeleteFunc(s.all["members"], func(m resource) bool { return m["pool"] == p["id"] })
		s.putMembers(p, body["members"])
		return 202, nil, nil
	}
	id := any(nil)
	if len(parts) > 1 {
		x := s.byID(who, kind, parts[1])
		if x == nil {
			return 0, nil, refuse(404, "", "%s %s not found.", one, parts[1])
		}
		id = x["id"]
		if kind != "loadbalancers" {
			id = x["loadbalancer"]
		}
	} else {
		id = in["loadbalancer_id"]
		if l := s.byID(who, "listeners", in["listener_id"]); l != nil {
			id = l["loadbalancer"]
		}
	}
	b := s.byID(who, "loadbalancers", id)
	if b == nil {
		return 0, nil, refuse(404, "", "Load Balancer %v not found.", id)
	}
	if st := b["provisioning_status"]; st != "ACTIVE" && !(st == "ERROR" && r.Method == http.MethodDelete) {
		return 0, nil, immutable(b["id"])
	}
	switch {
	case r.Method == http.MethodDelete && kind == "loadbalancers":
		if q.Get("cascade") != "true" {
			return 0, nil, refuse(400, "", "Cannot delete Load Balancer %s - it has children", b["id"])
		}
		b["provisioning_status"] = "PENDING_DELETE"
		return 204, nil, nil
	case r.Method == http.MethodDelete:
		s.drop(kind, parts[1])
		b["provisioning_status"] = "PENDING_UPDATE"
		return 204, nil, nil
	case r.Method == http.MethodPut:
		x := s.byID(who, kind, parts[1])
		for k, v := range in {
			x[k] = v
		}
		b["provisioning_status"] = "PENDING_UPDATE"
		return 200, resource{one: clone(x)}, nil
	case r.Method == http.MethodPost && kind == "listeners":
		if in["default_pool"] != nil {
			return 0, nil, refuse(500, "", "'dict' object has no attribute '_sa_instance_state'")
		}
		b["provisioning_status"] = "PENDING_UPDATE"
		l := s.newListener(b, in)
		return 201, resource{one: clone(l)}, nil
	case r.Method == http.MethodPost && kind == "pools":
		b["provisioning_status"] = "PENDING_UPDATE"
		p := s.newPool(b, in)
		s.byID(who, "listeners", in["listener_id"])["default_pool_id"] = p["id"]
		return 201, resource{one: clone(p)}, nil
	}
	return 0, nil, refuse(405, "", "no such method")
}

func (s *Server) newBalancer(who identity, in resource) (int, any, *refusal) {
	project := text(in, "project_id")
	if !who.admin() && project != who.project {
		return 0, nil, refuse(403, "", "Policy does not allow this request to be performed.")
	}
	if n, ok := s.quotas["loadbalancers"]; ok && len(s.all["loadbalancers"]) >= n {
		return 0, nil, refuse(403, "", "Quota has been met for resources: Load Balancer")
	}
	sub := s.byID(who, "subnets", in["vip_subnet_id"])
	if sub == nil {
		return 0, nil, refuse(400, "", "Subnet %v not found.", in["vip_subnet_id"])
	}
	base, _, _ := strings.Cut(text(sub, "cidr"), "/")
	vip := ""
	for i := 200; vip == "" || s.taken(text(sub, "network_id"), vip, nil); i++ {
		vip = base[:strings.LastIndex(base, ".")+1] + fmt.Sprint(i)
	}
	port := normal(resource{"id": uuid(), "network_id": sub["network_id"], "project_id": project, "device_owner": "Octavia", "description": "", "tags": []any{}, "status": "ACTIVE",
		"mac_address": "fa:16:3e:0c:7a:00", "fixed_ips": []any{resource{"subnet_id": sub["id"], "ip_address": vip}}})
	s.all["ports"] = append(s.all["ports"], port)
	b := normal(resource{"id": uuid(), "name": in["name"], "description": in["description"], "project_id": project, "provisioning_status": "PENDING_CREATE",
		"vip_address": vip, "vip_port_id": port["id"], "created_at": now(), "tags": in["tags"]})
	s.all["loadbalancers"] = append(s.all["loadbalancers"], b)
	all, _ := in["listeners"].([]any)
	for _, l := range all {
		m := l.(map[string]any)
		p, _ := m["default_pool"].(map[string]any)
		if m["project_id"] != nil || p["project_id"] != nil {
			return 0, nil, refuse(400, "", "Invalid input for field/attribute listener. Unknown attribute: project_id")
		}
	}
	for _, l := range all {
		x := s.newListener(b, l.(map[string]any))
		if s.hangs {
			x["provisioning_status"] = "PENDING_CREATE"
		}
	}
	return 201, resource{"loadbalancer": clone(b)}, nil
}

func (s *Server) newListener(b, in resource) resource {
	l := normal(resource{"id": uuid(), "loadbalancer": b["id"], "project_id": b["project_id"], "protocol": in["protocol"], "protocol_port": in["protocol_port"], "allowed_cidrs": in["allowed_cidrs"]})
	if p, ok := in["default_pool"].(map[string]any); ok {
		l["default_pool_id"] = s.newPool(b, p)["id"]
	}
	s.all["listeners"] = append(s.all["listeners"], l)
	return l
}

func (s *Server) newPool(b, in resource) resource {
	p := normal(resource{"id": uuid(), "loadbalancer": b["id"], "project_id": b["project_id"], "protocol": in["protocol"], "session_persistence": in["session_persistence"]})
	s.all["pools"] = append(s.all["pools"], p)
	s.putMembers(p, in["members"])
	return p
}

func (s *Server) putMembers(p resource, all any) {
	list, _ := all.([]any)
	for _, m := range list {
		x := clone(m.(map[string]any))
		x["id"], x["pool"], x["loadbalancer"] = uuid(), p["id"], p["loadbalancer"]
		s.all["members"] = append(s.all["members"], x)
	}
}
