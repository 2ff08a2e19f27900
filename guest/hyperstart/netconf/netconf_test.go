package netconf

import (
	"errors"
	"os"
	"runtime"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
)

// scratchNetns moves the test's thread to a new network namespace. The thread is not
// unlocked, so it ends with the test and the namespace with it.
func scratchNetns(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("skipped: needs root for a network namespace")
	}
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Skipf("skipped: network namespaces: %v", err)
	}
}

func TestApply(t *testing.T) {
	done := make(chan struct{})
	go func() { // a thread of its own, see scratchNetns
		defer close(done)
		apply(t)
	}()
	<-done
}

func apply(t *testing.T) {
	scratchNetns(t)
	const mac = "02:00:00:00:00:07"
	link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "raw0"}, PeerName: "raw1"}
	if err := netlink.LinkAdd(link); err != nil {
		t.Skipf("skipped: veth: %v", err)
	}
	l, err := netlink.LinkByName("raw0")
	if err != nil {
		t.Error(err)
		return
	}
	hw := []byte{2, 0, 0, 0, 0, 7}
	if err := netlink.LinkSetHardwareAddr(l, hw); err != nil {
		t.Error(err)
		return
	}
	if err := up("raw1"); err != nil {
		t.Error(err)
		return
	}
	ifs := []*hyperstart.Interface{{Mac: mac, Name: "eth0", Mtu: 1450, Addresses: []string{"10.1.0.2/32", "fd00::2/64"}}}
	routes := []*hyperstart.Route{
		{Destination: "10.1.0.1/32", Device: "eth0", Scope: 253},
		{Gateway: "10.1.0.1", Device: "eth0", Source: "10.1.0.2"},
		{Gateway: "fd00::1", Device: "eth0", Mtu: 1400},
		{Destination: "192.0.2.0/24", Gateway: "198.51.100.1", Device: "eth0", Onlink: true, Priority: 7},
	}
	neighbors := []*hyperstart.Neighbor{{Address: "10.1.0.1", Mac: "02:00:00:00:00:01", Device: "eth0"}}
	for range 2 { // it may be repeated
		if err := Apply(t.Context(), ifs, routes, neighbors); err != nil {
			t.Error(err)
			return
		}
	}
	verify(t)
	for name, r := range map[string]*hyperstart.Route{
		"gateway": {Gateway: "x"}, "destination": {Destination: "10.0.0.0"}, "source": {Source: "1"},
	} {
		if err := applyRoute(r); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("bad %s: %v", name, err)
		}
	}
}

func verify(t *testing.T) {
	l, err := netlink.LinkByName("eth0")
	if err != nil {
		t.Error(err)
		return
	}
	if l.Attrs().MTU != 1450 {
		t.Errorf("MTU %d", l.Attrs().MTU)
	}
	addrs, _ := netlink.AddrList(l, netlink.FAMILY_ALL)
	seen := map[string]int{}
	for _, a := range addrs {
		seen[a.IPNet.String()] = a.Flags
	}
	if _, ok := seen["10.1.0.2/32"]; !ok || seen["fd00::2/64"]&(unix.IFA_F_TENTATIVE|unix.IFA_F_NODAD) != unix.IFA_F_NODAD {
		t.Errorf("addresses: %v", seen)
	}
	routes, _ := netlink.RouteList(l, netlink.FAMILY_ALL)
	found := map[string]bool{}
	for _, r := range routes {
		if r.Dst != nil {
			found[r.Dst.String()] = true
		}
	}
	for _, want := range []string{"0.0.0.0/0", "::/0", "10.1.0.1/32", "192.0.2.0/24"} {
		if !found[want] {
			t.Errorf("route %s is missing: %v", want, routes)
		}
	}
	neighbors, _ := netlink.NeighList(l.Attrs().Index, netlink.FAMILY_V4)
	for _, n := range neighbors {
		if n.IP.String() == "10.1.0.1" && n.State == netlink.NUD_PERMANENT {
			return
		}
	}
	t.Errorf("neighbors: %v", neighbors)
}
