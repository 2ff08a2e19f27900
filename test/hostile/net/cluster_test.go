package net

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/go-logr/logr"
	"github.com/miekg/dns"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/rest"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	api "github.com/hypernetes/hypernetes/api/kubestack/v1"
	"github.com/hypernetes/hypernetes/cluster/manifest"
	"github.com/hypernetes/hypernetes/network/claim"
	nodedns "github.com/hypernetes/hypernetes/network/dns"
	"github.com/hypernetes/hypernetes/network/edge"
	"github.com/hypernetes/hypernetes/network/edge/edgetest"
	"github.com/hypernetes/hypernetes/network/kubestack"
	"github.com/hypernetes/hypernetes/network/netns"
	"github.com/hypernetes/hypernetes/network/policy"
	"github.com/hypernetes/hypernetes/network/probe"
	"github.com/hypernetes/hypernetes/network/service"
	"github.com/hypernetes/hypernetes/test/controlplane"
)

// cluster is a node with its kubestack, on a real API server, and two tenants, red and
// blue, with a namespace each. Pods are namespaces. The controller's part is the test's.
type cluster struct {
	t        *testing.T
	rig      *edgetest.Rig
	api      client.Client
	cni      api.KubestackClient
	dir      string
	red      *v1alpha1.Network
	blue     *v1alpha1.Network
	disarmed bool
	defects  defects
	node     string
}

// defects make a build without a defence out of one with it.
type defects struct {
	sync.Mutex
	services func([]service.Service) []service.Service
	view     func(nodedns.View) nodedns.View
	spec     func(*edge.Spec)
	// late applies policies to a link only once it is up.
	late bool
}

type edges struct {
	*edge.Manager
	d *defects
}

func (e edges) Ensure(ctx context.Context, s edge.Spec) (kubestack.Edge, error) {
	e.d.Lock()
	change := e.d.spec
	e.d.Unlock()
	if change != nil {
		change(&s)
	}
	return some(e.Manager.Ensure(ctx, s))
}

func (e edges) Get(id string) (kubestack.Edge, error) { return some(e.Manager.Get(id)) }

func some(e *edge.Edge, err error) (kubestack.Edge, error) {
	if err != nil {
		return nil, err
	}
	return e, nil
}

type plane struct{ d *defects }

func (p plane) Services(ns *netns.NS, o service.Options) (kubestack.Services, error) {
	t, err := service.Open(ns, o)
	return services{t, p.d}, err
}

func (p plane) Policies(ns *netns.NS) (kubestack.Policies, error) {
	t, err := policy.Open(ns)
	return policies{t, ns, p.d}, err
}

func (p plane) Resolver(ctx context.Context, c nodedns.Config) (kubestack.Resolver, error) {
	s, err := nodedns.Serve(ctx, c)
	return resolver{s, p.d}, err
}

type services struct {
	*service.Table
	d *defects
}

func (s services) Sync(ctx context.Context, all []service.Service) (service.Stats, error) {
	s.d.Lock()
	change := s.d.services
	s.d.Unlock()
	if change != nil {
		all = change(all)
	}
	return s.Table.Sync(ctx, all)
}

type policies struct {
	*policy.Table
	ns *netns.NS
	d  *defects
}

