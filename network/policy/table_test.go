package policy

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	vnetns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/hypernetes/hypernetes/network/netns"
)

// rig is an edge with Pods around it, all in namespaces of their own.
type rig struct {
	t    testing.TB
	edge *netns.NS
	pods map[string]*netns.NS
	s    State
}

var rigPorts = []uint16{80, 81, 82}

// newRig makes x/a, x/b, y/a and z/a; out is a link of the edge that no Pod has, with
// 8.8.8.8 behind it. All sockets are used from one processor, so that packets of one path
// stay in order.
func newRig(t testing.TB) *rig {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	dir := t.TempDir()
	make := func(name string) *netns.NS {
		path := filepath.Join(dir, name)
		n, err := netns.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { n.Close(); netns.Remove(path) })
		return n
	}
	r := &rig{t: t, edge: make("edge"), pods: map[string]*netns.NS{}, s: State{Namespaces: map[string]map[string]string{}}}
	r.do(r.edge, func() error {
		for _, f := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
			if err := os.WriteFile("/proc/sys/net/"+f, []byte("1"), 0); err != nil {
				return err
			}
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		for _, a := range []string{"10.0.0.1/32", "fd00::1/128"} { // the resolver, say
			addr, _ := netlink.ParseAddr(a)
			if err := netlink.AddrAdd(lo, addr); err != nil {
				return err
			}
		}
		return netlink.LinkSetUp(lo)
	})
	for i, key := range []string{"x/a", "x/b", "y/a", "z/a", "out"} {
		n := make(strings.ReplaceAll(key, "/", "-"))
		r.pods[key] = n
		v4, v6 := netip.AddrFrom4([4]byte{10, 0, byte(i), 10}), netip.MustParseAddr(fmt.Sprintf("fd00::%d:10", i))
		if key == "out" {
			v4, v6 = netip.MustParseAddr("8.8.8.8"), netip.MustParseAddr("2001:db8::8")
		}
		link := fmt.Sprint("p", i)
		r.plug(n, link, v4, v6)
		ns, name, ok := strings.Cut(key, "/")
		if !ok {
			continue
		}
		p := Pod{Namespace: ns, Name: name, Labels: map[string]string{"pod": name}, Addresses: []netip.Addr{v4, v6}, Links: []string{link},
			Ports: []NamedPort{{"web", unix.IPPROTO_TCP, 80}, {"web", unix.IPPROTO_UDP, 81}}}
		if i == 1 {
			p.Ports[0].Port = 82
		}
		r.s.Pods = append(r.s.Pods, p)
		r.s.Namespaces[ns] = map[string]string{"ns": ns}
	}
	r.sync(r.openTable()) // the table is what makes the kernel track connections
	return r
}

func (r *rig) do(n *netns.NS, f func() error) {
	r.t.Helper()
	err := n.Do(func() error {
		var one unix.CPUSet
		one.Set(0)
		if err := unix.SchedSetaffinity(0, &one); err != nil {
			return err
		}
		return f()
	})
	if err != nil {
		_, _, line, _ := runtime.Caller(1)
		r.t.Fatalf("line %d: %v", line, err)
	}
}

