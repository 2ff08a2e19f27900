// Package edgetest builds the world edges live in, out of network namespaces, for tests:
// nodes joined by a bridge, a machine outside, Networks with edges on the nodes, and Pods
// that are plain namespaces. It needs root and says so when it skips; everything is gone
// when the test ends.
//
//	rig := edgetest.New(t, 2)
//	red := rig.Network("red", 4097)                          // 192.168.0.0/24, fd00:1::/64
//	a := red.Pod(rig.Nodes[0], "a", "192.168.0.5")           // attached and up
//	b := red.Pod(rig.Nodes[1], "b", "192.168.0.6")
//	edgetest.Echo(t, b.NS, "b", "192.168.0.6:80")            // TCP and UDP
//	answer, err := edgetest.Ask(a.NS, "tcp", "192.168.0.6:80") // "b 192.168.0.5"
//
// The outside machine is at 100.64.0.200 and fd00:64::200, node i (from 1) at 100.64.0.i
// and fd00:64::i. An Echo at node 1's port 6443 is the API server of all nodes.
package edgetest

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/network/edge"
	"github.com/hypernetes/hypernetes/network/netns"
)

// Port is the overlay's UDP port in the rig.
const Port = 8473

// MTU is a Pod's; the fabric's is 50 more.
const MTU = 1450

// Rig is the world.
type Rig struct {
	t       testing.TB
	dir     string
	fabric  *netns.NS
	Nodes   []*Node
	Outside *netns.NS
	// OutsideAddresses are those of Outside.
	OutsideAddresses []netip.Addr
}

// Node is a node.
type Node struct {
	Name    string
	Address netip.Addr
	// Address6 is its second one.
	Address6 netip.Addr
	NS       *netns.NS
	Dir      string
	Manager  *edge.Manager
	Host     edge.Host
}

// Network is a Network with an edge on every node.
type Network struct {
	rig  *Rig
	Name string
	// Spec without what differs from node to node; change it and call Ensure.
	Spec edge.Spec
	// External by node; Spec.External is for all.
	External map[*Node][]edge.External
	Edges    map[*Node]*edge.Edge
	Pods     []*Pod
	// Carrier is who carries it, if not the nodes.
	Carrier *Carrier
}

// Pod is a Pod: a namespace with an eth0.
type Pod struct {
	Network    *Network
	Name       string
	Node       *Node
	NS         *netns.NS
	Addresses  []netip.Addr
	Attachment edge.Attachment
}

// New makes a world with that many nodes.
func New(t testing.TB, nodes int) *Rig {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it makes network namespaces")
	}
	dir, err := os.MkdirTemp("", "edgetest-")
	must(t, err)
	r := &Rig{t: t, dir: dir}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	r.fabric = r.Namespace("fabric")
	f, err := r.fabric.Netlink()
	must(t, err)
	defer f.Close()
	bridge := netlink.NewLinkAttrs()
	bridge.Name = "br0"
	must(t, f.LinkAdd(&netlink.Bridge{LinkAttrs: bridge}))
	br, err := f.LinkByName("br0")
	must(t, err)
	must(t, f.LinkSetUp(br))
	for i := 1; i <= nodes; i++ {
		n := &Node{
			Name:     fmt.Sprintf("node-%d", i),
			Address:  netip.AddrFrom4([4]byte{100, 64, 0, byte(i)}),
			Address6: netip.MustParseAddr(fmt.Sprintf("fd00:64::%x", i)),
			Dir:      filepath.Join(dir, fmt.Sprintf("edges-%d", i)),
		}
		n.NS = r.Namespace(n.Name)
		r.join(f, n.NS, fmt.Sprintf("n%d", i), n.Address, n.Address6)
		r.Nodes = append(r.Nodes, n)
	}
	r.Outside = r.Namespace("outside")
	r.OutsideAddresses = []netip.Addr{netip.MustParseAddr("100.64.0.200"), netip.MustParseAddr("fd00:64::200")}
	r.join(f, r.Outside, "out", r.OutsideAddresses...)
	for _, n := range r.Nodes {
		n.Manager = r.NewManager(n)
		n.Host = edge.Host{
			APIServers: []netip.AddrPort{netip.AddrPortFrom(r.Nodes[0].Address, 6443)},
			Reserved:   []netip.Prefix{netip.MustParsePrefix("10.96.0.0/12"), netip.MustParsePrefix("10.255.0.0/16"), netip.MustParsePrefix("fd00:10:96::/108")},
		}
		for _, o := range r.Nodes {
			n.Host.Nodes = append(n.Host.Nodes, o.Address, o.Address6)
		}
		must(t, n.Manager.SetHost(context.Background(), n.Host))
	}
	// Before the namespaces go, which takes what somebody else may still hold.
	t.Cleanup(func() {
		for _, n := range r.Nodes {
			ids, err := n.Manager.List()
			if err != nil {
				t.Error(err)
			}
			for _, id := range ids {
				if err := n.Manager.Remove(context.Background(), id); err != nil {
					t.Error(err)
				}
			}
		}
	})
	return r
}

