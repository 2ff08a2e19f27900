package net

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hypernetes/hypernetes/network/edge"
	"github.com/hypernetes/hypernetes/network/edge/edgetest"
	"github.com/hypernetes/hypernetes/network/netns"
	"github.com/hypernetes/hypernetes/network/policy"
	"github.com/hypernetes/hypernetes/network/probe"
)

// fabric is two nodes with the edges of two tenants, red and blue, that use the same
// addresses. The guest who attacks is a, of red, on the first node.
type fabric struct {
	t        *testing.T
	rig      *edgetest.Rig
	one, two *edgetest.Node
	red      *edgetest.Network
	blue     *edgetest.Network
	// a and b are on the first node, c on the second; x and y are blue's, one on each.
	a, b, c, x, y *edgetest.Pod
	disarmed      bool
}

func newFabric(t *testing.T) *fabric {
	t.Helper()
	rig := edgetest.New(t, 2)
	w := &fabric{t: t, rig: rig, one: rig.Nodes[0], two: rig.Nodes[1]}
	w.red, w.blue = rig.Network("red", 4097), rig.Network("blue", 4098)
	w.red.Spec.Flows = 50
	w.a = w.red.Pod(w.one, "a", "192.168.0.5", "fd00:1::5")
	w.b = w.red.Pod(w.one, "b", "192.168.0.6", "fd00:1::6")
	w.c = w.red.Pod(w.two, "c", "192.168.0.7", "fd00:1::7")
	w.x = w.blue.Pod(w.one, "x", "192.168.0.6", "fd00:1::6")
	w.y = w.blue.Pod(w.two, "y", "192.168.0.7", "fd00:1::7")
	for _, p := range []*edgetest.Pod{w.b, w.c, w.x, w.y} {
		edgetest.Echo(t, p.NS, p.Name, "[::]:80")
	}
	edgetest.Echo(t, rig.Outside, "outside", "[::]:80")
	return w
}

// patience is how long a packet that should not come is waited for, and one that should.
func (w *fabric) patience() time.Duration { return patience(w.disarmed) }

func patience(disarmed bool) time.Duration {
	if disarmed {
		return 10 * time.Second // not Patience: among many targets some do not answer even then
	}
	return time.Second
}

// run runs a command in a namespace.
func run(t testing.TB, ns *netns.NS, command ...string) string {
	t.Helper()
	out, err := exec.Command("nsenter", append([]string{"--net=" + ns.Path()}, command...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v: %s", command, err, out)
	}
	return string(out)
}

var handle = regexp.MustCompile(`# handle (\d+)$`)

// unrule deletes exactly the rules of a chain that say something, which must be there.
func (w *fabric) unrule(ns *netns.NS, table, chain, says string) {
	w.t.Helper()
	pattern, deleted := regexp.MustCompile(says), 0
	for line := range strings.Lines(run(w.t, ns, "nft", "-a", "-n", "list", "chain", "inet", table, chain)) {
		line = strings.TrimSpace(line)
		if m := handle.FindStringSubmatch(line); m != nil && pattern.MatchString(line) && !strings.HasPrefix(line, "chain ") {
			run(w.t, ns, "nft", "delete", "rule", "inet", table, chain, "handle", m[1])
			deleted++
		}
	}
	if deleted == 0 {
		w.t.Fatalf("no rule of %s %s says %q", table, chain, says)
	}
}

// believe lets the first node's red edge take any source, as far as reverse-path filters go.
func (w *fabric) believe() {
	for _, link := range []string{"all", w.a.Attachment.Link} {
		run(w.t, w.edge(), "sysctl", "-qw", "net.ipv4.conf."+link+".rp_filter=0")
	}
}

// edge is the namespace between the attacker and everybody else.
func (w *fabric) edge() *netns.NS { return w.red.Edges[w.one].NS() }

// host removes the node's own table.
func (w *fabric) host() { run(w.t, w.one.NS, "nft", "delete", "table", "inet", "h8s_host") }

// mark is in every forged packet.
var mark = []byte("forged-by-a")

// arrives tells whether a frame of a's that bears the mark comes out at a link. What a may
// send comes out before, or the world is broken.
func (w *fabric) arrives(at *netns.NS, frames ...[]byte) (bool, string) {
	w.t.Helper()
	stop := edgetest.Capture(w.t, at, "eth0")
	for _, f := range frames {
		edgetest.Inject(w.t, w.a.NS, f)
	}
	// Its answer comes back after the frames have been handled: in software everything is in order.
	edgetest.Expect(w.t, w.a.NS, "tcp", "192.168.0.6:80", "b 192.168.0.5")
	edgetest.Expect(w.t, w.a.NS, "tcp", "192.168.0.7:80", "c 192.168.0.5")
	for _, f := range stop() {
		if bytes.Contains(f, mark) {
			return true, fmt.Sprintf("captured %x", f)
		}
	}
	return false, "nothing captured"
}

// answers tells whether one of the addresses answers a.
func (w *fabric) answers(addresses ...string) (bool, string) {
	return answers(w.a.NS, w.patience(), addresses...)
}

func answers(ns *netns.NS, patience time.Duration, addresses ...string) (bool, string) {
	var wait sync.WaitGroup
	var lock sync.Mutex
	var open []string
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for _, address := range addresses {
		wait.Go(func() {
			c, err := ns.DialContext(ctx, "tcp", address)
			if err != nil {
				return
			}
			defer c.Close()
			text, err := edgetest.Again(c)
			lock.Lock()
			defer lock.Unlock()
			open = append(open, fmt.Sprintf("%s: %q %v", address, text, err))
		})
	}
	wait.Wait()
	return len(open) > 0, strings.Join(open, ", ")
}

func at(address string) netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr(address), 9999)
}

