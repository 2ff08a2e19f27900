package kubestack

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	api "github.com/hypernetes/hypernetes/api/kubestack/v1"
	"github.com/hypernetes/hypernetes/network/edge"
	"github.com/hypernetes/hypernetes/network/ipam"
	"github.com/hypernetes/hypernetes/network/netns"
	"github.com/hypernetes/hypernetes/test/controlplane"
)

// A Port into which somebody wrote other addresses is nobody's.
func TestClaimed(t *testing.T) {
	for _, c := range []struct {
		name      string
		addresses []string
		want      bool
	}{
		{"default.10-0-0-5", []string{"10.0.0.5"}, true},
		{"default.10-0-0-5", []string{"10.0.0.5", "fd00::5"}, true},
		{"default.fd00--5", []string{"fd00::5"}, true},
		{"default.10-0-0-5", []string{"10.0.0.6"}, false},
		{"default.10-0-0-5", []string{"10.0.0.6", "10.0.0.5"}, false},
		{"default.10-0-0-5", []string{"10.0.0.5", "10.0.0.6"}, false},
		{"default.10-0-0-5", []string{"10.0.0.5", "fd00::5", "fd00::6"}, false},
		{"other.10-0-0-5", []string{"10.0.0.5"}, false},
	} {
		p := &v1alpha1.Port{ObjectMeta: metav1.ObjectMeta{Name: c.name}, Spec: v1alpha1.PortSpec{Network: "default", Addresses: c.addresses}}
		addrs := make([]netip.Addr, len(c.addresses))
		for i, a := range c.addresses {
			addrs[i] = netip.MustParseAddr(a)
		}
		if got := claimed(p, addrs); got != c.want {
			t.Errorf("%s %v: %v", c.name, c.addresses, got)
		}
	}
}

func TestRequests(t *testing.T) {
	network := types.NamespacedName{Namespace: "tenant-red", Name: "default"}
	for _, c := range []struct{ address, networks, want string }{
		{"", "", "[tenant-red/default eth0 [] ]"},
		{"10.0.0.5, fd00::5", "", "[tenant-red/default eth0 [10.0.0.5 fd00::5] ]"},
		{"port/default.10-0-0-5", "", "[tenant-red/default eth0 [] default.10-0-0-5]"},
		{"", `[{"name":"data"},{"name":"x","interface":"sriov0","addresses":["10.7.0.1"]}]`, "[tenant-red/default eth0 [] ] [tenant-red/data net1 [] ] [tenant-red/x sriov0 [10.7.0.1] ]"},
		{"ten", "", "error: annotation hypernetes.io/address"},
		{"", `{"name":"data"}`, "error: annotation hypernetes.io/networks: want a JSON list"},
		{"", `[{"name":"data","interface":"eth0"}]`, "error: annotation hypernetes.io/networks: [0].interface"},
		{"", `[{"name":"data","interface":"../x"}]`, "error: annotation hypernetes.io/networks: [0].interface"},
		{"", `[{"name":"a","interface":"n"},{"name":"b","interface":"n"}]`, "error: annotation hypernetes.io/networks: [1].interface"},
		{"", `[{"name":"a","addresses":["x"]}]`, "error: annotation hypernetes.io/networks: [0].addresses"},
		{"", `[{},{},{},{},{},{},{},{}]`, "error: annotation hypernetes.io/networks: 8 networks, at most 7"},
	} {
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{v1alpha1.AnnotationAddress: c.address, v1alpha1.AnnotationNetworks: c.networks}}}
		got, err := requests(pod, network, "eth0")
		var text []string
		for _, r := range got {
			text = append(text, fmt.Sprint([]any{r.network, r.iface, r.addresses, r.port}))
		}
		s := strings.Join(text, " ")
		if err != nil {
			s = "error: " + err.Error()
			if !errdefs.IsInvalidArgument(err) {
				t.Errorf("%s%s: class of %v", c.address, c.networks, err)
			}
		}
		if !strings.HasPrefix(s, c.want) {
			t.Errorf("%s%s: %s, want %s", c.address, c.networks, s, c.want)
		}
	}
}

func FuzzRequests(f *testing.F) {
	f.Add("10.0.0.5,fd00::5", `[{"name":"data","interface":"net1","addresses":["10.7.0.1"]}]`)
	f.Add("port/x", `[]`)
	f.Fuzz(func(t *testing.T, address, networks string) {
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{v1alpha1.AnnotationAddress: address, v1alpha1.AnnotationNetworks: networks}}}
		got, err := requests(pod, types.NamespacedName{Namespace: "tenant-red", Name: "default"}, "eth0")
		if err != nil {
			return
		}
		seen := map[string]bool{}
		for _, r := range got {
			if r.network.Namespace != "tenant-red" || seen[r.iface] || validAttachment("x", r.iface) != nil {
				t.Errorf("%+v", got)
			}
			seen[r.iface] = true
		}
	})
}

