package openstack

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/gophercloud/gophercloud/v2/openstack/blockstorage/v3/volumes"

	"github.com/hypernetes/hypernetes/runtime/record"
	"github.com/hypernetes/hypernetes/test/e2e/testcloud"
	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// ledger is a claim on a volume of Ceph's, and what Pods that had it said of the records
// they keep there.
type ledger struct {
	c     *testcloud.Cloud
	n     *testcluster.Namespace
	s     *storage
	claim string
	// pod has it now, or had it last, on a node.
	pod, node, uid string
	// id is the ledger's since it was begun, kept the last record that a Pod said is durable,
	// as far as it was heard of; before is what was so when this Pod began.
	id           string
	kept, before int
}

// onCeph skips the test where Cinder's volumes are not Ceph's.
func onCeph(t *testing.T, c *testcloud.Cloud) {
	t.Helper()
	if _, err := os.Stat(filepath.Join(c.OpenStack.Dir, "ceph", "ceph.client.cinder.keyring")); err != nil {
		t.Skipf("skipped: this OpenStack's volumes are not Ceph's (H8S_OS_VOLUME=rbd test/openstack/openstack.sh up): %v", err)
	}
}

// newLedger makes the claim; the first Pod begins the ledger.
func newLedger(t *testing.T, c *testcloud.Cloud, n *testcluster.Namespace, s *storage, claim string) *ledger {
	t.Helper()
	if err := apply(t, n, fmt.Sprintf(`apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: %s}
spec: {storageClassName: cinder, accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Gi}}}
`, claim)); err != nil {
		t.Fatal(err)
	}
	return &ledger{c: c, n: n, s: s, claim: claim}
}

// begin makes a Pod on a node that goes on with the ledger. It also has a disk of its
// own, which comes and goes with it.
func (l *ledger) begin(t *testing.T, pod, node string) {
	t.Helper()
	if err := apply(t, l.n.For(t), fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  terminationGracePeriodSeconds: 2
  nodeSelector: {kubernetes.io/hostname: %q}
  containers:
  - name: main
    image: h8s.local/testbox:1
    command: [sh, -c, "echo x | dd of=/dev/own conv=fsync 2>/dev/null && mkdir -p /data/ledger && exec /testbox ledger -interval 50ms /data/ledger"]
    volumeMounts: [{name: v, mountPath: /data}]
    volumeDevices: [{name: own, devicePath: /dev/own}]
  volumes:
  - {name: v, persistentVolumeClaim: {claimName: %s}}
  - name: own
    ephemeral: {volumeClaimTemplate: {spec: {storageClassName: cinder, volumeMode: Block, accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Gi}}}}}
