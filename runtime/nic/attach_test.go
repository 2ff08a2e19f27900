package nic

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/test/artifacts"
)

// bootGuest plays the VM: a namespace whose tap is joined to the attachment's by a
// pump that passes Ethernet frames with their virtio-net headers, as QEMU would, and
// which is configured only from what Attach described.
func bootGuest(t *testing.T, a *Attachment) *testNS {
	t.Helper()
	g := newNS(t)
	for i, l := range a.Links {
		var own *os.File
		g.do(t, func() (err error) { own, err = openTap(l.Name); return err })
		link, err := g.handle.LinkByName(l.Name)
		if err != nil {
			t.Fatal(err)
		}
		mac, _ := net.ParseMAC(l.MAC)
		if err := errors.Join(g.handle.LinkSetHardwareAddr(link, mac), g.handle.LinkSetMTU(link, l.MTU)); err != nil {
			t.Fatal(err)
		}
		g.up(t, l.Name, a.Interfaces[i].Addresses...)
		pump(t, own, l.Tap)
	}
	for _, r := range a.Routes {
		if err := g.handle.RouteAdd(parseRoute(t, g, r.Destination, r.Gateway, r.Device, r.Source, r.Scope, r.Onlink)); err != nil {
			t.Fatalf("add route %v: %v", r, err)
		}
	}
	return g
}

func parseRoute(t *testing.T, g *testNS, dst, gw, dev, src string, scope uint32, onlink bool) *netlink.Route {
	t.Helper()
	link, err := g.handle.LinkByName(dev)
	if err != nil {
		t.Fatal(err)
	}
	r := &netlink.Route{LinkIndex: link.Attrs().Index, Gw: net.ParseIP(gw), Src: net.ParseIP(src), Scope: netlink.Scope(scope)}
	if dst != "" {
		if _, r.Dst, err = net.ParseCIDR(dst); err != nil {
			t.Fatal(err)
		}
	}
	if onlink {
		r.Flags = unix.RTNH_F_ONLINK
	}
	return r
}

// pump copies frames between two taps until the test ends.
func pump(t *testing.T, a, b *os.File) {
	t.Helper()
	var wg sync.WaitGroup
	for _, f := range []*os.File{a, b} {
		// What QEMU does once the guest's driver takes unfinished checksums and segments.
		const csum, tso4, tso6, ecn = 1, 2, 4, 8
		if err := unix.IoctlSetInt(int(f.Fd()), unix.TUNSETOFFLOAD, csum|tso4|tso6|ecn); err != nil {
			t.Fatal(err)
		}
	}
	copyFrames := func(dst, src *os.File) {
		buf := make([]byte, 70<<10)
		fds := []unix.PollFd{{Fd: int32(src.Fd()), Events: unix.POLLIN}}
		for {
			n, err := unix.Read(int(src.Fd()), buf)
			if errors.Is(err, unix.EAGAIN) {
				if _, err := unix.Poll(fds, 200); err != nil && !errors.Is(err, unix.EINTR) {
					return
				}
				if t.Context().Err() != nil {
					return
				}
				continue
			}
			if err != nil || t.Context().Err() != nil {
				return
			}
			// A tap that is down refuses frames; the next one may do.
			_, _ = unix.Write(int(dst.Fd()), buf[:n])
		}
	}
	for _, f := range []*os.File{a, b} {
		if err := unix.SetNonblock(int(f.Fd()), true); err != nil {
			t.Fatal(err)
		}
	}
	wg.Go(func() { copyFrames(a, b) })
	wg.Go(func() { copyFrames(b, a) })
	t.Cleanup(func() { wg.Wait(); _ = a.Close(); _ = b.Close() })
}

func mustAttach(t *testing.T, n *testNS) *Attachment {
	t.Helper()
	start := time.Now()
	a, err := Attach(t.Context(), n.path)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("attached %d links in %v", len(a.Links), time.Since(start).Round(100*time.Microsecond))
	t.Cleanup(func() { _ = a.Close() })
	return a
}

