package kubestack

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	api "github.com/hypernetes/hypernetes/api/kubestack/v1"
	"github.com/hypernetes/hypernetes/network/edge/edgetest"
	"github.com/hypernetes/hypernetes/network/provider"
	"github.com/hypernetes/hypernetes/test/controlplane"
)

const anID = "60f43890-b711-45b5-87d1-8a6e1181473d"

// What Open vSwitch is told, word by word.
func TestWirer(t *testing.T) {
	v := VIF{Type: "ovs", Name: "tap60f43890-b7", Port: anID, MAC: "fa:16:3e:b4:47:f6", Pod: "0c9b1b5e-5f8a-4d35-a1c5-0d5c0d5c0d5c"}
	var got []string
	answer := func(context.Context) (string, error) { return "", nil }
	w := wirer{run: func(ctx context.Context, name string, args ...string) (string, error) {
		got = append(got, name+" "+strings.Join(args, " "))
		return answer(ctx)
	}}
	for _, err := range []error{w.Plug(t.Context(), v), w.Unplug(t.Context(), v)} {
		if err != nil {
			t.Error(err)
		}
	}
	want := []string{
		`ovs-vsctl --timeout=10 --may-exist add-port br-int tap60f43890-b7 -- set Interface tap60f43890-b7 external_ids:iface-id="60f43890-b711-45b5-87d1-8a6e1181473d" external_ids:attached-mac="fa:16:3e:b4:47:f6" external_ids:vm-uuid="0c9b1b5e-5f8a-4d35-a1c5-0d5c0d5c0d5c" external_ids:iface-status=active`,
		`ovs-vsctl --timeout=10 --if-exists del-port br-int tap60f43890-b7`,
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	// The linuxbridge agent needs no word.
	got, v.Type = nil, "bridge"
	if err := errors.Join(w.Plug(t.Context(), v), w.Unplug(t.Context(), v)); err != nil || got != nil {
		t.Errorf("bridge: %v, %v", got, err)
	}
	v.Type = "ovs"
	answer = func(context.Context) (string, error) {
		return "ovs-vsctl: unix:/run/openvswitch/db.sock: database connection failed\n", errors.New("exit status 1")
	}
	err := w.Plug(t.Context(), v)
	if !errdefs.IsUnavailable(err) || reason(err) != "SwitchFailed" || !strings.Contains(err.Error(), "database connection failed: is Open vSwitch running") {
		t.Errorf("%v (%s)", err, reason(err))
	}
	// Where it was never installed nothing can be plugged and nothing is left.
	w.run = run
	t.Setenv("PATH", t.TempDir())
	if err := w.Plug(t.Context(), v); !errdefs.IsUnavailable(err) || !errors.Is(err, exec.ErrNotFound) {
		t.Error(err)
	}
	if err := w.Unplug(t.Context(), v); err != nil {
		t.Error(err)
	}
}

func TestVIFOf(t *testing.T) {
	for _, c := range []struct {
		id, vif, want, err string
	}{
		{anID, "bridge", "tap60f43890-b7", ""},
		{anID, "ovs", "tap60f43890-b7", ""},
		{anID, "vhostuser", "", `wants it plugged as "vhostuser" and this node knows bridge and ovs`},
		{anID, "", "", `plugged as ""`},
		{"", "bridge", "", `providerPortID "" is no UUID`},
		{"../../../../etc/passwd", "bridge", "", "is no UUID"},
		{strings.ToUpper(anID), "bridge", "", "is no UUID"},
	} {
		p := &v1alpha1.Port{Status: v1alpha1.PortStatus{ProviderPortID: c.id, VIFType: c.vif, MAC: "fa:16:3e:00:00:01"}}
		v, err := vifOf(p)
		switch {
		case c.err == "" && (err != nil || v.Name != c.want || v.Type != c.vif || v.Port != c.id || v.MAC != p.Status.MAC):
			t.Errorf("%s %s: %v, %v", c.id, c.vif, v, err)
		case c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)):
			t.Errorf("%s %s: %v, want %s", c.id, c.vif, err, c.err)
		}
	}
}

