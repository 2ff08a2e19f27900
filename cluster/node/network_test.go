package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/cluster/cgroup"
	"github.com/hypernetes/hypernetes/cluster/layout"
	"github.com/hypernetes/hypernetes/proc"
)

// emptyWorld is a node without mounts, whose loopback is as the kernel makes it: down.
func emptyWorld(t *testing.T, cg *cgroup.Host, name string) *Node {
	t.Helper()
	holder := exec.Command("sleep", "1000")
	n := &Node{Layout: layout.Node{Name: fmt.Sprintf("test-%s-%d", name, os.Getpid())}, cgroups: cg}
	holder.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = holder.Process.Kill()
		_ = holder.Wait()
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := errors.Join(cg.Kill(ctx, n.Layout.Cgroup()), cg.Remove(ctx, n.Layout.Cgroup())); err != nil {
			t.Error(err)
		}
	})
	var err error
	if n.anchor, err = proc.Find(holder.Process.Pid); err != nil {
		t.Fatal(err)
	}
	return n
}

func shellIn(t *testing.T, n *Node, script string) {
	t.Helper()
	var out []byte
	cmd := exec.Command("sh", "-ec", script)
	r, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Start(cmd, "setup"); err != nil {
		t.Fatal(err)
	}
	out = make([]byte, 4096)
	size, _ := r.Read(out)
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v: %s", err, out[:size])
	}
}

// TestGuardLoopback makes a neighbour knock at the node's loopback through a link with
// route_localnet, as the portmap plugin leaves it for a Pod with a hostPort.
func TestGuardLoopback(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("namespaces need root")
	}
	if _, err := exec.LookPath("ip"); err != nil {
		t.Skip("no ip (iproute2) here")
	}
	cg, err := cgroup.Open()
	if err != nil {
		t.Skipf("no cgroups here: %v", err)
	}
	host, pod := emptyWorld(t, cg, "host"), emptyWorld(t, cg, "pod")
	shellIn(t, host, fmt.Sprintf(`ip link set lo up
ip link add v0 type veth peer name v1 netns %d
ip addr add 10.9.9.1/24 dev v0
ip link set v0 up
for key in v0/route_localnet=1 v0/rp_filter=0 all/rp_filter=0; do echo ${key#*=} >/proc/sys/net/ipv4/conf/${key%%=*}; done`, pod.anchor.PID))
	// A hostile guest sends what it likes; an ordinary kernel is talked into it.
	shellIn(t, pod, `ip addr add 10.9.9.2/24 dev v1
ip link set v1 up
ip route add 127.0.0.1/32 dev v1 via 10.9.9.1 src 10.9.9.2
for key in v1/route_localnet=1 v1/rp_filter=0 all/rp_filter=0; do echo ${key#*=} >/proc/sys/net/ipv4/conf/${key%=*}; done`)
	l, err := host.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	knock := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
		defer cancel()
		c, err := pod.Dial(ctx, "tcp4", l.Addr().String())
		if err == nil {
			_ = c.Close()
		}
		return err
	}
	if err := knock(); err != nil {
		t.Fatalf("the attack does not work without the guard, so this test shows nothing: %v", err)
	}
	for range 2 { // a second time replaces the rules
		if err := inNetwork(host, func() error { return addRules(rulesTable, true) }); err != nil {
			t.Fatal(err)
		}
	}
	if err := knock(); err == nil {
		t.Error("a neighbour reaches the node's loopback")
	}
	if c, err := host.Dial(t.Context(), "tcp4", l.Addr().String()); err != nil {
		t.Errorf("the node itself does not: %v", err)
	} else {
		_ = c.Close()
	}
	if err := inNetwork(host, func() error { return RemoveRules() }); err != nil {
		t.Fatal(err)
	}
	if err := knock(); err != nil {
		t.Errorf("after the rules were removed: %v", err)
	}
}

func inNetwork(n *Node, f func() error) error {
	return onOwnThread(func() error {
		if err := n.enter([]namespace{netNS}); err != nil {
			return err
		}
		return f()
	})
}

// TestAttach connects a node to another's network, again where it is, and anew where the
// link is gone as after a restart of the other.
func TestAttach(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("namespaces need root")
	}
	cg, err := cgroup.Open()
	if err != nil {
		t.Skip(err)
	}
	first, further := emptyWorld(t, cg, "first"), emptyWorld(t, cg, "further")
	first.Settings.NodeIP, further.Settings.NodeIP, further.Settings.Of = "100.64.0.1", "100.64.0.2", "first"
	shellIn(t, first, "ip link set lo up; ip link add h8s0 type bridge; ip addr add 100.64.0.1/24 dev h8s0; ip link set h8s0 up")
	l, err := first.Listen("tcp4", "100.64.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	reach := func(what string) {
		t.Helper()
		if err := further.Attach(first); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		conn, err := further.Dial(ctx, "tcp4", l.Addr().String())
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		_ = conn.Close()
	}
	reach("attach")
	before := linkIndex(t, further)
	reach("again")
	if now := linkIndex(t, further); now != before {
		t.Errorf("a link that was there was made anew: %d, was %d", now, before)
	}
	shellIn(t, further, "ip link del h8s0")
	reach("anew")
}

func linkIndex(t *testing.T, n *Node) (index int) {
	t.Helper()
	err := onOwnThread(func() error {
		if err := n.enter([]namespace{netNS}); err != nil {
			return err
		}
		l, err := netlink.LinkByName(link)
		if err == nil {
			index = l.Attrs().Index
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return index
}
