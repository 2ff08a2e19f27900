package testcloud

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/projects"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/roles"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/users"
)

// password of every user made here.
const password = "e2e-secret"

// Project is a project of Keystone of one test's own.
type Project struct {
	ID, Name string
	c        *Cloud
	t        testing.TB
	keystone *gophercloud.ServiceClient
	neutron  *gophercloud.ServiceClient
}

// Project makes one, which is deleted when the test ends. By then nothing may be left in it.
func (c *Cloud) Project(t testing.TB) *Project {
	t.Helper()
	provider, err := c.OpenStack.Provider(t.Context(), "admin")
	if err != nil {
		t.Fatal(err)
	}
	keystone, err := openstack.NewIdentityV3(provider, gophercloud.EndpointOpts{})
	if err != nil {
		t.Fatal(err)
	}
	neutron, err := openstack.NewNetworkV2(provider, gophercloud.EndpointOpts{})
	if err != nil {
		t.Fatal(err)
	}
	p := &Project{Name: unique("e2e-"), c: c, t: t, keystone: keystone, neutron: neutron}
	made, err := projects.Create(t.Context(), keystone, projects.CreateOpts{Name: p.Name, DomainID: "default"}).Extract()
	if err != nil {
		t.Fatal(err)
	}
	p.ID = made.ID
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), Patience)
		defer cancel()
		for _, left := range p.left(ctx) {
			t.Errorf("left in project %s: %s", p.Name, left)
		}
		if err := projects.Delete(ctx, keystone, p.ID).ExtractErr(); err != nil {
			t.Errorf("clean up: project %s: %v", p.Name, err)
		}
	})
	return p
}

// Kinds of objects of Neutron's that a tenant's Networks are made of.
var Kinds = []string{"networks", "subnets", "routers", "ports", "floatingips", "security-groups"}

// left lists what is left of the project at Neutron, and removes it.
func (p *Project) left(ctx context.Context) []string {
	var out []string
	for _, kind := range []string{"floatingips", "ports", "routers", "subnets", "networks", "security-groups"} {
		all, err := p.list(ctx, kind, nil)
		if err != nil {
			out = append(out, err.Error())
		}
		for _, o := range all {
			if kind == "security-groups" && o.Text("name") == "default" {
				continue // Neutron makes it for every project that it hears of
			}
			out = append(out, kind+" "+o.Text("id")+" "+o.Text("name"))
			if kind == "ports" && strings.HasPrefix(o.Text("device_owner"), "network:router") {
				_, _ = p.neutron.Put(ctx, p.neutron.ServiceURL("routers", o.Text("device_id"), "remove_router_interface"), map[string]any{"port_id": o.Text("id")}, nil, &gophercloud.RequestOpts{OkCodes: []int{200}})
				continue
			}
			_, _ = p.neutron.Delete(ctx, p.neutron.ServiceURL(kind, o.Text("id")), nil)
		}
	}
	return out
}

// Object of Neutron's.
type Object map[string]any

// Text is a field that is a string.
func (o Object) Text(field string) string {
	s, _ := o[field].(string)
	return s
}

// Addresses are the fixed addresses of a port.
func (o Object) Addresses() []string {
	var out []string
	list, _ := o["fixed_ips"].([]any)
	for _, f := range list {
		m, _ := f.(map[string]any)
		ip, _ := m["ip_address"].(string)
		out = append(out, ip)
	}
	return out
}

// Tags of the object.
func (o Object) Tags() []string {
	var out []string
	list, _ := o["tags"].([]any)
	for _, v := range list {
		s, _ := v.(string)
		out = append(out, s)
	}
	slices.Sort(out)
	return out
}

func (p *Project) list(ctx context.Context, kind string, query url.Values) ([]Object, error) {
	if query == nil {
		query = url.Values{}
	}
	query.Set("project_id", p.ID)
	answer := map[string][]Object{}
	if _, err := p.neutron.Get(ctx, p.neutron.ServiceURL(kind)+"?"+query.Encode(), &answer, nil); err != nil {
		return nil, fmt.Errorf("list %s of project %s: %w", kind, p.Name, err)
	}
	return answer[strings.ReplaceAll(kind, "-", "_")], nil
}

// Try lists the project's objects of a kind, with field=value pairs they must have.
func (p *Project) Try(kind string, fields ...string) ([]Object, error) {
	query := url.Values{}
	for i := 0; i+1 < len(fields); i += 2 {
		query.Add(fields[i], fields[i+1])
	}
	return p.list(p.t.Context(), kind, query)
}

// List is Try that fails the test.
func (p *Project) List(kind string, fields ...string) []Object {
	p.t.Helper()
	all, err := p.Try(kind, fields...)
	if err != nil {
		p.t.Fatal(err)
	}
	return all
}

// Delete deletes an object, as Neutron's administrator.
func (p *Project) Delete(kind, id string) error {
	_, err := p.neutron.Delete(p.t.Context(), p.neutron.ServiceURL(kind, id), nil)
	return err
}

// Update changes an object, as Neutron's administrator.
func (p *Project) Update(kind, id string, body map[string]any) error {
	single := strings.ReplaceAll(strings.TrimSuffix(kind, "s"), "-", "_")
	_, err := p.neutron.Put(p.t.Context(), p.neutron.ServiceURL(kind, id), map[string]any{single: body}, nil, &gophercloud.RequestOpts{OkCodes: []int{200}})
	return err
}