// transfer sends size bytes over TCP from a client to an echo server and back.
func transfer(t *testing.T, client, server *testNS, network, addr string, size int) {
	t.Helper()
	serve(t, server, network, addr)
	start := time.Now()
	echo(t, dialIn(t, client, network, addr), size)
	t.Logf("%s: %d bytes there and back in %v", addr, size, time.Since(start).Round(time.Millisecond))
}

func TestAttachNothing(t *testing.T) {
	a, err := Attach(t.Context(), "")
	if err != nil || len(a.Links) != 0 {
		t.Errorf("host network: %+v, %v", a, err)
	}
	if err := Detach(t.Context(), a.State()); err != nil {
		t.Error(err)
	}
	if _, err := Attach(t.Context(), t.TempDir()+"/none"); !errdefs.IsNotFound(err) {
		t.Errorf("missing namespace: %v", err)
	}
	if _, err := Attach(t.Context(), "/proc/self/ns/net"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("own namespace: %v", err)
	}
	if _, err := Attach(t.Context(), "/proc/self/ns/uts"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("other kind of namespace: %v", err)
	}
	n := newNS(t)
	if a, err = Attach(t.Context(), n.path); err != nil || len(a.Links) != 0 {
		t.Errorf("loopback only: %+v, %v", a, err)
	}
}

func TestAttachTraffic(t *testing.T) {
	host, pod := newNS(t), newNS(t)
	veth(t, host, "vpod", pod, "eth0", 1450)
	veth(t, host, "vpod2", pod, "a-very-long-nam", 9000)
	host.up(t, "vpod", "10.20.0.1/24", "fd00:20::1/64")
	host.up(t, "vpod2", "10.21.0.1/24")
	pod.up(t, "eth0", "10.20.0.2/24", "fd00:20::2/64")
	pod.up(t, "a-very-long-nam", "10.21.0.2/24")
	eth0, _ := pod.handle.LinkByName("eth0")
	if err := pod.handle.RouteAdd(&netlink.Route{LinkIndex: eth0.Attrs().Index, Gw: net.ParseIP("10.20.0.1")}); err != nil {
		t.Fatal(err)
	}
	serve(t, pod, "tcp4", "10.20.0.2:99") // must become unreachable

	a := mustAttach(t, pod)
	if len(a.Links) != 2 || a.Links[0].MTU != 1450 || a.Links[0].TapName != "tap_eth0" || a.Links[0].MAC != eth0.Attrs().HardwareAddr.String() {
		t.Fatalf("links: %+v", a.Links)
	}
	t.Run("namespace is silent", func(t *testing.T) {
		host.do(t, func() error {
			if c, err := net.DialTimeout("tcp4", "10.20.0.2:99", 300*time.Millisecond); err == nil {
				_ = c.Close()
				t.Error("the namespace's own stack answers")
			} else if errors.Is(err, unix.ECONNREFUSED) {
				t.Error("the namespace's own stack refuses, which means it answers ARP")
			}
			return nil
		})
		before := received(t, host, "vpod")
		pod.do(t, func() error {
			if c, err := net.DialTimeout("tcp4", "10.20.0.1:1", 300*time.Millisecond); err == nil || errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("the namespace's own stack reaches out: %v %v", c, err)
			}
			return nil
		})
		if after := received(t, host, "vpod"); after != before {
			t.Errorf("the namespace's own stack sent %d packets", after-before)
		}
	})
	guest := bootGuest(t, a)
	t.Run("in", func(t *testing.T) { transfer(t, host, guest, "tcp4", "10.20.0.2:80", 8<<20) })
	t.Run("out", func(t *testing.T) { transfer(t, guest, host, "tcp4", "10.20.0.1:80", 8<<20) })
	t.Run("in ipv6", func(t *testing.T) { transfer(t, host, guest, "tcp6", "[fd00:20::2]:80", 4<<20) })
	t.Run("out ipv6", func(t *testing.T) { transfer(t, guest, host, "tcp6", "[fd00:20::1]:80", 4<<20) })
	t.Run("second link, jumbo", func(t *testing.T) { transfer(t, guest, host, "tcp4", "10.21.0.1:80", 4<<20) })
	t.Run("udp", func(t *testing.T) { udp(t, host, guest) })
	t.Run("detach", func(t *testing.T) {
		blob, err := json.Marshal(a.State())
		if err != nil {
			t.Fatal(err)
		}
		var s State
		if err := json.Unmarshal(blob, &s); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := Detach(t.Context(), s); err != nil {
				t.Fatal(err)
			}
		}
		links, _ := pod.handle.LinkList()
		for _, l := range links {
			if strings.HasPrefix(l.Attrs().Name, tapPrefix) {
				t.Errorf("%s is left", l.Attrs().Name)
			}
		}
		// The namespace works as it did before.
		echo(t, dialIn(t, host, "tcp4", "10.20.0.2:99"), 1<<10)
	})
}