func (p policies) Sync(ctx context.Context, s policy.State) error {
	p.d.Lock()
	late := p.d.late
	p.d.Unlock()
	if late {
		var up []policy.Pod
		err := p.ns.Do(func() error {
			for _, pod := range s.Pods {
				known := true
				for _, l := range pod.Links {
					link, err := net.InterfaceByName(l)
					known = known && err == nil && link.Flags&net.FlagUp != 0
				}
				if known {
					up = append(up, pod)
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		s.Pods = up
	}
	return p.Table.Sync(ctx, s)
}

type resolver struct {
	*nodedns.Server
	d *defects
}

func (r resolver) Update(v nodedns.View) {
	r.d.Lock()
	change := r.d.view
	r.d.Unlock()
	if change != nil {
		v = change(v)
	}
	r.Server.Update(v)
}

type noRoutes struct{}

func (noRoutes) Sync(context.Context, []kubestack.Route) error { return nil }

// rights are what a cluster gives kubestack, no more.
func rights(t *testing.T, c client.Client) {
	t.Helper()
	objects, err := manifest.Render(manifest.Values{NodeIP: "100.64.0.1", Server: "https://100.64.0.1:6443", DNSServiceIP: "10.96.0.10", ClusterDomain: "cluster.local", Overhead: manifest.DefaultOverhead})
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range objects {
		if o.Name() != "h8s:kubestack" {
			continue
		}
		text, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		u := &unstructured.Unstructured{}
		if err := u.UnmarshalJSON(text); err != nil {
			t.Fatal(err)
		}
		if err := c.Create(t.Context(), u); err != nil {
			t.Fatal(err)
		}
	}
}

// worlds numbers them: on one API server no name is used twice.
var worlds int32

func newCluster(t *testing.T, cfg *rest.Config, c client.Client) *cluster {
	t.Helper()
	i := atomic.AddInt32(&worlds, 1)
	w := &cluster{t: t, rig: edgetest.New(t, 1), api: c}
	n := w.rig.Nodes[0]
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("node-", i)}}
	w.node = node.Name
	w.create(node)
	node.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: n.Address.String()}}
	node.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
	w.status(node)
	var err error
	if w.dir, err = os.MkdirTemp("", "kubestack-"); err != nil { // sockets' paths are short
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(w.dir) })
	if err := os.Chmod(w.dir, 0o755); err != nil { // as /run/kubestack is
		t.Fatal(err)
	}
	opts, err := kubestack.Parse([]string{
		"--node", node.Name, "--node-ip", n.Address.String(), "--run-dir", w.dir, "--health-address", "", "--service-cidrs", "10.96.0.0/12,fd00:10:96::/108",
		"--vxlan-port", fmt.Sprint(edgetest.Port), "--api-servers", n.Address.String() + ":6443", "--resolv-conf", os.DevNull,
	})
	if err != nil {
		t.Fatal(err)
	}
	own, err := client.NewWithWatch(controlplane.As(cfg, "h8s:kubestack:"+node.Name, "h8s:kubestacks", "system:authenticated"), client.Options{Scheme: controlplane.Scheme()})
	if err != nil {
		t.Fatal(err)
	}
	d, err := kubestack.New(opts, kubestack.Parts{API: own, Edges: edges{w.rig.NewManager(n), &w.defects}, Plane: plane{&w.defects}, Routes: noRoutes{}, Prober: probe.Run})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	conn, err := grpc.NewClient("unix:"+filepath.Join(w.dir, "kubestack.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	w.cni = api.NewKubestackClient(conn)
	t.Cleanup(func() {
		// The next world's node has the same address.
		if err := w.api.Delete(context.Background(), node); err != nil {
			t.Error(err)
		}
		_ = conn.Close()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	w.eventually("kubestack is ready", func() error {
		_, err := w.cni.Status(t.Context(), &api.StatusRequest{})
		return err
	})
	w.red, w.blue = w.tenant(fmt.Sprint("red", i), 6000+2*i), w.tenant(fmt.Sprint("blue", i), 6001+2*i)
	return w
}

func (w *cluster) eventually(what string, f func() error) {
	w.t.Helper()
	deadline := time.Now().Add(time.Minute)
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			w.t.Fatalf("%s: %v", what, err)
		}
		<-tick.C
	}
}

func (w *cluster) create(o client.Object) {
	w.t.Helper()
	if err := w.api.Create(w.t.Context(), o); err != nil {
		w.t.Fatal(err)
	}
}

func (w *cluster) status(o client.Object) {
	w.t.Helper()
	if err := w.api.Status().Update(w.t.Context(), o); err != nil {
		w.t.Fatal(err)
	}
}

// tenant makes a tenant's home, Network and namespace <tenant>-web.
func (w *cluster) tenant(name string, vni int32) *v1alpha1.Network {
	w.t.Helper()
	w.create(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: v1alpha1.Home(name)}})
	n := &v1alpha1.Network{ObjectMeta: metav1.ObjectMeta{Namespace: v1alpha1.Home(name), Name: "default"}, Spec: v1alpha1.NetworkSpec{Subnets: map[string]v1alpha1.Subnet{"s": {CIDR: "10.0.0.0/16"}}}}
	w.create(n)
	n.Status = v1alpha1.NetworkStatus{Phase: v1alpha1.NetworkActive, Tenant: name, Provider: "builtin", VNI: vni, MTU: edgetest.MTU, Subnets: []v1alpha1.SubnetStatus{{Name: "s", CIDR: "10.0.0.0/16", Gateway: "10.0.0.1"}}}
	w.status(n)
	w.bind(n, name+"-web")
	return n
}