// Detach takes a router out of a subnet.
func (p *Project) Detach(router, subnet string) error {
	_, err := p.neutron.Put(p.t.Context(), p.neutron.ServiceURL("routers", router, "remove_router_interface"), map[string]any{"subnet_id": subnet}, nil, &gophercloud.RequestOpts{OkCodes: []int{200}})
	return err
}

// Segment is the number that the frames of a tenant's only network have between nodes.
func (c *Cloud) Segment(t testing.TB, tenant string) int {
	t.Helper()
	project := strings.TrimSpace(c.Kubectl(t, "get", "tenant", tenant, "-o", "jsonpath={.spec.keystone.projectID}"))
	p := &Project{ID: project, Name: tenant, c: c, t: t, neutron: c.OpenStack.Neutron(t, "admin")}
	all := p.List("networks")
	if len(all) != 1 {
		t.Fatalf("tenant %s has %d networks at Neutron", tenant, len(all))
	}
	id, _ := all[0]["provider:segmentation_id"].(float64)
	return int(id)
}

// User makes a user with a role in the project, who goes with the test. The name says
// little: it is the ID that counts.
func (p *Project) User(role string) *User {
	p.t.Helper()
	ctx := p.t.Context()
	u := &User{Name: unique(role + "-"), Project: p}
	made, err := users.Create(ctx, p.keystone, users.CreateOpts{Name: u.Name, DomainID: "default", Password: password}).Extract()
	if err != nil {
		p.t.Fatal(err)
	}
	u.ID = made.ID
	p.t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), Patience)
		defer cancel()
		if err := users.Delete(ctx, p.keystone, u.ID).ExtractErr(); err != nil {
			p.t.Errorf("clean up: user %s: %v", u.Name, err)
		}
	})
	if err := roles.Assign(ctx, p.keystone, p.role(role), roles.AssignOpts{UserID: u.ID, ProjectID: p.ID}).ExtractErr(); err != nil {
		p.t.Fatal(err)
	}
	return u
}

// Grant gives the user of the cloud "least" of OpenStack's clouds.yaml a role in the
// project, which ends with the project.
func (p *Project) Grant(role string) {
	p.t.Helper()
	ctx := p.t.Context()
	options, err := p.c.OpenStack.AuthOptions("least")
	if err != nil {
		p.t.Fatal(err)
	}
	pages, err := users.List(p.keystone, users.ListOpts{Name: options.Username, DomainID: "default"}).AllPages(ctx)
	if err != nil {
		p.t.Fatal(err)
	}
	who, err := users.ExtractUsers(pages)
	if err != nil || len(who) != 1 {
		p.t.Fatalf("user %s: %v %v", options.Username, who, err)
	}
	o := roles.AssignOpts{UserID: who[0].ID, ProjectID: p.ID}
	id := p.role(role)
	if err := roles.Assign(ctx, p.keystone, id, o).ExtractErr(); err != nil {
		p.t.Fatal(err)
	}
}

// role is its ID.
func (p *Project) role(name string) string {
	p.t.Helper()
	pages, err := roles.List(p.keystone, roles.ListOpts{Name: name}).AllPages(p.t.Context())
	if err != nil {
		p.t.Fatal(err)
	}
	found, err := roles.ExtractRoles(pages)
	if err != nil || len(found) != 1 {
		p.t.Fatalf("role %s: %v %v", name, found, err)
	}
	return found[0].ID
}

// User of a project.
type User struct {
	ID, Name string
	Project  *Project
}

// Auth is the auth section of clouds.yaml for the user's password.
func (u *User) Auth() map[string]string {
	return map[string]string{
		"username": u.Name, "password": password, "user_domain_name": "Default",
		"project_id": u.Project.ID,
	}
}

// Provider logs in as the user.
func (u *User) Provider(ctx context.Context) (*gophercloud.ProviderClient, error) {
	provider, err := openstack.NewClient(u.Project.keystone.IdentityEndpoint)
	if err != nil {
		return nil, err
	}
	provider.HTTPClient = *u.Project.c.OpenStack.HTTPClient()
	return provider, openstack.Authenticate(ctx, provider, gophercloud.AuthOptions{
		IdentityEndpoint: u.Project.keystone.IdentityEndpoint, Username: u.Name, Password: password, DomainID: "default", TenantID: u.Project.ID,
	})
}

// CloudsYAML writes a clouds.yaml and returns its name. An entry has auth_type, if that is
// not password, beside the fields of its auth section.
func (c *Cloud) CloudsYAML(t testing.TB, clouds map[string]map[string]string) string {
	t.Helper()
	options, err := c.OpenStack.AuthOptions("admin")
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	b.WriteString("clouds:\n")
	for name, auth := range clouds {
		fmt.Fprintf(&b, "  %s:\n    identity_api_version: 3\n", name)
		if kind := auth["auth_type"]; kind != "" {
			fmt.Fprintf(&b, "    auth_type: %s\n", kind)
		}
		fmt.Fprintf(&b, "    auth:\n      auth_url: %s\n", options.IdentityEndpoint)
		for k, v := range auth {
			if k != "auth_type" {
				fmt.Fprintf(&b, "      %s: %q\n", k, v)
			}
		}
	}
	file := filepath.Join(t.TempDir(), "clouds.yaml")
	if err := os.WriteFile(file, []byte(b.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}