// plug makes a Pod's link with the Pod's end up and the edge's too.
func (r *rig) plug(n *netns.NS, link string, v4, v6 netip.Addr) {
	r.t.Helper()
	r.do(r.edge, func() error {
		veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: link}, PeerName: "eth0", PeerNamespace: netlink.NsFd(n.FD())}
		if err := netlink.LinkAdd(veth); err != nil {
			return err
		}
		l, err := netlink.LinkByName(link)
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(l)
	})
	h, err := netlink.NewHandleAt(vnetns.NsHandle(n.FD()))
	if err != nil {
		r.t.Fatal(err)
	}
	defer h.Close()
	e, err := netlink.NewHandleAt(vnetns.NsHandle(r.edge.FD()))
	if err != nil {
		r.t.Fatal(err)
	}
	defer e.Close()
	check := func(err error) {
		r.t.Helper()
		if err != nil {
			r.t.Fatal(err)
		}
	}
	lo, err := h.LinkByName("lo")
	check(err)
	check(h.LinkSetUp(lo))
	in, err := h.LinkByName("eth0")
	check(err)
	out, err := e.LinkByName(link)
	check(err)
	check(h.LinkSetUp(in))
	for _, a := range []netip.Addr{v4, v6} {
		gateway := netip.MustParseAddr("10.0.0.1")
		if a.Is6() {
			gateway = netip.MustParseAddr("fd00::1")
		}
		check(h.AddrAdd(in, &netlink.Addr{IPNet: netlink.NewIPNet(a.AsSlice()), Flags: unix.IFA_F_NODAD}))
		check(h.RouteAdd(&netlink.Route{LinkIndex: in.Attrs().Index, Gw: gateway.AsSlice(), Flags: int(netlink.FLAG_ONLINK)}))
		check(h.NeighSet(&netlink.Neigh{LinkIndex: in.Attrs().Index, State: netlink.NUD_PERMANENT, IP: gateway.AsSlice(), HardwareAddr: out.Attrs().HardwareAddr}))
		dst := netlink.NewIPNet(a.AsSlice())
		check(e.RouteAdd(&netlink.Route{LinkIndex: out.Attrs().Index, Dst: dst, Scope: netlink.SCOPE_LINK}))
		check(e.NeighSet(&netlink.Neigh{LinkIndex: out.Attrs().Index, State: netlink.NUD_PERMANENT, IP: a.AsSlice(), HardwareAddr: in.Attrs().HardwareAddr}))
	}
	// Asking for a link makes the kernel take its new carrier into account: until it does,
	// nothing goes out.
	_, err = e.LinkByName(link)
	check(err)
	_, err = h.LinkByName("eth0")
	check(err)
}

func sockaddr(a netip.Addr, port uint16) unix.Sockaddr {
	if a.Is4() {
		return &unix.SockaddrInet4{Addr: a.As4(), Port: int(port)}
	}
	return &unix.SockaddrInet6{Addr: a.As16(), Port: int(port)}
}