// NewManager makes another manager of a node, as after a restart of the daemon.
func (r *Rig) NewManager(n *Node) *edge.Manager {
	r.t.Helper()
	m, err := edge.New(edge.Config{Dir: n.Dir, Node: n.Address, VXLANPort: Port, NS: n.NS})
	must(r.t, err)
	return m
}

// Namespace makes a namespace with loopback up; it is removed with the rig.
func (r *Rig) Namespace(name string) *netns.NS {
	r.t.Helper()
	path := filepath.Join(r.dir, "netns", name)
	ns, err := netns.Create(path)
	must(r.t, err)
	r.t.Cleanup(func() {
		_ = ns.Close()
		if err := netns.Remove(path); err != nil {
			r.t.Error(err)
		}
	})
	nl, err := ns.Netlink()
	must(r.t, err)
	defer nl.Close()
	lo, err := nl.LinkByName("lo")
	must(r.t, err)
	must(r.t, nl.LinkSetUp(lo))
	return ns
}

// join links a namespace to the fabric by its eth0.
func (r *Rig) join(f *netlink.Handle, ns *netns.NS, port string, addrs ...netip.Addr) {
	r.t.Helper()
	a := netlink.NewLinkAttrs()
	a.Name, a.MTU = port, MTU+50
	v := netlink.NewVeth(a)
	v.PeerName, v.PeerNamespace, v.PeerMTU = "eth0", netlink.NsFd(ns.FD()), MTU+50
	must(r.t, f.LinkAdd(v))
	br, err := f.LinkByName("br0")
	must(r.t, err)
	l, err := f.LinkByName(port)
	must(r.t, err)
	must(r.t, f.LinkSetMaster(l, br))
	must(r.t, f.LinkSetUp(l))
	nl, err := ns.Netlink()
	must(r.t, err)
	defer nl.Close()
	eth, err := nl.LinkByName("eth0")
	must(r.t, err)
	must(r.t, nl.LinkSetUp(eth))
	for _, x := range addrs {
		p := netip.PrefixFrom(x, 24)
		if x.Is6() {
			p = netip.PrefixFrom(x, 64)
		}
		must(r.t, nl.AddrAdd(eth, &netlink.Addr{IPNet: &net.IPNet{IP: x.AsSlice(), Mask: net.CIDRMask(p.Bits(), x.BitLen())}, Flags: nodad(x)}))
	}
	// Asking for a link makes the kernel take its new carrier into account.
	_, err = nl.LinkByName("eth0")
	must(r.t, err)
	_, err = f.LinkByName(port)
	must(r.t, err)
}

func nodad(a netip.Addr) int {
	if a.Is6() {
		return unix.IFA_F_NODAD
	}
	return 0
}

// Network makes a Network with edges on all nodes: 192.168.0.0/24 and fd00:1::/64, the
// same for all unless change says otherwise.
func (r *Rig) Network(name string, vni uint32, change ...func(*edge.Spec)) *Network {
	r.t.Helper()
	return r.network(name, vni, nil, change...)
}

func (r *Rig) network(name string, vni uint32, c *Carrier, change ...func(*edge.Spec)) *Network {
	r.t.Helper()
	n := &Network{rig: r, Name: name, Carrier: c, Edges: map[*Node]*edge.Edge{}, External: map[*Node][]edge.External{}}
	n.Spec = edge.Spec{
		ID: fmt.Sprintf("%08x", vni), Name: "test/" + name, VNI: vni, MTU: MTU,
		Subnets:  []netip.Prefix{netip.MustParsePrefix("192.168.0.0/24"), netip.MustParsePrefix("fd00:1::/64")},
		Gateways: []netip.Addr{netip.MustParseAddr("192.168.0.1"), netip.MustParseAddr("fd00:1::1")},
		Local:    []netip.Addr{netip.MustParseAddr("10.96.0.10")},
		Egress:   true,
	}
	for _, c := range change {
		c(&n.Spec)
	}
	n.Ensure()
	return n
}

// SpecFor is the Spec as a node gets it.
func (n *Network) SpecFor(node *Node) edge.Spec {
	s := n.Spec
	s.Ports = slices.Clone(s.Ports)
	for _, p := range n.Pods {
		port := edge.Port{Addresses: p.Addresses, MAC: p.Attachment.MAC, Node: p.Node.Address}
		if p.Node == node {
			port.Link, port.Uplink = p.Attachment.Link, p.Attachment.Uplink
		}
		s.Ports = append(s.Ports, port)
	}
	s.External = append(slices.Clone(s.External), n.External[node]...)
	return s
}

