package kubestack

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	eventsv1 "k8s.io/api/events/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	api "github.com/hypernetes/hypernetes/api/kubestack/v1"
	proberapi "github.com/hypernetes/hypernetes/api/probe/v1"
	"github.com/hypernetes/hypernetes/cluster/manifest"
	"github.com/hypernetes/hypernetes/network/claim"
	"github.com/hypernetes/hypernetes/network/edge/edgetest"
	"github.com/hypernetes/hypernetes/network/ipam"
	"github.com/hypernetes/hypernetes/network/netns"
	"github.com/hypernetes/hypernetes/network/probe"
	"github.com/hypernetes/hypernetes/test/controlplane"
)

// world is a cluster of which everything is real but kubelets and containers: an API
// server, nodes that are namespaces with a kubestack each, and Pods that are namespaces.
// The controller's part is played by the test.
type world struct {
	t     *testing.T
	rig   *edgetest.Rig
	cfg   *rest.Config
	api   client.WithWatch
	nodes map[string]*testNode
	// parts changes what the daemons are made of.
	parts func(*Parts)
}

type testNode struct {
	*edgetest.Node
	w    *world
	dir  string
	stop func()
	cni  api.KubestackClient
	d    *Daemon // nil if it is a process of its own
}

func newWorld(t *testing.T, nodes int, parts ...func(*Parts)) *world {
	t.Helper()
	rig := edgetest.New(t, nodes)
	cfg := controlplane.Start(t)
	c, err := client.NewWithWatch(cfg, client.Options{Scheme: controlplane.Scheme()})
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, rig: rig, cfg: cfg, api: c, nodes: map[string]*testNode{}}
	w.parts = func(p *Parts) {
		for _, f := range parts {
			f(p)
		}
	}
	w.namespace(v1alpha1.SystemNamespace, nil)
	w.rights()
	for i, n := range rig.Nodes {
		node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: n.Name}, Spec: corev1.NodeSpec{PodCIDRs: []string{fmt.Sprintf("10.244.%d.0/24", i)}, PodCIDR: fmt.Sprintf("10.244.%d.0/24", i)}}
		w.create(node)
		node.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: n.Address.String()}}
		node.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
		w.status(node)
		dir, err := os.MkdirTemp("", "kubestack-") // sockets' paths are short
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.RemoveAll(dir) })
		tn := &testNode{Node: n, w: w, dir: dir}
		w.nodes[n.Name] = tn
		tn.start()
		t.Cleanup(func() { tn.stop() })
	}
	// The API server of all nodes, as far as Pods are concerned.
	edgetest.Echo(t, rig.Nodes[0].NS, "api", rig.Nodes[0].Address.String()+":6443")
	return w
}

func (n *testNode) flags() []string {
	return []string{
		"--node", n.Name, "--node-ip", n.Address.String(), "--run-dir", n.dir, "--health-address", "", "--service-cidrs", "10.96.0.0/12,fd00:10:96::/108",
		"--vxlan-port", fmt.Sprint(edgetest.Port), "--api-servers", n.w.rig.Nodes[0].Address.String() + ":6443", "--resolv-conf", os.DevNull,
	}
}

// start runs the node's daemon.
func (n *testNode) start() {
	t := n.w.t
	t.Helper()
	opts, err := Parse(n.flags())
	if err != nil {
		t.Fatal(err)
	}
	own, err := client.NewWithWatch(controlplane.As(n.w.cfg, "h8s:kubestack:"+n.Name, "h8s:kubestacks", "system:authenticated"), client.Options{Scheme: controlplane.Scheme()})
	if err != nil {
		t.Fatal(err)
	}
	parts := Parts{API: own, Edges: edges{n.w.rig.NewManager(n.Node)}, Plane: plane{}, Routes: hostRoutes{n.NS}, Prober: probe.Run}
	n.w.parts(&parts)
	d, err := New(opts, parts)
	if err != nil {
		t.Fatal(err)
	}
	n.d = d
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	conn := n.connect()
	n.stop = sync.OnceFunc(func() {
		_ = conn.Close()
		cancel()
		if err := <-done; err != nil {
			t.Errorf("%s: %v", n.Name, err)
		}
	})
	n.ready()
}

