package component

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/pelletier/go-toml/v2"
	"sigs.k8s.io/yaml"

	"github.com/hypernetes/hypernetes/cluster/layout"
	"github.com/hypernetes/hypernetes/cluster/settings"
	"github.com/hypernetes/hypernetes/runtime/config"
)

var update = flag.Bool("update", false, "write the golden files anew")

func input(t *testing.T) Input {
	t.Helper()
	n, err := layout.NewNode("blue")
	if err != nil {
		t.Fatal(err)
	}
	a := layout.Artifacts{Root: "/opt/h8s"}
	return Input{
		Artifacts: a, Node: n, CgroupV1: true, Proxy: "http://127.0.0.1:3128", Path: SearchPath(a),
		Settings: settings.Node{Name: "blue", APIPort: 6443, NodeIP: settings.IsolatedIP},
	}
}

// TestGolden renders every component to one file each, for review by eye, and those of an
// agent, which differ.
func TestGolden(t *testing.T) {
	agent := input(t)
	agent.Settings.Role, agent.Settings.Server, agent.Settings.NodeIP = settings.Agent, "https://100.64.0.1:6443", "100.64.0.2"
	cloud := input(t)
	cloud.Settings.OpenStack = &settings.OpenStack{CloudConfig: "/etc/openstack/clouds.yaml", Cloud: "service", KeystoneTenants: "tag=hypernetes", Networks: settings.Neutron, External: "public", Profile: "least", Octavia: "ovn"}
	cloud.Settings.Reserved = []string{"10.250.0.0/24"}
	for prefix, in := range map[string]Input{"": input(t), "agent-": agent, "openstack-": cloud} {
		for _, c := range All(in) {
			if prefix == "openstack-" && c.Name != "kube-apiserver" && c.Name != Controller && !strings.HasSuffix(c.Name, "-cinder") {
				continue // the same
			}
			if c.Name == Registry && prefix != "" || c.Name == "containerd" && prefix != "" {
				continue // the same
			}
			t.Run(prefix+c.Name, func(t *testing.T) {
				var b strings.Builder
				fmt.Fprintf(&b, "path %s\nafter %s objects %t join %t\nenv\n  %s\nargs\n  %s\n", c.Path, c.After, c.AfterObjects, c.AfterJoin, strings.Join(c.Env, "\n  "), strings.Join(c.Args, "\n  "))
				for _, path := range slices.Sorted(maps.Keys(c.Files)) {
					fmt.Fprintf(&b, "file %s\n%s\n", path, c.Files[path])
				}
				golden(t, prefix+c.Name, b.String())
			})
		}
	}
	golden(t, "cni", CNIConfig(input(t).Settings))
	golden(t, "cni-runtime-only", CNIConfig(settings.Node{RuntimeOnly: true}))
	golden(t, "hyper", HyperConfig(input(t)))
}

func TestAgentHasNoControlPlane(t *testing.T) {
	in := input(t)
	in.Settings.Role, in.Settings.Server = settings.Agent, "https://192.0.2.1:6443"
	var names []string
	seen := map[string]bool{}
	for _, c := range All(in) {
		for _, dep := range c.After {
			if !seen[dep] {
				t.Errorf("%s starts after %s, which is not before it", c.Name, dep)
			}
		}
		seen[c.Name] = true
		names = append(names, c.Name)
	}
	if want := []string{Registry, "containerd", "kubelet", Kubestack, "kube-proxy", CSINode}; !slices.Equal(names, want) {
		t.Errorf("components %v, want %v", names, want)
	}
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (go test -update writes it anew):\n%s", path, diff)
	}
}

func TestRuntimeOnlyHasNoKubernetes(t *testing.T) {
	in := input(t)
	in.Settings.RuntimeOnly = true
	all := All(in)
	for i, name := range []string{Registry, "containerd"} {
		if len(all) != 2 || all[i].Name != name || len(all[i].After) != 0 {
			t.Errorf("components: %+v", all)
		}
	}
}

func TestCgroupV1(t *testing.T) {
	in := input(t)
	in.CgroupV1 = false
	var config map[string]any
	if err := yaml.Unmarshal([]byte(kubelet(in).Files[in.Node.Config("kubelet.yaml")]), &config); err != nil {
		t.Fatal(err)
	}
	if v, ok := config["failCgroupV1"]; ok {
		t.Errorf("failCgroupV1 is set to %v on a host with version 2", v)
	}
}

