package edge_test

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/network/edge"
	"github.com/hypernetes/hypernetes/network/edge/edgetest"
	"github.com/hypernetes/hypernetes/network/policy"
	"github.com/hypernetes/hypernetes/network/service"
)

// Services lead from a Pod's own uplink, with its address, to Pods elsewhere; what the edge
// and the node dial finds its way and back; what policies forbid does not come in.
func TestUplinkPlane(t *testing.T) {
	t.Parallel()
	rig := edgetest.New(t, 2)
	one, two := rig.Nodes[0], rig.Nodes[1]
	edgetest.Echo(t, one.NS, "api", "[::]:6443")
	n := rig.Carried("red", 1)
	n.Spec.Exported = []netip.Addr{addrOf("10.96.0.20"), addrOf("10.96.0.21")}
	a := n.Pod(one, "a", "192.168.0.5", "fd00:1::5")
	b := n.Pod(one, "b", "192.168.0.6", "fd00:1::6")
	c := n.Pod(two, "c", "192.168.0.7", "fd00:1::7")
	for _, p := range n.Pods {
		edgetest.Echo(t, p.NS, p.Name, "[::]:80")
	}
	edgetest.Echo(t, n.Carrier.Host, "host", "[::]:53")
	e := n.Edges[one]
	_, at := e.Transit()

	tables := map[*edgetest.Node]*service.Table{}
	for _, node := range rig.Nodes {
		_, transit := n.Edges[node].Transit()
		table, err := service.Open(n.Edges[node].NS(), service.Options{Gateways: n.Spec.Gateways, Inside: n.Spec.Subnets})
		if err != nil {
			t.Fatal(err)
		}
		tables[node] = table
		to := func(key string, vips []string, endpoints ...string) service.Service {
			s := service.Service{Key: key, Ports: []service.Port{{Protocol: unix.IPPROTO_TCP, Port: 80}}}
			for _, v := range vips {
				s.ClusterIPs = append(s.ClusterIPs, addrOf(v))
			}
			for _, x := range endpoints {
				s.Ports[0].Internal = append(s.Ports[0].Internal, service.Endpoint{Address: netip.MustParseAddrPort(x), Local: (node == one) == (!strings.Contains(x, "192.168.0.7") && !strings.Contains(x, "fd00:1::7"))})
			}
			return s
		}
		api := to("default/kubernetes", []string{"10.96.0.1"}, netip.AddrPortFrom(transit, 6443).String())
		api.Ports[0].Port = 443
		if _, err := table.Sync(t.Context(), []service.Service{
			api,
			to("red/c", []string{"10.96.0.20", "fd00:10:96::20"}, "192.168.0.7:80", "[fd00:1::7]:80"),
			to("red/b", []string{"10.96.0.21"}, "192.168.0.6:80"),
			to("red/self", []string{"10.96.0.22"}, "192.168.0.5:80"),
			to("red/none", []string{"10.96.0.23"}),
		}); err != nil {
			t.Fatal(err)
		}
	}
	edgetest.Expect(t, a.NS, "tcp", "10.96.0.20:80", "c 192.168.0.5")
	edgetest.Expect(t, a.NS, "tcp", "[fd00:10:96::20]:80", "c fd00:1::5")
	edgetest.Expect(t, b.NS, "tcp", "10.96.0.20:80", "c 192.168.0.6")
	edgetest.Expect(t, a.NS, "tcp", "10.96.0.21:80", "b 192.168.0.5")
	edgetest.Expect(t, c.NS, "tcp", "10.96.0.21:80", "b 192.168.0.7")
	edgetest.Expect(t, a.NS, "tcp", "10.96.0.22:80", "a 192.168.0.1") // itself
	edgetest.Expect(t, c.NS, "tcp", "10.96.0.22:80", "a 192.168.0.7")

	// The API server, and nothing else of the node.
	here, _ := e.Transit()
	edgetest.Expect(t, a.NS, "tcp", "10.96.0.1:443", "api "+here.String())
	edgetest.Expect(t, c.NS, "tcp", "10.96.0.1:443", "api 100.64.0.2")
	edgetest.Echo(t, one.NS, "node", "[::]:10250")
	edgetest.Refuse(t, a.NS, "tcp", "10.96.0.23:80", "10.96.0.99:80", at.String()+":10250", at.String()+":6443", "100.64.0.1:10250", "100.64.0.1:6443", "100.64.0.2:6443", "[fd00:64::1]:10250")

	// Probes come from the gateway, as everywhere; what is not here, from a Pod that is.
	edgetest.Expect(t, e.NS(), "tcp", "192.168.0.5:80", "a 192.168.0.1")
	edgetest.Expect(t, e.NS(), "tcp", "[fd00:1::6]:80", "b fd00:1::1")
	for _, to := range []string{"192.168.0.200:53", "[fd00:1::200]:53", "192.168.0.7:80"} {
		for _, proto := range []string{"tcp", "udp"} {
			got, err := edgetest.Ask(e.NS(), proto, to)
			if from := strings.Fields(got); err != nil || len(from) != 2 || !strings.Contains("192.168.0.5 192.168.0.6 fd00:1::5 fd00:1::6", from[1]) {
				t.Errorf("the edge's question to %s: %q, %v", to, got, err)
			}
		}
	}
	// The resolver.
	edgetest.Echo(t, e.NS(), "dns", "10.96.0.10:53")
	edgetest.Expect(t, a.NS, "udp", "10.96.0.10:53", "dns 192.168.0.5")
	edgetest.Expect(t, a.NS, "tcp", "10.96.0.10:53", "dns 192.168.0.5")

	// What the API server dials: a Pod here and one elsewhere.
	edgetest.Expect(t, one.NS, "tcp", "10.96.0.21:80", "b "+at.String())
	if got, err := edgetest.Ask(one.NS, "tcp", "10.96.0.20:80"); err != nil || !strings.HasPrefix(got, "c 192.168.0.") {
		t.Errorf("the node's question to a Pod elsewhere: %q, %v", got, err)
	}

	// Addresses of the fabric's: a Service's, with endpoints here and elsewhere, and a Pod's.
	n.External[one] = []edge.External{
		{Address: addrOf("100.64.0.90"), Announce: true}, {Address: addrOf("100.64.0.91"), Announce: true},
		{Address: addrOf("100.64.0.92"), Announce: true, Target: addrOf("192.168.0.5")}, {Address: addrOf("fd00:64::92"), Announce: true, Target: addrOf("fd00:1::5")},
	}
	n.Ensure()
	if _, err := tables[one].Sync(t.Context(), []service.Service{
		{Key: "red/b", External: []netip.Addr{addrOf("100.64.0.90")}, Ports: []service.Port{{Protocol: unix.IPPROTO_TCP, Port: 80, External: []service.Endpoint{{Address: netip.MustParseAddrPort("192.168.0.6:80"), Local: true}}}}},
		{Key: "red/c", External: []netip.Addr{addrOf("100.64.0.91")}, Ports: []service.Port{{Protocol: unix.IPPROTO_TCP, Port: 80, External: []service.Endpoint{{Address: netip.MustParseAddrPort("192.168.0.7:80")}}}}},
	}); err != nil {
		t.Fatal(err)
	}
	edgetest.Expect(t, rig.Outside, "tcp", "100.64.0.90:80", "b 100.64.0.200")
	edgetest.Expect(t, rig.Outside, "tcp", "100.64.0.92:80", "a 100.64.0.200")
	edgetest.Expect(t, rig.Outside, "tcp", "[fd00:64::92]:80", "a fd00:64::200")
	if got, err := edgetest.Ask(rig.Outside, "tcp", "100.64.0.91:80"); err != nil || !strings.HasPrefix(got, "c 192.168.0.") {
		t.Errorf("from outside to a Pod elsewhere: %q, %v", got, err)
	}
	edgetest.Expect(t, b.NS, "tcp", "192.168.0.200:53", "host 192.168.0.6")

	for _, node := range rig.Nodes {
		if got := n.Carrier.Refused(node); got != "0" {
			t.Errorf("%s: the agent refused %s frames of uplinks", node.Name, got)
		}
	}

	// Only c may come to b, wherever others are.
	rules, err := policy.Open(e.NS())
	if err != nil {
		t.Fatal(err)
	}
	state := policy.State{
		Namespaces: map[string]map[string]string{"red": {}},
		Policies: []*networkingv1.NetworkPolicy{{
			ObjectMeta: metav1.ObjectMeta{Namespace: "red", Name: "c-only"},
			Spec: networkingv1.NetworkPolicySpec{
				PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": "b"}},
				Ingress:     []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "c"}}}}}},
			},
		}},
	}
	for _, p := range n.Pods {
		q := policy.Pod{Namespace: "red", Name: p.Name, Labels: map[string]string{"app": p.Name}, Addresses: p.Addresses}
		if p.Node == one {
			q.Links = []string{p.Attachment.Link}
		}
		state.Pods = append(state.Pods, q)
	}
	if err := rules.Sync(t.Context(), state); err != nil {
		t.Fatal(err)
	}
	edgetest.Expect(t, c.NS, "tcp", "192.168.0.6:80", "b 192.168.0.7")
	edgetest.Expect(t, c.NS, "tcp", "[fd00:1::6]:80", "b fd00:1::7")
	var wait sync.WaitGroup
	wait.Go(func() { edgetest.Refuse(t, a.NS, "tcp", "192.168.0.6:80", "[fd00:1::6]:80", "10.96.0.21:80") })
	wait.Go(func() { edgetest.Refuse(t, n.Carrier.Host, "tcp", "192.168.0.6:80", "[fd00:1::6]:80") })
	wait.Go(func() { edgetest.Refuse(t, n.Carrier.Host, "udp", "10.96.0.10:53") })
	wait.Wait()
	edgetest.Expect(t, n.Carrier.Host, "tcp", "192.168.0.5:80", "a 192.168.0.200")
	edgetest.Expect(t, e.NS(), "tcp", "192.168.0.6:80", "b 192.168.0.1")
}

