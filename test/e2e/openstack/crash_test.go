package openstack

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/proc"
	"github.com/hypernetes/hypernetes/test/e2e/testcloud"
	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// crash is a Pod that keeps its volume all the time, and a volume that goes from node to
// node.
type crash struct {
	c              *testcloud.Cloud
	n              *testcluster.Namespace
	s              *storage
	steady, moving *ledger
	turn           int
	random         *rand.Rand
}

// victim is what is killed. kill says whether there was anything to kill.
type victim struct {
	name string
	kill func(t *testing.T) bool
	// back starts it again, nil for what somebody else starts.
	back func(t *testing.T)
}

// TestCrash kills each of what has to do with a volume again and again: while the volume is
// made, attached and published, while the Pod writes to it, and while all that is taken
// back. No record that a Pod said is durable is ever missing; in the end nothing is left.
//
//	H8S_CRASH_ROUNDS=20 H8S_OPENSTACK=/var/tmp/h8s-openstack go test ./test/e2e/openstack -run TestCrash -timeout 3h
func TestCrash(t *testing.T) {
	c := testcloud.Up(t, 2)
	onCeph(t, c)
	rounds := 1
	if v := os.Getenv("H8S_CRASH_ROUNDS"); v != "" {
		var err error
		if rounds, err = strconv.Atoi(v); err != nil {
			t.Fatalf("H8S_CRASH_ROUNDS=%s: want a number", v)
		}
	}
	p := c.Project(t)
	n := namespace(t, c, p)
	s := cinder(t, p)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	x := &crash{
		c: c, n: n, s: s, random: rand.New(rand.NewPCG(seed, 0)),
		steady: newLedger(t, c, n, s, "steady"), moving: newLedger(t, c, n, s, "moving"),
	}
	// The first ones have the kubelets make directories that stay.
	none := victim{"nobody", func(*testing.T) bool { return true }, nil}
	x.life(t, none)
	x.life(t, none)
	var before []testcluster.Inventory
	for _, node := range c.Nodes {
		before = append(before, c.Further(node).Inventory(t))
	}
	x.steady.begin(t, "steady", c.Nodes[0])
	x.steady.goesOn(t)
	began := time.Now()
	for round := range rounds {
		for _, v := range x.victims() {
			t.Run(fmt.Sprintf("%s %d", v.name, round+1), func(t *testing.T) {
				x.life(t, v)
				x.steady.goesOn(t)
			})
			if t.Failed() {
				return // the next ones would say the same
			}
		}
	}
	if got := n.Get("pod/steady", ".status.containerStatuses[0].restartCount"); got != "0" {
		t.Errorf("the Pod that nobody touched was restarted %s times", got)
	}
	t.Logf("%d records of the Pod that stayed, %d of those that moved, in %v", x.steady.look(t), x.moving.kept, time.Since(began).Round(time.Second))
	n.Kubectl("delete", "pod", "steady", "--wait")
	x.steady.free(t)
	n.Kubectl("delete", "pvc", "--all", "--wait")
	testcloud.Until(t, "the project has no volumes", func() error {
		if all := s.all(); len(all) != 0 {
			return fmt.Errorf("%d, the first of them %s", len(all), all[0].Status)
		}
		return nil
	})
	testcloud.Until(t, "Kubernetes knows of none either", func() error {
		if left := strings.Fields(c.Kubectl(t, "get", "volumeattachments,persistentvolumes", "-o", "name")); len(left) != 0 {
			return fmt.Errorf("left: %v", left)
		}
		return nil
	})
	for i, node := range c.Nodes {
		c.Further(node).NothingLeft(t, before[i], 2*time.Minute)
	}
}

// life is that of a Pod with the volume that moves, through which the victim dies again
// and again.
func (x *crash) life(t *testing.T, v victim) {
	t.Helper()
	x.turn++
	node := x.c.Nodes[x.turn%len(x.c.Nodes)]
	pod := fmt.Sprintf("life-%d", x.turn)
	n := x.n.For(t)
	x.moving.begin(t, pod, node)
	x.dying(t, v)
	n.Ready(pod)
	x.moving.goesOn(t)
	if got := len(x.moving.volume(t).Attachments); got != 1 {
		t.Errorf("while the Pod runs, Cinder knows of %d attachments", got)
	}
	x.once(t, v)
	x.moving.goesOn(t)
	n.Kubectl("delete", "pod", pod, "--wait=false")
	x.dying(t, v)
	n.Kubectl("wait", "--for=delete", "pod/"+pod, "--timeout="+testcloud.Patience.String())
	x.moving.free(t)
	testcloud.Until(t, "the nodes have no records of the volumes", func() error {
		for _, name := range x.c.Nodes {
			want := 0
			if x.steady.pod != "" && name == x.steady.node {
				want = 2
			}
			if got := published(t, x.c, name); len(got) != want {
				return fmt.Errorf("%s has %v", name, got)
			}
		}
		return nil
	})
	t.Logf("%s on %s: %d records", pod, node, x.moving.kept)
}