func testNetwork() *v1alpha1.Network {
	return &v1alpha1.Network{
		ObjectMeta: metav1.ObjectMeta{Namespace: "tenant-red", Name: "default", UID: "net-1"},
		Status: v1alpha1.NetworkStatus{
			Phase: v1alpha1.NetworkActive, VNI: 5000, MTU: 1450,
			Subnets: []v1alpha1.SubnetStatus{{Name: "a", CIDR: "10.0.0.0/24", Gateway: "10.0.0.1"}},
		},
	}
}

func testPort(address, node, uid string) *v1alpha1.Port {
	return &v1alpha1.Port{
		ObjectMeta: metav1.ObjectMeta{Namespace: "tenant-red", Name: v1alpha1.PortName("default", address)},
		Spec: v1alpha1.PortSpec{
			Network: "default", NetworkUID: "net-1", Addresses: []string{address}, Node: node,
			Pod: &v1alpha1.PodRef{Namespace: "web", Name: uid, UID: uid, Interface: "eth0"},
		},
	}
}

// What does not belong is left out, so that one bad object does not stop a Network.
func TestSnapshot(t *testing.T) {
	foreign := testPort("10.0.0.9", "n2", "former")
	foreign.Spec.NetworkUID = "net-0"
	held := testPort("10.0.0.10", "", "held")
	held.Spec.Pod = nil
	multicast := testPort("10.0.0.13", "n2", "multicast")
	multicast.Spec.MAC = "01:00:00:00:00:00"
	s := &snapshot{
		Network: testNetwork(), Self: "n1", Namespaces: map[string]map[string]string{"web": {"team": "a"}},
		Ports: []*v1alpha1.Port{
			testPort("10.0.0.5", "n1", "here"), testPort("10.0.0.6", "n2", "there"), testPort("10.0.0.7", "n1", "claimed only"), testPort("10.0.0.8", "gone", "node gone"),
			foreign, held, testPort("192.168.0.5", "n2", "outside"), testPort("10.0.0.1", "n2", "gateway"), multicast, testPort("ten", "n2", "garbage"),
		},
		Links: map[string]string{"default.10-0-0-5": "p1"},
		Nodes: map[string]node{"n1": {Name: "n1", Address: netip.MustParseAddr("100.64.0.1"), Ready: true}, "n2": {Name: "n2", Address: netip.MustParseAddr("100.64.0.2")}},
		Pods:  map[types.UID]*corev1.Pod{"there": {ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app": "x"}}}},
		// Its object is gone, it runs on: policies select it as before.
		Records:  map[types.UID]*record{"here": {Labels: map[string]string{"app": "recorded"}}},
		DNS:      []netip.Addr{netip.MustParseAddr("10.96.0.10")},
		Floating: []floating{{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("10.0.0.5")}, {netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("10.0.0.6")}},
		Ranges:   []netip.Prefix{netip.MustParsePrefix("10.96.0.0/12")},
		Services: []*corev1.Service{{
			ObjectMeta: metav1.ObjectMeta{Namespace: "web", Name: "lb", UID: "svc-1"},
			Spec:       corev1.ServiceSpec{Type: corev1.ServiceTypeLoadBalancer, ClusterIPs: []string{"10.96.7.7"}, ClusterIP: "10.96.7.7"},
			// Anybody may have written this.
			Status: corev1.ServiceStatus{LoadBalancer: corev1.LoadBalancerStatus{Ingress: []corev1.LoadBalancerIngress{{IP: "192.0.2.66"}}}},
		}},
		VIPs: map[string][]vip{"web/lb": {{netip.MustParseAddr("192.0.2.3"), "svc-1"}, {netip.MustParseAddr("192.0.2.4"), "svc-0"}}},
	}
	spec, err := s.spec()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, p := range spec.Ports {
		got = append(got, fmt.Sprint(p.Addresses, p.Node, " ", p.Link))
	}
	for _, e := range spec.External {
		got = append(got, fmt.Sprint(e.Address, " ", e.Announce, " ", e.Target))
	}
	want := []string{"[10.0.0.5] 100.64.0.1 p1", "[10.0.0.6] 100.64.0.2 ", "192.0.2.1 true 10.0.0.5", "192.0.2.3 true invalid IP"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	got = nil
	for _, p := range s.policies().Pods {
		got = append(got, fmt.Sprint(p.Namespace, "/", p.Name, p.Labels, p.Links))
	}
	want = []string{"web/heremap[app:recorded] [p1]", "web/theremap[app:x] []", "web/claimed onlymap[] []", "web/node gonemap[] []", "kube-system/kube-dnsmap[k8s-app:kube-dns] []"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if k := s.kubernetes(netip.MustParseAddr("169.254.64.0")); k == nil || k.ClusterIPs[0].String() != "10.96.0.1" || k.Ports[0].Internal[0].Address.String() != "169.254.64.0:6443" {
		t.Errorf("kubernetes: %+v", k)
	}
	s.Network.Status = v1alpha1.NetworkStatus{}
	if _, err := s.spec(); !errors.Is(err, errNotAccepted) || !errdefs.IsUnavailable(err) {
		t.Errorf("a Network nobody has accepted: %v", err)
	}
}

func TestParse(t *testing.T) {
	o, err := Parse([]string{"--node", "n", "--node-ip", "100.64.0.1", "--service-cidrs", "10.96.0.0/12,fd00:10:96::/108", "--api-servers", "100.64.0.1:6443"})
	if err != nil {
		t.Fatal(err)
	}
	for v4, want := range map[bool]string{true: "10.96.0.10", false: "fd00:10:96::a"} {
		if a, ok := o.resolver(v4); !ok || a.String() != want {
			t.Errorf("resolver %s, want %s", a, want)
		}
	}
	_, err = Parse([]string{"--node-ip", "x", "--dns-address", "y", "--service-cidrs", "z", "--api-servers", "w"})
	for _, flag := range []string{"--node ", "--node-ip", "--dns-address", "--service-cidrs", "--api-servers"} {
		if err == nil || !strings.Contains(err.Error(), flag) {
			t.Errorf("%s is not told of: %v", flag, err)
		}
	}
}

func TestRecords(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "attachments")
	s, unreadable, err := openRecords(dir)
	if err != nil || unreadable != nil {
		t.Fatal(err, unreadable)
	}
	r := &record{ContainerID: "c1", Interface: "eth0", NICs: []nic{{Network: types.NamespacedName{Namespace: "t", Name: "n"}, Port: "p", Link: "p1", Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.5")}}}}
	if err := s.put(r); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"c2-eth0.json": "{", "c3-eth0.json": `{"containerID":"c4","interface":"eth0"}`, "tmp123": "half"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s, unreadable, err = openRecords(dir)
	if err != nil || unreadable == nil || !strings.Contains(unreadable.Error(), "c2-eth0.json") || !strings.Contains(unreadable.Error(), "c3-eth0.json") {
		t.Errorf("%v, %v", unreadable, err)
	}
	got, ok := s.get("c1-eth0")
	if !ok || !cmp.Equal(got, r, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })) || len(s.list()) != 1 {
		t.Errorf("read %+v", got)
	}
	if l := s.nics(types.NamespacedName{Namespace: "t", Name: "n"}, nil); l["p"].Link != "p1" {
		t.Errorf("links %v", l)
	}
	for range 2 {
		if err := s.drop("c1-eth0"); err != nil {
			t.Error(err)
		}
	}
	for _, bad := range [][2]string{{"../x", "eth0"}, {"", "eth0"}, {"c", "a/b"}, {"c", ""}, {"c", strings.Repeat("x", 16)}, {".c", "eth0"}} {
		if err := validAttachment(bad[0], bad[1]); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

// fakeEdges and fakeEdge remember what was asked of them.
type fakeEdges struct {
	mu    sync.Mutex
	edges map[string]*fakeEdge
}

type fakeEdge struct {
	detached []string
	err      error
}

func (f *fakeEdges) SetHost(context.Context, edge.Host) error            { return nil }
func (f *fakeEdges) Ensure(_ context.Context, s edge.Spec) (Edge, error) { return f.Get(s.ID) }
func (f *fakeEdges) List() ([]string, error)                             { return nil, nil }
func (f *fakeEdges) Remove(context.Context, string) error                { return nil }
func (e *fakeEdge) NS() *netns.NS                                        { return nil }
func (e *fakeEdge) Transit() (a, b netip.Addr)                           { return }
func (e *fakeEdge) Attach(context.Context, edge.Attachment) error        { return e.err }
func (e *fakeEdge) Announce(context.Context, edge.Attachment) error      { return e.err }
func (e *fakeEdge) AnnounceFront(context.Context, string) error          { return nil }
func (e *fakeEdge) Up(context.Context, string) error                     { return e.err }
func (e *fakeEdge) Check(context.Context, edge.Attachment) error         { return e.err }
func (e *fakeEdge) Links() ([]string, error)                             { return nil, nil }
func (e *fakeEdge) Detach(_ context.Context, link string) error {
	e.detached = append(e.detached, link)
	return e.err
}

func (f *fakeEdges) Get(id string) (Edge, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if e, ok := f.edges[id]; ok {
		return e, nil
	}
	return nil, errdefs.ErrNotFound
}

// DEL does what is local though the API server is down, and says so if that fails.
func TestDelWithoutAPIServer(t *testing.T) {
	down := errors.New("connection refused")
	c := fake.NewClientBuilder().WithScheme(controlplane.Scheme()).WithInterceptorFuncs(interceptor.Funcs{
		Get: func(context.Context, client.WithWatch, client.ObjectKey, client.Object, ...client.GetOption) error {
			return down
		},
	}).Build()
	e := &fakeEdge{}
	d, err := New(Options{Node: "n1", RunDir: t.TempDir()}, Parts{API: c, Edges: &fakeEdges{edges: map[string]*fakeEdge{"00000001": e}}})
	if err != nil {
		t.Fatal(err)
	}
	d.queue = workqueue.NewTypedRateLimitingQueue(workqueue.DefaultTypedControllerRateLimiter[types.NamespacedName]())
	defer d.queue.ShutDown()
	if err := d.records.put(&record{ContainerID: "c1", Interface: "eth0", NICs: []nic{{Edge: "00000001", Link: "p1"}, {Edge: "00000002", Link: "p2"}}}); err != nil {
		t.Fatal(err)
	}
	q := &api.AttachRequest{ContainerId: "c1", Interface: "eth0"}
	e.err = errors.New("netlink says no")
	if _, err := d.del(t.Context(), q); err == nil {
		t.Error("a link that stays was kept quiet about")
	}
	e.err = nil
	out, err := d.del(t.Context(), q)
	if err != nil || out.Delegate || len(e.detached) != 2 {
		t.Errorf("%v, %v, detached %v", out, err, e.detached)
	}
	if out, err = d.del(t.Context(), q); err != nil || !out.Delegate {
		t.Errorf("again: %v, %v", out, err)
	}
}

func TestClass(t *testing.T) {
	for _, c := range []struct {
		err    error
		code   codes.Code
		reason string
	}{
		{ipam.ErrExhausted{}, codes.ResourceExhausted, "AddressesExhausted"},
		{fmt.Errorf("claim: %w", ipam.ErrQuota), codes.ResourceExhausted, "QuotaExceeded"},
		{fmt.Errorf("x: %w", errdefs.ErrAlreadyExists), codes.AlreadyExists, "AddressInUse"},
		{fmt.Errorf("x: %w", errdefs.ErrInvalidArgument), codes.InvalidArgument, "InvalidRequest"},
		{fmt.Errorf("x: %w", errdefs.ErrFailedPrecondition), codes.FailedPrecondition, "BindingMissing"},
		{active(&v1alpha1.Network{}), codes.Unavailable, "NetworkNotReady"},
		{apierrors.NewTooManyRequests("slow down", 1), codes.Unavailable, "NetworkFailed"},
		{context.DeadlineExceeded, codes.Unavailable, "NetworkFailed"},
	} {
		if got := status.Code(class(c.err)); got != c.code || reason(c.err) != c.reason {
			t.Errorf("%v: %s, %s", c.err, got, reason(c.err))
		}
	}
}

func TestListenRootOnly(t *testing.T) {
	dir, err := os.MkdirTemp("", "k")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "k.sock")
	for range 2 { // the second finds what the first left
		l, err := listen(t.Context(), path)
		if err != nil {
			t.Fatal(err)
		}
		if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("mode %v, %v", fi.Mode(), err)
		}
		l.(rootOnly).Listener.(*net.UnixListener).SetUnlinkOnClose(false)
		_ = l.Close()
	}
}

func TestNameservers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(path, []byte("# x\nnameserver 192.0.2.1\nsearch a b\nnameserver fd00::1\nnameserver x\nnameserver 1.1.1.1\nnameserver 2.2.2.2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(nameservers(path)); got != "[192.0.2.1:53 [fd00::1]:53 1.1.1.1:53]" {
		t.Error(got)
	}
	if got := nameservers(path + "x"); got != nil {
		t.Error(got)
	}
}