// rights are what a cluster gives kubestack, no more.
func (w *world) rights() {
	w.t.Helper()
	objects, err := manifest.Render(manifest.Values{NodeIP: "100.64.0.1", Server: "https://100.64.0.1:6443", DNSServiceIP: "10.96.0.10", ClusterDomain: "cluster.local", Overhead: manifest.DefaultOverhead})
	if err != nil {
		w.t.Fatal(err)
	}
	for _, o := range objects {
		if o.Name() == "h8s:kubestack" {
			text, err := json.Marshal(o)
			if err != nil {
				w.t.Fatal(err)
			}
			u := &unstructured.Unstructured{}
			if err := u.UnmarshalJSON(text); err != nil {
				w.t.Fatal(err)
			}
			w.create(u)
		}
	}
}

func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	var err error
	if !poll(ctx, func() bool { err = f(); return err == nil }) {
		t.Fatalf("%s: %v", what, err)
	}
}

func (w *world) create(o client.Object) {
	w.t.Helper()
	if err := w.api.Create(w.t.Context(), o); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) status(o client.Object) {
	w.t.Helper()
	if err := w.api.Status().Update(w.t.Context(), o); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) namespace(name string, labels map[string]string) {
	w.t.Helper()
	w.create(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}})
}

// tenant makes a tenant's home and one Network, accepted.
func (w *world) tenant(name string, vni int32, subnets ...string) *v1alpha1.Network {
	w.t.Helper()
	w.namespace(v1alpha1.Home(name), nil)
	n := &v1alpha1.Network{ObjectMeta: metav1.ObjectMeta{Namespace: v1alpha1.Home(name), Name: "default"}, Spec: v1alpha1.NetworkSpec{Subnets: map[string]v1alpha1.Subnet{}}}
	for i, s := range subnets {
		n.Spec.Subnets[fmt.Sprint("s", i)] = v1alpha1.Subnet{CIDR: s}
	}
	w.create(n)
	n.Status = v1alpha1.NetworkStatus{Phase: v1alpha1.NetworkActive, Tenant: name, Provider: "builtin", VNI: vni, MTU: edgetest.MTU}
	for i, s := range subnets {
		gateway := netip.MustParsePrefix(s).Addr().Next().String()
		n.Status.Subnets = append(n.Status.Subnets, v1alpha1.SubnetStatus{Name: fmt.Sprint("s", i), Index: int32(i), CIDR: s, Gateway: gateway})
	}
	w.status(n)
	return n
}

// bind makes a namespace of the Network's.
func (w *world) bind(n *v1alpha1.Network, name string) {
	w.t.Helper()
	w.namespace(name, map[string]string{v1alpha1.LabelTenant: n.Status.Tenant, v1alpha1.LabelNetwork: n.Name})
	b := &v1alpha1.TenantNamespace{ObjectMeta: metav1.ObjectMeta{Namespace: n.Namespace, Name: name}, Spec: v1alpha1.TenantNamespaceSpec{Network: n.Name}}
	w.create(b)
	b.Status.Phase, b.Status.NetworkUID = v1alpha1.NamespaceBound, string(n.UID)
	w.status(b)
}

type testPod struct {
	*corev1.Pod
	ns      *netns.NS
	node    *testNode
	request *api.AttachRequest
	answer  *api.AddResponse
	ip      string
}

// newPod makes a Pod's object and namespace.
func (w *world) newPod(node int, namespace, name string, annotations map[string]string) *testPod {
	w.t.Helper()
	n := w.nodes[w.rig.Nodes[node].Name]
	p := &testPod{node: n, ns: w.rig.Namespace(namespace + "-" + name)}
	p.Pod = &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: map[string]string{"app": name}, Annotations: annotations},
		Spec: corev1.PodSpec{NodeName: n.Name, Containers: []corev1.Container{{
			Name: "c", Image: "none", Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 80}},
		}}},
	}
	w.create(p.Pod)
	p.request = &api.AttachRequest{
		ContainerId: string(p.UID), Netns: p.ns.Path(), Interface: "eth0", PodNamespace: namespace, PodName: name, PodUid: string(p.UID),
	}
	return p
}