var gateway = mac("0a:68:38:73:00:01")

func (w *fabric) own() []byte { return w.a.Attachment.MAC }

// v4 is a frame of a's with a UDP packet that bears the mark.
func (w *fabric) v4(from, to string) []byte {
	return eth(gateway, w.own(), 0x0800, udp(at(from), at(to), mark))
}

type fabricAttack struct {
	// name begins with the attack's number.
	name string
	try  func(w *fabric) (succeeded bool, evidence string)
	// disarm takes the defence out; where that has to happen in the middle, try does it.
	disarm func(w *fabric)
}

func TestFabric(t *testing.T) {
	for _, a := range append(spoofing, append(overlays, append(hosts, others...)...)...) {
		t.Run(a.name, func(t *testing.T) {
			t.Parallel()
			w := newFabric(t)
			if ok, evidence := a.try(w); ok {
				t.Errorf("the attack succeeds: %s", evidence)
			}
			if t.Failed() {
				return
			}
			w = newFabric(t)
			w.disarmed = true
			a.disarm(w)
			if ok, evidence := a.try(w); !ok {
				t.Errorf("without the defence the attack fails, too, so this proves nothing: %s", evidence)
			}
		})
	}
}

// spoofing is attack 1: what is not the Pod's own.
var spoofing = []fabricAttack{
	{
		name: "1 forged IPv4 source",
		try: func(w *fabric) (bool, string) {
			return w.arrives(w.b.NS, w.v4("192.168.0.77", "192.168.0.6"), w.v4("192.168.0.7", "192.168.0.6"))
		},
		disarm: func(w *fabric) { w.unrule(w.edge(), "h8s_edge", "spoof", "@pods4"); w.believe() },
	},
	{
		name: "1 forged MAC",
		try: func(w *fabric) (bool, string) {
			return w.arrives(w.b.NS, eth(gateway, mac("0a:58:01:02:03:04"), 0x0800, udp(at("192.168.0.5"), at("192.168.0.6"), mark)))
		},
		disarm: func(w *fabric) { w.unrule(w.edge(), "h8s_edge", "spoof", "@pods4") },
	},
	{
		name: "1 forged IPv6 source",
		try: func(w *fabric) (bool, string) {
			return w.arrives(w.b.NS, eth(gateway, w.own(), 0x86dd, udp(at("fd00:1::77"), at("fd00:1::6"), mark)))
		},
		disarm: func(w *fabric) { w.unrule(w.edge(), "h8s_edge", "spoof", "@pods6") },
	},
	{
		name: "1 forged source in fragments",
		try: func(w *fabric) (bool, string) {
			payload := append(bytes.Clone(mark), bytes.Repeat([]byte{'f'}, 1000)...)
			whole := udpHeader(9999, 9999, payload)
			from, to := netip.MustParseAddr("192.168.0.77"), netip.MustParseAddr("192.168.0.6")
			return w.arrives(w.b.NS, eth(gateway, w.own(), 0x0800, ip4(from, to, 17, 0x2000, whole[:512])), eth(gateway, w.own(), 0x0800, ip4(from, to, 17, 64, whole[512:])))
		},
		disarm: func(w *fabric) { w.unrule(w.edge(), "h8s_edge", "spoof", "@pods4"); w.believe() },
	},
	{
		name: "1 forged source behind a priority tag",
		try: func(w *fabric) (bool, string) {
			f := w.v4("192.168.0.7", "192.168.0.6")
			return w.arrives(w.b.NS, append(append(bytes.Clone(f[:12]), 0x81, 0, 0, 0), f[12:]...))
		},
		disarm: func(w *fabric) { w.unrule(w.edge(), "h8s_edge", "spoof", "@pods4"); w.believe() },
	},
	{
		name: "1 forged source to another node",
		try: func(w *fabric) (bool, string) {
			return w.arrives(w.c.NS, w.v4("192.168.0.6", "192.168.0.7"))
		},
		disarm: func(w *fabric) { w.unrule(w.edge(), "h8s_edge", "spoof", "@pods4"); w.believe() },
	},
	{
		name: "1 DHCP offer to a neighbour",
		try: func(w *fabric) (bool, string) {
			return w.arrives(w.b.NS, eth(gateway, w.own(), 0x0800, udp(netip.MustParseAddrPort("192.168.0.5:67"), netip.MustParseAddrPort("192.168.0.6:68"), mark)))
		},
		disarm: func(w *fabric) { w.unrule(w.edge(), "h8s_edge", "pods", `dport 68 `) },
	},
	{
		name: "1 router advertisement to a neighbour",
		try: func(w *fabric) (bool, string) {
			return w.arrives(w.b.NS, eth(gateway, w.own(), 0x86dd, icmp6(netip.MustParseAddr("fd00:1::5"), netip.MustParseAddr("fd00:1::6"),
				append([]byte{134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0}, mark...))))
		},
		disarm: func(w *fabric) { w.unrule(w.edge(), "h8s_edge", "pods", `type (nd-router-advert|134) `) },
	},
	{
		name: "1 forged ARP",
		try: func(w *fabric) (bool, string) {
			edgetest.Inject(w.t, w.a.NS, eth(mac("ff:ff:ff:ff:ff:ff"), w.own(), 0x0806, arp(w.own(), netip.MustParseAddr("192.168.0.88"), netip.MustParseAddr("192.168.0.1"))))
			edgetest.Expect(w.t, w.a.NS, "tcp", "192.168.0.6:80", "b 192.168.0.5")
			list := run(w.t, w.edge(), "ip", "neigh")
			return strings.Contains(list, "192.168.0.88"), list
		},
		disarm: func(w *fabric) { w.believe() },
	},
}

