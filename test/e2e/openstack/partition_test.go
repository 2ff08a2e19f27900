package openstack

import (
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hypernetes/hypernetes/test/e2e/testcloud"
)

// cuts are the ways in which a node is lost, by what still reaches it.
var cuts = []struct{ name, still string }{
	{"still writes", `"lo", "h8s-os"`}, // OpenStack and Ceph
	{"reaches nobody", `"lo"`},
}

// TestPartition cuts off a node whose Pod writes to a volume, and has the volume moved by
// force: the Pod on the other node has all that the first was told is durable, and the
// first one writes no more, neither while it is cut off nor when it is back.
func TestPartition(t *testing.T) {
	c := testcloud.Up(t, 2)
	onCeph(t, c)
	p := c.Project(t)
	n := namespace(t, c, p)
	s := cinder(t, p)
	for i, cut := range cuts {
		t.Run(cut.name, func(t *testing.T) { moved(t, newLedger(t, c, n.For(t), s, fmt.Sprint("data-", i)), cut.still) })
	}
}

func moved(t *testing.T, l *ledger, still string) {
	c, n := l.c, l.n.For(t)
	lost, other := c.Nodes[1], c.Nodes[0]
	l.begin(t, "old-"+l.claim, lost)
	l.goesOn(t)
	v := l.volume(t)
	if len(v.Attachments) != 1 {
		t.Fatalf("Cinder knows of %d attachments", len(v.Attachments))
	}
	attachment := v.Attachments[0].AttachmentID
	clients := l.watchers(t, v.ID)
	if len(clients) != 1 {
		t.Fatalf("open at Ceph by %v", clients)
	}
	testcloud.Until(t, "the client is noted", func() error {
		meta := map[string]string{}
		if err := ceph(t, c, &meta, "rbd", "image-meta", "list", "volumes/volume-"+v.ID); err != nil {
			return err
		}
		if got := meta["h8s.clients."+attachment]; got != clients[0] {
			return fmt.Errorf("it is %s, noted is %q", clients[0], got)
		}
		return nil
	})
	heal := partition(t, c, lost, still)
	old := *l
	if strings.Contains(still, "h8s-os") {
		old.goesOn(t)
	}

	// The Pod and the attachment are given up by force; nobody says that the node is off.
	n.Kubectl("delete", "pod", l.pod, "--force", "--grace-period=0", "--wait=false")
	for _, va := range l.attachments(t) {
		c.Kubectl(t, "delete", "volumeattachment", va, "--wait=false")
	}
	testcloud.Until(t, "Cinder's attachment is gone", func() error {
		for _, a := range l.volume(t).Attachments {
			if a.AttachmentID == attachment {
				return fmt.Errorf("it is there; VolumeAttachments: %s", c.Kubectl(t, "get", "volumeattachments", "-o", "jsonpath={.items[*].status.detachError.message}"))
			}
		}
		return nil
	})
	if blocked := blocklist(t, c); !slices.Contains(blocked, clients[0]) {
		t.Fatalf("the attachment is gone and client %s is not shut out: %v", clients[0], blocked)
	}
	fenced := old.acknowledged(t)
	l.kept = fenced
	l.begin(t, "new-"+l.claim, other)
	n.Ready(l.pod)
	l.goesOn(t) // it found all that was acknowledged
	if found := l.found(t); found > fenced+1 {
		t.Errorf("%d records were durable when the node was shut out, and %d were there: one could have been on its way", fenced, found)
	}
	if now := l.watchers(t, v.ID); len(now) != 1 || now[0] == clients[0] {
		t.Errorf("open at Ceph by %v, was %v", now, clients)
	}
	// Fewer is what its kubelet keeps of the logs of containers that start in vain.
	if got := old.acknowledged(t); got > fenced {
		t.Errorf("the node that was shut out said %d records are durable, and then %d", fenced, got)
	}

	// It is back: its kubelet learns that the Pod is gone, and ends it.
	heal()
	c.Kubectl(t, "wait", "--for=condition=Ready", "node/"+lost, "--timeout=5m")
	testcloud.Until(t, "the node has nothing of the Pod any more", func() error {
		if r := machine(t, c, lost, n.Name, old.pod); r != nil {
			return fmt.Errorf("sandbox %s", r.ID)
		}
		if left := published(t, c, lost); len(left) > 0 {
			return fmt.Errorf("records of volumes %v", left)
		}
		return nil
	})
	l.goesOn(t)
	n.Kubectl("delete", "pod", l.pod, "--wait")
	l.free(t)
	// And it may have the volume again, with all that the other wrote.
	l.begin(t, "again-"+l.claim, lost)
	n.Ready(l.pod)
	l.goesOn(t)
	n.Kubectl("delete", "pod", l.pod, "--wait")
	l.free(t)
	n.Kubectl("delete", "pvc", "--all", "--wait")
}

// acknowledged is the last record that the Pod said is durable, whatever else it says.
func (l *ledger) acknowledged(t *testing.T) int {
	t.Helper()
	most := l.before
	for _, line := range l.said(t) {
		var n int
		if _, err := fmt.Sscanf(line, "kept %d", &n); err == nil {
			most = max(most, n)
		}
	}
	return most
}

// found is how many records the Pod found when it began.
func (l *ledger) found(t *testing.T) int {
	t.Helper()
	for _, line := range l.said(t) {
		var n int
		if _, err := fmt.Sscanf(line, "has %d", &n); err == nil {
			return n
		}
	}
	t.Fatalf("%s has not said what it found", l.pod)
	return 0
}

// blocklist are the clients that Ceph has shut out.
func blocklist(t *testing.T, c *testcloud.Cloud) []string {
	t.Helper()
	var all []struct{ Addr string }
	if err := ceph(t, c, &all, "ceph", "osd", "blocklist", "ls"); err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, b := range all {
		out = append(out, b.Addr)
	}
	return out
}

// partition cuts a node off from everything but some of its links, until heal or the test's
// end.
func partition(t *testing.T, c *testcloud.Cloud, node, still string) (heal func()) {
	t.Helper()
	nft := func(text string) error {
		cmd := exec.Command("nsenter", fmt.Sprintf("--net=/proc/%d/ns/net", c.Further(node).AnchorPID(t)), "nft", "-f", "-")
		cmd.Stdin = strings.NewReader(text)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("nft: %w: %s", err, out)
		}
		return nil
	}
	if err := nft(fmt.Sprintf(`table inet partition {
	chain in { type filter hook input priority -250; iifname != { %[1]s } drop; }
	chain out { type filter hook output priority -250; oifname != { %[1]s } drop; }
	chain through { type filter hook forward priority -250; drop; }
}
`, still)); err != nil {
		t.Fatal(err)
	}
	healed := false
	heal = func() {
		if healed {
			return
		}
		healed = true
		if err := nft("delete table inet partition\n"); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(heal)
	began := time.Now()
	testcloud.Until(t, "the cluster misses the node", func() error {
		if got := c.Kubectl(t, "get", "node", node, "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].status}`); got != "Unknown" {
			return fmt.Errorf("Ready is %s", got)
		}
		return nil
	})
	t.Logf("%s is missed after %v", node, time.Since(began).Round(time.Second))
	return heal
}