// web is the namespace of a tenant.
func web(n *v1alpha1.Network) string { return n.Status.Tenant + "-web" }

func (w *cluster) bind(n *v1alpha1.Network, name string) {
	w.t.Helper()
	w.create(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{v1alpha1.LabelTenant: n.Status.Tenant, v1alpha1.LabelNetwork: n.Name}}})
	b := &v1alpha1.TenantNamespace{ObjectMeta: metav1.ObjectMeta{Namespace: n.Namespace, Name: name}, Spec: v1alpha1.TenantNamespaceSpec{Network: n.Name}}
	w.create(b)
	b.Status.Phase, b.Status.NetworkUID = v1alpha1.NamespaceBound, string(n.UID)
	w.status(b)
}

type guest struct {
	*corev1.Pod
	ns      *netns.NS
	request *api.AttachRequest
	ip, mac string
}

func (w *cluster) newPod(namespace, name, address string) *guest {
	w.t.Helper()
	p := &guest{ns: w.rig.Namespace(namespace + "-" + name)}
	p.Pod = &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: map[string]string{"app": name}, Annotations: map[string]string{}},
		Spec:       corev1.PodSpec{NodeName: w.node, Containers: []corev1.Container{{Name: "c", Image: "none"}}},
	}
	if address != "" {
		p.Annotations[v1alpha1.AnnotationAddress] = address
	}
	w.create(p.Pod)
	p.request = &api.AttachRequest{
		ContainerId: string(p.UID), Netns: p.ns.Path(), Interface: "eth0", PodNamespace: namespace, PodName: name, PodUid: string(p.UID),
	}
	return p
}

func (w *cluster) add(p *guest) error {
	out, err := w.cni.Add(context.Background(), p.request)
	if err != nil {
		return err
	}
	if len(out.Interfaces) == 0 {
		return errors.New("the binding has not come round")
	}
	prefix, err := netip.ParsePrefix(out.Interfaces[0].Addresses[0])
	p.ip, p.mac = prefix.Addr().String(), out.Interfaces[0].Mac
	return err
}

// pod makes a Pod that answers on port 80 with its namespace and name.
func (w *cluster) pod(namespace, name, address string) *guest {
	w.t.Helper()
	p := w.newPod(namespace, name, address)
	w.eventually("add "+namespace+"/"+name, func() error { return w.add(p) })
	edgetest.Echo(w.t, p.ns, namespace+"/"+name, p.ip+":80")
	return p
}

// service is one of type LoadBalancer with an endpoint.
func (w *cluster) service(name string, p *guest, external ...string) *corev1.Service {
	w.t.Helper()
	svc := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: p.Namespace, Name: name, Labels: map[string]string{v1alpha1.LabelServiceProxy: v1alpha1.ServiceProxy}},
		Spec:       corev1.ServiceSpec{Type: corev1.ServiceTypeLoadBalancer, AllocateLoadBalancerNodePorts: new(false), ExternalIPs: external, Ports: []corev1.ServicePort{{Name: "p", Port: 80}}},
	}
	w.create(svc)
	w.create(&discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: p.Namespace, Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: name}},
		AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Name: new("p"), Port: new(int32(80)), Protocol: new(corev1.ProtocolTCP)}},
		Endpoints: []discoveryv1.Endpoint{{Addresses: []string{p.ip}, NodeName: &w.node, Conditions: discoveryv1.EndpointConditions{Ready: new(true)}}},
	})
	return svc
}

// served waits until a Service answers inside its Network.
func (w *cluster) served(svc *corev1.Service, p *guest) {
	w.t.Helper()
	w.eventually(svc.Name+" answers", func() error {
		_, err := edgetest.Ask(p.ns, "tcp", svc.Spec.ClusterIP+":80")
		return err
	})
}

// replies tells whether somebody who is not meant answers.
func (w *cluster) replies(ns *netns.NS, address, prefix string) (bool, string) {
	open, text := answers(ns, patience(w.disarmed), address)
	return open && strings.Contains(text, `"`+prefix), text
}

type clusterAttack struct {
	name   string
	try    func(w *cluster) (succeeded bool, evidence string)
	disarm func(w *cluster)
}