// dying kills a few times, at any moment of what takes some seconds.
func (x *crash) dying(t *testing.T, v victim) {
	t.Helper()
	times := 4
	if v.back != nil {
		times = 1 // it takes its time to come back
	}
	for range times {
		time.Sleep(time.Duration(x.random.IntN(1500)) * time.Millisecond)
		if v.kill(t) && v.back != nil {
			time.Sleep(time.Duration(x.random.IntN(4000)) * time.Millisecond)
			v.back(t)
		}
	}
}

// once kills it while the Pod runs. What is needed to write, nobody writes without; what is
// not is not missed.
func (x *crash) once(t *testing.T, v victim) {
	t.Helper()
	if !v.kill(t) {
		t.Errorf("there was no %s", v.name)
	}
	if v.back == nil {
		return
	}
	if !strings.HasPrefix(v.name, "ceph-") {
		x.moving.goesOn(t)
		x.steady.goesOn(t)
	}
	// The guest answers while its disk does not.
	for _, pod := range []string{x.moving.pod, "steady"} {
		if x.steady.pod == "" && pod == "steady" {
			continue
		}
		if out, err := x.n.For(t).Try("exec", pod, "--request-timeout=60s", "--", "/testbox", "exit", "0"); err != nil {
			t.Errorf("exec in %s while %s is away: %v: %s", pod, v.name, err, out)
		}
	}
	v.back(t)
}

func (x *crash) victims() []victim {
	var out []victim
	for _, commands := range [][]string{{"h8s-csi controller"}, {"csi-attacher", "csi-provisioner"}, {"h8s-csi node"}, {"kubelet"}} {
		out = append(out, victim{name: strings.Join(commands, " and "), kill: func(t *testing.T) bool { return x.programs(t, commands) }})
	}
	for _, part := range []string{"shim", "QEMU", "storage daemon"} {
		out = append(out, victim{name: part, kill: func(t *testing.T) bool { return x.part(t, part) }})
	}
	for _, service := range []string{"cinder-volume", "cinder-api", "ceph-osd", "ceph-mon"} {
		out = append(out, x.service(service))
	}
	return out
}

// programs kills programs of ours on all nodes.
func (x *crash) programs(t *testing.T, commands []string) bool {
	killed := false
	for _, node := range x.c.Nodes {
		for _, p := range x.c.Further(node).Processes(t) {
			if slices.ContainsFunc(commands, func(c string) bool { return strings.HasPrefix(p.Command+" ", c+" ") }) {
				killed = unix.Kill(p.PID, unix.SIGKILL) == nil || killed
			}
		}
	}
	return killed
}

// part kills a process of the Pod's VM.
func (x *crash) part(t *testing.T, part string) bool {
	r := machine(t, x.c, x.moving.node, x.n.Name, x.moving.pod)
	if r == nil {
		return false
	}
	p := map[string]proc.ID{"shim": r.Shim, "QEMU": r.VMM, "storage daemon": r.Storage}[part]
	return p.Alive() && unix.Kill(p.PID, unix.SIGKILL) == nil
}

// service is one of OpenStack's or Ceph's.
func (x *crash) service(name string) victim {
	away := false
	back := func(t *testing.T) {
		t.Helper()
		ctx, cancel := context.WithTimeout(context.Background(), 2*testcloud.Patience)
		defer cancel()
		if err := x.c.OpenStack.TryScript(ctx, "start", name); err != nil {
			t.Error(err)
		}
		away = false
	}
	return victim{name: name, back: back, kill: func(t *testing.T) bool {
		t.Helper()
		// However the test goes, others need it.
		t.Cleanup(func() {
			if away {
				back(t)
			}
		})
		away = true
		x.c.OpenStack.Script(t, "kill", name)
		return true
	}}
}