// Nothing that a guest forges leaves by an uplink, whatever the agent would do with it, and
// nothing that strangers forge comes in.
func TestUplinkSpoof(t *testing.T) {
	t.Parallel()
	rig := edgetest.New(t, 2)
	one := rig.Nodes[0]
	n := rig.Carried("red", 1)
	a := n.Pod(one, "a", "192.168.0.5", "fd00:1::5")
	b := n.Pod(one, "b", "192.168.0.6", "fd00:1::6")
	c := n.Pod(rig.Nodes[1], "c", "192.168.0.7", "fd00:1::7")
	other := rig.Carried("blue", 2).Pod(one, "x", "192.168.0.6")
	for _, p := range []*edgetest.Pod{b, c} {
		edgetest.Echo(t, p.NS, p.Name, "[::]:80")
	}
	own, gw := []byte(a.Attachment.MAC), mac("0a:68:38:73:00:01")
	mark := []byte("forged-by-a")
	at := func(s string) netip.AddrPort { return netip.AddrPortFrom(addrOf(s), 9999) }
	v4 := func(p []byte) []byte { return eth(gw, own, 0x0800, p) }
	v6 := func(p []byte) []byte { return eth(gw, own, 0x86dd, p) }
	tell := func(x string) []byte {
		return append(append([]byte{136, 0, 0, 0, 0xe0, 0, 0, 0}, addrOf(x).AsSlice()...), append([]byte{2, 1}, own...)...)
	}
	all := mac("ff:ff:ff:ff:ff:ff")
	var frames [][]byte
	for _, dst := range []string{"192.168.0.6", "192.168.0.7", "192.168.0.1", "192.168.0.200", "100.64.0.200"} {
		for _, src := range []string{"192.168.0.77", "192.168.0.6", "192.168.0.7", "192.168.0.1", "100.64.0.1", "0.0.0.0", "127.0.0.1", "169.254.64.0", "10.96.0.10"} {
			frames = append(frames, v4(udp(at(src), at(dst), mark)))
		}
		frames = append(frames, eth(gw, mac("fa:16:3e:01:02:03"), 0x0800, udp(at("192.168.0.5"), at(dst), mark)),
			eth(gw, b.Attachment.MAC, 0x0800, udp(at("192.168.0.6"), at(dst), mark)), vlan(5, v4(udp(at("192.168.0.5"), at(dst), mark))))
	}
	for _, dst := range []string{"fd00:1::6", "fd00:1::7", "fd00:1::1", "fd00:1::200", "fd00:64::200"} {
		for _, src := range []string{"fd00:1::77", "fd00:1::6", "fd00:1::7", "fd00:1::1", "fe80::1", "::"} {
			frames = append(frames, v6(udp(at(src), at(dst), mark)))
		}
		frames = append(frames, v6(icmp6(addrOf("fd00:1::5"), addrOf(dst), append(tell("fd00:1::1"), mark...))))
	}
	for _, dst := range []string{"255.255.255.255", "192.168.0.255", "224.0.0.251", "169.254.169.254", "127.0.0.1"} {
		if dst == "192.168.0.255" {
			continue // an address like any other, of a port that there is not
		}
		frames = append(frames, eth(all, own, 0x0800, udp(at("192.168.0.5"), at(dst), mark)), v4(udp(at("192.168.0.5"), at(dst), mark)))
	}
	frames = append(frames,
		eth(all, own, 0x0806, append(arp(2, own, addrOf("192.168.0.1"), addrOf("192.168.0.7")), mark...)),
		eth(all, own, 0x0806, append(arp(1, own, addrOf("192.168.0.6"), addrOf("192.168.0.1")), mark...)),
		eth(all, own, 0x0806, append(arp(1, own, addrOf("192.168.0.5"), addrOf("192.168.0.1")), mark...)),
		eth(mac("33:33:00:00:00:01"), own, 0x86dd, icmp6(addrOf("fd00:1::1"), addrOf("ff02::1"), append(tell("fd00:1::1"), mark...))),
		eth(mac("33:33:00:00:00:01"), own, 0x86dd, icmp6(addrOf("fe80::1"), addrOf("ff02::1"), append([]byte{134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0}, mark...))),
		eth(all, own, 0x0800, udp(netip.MustParseAddrPort("0.0.0.0:68"), netip.MustParseAddrPort("255.255.255.255:67"), mark)),
		// As another Network would see it, were they one.
		eth(other.Attachment.MAC, own, 0x0800, udp(at("192.168.0.5"), at("192.168.0.99"), nil)),
	)
	stops := map[string]func() [][]byte{
		"b": edgetest.Capture(t, b.NS, "eth0"), "c": edgetest.Capture(t, c.NS, "eth0"), "x": edgetest.Capture(t, other.NS, "eth0"),
		"router": edgetest.Capture(t, n.Carrier.Router, "eth0"), "host": edgetest.Capture(t, n.Carrier.Host, "eth0"),
		"tap": edgetest.Capture(t, one.NS, a.Attachment.Uplink), "b's tap": edgetest.Capture(t, one.NS, b.Attachment.Uplink),
		"fabric": edgetest.Capture(t, rig.Outside, "eth0"),
	}
	for _, f := range frames {
		edgetest.Inject(t, a.NS, f)
	}
	edgetest.Inject(t, a.NS, v4(udp(at("192.168.0.5"), at("192.168.0.200"), []byte("genuine"))))
	edgetest.Expect(t, a.NS, "tcp", "192.168.0.6:80", "b 192.168.0.5")
	edgetest.Expect(t, a.NS, "tcp", "[fd00:1::7]:80", "c fd00:1::5")
	for where, stop := range stops {
		got := stop()
		genuine := false
		for _, f := range got {
			genuine = genuine || bytes.Contains(f, []byte("genuine"))
			if bytes.Contains(f, mark) {
				t.Errorf("%s saw a forged frame: %x", where, f)
			}
		}
		if (where == "host" || where == "tap") && !genuine {
			t.Errorf("%s did not see the genuine packet", where)
		}
	}
	if got := n.Carrier.Refused(one); got != "0" {
		t.Errorf("the agent had to refuse %s frames", got)
	}

	// From a machine on the link that may send anything, to the Pods' uplinks.
	mark = []byte("forged-by-host")
	for _, p := range []*edgetest.Pod{a, b} {
		stops[p.Name] = edgetest.Capture(t, p.NS, "eth0")
	}
	hostMAC := mac("02:00:00:00:00:77")
	send := func(to *edgetest.Pod, kind uint16, b []byte) {
		edgetest.Inject(t, n.Carrier.Host, eth(to.Attachment.MAC, hostMAC, kind, b))
	}
	for _, src := range []string{"192.168.0.5", "192.168.0.6", "127.0.0.1", "169.254.64.1", "169.254.169.254", "10.96.0.10", "0.0.0.0", "224.0.0.1"} {
		send(a, 0x0800, udp(at(src), at("192.168.0.5"), mark))
	}
	// For others than the one whose uplink it is: a Pod here, the edge, the node, outside.
	for _, dst := range []string{"192.168.0.6", "192.168.0.7", "10.96.0.10", "169.254.64.1", "100.64.0.1", "100.64.0.200", "192.168.0.1"} {
		send(a, 0x0800, udp(at("192.168.0.200"), at(dst), mark))
	}
	for _, src := range []string{"fd00:1::5", "fd00:1::6", "fe80::77", "fd68:3873:1::1", "::1"} {
		send(a, 0x86dd, udp(at(src), at("fd00:1::5"), mark))
	}
	for _, dst := range []string{"fd00:1::6", "fd00:1::7", "fd00:64::200", "fd68:3873:1::1"} {
		send(a, 0x86dd, udp(at("fd00:1::200"), at(dst), mark))
	}
	send(a, 0x86dd, icmp6(addrOf("fe80::77"), addrOf("fd00:1::5"), append([]byte{134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0}, mark...)))
	send(a, 0x86dd, icmp6(addrOf("fd00:1::1"), addrOf("fd00:1::5"), append(append(append([]byte{137, 0, 0, 0, 0, 0, 0, 0}, addrOf("fd00:1::1").AsSlice()...), addrOf("fd00:1::7").AsSlice()...), mark...)))
	send(a, 0x0800, ip4(addrOf("192.168.0.1"), addrOf("192.168.0.5"), 1, 0, append([]byte{5, 1, 0, 0, 192, 168, 0, 77}, mark...)))
	edgetest.Inject(t, n.Carrier.Host, eth(all, hostMAC, 0x0800, udp(at("192.168.0.200"), at("255.255.255.255"), mark)))
	edgetest.Inject(t, n.Carrier.Host, eth(a.Attachment.MAC, hostMAC, 0x0800, udp(at("192.168.0.201"), at("192.168.0.5"), []byte("genuine"))))
	edgetest.Expect(t, n.Carrier.Host, "tcp", "192.168.0.6:80", "b 192.168.0.200")
	genuine := false
	for _, where := range []string{"a", "b"} {
		for _, f := range stops[where]() {
			genuine = genuine || bytes.Contains(f, []byte("genuine"))
			if bytes.Contains(f, mark) {
				t.Errorf("%s saw a forged frame: %x", where, f)
			}
		}
	}
	if !genuine {
		t.Error("the genuine packet did not come")
	}
	// Nobody but the Pod's uplink says where the Pod is.
	stop := edgetest.Capture(t, n.Carrier.Host, "eth0")
	for _, x := range []string{"192.168.0.5", "192.168.0.6", "10.96.0.10", "169.254.64.1"} {
		edgetest.Inject(t, n.Carrier.Host, eth(all, hostMAC, 0x0806, arp(1, hostMAC, addrOf("192.168.0.201"), addrOf(x))))
	}
	run(t, n.Carrier.Host, "ip", "neigh", "flush", "all")
	edgetest.Expect(t, n.Carrier.Host, "tcp", "192.168.0.6:80", "b 192.168.0.200")
	answers := map[string]int{}
	for _, f := range stop() {
		if len(f) >= 42 && f[12] == 8 && f[13] == 6 && f[21] == 2 && bytes.Equal(f[:6], hostMAC) {
			from, _ := netip.AddrFromSlice(f[28:32])
			answers[fmt.Sprintf("%s %x", from, f[22:28])]++
		}
	}
	want := map[string]int{fmt.Sprintf("192.168.0.5 %x", []byte(a.Attachment.MAC)): 1, fmt.Sprintf("192.168.0.6 %x", []byte(b.Attachment.MAC)): 1}
	if fmt.Sprint(answers) != fmt.Sprint(want) {
		t.Errorf("answers to ARP %v, want %v", answers, want)
	}
}