func domain(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// socket opens one in a namespace; it is closed with the test.
func (r *rig) socket(n *netns.NS, kind int, local netip.Addr, port uint16) int {
	r.t.Helper()
	fd := -1
	r.do(n, func() (err error) {
		if fd, err = unix.Socket(domain(local), kind|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		if port != 0 { // or the kernel might choose a port that another socket here has
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
		}
		if err := unix.Bind(fd, sockaddr(local, port)); err != nil {
			return fmt.Errorf("bind %s:%d: %w", local, port, err)
		}
		if kind == unix.SOCK_STREAM && port != 0 {
			return unix.Listen(fd, 4096)
		}
		return nil
	})
	return fd
}

func (r *rig) open(n *netns.NS, kind int, local netip.Addr, port uint16) int {
	fd := r.socket(n, kind, local, port)
	r.t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func (r *rig) sync(tb *Table) {
	r.t.Helper()
	if err := tb.Sync(context.Background(), r.s); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) openTable() *Table {
	r.t.Helper()
	tb, err := Open(r.edge)
	if err != nil {
		r.t.Fatal(err)
	}
	return tb
}

// receive waits for a datagram.
func receive(fd int, timeout time.Duration) (string, unix.Sockaddr, bool) {
	deadline := time.Now().Add(timeout)
	b := make([]byte, 256)
	for {
		n, from, err := unix.Recvfrom(fd, b, 0)
		if err == nil {
			return string(b[:n]), from, true
		}
		left := time.Until(deadline)
		if err == unix.EINTR {
			continue
		}
		if left <= 0 || err != unix.EAGAIN {
			return "", nil, false
		}
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
	}
}

// flow is an established connection: a datagram each way before any policy was there.
type flow struct {
	r            *rig
	client, peer int
	from         *netns.NS
	to           *netns.NS
	dst          unix.Sockaddr
	trips        int
}

func (r *rig) flow(from, to *netns.NS, src, dst netip.Addr, port uint16) *flow {
	r.t.Helper()
	f := &flow{r: r, client: r.open(from, unix.SOCK_DGRAM, src, 0), peer: r.open(to, unix.SOCK_DGRAM, dst, port), from: from, to: to, dst: sockaddr(dst, port)}
	if !f.roundTrip() {
		r.t.Fatalf("no way from %s to %s without policies", src, dst)
	}
	return f
}

// patience is how long a datagram that must come may take, sent again and again.
const patience = 30 * time.Second

// roundTrip goes and comes back. What was sent on the same path before is through then.
func (f *flow) roundTrip() bool {
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		f.trips++ // an answer to what was sent before is not the answer to this
		text := fmt.Sprint("trip ", f.trips)
		f.r.do(f.from, func() error { return unix.Sendto(f.client, []byte(text), 0, f.dst) })
		src, ok := expect(f.peer, text)
		if !ok {
			continue
		}
		f.r.do(f.to, func() error { return unix.Sendto(f.peer, []byte(text), 0, src) })
		if _, ok := expect(f.client, text); ok {
			return true
		}
	}
	return false
}

// expect waits a moment for one datagram, past others.
func expect(fd int, text string) (unix.Sockaddr, bool) {
	for {
		got, src, ok := receive(fd, 200*time.Millisecond)
		if !ok || got == text {
			return src, ok
		}
	}
}

func (r *rig) key(p Pod) string {
	if p.Namespace == "" {
		return "out"
	}
	return p.Namespace + "/" + p.Name
}

// generate makes a policy at random, out of what the rig can tell apart.
func generate(rng *rand.Rand, namespace string, n int) *networkingv1.NetworkPolicy {
	pick := func(s ...string) string { return s[rng.IntN(len(s))] }
	sel := func(key string, values ...string) *metav1.LabelSelector {
		switch rng.IntN(4) {
		case 0:
			return &metav1.LabelSelector{}
		case 1:
			return &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: key, Operator: metav1.LabelSelectorOpNotIn, Values: []string{pick(values...)}}}}
		}
		return &metav1.LabelSelector{MatchLabels: map[string]string{key: pick(values...)}}
	}
	pods := func() *metav1.LabelSelector { return sel("pod", "a", "b") }
	spaces := func() *metav1.LabelSelector { return sel("ns", "x", "y", "z") }
	peers := func() (out []networkingv1.NetworkPolicyPeer) {
		for range rng.IntN(3) {
			var p networkingv1.NetworkPolicyPeer
			switch rng.IntN(5) {
			case 0:
				p.PodSelector = pods()
			case 1:
				p.NamespaceSelector = spaces()
			case 2:
				p.PodSelector, p.NamespaceSelector = pods(), spaces()
			case 3:
				p.IPBlock = &networkingv1.IPBlock{CIDR: pick("0.0.0.0/0", "10.0.0.0/16", "8.8.8.8/32", "10.0.1.0/24")}
				for range rng.IntN(3) {
					p.IPBlock.Except = append(p.IPBlock.Except, pick("10.0.0.0/8", "8.0.0.0/8", "10.0.2.10/32", "10.0.1.10/31"))
				}
			default:
				p.IPBlock = &networkingv1.IPBlock{CIDR: pick("::/0", "fd00::/16", "fd00::1:0/112", "2001:db8::8/128")}
				for range rng.IntN(3) {
					p.IPBlock.Except = append(p.IPBlock.Except, pick("fd00::2:0/112", "2001:db8::/32", "fd00::1:10/128"))
				}
			}
			out = append(out, p)
		}
		return out
	}
	on := func() (out []networkingv1.NetworkPolicyPort) {
		for range rng.IntN(3) {
			var p networkingv1.NetworkPolicyPort
			proto := []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP}[rng.IntN(3)]
			if proto != corev1.ProtocolTCP || rng.IntN(2) == 0 { // TCP is the default
				p.Protocol = &proto
			}
			switch rng.IntN(4) {
			case 0:
			case 1:
				v := intstr.FromString("web")
				p.Port = &v
			case 2:
				v, end := intstr.FromInt32(80), int32(81+rng.IntN(3))
				p.Port, p.EndPort = &v, &end
			default:
				v := intstr.FromInt32(int32(80 + rng.IntN(3)))
				p.Port = &v
			}
			out = append(out, p)
		}
		return out
	}
	np := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: fmt.Sprint("p", n)}}
	np.Spec.PodSelector = *pods()
	for range rng.IntN(3) {
		np.Spec.Ingress = append(np.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: peers(), Ports: on()})
	}
	for range rng.IntN(3) {
		np.Spec.Egress = append(np.Spec.Egress, networkingv1.NetworkPolicyEgressRule{To: peers(), Ports: on()})
	}
	switch rng.IntN(4) {
	case 0:
		np.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}
	case 1:
		np.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeEgress}
	case 2:
		np.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeEgress, networkingv1.PolicyTypeIngress}
	}
	return np
}