// vxlan is a packet of blue's overlay: x asks y.
func vxlan() []byte {
	// The inner frame goes to the second node's end of the overlay.
	inner := eth(mac("0a:69:64:40:00:02"), mac("0a:69:64:40:00:01"), 0x0800, udp(at("192.168.0.6"), at("192.168.0.7"), mark))
	return append(append([]byte{8, 0, 0, 0}, 0, 0x10, 0x02, 0), inner...) // VNI 4098
}

// overlays is attack 2: packets of other tenants' overlays.
var overlays = []fabricAttack{
	{
		name: "2 VXLAN injection through egress",
		try: func(w *fabric) (bool, string) {
			return w.arrives(w.y.NS, eth(gateway, w.own(), 0x0800, udp(netip.MustParseAddrPort("192.168.0.5:9999"), netip.MustParseAddrPort("100.64.0.2:8473"), vxlan())))
		},
		disarm: func(w *fabric) {
			// In the edge the other node's address is the overlay's; from the node no edge
			// reaches a node or an overlay's port.
			run(w.t, w.edge(), "ip", "route", "del", "100.64.0.2")
			w.openNodes(`dport 8473`)
		},
	},
	{
		name: "2 VXLAN of others through egress",
		try: func(w *fabric) (bool, string) {
			return w.arrives(w.rig.Outside, eth(gateway, w.own(), 0x0800, udp(netip.MustParseAddrPort("192.168.0.5:9999"), netip.MustParseAddrPort("100.64.0.200:4789"), mark)))
		},
		disarm: func(w *fabric) {
			w.unrule(w.one.NS, "h8s_host", "from_edges", `dport 4789 `)
			w.unrule(w.one.NS, "h8s_host", "forward", `dport 4789 `)
		},
	},
	{
		name: "2 VXLAN injection from the fabric",
		try: func(w *fabric) (bool, string) {
			c, err := w.rig.Outside.DialContext(w.t.Context(), "udp", "100.64.0.2:8473")
			if err != nil {
				w.t.Fatal(err)
			}
			defer c.Close()
			stop := edgetest.Capture(w.t, w.y.NS, "eth0")
			if _, err := c.Write(vxlan()); err != nil {
				w.t.Fatal(err)
			}
			edgetest.Expect(w.t, w.x.NS, "tcp", "192.168.0.7:80", "y 192.168.0.6")
			for _, f := range stop() {
				if bytes.Contains(f, mark) {
					return true, fmt.Sprintf("captured %x", f)
				}
			}
			return false, "nothing captured"
		},
		disarm: func(w *fabric) { w.unrule(w.two.NS, "h8s_host", "input", `@nodes4`) },
	},
}