// One Pod that asks for everybody on the link does not fill the machine's neighbour table.
func TestUplinkScan(t *testing.T) {
	t.Parallel()
	rig := edgetest.New(t, 1)
	one := rig.Nodes[0]
	n := rig.Carried("red", 1, func(s *edge.Spec) {
		s.Subnets, s.Gateways = s.Subnets[:1], s.Gateways[:1]
		s.Subnets[0], s.Gateways[0] = netip.MustParsePrefix("192.168.0.0/16"), addrOf("192.168.0.1")
	})
	p := n.Pod(one, "p", "192.168.0.5")
	edgetest.Echo(t, n.Carrier.Host, "host", "[::]:80")
	edgetest.Echo(t, n.Carrier.Router, "router", "[::]:80")
	edgetest.Expect(t, p.NS, "tcp", "192.168.0.200:80", "host 192.168.0.5")
	u, err := p.NS.ListenPacket(t.Context(), "udp", "192.168.0.5:1000")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = u.Close() }()
	for i := range 2000 {
		if _, err := u.WriteTo(nil, &net.UDPAddr{IP: net.IPv4(192, 168, byte(1+i/250), byte(1+i%250)), Port: 9}); err != nil {
			t.Fatal(err)
		}
	}
	// Whom somebody has talked to is not held up.
	edgetest.Expect(t, p.NS, "tcp", "192.168.0.200:80", "host 192.168.0.5")
	edgetest.Expect(t, p.NS, "tcp", "192.168.0.1:80", "router 192.168.0.5")
	if k := strings.Count(run(t, n.Edges[one].NS(), "ip", "neigh"), "\n"); k > 900 || k < 100 {
		t.Errorf("%d neighbours", k)
	}
}

