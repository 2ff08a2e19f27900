package service

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/network/netns"
)

var (
	gateway4 = netip.MustParseAddr("192.168.0.1")
	gateway6 = netip.MustParseAddr("fd00:1::1")
	overlay4 = netip.MustParseAddr("100.64.0.1")
	overlay6 = netip.MustParseAddr("fd00:2::1")
	options  = Options{
		Gateways: []netip.Addr{gateway4, gateway6}, Overlay: []netip.Addr{overlay4, overlay6},
		Inside: []netip.Prefix{netip.MustParsePrefix("192.168.0.0/24"), netip.MustParsePrefix("fd00:1::/64")},
	}
	clusterIP4 = netip.MustParseAddr("10.96.7.7")
	clusterIP6 = netip.MustParseAddr("fd00:10:96::7")
	vip4       = netip.MustParseAddr("198.51.100.10")
	vip6       = netip.MustParseAddr("2001:db8:1::10")
)

// patience is how long something that is to come may take on a busy machine.
const patience = 20 * time.Second

// rig is an edge with hosts around it, each routed by its addresses alone.
type rig struct {
	t     testing.TB
	edge  *netns.NS
	table *Table
	wg    sync.WaitGroup
}

// host is a namespace behind the edge.
type host struct {
	*rig
	name   string
	ns     *netns.NS
	v4, v6 netip.Addr
}

func needRoot(t testing.TB) {
	if os.Getuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
}

func namespace(t testing.TB, name string) *netns.NS {
	path := filepath.Join(t.TempDir(), name)
	ns, err := netns.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = ns.Close()
		if err := netns.Remove(path); err != nil {
			t.Error(err)
		}
	})
	h := must(ns.Netlink())(t)
	defer h.Close()
	check(t, h.LinkSetUp(must(h.LinkByName("lo"))(t)))
	return ns
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T { t.Helper(); check(t, err); return v }
}

func ipnet(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

func newRig(t testing.TB) *rig {
	needRoot(t)
	r := &rig{t: t, edge: namespace(t, "edge")}
	t.Cleanup(r.wg.Wait)
	h := must(r.edge.Netlink())(t)
	defer h.Close()
	lo := must(h.LinkByName("lo"))(t)
	for _, a := range []netip.Addr{gateway4, gateway6, overlay4, overlay6} {
		check(t, h.AddrAdd(lo, &netlink.Addr{IPNet: ipnet(a), Flags: unix.IFA_F_NODAD}))
	}
	check(t, r.edge.Do(func() error {
		return errors.Join(
			os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0),
			os.WriteFile("/proc/sys/net/ipv6/conf/all/forwarding", []byte("1"), 0),
			os.WriteFile("/proc/sys/net/ipv4/conf/all/send_redirects", []byte("0"), 0),
			os.WriteFile("/proc/sys/net/ipv4/icmp_ratelimit", []byte("0"), 0))
	}))
	r.table = must(Open(r.edge, options))(t)
	return r
}

// host adds one with its addresses.
func (r *rig) host(name, v4, v6 string) *host {
	t := r.t
	x := &host{rig: r, name: name, ns: namespace(t, name), v4: netip.MustParseAddr(v4), v6: netip.MustParseAddr(v6)}
	e, p := must(r.edge.Netlink())(t), must(x.ns.Netlink())(t)
	defer e.Close()
	defer p.Close()
	v := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "p-" + name}, PeerName: "eth0", PeerNamespace: netlink.NsFd(x.ns.FD())}
	check(t, e.LinkAdd(v))
	here, there := must(e.LinkByName("p-"+name))(t), must(p.LinkByName("eth0"))(t)
	check(t, e.LinkSetUp(here))
	check(t, p.LinkSetUp(there))
	for i, a := range []netip.Addr{x.v4, x.v6} {
		gw := []netip.Addr{gateway4, gateway6}[i]
		check(t, p.AddrAdd(there, &netlink.Addr{IPNet: ipnet(a), Flags: unix.IFA_F_NODAD}))
		check(t, p.NeighSet(&netlink.Neigh{LinkIndex: there.Attrs().Index, IP: gw.AsSlice(), HardwareAddr: here.Attrs().HardwareAddr, State: netlink.NUD_PERMANENT}))
		check(t, e.NeighSet(&netlink.Neigh{LinkIndex: here.Attrs().Index, IP: a.AsSlice(), HardwareAddr: there.Attrs().HardwareAddr, State: netlink.NUD_PERMANENT}))
		check(t, e.RouteAdd(&netlink.Route{LinkIndex: here.Attrs().Index, Dst: ipnet(a), Scope: netlink.SCOPE_LINK}))
		all := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if a.Is6() {
			all = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
		check(t, p.RouteAdd(&netlink.Route{LinkIndex: there.Attrs().Index, Gw: gw.AsSlice(), Flags: int(netlink.FLAG_ONLINK),
			Dst: &net.IPNet{IP: all.Addr().AsSlice(), Mask: net.CIDRMask(0, a.BitLen())}}))
	}
	// Asking for a link makes the kernel take its new carrier into account: until it does,
	// nothing goes out.
	must(e.LinkByName("p-" + name))(t)
	must(p.LinkByName("eth0"))(t)
	return x
}