// TestEvaluateAgreesWithTheKernel opens connections between all Pods under policies made
// at random and asks Evaluate the same.
func TestEvaluateAgreesWithTheKernel(t *testing.T) {
	r := newRig(t)
	tb := r.openTable()
	r.sync(tb)
	parties := append(slices.Clone(r.s.Pods), Pod{Addresses: []netip.Addr{netip.MustParseAddr("8.8.8.8"), netip.MustParseAddr("2001:db8::8")}})
	type path struct{ from, to, family int }
	fences, datagrams := map[path]*flow{}, map[string]int{}
	for i, from := range parties {
		for j, to := range parties {
			if i == j {
				continue
			}
			for f := range 2 {
				fences[path{i, j, f}] = r.flow(r.pods[r.key(from)], r.pods[r.key(to)], from.Addresses[f], to.Addresses[f], uint16(1000+i))
			}
		}
	}
	for _, p := range parties {
		for f := range 2 {
			for _, port := range rigPorts {
				r.open(r.pods[r.key(p)], unix.SOCK_STREAM, p.Addresses[f], port)
				datagrams[fmt.Sprint(p.Addresses[f], port)] = r.open(r.pods[r.key(p)], unix.SOCK_DGRAM, p.Addresses[f], port)
			}
		}
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	rounds, allowed, denied := 25, 0, 0
	if testing.Short() {
		rounds = 5
	}
	for round := range rounds {
		r.s.Policies = nil
		for i := range 1 + rng.IntN(4) {
			r.s.Policies = append(r.s.Policies, generate(rng, []string{"x", "y", "z"}[rng.IntN(3)], i))
		}
		r.sync(tb)
		for at, fence := range fences {
			from, to := parties[at.from], parties[at.to]
			src, dst := from.Addresses[at.family], to.Addresses[at.family]
			text := fmt.Sprint("round ", round)
			var streams []int
			udp := r.socket(fence.from, unix.SOCK_DGRAM, src, 0)
			for _, port := range rigPorts {
				fd := r.socket(fence.from, unix.SOCK_STREAM, src, 0)
				streams = append(streams, fd)
				r.do(fence.from, func() error {
					if err := unix.Connect(fd, sockaddr(dst, port)); err != unix.EINPROGRESS && err != nil {
						return err
					}
					return unix.Sendto(udp, []byte(text), 0, sockaddr(dst, port))
				})
			}
			if !fence.roundTrip() {
				t.Fatalf("an established connection from %s to %s was cut", src, dst)
			}
			one := func(protocol uint8, port uint16, got bool) {
				from, to := from, to
				from.Addresses, to.Addresses = []netip.Addr{src}, []netip.Addr{dst}
				v, err := Evaluate(r.s, from, to, protocol, port)
				if err != nil {
					t.Fatal(err)
				}
				if v.Allowed {
					allowed++
				} else {
					denied++
				}
				if v.Allowed != got {
					list, _ := exec.Command("nsenter", "--net="+r.edge.Path(), "nft", "list", "table", "inet", TableName).CombinedOutput()
					var specs []string
					for _, np := range r.s.Policies {
						specs = append(specs, fmt.Sprintf("%s: %+v", np.Namespace, np.Spec))
					}
					t.Fatalf("%s to %s, protocol %d port %d: the kernel says %v, Evaluate %+v\n%s\n%s", src, dst, protocol, port, got, v, strings.Join(specs, "\n"), list)
				}
			}
			for i, port := range rigPorts {
				p := []unix.PollFd{{Fd: int32(streams[i]), Events: unix.POLLOUT}}
				n, _ := unix.Poll(p, 0)
				one(unix.IPPROTO_TCP, port, n == 1 && p[0].Revents&(unix.POLLERR|unix.POLLHUP) == 0)
				got, _, ok := receive(datagrams[fmt.Sprint(dst, port)], 0)
				if ok && got != text {
					t.Fatalf("%q arrived in %q", got, text)
				}
				one(unix.IPPROTO_UDP, port, ok)
				_ = unix.SetsockoptLinger(streams[i], unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
				unix.Close(streams[i])
			}
			unix.Close(udp)
		}
	}
	t.Logf("%d connections allowed, %d denied", allowed, denied)
	if allowed == 0 || denied == 0 {
		t.Error("the policies decided nothing")
	}
}

// dial sends a new datagram through and tells whether it arrives; fence is a connection on
// the same path.
func (r *rig) dial(fence *flow, listener int, src, dst netip.Addr, port uint16) bool {
	r.t.Helper()
	for { // what came before is not the answer
		if _, _, ok := receive(listener, 0); !ok {
			break
		}
	}
	fd := r.socket(fence.from, unix.SOCK_DGRAM, src, 0)
	defer unix.Close(fd)
	r.do(fence.from, func() error { return unix.Sendto(fd, []byte("new"), 0, sockaddr(dst, port)) })
	if !fence.roundTrip() {
		r.t.Fatal("an established connection was cut")
	}
	_, _, ok := receive(listener, 0)
	return ok
}

func snapshot(t testing.TB, tb *Table) map[string]string {
	t.Helper()
	conn, err := tb.connect()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.CloseLasting()
	r, err := list(conn)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for name, s := range r.sets {
		for k, e := range s.elements {
			out[fmt.Sprintf("set %s %x", name, k)] = verdictChain(e.Val)
		}
		out["set "+name] = ""
	}
	for name, c := range r.chains {
		out["chain "+name] = strings.Join(c.comments, "\n")
	}
	return out
}

// monitor counts what changes in the namespace's tables meanwhile.
func (r *rig) changes(f func()) int {
	r.t.Helper()
	conn, err := r.edge.NFTables()
	if err != nil {
		r.t.Fatal(err)
	}
	m := nftables.NewMonitor()
	events, err := conn.AddGenerationalMonitor(m)
	if err != nil {
		r.t.Fatal(err)
	}
	defer m.Close()
	f()
	// A last change that is known, to know when all were told.
	conn.AddTable(&nftables.Table{Name: "fence", Family: nftables.TableFamilyINet})
	if err := conn.Flush(); err != nil {
		r.t.Fatal(err)
	}
	n := 0
	for e := range events {
		for _, c := range e.Changes {
			if tab, ok := c.Data.(*nftables.Table); ok && tab.Name == "fence" {
				conn.DelTable(&nftables.Table{Name: "fence", Family: nftables.TableFamilyINet})
				if err := conn.Flush(); err != nil {
					r.t.Fatal(err)
				}
				return n
			}
			n++
		}
	}
	r.t.Fatal("the monitor ended")
	return 0
}

const allowFromY = `spec: {podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{namespaceSelector: {matchLabels: {ns: "y"}}}], ports: [{protocol: UDP, port: 80, endPort: 81}, {protocol: UDP, port: web}]}, {from: [{ipBlock: {cidr: 8.8.8.0/24, except: [8.8.8.9/32]}}]}]}`

// TestAdoptionAndDifferences: a former process's table stays; what is the same is not touched.
func TestAdoptionAndDifferences(t *testing.T) {
	r := newRig(t)
	tb := r.openTable()
	a, y := r.s.Pods[0], r.s.Pods[2]
	fence := r.flow(r.pods["y/a"], r.pods["x/a"], y.Addresses[0], a.Addresses[0], 1000)
	listener := r.open(r.pods["x/a"], unix.SOCK_DGRAM, a.Addresses[0], 80)
	r.s.Policies = parse(t, allowFromY, `spec: {podSelector: {}, policyTypes: [Ingress, Egress], egress: [{}]}`)
	r.sync(tb)
	if !r.dial(fence, listener, y.Addresses[0], a.Addresses[0], 80) {
		t.Fatal("not let in")
	}
	before := snapshot(t, tb)

	again := r.openTable()
	if got := snapshot(t, again); !maps.Equal(got, before) {
		t.Error("Open changed the table")
	}
	if n := r.changes(func() { r.sync(again) }); n != 0 {
		t.Errorf("a Sync of the same state made %d changes", n)
	}

	// A new label on a Pod that a selector chooses is one element per set of addresses.
	z := &r.s.Pods[3]
	fenceZ := r.flow2(fence, r.pods["z/a"], z.Addresses[0])
	r.s.Namespaces["z"] = map[string]string{"ns": "y"}
	if n := r.changes(func() { r.sync(again) }); n == 0 || n > 6 {
		t.Errorf("one Pod more in a selector made %d changes", n)
	}
	if !r.dial(fenceZ, listener, z.Addresses[0], a.Addresses[0], 80) {
		t.Error("a Pod that is selected now is not let in")
	}
	r.s.Namespaces["z"] = map[string]string{"ns": "z"}
	r.sync(again)
	if r.dial(fenceZ, listener, z.Addresses[0], a.Addresses[0], 80) {
		t.Error("a Pod that is selected no more is let in")
	}
	if got := snapshot(t, again); !maps.Equal(got, before) {
		t.Error("there and back is not the same")
	}

	// Nothing is left when the policies go.
	r.s.Policies = nil
	r.sync(again)
	for name := range snapshot(t, again) {
		if strings.Contains(name, "/") {
			t.Errorf("left: %s", name)
		}
	}
	if !r.dial(fenceZ, listener, z.Addresses[0], a.Addresses[0], 80) {
		t.Error("denied without policies")
	}
}

// flow2 is a second connection to the peer of a flow, established by the same listener.
func (r *rig) flow2(f *flow, from *netns.NS, src netip.Addr) *flow {
	r.t.Helper()
	// The listener's Pod is isolated already: its policies are taken away for the moment.
	saved := r.s.Policies
	r.s.Policies = nil
	tb := r.openTable()
	r.sync(tb)
	g := &flow{r: r, client: r.open(from, unix.SOCK_DGRAM, src, 0), peer: f.peer, from: from, to: f.to, dst: f.dst}
	if !g.roundTrip() {
		r.t.Fatal("no second way")
	}
	r.s.Policies = saved
	r.sync(tb)
	return g
}

// TestUpdatesKeepConnections: changes of policies, a denial included, never stop what is
// established, and a policy that changes while packets fly lets nothing through between.
func TestUpdatesKeepConnections(t *testing.T) {
	r := newRig(t)
	tb := r.openTable()
	a, y := r.s.Pods[0], r.s.Pods[2]
	fence := r.flow(r.pods["y/a"], r.pods["x/a"], y.Addresses[0], a.Addresses[0], 1000)
	listener := r.open(r.pods["x/a"], unix.SOCK_DGRAM, a.Addresses[0], 90)
	texts := []string{allowFromY, `spec: {podSelector: {}}`,
		`spec: {podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{podSelector: {}}]}, {ports: [{port: 90}]}]}`,
		`spec: {podSelector: {}, policyTypes: [Ingress, Egress]}`}
	done := make(chan error, 1)
	stop := make(chan struct{})
	r.s.Policies = parse(t, texts[0])
	r.sync(tb)
	go func() { // new datagrams to a port none of these allows, all the while
		done <- r.pods["y/a"].Do(func() error {
			for {
				select {
				case <-stop:
					return nil
				default:
				}
				fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
				if err != nil {
					return err
				}
				_ = unix.Sendto(fd, []byte("leak"), 0, sockaddr(a.Addresses[0], 90)) // dropped here it is no error
				unix.Close(fd)
			}
		})
	}()
	for i := range 60 {
		r.s.Policies = parse(t, texts[i%len(texts)], texts[(i/4)%len(texts)])
		r.sync(tb)
		if !fence.roundTrip() {
			t.Fatalf("change %d cut an established connection", i)
		}
	}
	close(stop)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if !fence.roundTrip() {
		t.Fatal("cut")
	}
	if text, _, ok := receive(listener, 0); ok {
		t.Errorf("%q came through while policies changed", text)
	}
}

// TestBeforeTheFirstPacket: a Pod whose link comes up after Sync is isolated from the beginning.
func TestBeforeTheFirstPacket(t *testing.T) {
	r := newRig(t)
	tb := r.openTable()
	a, y := r.s.Pods[0], r.s.Pods[2]
	fence := r.flow(r.pods["y/a"], r.pods["x/a"], y.Addresses[0], a.Addresses[0], 1000)
	listener := r.open(r.pods["x/a"], unix.SOCK_DGRAM, a.Addresses[0], 90)
	r.s.Policies = parse(t, `spec: {podSelector: {}, policyTypes: [Ingress, Egress]}`)
	pods := r.s.Pods
	r.s.Pods = slices.Clone(pods[1:])
	r.sync(tb)
	if !r.dial(fence, listener, y.Addresses[0], a.Addresses[0], 90) {
		t.Fatal("a Pod that no State has is denied")
	}
	r.s.Pods = pods // the link is in no State before: as if it came now
	r.sync(tb)
	if r.dial(fence, listener, y.Addresses[0], a.Addresses[0], 90) {
		t.Error("a packet went through after Sync")
	}
}

// TestDrift: whatever others do to the table, the next Sync puts it right.
func TestDrift(t *testing.T) {
	r := newRig(t)
	tb := r.openTable()
	r.s.Policies = parse(t, allowFromY, `spec: {podSelector: {}, policyTypes: [Ingress, Egress], egress: [{}]}`)
	r.sync(tb)
	want := snapshot(t, tb)
	p, err := compile(r.s)
	if err != nil {
		t.Fatal(err)
	}
	chain := p.policies[0].ingress.name
	ports, block := "", ""
	for name := range p.sets {
		switch {
		case strings.HasPrefix(name, "ports/"):
			ports = name
		case strings.HasPrefix(name, "block4/"):
			block = name
		}
	}
	for _, cmd := range []string{
		"delete table inet h8s_policy",
		"flush ruleset",
		"flush chain inet h8s_policy ingress",
		"flush chain inet h8s_policy " + chain,
		"insert rule inet h8s_policy " + chain + " accept",
		"add rule inet h8s_policy egress accept",
		"flush map inet h8s_policy isolated_ingress",
		`add element inet h8s_policy isolated_ingress { "other" : drop }`,
		`delete element inet h8s_policy isolated_ingress { "p0" } ; add element inet h8s_policy isolated_ingress { "p0" : accept }`,
		"flush set inet h8s_policy " + ports,
		"flush set inet h8s_policy " + block,
		"add element inet h8s_policy " + ports + " { tcp . 1000-2000 }",
		"add element inet h8s_policy " + block + " { 9.0.0.0/8 }",
		"add chain inet h8s_policy mine { type filter hook forward priority 0 ; policy drop ; }",
		"add set inet h8s_policy mine { type ipv4_addr ; }",
		"add chain inet h8s_policy ingress { policy drop ; }",
	} {
		nft := exec.Command("nsenter", "--net="+r.edge.Path(), "nft", cmd)
		if out, err := nft.CombinedOutput(); err != nil {
			t.Errorf("nft %s: %v\n%s", cmd, err, out)
			continue
		}
		r.sync(tb)
		if got := snapshot(t, tb); !maps.Equal(got, want) {
			for k, v := range got {
				if w, ok := want[k]; !ok || w != v {
					t.Errorf("after %s: %s %q, want %q (%v)", cmd, k, v, w, ok)
				}
			}
			for k := range want {
				if _, ok := got[k]; !ok {
					t.Errorf("after %s: %s is missing", cmd, k)
				}
			}
		}
	}
}

// TestResolver: egress policies bind what Pods send to the edge itself, and neighbour
// discovery goes on.
func TestResolver(t *testing.T) {
	r := newRig(t)
	tb := r.openTable()
	dns := Pod{Namespace: "kube-system", Name: "dns", Labels: map[string]string{"k8s-app": "kube-dns"},
		Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")}}
	r.s.Pods = append(r.s.Pods, dns)
	r.s.Namespaces["kube-system"] = map[string]string{}
	a := r.s.Pods[0]
	for f := range 2 {
		fence := r.flow(r.pods["x/a"], r.edge, a.Addresses[f], dns.Addresses[f], 1000)
		listener := r.open(r.edge, unix.SOCK_DGRAM, dns.Addresses[f], 53)
		for _, c := range []struct {
			policy string
			want   bool
		}{
			{`spec: {podSelector: {}}`, true},
			{`spec: {podSelector: {}, policyTypes: [Egress]}`, false},
			{`spec: {podSelector: {}, policyTypes: [Egress], egress: [{ports: [{protocol: UDP, port: 53}], to: [{namespaceSelector: {}, podSelector: {matchLabels: {k8s-app: kube-dns}}}]}]}`, true},
			{`spec: {podSelector: {}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {matchLabels: {ns: "y"}}}]}]}`, false},
		} {
			r.s.Policies = parse(t, c.policy)
			r.sync(tb)
			if got := r.dial(fence, listener, a.Addresses[f], dns.Addresses[f], 53); got != c.want {
				t.Errorf("%s: %v", c.policy, got)
			}
		}
		r.s.Policies = nil
		r.sync(tb)
	}
	// Without the permanent neighbours the Pod has to ask.
	r.s.Policies = parse(t, `spec: {podSelector: {}, policyTypes: [Ingress, Egress]}`)
	r.sync(tb)
	h, err := netlink.NewHandleAt(vnetns.NsHandle(r.pods["x/a"].FD()))
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	neighbours, err := h.NeighList(0, unix.AF_INET6)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range neighbours {
		if n.State == netlink.NUD_PERMANENT && n.IP.String() == "fd00::1" {
			if err := h.NeighDel(&n); err != nil {
				t.Fatal(err)
			}
		}
	}
	e, err := netlink.NewHandleAt(vnetns.NsHandle(r.edge.FD()))
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	p0, err := e.LinkByName("p0")
	if err != nil {
		t.Fatal(err)
	}
	// IPv6 answers for addresses of the very link only.
	if err := e.AddrAdd(p0, &netlink.Addr{IPNet: netlink.NewIPNet(dns.Addresses[1].AsSlice()), Flags: unix.IFA_F_NODAD}); err != nil {
		t.Fatal(err)
	}
	fd := r.open(r.pods["x/a"], unix.SOCK_DGRAM, a.Addresses[1], 0)
	deadline := time.Now().Add(patience)
	for {
		r.do(r.pods["x/a"], func() error {
			_ = unix.Sendto(fd, []byte("x"), 0, sockaddr(dns.Addresses[1], 53)) // asks for the neighbour
			return nil
		})
		list, err := h.NeighList(0, unix.AF_INET6)
		if err != nil {
			t.Fatal(err)
		}
		if slices.ContainsFunc(list, func(n netlink.Neigh) bool {
			return n.IP.String() == "fd00::1" && n.State&(netlink.NUD_REACHABLE|netlink.NUD_STALE|netlink.NUD_DELAY|netlink.NUD_PROBE) != 0
		}) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("policies drop neighbour discovery: %v", list)
		}
	}
}

// TestHostsAndSelf: the node's own address is let in, and a Pod reaches itself.
func TestHostsAndSelf(t *testing.T) {
	r := newRig(t)
	tb := r.openTable()
	a := r.s.Pods[0]
	out := netip.MustParseAddr("8.8.8.8")
	fence := r.flow(r.pods["out"], r.pods["x/a"], out, a.Addresses[0], 1000)
	listener := r.open(r.pods["x/a"], unix.SOCK_DGRAM, a.Addresses[0], 90)
	r.s.Policies = parse(t, `spec: {podSelector: {}, policyTypes: [Ingress, Egress]}`)
	r.sync(tb)
	if r.dial(fence, listener, out, a.Addresses[0], 90) {
		t.Error("an address outside is let in")
	}
	r.s.Hosts = []netip.Addr{out, netip.MustParseAddr("2001:db8::8")}
	r.sync(tb)
	if !r.dial(fence, listener, out, a.Addresses[0], 90) {
		t.Error("the node is not let in")
	}

	// A hairpin: the Pod's own service, translated back to it by the edge.
	nft := exec.Command("nsenter", "--net="+r.edge.Path(), "nft", "-f", "-")
	nft.Stdin = strings.NewReader(`table ip hairpin {
  chain pre { type nat hook prerouting priority -100; ip daddr 10.96.0.9 dnat to 10.0.0.10; }
  chain post { type nat hook postrouting priority 100; ip saddr 10.0.0.10 ip daddr 10.0.0.10 snat to 10.0.0.1; }
}`)
	if out, err := nft.CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	fd := r.open(r.pods["x/a"], unix.SOCK_DGRAM, a.Addresses[0], 0)
	r.do(r.pods["x/a"], func() error {
		return unix.Sendto(fd, []byte("me"), 0, sockaddr(netip.MustParseAddr("10.96.0.9"), 90))
	})
	if text, _, ok := receive(listener, patience); !ok || text != "me" {
		t.Errorf("a Pod cannot reach itself through its Service: %q %v", text, ok)
	}
}

// TestMany: what a big tenant has goes in at once and changes one by one.
func TestMany(t *testing.T) {
	r := newRig(t)
	tb := r.openTable()
	r.s = State{Namespaces: map[string]map[string]string{"x": {}}}
	var r2 networkingv1.NetworkPolicyIngressRule
	r2.From = []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{}}}
	for i := range 2000 {
		r.s.Pods = append(r.s.Pods, Pod{Namespace: "x", Name: fmt.Sprint(i), Labels: map[string]string{"app": fmt.Sprint(i % 200)},
			Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 9, byte(i >> 8), byte(i)})}, Links: []string{fmt.Sprint("m", i)}})
	}
	for i := range 200 {
		np := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "x", Name: fmt.Sprint(i)}}
		np.Spec.PodSelector.MatchLabels = map[string]string{"app": fmt.Sprint(i)}
		np.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{
			{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": fmt.Sprint((i + 1) % 200)}}}}}}
		r.s.Policies = append(r.s.Policies, np)
	}
	start := time.Now()
	r.sync(tb)
	all := time.Since(start)
	start = time.Now()
	r.s.Pods = r.s.Pods[:len(r.s.Pods)-1]
	n := r.changes(func() { r.sync(tb) })
	t.Logf("2000 Pods, 200 policies: %v at once, %v for one Pod less (%d changes)", all, time.Since(start), n)
	if n > 6 {
		t.Errorf("%d changes", n)
	}
}