// cloud plays the controller's part for Networks that Neutron carries, and that of the
// cloud's agents.
type cloud struct {
	w *world

	mu       sync.Mutex
	carriers map[string]*edgetest.Carrier // by the Networks' namespace
	vif      string
	// taken tells of addresses somebody has at the provider, unbound of hosts it cannot bind
	// to, deaf of those whose agent does not run.
	taken   func(address string) bool
	unbound map[string]bool
	deaf    map[string]bool
	away    bool // the controller does nothing
}

func newCloud(w *world, done <-chan struct{}, wg *sync.WaitGroup) *cloud {
	c := &cloud{w: w, carriers: map[string]*edgetest.Carrier{}, vif: vifBridge, taken: func(string) bool { return false },
		unbound: map[string]bool{}, deaf: map[string]bool{}}
	wg.Go(func() {
		for t := time.NewTicker(20 * time.Millisecond); ; {
			select {
			case <-done:
				t.Stop()
				return
			case <-t.C:
				c.look()
			}
		}
	})
	return c
}

func (c *cloud) set(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f()
}

// look does all there is to do; what fails is done the next time.
func (c *cloud) look() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.away {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	all := &v1alpha1.PortList{}
	if c.w.api.List(ctx, all) != nil {
		return
	}
	for i := range all.Items {
		p := &all.Items[i]
		if c.carriers[p.Namespace] == nil {
			continue
		}
		if p.DeletionTimestamp != nil {
			if controllerutil.RemoveFinalizer(p, v1alpha1.FinalizerProvider) {
				_ = c.w.api.Update(ctx, p)
			}
			continue
		}
		old := p.DeepCopy()
		c.decide(p)
		if fmt.Sprint(old.Status) != fmt.Sprint(p.Status) {
			_ = c.w.api.Status().Patch(ctx, p, client.MergeFrom(old))
		}
	}
}

func (c *cloud) decide(p *v1alpha1.Port) {
	s := &p.Status
	say := func(kind string, ok bool, reason, text string) {
		status := metav1.ConditionFalse
		if ok {
			status = metav1.ConditionTrue
		}
		meta.SetStatusCondition(&s.Conditions, metav1.Condition{Type: kind, Status: status, Reason: reason, Message: text, ObservedGeneration: p.Generation})
	}
	switch {
	case c.taken(p.Spec.Addresses[0]):
		s.Phase = v1alpha1.PortFailed
		say(v1alpha1.ConditionReady, false, v1alpha1.ReasonAddressInUse, "another port of the network at Neutron has "+p.Spec.Addresses[0])
		return
	case c.unbound[p.Spec.Node]:
		s.Phase = v1alpha1.PortFailed
		say(v1alpha1.ConditionReady, false, v1alpha1.ReasonBindingFailed, "its Linux bridge agent does not answer: start it again")
		return
	}
	if s.ProviderPortID == "" {
		s.ProviderPortID = uuid()
	}
	if s.MAC == "" {
		b := make([]byte, 3)
		_, _ = rand.Read(b)
		s.MAC = fmt.Sprintf("fa:16:3e:%02x:%02x:%02x", b[0], b[1], b[2])
	}
	s.VIFType, s.Phase = c.vif, v1alpha1.PortActive
	say(v1alpha1.ConditionReady, true, "Active", "the provider has the port")
	if p.Spec.Node == "" {
		meta.RemoveStatusCondition(&s.Conditions, v1alpha1.ConditionWired)
		return
	}
	if !c.deaf[p.Spec.Node] && c.wire(p) == nil {
		say(v1alpha1.ConditionWired, true, "Wired", "")
	} else {
		say(v1alpha1.ConditionWired, false, "NotWired", "Neutron says DOWN: the L2 agent of host "+p.Spec.Node+" has not wired it yet")
	}
}