// TestAttachAgain attaches over what a dead shim left.
func TestAttachAgain(t *testing.T) {
	host, pod := newNS(t), newNS(t)
	veth(t, host, "vpod", pod, "eth0", 1500)
	host.up(t, "vpod", "10.20.0.1/24")
	pod.up(t, "eth0", "10.20.0.2/24")
	mustAttach(t, pod)
	a := mustAttach(t, pod)
	if len(a.Links) != 1 {
		t.Fatalf("links: %+v", a.Links)
	}
	transfer(t, host, bootGuest(t, a), "tcp4", "10.20.0.2:80", 1<<20)
}

func TestAttachMacvlan(t *testing.T) {
	host, peer, pod := newNS(t), newNS(t), newNS(t)
	veth(t, host, "up0", peer, "eth0", 1500)
	host.up(t, "up0")
	peer.up(t, "eth0", "10.30.0.1/24")
	parent, _ := host.handle.LinkByName("up0")
	err := host.handle.LinkAdd(&netlink.Macvlan{Mode: netlink.MACVLAN_MODE_BRIDGE, LinkAttrs: netlink.LinkAttrs{
		Name: "mv0", ParentIndex: parent.Attrs().Index, Namespace: netlink.NsFd(pod.ns)}})
	if errors.Is(err, unix.EOPNOTSUPP) {
		t.Skip("kernel has no macvlan")
	}
	if err != nil {
		t.Fatal(err)
	}
	pod.up(t, "mv0", "10.30.0.2/24")
	guest := bootGuest(t, mustAttach(t, pod))
	transfer(t, peer, guest, "tcp4", "10.30.0.2:80", 2<<20)
	transfer(t, guest, peer, "tcp4", "10.30.0.1:80", 2<<20)
}

