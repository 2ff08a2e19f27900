package node

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"

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

// configureNetwork sets up the calling process's (new) network namespace: loopback,
// a link that holds the node's address, and a route for Service addresses, which
// must be routable before they are translated.
func configureNetwork(nodeIP string) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("lo: %w", err)
	}
	l, err := addLink()
	if err != nil {
		return err
	}
	ip := net.ParseIP(nodeIP)
	addr := &netlink.Addr{IPNet: &net.IPNet{IP: ip, Mask: net.CIDRMask(32, 32)}}
	if err := netlink.AddrAdd(l, addr); err != nil {
		return fmt.Errorf("%s: address %s: %w", link, nodeIP, err)
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return fmt.Errorf("%s: %w", link, err)
	}
	for _, cidr := range []string{settings.ServiceCIDR} {
		_, dst, err := net.ParseCIDR(cidr)
		if err != nil {
			return err
		}
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: dst, Src: ip, Scope: netlink.SCOPE_LINK}); err != nil {
			return fmt.Errorf("route %s: %w", cidr, err)
		}
	}
	if err := addRules(rulesTable, true); err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	for _, s := range sysctls {
		if err := os.WriteFile("/proc/sys/"+s.key, []byte(s.value), 0); err != nil {
			return fmt.Errorf("sysctl: %w", err)
		}
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

// addLink makes a dummy interface, or a bridge without ports where the kernel has
// no dummy driver; both hold an address without a peer.
func addLink() (netlink.Link, error) {
	err := netlink.LinkAdd(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: link}})
	if errors.Is(err, unix.EOPNOTSUPP) {
		err = netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: link}})
	}
	if err != nil {
		return nil, fmt.Errorf("make %s: %w", link, err)
	}
	return netlink.LinkByName(link)
}