func uuid() string {
	b := make([]byte, 16)
	_, _ = rand.Read(b)
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

func (c *cloud) wire(p *v1alpha1.Port) error {
	mac, err := net.ParseMAC(p.Status.MAC)
	if err != nil {
		return err
	}
	return c.carriers[p.Namespace].Plug(c.w.nodes[p.Spec.Node].Node, "tap"+p.Status.ProviderPortID[:11], mac, addresses(p.Spec.Addresses))
}

// neutron makes a tenant whose Network Neutron carries.
func (c *cloud) neutron(name string, number int) *v1alpha1.Network {
	c.w.t.Helper()
	carrier := c.w.rig.Carrier(name, number)
	n := c.w.tenant(name, 0, "192.168.0.0/24", "fd00:1::/64")
	n.Status.Provider, n.Status.VNI, n.Status.MTU = provider.Neutron, 0, edgetest.MTU
	n.Status.Subnets[1].Gateway = "fd00:1::1"
	c.w.status(n)
	c.set(func() { c.carriers[n.Namespace] = carrier })
	c.w.bind(n, name+"-web")
	return n
}

// gone waits until a Port is.
func (w *world) gone(key client.ObjectKey) {
	w.t.Helper()
	eventually(w.t, "port "+key.String()+" is gone", func() error {
		err := w.api.Get(w.t.Context(), key, &v1alpha1.Port{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("it is there: %v", err)
	})
}

func (w *world) portOf(home string, pod *testPod) *v1alpha1.Port {
	w.t.Helper()
	all := &v1alpha1.PortList{}
	if err := w.api.List(w.t.Context(), all, client.InNamespace(home)); err != nil {
		w.t.Fatal(err)
	}
	for i := range all.Items {
		if r := all.Items[i].Spec.Pod; r != nil && r.UID == string(pod.UID) && all.Items[i].DeletionTimestamp == nil {
			return &all.Items[i]
		}
	}
	return nil
}

func (n *testNode) taps() []string {
	n.w.t.Helper()
	out, err := exec.Command("nsenter", "--net="+n.NS.Path(), "sh", "-c", "ip -o link | sed 's/^[0-9]*: //; s/[@:].*//' | grep ^tap || true").Output()
	if err != nil {
		n.w.t.Fatal(err)
	}
	return strings.Fields(string(out))
}

// recorder is a Wirer that remembers.
type recorder struct {
	mu  sync.Mutex
	got []string
}

func (r *recorder) note(what string, v VIF) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if v.Type == vifOVS {
		r.got = append(r.got, what+" "+v.Name+" "+v.Port)
	}
	return nil
}

func (r *recorder) Plug(_ context.Context, v VIF) error   { return r.note("plug", v) }
func (r *recorder) Unplug(_ context.Context, v VIF) error { return r.note("unplug", v) }

// Pods on Networks that Neutron carries: the controller's and the agents' part is the
// test's.
func TestNeutron(t *testing.T) {
	plugs := &recorder{}
	patience := Patience{Made: time.Minute, Wired: time.Minute}
	w := newWorld(t, 2, func(p *Parts) { p.Patience, p.Wirer = patience, plugs })
	done := make(chan struct{})
	var wg sync.WaitGroup
	t.Cleanup(func() { close(done); wg.Wait() })
	c := newCloud(w, done, &wg)
	red, blue := c.neutron("red", 1), c.neutron("blue", 2)
	one, two := w.nodes[w.rig.Nodes[0].Name], w.nodes[w.rig.Nodes[1].Name]
	edgetest.Echo(t, w.rig.Outside, "outside", "[::]:80")
	at := func(a string) map[string]string { return map[string]string{v1alpha1.AnnotationAddress: a} }
	r5, b5 := w.pod(0, "red-web", "five", at("192.168.0.5")), w.pod(0, "blue-web", "five", at("192.168.0.5"))
	r6, b6 := w.pod(1, "red-web", "six", at("192.168.0.6")), w.pod(1, "blue-web", "six", at("192.168.0.6"))

	t.Run("one address twice", func(t *testing.T) {
		for _, p := range []*testPod{r5, b5} {
			answers(t, p, "192.168.0.6:80", p.Namespace+"/six 192.168.0.5")
		}
		for i, p := range []*testPod{r6, b6} {
			answers(t, p, "192.168.0.5:80", p.Namespace+"/five 192.168.0.6")
			answers(t, p, "100.64.0.200:80", fmt.Sprintf("outside 100.64.0.10%d", i+1))
			port := w.portOf([]string{red.Namespace, blue.Namespace}[i], p)
			if port.Spec.MAC != "" || port.Status.MAC != p.answer.Interfaces[0].Mac || !controllerutil.ContainsFinalizer(port, v1alpha1.FinalizerProvider) {
				t.Errorf("port %+v, interface %v", port, p.answer.Interfaces[0])
			}
			if taps := two.taps(); len(taps) != 2 || !slices.Contains(taps, "tap"+port.Status.ProviderPortID[:11]) {
				t.Errorf("uplinks %v, port %s", taps, port.Status.ProviderPortID)
			}
			if _, err := two.cni.Check(t.Context(), p.request); err != nil {
				t.Error(err)
			}
		}
		svc := w.service("red-web", "s", r6)
		answers(t, r5, svc.Spec.ClusterIP+":8080", "red-web/six 192.168.0.5")
		edgetest.Refuse(t, b5.ns, "tcp", svc.Spec.ClusterIP+":8080")
	})

	t.Run("an address somebody has at the provider", func(t *testing.T) {
		var mu sync.Mutex
		refused := map[string]bool{}
		c.set(func() {
			c.taken = func(a string) bool {
				mu.Lock()
				defer mu.Unlock()
				if len(refused) < 2 && a != "192.168.0.5" && a != "192.168.0.6" {
					refused[a] = true
				}
				return refused[a] || a == "192.168.0.77"
			}
		})
		p := w.pod(0, "red-web", "any", nil)
		if refused[p.ip] || len(refused) != 2 {
			t.Errorf("%s of %v", p.ip, refused)
		}
		for a := range refused {
			w.gone(client.ObjectKey{Namespace: red.Namespace, Name: v1alpha1.PortName("default", a)})
		}
		answers(t, r6, p.ip+":80", "red-web/any 192.168.0.6")
		// One that was asked for is not exchanged.
		q := w.newPod(0, "red-web", "asked", at("192.168.0.77"))
		if err := q.add(t.Context()); err == nil {
			t.Error("it has an address that somebody has")
		}
		w.event("red-web", "asked", v1alpha1.ReasonAddressInUse)
		w.gone(client.ObjectKey{Namespace: red.Namespace, Name: "default.192-168-0-77"})
		c.set(func() { c.taken = func(string) bool { return false } })
		if err := q.add(t.Context()); err != nil {
			t.Error(err)
		}
		for _, x := range []*testPod{p, q} {
			if _, err := one.cni.Del(t.Context(), x.request); err != nil {
				t.Error(err)
			}
		}
		w.gone(client.ObjectKey{Namespace: red.Namespace, Name: "default.192-168-0-77"})
	})

	t.Run("a node nobody can bind to, an agent that is dead", func(t *testing.T) {
		before := one.taps()
		was := patience
		anew := func(wired time.Duration) { one.stop(); patience.Wired = wired; one.start() }
		anew(time.Second) // it is not going to be wired
		p := w.newPod(0, "red-web", "late", nil)
		for what, broken := range map[string]map[string]bool{v1alpha1.ReasonBindingFailed: c.unbound, "NotWired": c.deaf} {
			c.set(func() { broken[one.Name] = true })
			eventually(t, what, func() error { // on a slow machine its controller has not said why at first
				err := p.add(t.Context())
				if err == nil {
					t.Fatalf("%s: it is plugged", what)
				}
				if !strings.Contains(err.Error(), "agent") {
					return err
				}
				return nil
			})
			w.event("red-web", "late", what)
			if got := one.taps(); len(got) != len(before) {
				t.Errorf("%s: uplinks %v, before %v", what, got, before)
			}
			c.set(func() { delete(broken, one.Name) })
		}
		anew(was.Wired)
		if err := p.add(t.Context()); err != nil {
			t.Error(err)
		}
		if _, err := one.cni.Del(t.Context(), p.request); err != nil {
			t.Error(err)
		}
		answers(t, r6, "192.168.0.5:80", "red-web/five 192.168.0.6") // who was there goes on
	})

	t.Run("a new process, another port", func(t *testing.T) {
		conn, err := r5.ns.DialContext(t.Context(), "tcp", "192.168.0.6:80")
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		one.stop()
		one.start()
		if _, err := one.cni.Check(t.Context(), r5.request); err != nil {
			t.Error(err)
		}
		if got, err := edgetest.Again(conn); err != nil || got != "red-web/six 192.168.0.5" {
			t.Errorf("a connection from before: %q, %v", got, err)
		}
		// Somebody deleted it at Neutron, and the controller made another.
		port := w.portOf(red.Namespace, r5)
		was, now := port.Status.ProviderPortID, uuid()
		old := port.DeepCopy()
		port.Status.ProviderPortID = now
		if err := w.api.Status().Patch(t.Context(), port, client.MergeFrom(old)); err != nil {
			t.Fatal(err)
		}
		eventually(t, "it is plugged anew", func() error {
			taps := one.taps()
			if slices.Contains(taps, "tap"+was[:11]) || !slices.Contains(taps, "tap"+now[:11]) {
				return fmt.Errorf("uplinks %v, want %s", taps, now)
			}
			_, err := one.cni.Check(t.Context(), r5.request)
			return err
		})
		answers(t, r5, "192.168.0.6:80", "red-web/six 192.168.0.5")
		answers(t, r6, "192.168.0.5:80", "red-web/five 192.168.0.6")
	})

	t.Run("claimed beforehand", func(t *testing.T) {
		w.create(&v1alpha1.Port{
			ObjectMeta: metav1.ObjectMeta{Namespace: red.Namespace, Name: "default.192-168-0-50"},
			Spec:       v1alpha1.PortSpec{Network: "default", Addresses: []string{"192.168.0.50"}, Retain: true},
		})
		var id string
		for i := range 2 {
			p := w.pod(i, "red-web", fmt.Sprint("kept", i), at("port/default.192-168-0-50"))
			answers(t, r6, "192.168.0.50:80", fmt.Sprintf("red-web/kept%d 192.168.0.6", i))
			port := w.portOf(red.Namespace, p)
			if id == "" {
				id = port.Status.ProviderPortID
			}
			if port.Status.ProviderPortID != id {
				t.Errorf("another port at the provider: %s, was %s", port.Status.ProviderPortID, id)
			}
			if _, err := p.node.cni.Del(t.Context(), p.request); err != nil {
				t.Error(err)
			}
		}
	})

	t.Run("Open vSwitch", func(t *testing.T) {
		c.set(func() { c.vif = vifOVS })
		defer c.set(func() { c.vif = vifBridge })
		p := w.pod(0, "blue-web", "ovs", nil)
		port := w.portOf(blue.Namespace, p)
		answers(t, b6, p.ip+":80", "blue-web/ovs 192.168.0.6")
		if _, err := one.cni.Del(t.Context(), p.request); err != nil {
			t.Error(err)
		}
		id := port.Status.ProviderPortID
		plugs.mu.Lock()
		defer plugs.mu.Unlock()
		for _, want := range []string{"plug tap" + id[:11] + " " + id, "unplug tap" + id[:11] + " " + id} {
			if !slices.Contains(plugs.got, want) {
				t.Errorf("not %q but %q", want, plugs.got)
			}
		}
	})

	t.Run("gone", func(t *testing.T) {
		// The controller is away: the Pod goes, its Port stays until it is back.
		c.set(func() { c.away = true })
		for _, p := range []*testPod{r5, b5} {
			if _, err := one.cni.Del(t.Context(), p.request); err != nil {
				t.Error(err)
			}
		}
		if taps := one.taps(); len(taps) != 0 {
			t.Errorf("uplinks left: %v", taps)
		}
		key := client.ObjectKey{Namespace: red.Namespace, Name: "default.192-168-0-5"}
		port := &v1alpha1.Port{}
		if err := w.api.Get(t.Context(), key, port); err != nil || port.DeletionTimestamp == nil {
			t.Errorf("port %v, %v", port, err)
		}
		edgetest.Refuse(t, r6.ns, "tcp", "192.168.0.5:80")
		c.set(func() { c.away = false })
		w.gone(key)
		if _, err := two.cni.GC(t.Context(), &api.GCRequest{}); err != nil {
			t.Error(err)
		}
		if taps := two.taps(); len(taps) != 0 {
			t.Errorf("uplinks left: %v", taps)
		}
		eventually(t, "no edge is left", func() error {
			for _, n := range w.nodes {
				if ids, err := n.d.edges.List(); err != nil || len(ids) != 0 {
					return fmt.Errorf("%s: %v, %v", n.Name, ids, err)
				}
			}
			return nil
		})
	})
}

// TestNeutronCrash kills kubestack at the steps of ADD and DEL of such a Pod. What the runtime
// then does sets everything right, whatever the order, and nobody else notices.
func TestNeutronCrash(t *testing.T) {
	w := newWorld(t, 2)
	done := make(chan struct{})
	var wg sync.WaitGroup
	t.Cleanup(func() { close(done); wg.Wait() })
	c := newCloud(w, done, &wg)
	red := c.neutron("red", 1)
	n := w.nodes[w.rig.Nodes[1].Name]
	n.stop()
	kubeconfig := controlplane.Kubeconfig(t, controlplane.As(w.cfg, "h8s:kubestack:"+n.Name, "h8s:kubestacks", "system:authenticated"))
	dead := n.spawn(kubeconfig)
	n.dial()
	n.ready()
	near, far := w.pod(0, "red-web", "near", nil), w.pod(1, "red-web", "far", nil)
	answers(t, near, far.ip+":80", "red-web/far "+near.ip)
	conn, err := near.ns.DialContext(t.Context(), "tcp", far.ip+":80")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	crash := func(t *testing.T, step string, f func() error) {
		if err := os.WriteFile(trap(n.dir).file(), []byte(step), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := f(); err == nil {
			t.Fatal("the call was answered")
		}
		select {
		case <-dead:
		case <-time.After(time.Minute):
			t.Fatal("it was not killed: the step did not come")
		}
		n.stop()
		dead = n.spawn(kubeconfig)
		n.ready()
	}
	clean := func(t *testing.T) {
		eventually(t, "nothing is left", func() error {
			all := &v1alpha1.PortList{}
			if err := w.api.List(t.Context(), all, client.InNamespace(red.Namespace)); err != nil {
				return err
			}
			if taps := n.taps(); len(all.Items) != 2 || len(taps) != 1 {
				return fmt.Errorf("%d Ports, uplinks %v", len(all.Items), taps)
			}
			return nil
		})
		if got, err := edgetest.Again(conn); err != nil || got != "red-web/far "+near.ip {
			t.Errorf("an established connection: %q, %v", got, err)
		}
	}
	for i, step := range []string{"claimed", "attached", "plugged", "up"} {
		t.Run("ADD/"+step, func(t *testing.T) {
			first := w.newPod(1, "red-web", "add-"+step, map[string]string{v1alpha1.AnnotationAddress: "192.168.0.77"})
			crash(t, step, func() error { return first.add(t.Context()) })
			second := first.next(2)
			if i%2 == 0 {
				if err := first.del(t.Context()); err != nil {
					t.Error(err)
				}
			}
			eventually(t, "ADD of the second sandbox", func() error { return second.add(t.Context()) })
			edgetest.Echo(t, second.ns, "second", second.ip+":80")
			answers(t, near, second.ip+":80", "second "+near.ip)
			if i%2 == 1 {
				if err := first.del(t.Context()); err != nil {
					t.Error(err)
				}
			}
			answers(t, far, second.ip+":80", "second "+far.ip)
			if _, err := n.cni.Check(t.Context(), second.request); err != nil {
				t.Error(err)
			}
			second.onePort()
			if err := second.del(t.Context()); err != nil {
				t.Error(err)
			}
			clean(t)
		})
	}
	for _, step := range []string{"unplugged", "detached", "released"} {
		t.Run("DEL/"+step, func(t *testing.T) {
			p := w.pod(1, "red-web", "del-"+step, nil)
			crash(t, step, func() error { return p.del(t.Context()) })
			for range 2 {
				if err := p.del(t.Context()); err != nil {
					t.Error(err)
				}
			}
			clean(t)
		})
	}
}