`, pod, node, l.claim)); err != nil {
		t.Fatal(err)
	}
	l.pod, l.node, l.before = pod, node, l.kept
	l.uid = l.n.For(t).Get("pod/"+pod, ".metadata.uid")
}

// said are the lines of the Pod's container, in all its lives that the node still knows of.
func (l *ledger) said(t *testing.T) []string {
	t.Helper()
	dir := filepath.Join(l.c.Further(l.node).NodeRoot(t), "var/log/pods", l.n.Name+"_"+l.pod+"_"+l.uid, "main")
	files, _ := filepath.Glob(filepath.Join(dir, "*.log"))
	life := func(file string) int {
		n, _ := strconv.Atoi(strings.TrimSuffix(filepath.Base(file), ".log"))
		return n
	}
	slices.SortFunc(files, func(a, b string) int { return life(a) - life(b) })
	var out []string
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			if f := strings.SplitN(strings.TrimSpace(line), " ", 4); len(f) == 4 {
				out = append(out, f[3])
			}
		}
	}
	return out
}

// look hears what the Pod said, and fails the test if any of it is not as it should be:
// each life finds the ledger of the one before, with all that it was told.
func (l *ledger) look(t *testing.T) int {
	t.Helper()
	most := l.before
	for _, line := range l.said(t) {
		var n int
		var id string
		switch {
		case strings.HasPrefix(line, "has "):
			_, _ = fmt.Sscanf(line, "has %d %s", &n, &id)
			if n < most {
				t.Fatalf("%s on %s: %d records are there, %d were acknowledged", l.pod, l.node, n, most)
			}
			if l.id != "" && id != l.id {
				t.Fatalf("%s on %s: the ledger is %q, was %q", l.pod, l.node, id, l.id)
			}
		case strings.HasPrefix(line, "kept "):
			_, _ = fmt.Sscanf(line, "kept %d", &n)
		default:
			t.Fatalf("%s on %s says: %s", l.pod, l.node, line)
		}
		most = max(most, n)
		if id != "" {
			l.id = id
		}
	}
	l.kept = max(l.kept, most)
	return l.kept
}

// goesOn waits until the Pod has kept some more records.
func (l *ledger) goesOn(t *testing.T) {
	t.Helper()
	from := l.look(t)
	testcloud.Until(t, l.pod+" keeps records", func() error {
		if now := l.look(t); now < from+5 {
			return fmt.Errorf("%d, were %d; events: %s", now, from,
				l.n.For(t).Kubectl("get", "events", "--field-selector", "involvedObject.name="+l.pod, "-o", `jsonpath={range .items[*]}{.reason} {.message}{"\n"}{end}`))
		}
		return nil
	})
}

// volume is Cinder's of the claim.
func (l *ledger) volume(t *testing.T) *volumes.Volume {
	t.Helper()
	n := l.n.For(t)
	id := l.c.Kubectl(t, "get", "pv", n.Get("pvc/"+l.claim, ".spec.volumeName"), "-o", "jsonpath={.spec.csi.volumeHandle}")
	v, err := volumes.Get(t.Context(), l.s.ServiceClient, id).Extract()
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// attachments are the names of the VolumeAttachments of the claim's volume.
func (l *ledger) attachments(t *testing.T) []string {
	t.Helper()
	pv := l.n.For(t).Get("pvc/"+l.claim, ".spec.volumeName")
	return strings.Fields(l.c.Kubectl(t, "get", "volumeattachments", "-o", fmt.Sprintf(`jsonpath={.items[?(@.spec.source.persistentVolumeName==%q)].metadata.name}`, pv)))
}

// free waits until nobody has the volume and nobody remembers that somebody had.
func (l *ledger) free(t *testing.T) {
	t.Helper()
	testcloud.Until(t, "the volume of "+l.claim+" is free", func() error {
		v, vas := l.volume(t), l.attachments(t)
		if v.Status != "available" || len(v.Attachments) != 0 || len(vas) != 0 {
			return fmt.Errorf("it is %s, %d attachments, VolumeAttachments %v", v.Status, len(v.Attachments), vas)
		}
		if w := l.watchers(t, v.ID); len(w) != 0 {
			return fmt.Errorf("open at Ceph by %v", w)
		}
		return nil
	})
}

// ceph runs rbd or ceph as Ceph's administrator and reads the answer.
func ceph(t *testing.T, c *testcloud.Cloud, answer any, name string, args ...string) error {
	t.Helper()
	args = append([]string{"--net=" + c.OpenStack.NetNS(), "timeout", "60", name, "--conf", filepath.Join(c.OpenStack.Dir, "ceph", "ceph.conf")}, append(args, "--format", "json")...)
	cmd := exec.CommandContext(t.Context(), "nsenter", args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, stderr.String())
	}
	return json.NewDecoder(bytes.NewReader(out)).Decode(answer) // the blocklist is followed by another one
}

// watchers are the clients of Ceph that have a volume open.
func (l *ledger) watchers(t *testing.T, id string) []string {
	t.Helper()
	var answer struct{ Watchers []struct{ Address string } }
	if err := ceph(t, l.c, &answer, "rbd", "status", "volumes/volume-"+id); err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, w := range answer.Watchers {
		out = append(out, w.Address)
	}
	return out
}

// machine is what of a Pod's VM runs on a node; pids are 0 of what does not.
func machine(t *testing.T, c *testcloud.Cloud, node, namespace, pod string) *record.Record {
	t.Helper()
	all, err := record.List(filepath.Join(c.Further(node).NodeRoot(t), "run/h8s-shim"))
	if err != nil {
		t.Logf("records of shims on %s: %v", node, err)
	}
	var newest *record.Record
	for _, r := range all {
		if r.Pod == namespace+"/"+pod && r.Shim.Alive() {
			newest = r
		}
	}
	return newest
}

// published are the volumes that a node has records of.
func published(t *testing.T, c *testcloud.Cloud, node string) []string {
	t.Helper()
	found, _ := filepath.Glob(filepath.Join(c.Further(node).NodeRoot(t), "run/h8s-volumes/volumes/*"))
	var out []string
	for _, f := range found {
		out = append(out, filepath.Base(f))
	}
	return out
}
