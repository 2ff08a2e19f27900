// Package openstacktest lets tests use the OpenStack that test/openstack/openstack.sh runs.
//
// It owns finding it, reaching it from outside its network namespace, and running the
// script's commands: hosts that come and go, faults. It must not know what is tested.
package openstacktest

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack"
	"github.com/gophercloud/gophercloud/v2/openstack/config/clouds"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/tokens"

	"github.com/hypernetes/hypernetes/network/netns"
)

// ExternalNetwork is its name in Neutron, and Outside the address there of a client.
const (
	ExternalNetwork = "public"
	Outside         = "172.24.4.250"
)

// Cloud is an OpenStack that is up. Its methods may be called concurrently.
type Cloud struct {
	// Dir is its state directory, with clouds.yaml.
	Dir string
	ns  *netns.NS
}

// Up is the OpenStack at $H8S_OPENSTACK. It skips the test, saying so, if that is not set,
// and fails it if it is set and Keystone and Neutron do not answer.
func Up(t testing.TB) *Cloud {
	t.Helper()
	dir := os.Getenv("H8S_OPENSTACK")
	if dir == "" {
		t.Skip("H8S_OPENSTACK is not set: no OpenStack to test against (make openstack-up, then H8S_OPENSTACK=/var/tmp/h8s-openstack)")
	}
	if os.Getuid() != 0 {
		t.Skip("not root: OpenStack is in a network namespace of its own")
	}
	path, err := os.ReadFile(filepath.Join(dir, "netns"))
	if err != nil {
		t.Fatalf("H8S_OPENSTACK=%s: not up (make openstack-up): %v", dir, err)
	}
	ns, err := netns.Open(strings.TrimSpace(string(path)))
	if err != nil {
		t.Fatalf("H8S_OPENSTACK=%s: %v", dir, err)
	}
	t.Cleanup(func() { _ = ns.Close() })
	c := &Cloud{Dir: dir, ns: ns}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	provider, err := c.Provider(ctx, "admin")
	if err != nil {
		t.Fatalf("Keystone at %s: %v", dir, err)
	}
	neutron, err := openstack.NewNetworkV2(provider, gophercloud.EndpointOpts{})
	if err != nil {
		t.Fatalf("Neutron at %s: %v", dir, err)
	}
	var answer struct{}
	if _, err := neutron.Get(ctx, neutron.ServiceURL("agents")+"?fields=id", &answer, nil); err != nil {
		t.Fatalf("Neutron at %s: %v", dir, err)
	}
	return c
}

// Do calls f on a thread that is in OpenStack's network namespace. f must not start
// goroutines that are to be there too.
func (c *Cloud) Do(f func() error) error { return c.ns.Do(f) }

// DialContext connects from within OpenStack's network namespace. Names are not resolved:
// address is IP:port.
func (c *Cloud) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return c.ns.DialContext(ctx, network, address)
}

// HTTPClient talks to the APIs from anywhere. Each call makes another one, with
// connections of its own.
func (c *Cloud) HTTPClient() *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: c.ns.DialContext}}
}

// ConfigFile is the clouds.yaml; seed.py says which clouds are in it.
func (c *Cloud) ConfigFile() string { return filepath.Join(c.Dir, "clouds.yaml") }

// AuthOptions are those of a cloud of the clouds.yaml.
func (c *Cloud) AuthOptions(cloud string) (gophercloud.AuthOptions, error) {
	options, _, _, err := clouds.Parse(clouds.WithLocations(c.ConfigFile()), clouds.WithCloudName(cloud))
	options.AllowReauth = true
	return options, err
}

// Provider logs in as that cloud of the clouds.yaml.
func (c *Cloud) Provider(ctx context.Context, cloud string) (*gophercloud.ProviderClient, error) {
	options, err := c.AuthOptions(cloud)
	if err != nil {
		return nil, err
	}
	provider, err := openstack.NewClient(options.IdentityEndpoint)
	if err != nil {
		return nil, err
	}
	provider.HTTPClient = *c.HTTPClient()
	return provider, openstack.Authenticate(ctx, provider, options)
}

// NetNS is the path of the services' network namespace.
func (c *Cloud) NetNS() string { return c.ns.Path() }

// OutsideNetNS is the path of the namespace of a client on the external network.
func (c *Cloud) OutsideNetNS() string { return c.ns.Path() + "-outside" }

// Node is the nth of Neutron's hosts that were made with the OpenStack, from 1 to
// H8S_OS_NODES (2): its name, and the path of its network namespace.
func (c *Cloud) Node(n int) (host, path string) {
	path = fmt.Sprintf("%s-node%d", c.ns.Path(), n)
	return filepath.Base(path), path
}

// Neutron logs in as that cloud and is its Neutron; it fails the test if that is not to be.
func (c *Cloud) Neutron(t testing.TB, cloud string) *gophercloud.ServiceClient {
	t.Helper()
	provider, err := c.Provider(t.Context(), cloud)
	if err != nil {
		t.Fatalf("log in as %s: %v", cloud, err)
	}
	client, err := openstack.NewNetworkV2(provider, gophercloud.EndpointOpts{})
	if err != nil {
		t.Fatalf("Neutron of %s: %v", cloud, err)
	}
	return client
}

// ProjectID is the project that the provider's token is scoped to.
func ProjectID(provider *gophercloud.ProviderClient) (string, error) {
	result, ok := provider.GetAuthResult().(tokens.CreateResult)
	if !ok {
		return "", fmt.Errorf("a %T does not name a project", provider.GetAuthResult())
	}
	project, err := result.ExtractProject()
	if err != nil {
		return "", err
	}
	if project == nil {
		return "", fmt.Errorf("the token has no project")
	}
	return project.ID, nil
}

// Script runs a command of openstack.sh, such as "kill", "agent-up" or "freeze", and
// fails the test if that fails. Other tests use the same OpenStack: whoever kills a
// service that is not theirs starts it again.
func (c *Cloud) Script(t testing.TB, args ...string) {
	t.Helper()
	if err := c.script(t.Context(), args...); err != nil {
		t.Fatal(err)
	}
}

// TryScript is Script for what may fail, and for when the test is over.
func (c *Cloud) TryScript(ctx context.Context, args ...string) error { return c.script(ctx, args...) }

func (c *Cloud) script(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, filepath.Join(root(), "test", "openstack", "openstack.sh"), args...)
	cmd.Env = append(os.Environ(), "H8S_OPENSTACK="+c.Dir)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("openstack.sh %s: %w: %s", strings.Join(args, " "), err, out.String())
	}
	return nil
}

// Host makes the network namespace at path Neutron's host called name until the test
// ends: an L2 agent runs there, reaching the others from that address of 10.250.0.0/24.
func (c *Cloud) Host(t testing.TB, name, path, address string) {
	t.Helper()
	t.Cleanup(func() {
		if err := c.script(context.Background(), "agent-down", name); err != nil {
			t.Error(err)
		}
	})
	c.Script(t, "agent-up", name, path, address)
}

// root is the checkout the test runs in: tests run in their package's directory.
func root() string {
	for dir, err := os.Getwd(); err == nil; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil || dir == "/" {
			return dir
		}
	}
	return "."
}