func TestCluster(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it makes network namespaces")
	}
	ctrl.SetLogger(logr.Discard())
	cfg := controlplane.Start(t)
	c, err := client.New(cfg, client.Options{Scheme: controlplane.Scheme()})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: v1alpha1.SystemNamespace}}); err != nil {
		t.Fatal(err)
	}
	rights(t, c)
	for _, a := range clusterAttacks {
		t.Run(a.name, func(t *testing.T) {
			t.Run("armed", func(t *testing.T) {
				if ok, evidence := a.try(newCluster(t, cfg, c)); ok {
					t.Errorf("the attack succeeds: %s", evidence)
				}
			})
			t.Run("disarmed", func(t *testing.T) {
				w := newCluster(t, cfg, c)
				w.disarmed = true
				a.disarm(w)
				if ok, evidence := a.try(w); !ok {
					t.Errorf("without the defence the attack fails, too, so this proves nothing: %s", evidence)
				}
			})
		})
	}
}

// early is how many Pods race for a packet before their policy.
const early = 40

var clusterAttacks = []clusterAttack{
	{
		name: "4 externalIPs",
		try: func(w *cluster) (bool, string) {
			edgetest.Echo(w.t, w.rig.Outside, "outside", "100.64.0.200:80")
			p, q := w.pod(web(w.red), "p", ""), w.pod(web(w.blue), "q", "")
			svc := w.service("evil", p, "100.64.0.200", "100.64.0.1")
			w.served(svc, p)
			for _, from := range []*netns.NS{p.ns, q.ns, w.rig.Nodes[0].NS} {
				if ok, text := w.replies(from, "100.64.0.200:80", web(w.red)); ok {
					return true, text
				}
			}
			return w.replies(p.ns, "100.64.0.1:80", web(w.red))
		},
		disarm: func(w *cluster) {
			w.defects.services = func(all []service.Service) []service.Service {
				for i := range all {
					if strings.HasSuffix(all[i].Key, "/evil") {
						all[i].External = append(all[i].External, netip.MustParseAddr("100.64.0.200"))
					}
				}
				return all
			}
		},
	},
	{
		name: "4 forged status.loadBalancer",
		try: func(w *cluster) (bool, string) {
			p := w.pod(web(w.red), "p", "")
			svc := w.service("evil", p)
			svc.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "100.64.0.150", IPMode: new(corev1.LoadBalancerIPModeVIP)}}
			w.status(svc)
			w.served(svc, p)
			if w.disarmed {
				// The claim, which nobody but the controller can make, is all that is believed.
				a := netip.MustParseAddr("100.64.0.150")
				if err := w.claims().ClaimAddress(w.t.Context(), a, claim.Request{Owner: claim.OwnerOf(claim.KindService, svc)}); err != nil {
					w.t.Fatal(err)
				}
				defer w.release(a)
			}
			return w.replies(w.rig.Outside, "100.64.0.150:80", web(w.red))
		},
		disarm: func(*cluster) {},
	},
	{name: "5 another tenant's names", try: sweep, disarm: func(w *cluster) {
		w.defects.view = func(v nodedns.View) nodedns.View {
			all := &corev1.ServiceList{}
			if err := w.api.List(context.Background(), all, client.InNamespace(web(w.blue))); err != nil {
				w.t.Error(err)
			}
			v.Namespaces = append(v.Namespaces, web(w.blue))
			for i := range all.Items {
				v.Services = append(v.Services, &all.Items[i])
			}
			return v
		}
	}},
	{name: "8 a packet before the policy", try: race, disarm: func(w *cluster) { w.defects.late = true }},
	{
		name: "11 kubestack's socket from a user",
		try: func(w *cluster) (bool, string) {
			c, err := asNobody(filepath.Join(w.dir, "kubestack.sock"))
			if err != nil {
				return false, err.Error()
			}
			return true, fmt.Sprint("connected; close: ", c.Close())
		},
		disarm: func(w *cluster) { w.chmod() },
	},
	{
		name: "11 kubestack's socket, opened to all, answers a user",
		try: func(w *cluster) (bool, string) {
			w.chmod()
			dial := func(ctx context.Context, _ string) (net.Conn, error) {
				if w.disarmed { // root dials for the user, so that the socket's other end is root's
					return net.Dial("unix", filepath.Join(w.dir, "kubestack.sock"))
				}
				return asNobody(filepath.Join(w.dir, "kubestack.sock"))
			}
			conn, err := grpc.NewClient("passthrough:k", grpc.WithContextDialer(dial), grpc.WithTransportCredentials(insecure.NewCredentials()))
			if err != nil {
				w.t.Fatal(err)
			}
			defer conn.Close()
			ctx, cancel := context.WithTimeout(w.t.Context(), edgetest.Patience)
			defer cancel()
			_, err = api.NewKubestackClient(conn).Status(ctx, &api.StatusRequest{})
			return err == nil, fmt.Sprint(err)
		},
		disarm: func(*cluster) {},
	},
	{
		name: "15 an address released a moment ago",
		try: func(w *cluster) (bool, string) {
			a, s := netip.MustParseAddr("100.64.0.160"), w.claims()
			old := claim.Request{Tenant: "red", Owner: claim.Owner{Kind: claim.KindFloatingIP, Namespace: "tenant-red", Name: "f", UID: "1"}}
			if err := s.ClaimAddress(w.t.Context(), a, old); err != nil {
				w.t.Fatal(err)
			}
			keep := time.Minute
			if w.disarmed {
				keep = 0
			}
			all, err := s.Owned(w.t.Context(), claim.Address, old.Owner)
			if err != nil || len(all) != 1 {
				w.t.Fatal(all, err)
			}
			if err := s.Release(w.t.Context(), all[0], keep); err != nil {
				w.t.Fatal(err)
			}
			err = s.ClaimAddress(w.t.Context(), a, claim.Request{Tenant: "blue", Explicit: true, Owner: claim.Owner{Kind: claim.KindFloatingIP, Namespace: "tenant-blue", Name: "f", UID: "2"}})
			if err != nil && !errdefs.IsUnavailable(err) {
				w.t.Error(err)
			}
			w.release(a)
			return err == nil, fmt.Sprint(err)
		},
		disarm: func(*cluster) {},
	},
	{
		name: "16 a Port edited to a neighbour's address",
		try: func(w *cluster) (bool, string) {
			a, b, c := w.pod(web(w.red), "a", "10.0.0.5"), w.pod(web(w.red), "b", "10.0.0.6"), w.pod(web(w.red), "c", "10.0.0.7")
			port := &v1alpha1.Port{}
			if err := w.api.Get(w.t.Context(), client.ObjectKey{Namespace: w.red.Namespace, Name: v1alpha1.PortName("default", "10.0.0.5")}, port); err != nil {
				w.t.Fatal(err)
			}
			port.Spec.Addresses = []string{"10.0.0.6"}
			if w.disarmed {
				w.defects.Lock()
				w.defects.spec = func(s *edge.Spec) {
					for i := range s.Ports {
						if s.Ports[i].MAC.String() == a.mac {
							s.Ports[i].Addresses = append(s.Ports[i].Addresses, netip.MustParseAddr("10.0.0.6"))
						}
					}
				}
				w.defects.Unlock()
				port.Spec.Addresses = []string{"10.0.0.5"}
				port.Labels["t"] = "changed"
			}
			if err := w.api.Update(w.t.Context(), port); apierrors.IsInvalid(err) {
				// The API server is the first to refuse; that kubestack would not believe such
				// a Port is TestClaimed's to show.
				if !strings.Contains(err.Error(), "network and addresses are immutable") {
					w.t.Errorf("refused for another reason: %v", err)
				}
				return false, err.Error()
			} else if err != nil {
				w.t.Fatal(err)
			}
			// A later Pod's sync has seen it.
			w.pod(web(w.red), "d", "10.0.0.8")
			stop := edgetest.Capture(w.t, c.ns, "eth0")
			for range 5 { // a sync that was due already may set the links right in between
				run(w.t, w.edge(a), "sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf."+edge.LinkName(a.request.ContainerId, "eth0")+".rp_filter=0")
				edgetest.Inject(w.t, a.ns, eth(gateway, mac(a.mac), 0x0800, udp(at("10.0.0.6"), at("10.0.0.7"), mark)))
			}
			edgetest.Expect(w.t, b.ns, "tcp", "10.0.0.7:80", web(w.red)+"/c 10.0.0.6")
			for _, f := range stop() {
				if bytes.Contains(f, mark) {
					return true, fmt.Sprintf("captured %x", f)
				}
			}
			return false, "nothing captured"
		},
		disarm: func(*cluster) {},
	},
	{
		name: "16 a rule deleted from the edge",
		try: func(w *cluster) (bool, string) {
			a, b := w.pod(web(w.red), "a", "10.0.0.5"), w.pod(web(w.red), "b", "10.0.0.6")
			tamper := func() { run(w.t, w.edge(a), "nft", "flush", "chain", "inet", "h8s_edge", "spoof") }
			tamper()
			if !w.disarmed { // the next sync repairs it
				w.pod(web(w.red), "c", "10.0.0.7")
			}
			stop := edgetest.Capture(w.t, b.ns, "eth0")
			for range 5 { // without a repair; a sync that was due already may come in between
				if w.disarmed {
					tamper()
				}
				edgetest.Inject(w.t, a.ns, eth(gateway, mac("0a:58:01:02:03:04"), 0x0800, udp(at("10.0.0.5"), at("10.0.0.6"), mark)))
			}
			edgetest.Expect(w.t, a.ns, "tcp", "10.0.0.6:80", web(w.red)+"/b 10.0.0.5")
			for _, f := range stop() {
				if bytes.Contains(f, mark) {
					return true, fmt.Sprintf("captured %x", f)
				}
			}
			return false, "nothing captured"
		},
		disarm: func(*cluster) {},
	},
}