// TestAttachPTP takes what the upstream ptp plugin makes: a gateway route, the
// subnet through it and no prefix route.
func TestAttachPTP(t *testing.T) {
	dir := filepath.Join(artifacts.Dir(), "cni")
	if _, err := os.Stat(dir + "/ptp"); err != nil {
		t.Skipf("no CNI plugins in %s: run make", dir)
	}
	host, podA, podB := newNS(t), newNS(t), newNS(t)
	if err := loopbackUp(host.ns); err != nil {
		t.Fatal(err)
	}
	conf := fmt.Sprintf(`{"cniVersion":"1.0.0","name":"t","type":"ptp","mtu":1400,"ipam":{"type":"host-local","dataDir":%q,
		"ranges":[[{"subnet":"10.40.0.0/24"}],[{"subnet":"fd00:40::/64"}]],"routes":[{"dst":"0.0.0.0/0"},{"dst":"::/0"}]}}`, t.TempDir())
	plugin := func(command, id, nsPath, prevResult string) (result string) {
		host.do(t, func() error {
			cmd := exec.Command(dir + "/ptp")
			cmd.Stdin = strings.NewReader(strings.Replace(conf, "{", "{"+prevResult, 1))
			cmd.Env = []string{"CNI_COMMAND=" + command, "CNI_CONTAINERID=" + id, "CNI_NETNS=" + nsPath, "CNI_IFNAME=eth0", "CNI_PATH=" + dir, "PATH=/usr/sbin:/sbin:/usr/bin:/bin"}
			b, err := cmd.CombinedOutput()
			if err != nil {
				return fmt.Errorf("ptp %s: %w: %s", command, err, b)
			}
			result = string(b)
			return nil
		})
		return result
	}
	host.do(t, func() error {
		return errors.Join(os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0), os.WriteFile("/proc/sys/net/ipv6/conf/all/forwarding", []byte("1"), 0))
	})
	result := plugin("ADD", "a", podA.path, "")
	plugin("ADD", "b", podB.path, "")
	a, b := mustAttach(t, podA), mustAttach(t, podB)
	want := []string{"10.40.0.2/32", "fd00:40::2/128"}
	if diff := cmp.Diff(want, a.Interfaces[0].Addresses); diff != "" {
		t.Errorf("ptp's neighbours are behind the gateway, so no prefix (-want +got):\n%s", diff)
	}
	for _, r := range a.Routes {
		t.Logf("route %v", r)
	}
	guestA, guestB := bootGuest(t, a), bootGuest(t, b)
	waitForDAD(t, host)
	transfer(t, guestA, guestB, "tcp4", "10.40.0.3:80", 2<<20)
	transfer(t, guestB, guestA, "tcp6", "[fd00:40::2]:80", 2<<20)
	transfer(t, guestA, host, "tcp4", "10.40.0.1:80", 1<<20)
	plugin("CHECK", "a", podA.path, `"prevResult":`+result+",")
	if err := Detach(t.Context(), a.State()); err != nil {
		t.Error(err)
	}
	plugin("DEL", "a", podA.path, "")
	plugin("DEL", "b", podB.path, "")
	if err := Detach(t.Context(), b.State()); err != nil {
		t.Errorf("detach after DEL: %v", err)
	}
}

// waitForDAD waits until no address of n is tentative.
func waitForDAD(t *testing.T, n *testNS) {
	t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for range 600 {
		addrs, err := n.handle.AddrList(nil, netlink.FAMILY_V6)
		if err != nil {
			t.Fatal(err)
		}
		tentative := false
		for _, a := range addrs {
			tentative = tentative || a.Flags&unix.IFA_F_TENTATIVE != 0
		}
		if !tentative {
			return
		}
		<-tick.C
	}
	t.Fatal("addresses stay tentative")
}

func received(t *testing.T, n *testNS, name string) uint64 {
	t.Helper()
	l, err := n.handle.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	return l.Attrs().Statistics.RxPackets
}

func udp(t *testing.T, host, guest *testNS) {
	t.Helper()
	var server net.PacketConn
	guest.do(t, func() (err error) { server, err = net.ListenPacket("udp4", "10.20.0.2:53"); return err })
	defer server.Close()
	var c net.Conn
	host.do(t, func() (err error) { c, err = net.Dial("udp4", "10.20.0.2:53"); return err })
	defer c.Close()
	want := bytes.Repeat([]byte("u"), 4000) // fragmented on the way
	if _, err := c.Write(want); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 8000)
	_ = server.SetDeadline(time.Now().Add(30 * time.Second))
	n, from, err := server.ReadFrom(buf)
	if err != nil || !bytes.Equal(buf[:n], want) {
		t.Fatalf("guest got %d bytes, %v", n, err)
	}
	if _, err := server.WriteTo(buf[:n], from); err != nil {
		t.Fatal(err)
	}
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	if n, err := io.ReadAtLeast(c, buf, len(want)); err != nil {
		t.Fatalf("host got %d bytes, %v", n, err)
	}
}