// serve answers on TCP and UDP port 80: who it is and whom it sees; TCP echoes afterwards.
func (x *host) serve() *host {
	for _, a := range []netip.Addr{x.v4, x.v6} {
		at := netip.AddrPortFrom(a, 80).String()
		l := must(x.ns.Listen(context.Background(), "tcp", at))(x.t)
		u := must(x.ns.ListenPacket(context.Background(), "udp", at))(x.t)
		x.t.Cleanup(func() { _ = l.Close(); _ = u.Close() })
		say := func(peer net.Addr) string {
			return x.name + " " + netip.MustParseAddrPort(peer.String()).Addr().Unmap().String() + "\n"
		}
		x.wg.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				x.wg.Go(func() {
					defer c.Close()
					_ = c.SetDeadline(time.Now().Add(2 * patience))
					_, _ = c.Write([]byte(say(c.RemoteAddr())))
					for s := bufio.NewScanner(c); s.Scan(); {
						_, _ = fmt.Fprintf(c, "%s\n", s.Text())
					}
				})
			}
		})
		x.wg.Go(func() {
			b := make([]byte, 100)
			for {
				_, peer, err := u.ReadFrom(b)
				if err != nil {
					return
				}
				_, _ = u.WriteTo([]byte(say(peer)), peer)
			}
		})
	}
	return x
}

func (x *host) ep(local bool, v6 bool) Endpoint {
	a := x.v4
	if v6 {
		a = x.v6
	}
	return Endpoint{Address: netip.AddrPortFrom(a, 80), Local: local}
}

// ask connects and gives (server, the client as the server sees it).
func (x *host) ask(network string, to netip.Addr, port uint16, wait time.Duration) (server, seen string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	c, err := x.ns.DialContext(ctx, network, netip.AddrPortFrom(to, port).String())
	if err != nil {
		return "", "", err
	}
	defer c.Close()
	return hear(c, network, wait)
}

func hear(c net.Conn, network string, wait time.Duration) (server, seen string, err error) {
	b, n := make([]byte, 200), 0
	for end := time.Now().Add(wait); ; {
		deadline := end
		if strings.HasPrefix(network, "udp") { // nobody repeats a lost datagram
			if again := time.Now().Add(2 * time.Second); again.Before(end) {
				deadline = again
			}
			if _, err := c.Write([]byte("?")); err != nil {
				return "", "", err
			}
		}
		_ = c.SetDeadline(deadline)
		if n, err = c.Read(b); err == nil {
			break
		} else if deadline == end || !errors.Is(err, os.ErrDeadlineExceeded) {
			return "", "", err
		}
	}
	server, seen, _ = strings.Cut(strings.TrimSpace(string(b[:n])), " ")
	return server, seen, nil
}

// want asks and compares; empty server means any.
func (x *host) want(network string, to netip.Addr, port uint16, server, seen string) {
	x.t.Helper()
	s, c, err := x.ask(network, to, port, patience)
	if err != nil || server != "" && s != server || seen != "" && c != seen {
		x.t.Errorf("%s from %s to %s port %d: got (%q, %q, %v), want (%q, %q)", network, x.name, to, port, s, c, err, server, seen)
	}
}

func (x *host) refused(network string, to netip.Addr, port uint16) {
	x.t.Helper()
	if s, _, err := x.ask(network, to, port, patience); !errors.Is(err, unix.ECONNREFUSED) {
		x.t.Errorf("%s from %s to %s port %d: got (%q, %v), want it refused", network, x.name, to, port, s, err)
	}
}

func (x *host) silent(network string, to netip.Addr, port uint16) {
	x.t.Helper()
	s, _, err := x.ask(network, to, port, 300*time.Millisecond)
	var n net.Error
	if err == nil || !errors.As(err, &n) || !n.Timeout() {
		x.t.Errorf("%s from %s to %s port %d: got (%q, %v), want silence", network, x.name, to, port, s, err)
	}
}

func (r *rig) sync(services ...Service) Stats {
	r.t.Helper()
	return must(r.table.Sync(context.Background(), services))(r.t)
}

// simple is a Service with TCP and UDP port 80.
func simple(eps4, eps6 []Endpoint) Service {
	both := append(append([]Endpoint(nil), eps4...), eps6...)
	return Service{Key: "ns/web", ClusterIPs: []netip.Addr{clusterIP4, clusterIP6}, Ports: []Port{
		{Protocol: unix.IPPROTO_TCP, Port: 80, Internal: both, External: both},
		{Protocol: unix.IPPROTO_UDP, Port: 80, Internal: both, External: both},
	}}
}

func web(local bool, hosts ...*host) Service {
	var a, b []Endpoint
	for _, x := range hosts {
		a, b = append(a, x.ep(local, false)), append(b, x.ep(local, true))
	}
	return simple(a, b)
}