// Ensure brings the edges of all nodes up to date.
func (n *Network) Ensure() {
	n.rig.t.Helper()
	for _, node := range n.rig.Nodes {
		e, err := node.Manager.Ensure(context.Background(), n.SpecFor(node))
		must(n.rig.t, err)
		n.Edges[node] = e
	}
}

// Pod attaches a Pod and lets it up; every node hears of it.
func (n *Network) Pod(node *Node, name string, addresses ...string) *Pod {
	n.rig.t.Helper()
	p := n.NewPod(node, name, addresses...)
	must(n.rig.t, n.Edges[node].Attach(context.Background(), p.Attachment))
	n.Pods = append(n.Pods, p)
	n.Ensure()
	if n.Carrier != nil {
		n.Carrier.Wire(p)
	}
	must(n.rig.t, n.Edges[node].Up(context.Background(), p.Attachment.Link))
	return p
}

// NewPod makes the namespace only.
func (n *Network) NewPod(node *Node, name string, addresses ...string) *Pod {
	n.rig.t.Helper()
	p := &Pod{Network: n, Name: name, Node: node, NS: n.rig.Namespace(n.Name + "-" + name)}
	a := edge.Attachment{Link: edge.LinkName(n.Name+name, "eth0"), NetNS: p.NS.Path(), Interface: "eth0", MTU: n.Spec.MTU, Default: true, Subnets: n.Spec.Subnets}
	for _, x := range addresses {
		ip := netip.MustParseAddr(x)
		p.Addresses = append(p.Addresses, ip)
		for i, s := range n.Spec.Subnets {
			if s.Contains(ip) {
				a.Gateways = append(a.Gateways, n.Spec.Gateways[i])
			}
		}
	}
	b := p.Addresses[0].As16()
	a.MAC = append(net.HardwareAddr{0x0a, 0x58}, b[12:]...)
	a.Addresses = p.Addresses
	if n.Carrier != nil {
		sum := sha256.Sum256([]byte(n.Name + "/" + name))
		a.MAC = append(net.HardwareAddr{0xfa, 0x16, 0x3e}, sum[:3]...)
		a.Uplink = fmt.Sprintf("tap%x-%x", sum[:4], sum[4:5])
	}
	p.Attachment = a
	return p
}

// Delete detaches a Pod.
func (p *Pod) Delete() {
	n := p.Network
	n.rig.t.Helper()
	n.Pods = slices.DeleteFunc(n.Pods, func(o *Pod) bool { return o == p })
	must(n.rig.t, n.Edges[p.Node].Detach(context.Background(), p.Attachment.Link))
	n.Ensure()
}

// Echo answers TCP and UDP at an address with name and the client's address, until the
// test ends. A TCP connection stays open and gets one answer per line it sends.
func Echo(t testing.TB, ns *netns.NS, name, address string) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	l, err := ns.Listen(ctx, "tcp", address)
	must(t, err)
	u, err := ns.ListenPacket(ctx, "udp", address)
	must(t, err)
	done := make(chan struct{}, 2)
	go func() {
		defer func() { done <- struct{}{} }()
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			context.AfterFunc(ctx, func() { _ = c.Close() })
			go func() { // ends with its connection, which ctx closes
				defer func() { _ = c.Close() }()
				lines := bufio.NewScanner(c)
				for lines.Scan() {
					if _, err := fmt.Fprintf(c, "%s %s\n", name, client(c.RemoteAddr())); err != nil {
						return
					}
				}
			}()
		}
	}()
	go func() {
		defer func() { done <- struct{}{} }()
		buf := make([]byte, 64<<10)
		for {
			_, from, err := u.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = u.WriteTo(fmt.Appendf(nil, "%s %s\n", name, client(from)), from)
		}
	}()
	t.Cleanup(func() {
		cancel()
		_, _ = l.Close(), u.Close()
		<-done
		<-done
	})
}

func client(a net.Addr) string {
	ap, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return a.String()
	}
	return ap.Addr().Unmap().WithZone("").String()
}

// Patience is how long an answer may take that must come, and impatience how long one is
// waited for that must not.
const (
	Patience   = 30 * time.Second
	impatience = time.Second
)

// Ask asks an Echo for its answer. Where none comes it asks anew, as a connection whose
// first packet went astray while the way was made would stay on that wrong way, and nobody
// repeats a lost datagram.
func Ask(ns *netns.NS, network, address string) (string, error) {
	deadline := time.Now().Add(Patience)
	for wait := impatience; ; wait *= 2 {
		left := time.Until(deadline)
		got, err := ask(ns, network, address, min(wait, left))
		var late net.Error
		if err == nil || left <= wait || !errors.As(err, &late) || !late.Timeout() {
			return got, err
		}
	}
}