// openNodes takes out of the first node's table what keeps edges from nodes.
func (w *fabric) openNodes(more ...string) {
	for _, chain := range []string{"from_edges", "forward"} {
		for _, says := range append(more, "@nodes4") {
			w.unrule(w.one.NS, "h8s_host", chain, says)
		}
	}
}

// hosts are attacks 3 and 9: between Pods and what belongs to the cluster.
var hosts = []fabricAttack{
	{
		name: "3 the node dials tenants' addresses",
		try: func(w *fabric) (bool, string) {
			return answers(w.one.NS, w.patience(), "192.168.0.6:80", "[fd00:1::6]:80")
		},
		disarm: func(w *fabric) { w.red.Spec.Routed = true; w.red.Ensure() },
	},
	{
		name: "3 a probe of an address that is also infrastructure's",
		try: func(w *fabric) (bool, string) {
			run(w.t, w.one.NS, "ip", "addr", "add", "10.250.0.1/24", "dev", "eth0")
			run(w.t, w.rig.Outside, "ip", "addr", "add", "10.250.0.9/24", "dev", "eth0")
			n := w.rig.Network("shadow", 4099, func(s *edge.Spec) {
				s.Subnets, s.Gateways = []netip.Prefix{netip.MustParsePrefix("10.250.0.0/24")}, []netip.Addr{netip.MustParseAddr("10.250.0.1")}
			})
			p := n.Pod(w.one, "p", "10.250.0.9")
			edgetest.Expect(w.t, w.one.NS, "tcp", "10.250.0.9:80", "outside 10.250.0.1")
			edgetest.Echo(w.t, p.NS, "p", "10.250.0.9:81")
			// As kubestack probes; without it the kubelet would, from the node.
			from := n.Edges[w.one].NS()
			if w.disarmed {
				from = w.one.NS
			}
			target := netip.MustParseAddr("10.250.0.9")
			own, text := probe.Run(w.t.Context(), from, target, probe.Request{TCP: &probe.TCP{Port: 81}, TimeoutSeconds: 5})
			if own != 0 && !w.disarmed {
				w.t.Errorf("probe of the Pod: %s", text)
			}
			code, text := probe.Run(w.t.Context(), from, target, probe.Request{TCP: &probe.TCP{Port: 80}, TimeoutSeconds: 5})
			return code == 0, fmt.Sprintf("probe of a port the Pod has not, but infrastructure has: %d %s", code, text)
		},
		disarm: func(*fabric) {},
	},
	{
		name: "9 port scan of nodes and reserved ranges",
		try: func(w *fabric) (bool, string) {
			run(w.t, w.one.NS, "ip", "addr", "add", "10.255.0.1/32", "dev", "lo")
			edgetest.Echo(w.t, w.one.NS, "etcd", "[::]:2379")
			edgetest.Echo(w.t, w.one.NS, "kubelet", "[::]:10250")
			var all []string
			for _, host := range []string{"10.255.0.1", "[fd00:64::1]", "100.64.0.1", "169.254.64.1"} {
				for _, port := range []string{"22", "2379", "2380", "6443", "10250", "10256", "10257", "10259"} {
					all = append(all, host+":"+port)
				}
			}
			return w.answers(all...)
		},
		disarm: func(w *fabric) { w.host() },
	},
	{
		name: "9 the node's kubelet at its own address",
		try: func(w *fabric) (bool, string) {
			edgetest.Echo(w.t, w.one.NS, "kubelet", "[::]:10250")
			return w.answers("100.64.0.1:10250")
		},
		disarm: func(w *fabric) {
			run(w.t, w.edge(), "ip", "addr", "del", "100.64.0.1/32", "dev", "vx-"+w.red.Spec.ID)
			w.host()
		},
	},
	{
		name: "9 another node's kubelet",
		try: func(w *fabric) (bool, string) {
			edgetest.Echo(w.t, w.two.NS, "kubelet", "[::]:10250")
			return w.answers("100.64.0.2:10250")
		},
		disarm: func(w *fabric) {
			run(w.t, w.edge(), "ip", "route", "del", "100.64.0.2")
			w.openNodes()
		},
	},
	{
		name: "9 metadata and the node's end of the uplink",
		try: func(w *fabric) (bool, string) {
			run(w.t, w.one.NS, "ip", "addr", "add", "169.254.169.254/32", "dev", "lo")
			edgetest.Echo(w.t, w.one.NS, "metadata", "[::]:8775")
			_, node := w.red.Edges[w.one].Transit()
			return w.answers("169.254.169.254:8775", node.String()+":8775")
		},
		disarm: func(w *fabric) {
			w.unrule(w.edge(), "h8s_edge", "forward", `daddr 169\.254\.0\.0/16 `)
			w.host()
		},
	},
}

