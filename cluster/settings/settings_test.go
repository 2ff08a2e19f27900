package settings

import (
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
)

func TestParsePublish(t *testing.T) {
	for in, want := range map[string]Publish{"8001": {8001, 8001}, "80:30080": {80, 30080}} {
		if got, err := ParsePublish(in); err != nil || got != want {
			t.Errorf("%q: %v %v", in, got, err)
		}
	}
	for _, in := range []string{"", "x", "0", "65536", "1:", ":1", "1:2:3", "-1", "80:http"} {
		if _, err := ParsePublish(in); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", in, err)
		}
	}
}

func TestValidate(t *testing.T) {
	ok := Node{Name: "a", APIPort: 6443, Publish: []Publish{{8001, 8001}}, NodeIP: IsolatedIP}
	if err := ok.Validate(); err != nil {
		t.Error(err)
	}
	for name, bad := range map[string]Node{
		"port":        {APIPort: 0},
		"same twice":  {APIPort: 6443, Publish: []Publish{{1, 1}, {1, 2}}},
		"api as port": {APIPort: 6443, Publish: []Publish{{6443, 1}}},
		"egress":      {APIPort: 6443, Egress: true, HostNetwork: true},
	} {
		if err := bad.Validate(); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSaveLoad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sub", "node.json")
	if _, err := Load(path); !errdefs.IsNotFound(err) {
		t.Errorf("absent: %v", err)
	}
	want := Node{Name: "a", APIPort: 7, Publish: []Publish{{1, 2}}, Egress: true, NodeIP: "10.0.0.1"}
	if err := want.Save(path); err != nil {
		t.Fatal(err)
	}
	got, err := Load(path)
	if err != nil || !cmp.Equal(got, want) {
		t.Errorf("%v %v", got, err)
	}
}

func TestParseServer(t *testing.T) {
	for text, want := range map[string]string{
		"https://192.0.2.1:6443":    "https://192.0.2.1:6443",
		"https://192.0.2.1/":        "https://192.0.2.1:6443",
		"https://[2001:db8::1]:443": "https://[2001:db8::1]:443",
		"192.0.2.1:6443":            "",
		"http://192.0.2.1:6443":     "",
		"https://server:6443":       "",
		"https://192.0.2.1:0":       "",
		"https://192.0.2.1/x":       "",
		"https://a@192.0.2.1":       "",
		"":                          "",
	} {
		got, err := ParseServer(text)
		if got != want || (want == "") != errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %q %v, want %q", text, got, err, want)
		}
	}
}

func TestRolesAreChecked(t *testing.T) {
	agent := Node{Name: "x", APIPort: 1, Role: Agent, Server: "https://192.0.2.1:6443"}
	if err := agent.Validate(); err != nil || !agent.IsAgent() || agent.APIServer() != agent.Server {
		t.Errorf("an agent: %v", err)
	}
	for name, n := range map[string]Node{
		"agent without server": {APIPort: 1, Role: Agent},
		"server with a server": {APIPort: 1, Server: "https://192.0.2.1:6443"},
		"runtime only":         {APIPort: 1, Role: Agent, Server: agent.Server, RuntimeOnly: true},
		"unknown":              {APIPort: 1, Role: "king"},
	} {
		if err := n.Validate(); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestOpenStack(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*Node)
		ok     bool
	}{
		"both":         {func(*Node) {}, true},
		"no cloud":     {func(n *Node) { n.OpenStack.Cloud = "" }, false},
		"no file":      {func(n *Node) { n.OpenStack.CloudConfig = "" }, false},
		"relative":     {func(n *Node) { n.OpenStack.CloudConfig = "clouds.yaml" }, false},
		"below run":    {func(n *Node) { n.OpenStack.CloudConfig = "/run/../run/clouds.yaml" }, false},
		"an agent":     {func(n *Node) { n.Role, n.Server = Agent, "https://192.0.2.1:6443" }, false},
		"runtime only": {func(n *Node) { n.RuntimeOnly = true }, false},
		"networks":     {func(n *Node) { n.OpenStack.Networks, n.OpenStack.Profile = Neutron, "least" }, true},
		"no provider":  {func(n *Node) { n.OpenStack.Networks = "calico" }, false},
		"no profile":   {func(n *Node) { n.OpenStack.Profile = "root" }, false},
		"octavia":      {func(n *Node) { n.OpenStack.Octavia = "ovn" }, true},
		"no name":      {func(n *Node) { n.OpenStack.Octavia = "o vn" }, false},
		"reserved":     {func(n *Node) { n.Reserved = []string{"10.250.0.0/24", "fd00::/64"} }, true},
		"host bits":    {func(n *Node) { n.Reserved = []string{"10.250.0.1/24"} }, false},
		"no range":     {func(n *Node) { n.Reserved = []string{"10.250"} }, false},
		"reserved at an agent": {func(n *Node) {
			n.Role, n.Server, n.OpenStack, n.Reserved = Agent, "https://192.0.2.1:6443", nil, []string{"10.250.0.0/24"}
		}, false},
	} {
		n := Node{Name: "x", APIPort: 6443, NodeIP: IsolatedIP, OpenStack: &OpenStack{CloudConfig: "/etc/openstack/clouds.yaml", Cloud: "service"}}
		c.change(&n)
		if err := n.Validate(); c.ok != (err == nil) || (err != nil && !errdefs.IsInvalidArgument(err)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