func (w *cluster) claims() claim.Store { return claim.Store{Writer: w.api, Reader: w.api} }

func (w *cluster) release(a netip.Addr) {
	l := claim.AddressName(a)
	all, err := w.claims().List(context.Background(), claim.Address)
	if err != nil {
		w.t.Error(err)
	}
	for _, c := range all {
		if c.Name == l {
			if err := w.claims().Release(context.Background(), c, 0); err != nil && !apierrors.IsNotFound(err) {
				w.t.Error(err)
			}
		}
	}
}

// edge is the one a Pod is plugged into.
func (w *cluster) edge(p *guest) *netns.NS {
	w.t.Helper()
	n := w.rig.Nodes[0]
	m := w.rig.NewManager(n)
	ids, err := m.List()
	if err != nil {
		w.t.Fatal(err)
	}
	for _, id := range ids {
		e, err := m.Get(id)
		if err != nil {
			w.t.Fatal(err)
		}
		links, err := e.Links()
		if err != nil {
			w.t.Fatal(err)
		}
		for _, l := range links {
			if l == edge.LinkName(p.request.ContainerId, "eth0") {
				return e.NS()
			}
		}
	}
	w.t.Fatalf("%s is in none of %d edges", p.Name, len(ids))
	return nil
}

func (w *cluster) chmod() {
	for _, s := range []string{"kubestack.sock", "probe.sock"} {
		if err := os.Chmod(filepath.Join(w.dir, s), 0o666); err != nil {
			w.t.Fatal(err)
		}
	}
}

