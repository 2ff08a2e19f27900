package edgetest

import (
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strings"

	"github.com/vishvananda/netlink"

	"github.com/hypernetes/hypernetes/network/edge"
	"github.com/hypernetes/hypernetes/network/netns"
)

// Carrier carries one Network on a layer 2, as OpenStack's Neutron does with the
// linuxbridge agent: a bridge on each node, joined; a router at the gateways' addresses
// that translates what leaves to its own address on the fabric; and a machine that is no
// Pod. The bridges take from a Pod's uplink only what has its port's MAC and addresses, in
// ARP and neighbour discovery, too.
type Carrier struct {
	rig    *Rig
	bridge string
	L2     *netns.NS
	Router *netns.NS
	// External4 and External6 are where what leaves comes from.
	External4, External6 netip.Addr
	// Host has 192.168.0.200 and fd00:1::200.
	Host *netns.NS
}

// Carried makes a Network with a Carrier and edges on all nodes; number is below 50.
func (r *Rig) Carried(name string, number int, change ...func(*edge.Spec)) *Network {
	r.t.Helper()
	c := r.Carrier(name, number)
	return r.network(name, uint32(0xca000000+number), c, append([]func(*edge.Spec){func(s *edge.Spec) { s.VNI, s.Uplinks = 0, true }}, change...)...)
}

// Carrier makes a Carrier.
func (r *Rig) Carrier(name string, number int) *Carrier {
	r.t.Helper()
	c := &Carrier{
		rig: r, bridge: fmt.Sprintf("brq%d", number), L2: r.Namespace(name + "-l2"),
		External4: netip.AddrFrom4([4]byte{100, 64, 0, byte(100 + number)}), External6: netip.MustParseAddr(fmt.Sprintf("fd00:64::1%02d", number)),
	}
	l2, err := c.L2.Netlink()
	must(r.t, err)
	defer l2.Close()
	addBridge(r, l2, "br0")
	for i, n := range r.Nodes {
		nl, err := n.NS.Netlink()
		must(r.t, err)
		addBridge(r, nl, c.bridge)
		a := netlink.NewLinkAttrs()
		a.Name = fmt.Sprintf("n%d", i)
		v := netlink.NewVeth(a)
		v.PeerName, v.PeerNamespace = fmt.Sprintf("phys%d", number), netlink.NsFd(n.NS.FD())
		must(r.t, l2.LinkAdd(v))
		enslave(r, l2, a.Name, "br0")
		enslave(r, nl, v.PeerName, c.bridge)
		nl.Close()
		Command(r, n.NS, "nft", "add table bridge agent; add chain bridge agent prerouting { type filter hook prerouting priority 0; }; add chain bridge agent refuse; add rule bridge agent refuse counter drop")
	}
	s := edge.Spec{Gateways: []netip.Addr{netip.MustParseAddr("192.168.0.1"), netip.MustParseAddr("fd00:1::1")}}
	c.Router = r.Namespace(name + "-router")
	r.join(l2, c.Router, "router", s.Gateways...)
	f, err := r.fabric.Netlink()
	must(r.t, err)
	defer f.Close()
	a := netlink.NewLinkAttrs()
	a.Name = fmt.Sprintf("r%d", number)
	v := netlink.NewVeth(a)
	v.PeerName, v.PeerNamespace = "eth1", netlink.NsFd(c.Router.FD())
	must(r.t, f.LinkAdd(v))
	enslave(r, f, a.Name, "br0")
	Command(r, c.Router, "sh", "-c", fmt.Sprintf(`set -e
		echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
		ip link set eth1 up; ip addr add %s/24 dev eth1; ip addr add %s/64 dev eth1 nodad
		nft 'add table inet nat; add chain inet nat post { type nat hook postrouting priority 100; }; add rule inet nat post oifname eth1 masquerade'`, c.External4, c.External6))
	c.Host = r.Namespace(name + "-host")
	r.join(l2, c.Host, "host", netip.MustParseAddr("192.168.0.200"), netip.MustParseAddr("fd00:1::200"))
	Command(r, c.Host, "sh", "-c", "ip route add default via 192.168.0.1; ip route add default via fd00:1::1")
	return c
}

