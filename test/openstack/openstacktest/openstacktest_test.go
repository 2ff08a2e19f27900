package openstacktest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/tokens"
	"github.com/gophercloud/gophercloud/v2/openstack/networking/v2/extensions/layer3/floatingips"
	"github.com/gophercloud/gophercloud/v2/openstack/networking/v2/extensions/layer3/routers"
	"github.com/gophercloud/gophercloud/v2/openstack/networking/v2/extensions/portsbinding"
	"github.com/gophercloud/gophercloud/v2/openstack/networking/v2/extensions/security/rules"
	"github.com/gophercloud/gophercloud/v2/openstack/networking/v2/networks"
	"github.com/gophercloud/gophercloud/v2/openstack/networking/v2/ports"
	"github.com/gophercloud/gophercloud/v2/openstack/networking/v2/subnets"

	"github.com/hypernetes/hypernetes/network/netns"
)

// patience is how long anything may take here: the machine has two cores and others on it.
const patience = 3 * time.Minute

const cidr = "192.168.77.0/24" // of both projects

// port is a port with its binding.
type port struct {
	ports.Port
	portsbinding.PortsBindingExt
}

// project is a tenant's network as the tenant makes it, and its ports as we make them.
type project struct {
	t       *testing.T
	cloud   *Cloud
	name    string
	id      string
	admin   *gophercloud.ServiceClient // the service user's
	tenant  *gophercloud.ServiceClient
	network *networks.Network
	subnet  *subnets.Subnet
	router  *routers.Router
}

func newProject(t *testing.T, c *Cloud, name, external string) *project {
	t.Helper()
	ctx := t.Context()
	p := &project{t: t, cloud: c, name: name, admin: c.Neutron(t, "service"), tenant: c.Neutron(t, name)}
	id, err := ProjectID(p.tenant.ProviderClient)
	must(t, err)
	p.id = id
	p.network, err = networks.Create(ctx, p.tenant, networks.CreateOpts{Name: "smoke"}).Extract()
	must(t, err)
	p.cleanup(func(ctx context.Context) error { return networks.Delete(ctx, p.tenant, p.network.ID).ExtractErr() })
	p.subnet, err = subnets.Create(ctx, p.tenant, subnets.CreateOpts{NetworkID: p.network.ID, IPVersion: 4, CIDR: cidr}).Extract()
	must(t, err)
	p.router, err = routers.Create(ctx, p.tenant, routers.CreateOpts{
		Name: "smoke", GatewayInfo: &routers.GatewayInfo{NetworkID: external},
	}).Extract()
	must(t, err)
	p.cleanup(func(ctx context.Context) error { return routers.Delete(ctx, p.tenant, p.router.ID).ExtractErr() })
	_, err = routers.AddInterface(ctx, p.tenant, p.router.ID, routers.AddInterfaceOpts{SubnetID: p.subnet.ID}).Extract()
	must(t, err)
	p.cleanup(func(ctx context.Context) error {
		_, err := routers.RemoveInterface(ctx, p.tenant, p.router.ID, routers.RemoveInterfaceOpts{SubnetID: p.subnet.ID}).Extract()
		return err
	})
	return p
}

func (p *project) cleanup(f func(context.Context) error) {
	p.t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := f(ctx); err != nil {
			p.t.Errorf("clean up project %s: %v", p.name, err)
		}
	})
}

// bind creates a port with that address on a host, as a client.
func (p *project) bind(client *gophercloud.ServiceClient, address, host string) (*port, error) {
	got := &port{}
	err := ports.Create(p.t.Context(), client, portsbinding.CreateOptsExt{
		HostID: host,
		CreateOptsBuilder: ports.CreateOpts{
			NetworkID: p.network.ID, ProjectID: p.id, Name: "smoke", DeviceOwner: "hypernetes:pod", DeviceID: "smoke",
			FixedIPs: []ports.IP{{SubnetID: p.subnet.ID, IPAddress: address}},
		},
	}).ExtractInto(got)
	if err != nil {
		return nil, err
	}
	p.cleanup(func(ctx context.Context) error { return ports.Delete(ctx, p.admin, got.ID).ExtractErr() })
	return got, nil
}

// endpoint is a namespace with a port in it, as a Pod's.
type endpoint struct {
	t    *testing.T
	ns   *netns.NS
	port *port
}

// plug makes a port and an endpoint wired to it: a veth with the port's address, whose
// other end is named as the agent in the host's namespace wants it.
func (p *project) plug(address, host string, hostNS *netns.NS) *endpoint {
	p.t.Helper()
	got, err := p.bind(p.admin, address, host)
	must(p.t, err)
	if got.VIFType != "bridge" {
		p.t.Fatalf("port on %s: binding:vif_type is %q, want bridge", host, got.VIFType)
	}
	e := &endpoint{t: p.t, ns: newNetNS(p.t), port: got}
	tap := "tap" + got.ID[:11]
	run(p.t, hostNS, "ip", "link", "add", tap, "type", "veth", "peer", "name", "eth0", "address", got.MACAddress, "netns", e.ns.Path())
	p.t.Cleanup(func() { _ = command(hostNS, "ip", "link", "del", tap) })
	run(p.t, hostNS, "ip", "link", "set", tap, "up")
	for _, args := range []string{
		"link set lo up", "link set eth0 mtu 1450 up", "addr add " + address + "/24 dev eth0", "route add default via 192.168.77.1",
	} {
		run(p.t, e.ns, "ip", strings.Fields(args)...)
	}
	return e
}

