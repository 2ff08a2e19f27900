package shim

import (
	"fmt"
	"testing"
	"time"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"

	volumeapi "github.com/hypernetes/hypernetes/api/volume/v1"
	"github.com/hypernetes/hypernetes/test/ceph"
	"github.com/hypernetes/hypernetes/volume/record"
)

// TestCephDies kills a Pod's Ceph while the Pod writes: it goes on when that is back, and
// the VM takes orders meanwhile. Then its client is shut out: it writes no more, and the
// next VM has all that was durable.
func TestCephDies(t *testing.T) {
	if testing.Short() {
		t.Skip("skipped: -short: it starts Ceph, and again and again parts of it")
	}
	c := ceph.Start(t)
	c.RBD("create", "--size", "256", "volumes/one")
	n := newNode(t)
	st := n.fs.Staged
	st.Source = record.Source{RBD: &record.RBD{Pool: "volumes", Image: "one", Monitors: []string{c.Monitor}, User: "cinder"}}
	check(t, n.store.Stage(st, map[string][]byte{record.SecretKey: []byte(c.Key())}))
	box := testbox(t)
	s := n.start(box)
	s.up()
	lines := s.lines("writer", "mkdir -p /data/ledger; exec testbox ledger -interval 5ms /data/ledger 2>&1", n.mounted)
	kept := 0
	// more waits until so many more records are durable, and says whether the writer lives.
	more := func(records int) bool {
		deadline := time.NewTimer(patience)
		defer deadline.Stop()
		for until := kept + records; kept < until; {
			select {
			case line, ok := <-lines:
				if _, err := fmt.Sscanf(line, "kept %d", &kept); !ok || err != nil && kept > 0 {
					t.Logf("after %d records the writer says %q", kept, line)
					return false
				}
			case <-deadline.C:
				t.Fatalf("the writer is stuck after %d records", kept)
			}
		}
		return true
	}
	for i, names := range [][]string{{"ceph-osd"}, {"ceph-mon"}, {"ceph-osd", "ceph-mon"}} {
		if !more(20) {
			t.Fatal("the writer has ended")
		}
		for _, name := range names {
			c.Kill(name)
		}
		// Another container needs QEMU's monitor and the guest.
		began := time.Now()
		if code, out := s.sh(fmt.Sprint("other-", i), "echo here").end(); code != 0 || out != "here\n" {
			t.Errorf("without %v: exit code %d, output %q", names, code, out)
		}
		if _, err := s.volumes.Stats(s.ctx(), &volumeapi.StatsRequest{Key: n.raw.Key}); err != nil {
			t.Errorf("without %v: stats: %v", names, err)
		}
		t.Logf("without %v: asked for %v", names, time.Since(began).Round(time.Millisecond))
		for _, name := range names {
			c.Again(name)
		}
	}
	if !more(20) {
		t.Fatal("the writer has ended")
	}
	clients := c.Watchers("one")
	if len(clients) != 1 {
		t.Fatalf("open by %v", clients)
	}
	c.Run("ceph", "-c", c.Conf(), "osd", "blocklist", "add", clients[0], "3600")
	for kept < 1<<20 && more(1) {
	}
	// A VM that cannot write ends as any other.
	_, err := s.sandbox.StopSandbox(s.ctx(), &sandboxapi.StopSandboxRequest{SandboxID: s.id})
	check(t, err)
	second := n.start(box)
	second.up()
	code, out := second.sh("reader", "testbox ledger -read /data/ledger 2>&1", n.mounted).end()
	has := 0
	if _, _ = fmt.Sscanf(out, "has %d", &has); code != 0 || has < kept || has > kept+1 { // one may have been on its way
		t.Errorf("exit code %d, output %q, want %d records", code, out, kept)
	}
	t.Logf("%d records were durable, %d are there", kept, has)
	_, err = second.sandbox.StopSandbox(second.ctx(), &sandboxapi.StopSandboxRequest{SandboxID: second.id})
	check(t, err)
}