// floating gives addresses to Pods of the first node.
func floating(w *fabric, red, blue []edge.External) {
	w.red.External = map[*edgetest.Node][]edge.External{w.one: red}
	w.blue.External = map[*edgetest.Node][]edge.External{w.one: blue}
	w.red.Ensure()
	w.blue.Ensure()
}

// moved opens a connection from outside to red's b at an address that then becomes blue's.
func moved(w *fabric, network string) net.Conn {
	fip := netip.MustParseAddr("100.64.0.90")
	to := []edge.External{{Address: fip, Announce: true, Target: netip.MustParseAddr("192.168.0.6")}}
	floating(w, to, nil)
	c, err := w.rig.Outside.DialContext(w.t.Context(), network, "100.64.0.90:80")
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = c.Close() })
	if got, err := edgetest.Again(c); err != nil || got != "b 100.64.0.200" {
		w.t.Fatalf("%q, %v", got, err)
	}
	floating(w, nil, nil)
	floating(w, nil, to)
	edgetest.Expect(w.t, w.rig.Outside, "tcp", "100.64.0.90:80", "x 100.64.0.200")
	return c
}

var others = []fabricAttack{
	{
		name: "10 flood of connections",
		try: func(w *fabric) (bool, string) {
			stop := edgetest.Capture(w.t, w.c.NS, "eth0")
			for i := range 300 {
				from := netip.AddrPortFrom(netip.MustParseAddr("192.168.0.5"), uint16(10000+i))
				edgetest.Inject(w.t, w.a.NS, eth(gateway, w.own(), 0x0800, udp(from, at("192.168.0.7"), mark)))
			}
			// Nobody else feels it, of its own Network or another.
			edgetest.Expect(w.t, w.b.NS, "tcp", "192.168.0.7:80", "c 192.168.0.6")
			edgetest.Expect(w.t, w.x.NS, "tcp", "192.168.0.7:80", "y 192.168.0.6")
			arrived := 0
			for _, f := range stop() {
				if bytes.Contains(f, mark) {
					arrived++
				}
			}
			return arrived > 51, fmt.Sprintf("%d of 300 connections, the limit is 50", arrived)
		},
		disarm: func(w *fabric) { w.unrule(w.edge(), "h8s_edge", "forward", `ct count`) },
	},
	{
		name: "13 a guest with its own NAT and routes passes by ClusterIPs",
		try: func(w *fabric) (bool, string) {
			table, err := policy.Open(w.edge())
			if err != nil {
				w.t.Fatal(err)
			}
			state := policy.State{
				Namespaces: map[string]map[string]string{"red": nil},
				Policies: []*networkingv1.NetworkPolicy{{ObjectMeta: metav1.ObjectMeta{Namespace: "red", Name: "c-only"}, Spec: networkingv1.NetworkPolicySpec{
					PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": "b"}},
					Ingress:     []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "c"}}}}}},
				}}},
			}
			for _, p := range []*edgetest.Pod{w.a, w.b, w.c} {
				q := policy.Pod{Namespace: "red", Name: p.Name, Labels: map[string]string{"app": p.Name}, Addresses: p.Addresses}
				if p.Node == w.one {
					q.Links = []string{p.Attachment.Link}
				}
				state.Pods = append(state.Pods, q)
			}
			if err := table.Sync(w.t.Context(), state); err != nil {
				w.t.Fatal(err)
			}
			edgetest.Expect(w.t, w.c.NS, "tcp", "192.168.0.6:80", "b 192.168.0.7")
			run(w.t, w.a.NS, "nft", "add table ip guest; add chain ip guest out { type nat hook output priority -100; }; add rule ip guest out ip daddr 203.0.113.1 dnat to 192.168.0.6")
			run(w.t, w.a.NS, "ip", "route", "add", "192.168.0.6/32", "via", "192.168.0.1", "dev", "eth0", "onlink")
			if w.disarmed {
				run(w.t, w.edge(), "nft", "delete", "table", "inet", "h8s_policy")
			}
			return w.answers("192.168.0.6:80", "203.0.113.1:80", "[fd00:1::6]:80")
		},
		disarm: func(*fabric) {},
	},
	{
		name: "15 data of an old connection reaches the address's new owner",
		try: func(w *fabric) (bool, string) {
			c := moved(w, "tcp")
			if w.disarmed {
				w.unrule(w.blue.Edges[w.one].NS(), "h8s_edge", "doors", `reject with tcp reset`)
			}
			stop := edgetest.Capture(w.t, w.x.NS, "eth0")
			if _, err := c.Write(mark); err != nil {
				w.t.Fatal(err)
			}
			edgetest.Expect(w.t, w.rig.Outside, "tcp", "100.64.0.90:80", "x 100.64.0.200")
			for _, f := range stop() {
				if bytes.Contains(f, mark) {
					return true, fmt.Sprintf("captured %x", f)
				}
			}
			return false, "nothing captured"
		},
		disarm: func(*fabric) {},
	},
	{
		name: "15 the old owner goes on under the address",
		try: func(w *fabric) (bool, string) {
			port := netip.MustParseAddrPort(moved(w, "udp").LocalAddr().String()).Port()
			if w.disarmed {
				link := "h-" + w.red.Spec.ID
				run(w.t, w.edge(), "conntrack", "-I", "-p", "udp", "-s", "100.64.0.200", "-d", "100.64.0.90", "--sport", fmt.Sprint(port), "--dport", "80", "-g", "192.168.0.6", "-t", "60", "-u", "SEEN_REPLY")
				run(w.t, w.one.NS, "nft", "add", "element", "inet", "h8s_host", "sources4", "{ "+link+" . 100.64.0.90 }")
				run(w.t, w.one.NS, "sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf."+link+".rp_filter=0")
			}
			stop := edgetest.Capture(w.t, w.rig.Outside, "eth0")
			edgetest.Inject(w.t, w.b.NS, eth(gateway, w.b.Attachment.MAC, 0x0800,
				udp(netip.MustParseAddrPort("192.168.0.6:80"), netip.AddrPortFrom(netip.MustParseAddr("100.64.0.200"), port), mark)))
			edgetest.Expect(w.t, w.b.NS, "tcp", "100.64.0.200:80", "outside 100.64.0.1")
			for _, f := range stop() {
				if bytes.Contains(f, mark) && bytes.Equal(f[26:30], netip.MustParseAddr("100.64.0.90").AsSlice()) {
					return true, fmt.Sprintf("captured %x", f)
				}
			}
			return false, "nothing captured from 100.64.0.90"
		},
		// The flush, the set of sources and the reverse-path filter: try puts back what each took away.
		disarm: func(*fabric) {},
	},
}