func (p *project) active(e *endpoint) {
	p.t.Helper()
	eventually(p.t, "port "+e.port.ID+" is ACTIVE", func() error {
		got, err := ports.Get(p.t.Context(), p.admin, e.port.ID).Extract()
		if err == nil && got.Status != "ACTIVE" {
			err = fmt.Errorf("it is %s", got.Status)
		}
		return err
	})
}

// reaches asserts an answer to a ping.
func (e *endpoint) reaches(address string) {
	e.t.Helper()
	reaches(e.t, e.ns, address)
}

func reaches(t *testing.T, from *netns.NS, address string) {
	t.Helper()
	eventually(t, address+" answers", func() error { return command(from, "busybox", "ping", "-c1", "-W1", address) })
}

// TestTenants is what this OpenStack is for: two projects whose networks overlap
// completely, made by their own members, with ports that we bind, on two hosts.
func TestTenants(t *testing.T) {
	c := Up(t)
	public, err := networks.List(c.Neutron(t, "alpha"), networks.ListOpts{Name: ExternalNetwork}).AllPages(t.Context())
	must(t, err)
	external, err := networks.ExtractNetworks(public)
	must(t, err)
	if len(external) != 1 {
		t.Fatalf("%d networks are called %s", len(external), ExternalNetwork)
	}
	hosts := make(map[string]*netns.NS)
	one, onePath := c.Node(1)
	two, twoPath := c.Node(2)
	hosts[one], hosts[two] = open(t, onePath), open(t, twoPath)
	// One more host in a namespace that is not OpenStack's own, as a node's.
	mine := newNetNS(t)
	run(t, mine, "ip", "link", "set", "lo", "up")
	host := fmt.Sprintf("smoke-%d", os.Getpid())
	c.Host(t, host, mine.Path(), "10.250.0.199")
	hosts[host] = mine

	alpha, beta := newProject(t, c, "alpha", external[0].ID), newProject(t, c, "beta", external[0].ID)
	if alpha.id == beta.id {
		t.Fatalf("both projects are %s", alpha.id)
	}
	a50 := alpha.plug("192.168.77.50", one, hosts[one])
	a51 := alpha.plug("192.168.77.51", two, hosts[two])
	a52 := alpha.plug("192.168.77.52", host, hosts[host])
	b50 := beta.plug("192.168.77.50", two, hosts[two])
	b60 := beta.plug("192.168.77.60", one, hosts[one])
	for _, e := range []*endpoint{a50, a51, a52} {
		alpha.active(e)
	}
	for _, e := range []*endpoint{b50, b60} {
		beta.active(e)
	}

	a50.reaches("192.168.77.51") // over VXLAN
	a50.reaches("192.168.77.52")
	b60.reaches("192.168.77.50")
	for e, want := range map[*endpoint]*endpoint{a51: a50, b60: b50} {
		e.reaches("192.168.77.50")
		if got := output(t, e.ns, "ip", "neigh", "show", "192.168.77.50"); !strings.Contains(got, want.port.MACAddress) {
			t.Errorf("192.168.77.50 is %q, want the own project's %s", got, want.port.MACAddress)
		}
	}
	if command(a50.ns, "busybox", "ping", "-c2", "-W1", "192.168.77.60") == nil {
		t.Error("192.168.77.60 of the other project answers")
	}

	t.Run("outside", func(t *testing.T) {
		a50.reaches("192.168.77.1")
		a52.reaches(Outside) // SNAT
		rule, err := rules.Create(t.Context(), alpha.admin, rules.CreateOpts{
			SecGroupID: a52.port.SecurityGroups[0], ProjectID: alpha.id, Direction: rules.DirIngress,
			EtherType: rules.EtherType4, Protocol: rules.ProtocolICMP, RemoteIPPrefix: Outside + "/32",
		}).Extract()
		if err == nil {
			alpha.cleanup(func(ctx context.Context) error { return rules.Delete(ctx, alpha.admin, rule.ID).ExtractErr() })
		} else if !gophercloud.ResponseCodeIs(err, http.StatusConflict) { // somebody else's does as well
			t.Fatal(err)
		}
		ip, err := floatingips.Create(t.Context(), alpha.tenant, floatingips.CreateOpts{
			FloatingNetworkID: external[0].ID, PortID: a52.port.ID,
		}).Extract()
		must(t, err)
		alpha.cleanup(func(ctx context.Context) error { return floatingips.Delete(ctx, alpha.tenant, ip.ID).ExtractErr() })
		reaches(t, open(t, c.OutsideNetNS()), ip.FloatingIP)
	})

	t.Run("binding", func(t *testing.T) {
		_, err := alpha.bind(alpha.tenant, "192.168.77.70", one)
		if !gophercloud.ResponseCodeIs(err, http.StatusForbidden) {
			t.Errorf("a member binds a port: %v, want 403", err)
		}
		least := c.Neutron(t, "least-alpha")
		got, err := alpha.bind(least, "192.168.77.71", one)
		must(t, err)
		if got.VIFType != "bridge" || got.HostID != one {
			t.Errorf("the least profile sees vif_type %q and host %q, want bridge and %s", got.VIFType, got.HostID, one)
		}
		got, err = alpha.bind(least, "192.168.77.72", "no-such-host")
		must(t, err)
		if got.VIFType != "binding_failed" {
			t.Errorf("a port on a host without an agent: vif_type %q, want binding_failed", got.VIFType)
		}
		if _, err = beta.bind(least, "192.168.77.71", one); err == nil {
			t.Error("the least profile, scoped to alpha, binds a port of beta's")
		}
		if _, err = networks.Get(t.Context(), alpha.tenant, beta.network.ID).Extract(); !gophercloud.ResponseCodeIs(err, http.StatusNotFound) {
			t.Errorf("alpha asks for beta's network: %v, want 404", err)
		}
	})

	t.Run("fault", func(t *testing.T) {
		c.Script(t, "kill", "agent-"+host)
		if c.script(t.Context(), "kill", "agent-"+host) == nil {
			t.Error("an agent was killed twice")
		}
		c.Script(t, "start", "agent-"+host)
		a52.reaches("192.168.77.50")
	})
}