// Full packets pass in one piece, and larger ones are told of.
func TestUplinkMTU(t *testing.T) {
	t.Parallel()
	rig := edgetest.New(t, 2)
	n := rig.Carried("red", 1)
	a := n.Pod(rig.Nodes[0], "a", "192.168.0.5", "fd00:1::5")
	c := n.Pod(rig.Nodes[1], "c", "192.168.0.7", "fd00:1::7")
	for _, x := range []struct {
		to   string
		size int
	}{{"192.168.0.7:9", edgetest.MTU - 28}, {"[fd00:1::7]:9", edgetest.MTU - 48}} {
		u, err := c.NS.ListenPacket(t.Context(), "udp", x.to)
		if err != nil {
			t.Fatal(err)
		}
		s, err := a.NS.DialContext(t.Context(), "udp", x.to)
		if err != nil {
			t.Fatal(err)
		}
		stop := edgetest.Capture(t, c.NS, "eth0")
		if _, err := s.Write(make([]byte, x.size)); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 1<<16)
		if k, _, err := u.ReadFrom(buf); err != nil || k != x.size {
			t.Errorf("%s: %d bytes, %v", x.to, k, err)
		}
		largest := 0
		for _, f := range stop() {
			largest = max(largest, len(f))
		}
		if largest != edgetest.MTU+14 {
			t.Errorf("%s: largest frame %d, want %d", x.to, largest, edgetest.MTU+14)
		}
		_, _ = s.Close(), u.Close()
	}
}