func (p *testPod) add(ctx context.Context) error {
	var err error
	if p.answer, err = p.node.cni.Add(ctx, p.request); err == nil && len(p.answer.Interfaces) > 0 {
		prefix, err := netip.ParsePrefix(p.answer.Interfaces[0].Addresses[0])
		if err != nil {
			return err
		}
		p.ip = prefix.Addr().String()
	}
	return err
}

// pod makes a Pod that answers on port 80 with its namespace and name. The binding may
// have to come round first.
func (w *world) pod(node int, namespace, name string, annotations map[string]string) *testPod {
	w.t.Helper()
	p := w.newPod(node, namespace, name, annotations)
	eventually(w.t, "add "+namespace+"/"+name, func() error { return p.add(w.t.Context()) })
	edgetest.Echo(w.t, p.ns, namespace+"/"+name, p.ip+":80")
	return p
}

func (w *world) service(namespace, name string, endpoints ...*testPod) *corev1.Service {
	w.t.Helper()
	svc := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: map[string]string{v1alpha1.LabelServiceProxy: v1alpha1.ServiceProxy}},
		Spec:       corev1.ServiceSpec{Ports: []corev1.ServicePort{{Name: "p", Port: 8080, TargetPort: intstr.FromInt32(80)}}},
	}
	w.create(svc)
	eight, pname, tcp := int32(80), "p", corev1.ProtocolTCP
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: name}},
		AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Name: &pname, Port: &eight, Protocol: &tcp}},
	}
	for _, p := range endpoints {
		yes := true
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{Addresses: []string{p.ip}, NodeName: &p.node.Name, Conditions: discoveryv1.EndpointConditions{Ready: &yes}})
	}
	w.create(slice)
	return svc
}

// answers waits for an answer, and fails on a wrong one at once.
func answers(t *testing.T, from *testPod, address, want string) {
	t.Helper()
	eventually(t, from.Name+" asks "+address, func() error {
		got, err := edgetest.Ask(from.ns, "tcp", address)
		if err == nil && got != want {
			t.Fatalf("%s/%s asks %s: answer %q, want %q", from.Namespace, from.Name, address, got, want)
		}
		return err
	})
}

