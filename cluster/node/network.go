package node

import (
	"crypto/rand"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/cluster/settings"
)

// link is the interface that carries the node's address.
const link = "h8s0"

// sysctls of the node's network namespace.
var sysctls = []struct{ key, value string }{
	{"net/ipv4/ip_forward", "1"},
	// Pods are routed, not bridged: a Pod that reaches itself through a Service is
	// sent back where it came from, which is no reason for an ICMP redirect.
	{"net/ipv4/conf/all/send_redirects", "0"},
	{"net/ipv4/conf/default/send_redirects", "0"},
	// Loose, because replies to a translated hostPort connection come in on a veth.
	{"net/ipv4/conf/all/rp_filter", "0"},
	{"net/ipv4/conf/default/rp_filter", "0"},
}

// configureNetwork sets up the calling process's (new) network namespace: loopback, the
// rules and sysctls of a node, and the link that carries its address. A node attached to
// another's network gets its link from there (attach).
func configureNetwork(s settings.Node) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("lo: %w", err)
	}
	if err := addRules(rulesTable, true); err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	for _, s := range sysctls {
		if err := os.WriteFile("/proc/sys/"+s.key, []byte(s.value), 0); err != nil {
			return fmt.Errorf("sysctl: %w", err)
		}
	}
	if s.Of != "" {
		return nil
	}
	if err := addBridge(); err != nil {
		return err
	}
	return address(s.NodeIP)
}

// address gives the node's link its address, sets it up, and routes Service addresses
// by it, which must be routable before they are translated. All of it may be there.
func address(nodeIP string) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return fmt.Errorf("%s: %w", link, err)
	}
	_, nodes, err := net.ParseCIDR(settings.NodeCIDR)
	if err != nil {
		return err
	}
	ip := net.ParseIP(nodeIP)
	if !nodes.Contains(ip) {
		return fmt.Errorf("node IP %s: not of the nodes' network %s", nodeIP, settings.NodeCIDR)
	}
	if err := netlink.AddrReplace(l, &netlink.Addr{IPNet: &net.IPNet{IP: ip, Mask: nodes.Mask}}); err != nil {
		return fmt.Errorf("%s: address %s: %w", link, nodeIP, err)
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return fmt.Errorf("%s: %w", link, err)
	}
	_, dst, err := net.ParseCIDR(settings.ServiceCIDR)
	if err != nil {
		return err
	}
	if err := netlink.RouteReplace(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: dst, Src: ip, Scope: netlink.SCOPE_LINK}); err != nil {
		return fmt.Errorf("route %s: %w", settings.ServiceCIDR, err)
	}
	return nil
}

// rulesTable holds the node's own packet filter rules.
const rulesTable = "h8s"

// addRules makes the table called name anew in the calling process's network namespace.
func addRules(name string, egress bool) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	table := &nftables.Table{Family: nftables.TableFamilyIPv4, Name: name}
	c.AddTable(table) // deleting one that is not there would fail
	c.DelTable(table)
	c.AddTable(table)
	guardLoopback(c, table)
	if egress {
		masquerade(c, table)
	}
	return c.Flush()
}

// guardLoopback drops what comes from elsewhere for 127.0.0.0/8. The kernel would do so
// itself, but for a Pod with a hostPort the portmap plugin sets route_localnet on its
// link, and such a Pod could then talk to whatever listens on the node's loopback: the
// proxy of image pulls, etcd, the debugging ports of components (as in CVE-2020-8558).
// Before connection tracking, answers to connections from loopback still carry the
// address they were translated to, so these are not meant.
func guardLoopback(c *nftables.Conn, table *nftables.Table) {
	chain := c.AddChain(&nftables.Chain{
		Name: "prerouting", Table: table, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityRaw,
	})
	lo := make([]byte, unix.IFNAMSIZ)
	copy(lo, "lo")
	c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: lo},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 1}, // of the destination
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{127}},
		&expr.Counter{},
		&expr.Verdict{Kind: expr.VerdictDrop},
	}})
}

// masquerade gives what leaves by the egress link the node's address there. Without
// that link the rule matches nothing.
func masquerade(c *nftables.Conn, table *nftables.Table) {
	chain := c.AddChain(&nftables.Chain{
		Name: "postrouting", Table: table, Type: nftables.ChainTypeNAT,
		Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource,
	})
	name := make([]byte, unix.IFNAMSIZ)
	copy(name, settings.EgressLink)
	c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: name},
		&expr.Masq{},
	}})
}

// RemoveRules deletes the node's own table and the nftables tables called names, of any
// family, in the calling process's network namespace. Other tables are not touched.
func RemoveRules(names ...string) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	tables, err := c.ListTables()
	if err != nil {
		return err
	}
	for _, t := range tables {
		if t.Name == rulesTable || slices.Contains(names, t.Name) {
			c.DelTable(t)
		}
	}
	return c.Flush()
}

// addBridge makes the node's link a bridge: it holds an address without a peer, and
// further nodes of this machine are attached to it. Its hardware address is given, or it
// would change with the ports that come and go.
func addBridge() error {
	mac := make(net.HardwareAddr, 6)
	if _, err := rand.Read(mac); err != nil {
		return err
	}
	mac[0] = mac[0]&^1 | 2 // one host's, locally administered
	err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: link, HardwareAddr: mac}})
	if err != nil {
		return fmt.Errorf("make %s: %w", link, err)
	}
	return nil
}

// Attach connects the node to the network of the node first by a pair of links, unless it
// is: the namespaces of either may have been made anew since. The pair ends with any of
// the two.
func (n *Node) Attach(first *Node) error {
	there := false
	err := onOwnThread(func() error {
		if err := n.enter([]namespace{netNS}); err != nil {
			return err
		}
		l, err := netlink.LinkByName(link)
		there = err == nil && l.Attrs().OperState != netlink.OperLowerLayerDown
		return nil
	})
	if err != nil {
		return err
	}
	if !there {
		if err := onOwnThread(func() error { return first.plug(n) }); err != nil {
			return fmt.Errorf("attach to node %s: %w", first.Layout.Name, err)
		}
	}
	return onOwnThread(func() error {
		if err := n.enter([]namespace{netNS}); err != nil {
			return err
		}
		return address(n.Settings.NodeIP)
	})
}

// plug makes the pair, on a thread of its own.
func (n *Node) plug(other *Node) error {
	if err := n.enter([]namespace{netNS}); err != nil {
		return err
	}
	bridge, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	name := portName(other.Settings.NodeIP)
	if old, err := netlink.LinkByName(name); err == nil {
		if err := netlink.LinkDel(old); err != nil {
			return err
		}
	}
	pair := netlink.NewVeth(netlink.LinkAttrs{Name: name, MTU: mtu, MasterIndex: bridge.Attrs().Index})
	pair.PeerName, pair.PeerNamespace = link, netlink.NsPid(other.AnchorPID())
	if err := netlink.LinkAdd(pair); err != nil {
		return err
	}
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(l)
}

// mtu of the links between the nodes of one machine.
const mtu = 1500

// portName is the bridge's port of the node with this address.
func portName(nodeIP string) string {
	return "n" + nodeIP[strings.LastIndexByte(nodeIP, '.')+1:]
}