// TestDependencies checks that components only wait for earlier ones, and that what
// they are told to read is written by someone.
func TestDependencies(t *testing.T) {
	in := input(t)
	in.Settings.OpenStack = &settings.OpenStack{CloudConfig: "/etc/openstack/clouds.yaml", Cloud: "service"}
	seen := map[string]bool{}
	certificates := map[string]bool{"encryption.yaml": true}
	for _, l := range Leaves(in) {
		if certificates[l.File+".crt"] {
			t.Errorf("two certificates called %s", l.File)
		}
		certificates[l.File+".crt"], certificates[l.File+".key"] = true, true
	}
	for _, name := range Authorities() {
		certificates[name+".crt"], certificates[name+".key"] = true, true
	}
	for _, name := range SigningKeys() {
		certificates[name+".pub"], certificates[name+".key"] = true, true
	}
	for _, c := range All(in) {
		for _, dep := range c.After {
			if !seen[dep] {
				t.Errorf("%s starts after %s, which is not before it", c.Name, dep)
			}
		}
		seen[c.Name] = true
		texts := slices.Concat(c.Args, slices.Collect(maps.Values(c.Files)))
		for _, text := range texts {
			for _, word := range strings.FieldsFunc(text, func(r rune) bool { return strings.ContainsRune(" \n=\"',", r) }) {
				if name, ok := strings.CutPrefix(word, in.Node.StatePath("pki")+"/"); ok && !certificates[name] {
					t.Errorf("%s reads %s, which nobody writes", c.Name, word)
				}
			}
		}
	}
}

// TestRegistryIsAskedWithoutProxy checks what containerd is told about the node's own
// registry, on a node of its own network and on the machine's.
func TestRegistryIsAskedWithoutProxy(t *testing.T) {
	for _, onHost := range []bool{false, true} {
		in := input(t)
		in.Settings.HostNetwork = onHost
		var hosts struct {
			Server string
			Host   map[string]struct{ Capabilities []string }
		}
		c := registry(in)
		if err := toml.Unmarshal([]byte(c.Files[in.Node.StatePath("etc", "certs.d", "_default", "hosts.toml")]), &hosts); err != nil {
			t.Fatal(err)
		}
		url := "http://" + in.Settings.RegistryAddress()
		if host, ok := hosts.Host[url]; !ok || len(hosts.Host) != 1 || hosts.Server != "" || !slices.Equal(host.Capabilities, []string{"pull", "resolve"}) {
			t.Errorf("hosts.toml: %+v, want %s alone", hosts, url)
		}
		if !slices.Contains(c.Args, in.Settings.RegistryAddress()) {
			t.Errorf("%v does not listen on %s", c.Args, in.Settings.RegistryAddress())
		}
		if !strings.Contains(noProxy(in), "127.0.0.0/8") {
			t.Errorf("loopback is asked for through the proxy: %s", noProxy(in))
		}
	}
}

func TestContainerdConfigIsTOML(t *testing.T) {
	var config map[string]any
	if err := toml.Unmarshal([]byte(containerdConfig(input(t))), &config); err != nil {
		t.Fatal(err)
	}
}

// TestHyperConfig lets the shim's own reader judge what we write for it.
func TestHyperConfig(t *testing.T) {
	in := input(t)
	path := filepath.Join(t.TempDir(), "hyper.toml")
	if err := os.WriteFile(path, []byte(HyperConfig(in)), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := config.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if c.Kernel != "/opt/h8s/share/vmlinux" || c.ScratchDir != "/var/lib/h8s-shim" {
		t.Errorf("%+v", c)
	}
}

func TestUIDBase(t *testing.T) {
	for _, name := range []string{"h8s", "blue", "two", "e2e"} {
		base := uidBase(name)
		if base < firstUID || base+uidsPerNode > 1<<31 || (base-firstUID)%uidsPerNode != 0 {
			t.Errorf("%s: %d", name, base)
		}
		if name != standardNode && base == firstUID {
			t.Errorf("%s has the standard node's users", name)
		}
	}
}

func TestEncryption(t *testing.T) {
	var config struct {
		Resources []struct {
			Resources []string
			Providers []map[string]any
		}
	}
	if err := yaml.Unmarshal([]byte(Encryption("a2V5")), &config); err != nil {
		t.Fatal(err)
	}
	if r := config.Resources; len(r) != 1 || r[0].Resources[0] != "secrets" || r[0].Providers[0]["secretbox"] == nil || r[0].Providers[1]["identity"] == nil {
		t.Errorf("%+v", config)
	}
}
