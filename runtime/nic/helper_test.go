package nic

import (
	"os"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// testNS is a network namespace that lives on a bind mount, as CRI's do.
type testNS struct {
	path   string
	ns     netns.NsHandle
	handle *netlink.Handle
}

func newNS(t *testing.T) *testNS {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	path := t.TempDir() + "/netns"
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	// Entering one's own namespace first makes inNS bring the thread back.
	done := make(chan error, 1)
	go func() {
		own, err := netns.Get()
		if err != nil {
			done <- err
			return
		}
		defer own.Close()
		done <- onThread(own, func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return err
			}
			return unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
		})
	}()
	if err := <-done; err != nil {
		t.Fatalf("make namespace: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(path, unix.MNT_DETACH) })
	ns, err := netns.GetFromPath(path)
	if err != nil {
		t.Fatal(err)
	}
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close(); _ = ns.Close() })
	return &testNS{path: path, ns: ns, handle: h}
}

func (n *testNS) do(t *testing.T, fn func() error) {
	t.Helper()
	if err := inNS(n.ns, fn); err != nil {
		t.Fatal(err)
	}
}

// up configures a link of the namespace.
func (n *testNS) up(t *testing.T, name string, addrs ...string) netlink.Link {
	t.Helper()
	l, err := n.handle.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.handle.LinkSetUp(l); err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		addr, err := netlink.ParseAddr(a)
		if err != nil {
			t.Fatal(err)
		}
		addr.Flags = unix.IFA_F_NODAD
		if err := n.handle.AddrAdd(l, addr); err != nil {
			t.Fatalf("add %s to %s: %v", a, name, err)
		}
	}
	return l
}

// veth joins two namespaces.
func veth(t *testing.T, a *testNS, nameA string, b *testNS, nameB string, mtu int) {
	t.Helper()
	v := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: nameA, MTU: mtu}, PeerName: nameB, PeerNamespace: netlink.NsFd(b.ns)}
	if err := a.handle.LinkAdd(v); err != nil {
		t.Fatalf("make veth: %v", err)
	}
}