func ask(ns *netns.NS, network, address string, patience time.Duration) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	c, err := ns.DialContext(ctx, network, address)
	if err != nil {
		return "", err
	}
	defer func() { _ = c.Close() }()
	return again(c, patience)
}

// Again asks over a connection there is.
func Again(c net.Conn) (string, error) { return again(c, Patience) }

func again(c net.Conn, patience time.Duration) (string, error) {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return "", err
	}
	if _, err := io.WriteString(c, "?\n"); err != nil {
		return "", err
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	return strings.TrimSpace(line), err
}

// Expect asks and wants that answer.
func Expect(t testing.TB, ns *netns.NS, network, address, want string) {
	t.Helper()
	got, err := Ask(ns, network, address)
	if err != nil || got != want {
		t.Errorf("%s %s: answer %q, %v; want %q", network, address, got, err, want)
	}
}

// Refuse asks at all these addresses, at once, and wants no answer.
func Refuse(t testing.TB, ns *netns.NS, network string, addresses ...string) {
	t.Helper()
	var wait sync.WaitGroup
	for _, a := range addresses {
		wait.Go(func() {
			if got, err := ask(ns, network, a, impatience); err == nil {
				t.Errorf("%s %s: answer %q, want none", network, a, got)
			}
		})
	}
	wait.Wait()
}

// KubeProxy gives the node those of kube-proxy's rules that are about ClusterIPs it does
// not know: tenants' Services are not for it.
func KubeProxy(t testing.TB, n *Node) {
	t.Helper()
	const rules = `table ip kube-proxy {
	chain cluster-ips-check { ip daddr 10.96.0.0/12 counter drop; }
	chain filter-forward { type filter hook forward priority filter; ct state new jump cluster-ips-check; }
	chain filter-output { type filter hook output priority filter; ct state new jump cluster-ips-check; }
}`
	cmd := exec.CommandContext(t.Context(), "nsenter", "--net="+n.NS.Path(), "nft", "-f", "-")
	cmd.Stdin = strings.NewReader(rules)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("kube-proxy's rules: %v: %s", err, out)
	}
}

// Ping sends ICMP echo requests, one a second, until there is a reply.
func Ping(ns *netns.NS, address string) error {
	a, err := netip.ParseAddr(address)
	if err != nil {
		return err
	}
	network, request, reply := "ip4:icmp", byte(8), byte(0)
	if a.Is6() {
		network, request, reply = "ip6:ipv6-icmp", 128, 129
	}
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	c, err := ns.DialContext(ctx, network, address)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	b := []byte{request, 0, 0, 0, 0x68, 0x38, 0, 1}
	if a.Is4() { // the kernel does it for IPv6
		s := uint32(request)<<8 + 0x6838 + 1
		binary.BigEndian.PutUint16(b[2:], ^uint16(s+s>>16))
	}
	for deadline, buf := time.Now().Add(Patience), make([]byte, 2048); ; {
		if err := c.SetDeadline(time.Now().Add(impatience)); err != nil {
			return err
		}
		if _, err := c.Write(b); err != nil {
			return err
		}
		for {
			n, err := c.Read(buf)
			if errors.Is(err, os.ErrDeadlineExceeded) && time.Now().Before(deadline) {
				break // and sent again
			} else if err != nil {
				return err
			}
			got := buf[:n]
			if a.Is4() && n >= 20 {
				got = got[20:] // Read leaves the header there
			}
			if len(got) >= 8 && got[0] == reply {
				return nil
			}
		}
	}
}

// Inject sends a frame from a namespace's eth0 as it is.
func Inject(t testing.TB, ns *netns.NS, frame []byte) {
	t.Helper()
	must(t, ns.Do(func() error {
		l, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(fd) }()
		return unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: l.Index, Halen: 6})
	}))
}

// Capture takes down the frames that come in at a namespace's link, until stop, which
// returns them. It sees everything that was sent before the call of stop.
func Capture(t testing.TB, ns *netns.NS, link string) (stop func() [][]byte) {
	t.Helper()
	var fd int
	must(t, ns.Do(func() error {
		l, err := net.InterfaceByName(link)
		if err != nil {
			return err
		}
		const all = unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, all); err != nil {
			return err
		}
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20)
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: l.Index})
	}))
	return func() [][]byte {
		defer func() { _ = unix.Close(fd) }()
		var out [][]byte
		for {
			buf := make([]byte, 9<<10)
			n, from, err := unix.Recvfrom(fd, buf, 0)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if err != nil {
				return out
			}
			if ll, ok := from.(*unix.SockaddrLinklayer); ok && ll.Pkttype == unix.PACKET_OUTGOING {
				continue
			}
			out = append(out, buf[:n])
		}
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