// BenchmarkUplinkEnsure is the cost of finding nothing to do with so many Pods here.
func BenchmarkUplinkEnsure(b *testing.B) {
	for _, pods := range []int{1, 50} {
		b.Run(fmt.Sprintf("pods=%d", pods), func(b *testing.B) {
			rig := edgetest.New(b, 1)
			n := rig.Carried("red", 1)
			e := n.Edges[rig.Nodes[0]]
			for i := range pods {
				p := n.NewPod(rig.Nodes[0], fmt.Sprint("p", i), fmt.Sprintf("192.168.0.%d", 10+i), fmt.Sprintf("fd00:1::%x", 10+i))
				if err := e.Attach(b.Context(), p.Attachment); err != nil {
					b.Fatal(err)
				}
				if err := e.Up(b.Context(), p.Attachment.Link); err != nil {
					b.Fatal(err)
				}
				n.Pods = append(n.Pods, p)
			}
			n.Ensure()
			for b.Loop() {
				n.Ensure()
			}
		})
	}
}

// BenchmarkUplinkAttach is Attach and Up.
func BenchmarkUplinkAttach(b *testing.B) {
	rig := edgetest.New(b, 1)
	n := rig.Carried("red", 1)
	p := n.NewPod(rig.Nodes[0], "p", "192.168.0.5", "fd00:1::5")
	e := n.Edges[rig.Nodes[0]]
	for b.Loop() {
		if err := e.Attach(b.Context(), p.Attachment); err != nil {
			b.Fatal(err)
		}
		if err := e.Up(b.Context(), p.Attachment.Link); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := e.Detach(b.Context(), p.Attachment.Link); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}