func TestPlane(t *testing.T) {
	w := newWorld(t, 2)
	red, blue := w.tenant("red", 5001, "10.0.0.0/24"), w.tenant("blue", 5002, "10.0.0.0/24")
	w.bind(red, "red-web")
	w.bind(blue, "blue-web")
	five := map[string]string{v1alpha1.AnnotationAddress: "10.0.0.5"}
	r5, b5 := w.pod(0, "red-web", "five", five), w.pod(0, "blue-web", "five", five)
	r6, b6 := w.pod(1, "red-web", "six", map[string]string{v1alpha1.AnnotationAddress: "10.0.0.6"}), w.pod(1, "blue-web", "six", map[string]string{v1alpha1.AnnotationAddress: "10.0.0.6"})

	t.Run("one address twice", func(t *testing.T) {
		for _, p := range []*testPod{r5, b5} {
			answers(t, p, "10.0.0.6:80", p.Namespace+"/six 10.0.0.5")
		}
		for _, p := range []*testPod{r6, b6} {
			answers(t, p, "10.0.0.5:80", p.Namespace+"/five 10.0.0.6")
		}
	})
	t.Run("services", func(t *testing.T) {
		rs, bs := w.service("red-web", "s", r5), w.service("blue-web", "s", b6)
		answers(t, r6, rs.Spec.ClusterIP+":8080", "red-web/five 10.0.0.6")
		answers(t, b5, bs.Spec.ClusterIP+":8080", "blue-web/six 10.0.0.5")
		edgetest.Refuse(t, r5.ns, "tcp", bs.Spec.ClusterIP+":8080")
		edgetest.Refuse(t, b5.ns, "tcp", rs.Spec.ClusterIP+":8080")
	})
	t.Run("names", func(t *testing.T) {
		lookup := func(p *testPod, name string) ([]string, error) {
			ctx, cancel := context.WithTimeout(t.Context(), edgetest.Patience)
			defer cancel()
			r := &net.Resolver{PreferGo: true, StrictErrors: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
				return p.ns.DialContext(ctx, network, "10.96.0.10:53")
			}}
			return r.LookupHost(ctx, name)
		}
		eventually(t, "the Network's own names", func() error {
			got, err := lookup(r5, "s.red-web.svc.cluster.local.")
			if err == nil && len(got) != 1 {
				t.Fatalf("answer %v", got)
			}
			return err
		})
		var none *net.DNSError
		if got, err := lookup(b5, "s.red-web.svc.cluster.local."); !errors.As(err, &none) || !none.IsNotFound {
			t.Errorf("another tenant's name: %v, %v", got, err)
		}
		if got, err := lookup(b5, "kubernetes.default.svc.cluster.local."); err != nil || len(got) != 1 || got[0] != "10.96.0.1" {
			t.Errorf("the API server's name: %v, %v", got, err)
		}
	})
	t.Run("api server", func(t *testing.T) {
		for _, p := range []*testPod{r5, b6} {
			eventually(t, "ask the API server", func() error {
				got, err := edgetest.Ask(p.ns, "tcp", "10.96.0.1:443")
				if err == nil && !strings.HasPrefix(got, "api ") {
					t.Fatalf("answer %q", got)
				}
				return err
			})
		}
	})
	t.Run("probes", func(t *testing.T) {
		conn, err := probeClient(r5.node.dir)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		c := proberapi.NewProberClient(conn)
		q := &proberapi.ProbeRequest{PodNamespace: "red-web", PodName: "five", PodUid: string(r5.UID), Probe: probe.Command(probe.Request{TCP: &probe.TCP{Port: 80}, TimeoutSeconds: 2})[1]}
		if out, err := c.Probe(t.Context(), q); err != nil || out.ExitCode != 0 {
			t.Errorf("probe of an open port: %v, %v", out, err)
		}
		q.Probe = probe.Command(probe.Request{TCP: &probe.TCP{Port: 81}, TimeoutSeconds: 2})[1]
		if out, err := c.Probe(t.Context(), q); err != nil || out.ExitCode != 1 || out.Output == "" {
			t.Errorf("probe of a closed port: %v, %v", out, err)
		}
		q.PodUid = "nobody"
		if _, err := c.Probe(t.Context(), q); err == nil {
			t.Error("a Pod nobody knows was probed")
		}
	})
	t.Run("restart", func(t *testing.T) {
		c, err := r5.ns.DialContext(t.Context(), "tcp", "10.0.0.6:80")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := edgetest.Again(c); err != nil {
			t.Fatal(err)
		}
		for _, n := range w.nodes {
			n.stop()
		}
		if _, err := edgetest.Again(c); err != nil {
			t.Errorf("without a daemon: %v", err)
		}
		for _, n := range w.nodes {
			n.start()
		}
		// What comes up anew has changed nothing, though a sync has run.
		p := w.pod(0, "red-web", "after", nil)
		answers(t, p, "10.0.0.6:80", "red-web/six "+p.ip)
		if _, err := edgetest.Again(c); err != nil {
			t.Errorf("after the restart: %v", err)
		}
		if _, err := r5.node.cni.Check(t.Context(), r5.request); err != nil {
			t.Errorf("CHECK: %v", err)
		}
	})
	t.Run("policy", func(t *testing.T) {
		w.create(&networkingv1.NetworkPolicy{
			ObjectMeta: metav1.ObjectMeta{Namespace: "red-web", Name: "shut"},
			Spec: networkingv1.NetworkPolicySpec{
				PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": "shut"}}, PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress},
				Ingress: []networkingv1.NetworkPolicyIngressRule{{
					From:  []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "six"}}}},
					Ports: []networkingv1.NetworkPolicyPort{{Port: &intstr.IntOrString{Type: intstr.String, StrVal: "http"}}},
				}},
			},
		})
		shut := w.pod(0, "red-web", "shut", nil)
		eventually(t, "the policy is known", func() error {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			c, err := r5.ns.DialContext(ctx, "tcp", shut.ip+":80")
			if err == nil {
				_ = c.Close()
				return errors.New("it lets everybody in")
			}
			return nil
		})
		edgetest.Refuse(t, r5.ns, "tcp", shut.ip+":80")
		answers(t, r6, shut.ip+":80", "red-web/shut 10.0.0.6")

		// More than can be carried: it says so, and lets nothing through.
		over := &networkingv1.NetworkPolicy{
			ObjectMeta: metav1.ObjectMeta{Namespace: "red-web", Name: "over"},
			Spec:       networkingv1.NetworkPolicySpec{PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": "nobody"}}},
		}
		for i := range 4100 {
			over.Spec.Ingress = append(over.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{
				From:  []networkingv1.NetworkPolicyPeer{{IPBlock: &networkingv1.IPBlock{CIDR: fmt.Sprintf("10.%d.%d.0/24", i/200, i%200)}}},
				Ports: []networkingv1.NetworkPolicyPort{{Port: &intstr.IntOrString{IntVal: int32(1 + i)}}},
			})
		}
		w.create(over)
		w.event("red-web", "over", "InvalidPolicy")
	})
	t.Run("secondary networks", func(t *testing.T) {
		second := &v1alpha1.Network{ObjectMeta: metav1.ObjectMeta{Namespace: red.Namespace, Name: "data"}, Spec: v1alpha1.NetworkSpec{Subnets: map[string]v1alpha1.Subnet{"d": {CIDR: "10.7.0.0/24"}}}}
		w.create(second)
		second.Status = v1alpha1.NetworkStatus{
			Phase: v1alpha1.NetworkActive, Tenant: "red", VNI: 5003, MTU: edgetest.MTU,
			Subnets: []v1alpha1.SubnetStatus{{Name: "d", CIDR: "10.7.0.0/24", Gateway: "10.7.0.1"}},
		}
		w.status(second)
		ask := func(address string) map[string]string {
			text, _ := json.Marshal([]v1alpha1.NetworkRequest{{Name: "data", Addresses: []string{address}}})
			return map[string]string{v1alpha1.AnnotationNetworks: string(text)}
		}
		a, b := w.pod(0, "red-web", "multi-a", ask("10.7.0.11")), w.pod(1, "red-web", "multi-b", ask("10.7.0.12"))
		if len(a.answer.Interfaces) != 2 || a.answer.Interfaces[1].Name != "net1" {
			t.Fatalf("answer %v", a.answer)
		}
		edgetest.Echo(t, b.ns, "data-b", "10.7.0.12:81")
		answers(t, a, "10.7.0.12:81", "data-b 10.7.0.11")
		edgetest.Refuse(t, r5.ns, "tcp", "10.7.0.12:81")
	})
	t.Run("external addresses", func(t *testing.T) {
		svc := w.service("red-web", "lb", r6)
		svc.Spec.Type = corev1.ServiceTypeLoadBalancer
		if err := w.api.Update(t.Context(), svc); err != nil {
			t.Fatal(err)
		}
		w.claim("100.64.0.150", claim.OwnerOf("Service", svc))
		outside := &testPod{Pod: &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "outside"}}, ns: w.rig.Outside}
		eventually(t, "load balancer", func() error {
			got, err := edgetest.Ask(outside.ns, "tcp", "100.64.0.150:8080")
			if err == nil && !strings.HasPrefix(got, "red-web/six ") {
				t.Fatalf("answer %q", got)
			}
			return err
		})
		f := &v1alpha1.FloatingIP{ObjectMeta: metav1.ObjectMeta{Namespace: red.Namespace, Name: "f"}}
		w.create(f)
		f.Status = v1alpha1.FloatingIPStatus{Phase: "Active", Address: "100.64.0.151", Network: "default", Target: "10.0.0.5", Node: r5.node.Name}
		w.status(f)
		// What a FloatingIP says of itself is nothing without the claim.
		edgetest.Refuse(t, outside.ns, "tcp", "100.64.0.151:80")
		w.claim("100.64.0.151", claim.OwnerOf("FloatingIP", f))
		answers(t, outside, "100.64.0.151:80", "red-web/five 100.64.0.200")
		edgetest.Echo(t, outside.ns, "outside", "100.64.0.200:8000")
		answers(t, r5, "100.64.0.200:8000", "outside 100.64.0.151")
	})
	t.Run("exported", func(t *testing.T) {
		near, far := w.service("blue-web", "hook", b5), w.service("blue-web", "hook-far", b6)
		edgetest.KubeProxy(t, w.rig.Nodes[0])
		for _, n := range w.nodes {
			node := &corev1.Node{}
			if err := w.api.Get(t.Context(), types.NamespacedName{Name: n.Name}, node); err != nil {
				t.Fatal(err)
			}
			node.Labels = map[string]string{"node-role.kubernetes.io/control-plane": ""}
			if err := w.api.Update(t.Context(), node); err != nil {
				t.Fatal(err)
			}
		}
		none, ignore := admissionv1.SideEffectClassNone, admissionv1.Ignore
		hook := &admissionv1.ValidatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: "t"}}
		for _, svc := range []*corev1.Service{near, far} {
			hook.Webhooks = append(hook.Webhooks, admissionv1.ValidatingWebhook{
				Name: svc.Name + ".example.com", SideEffects: &none, FailurePolicy: &ignore, AdmissionReviewVersions: []string{"v1"},
				ClientConfig: admissionv1.WebhookClientConfig{Service: &admissionv1.ServiceReference{Namespace: svc.Namespace, Name: svc.Name}},
			})
		}
		w.create(hook)
		defer func() {
			if err := w.api.Delete(context.Background(), hook); err != nil {
				t.Error(err)
			}
		}()
		for svc, want := range map[*corev1.Service]string{near: "blue-web/five ", far: "blue-web/six "} {
			eventually(t, "the API server's node reaches "+svc.Name, func() error {
				got, err := edgetest.Ask(w.rig.Nodes[0].NS, "tcp", svc.Spec.ClusterIP+":8080")
				if err == nil && !strings.HasPrefix(got, want) {
					t.Fatalf("answer %q", got)
				}
				return err
			})
		}
	})
	t.Run("address in use", func(t *testing.T) {
		p := w.newPod(1, "red-web", "late", five)
		err := p.add(t.Context())
		if status.Code(err) != codes.AlreadyExists || !strings.Contains(err.Error(), "red-web/five") {
			t.Errorf("%v", err)
		}
		w.event("red-web", "late", "AddressInUse")
	})
	t.Run("exhausted", func(t *testing.T) {
		small := w.tenant("small", 5004, "10.9.0.0/29")
		w.bind(small, "small-web")
		var last *testPod
		for i := range 5 {
			last = w.pod(i%2, "small-web", fmt.Sprint("p", i), nil)
		}
		p := w.newPod(0, "small-web", "one-too-many", nil)
		err := p.add(t.Context())
		if status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), "10.9.0.0/29") {
			t.Errorf("%v", err)
		}
		w.event("small-web", "one-too-many", "AddressesExhausted")
		if _, err := last.node.cni.Del(t.Context(), last.request); err != nil {
			t.Fatal(err)
		}
		eventually(t, "an address is free again", func() error { return p.add(t.Context()) })
		if p.ip != last.ip {
			t.Errorf("address %s, the free one is %s", p.ip, last.ip)
		}
	})
	t.Run("bindings", func(t *testing.T) {
		w.namespace("plain", nil)
		p := w.newPod(1, "plain", "p", nil)
		eventually(t, "default network", func() error { return p.add(t.Context()) })
		if p.answer.Delegate == nil || p.answer.Delegate.PodCidrs[0] != "10.244.1.0/24" {
			t.Errorf("answer %v", p.answer)
		}
		w.namespace("red-soon", map[string]string{v1alpha1.LabelTenant: "red"})
		p = w.newPod(1, "red-soon", "p", nil)
		if err := p.add(t.Context()); err == nil || p.answer.GetDelegate() != nil {
			t.Errorf("a tenant's Pod without a binding: %v, %v", p.answer, err)
		}
		w.event("red-soon", "p", "BindingMissing")
	})
	t.Run("two families", func(t *testing.T) {
		dual, six := w.tenant("dual", 5005, "10.3.0.0/24", "fd00:33::/64"), w.tenant("six", 5006, "fd00:66::/64")
		w.bind(dual, "dual-web")
		w.bind(six, "six-web")
		a, b := w.pod(0, "dual-web", "a", map[string]string{v1alpha1.AnnotationAddress: "10.3.0.5"}), w.pod(1, "dual-web", "b", nil)
		if got := a.answer.Interfaces[0].Addresses; len(got) != 2 || got[1] != "fd00:33::5/128" {
			t.Errorf("addresses %v", got)
		}
		edgetest.Echo(t, a.ns, "a6", "[fd00:33::5]:81")
		answers(t, b, a.ip+":80", "dual-web/a "+b.ip)
		eventually(t, "over IPv6", func() error { _, err := edgetest.Ask(b.ns, "tcp", "[fd00:33::5]:81"); return err })
		c := w.newPod(0, "six-web", "c", map[string]string{v1alpha1.AnnotationAddress: "fd00:66::c"})
		eventually(t, "IPv6 alone", func() error { return c.add(t.Context()) })
		edgetest.Echo(t, c.ns, "c", "[fd00:66::c]:80")
		d := w.newPod(1, "six-web", "d", nil)
		eventually(t, "IPv6 alone", func() error { return d.add(t.Context()) })
		eventually(t, "IPv6 alone", func() error { _, err := edgetest.Ask(d.ns, "tcp", "[fd00:66::c]:80"); return err })
	})
	t.Run("kept address", func(t *testing.T) {
		held := &v1alpha1.Port{
			ObjectMeta: metav1.ObjectMeta{Namespace: red.Namespace, Name: "default.10-0-0-77", Labels: map[string]string{v1alpha1.LabelNetwork: "default"}},
			Spec:       v1alpha1.PortSpec{Network: "default", Addresses: []string{"10.0.0.77"}, Retain: true},
		}
		w.create(held)
		p := w.pod(1, "red-web", "kept", map[string]string{v1alpha1.AnnotationAddress: "port/" + held.Name})
		answers(t, r5, "10.0.0.77:80", "red-web/kept 10.0.0.5")
		if _, err := p.node.cni.Del(t.Context(), p.request); err != nil {
			t.Fatal(err)
		}
		if err := w.api.Get(t.Context(), client.ObjectKeyFromObject(held), held); err != nil || held.Spec.Node != "" || held.Spec.Pod != nil {
			t.Errorf("after its Pod: %+v, %v", held.Spec, err)
		}
	})
	t.Run("killed half-way", func(t *testing.T) {
		n := w.nodes[w.rig.Nodes[1].Name]
		half := w.newPod(1, "red-web", "half", nil)
		gone := w.pod(1, "red-web", "gone", nil)
		n.stop()
		// It was killed after the claim, and after the record: nothing is plugged.
		r := &record{ContainerID: half.request.ContainerId, Interface: "eth0", NetNS: half.ns.Path(), PodNamespace: "red-web", PodName: "half", PodUID: string(half.UID)}
		ref := v1alpha1.PodRef{Namespace: "red-web", Name: "half", UID: string(half.UID), Sandbox: r.ContainerID, Interface: "eth0"}
		port, err := ipam.Claimer{Ports: w.api, Node: n.Name}.Claim(t.Context(), ipam.Claim{Network: red, Pod: ref, Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.99")}})
		if err != nil {
			t.Fatal(err)
		}
		nic, err := nicOf(r.ContainerID, red, port, request{network: client.ObjectKeyFromObject(red), iface: "eth0", primary: true})
		if err != nil {
			t.Fatal(err)
		}
		r.NICs = append(r.NICs, nic)
		files, unreadable, err := openRecords(filepath.Join(n.dir, "attachments"))
		if err != nil || unreadable != nil {
			t.Fatal(err, unreadable)
		}
		if err := files.put(r); err != nil {
			t.Fatal(err)
		}
		// And a Pod's namespace went meanwhile.
		if err := netns.Remove(gone.ns.Path()); err != nil {
			t.Fatal(err)
		}
		n.start()
		eventually(t, "the lost Pod's Port is given back", func() error {
			err := w.api.Get(t.Context(), types.NamespacedName{Namespace: red.Namespace, Name: v1alpha1.PortName("default", gone.ip)}, &v1alpha1.Port{})
			if apierrors.IsNotFound(err) {
				return nil
			}
			return fmt.Errorf("it is there: %w", err)
		})
		// The runtime tries again, and the address is the one claimed before.
		eventually(t, "add again", func() error { return half.add(t.Context()) })
		if half.ip != "10.0.0.99" {
			t.Errorf("address %s", half.ip)
		}
		edgetest.Echo(t, half.ns, "half", half.ip+":80")
		answers(t, r5, half.ip+":80", "half 10.0.0.5")
	})
	t.Run("many at once", func(t *testing.T) {
		var wg sync.WaitGroup
		pods := make([]*testPod, 12)
		for i := range pods {
			pods[i] = w.newPod(i%2, []string{"red-web", "blue-web"}[i/2%2], fmt.Sprint("many-", i), nil)
		}
		for _, p := range pods {
			wg.Go(func() {
				if err := p.add(context.Background()); err != nil {
					t.Errorf("%s: %v", p.Name, err)
				}
			})
		}
		wg.Wait()
		for _, p := range pods {
			wg.Go(func() {
				for range 2 { // the second time it is gone already
					if out, err := p.node.cni.Del(context.Background(), p.request); err != nil {
						t.Errorf("%s: %v, %v", p.Name, out, err)
					}
				}
			})
		}
		wg.Wait()
	})
	t.Run("garbage", func(t *testing.T) {
		n := b6.node
		if _, err := n.cni.GC(t.Context(), &api.GCRequest{Valid: []*api.Attachment{{ContainerId: r6.request.ContainerId, Interface: "eth0"}}}); err != nil {
			t.Fatal(err)
		}
		if _, err := n.cni.Check(t.Context(), r6.request); err != nil {
			t.Errorf("what is valid: %v", err)
		}
		if _, err := n.cni.Check(t.Context(), b6.request); status.Code(err) != codes.NotFound {
			t.Errorf("what is not: %v", err)
		}
		err := w.api.Get(t.Context(), types.NamespacedName{Namespace: blue.Namespace, Name: "default.10-0-0-6"}, &v1alpha1.Port{})
		if !apierrors.IsNotFound(err) {
			t.Errorf("its Port: %v", err)
		}
		// Nobody on this node is on blue's Network any more.
		eventually(t, "the edge goes", func() error {
			ids, err := n.Manager.List()
			if err != nil {
				return err
			}
			for _, id := range ids {
				if id == edgeID(blue.UID) {
					return errors.New("edge of blue is there")
				}
			}
			return nil
		})
	})
}

// claim claims an external address.
func (w *world) claim(address string, o claim.Owner) {
	w.t.Helper()
	a, holder := netip.MustParseAddr(address), o.String()
	w.create(&coordinationv1.Lease{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: v1alpha1.ClaimNamespace, Name: claim.AddressName(a), Labels: map[string]string{claim.LabelKind: claim.Address},
			Annotations: map[string]string{claim.AnnotationAddress: address},
		},
		Spec: coordinationv1.LeaseSpec{HolderIdentity: &holder},
	})
}

// event waits for an event of a Pod.
func (w *world) event(namespace, pod, reason string) {
	w.t.Helper()
	eventually(w.t, "event "+reason+" of "+namespace+"/"+pod, func() error {
		all := &eventsv1.EventList{}
		if err := w.api.List(w.t.Context(), all, client.InNamespace(namespace)); err != nil {
			return err
		}
		for _, e := range all.Items {
			if e.Regarding.Name == pod && e.Reason == reason {
				return nil
			}
		}
		return fmt.Errorf("not among %d", len(all.Items))
	})
}

func probeClient(dir string) (*ttrpc.Client, error) {
	c, err := net.Dial("unix", filepath.Join(dir, "probe.sock"))
	if err != nil {
		return nil, err
	}
	return ttrpc.NewClient(c), nil
}