// asNobody connects to a socket as a user without any rights.
func asNobody(path string) (c net.Conn, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends with its identity
		const nobody = 65534
		if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, nobody, nobody, nobody); e != 0 {
			err = e
			return
		}
		fd, e := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if e != nil {
			err = e
			return
		}
		f := os.NewFile(uintptr(fd), path)
		defer f.Close()
		if err = unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err == nil {
			c, err = net.FileConn(f)
		}
	}()
	<-done
	return c, err
}

// sweep asks for everything blue might have, from a Pod of red's.
func sweep(w *cluster) (bool, string) {
	p, q := w.pod(web(w.red), "p", ""), w.pod(web(w.blue), "q", "")
	own := w.service("own", p)
	var names []string
	for _, s := range []string{"web", "db", "secret"} {
		svc := w.service(s, q)
		for _, ns := range []string{web(w.blue), v1alpha1.Home(w.blue.Status.Tenant)} {
			for _, form := range []string{"%s.%s.svc.cluster.local.", "_p._tcp.%s.%s.svc.cluster.local.", "*.%s.%s.svc.cluster.local."} {
				names = append(names, fmt.Sprintf(form, s, ns))
			}
		}
		// The addresses around each: what a sweep of 65536 would find is here, and what it
		// would not is not asked 65000 times.
		base := netip.MustParseAddr(svc.Spec.ClusterIP).As4()
		for i := range 256 {
			base[3] = byte(i)
			if a := netip.AddrFrom4(base).String(); a != own.Spec.ClusterIP {
				name, _ := dns.ReverseAddr(a)
				names = append(names, name)
			}
		}
	}
	w.served(own, p)
	ask := func(name string, kind uint16) *dns.Msg {
		ctx, cancel := context.WithTimeout(w.t.Context(), edgetest.Patience)
		defer cancel()
		c, err := p.ns.DialContext(ctx, "udp", "10.96.0.10:53")
		if err != nil {
			w.t.Fatal(err)
		}
		defer c.Close()
		m := new(dns.Msg)
		m.SetQuestion(name, kind)
		out, _, err := (&dns.Client{Timeout: edgetest.Patience}).ExchangeWithConnContext(ctx, m, &dns.Conn{Conn: c})
		if err != nil {
			w.t.Fatalf("%s: %v", name, err)
		}
		return out
	}
	w.eventually("the Network's own names", func() error {
		if out := ask("own."+web(w.red)+".svc.cluster.local.", dns.TypeA); len(out.Answer) != 1 {
			return errors.New(out.String())
		}
		return nil
	})
	// What nobody has is the measure: no bit may tell what is another's from it.
	plain := func(m *dns.Msg) string {
		m = m.Copy()
		m.Id, m.Question = 0, nil
		return m.String()
	}
	nothing := map[bool]string{
		false: plain(ask("web.no-such-namespace.svc.cluster.local.", dns.TypeA)),
		true:  plain(ask("1.2.96.10.in-addr.arpa.", dns.TypePTR)),
	}
	for _, name := range names {
		reverse := strings.HasSuffix(name, ".arpa.")
		kinds := []uint16{dns.TypeA, dns.TypeAAAA, dns.TypeSRV, dns.TypeTXT}
		if reverse {
			kinds = []uint16{dns.TypePTR}
		}
		for _, kind := range kinds {
			if m := ask(name, kind); plain(m) != nothing[reverse] {
				return true, m.String()
			}
		}
	}
	return false, nothing[false]
}

