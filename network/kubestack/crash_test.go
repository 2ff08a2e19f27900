package kubestack

import (
	"context"
	"errors"
	"fmt"
	"io"
	gomaps "maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/log"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	api "github.com/hypernetes/hypernetes/api/kubestack/v1"
	"github.com/hypernetes/hypernetes/network/edge"
	"github.com/hypernetes/hypernetes/network/edge/edgetest"
	"github.com/hypernetes/hypernetes/network/netns"
	"github.com/hypernetes/hypernetes/network/policy"
	"github.com/hypernetes/hypernetes/network/probe"
	"github.com/hypernetes/hypernetes/network/service"
	"github.com/hypernetes/hypernetes/test/controlplane"
)

// In the environment of a child: the node's network namespace and its directory of edges.
const (
	childNS    = "H8S_KUBESTACK_NS"
	childEdges = "H8S_KUBESTACK_EDGES"
)

func TestMain(m *testing.M) {
	if os.Getenv(childNS) != "" {
		if err := child(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// child is a kubestack in a process of its own, which can be killed.
func child(args []string) error {
	opts, err := Parse(args)
	if err != nil {
		return err
	}
	_ = log.SetLevel("warn")
	c, err := connect(opts.Kubeconfig)
	if err != nil {
		return err
	}
	ns, err := netns.Open(os.Getenv(childNS))
	if err != nil {
		return err
	}
	m, err := edge.New(edge.Config{Dir: os.Getenv(childEdges), Node: opts.NodeIP, VXLANPort: opts.VXLANPort, NS: ns})
	if err != nil {
		return err
	}
	at := trap(opts.RunDir)
	d, err := New(opts, Parts{API: trappedAPI{c, at}, Edges: trappedEdges{edges{m}, at}, Plane: trappedPlane{plane{}, at}, Routes: hostRoutes{ns}, Prober: probe.Run, Wirer: trappedWirer{at}})
	if err != nil {
		return err
	}
	return d.Run(context.Background())
}

// trappedWirer has nothing to do: the agents find uplinks by their names.
type trappedWirer struct{ at trap }

func (w trappedWirer) Plug(context.Context, VIF) error   { return w.at.done("plugged", nil) }
func (w trappedWirer) Unplug(context.Context, VIF) error { return w.at.done("unplugged", nil) }

// trap kills the process at the step that its directory's file names, once.
type trap string

func (t trap) file() string { return filepath.Join(string(t), "trap") }

func (t trap) step(name string) {
	if want, err := os.ReadFile(t.file()); err == nil && string(want) == name {
		_ = os.Remove(t.file())
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
}

// done is a step that was done.
func (t trap) done(name string, err error) error {
	if err == nil {
		t.step(name)
	}
	return err
}

type trappedAPI struct {
	client.WithWatch
	at trap
}

func (a trappedAPI) Create(ctx context.Context, o client.Object, opts ...client.CreateOption) error {
	err := a.WithWatch.Create(ctx, o, opts...)
	if _, ok := o.(*v1alpha1.Port); ok {
		return a.at.done("claimed", err)
	}
	return err
}

func (a trappedAPI) Delete(ctx context.Context, o client.Object, opts ...client.DeleteOption) error {
	return a.at.done("released", a.WithWatch.Delete(ctx, o, opts...))
}

func (a trappedAPI) Status() client.SubResourceWriter {
	return trappedStatus{a.WithWatch.Status(), a.at}
}

type trappedStatus struct {
	client.SubResourceWriter
	at trap
}

func (s trappedStatus) Patch(ctx context.Context, o client.Object, p client.Patch, opts ...client.SubResourcePatchOption) error {
	return s.at.done("active", s.SubResourceWriter.Patch(ctx, o, p, opts...))
}

type trappedEdges struct {
	Edges
	at trap
}

func (e trappedEdges) Ensure(ctx context.Context, s edge.Spec) (Edge, error) {
	e.at.step("recorded")
	got, err := e.Edges.Ensure(ctx, s)
	return e.trapped(got, e.at.done("ensured", err))
}

func (e trappedEdges) Get(id string) (Edge, error) { return e.trapped(e.Edges.Get(id)) }

func (e trappedEdges) trapped(got Edge, err error) (Edge, error) {
	if err != nil {
		return nil, err
	}
	return trappedEdge{got, e.at}, nil
}

func (e trappedEdges) Remove(ctx context.Context, id string) error {
	e.at.step("remove")
	return e.Edges.Remove(ctx, id)
}

type trappedEdge struct {
	Edge
	at trap
}

func (e trappedEdge) Attach(ctx context.Context, a edge.Attachment) error {
	return e.at.done("attached", e.Edge.Attach(ctx, a))
}

func (e trappedEdge) Up(ctx context.Context, link string) error {
	return e.at.done("up", e.Edge.Up(ctx, link))
}

func (e trappedEdge) Detach(ctx context.Context, link string) error {
	return e.at.done("detached", e.Edge.Detach(ctx, link))
}

type trappedPlane struct {
	Plane
	at trap
}

type trappedPolicies struct {
	Policies
	at trap
}

type trappedServices struct {
	Services
	at trap
}

func (p trappedPlane) Policies(ns *netns.NS) (Policies, error) {
	t, err := p.Plane.Policies(ns)
	return trappedPolicies{t, p.at}, err
}

func (p trappedPolicies) Sync(ctx context.Context, s policy.State) error {
	return p.at.done("policies", p.Policies.Sync(ctx, s))
}

func (p trappedPlane) Services(ns *netns.NS, o service.Options) (Services, error) {
	t, err := p.Plane.Services(ns, o)
	return trappedServices{t, p.at}, err
}

func (p trappedServices) Sync(ctx context.Context, all []service.Service) (service.Stats, error) {
	stats, err := p.Services.Sync(ctx, all)
	return stats, p.at.done("services", err)
}

// spawn runs the node's daemon as a process of its own; stop kills it. It returns what is
// closed once the process is dead.
func (n *testNode) spawn(kubeconfig string) (dead chan struct{}) {
	t := n.w.t
	t.Helper()
	cmd := exec.Command(os.Args[0], append(n.flags(), "--kubeconfig", kubeconfig)...)
	cmd.Env = append(os.Environ(), childNS+"="+n.NS.Path(), childEdges+"="+n.Dir)
	cmd.Stderr = t.Output()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started, dead := make(chan error, 1), make(chan struct{})
	// The death signal comes when the thread that started it ends: this one stays.
	go func() {
		defer close(dead)
		runtime.LockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	n.stop = sync.OnceFunc(func() {
		_ = cmd.Process.Kill()
		<-dead
	})
	return dead
}

// dial connects to whoever serves the node's socket at the time.
func (n *testNode) dial() {
	conn := n.connect()
	n.w.t.Cleanup(func() { _ = conn.Close() })
}

// connect makes the connection, which tries again soon when nobody serves the socket yet.
func (n *testNode) connect() *grpc.ClientConn {
	t := n.w.t
	t.Helper()
	soon := grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 10 * time.Millisecond, Multiplier: 1.2, MaxDelay: 100 * time.Millisecond}, MinConnectTimeout: time.Second}
	conn, err := grpc.NewClient("unix:"+filepath.Join(n.dir, "kubestack.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithConnectParams(soon))
	if err != nil {
		t.Fatal(err)
	}
	n.cni = api.NewKubestackClient(conn)
	return conn
}

func (n *testNode) ready() {
	n.w.t.Helper()
	eventually(n.w.t, n.Name+" is ready", func() error {
		_, err := n.cni.Status(n.w.t.Context(), &api.StatusRequest{})
		return err
	})
}

// Counters, what the kernel learns by itself, and numbers it gives out.
var fleeting = regexp.MustCompile(`counter packets \d+ bytes \d+|expires \S+|^\d+: |@if\d+|link-netns \S+|link-netnsid \d+|qdisc.*|# handle \d+`)

// stock is everything of tenants' Networks that a node and the cluster have.
func (n *testNode) stock() []string {
	t := n.w.t
	t.Helper()
	var out []string
	add := func(what, line string) { out = append(out, what+": "+line) }
	entries, err := os.ReadDir(n.Dir)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{"node": n.NS.Path()}
	for _, e := range entries {
		add("edge", e.Name())
		all["edge "+e.Name()] = filepath.Join(n.Dir, e.Name())
	}
	for what, path := range all {
		for _, command := range []string{
			"ip -o link", "ip -o addr", "ip rule", "ip -6 rule", "ip route show table all", "ip -6 route show table all",
			"ip neigh show nud permanent", "ip neigh show proxy", "ip -6 neigh show proxy", "bridge fdb show", "nft list ruleset",
		} {
			text, err := exec.Command("nsenter", append([]string{"--net=" + path}, strings.Fields(command)...)...).CombinedOutput()
			if err != nil {
				add(what+" "+command, err.Error()) // it may be going just now
			}
			for line := range strings.Lines(string(text)) {
				add(what+" "+command, strings.TrimSpace(fleeting.ReplaceAllString(line, "")))
			}
		}
	}
	files, err := os.ReadDir(filepath.Join(n.dir, "attachments"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		add("attachment", f.Name())
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); strings.HasPrefix(f[4], n.Dir) {
			add("mount", f[4])
		}
	}
	ports := &v1alpha1.PortList{}
	if err := n.w.api.List(t.Context(), ports); err != nil {
		t.Fatal(err)
	}
	for _, p := range ports.Items {
		add("port", fmt.Sprintf("%s/%s of %v on %s", p.Namespace, p.Name, p.Spec.Pod, p.Spec.Node))
	}
	slices.Sort(out)
	return out
}

// settled is the stock once it does not change by itself any more: the kernel looks for
// duplicates of addresses and takes carriers into account when it comes to it.
func (n *testNode) settled() []string {
	n.w.t.Helper()
	var out []string
	eventually(n.w.t, "nothing changes any more", func() error {
		was := out
		out = n.stock()
		if slices.Equal(was, out) && !slices.ContainsFunc(out, func(l string) bool { return strings.Contains(l, " tentative ") }) {
			return nil
		}
		return errors.New("it does")
	})
	return out
}

// asBefore waits until there is what there was, no more and no less.
func (n *testNode) asBefore(before []string) {
	n.w.t.Helper()
	eventually(n.w.t, "everything is as before", func() error {
		after := n.stock()
		count := map[string]int{}
		for _, l := range after {
			count[l]++
		}
		for _, l := range before {
			count[l]--
		}
		var odd []string
		for _, l := range slices.Sorted(gomaps.Keys(count)) {
			if count[l] != 0 {
				odd = append(odd, fmt.Sprintf("%+d %s", count[l], l))
			}
		}
		if odd != nil {
			return errors.New("not as before:\n" + strings.Join(odd, "\n"))
		}
		return nil
	})
}

// next is the Pod's next sandbox, as the kubelet makes one after an ADD that failed.
func (p *testPod) next(number int) *testPod {
	out := *p
	out.ns = p.node.w.rig.Namespace(fmt.Sprintf("%s-%s-%d", p.Namespace, p.Name, number))
	q := p.request
	out.request = &api.AttachRequest{
		ContainerId: fmt.Sprintf("%s-%d", p.UID, number), Netns: out.ns.Path(), Interface: q.Interface,
		PodNamespace: q.PodNamespace, PodName: q.PodName, PodUid: q.PodUid,
	}
	return &out
}

func (p *testPod) del(ctx context.Context) error {
	_, err := p.node.cni.Del(ctx, p.request)
	return err
}

// ports are the sandboxes of the Pod's Ports.
func (p *testPod) ports() []string {
	p.node.w.t.Helper()
	all := &v1alpha1.PortList{}
	if err := p.node.w.api.List(context.Background(), all); err != nil {
		p.node.w.t.Fatal(err)
	}
	var out []string
	for _, o := range all.Items {
		if o.Spec.Pod != nil && o.Spec.Pod.UID == string(p.UID) {
			out = append(out, o.Spec.Pod.Sandbox)
		}
	}
	return out
}

func (p *testPod) onePort() {
	p.node.w.t.Helper()
	eventually(p.node.w.t, p.Name+" has one Port", func() error {
		if got := p.ports(); len(got) != 1 || got[0] != p.request.ContainerId {
			return fmt.Errorf("those of sandboxes %v, want %s", got, p.request.ContainerId)
		}
		return nil
	})
}

// TestCrash kills kubestack at each step of ADD and DEL, and at any time. What the runtime
// then does sets everything right, and an established connection notices nothing.
func TestCrash(t *testing.T) {
	w := newWorld(t, 2)
	red, blue := w.tenant("red", 5001, "10.0.0.0/24"), w.tenant("blue", 5002, "10.0.0.0/24")
	w.bind(red, "red-web")
	w.bind(blue, "blue-web")
	n := w.nodes[w.rig.Nodes[1].Name]
	n.stop()
	kubeconfig := controlplane.Kubeconfig(t, controlplane.As(w.cfg, "h8s:kubestack:"+n.Name, "h8s:kubestacks", "system:authenticated"))
	dead := n.spawn(kubeconfig)
	n.dial()
	n.ready()

	near, far, peer := w.pod(0, "red-web", "near", nil), w.pod(1, "red-web", "far", nil), w.pod(0, "blue-web", "peer", nil)
	svc := w.service("red-web", "s", far)
	var connections []io.Closer
	defer func() {
		for _, c := range connections {
			_ = c.Close()
		}
	}()
	var unharmed []func() error
	for _, address := range []string{far.ip + ":80", svc.Spec.ClusterIP + ":8080"} {
		answers(t, near, address, "red-web/far "+near.ip)
		c, err := near.ns.DialContext(t.Context(), "tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		connections = append(connections, c)
		unharmed = append(unharmed, func() error { _, err := edgetest.Again(c); return err })
	}
	check := func() {
		t.Helper()
		for _, f := range unharmed {
			if err := f(); err != nil {
				t.Fatalf("an established connection: %v", err)
			}
		}
	}
	check()
	before := n.settled()
	// Nobody else is on blue's Network on this node: its edge comes and goes each time.
	run := func(step string, f func(t *testing.T)) {
		t.Run(step, func(t *testing.T) {
			was := w.t
			w.t = t
			defer func() { w.t = was }()
			f(t)
			check()
			n.asBefore(before)
		})
		if t.Failed() {
			t.FailNow()
		}
	}
	arm := func(step string) {
		if err := os.WriteFile(trap(n.dir).file(), []byte(step), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	again := func(t *testing.T) {
		select {
		case <-dead:
		case <-time.After(time.Minute):
			t.Fatal("it was not killed: the step did not come")
		}
		n.stop()
		w.t, dead = t, n.spawn(kubeconfig)
		w.t = t
		n.ready()
	}

	for i, step := range []string{"claimed", "recorded", "ensured", "policies", "services", "attached", "up", "active"} {
		run("ADD/"+step, func(t *testing.T) {
			var asked map[string]string
			if i%2 == 1 { // the next sandbox wants the same address
				asked = map[string]string{v1alpha1.AnnotationAddress: "10.0.0.77"}
			}
			first := w.newPod(1, "blue-web", "add-"+step, asked)
			arm(step)
			if err := first.add(t.Context()); err == nil {
				t.Fatal("ADD was answered")
			}
			again(t)
			second := first.next(2)
			end := func() {
				if err := first.del(t.Context()); err != nil {
					t.Errorf("DEL of the first sandbox: %v", err)
				}
			}
			switch i % 3 {
			case 0: // the runtime cleans up, then the kubelet makes another sandbox
				end()
				eventually(t, "ADD of the second sandbox", func() error { return second.add(t.Context()) })
			case 1: // the other way round
				eventually(t, "ADD of the second sandbox", func() error { return second.add(t.Context()) })
				end()
			case 2: // nobody speaks of the first one any more
				eventually(t, "ADD of the second sandbox", func() error { return second.add(t.Context()) })
				valid := []*api.Attachment{{ContainerId: second.request.ContainerId, Interface: "eth0"}, {ContainerId: far.request.ContainerId, Interface: "eth0"}}
				if _, err := n.cni.GC(t.Context(), &api.GCRequest{Valid: valid}); err != nil {
					t.Fatal(err)
				}
			}
			edgetest.Echo(t, second.ns, "second", second.ip+":80")
			answers(t, peer, second.ip+":80", "second "+peer.ip)
			if _, err := n.cni.Check(t.Context(), second.request); err != nil {
				t.Errorf("CHECK: %v", err)
			}
			second.onePort()
			if err := second.del(t.Context()); err != nil {
				t.Errorf("DEL: %v", err)
			}
		})
	}
	for _, step := range []string{"detached", "released", "remove"} {
		run("DEL/"+step, func(t *testing.T) {
			p := w.pod(1, "blue-web", "del-"+step, nil)
			arm(step)
			if err := p.del(t.Context()); err == nil && step != "remove" {
				t.Fatal("DEL was answered")
			}
			again(t)
			for range 2 {
				if err := p.del(t.Context()); err != nil {
					t.Errorf("DEL: %v", err)
				}
			}
		})
	}
	run("any time", func(t *testing.T) {
		var wg sync.WaitGroup
		stop := atomic.Bool{}
		rounds, last := make([]int, 4), make([]*testPod, 4)
		for i := range last {
			pods := []*testPod{}
			base := w.newPod(1, []string{"red-web", "blue-web"}[i%2], fmt.Sprint("any-", i), nil)
			for k := range 40 {
				pods = append(pods, base.next(k))
			}
			wg.Go(func() {
				// As the kubelet does: each try has a sandbox of its own, and the former goes
				// when it can.
				for k, p := range pods {
					last[i] = p
					ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
					err := retry(ctx, func() error { return p.once((*testPod).add) })
					if err == nil && stop.Load() {
						cancel()
						return
					}
					err = retry(ctx, func() error { return p.once((*testPod).del) })
					cancel()
					if err != nil {
						t.Errorf("%s: %v", p.Name, err)
						return
					}
					rounds[i] = k + 1
				}
			})
		}
		for i := range 8 {
			time.Sleep(time.Duration(20+37*i) * time.Millisecond) // any time will do
			n.stop()
			dead = n.spawn(kubeconfig)
			n.ready()
			check()
		}
		stop.Store(true)
		wg.Wait()
		t.Logf("sandboxes that came and went: %v", rounds)
		for i, p := range last {
			if rounds[i] == 40 {
				continue
			}
			p.onePort()
			if _, err := n.cni.Check(t.Context(), p.request); err != nil {
				t.Errorf("CHECK: %v", err)
			}
			if err := p.del(t.Context()); err != nil {
				t.Errorf("DEL: %v", err)
			}
		}
	})
	run("lost claim", func(t *testing.T) { lostClaim(t, w, n, blue) })
}

func retry(ctx context.Context, f func() error) error {
	var err error
	if !poll(ctx, func() bool { err = f(); return err == nil }) {
		return err
	}
	return nil
}

// once is a call over the connection of the time.
func (p *testPod) once(f func(*testPod, context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	return f(p, ctx)
}

// lostClaim: a Port whose sandbox nobody knows goes although its Pod lives, and one whose
// call is under way does not.
func lostClaim(t *testing.T, w *world, n *testNode, network *v1alpha1.Network) {
	n.stop()
	w.nodes[n.Name].start()
	defer n.stop()
	pod := w.newPod(1, "blue-web", "lost", nil)
	port := &v1alpha1.Port{
		ObjectMeta: metav1.ObjectMeta{Namespace: network.Namespace, Name: "default.10-0-0-66", Labels: map[string]string{v1alpha1.LabelNetwork: "default"}},
		Spec: v1alpha1.PortSpec{
			Network: "default", Addresses: []string{"10.0.0.66"}, Node: n.Name,
			Pod: &v1alpha1.PodRef{Namespace: "blue-web", Name: "lost", UID: string(pod.UID), Sandbox: "gone", Interface: "eth0"},
		},
	}
	w.create(port)
	unlock := n.d.calls.lock("gone")
	n.d.lost.Store(true)
	n.d.reclaim(t.Context())
	if len(pod.ports()) != 1 || !n.d.lost.Load() {
		t.Error("the Port of a call under way was taken away")
	}
	unlock()
	n.d.reclaim(t.Context())
	if got := pod.ports(); len(got) != 0 {
		t.Errorf("Ports of sandboxes %v", got)
	}
}
