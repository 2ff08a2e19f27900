package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	api "github.com/hypernetes/hypernetes/api/kubestack/v1"
	"github.com/hypernetes/hypernetes/network/netns"
	"github.com/hypernetes/hypernetes/test/artifacts"
)

// The test binary is the plugin, and the delegates too, when it is called by their names.
func TestMain(m *testing.M) {
	switch filepath.Base(os.Args[0]) {
	case "hypernetes":
		Main("test")
	case "first", "second":
		fakeDelegate()
	default:
		// The Pod's namespace is the test's own but where there is a real one.
		_ = os.Setenv("CNI_NETNS_OVERRIDE", "true")
		os.Exit(m.Run())
	}
}

// fakeDelegate writes what it was asked to a file and answers with a result.
func fakeDelegate() {
	var conf map[string]any
	_ = json.NewDecoder(os.Stdin).Decode(&conf)
	name, verb := filepath.Base(os.Args[0]), os.Getenv("CNI_COMMAND")
	f, _ := os.OpenFile(filepath.Join(filepath.Dir(os.Args[0]), "log"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	line, _ := json.Marshal(conf)
	fmt.Fprintf(f, "%s %s %s\n", verb, name, line)
	_ = f.Close()
	switch verb {
	case "VERSION":
		fmt.Print(`{"cniVersion":"1.1.0","supportedVersions":["0.4.0","1.0.0","1.1.0"]}`)
	case "ADD":
		fmt.Printf(`{"cniVersion":%q,"interfaces":[{"name":%q}],"ips":[{"address":"10.244.0.5/24","version":"4"}]}`, conf["cniVersion"], name)
	}
}

// daemon is a kubestack that answers as told.
type daemon struct {
	api.UnimplementedKubestackServer
	answer  *api.AddResponse
	err     error
	tenant  bool
	request *api.AttachRequest
	gc      *api.GCRequest
}

func (d *daemon) Add(_ context.Context, q *api.AttachRequest) (*api.AddResponse, error) {
	d.request = q
	return d.answer, d.err
}

func (d *daemon) Del(_ context.Context, q *api.AttachRequest) (*api.DelResponse, error) {
	return &api.DelResponse{Delegate: !d.tenant}, d.err
}

func (d *daemon) Check(_ context.Context, q *api.AttachRequest) (*api.CheckResponse, error) {
	return &api.CheckResponse{Delegate: !d.tenant}, d.err
}

func (d *daemon) Status(context.Context, *api.StatusRequest) (*api.StatusResponse, error) {
	return &api.StatusResponse{}, d.err
}

func (d *daemon) GC(_ context.Context, q *api.GCRequest) (*api.GCResponse, error) {
	d.gc = q
	return &api.GCResponse{}, d.err
}

// rig is a plugin directory, a daemon and a configuration.
type rig struct {
	*daemon
	dir, socket string
	cni         *libcni.CNIConfig
	list        *libcni.NetworkConfigList
	runtime     *libcni.RuntimeConf
	server      *grpc.Server
}

func newRig(t *testing.T, version, delegates string, path ...string) *rig {
	t.Helper()
	dir, err := os.MkdirTemp("", "cni") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"hypernetes", "first", "second"} {
		if err := os.Symlink(self, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	r := &rig{daemon: &daemon{}, dir: dir, socket: filepath.Join(dir, "k.sock")}
	l, err := net.Listen("unix", r.socket)
	if err != nil {
		t.Fatal(err)
	}
	r.server = grpc.NewServer()
	api.RegisterKubestackServer(r.server, r.daemon)
	go func() { _ = r.server.Serve(l) }()
	t.Cleanup(r.server.Stop)
	text := fmt.Sprintf(`{"cniVersion":%q,"name":"h8s","plugins":[{"type":"hypernetes","socket":%q,"capabilities":{"portMappings":true},"delegates":%s}]}`, version, r.socket, delegates)
	if r.list, err = libcni.ConfListFromBytes([]byte(text)); err != nil {
		t.Fatal(err)
	}
	r.cni = libcni.NewCNIConfigWithCacheDir(append([]string{dir}, path...), filepath.Join(dir, "cache"), nil)
	r.runtime = &libcni.RuntimeConf{
		ContainerID: "c1", NetNS: "/proc/self/ns/net", IfName: "eth0",
		Args:           [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", "web"}, {"K8S_POD_NAME", "a"}, {"K8S_POD_UID", "u1"}},
		CapabilityArgs: map[string]any{"portMappings": []map[string]any{{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}}},
	}
	return r
}

// asked are the verbs and names of the delegates that were called, and the last's input.
func (r *rig) asked(t *testing.T) (calls []string, last map[string]any) {
	t.Helper()
	text, _ := os.ReadFile(filepath.Join(r.dir, "log"))
	_ = os.Remove(filepath.Join(r.dir, "log"))
	for _, line := range strings.Split(strings.TrimSpace(string(text)), "\n") {
		parts := strings.SplitN(line, " ", 3)
		if len(parts) == 3 && parts[0] != "VERSION" {
			calls = append(calls, parts[0]+" "+parts[1])
			last = nil
			_ = json.Unmarshal([]byte(parts[2]), &last)
		}
	}
	return calls, last
}

const twoDelegates = `[{"type":"first","ipam":{"type":"host-local"}},{"type":"second","capabilities":{"portMappings":true}}]`

func TestTenantPod(t *testing.T) {
	for _, version := range []string{"0.4.0", "1.0.0", "1.1.0"} {
		t.Run(version, func(t *testing.T) {
			r := newRig(t, version, twoDelegates)
			r.tenant = true
			r.answer = &api.AddResponse{
				Interfaces: []*api.Interface{
					{Name: "eth0", Mac: "0a:00:00:00:00:01", Mtu: 1450, Addresses: []string{"10.0.0.5/32", "fd00::5/128"}, Gateways: []string{"10.0.0.1", "fd00::1"}},
					{Name: "net1", Mac: "0a:00:00:00:00:02", Mtu: 1450, Addresses: []string{"10.1.0.5/32"}, Gateways: []string{"10.1.0.1"}},
				},
				DnsServers: []string{"10.96.0.10"}, DnsSearch: []string{"web.svc.cluster.local"}, DnsOptions: []string{"ndots:5"},
			}
			result, err := r.cni.AddNetworkList(t.Context(), r.list, r.runtime)
			if err != nil {
				t.Fatal(err)
			}
			if r.request.PodNamespace != "web" || r.request.PodName != "a" || r.request.PodUid != "u1" || r.request.Interface != "eth0" {
				t.Errorf("asked %v", r.request)
			}
			got, err := current.NewResultFromResult(result)
			if err != nil {
				t.Fatal(err)
			}
			if len(got.Interfaces) != 2 || len(got.IPs) != 3 || len(got.Routes) != 2 || got.IPs[0].Address.String() != "10.0.0.5/32" ||
				got.DNS.Nameservers[0] != "10.96.0.10" || got.Interfaces[0].Sandbox == "" {
				t.Errorf("result %v", got)
			}
			if err := r.cni.CheckNetworkList(t.Context(), r.list, r.runtime); err != nil {
				t.Error(err)
			}
			if err := r.cni.DelNetworkList(t.Context(), r.list, r.runtime); err != nil {
				t.Error(err)
			}
			if calls, _ := r.asked(t); len(calls) != 0 {
				t.Errorf("delegates were called: %v", calls)
			}
		})
	}
}

func TestDefaultPod(t *testing.T) {
	r := newRig(t, "1.1.0", twoDelegates)
	r.answer = &api.AddResponse{Delegate: &api.Delegate{PodCidrs: []string{"10.244.0.0/24", "fd00:10:244::/64"}}}
	if _, err := r.cni.AddNetworkList(t.Context(), r.list, r.runtime); err != nil {
		t.Fatal(err)
	}
	text, _ := os.ReadFile(filepath.Join(r.dir, "log"))
	if !strings.Contains(string(text), `"ranges":[[{"subnet":"10.244.0.0/24"}],[{"subnet":"fd00:10:244::/64"}]]`) {
		t.Errorf("first delegate's ranges: %s", text)
	}
	calls, last := r.asked(t)
	if !slices.Equal(calls, []string{"ADD first", "ADD second"}) {
		t.Errorf("calls %v", calls)
	}
	if last["prevResult"] == nil || last["runtimeConfig"] == nil || last["name"] != "h8s" {
		t.Errorf("second delegate was given %v", last)
	}
	if err := r.cni.CheckNetworkList(t.Context(), r.list, r.runtime); err != nil {
		t.Error(err)
	}
	if calls, last := r.asked(t); !slices.Equal(calls, []string{"CHECK first", "CHECK second"}) || last["prevResult"] == nil {
		t.Errorf("calls %v, %v", calls, last)
	}
	if err := r.cni.GCNetworkList(t.Context(), r.list, &libcni.GCArgs{ValidAttachments: []types.GCAttachment{{ContainerID: "c1", IfName: "eth0"}}}); err != nil {
		t.Error(err)
	}
	if calls, last := r.asked(t); !slices.Equal(calls, []string{"GC first", "GC second"}) || last["cni.dev/valid-attachments"] == nil || len(r.gc.GetValid()) != 1 {
		t.Errorf("calls %v, %v, %v", calls, last, r.gc)
	}
	if err := r.cni.DelNetworkList(t.Context(), r.list, r.runtime); err != nil {
		t.Error(err)
	}
	if calls, _ := r.asked(t); !slices.Equal(calls, []string{"DEL second", "DEL first"}) {
		t.Errorf("calls %v", calls)
	}
}

func TestErrors(t *testing.T) {
	r := newRig(t, "1.1.0", twoDelegates)
	code := func(err error) uint {
		var e *types.Error
		if !errors.As(err, &e) {
			t.Errorf("%v is not a CNI error", err)
			return 0
		}
		return e.Code
	}
	r.err = status.Error(codes.ResourceExhausted, "no address is left in 10.0.0.0/29")
	_, err := r.cni.AddNetworkList(t.Context(), r.list, r.runtime)
	if code(err) != types.ErrTryAgainLater || !strings.Contains(err.Error(), "no address is left in 10.0.0.0/29") {
		t.Error(err)
	}
	r.err = status.Error(codes.Unavailable, "not known yet")
	if err := r.cni.GetStatusNetworkList(t.Context(), r.list); code(err) != codeNotReady {
		t.Error(err)
	}
	// Without a daemon: what it never made is the delegates' alone, what it made waits.
	r.server.Stop()
	if err := r.cni.GetStatusNetworkList(t.Context(), r.list); code(err) != codeNotReady {
		t.Error(err)
	}
	if err := r.cni.DelNetworkList(t.Context(), r.list, r.runtime); err != nil {
		t.Error(err)
	}
	if calls, _ := r.asked(t); !slices.Equal(calls, []string{"DEL second", "DEL first"}) {
		t.Errorf("calls %v", calls)
	}
	if err := os.MkdirAll(filepath.Join(r.dir, "attachments"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(r.dir, "attachments", "c1-eth0.json"), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := r.cni.DelNetworkList(t.Context(), r.list, r.runtime); code(err) != types.ErrTryAgainLater {
		t.Error(err)
	}
}

// The real plugins of the default network, as the node configures them.
func TestRealDelegates(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	plugins := filepath.Join(artifacts.Dir(), "cni")
	for _, p := range []string{"ptp", "portmap", "host-local"} {
		if _, err := os.Stat(filepath.Join(plugins, p)); err != nil {
			t.Skipf("plugins are not built (make build): %v", err)
		}
	}
	data := t.TempDir()
	r := newRig(t, "1.1.0", fmt.Sprintf(`[{"type":"ptp","mtu":1500,"ipMasq":false,"ipMasqBackend":"nftables","ipam":{"type":"host-local","dataDir":%q,"routes":[{"dst":"0.0.0.0/0"}]}},
		{"type":"portmap","backend":"nftables","capabilities":{"portMappings":true},"snat":true}]`, data), plugins)
	r.answer = &api.AddResponse{Delegate: &api.Delegate{PodCidrs: []string{"10.244.7.0/24"}}}
	var spaces []*netns.NS
	for _, name := range []string{"node", "pod"} {
		path := filepath.Join(r.dir, name)
		ns, err := netns.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = ns.Close(); _ = netns.Remove(path) })
		spaces = append(spaces, ns)
	}
	r.runtime.NetNS = filepath.Join(r.dir, "pod")
	// Processes started on a thread are in its namespace.
	inNode := func(what string, f func() error) {
		t.Helper()
		if err := spaces[0].Do(f); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	inNode("lo", func() error { return exec.Command("ip", "link", "set", "lo", "up").Run() })
	inNode("ADD", func() error {
		result, err := r.cni.AddNetworkList(t.Context(), r.list, r.runtime)
		if err != nil {
			return err
		}
		got, err := current.NewResultFromResult(result)
		if err == nil && (len(got.IPs) != 1 || !strings.HasPrefix(got.IPs[0].Address.String(), "10.244.7.")) {
			return fmt.Errorf("result %v", got)
		}
		return err
	})
	inNode("CHECK", func() error { return r.cni.CheckNetworkList(t.Context(), r.list, r.runtime) })
	inNode("DEL", func() error { return r.cni.DelNetworkList(t.Context(), r.list, r.runtime) })
	inNode("DEL again", func() error { return r.cni.DelNetworkList(t.Context(), r.list, r.runtime) })
	if left, _ := filepath.Glob(filepath.Join(data, "h8s", "10.*")); len(left) != 0 {
		t.Errorf("addresses are kept: %v", left)
	}
}