// race attaches Pods that send from the moment they have an interface, under a policy that
// lets them send nothing.
func race(w *cluster) (bool, string) {
	open := web(w.red) + "-open"
	w.bind(w.red, open)
	w.create(&networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Namespace: web(w.red), Name: "shut"},
		Spec:       networkingv1.NetworkPolicySpec{PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress}},
	})
	victim, friend := w.pod(open, "victim", "10.0.0.9"), w.pod(open, "friend", "10.0.0.10")
	probe := w.pod(web(w.red), "first", "")
	w.eventually("the policy is known", func() error {
		if ok, text := answers(probe.ns, time.Second/2, "10.0.0.9:80"); ok {
			return errors.New(text)
		}
		return nil
	})
	stop := edgetest.Capture(w.t, victim.ns, "eth0")
	n := early
	if w.disarmed {
		n = 10 // one is enough
	}
	queue := make(chan *guest)
	var wait sync.WaitGroup
	for range 4 {
		wait.Go(func() {
			for p := range queue {
				c, err := p.ns.ListenPacket(context.Background(), "udp", "0.0.0.0:0")
				if err != nil {
					w.t.Error(err)
					continue
				}
				ctx, cancel := context.WithCancel(context.Background())
				var sender sync.WaitGroup
				sender.Go(func() {
					tick := time.NewTicker(100 * time.Microsecond)
					defer tick.Stop()
					for ctx.Err() == nil {
						_, _ = c.WriteTo(mark, &net.UDPAddr{IP: net.IPv4(10, 0, 0, 9), Port: 9999})
						<-tick.C
					}
				})
				if err := w.add(p); err != nil {
					w.t.Errorf("%s: %v", p.Name, err)
				}
				for range 20 { // it has a network: what it sends now must not come either
					_, _ = c.WriteTo(mark, &net.UDPAddr{IP: net.IPv4(10, 0, 0, 9), Port: 9999})
				}
				cancel()
				sender.Wait()
				_ = c.Close()
			}
		})
	}
	for i := range n {
		queue <- w.newPod(web(w.red), fmt.Sprint("early-", i), "")
	}
	close(queue)
	wait.Wait()
	edgetest.Expect(w.t, friend.ns, "tcp", "10.0.0.9:80", open+"/victim 10.0.0.10")
	leaked := 0
	for _, f := range stop() {
		if bytes.Contains(f, mark) {
			leaked++
		}
	}
	return leaked > 0, fmt.Sprintf("%d packets of %d Pods", leaked, n)
}
