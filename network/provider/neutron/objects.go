package neutron

import (
	"context"
	"encoding/json"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/hypernetes/hypernetes/network/openstack"
)

// Collections of Neutron's API, as URLs name them.
const (
	networks      = "networks"
	subnets       = "subnets"
	routers       = "routers"
	ports         = "ports"
	groups        = "security-groups"
	rules         = "security-group-rules"
	floatingIPs   = "floatingips"
	agents        = "agents"
	deviceOwner   = "hypernetes:pod"
	frontOwner    = "hypernetes:vip"
	statusActive  = "ACTIVE"
	bindingFailed = "binding_failed"
	unbound       = "unbound"
)

// object is what every resource has. Those of one type have all fields that any resource
// has which we look at: what a server does not say stays empty.
type object struct {
	ID          string   `json:"id"`
	Name        string   `json:"name"`
	Description string   `json:"description"`
	Project     string   `json:"project_id"`
	Tags        []string `json:"tags"`
	Created     string   `json:"created_at"`
	AdminUp     *bool    `json:"admin_state_up"`
}

func (o object) base() object { return o }

type network struct {
	object
	MTU          int32    `json:"mtu"`
	PortSecurity *bool    `json:"port_security_enabled"`
	External     bool     `json:"router:external"`
	Subnets      []string `json:"subnets"`
}

type subnetwork struct {
	object
	Network string  `json:"network_id"`
	CIDR    string  `json:"cidr"`
	Gateway *string `json:"gateway_ip"`
	DHCP    bool    `json:"enable_dhcp"`
}

type router struct {
	object
	Gateway *gateway `json:"external_gateway_info"`
}

type gateway struct {
	Network string `json:"network_id"`
}

type group struct {
	object
	Rules []rule `json:"security_group_rules"`
}

// rule is one of a security group. The fields but the first two narrow it.
type rule struct {
	ID            string  `json:"id,omitempty"`
	Direction     string  `json:"direction"`
	Family        string  `json:"ethertype"`
	Protocol      *string `json:"protocol,omitempty"`
	PortMin       *int    `json:"port_range_min,omitempty"`
	PortMax       *int    `json:"port_range_max,omitempty"`
	RemotePrefix  *string `json:"remote_ip_prefix,omitempty"`
	RemoteGroup   *string `json:"remote_group_id,omitempty"`
	RemoteAddress *string `json:"remote_address_group_id,omitempty"`
}

// whole says whether r narrows nothing.
func (r rule) whole() bool {
	wide := func(s *string) bool { return s == nil || *s == "" || *s == "0.0.0.0/0" || *s == "::/0" || *s == "any" }
	return wide(r.Protocol) && r.PortMin == nil && r.PortMax == nil && wide(r.RemotePrefix) && r.RemoteGroup == nil && r.RemoteAddress == nil
}

type fixedIP struct {
	Subnet  string `json:"subnet_id,omitempty"`
	Address string `json:"ip_address"`
}

type port struct {
	object
	Network      string            `json:"network_id"`
	MAC          string            `json:"mac_address"`
	Fixed        []fixedIP         `json:"fixed_ips"`
	Status       string            `json:"status"`
	DeviceID     string            `json:"device_id"`
	DeviceOwner  string            `json:"device_owner"`
	Groups       []string          `json:"security_groups"`
	Pairs        []json.RawMessage `json:"allowed_address_pairs"`
	PortSecurity *bool             `json:"port_security_enabled"`
	Host         *string           `json:"binding:host_id"`
	VIFType      *string           `json:"binding:vif_type"`
}

type floatingIP struct {
	object
	External string  `json:"floating_network_id"`
	Address  string  `json:"floating_ip_address"`
	Port     *string `json:"port_id"`
	Fixed    *string `json:"fixed_ip_address"`
}

type agent struct {
	Type  string `json:"agent_type"`
	Host  string `json:"host"`
	Alive bool   `json:"alive"`
}

// key is what the JSON of a collection is called.
func key(collection string) string { return strings.ReplaceAll(collection, "-", "_") }

// single is what the JSON of one resource is called.
func single(collection string) string { return strings.TrimSuffix(key(collection), "s") }

type resource interface{ base() object }

func of(collection string) openstack.Collection {
	return openstack.Collection{Path: collection, Key: key(collection), One: single(collection)}
}

func list[T any](ctx context.Context, c *openstack.Client, collection string, q url.Values) ([]T, error) {
	return openstack.List[T](ctx, c, of(collection), q)
}

func get[T any](ctx context.Context, c *openstack.Client, collection, id string) (*T, error) {
	return openstack.Get[T](ctx, c, of(collection), id)
}

func put[T any](ctx context.Context, c *openstack.Client, collection, id string, body map[string]any) (*T, error) {
	return openstack.Put[T](ctx, c, of(collection), id, body)
}

func remove(ctx context.Context, c *openstack.Client, collection, id string) error {
	return openstack.Remove(ctx, c, of(collection), id, nil)
}

// tag replaces a resource's tags.
func tag(ctx context.Context, c *openstack.Client, collection, id string, tags []string) error {
	return c.Do(ctx, http.MethodPut, collection+"/"+url.PathEscape(id)+"/tags", nil, map[string]any{"tags": tags}, nil)
}

// owned lists what carries a mark in a project, the oldest first.
func owned[T resource](ctx context.Context, c *openstack.Client, collection, project, mark string, q url.Values) ([]T, error) {
	if q == nil {
		q = url.Values{}
	}
	q.Set("project_id", project)
	q.Set("description", mark)
	all, err := list[T](ctx, c, collection, q)
	if err != nil {
		return nil, err
	}
	// A server that does not know a filter may leave it out.
	all = slices.DeleteFunc(all, func(r T) bool { return r.base().Project != project || r.base().Description != mark })
	slices.SortStableFunc(all, func(a, b T) int {
		return strings.Compare(a.base().Created+a.base().ID, b.base().Created+b.base().ID)
	})
	return all, nil
}
