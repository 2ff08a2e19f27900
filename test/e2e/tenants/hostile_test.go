package tenants

import (
	"encoding/binary"
	"encoding/hex"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"testing"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// TestHostile: a guest that owns its kernel sends frames that are not its own. No Pod of
// its tenant gets one, nor one of another tenant with the same addresses, and what it sends
// honestly goes on arriving. What each defence is worth is shown in test/hostile/net, where
// they can be taken out.
func TestHostile(t *testing.T) {
	t.Parallel()
	c := up(t)
	red := c.Tenant(t, append([]string{"--cidr", "192.168.0.0/24", "--pod-security", "privileged"}, light...)...)
	blue := c.Tenant(t, append([]string{"--cidr", "192.168.0.0/24"}, light...)...)
	ours, theirs := red.Namespace("web", "default"), blue.Namespace("web", "default")
	const near, far, own, gateway = "192.168.0.11", "192.168.0.20", "192.168.0.10", "192.168.0.1"
	neighbours := func(n *testcluster.Namespace) string {
		return join(
			pod{name: "near", node: c.nodes[0], address: near, runtime: "runc"}.yaml(n.Name),
			pod{name: "far", node: c.nodes[1], address: far, runtime: "runc"}.yaml(n.Name))
	}
	guest := pod{name: "guest", node: c.nodes[0], address: own, runtime: "hyper"}.yaml(ours.Name)
	red.Apply(join(neighbours(ours), strings.Replace(guest, "args: [serve]\n", "args: [serve]\n    securityContext: {privileged: true}\n", 1)))
	blue.Apply(neighbours(theirs))
	ours.Ready("near", "far", "guest")
	theirs.Ready("near", "far")

	links := map[string]string{}
	link := func(pod string) string {
		t.Helper()
		if links[pod] == "" {
			ours.Until("the MAC of "+pod, testcluster.Patience, func() bool {
				// A file of sysfs is shorter than it says, so that get always ends with an error.
				text, _ := get(ours, pod, "http://127.0.0.1:8080/file?path=/sys/class/net/eth0/address")
				if _, err := net.ParseMAC(text); err != nil {
					return false
				}
				links[pod] = text
				return true
			})
		}
		return links[pod]
	}
	node := func(i int) string {
		return strings.TrimSpace(c.Kubectl(t, "get", "node", c.nodes[i], "-o", `jsonpath={.status.addresses[?(@.type=="InternalIP")].address}`))
	}
	vni, port := 0, uint16(8473)
	if c.cloud == nil {
		var err error
		if vni, err = strconv.Atoi(strings.TrimSpace(c.Kubectl(t, "-n", blue.Home(), "get", "network", "default", "-o", "jsonpath={.status.vni}"))); err != nil {
			t.Fatal(err)
		}
	} else {
		vni, port = c.cloud.Segment(t, blue.Name), 8472 // the kernel's own, which the agents use
	}
	me, edge, nodes := link("guest"), "0a:68:38:73:00:01", []string{node(0), node(1)}
	overlay := func(i int, _ string) string { return overlayMAC(nodes[i]) }
	if c.cloud != nil {
		nodes = []string{c.cloud.Underlay(0), c.cloud.Underlay(1)}
		overlay = func(_ int, address string) string {
			return strings.TrimSpace(c.Kubectl(t, "-n", blue.Home(), "get", "port", "default."+strings.ReplaceAll(address, ".", "-"), "-o", "jsonpath={.status.mac}"))
		}
	}
	var frames []string
	send := func(dst, src string, kind uint16, body []byte) {
		frames = append(frames, hex.EncodeToString(ethernet(dst, src, kind, body)))
	}
	const ipv4, arp, vlan = 0x0800, 0x0806, 0x8100
	for _, to := range []struct{ address, pod, other string }{{near, "near", far}, {far, "far", near}} {
		send(edge, me, ipv4, datagram(to.other, to.address, 8081, nil))                                // a neighbour's address
		send(edge, me, ipv4, datagram("192.168.0.99", to.address, 8081, nil))                          // nobody's
		send(edge, me, ipv4, datagram(gateway, to.address, 8081, nil))                                 // the gateway's
		send(edge, "0a:58:01:02:03:04", ipv4, datagram(own, to.address, 8081, nil))                    // nobody's MAC
		send(edge, link(to.pod), ipv4, datagram(to.address, to.address, 8081, nil))                    // all of a neighbour's
		send(edge, me, vlan, append([]byte{0, 5, 8, 0}, datagram(own, to.address, 8081, nil)...))      // in a VLAN
		send(edge, me, vlan, append([]byte{0, 0, 8, 0}, datagram(to.other, to.address, 8081, nil)...)) // with a priority
		send(link(to.pod), me, arp, arpReply(me, gateway, link(to.pod), to.address))                   // "I am the gateway"
		send("ff:ff:ff:ff:ff:ff", me, arp, arpReply(me, to.address, "ff:ff:ff:ff:ff:ff", gateway))     // "I am your neighbour"
	}
	for i, to := range []string{far, near} { // packets of the other tenant's overlay, between its Pods
		from := map[string]string{far: near, near: far}[to]
		inner := ethernet(overlay(1-i, to), overlay(i, from), ipv4, datagram(from, to, 8081, nil))
		header := binary.BigEndian.AppendUint32([]byte{8, 0, 0, 0}, uint32(vni)<<8)
		for _, src := range []string{own, nodes[i]} {
			send(edge, me, ipv4, datagram(src, nodes[1-i], port, append(header, inner...)))
		}
	}
	honest := []string{
		hex.EncodeToString(ethernet(edge, me, ipv4, datagram(own, near, 8081, nil))),
		hex.EncodeToString(ethernet(edge, me, ipv4, datagram(own, far, 8081, nil))),
	}

	before := map[string]int{}
	all := map[string]*testcluster.Namespace{"ours": ours, "theirs": theirs}
	for who, n := range all {
		for _, pod := range []string{"near", "far"} {
			before[who+" "+pod] = datagrams(t, n, pod)
		}
	}
	flow := ours.Start("exec", "guest", "--", "/testbox", "flow", far+":8081")
	flow.Expect(`flow \d+`)
	ours.Exec("guest", append([]string{"/testbox", "raw", "eth0"}, append(frames, honest...)...)...)
	// The honest ones went last, so that when they are there the others would be.
	for _, pod := range []string{"near", "far"} {
		ours.Until("an honest datagram is at "+pod, testcluster.Patience, func() bool { return datagrams(t, ours, pod) > before["ours "+pod] })
	}
	// One question, one answer.
	if line := theirs.Exec("near", "/testbox", "dial", "udp", far+":8081"); line != "hello" {
		t.Errorf("the other tenant's own: %q", line)
	}
	for who, n := range all {
		for _, pod := range []string{"near", "far"} {
			if got := datagrams(t, n, pod) - before[who+" "+pod]; got != 1 {
				t.Errorf("%s %s got %d datagrams, 1 of them honest", who, pod, got)
			}
		}
	}
	for _, pod := range []string{"near", "far"} {
		if table := ours.Exec(pod, "cat", "/proc/net/arp"); strings.Contains(table, me) {
			t.Errorf("%s believes the guest:\n%s", pod, table)
		}
		want(t, ours, pod, "http://"+own+":8080/hostname", "guest")
	}
	want(t, ours, "guest", "http://"+near+":8080/hostname", "near")
	want(t, theirs, "near", "http://"+far+":8080/hostname", "far")
	rounds := strings.Count(flow.Output(), "\n")
	ours.Until("the flow goes on", testcluster.Patience, func() bool { return strings.Count(flow.Output(), "\n") > rounds+1 })
	if strings.Contains(flow.Output(), "broke") {
		t.Error(flow.Output())
	}
	flow.Stop()
}

// datagrams is how many UDP packets came to a Pod.
func datagrams(t testing.TB, n *testcluster.Namespace, pod string) int {
	t.Helper()
	var names []string
	for line := range strings.Lines(n.Exec(pod, "cat", "/proc/net/snmp")) {
		f := strings.Fields(line)
		if len(f) == 0 || f[0] != "Udp:" {
			continue
		}
		if names == nil {
			names = f
			continue
		}
		sum := 0
		for i, v := range f {
			if i < len(names) && (names[i] == "InDatagrams" || names[i] == "NoPorts" || names[i] == "InErrors") {
				x, err := strconv.Atoi(v)
				if err != nil {
					t.Fatal(err)
				}
				sum += x
			}
		}
		return sum
	}
	t.Fatalf("%s has no UDP statistics", pod)
	return 0
}

func hardware(s string) net.HardwareAddr {
	m, err := net.ParseMAC(s)
	if err != nil {
		panic(err) // a constant, or what a kernel says
	}
	return m
}

func ethernet(dst, src string, kind uint16, body []byte) []byte {
	return append(binary.BigEndian.AppendUint16(append(hardware(dst), hardware(src)...), kind), body...)
}

// datagram is a UDP packet in IPv4.
func datagram(from, to string, port uint16, payload []byte) []byte {
	b := []byte{0x45, 0, 0, 0, 0x12, 0x34, 0, 0, 64, 17, 0, 0}
	binary.BigEndian.PutUint16(b[2:], uint16(28+len(payload)))
	b = append(append(b, netip.MustParseAddr(from).AsSlice()...), netip.MustParseAddr(to).AsSlice()...)
	sum := uint32(0)
	for i := 0; i < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(b[10:], ^uint16(sum))
	for _, v := range []uint16{9999, port, uint16(8 + len(payload)), 0} { // no checksum
		b = binary.BigEndian.AppendUint16(b, v)
	}
	return append(b, payload...)
}

func arpReply(fromMAC, from, toMAC, to string) []byte {
	b := append([]byte{0, 1, 8, 0, 6, 4, 0, 2}, hardware(fromMAC)...)
	b = append(append(b, netip.MustParseAddr(from).AsSlice()...), hardware(toMAC)...)
	return append(b, netip.MustParseAddr(to).AsSlice()...)
}

// overlayMAC is that of a node's end of every overlay.
func overlayMAC(node string) string {
	return net.HardwareAddr(append([]byte{0x0a, 0x69}, netip.MustParseAddr(node).AsSlice()...)).String()
}