// TestAccounts: who there is, and that names alone say nothing.
func TestAccounts(t *testing.T) {
	c := Up(t)
	users, projects := make(map[string]string), make(map[string]string)
	for _, cloud := range []string{"alpha", "beta", "other-alpha", "other-beta"} {
		provider, err := c.Provider(t.Context(), cloud)
		must(t, err)
		user, err := provider.GetAuthResult().(tokens.CreateResult).ExtractUser()
		must(t, err)
		project, err := ProjectID(provider)
		must(t, err)
		if was := users[user.ID]; was != "" {
			t.Errorf("%s and %s are the same user", was, cloud)
		}
		if was := projects[project]; was != "" {
			t.Errorf("%s and %s are the same project", was, cloud)
		}
		users[user.ID], projects[project] = cloud, cloud
	}
	for cloud, want := range map[string]string{
		"service": "admin", "webhook": "service", "least-beta": "h8s-network", "carol-beta": "reader",
		"alpha-reader": "reader", "alpha-manager": "manager", "beta-admin": "admin", "mallory": "system:masters",
	} {
		provider, err := c.Provider(t.Context(), cloud)
		must(t, err)
		roles, err := provider.GetAuthResult().(tokens.CreateResult).ExtractRoles()
		must(t, err)
		has := false
		for _, role := range roles {
			has = has || role.Name == want
		}
		if !has {
			t.Errorf("%s has the roles %v, want %s", cloud, roles, want)
		}
	}
	// Role "service" is enough to check somebody else's token.
	webhook, err := c.Provider(t.Context(), "webhook")
	must(t, err)
	alice, err := c.Provider(t.Context(), "alpha")
	must(t, err)
	identity, err := openstack.NewIdentityV3(webhook, gophercloud.EndpointOpts{})
	must(t, err)
	if _, err := tokens.Get(t.Context(), identity, alice.Token()).Extract(); err != nil {
		t.Errorf("the webhook's user checks a token: %v", err)
	}
	if least, err := c.Provider(t.Context(), "least"); err != nil {
		t.Error(err)
	} else if _, err := ProjectID(least); err == nil {
		t.Error("the cloud \"least\" has a project")
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually asks until f succeeds.
func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	tick := time.NewTicker(300 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return
		}
		if errors.Is(err, exec.ErrNotFound) {
			t.Fatal(err)
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s: not within %v: %v", what, patience, err)
		case <-tick.C:
		}
	}
}

func open(t *testing.T, path string) *netns.NS {
	t.Helper()
	ns, err := netns.Open(path)
	must(t, err)
	t.Cleanup(func() { _ = ns.Close() })
	return ns
}

func newNetNS(t *testing.T) *netns.NS {
	t.Helper()
	ns, err := netns.Create(t.TempDir() + "/netns")
	must(t, err)
	t.Cleanup(func() {
		if err := errors.Join(ns.Close(), netns.Remove(ns.Path())); err != nil {
			t.Error(err)
		}
	})
	return ns
}

func command(ns *netns.NS, name string, args ...string) error {
	var out bytes.Buffer
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := ns.Do(cmd.Run); err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out.String())
	}
	return nil
}

func run(t *testing.T, ns *netns.NS, name string, args ...string) {
	t.Helper()
	must(t, command(ns, name, args...))
}

func output(t *testing.T, ns *netns.NS, name string, args ...string) string {
	t.Helper()
	var out []byte
	must(t, ns.Do(func() (err error) {
		out, err = exec.Command(name, args...).Output()
		return err
	}))
	return string(out)
}
