package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/hypernetes/hypernetes/cluster/cgroup"
	"github.com/hypernetes/hypernetes/cluster/layout"
	"github.com/hypernetes/hypernetes/cluster/settings"
	"github.com/hypernetes/hypernetes/proc"
)

func TestMountPlan(t *testing.T) {
	l, err := layout.NewNode("blue")
	if err != nil {
		t.Fatal(err)
	}
	var ops []string
	at := map[string]int{}
	for i, s := range mountPlan(l) {
		ops = append(ops, s.op)
		at[s.op+" "+s.target] = i
	}
	// The cgroup tree is saved before the fresh sysfs hides it, and what lies below
	// an overlay or a tmpfs is bound after it.
	order := []string{"rbind /run/h8s/blue/stage/cgroup", "sysfs /sys", "move /sys/fs/cgroup"}
	for i := 1; i < len(order); i++ {
		if at[order[i-1]] >= at[order[i]] {
			t.Errorf("%s is not before %s in %v", order[i-1], order[i], ops)
		}
	}
	for _, b := range Binds(l) {
		for _, cover := range []string{"overlay /etc", "overlay /opt", "overlay /var/lib", "overlay /var/log", "tmpfs /run"} {
			_, dir, _ := strings.Cut(cover, " ")
			if strings.HasPrefix(b.Target, dir+"/") && at["bind "+b.Target] < at[cover] {
				t.Errorf("%s is bound before %s covers it", b.Target, dir)
			}
		}
	}
}

// TestEveryBindIsCovered checks that no target is made on the machine itself.
func TestEveryBindIsCovered(t *testing.T) {
	l, err := layout.NewNode("blue")
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range Binds(l) {
		covered := false
		for _, s := range mountPlan(l) {
			if (s.op == "overlay" || s.op == "tmpfs") && strings.HasPrefix(b.Target, s.target+"/") {
				covered = true
			}
		}
		if !covered {
			t.Errorf("%s would be made on the machine", b.Target)
		}
	}
}

func TestResolvConf(t *testing.T) {
	if got := resolvConf([]string{"10.0.2.3", "1.1.1.1"}); got != "nameserver 10.0.2.3\nnameserver 1.1.1.1\n" {
		t.Errorf("%q", got)
	}
	if got := resolvConf(nil); strings.Contains(got, "\nnameserver") || !strings.HasPrefix(got, "#") {
		t.Errorf("%q", got)
	}
}

func TestAnchorReportsFailure(t *testing.T) {
	r, w := io.Pipe()
	got := make(chan string, 1)
	go func() {
		b, err := io.ReadAll(r)
		got <- fmt.Sprint(string(b), err)
	}()
	waited := false
	err := RunAnchor(strings.NewReader("not JSON"), w, func() { waited = true })
	if err == nil || waited || !strings.Contains(<-got, "invalid character") {
		t.Errorf("error %v, waited %t", err, waited)
	}
}

func TestOpenWithoutAnchor(t *testing.T) {
	l := layout.Node{Name: "x", State: t.TempDir(), Run: t.TempDir()}
	if _, err := Open(l, settings.Node{}, nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no record: %v", err)
	}
	if err := os.Mkdir(l.RunPath("components"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := WriteRecord(l.Record(anchorName), proc.ID{PID: os.Getpid(), Start: 1}); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(l, settings.Node{}, nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("another process under the anchor's pid: %v", err)
	}
}

// TestWorld makes a process in namespaces of its own take the anchor's part and dials,
// listens and starts a program in there. The mounts are tested end to end.
func TestWorld(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("namespaces need root")
	}
	cg, err := cgroup.Open()
	if err != nil {
		t.Skipf("no cgroups here: %v", err)
	}
	holder := exec.Command("unshare", "--net", "--mount", "--uts", "--ipc", "sh", "-c", "hostname inside; ip link set lo up; echo up; exec sleep 1000")
	out, err := holder.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = holder.Process.Kill()
		_ = holder.Wait()
	})
	if _, err := io.ReadFull(out, make([]byte, 3)); err != nil {
		t.Fatal(err)
	}
	id, err := proc.Find(holder.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	n := &Node{Layout: layout.Node{Name: fmt.Sprintf("test-%d", os.Getpid())}, cgroups: cg, anchor: id}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := errors.Join(cg.Kill(ctx, n.Layout.Cgroup()), cg.Remove(ctx, n.Layout.Cgroup())); err != nil {
			t.Error(err)
		}
	})
	insideOnly(t, n)

	cmd := exec.Command("sh", "-c", "hostname; cat /proc/net/dev | grep -c :; cat /proc/self/cgroup")
	var b strings.Builder
	cmd.Stdout, cmd.Stderr = &b, &b
	if err := n.Start(cmd, "probe"); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(b.String(), "inside\n") || !strings.Contains(b.String(), n.Cgroup("probe")) {
		t.Errorf("the program saw:\n%s", b.String())
	}
	stray := exec.Command("sleep", "999")
	if err := n.Start(stray, "stray"); err != nil {
		t.Fatal(err)
	}
	if got := n.Strays("stray", stray.Args); len(got) != 1 || got[0].PID != stray.Process.Pid {
		t.Errorf("strays %v, want process %d", got, stray.Process.Pid)
	}
	if got := n.Strays("stray", []string{"sleep", "99"}); len(got) > 0 {
		t.Errorf("of other arguments: %v", got)
	}
	_ = stray.Process.Kill()
	_ = stray.Wait()
	if !n.HasLink("lo") || n.HasLink("none0") {
		t.Error("links are told wrongly")
	}
}

// insideOnly checks that a listener inside is reached by Dial and not from here.
func insideOnly(t *testing.T, n *Node) {
	t.Helper()
	l, err := n.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		if c, err := l.Accept(); err == nil {
			_, _ = io.WriteString(c, "hello")
			_ = c.Close()
		}
	}()
	c, err := n.Dial(t.Context(), "tcp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if b, err := io.ReadAll(c); err != nil || string(b) != "hello" {
		t.Errorf("%q %v", b, err)
	}
	if c, err := net.Dial("tcp4", l.Addr().String()); err == nil {
		_ = c.Close()
		t.Error("the listener inside is reached from outside")
	}
}