func addBridge(r *Rig, h *netlink.Handle, name string) {
	a := netlink.NewLinkAttrs()
	a.Name = name
	must(r.t, h.LinkAdd(&netlink.Bridge{LinkAttrs: a}))
	l, err := h.LinkByName(name)
	must(r.t, err)
	must(r.t, h.LinkSetUp(l))
}

func enslave(r *Rig, h *netlink.Handle, name, bridge string) {
	r.t.Helper()
	br, err := h.LinkByName(bridge)
	must(r.t, err)
	l, err := h.LinkByName(name)
	must(r.t, err)
	must(r.t, h.LinkSetMaster(l, br))
	must(r.t, h.LinkSetUp(l))
}

// Wire does what the agent does when it finds a Pod's uplink.
func (c *Carrier) Wire(p *Pod) {
	c.rig.t.Helper()
	must(c.rig.t, c.Plug(p.Node, p.Attachment.Uplink, p.Attachment.MAC, p.Addresses))
}

// Plug does it for a link of a node's by name, if it is not wired yet.
func (c *Carrier) Plug(node *Node, tap string, mac net.HardwareAddr, addresses []netip.Addr) error {
	nl, err := node.NS.Netlink()
	if err != nil {
		return err
	}
	defer nl.Close()
	br, err := nl.LinkByName(c.bridge)
	if err != nil {
		return err
	}
	l, err := nl.LinkByName(tap)
	if err != nil {
		return err
	}
	if l.Attrs().MasterIndex == br.Attrs().Index {
		return nil
	}
	var v4, v6 []string
	for _, a := range addresses {
		if a.Is4() {
			v4 = append(v4, a.String())
		} else {
			v6 = append(v6, a.String())
		}
	}
	var rules strings.Builder
	from := fmt.Sprintf("add rule bridge agent prerouting iifname %s ", tap)
	fmt.Fprintf(&rules, "%sether saddr != %s goto refuse; ", from, mac)
	one := func(match string, addrs []string) {
		fmt.Fprintf(&rules, "%s%s != { %s } goto refuse; ", from, match, strings.Join(addrs, ", "))
	}
	if len(v4) > 0 {
		one("arp saddr ip", v4)
		fmt.Fprintf(&rules, "%sarp saddr ether != %s goto refuse; ", from, mac)
		one("ip saddr", v4)
	} else {
		fmt.Fprintf(&rules, "%sether type { arp, ip } goto refuse; ", from)
	}
	// Listener reports, as Neutron lets pass.
	fmt.Fprintf(&rules, "%sip6 saddr :: ip6 daddr ff02::16 accept; ", from)
	if len(v6) > 0 {
		one("ip6 saddr", v6)
		fmt.Fprintf(&rules, "%sicmpv6 type { nd-router-advert, nd-redirect } goto refuse; ", from)
		for _, a := range v6 { // one in all tests
			fmt.Fprintf(&rules, "%sicmpv6 type nd-neighbor-advert @th,64,128 != 0x%x goto refuse; ", from, netip.MustParseAddr(a).AsSlice())
		}
	} else {
		fmt.Fprintf(&rules, "%sether type ip6 goto refuse; ", from)
	}
	if out, err := command(node.NS, "nft", rules.String()); err != nil {
		return fmt.Errorf("nft: %w: %s", err, out)
	}
	return nl.LinkSetMaster(l, br)
}

// Refused is how many frames of uplinks the bridges of a node did not take, of all
// Networks.
func (c *Carrier) Refused(n *Node) string {
	c.rig.t.Helper()
	out := Command(c.rig, n.NS, "nft", "list chain bridge agent refuse")
	for l := range strings.Lines(out) {
		if f := strings.Fields(l); len(f) > 2 && f[0] == "counter" {
			return f[2]
		}
	}
	return out
}

// Command runs a command in a namespace.
func Command(r *Rig, ns *netns.NS, args ...string) string {
	r.t.Helper()
	out, err := command(ns, args...)
	if err != nil {
		r.t.Fatalf("%v: %v: %s", args, err, out)
	}
	return out
}

func command(ns *netns.NS, args ...string) (string, error) {
	out, err := exec.Command("nsenter", append([]string{"--net=" + ns.Path()}, args...)...).CombinedOutput()
	return string(out), err
}
