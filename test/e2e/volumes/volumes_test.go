package volumes

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// TestNothingLeft: what volumes need on the node is there while they are, and gone with
// them. It runs alone.
func TestNothingLeft(t *testing.T) {
	c := testcluster.Up(t)
	n := c.Namespace(t)
	objects := all{
		claim{Name: "files"}, claim{Name: "raw", Mode: "Block"},
		pod{Name: "a", Claim: "files", Mount: "subPath: deep/er"}, pod{Name: "b", Claim: "raw", Block: true},
		pod{Name: "c", Volume: "csi: {driver: block.hypernetes.io, volumeAttributes: {size: 64Mi}}"},
	}
	remove := func() {
		stop(n, "a", "b", "c")
		n.Kubectl("delete", "pvc", "files", "raw")
		n.Until("no volume is left", testcluster.Patience, func() bool {
			return n.Cluster.Kubectl(t, "get", "persistentvolumes,localvolumes", "-o", "name") == ""
		})
	}
	// The first ones bring directories that stay.
	first := c.Inventory(t)
	start(t, n, objects, "a", "b", "c")
	remove()
	var before testcluster.Inventory
	n.Until("the first Pods are gone for good", testcluster.Patience, func() bool {
		before = c.Inventory(t)
		return !slices.ContainsFunc(before.Added(first), func(what string) bool {
			return !strings.HasPrefix(what, "file of the node") && !strings.HasPrefix(what, "temporary")
		})
	})
	start(t, n, objects, "a", "b", "c")
	n.Shell("a", "echo x > /data/f; sync")
	during := strings.Join(c.Inventory(t).Added(before), "\n")
	for _, kind := range []string{"volumes", "inline"} {
		if !strings.Contains(during, "/var/lib/h8s-volumes/local/"+kind+"/") {
			t.Errorf("none of the %s is to be seen:\n%s", kind, during)
		}
	}
	// Volumes are disks of their VMs: nothing of the node has them mounted.
	for _, m := range c.NodeMounts(t) {
		if m.Type == "ext4" && strings.Contains(m.Target, "/kubernetes.io~csi/") || strings.Contains(m.Source, "disk.raw") {
			t.Errorf("mounted on the node: %+v", m)
		}
	}
	remove()
	c.NothingLeft(t, before, time.Minute)
}

// TestData writes in one Pod and reads in the next.
func TestData(t *testing.T) {
	t.Parallel()
	n := testcluster.Up(t).Namespace(t)
	start(t, n, all{claim{Name: "data"}, pod{Name: "one", Claim: "data"}}, "one")
	want(t, "file system", n.Shell("one", "grep ' /data ' /proc/mounts | cut -d' ' -f3"), "ext4")
	n.Shell("one", "echo first > /data/f && mkdir /data/d && ln -s f /data/l && chown 12:34 /data/d && sync")
	// A container that is killed finds it again, without a sync.
	n.Shell("one", "echo unsynced > /data/u")
	n.ExecCode("one", "sh", "-c", "kill -9 -1; kill 1")
	stop(n, "one")
	start(t, n, pod{Name: "two", Claim: "data"}, "two")
	want(t, "a file in the next Pod", n.Exec("two", "cat", "/data/l"), "first")
	want(t, "owner of a directory", n.Exec("two", "stat", "-c", "%u:%g", "/data/d"), "12:34")
	want(t, "what was not synced", n.Exec("two", "cat", "/data/u"), "unsynced")

	// A second Pod on the node: two kernels on one file system would ruin it.
	apply(t, n, pod{Name: "three", Claim: "data"}.String())
	said(t, n, "three", "FailedMount", "in use")
	stop(n, "two")
	n.Ready("three") // as soon as it may
	want(t, "a file in the Pod that waited", n.Exec("three", "cat", "/data/f"), "first")
}

// TestSequence has Pods one after the other each count on: nothing is lost on any way.
func TestSequence(t *testing.T) {
	t.Parallel()
	n := testcluster.Up(t).Namespace(t)
	apply(t, n, claim{Name: "data"}.String())
	const pods = 6
	for i := range pods {
		name := fmt.Sprint("p", i)
		apply(t, n, pod{Name: name, Claim: "data", Command: "echo $(( $(cat /data/n 2>/dev/null || echo 0) + 1 )) > /data/n; cat /data/n"}.String())
		n.Wait("pod/"+name, "jsonpath={.status.phase}=Succeeded")
		want(t, "count of "+name, strings.TrimSpace(n.Logs(name)), fmt.Sprint(i+1))
		stop(n, name)
	}
}

// TestMounts: containers share a volume, at paths of it, and some may only read.
func TestMounts(t *testing.T) {
	t.Parallel()
	n := testcluster.Up(t).Namespace(t)
	start(t, n, all{claim{Name: "data"}, pod{
		Name: "p", Claim: "data", Security: "{runAsUser: 1001, fsGroup: 2345}",
		More: `- name: reader
    image: h8s.local/testbox:1
    command: [sleep, "100000"]
    volumeMounts:
    - {name: v, mountPath: /ro, readOnly: true}
    - {name: v, mountPath: /sub, subPath: a/b}
    - {name: v, mountPath: /file, subPathExpr: a/b}`,
	}}, "p")
	want(t, "group by fsGroup", n.Exec("p/c", "stat", "-c", "%g", "/data"), "2345")
	n.Shell("p/c", "echo shared > /data/s; echo below > /data/a/b/f")
	want(t, "what the other container sees", n.Exec("p/reader", "cat", "/ro/s"), "shared")
	want(t, "a subPath", n.Exec("p/reader", "cat", "/sub/f"), "below")
	want(t, "the same as an expression", n.Exec("p/reader", "cat", "/file/f"), "below")
	if out, code := n.ExecCode("p/reader", "sh", "-c", "echo x > /ro/x 2>&1"); code == 0 {
		t.Errorf("a read-only mount was written to: %s", out)
	}
	stop(n, "p")
	// The whole volume read-only.
	start(t, n, pod{Name: "q", Volume: "persistentVolumeClaim: {claimName: data, readOnly: true}"}, "q")
	want(t, "read-only volume", n.Exec("q", "cat", "/data/s"), "shared")
	if out, code := n.ExecCode("q", "sh", "-c", "echo x > /data/x 2>&1"); code == 0 {
		t.Errorf("a read-only volume was written to: %s", out)
	}
}

// mebibytes is the size of the file system at /data.
func mebibytes(n *testcluster.Namespace, pod string) int {
	var kib int
	_, _ = fmt.Sscan(n.Shell(pod, "df -k /data | tail -n 1 | awk '{print $2}'"), &kib)
	return kib / 1024
}

// TestExpand grows a volume while its Pod runs and while it has none.
func TestExpand(t *testing.T) {
	t.Parallel()
	n := testcluster.Up(t).Namespace(t)
	start(t, n, all{claim{Name: "data", Size: "128Mi"}, pod{Name: "one", Claim: "data"}}, "one")
	n.Shell("one", "echo kept > /data/f")
	if got := mebibytes(n, "one"); got < 90 || got > 128 {
		t.Errorf("size at first: %d MiB", got)
	}
	grow := func(size string) {
		n.Kubectl("patch", "pvc", "data", "-p", fmt.Sprintf(`{"spec":{"resources":{"requests":{"storage":%q}}}}`, size))
	}
	grow("256Mi")
	n.Wait("pvc/data", "jsonpath={.status.capacity.storage}=256Mi")
	if got := mebibytes(n, "one"); got < 200 || got > 256 {
		t.Errorf("size after growing under a Pod: %d MiB", got)
	}
	want(t, "a file", n.Exec("one", "cat", "/data/f"), "kept")
	stop(n, "one")
	grow("400Mi")
	start(t, n, pod{Name: "two", Claim: "data"}, "two")
	n.Wait("pvc/data", "jsonpath={.status.capacity.storage}=400Mi")
	if got := mebibytes(n, "two"); got < 330 || got > 400 {
		t.Errorf("size after growing without a Pod: %d MiB", got)
	}
	want(t, "a file", n.Exec("two", "cat", "/data/f"), "kept")
	if out, err := n.Try("patch", "pvc", "data", "-p", `{"spec":{"resources":{"requests":{"storage":"100Mi"}}}}`); err == nil {
		t.Errorf("a volume shrinks: %s", out)
	}
	// To more than there is.
	grow("900Ti")
	said(t, n, "data", "VolumeResizeFailed")
	want(t, "a file after that", n.Exec("two", "cat", "/data/f"), "kept")
}

const snapshot = `
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshot
metadata: {name: %s}
spec: {source: {persistentVolumeClaimName: %s}}
---
`

// TestCopies: a snapshot holds what was, a clone what is.
func TestCopies(t *testing.T) {
	t.Parallel()
	n := testcluster.Up(t).Namespace(t)
	start(t, n, all{claim{Name: "data"}, pod{Name: "one", Claim: "data"}}, "one")
	n.Shell("one", "echo old > /data/f; sync")
	reflink := n.Cluster.Kubectl(t, "get", "localstores", "-o", "jsonpath={.items[0].status.reflink}") == "true"
	if !reflink {
		apply(t, n, fmt.Sprintf(snapshot, "busy", "data"))
		n.Until("the snapshot says why it cannot be", testcluster.Patience, func() bool {
			return strings.Contains(n.Get("volumesnapshot/busy", ".status.error.message"), "stop its Pod")
		})
		n.Kubectl("delete", "volumesnapshot", "busy")
	}
	stop(n, "one")
	apply(t, n, fmt.Sprintf(snapshot, "then", "data"))
	n.Wait("volumesnapshot/then", "jsonpath={.status.readyToUse}=true")
	start(t, n, pod{Name: "two", Claim: "data"}, "two")
	n.Shell("two", "echo new > /data/f; sync")
	stop(n, "two")

	start(t, n, all{
		claim{Name: "restored", SourceKind: "VolumeSnapshot", Source: "then", Size: "200Mi"}, pod{Name: "r", Claim: "restored"},
		claim{Name: "cloned", SourceKind: "PersistentVolumeClaim", Source: "data"}, pod{Name: "c", Claim: "cloned"},
	}, "r", "c")
	want(t, "restored", n.Exec("r", "cat", "/data/f"), "old")
	want(t, "cloned", n.Exec("c", "cat", "/data/f"), "new")
	if got := mebibytes(n, "r"); got < 150 {
		t.Errorf("a larger copy has %d MiB", got)
	}
	// Copies are their own: they stay without what they were made of.
	n.Kubectl("delete", "volumesnapshot", "then")
	n.Kubectl("delete", "pvc", "data")
	n.Shell("c", "echo mine > /data/f")
	want(t, "restored, when its source is gone", n.Exec("r", "cat", "/data/f"), "old")
}

// TestBlock gives a container a disk instead of files.
func TestBlock(t *testing.T) {
	t.Parallel()
	n := testcluster.Up(t).Namespace(t)
	start(t, n, all{claim{Name: "raw", Mode: "Block", Size: "64Mi"}, pod{Name: "one", Claim: "raw", Block: true}}, "one")
	want(t, "kind of file", n.Exec("one", "stat", "-c", "%F", "/dev/vol"), "block special file")
	want(t, "what is in a new one", n.Shell("one", "head -c 1048576 /dev/vol | tr -d '\\0' | wc -c"), "0")
	n.Shell("one", "printf 'raw data' | dd of=/dev/vol bs=512 seek=2048 conv=notrunc,fsync 2>/dev/null")
	stop(n, "one")
	start(t, n, pod{Name: "two", Claim: "raw", Block: true}, "two")
	want(t, "in the next Pod", n.Shell("two", "dd if=/dev/vol bs=512 skip=2048 count=1 2>/dev/null | tr -d '\\0'"), "raw data")
	want(t, "size", n.Shell("two", "wc -c < /dev/vol"), "67108864")
}

// TestReadWriteOncePod: a claim that one Pod at a time may use.
func TestReadWriteOncePod(t *testing.T) {
	t.Parallel()
	n := testcluster.Up(t).Namespace(t)
	start(t, n, all{claim{Name: "data", Access: "ReadWriteOncePod"}, pod{Name: "one", Claim: "data"}}, "one")
	apply(t, n, pod{Name: "two", Claim: "data"}.String())
	said(t, n, "two", "FailedScheduling", "ReadWriteOncePod")
	stop(n, "one")
	n.Ready("two")
}

// TestEphemeral: a volume that lives as long as its Pod.
func TestEphemeral(t *testing.T) {
	t.Parallel()
	n := testcluster.Up(t).Namespace(t)
	start(t, n, pod{Name: "p", Volume: "ephemeral: {volumeClaimTemplate: {spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 64Mi}}}}}"}, "p")
	n.Shell("p", "echo x > /data/f")
	volume := n.Get("pvc/p-v", ".spec.volumeName")
	stop(n, "p")
	n.Until("the volume is gone", testcluster.Patience, func() bool {
		out, err := n.Try("get", "localvolume", volume, "--ignore-not-found", "-o", "name")
		return err == nil && out == ""
	})
}

// TestInline: a disk of the Pod's own, without a claim.
func TestInline(t *testing.T) {
	t.Parallel()
	c := testcluster.Up(t)
	n := c.Namespace(t)
	start(t, n, pod{Name: "p", Security: "{fsGroup: 2345}", Mount: "subPath: a/b", Volume: "csi: {driver: block.hypernetes.io, volumeAttributes: {size: 200Mi}}"}, "p")
	if got := mebibytes(n, "p"); got < 150 || got > 200 {
		t.Errorf("size: %d MiB", got)
	}
	want(t, "group by fsGroup", n.Exec("p", "stat", "-c", "%g", "/data"), "2345")
	n.Shell("p", "echo x > /data/f && sync")
	// A container that is killed finds it again.
	n.ExecCode("p", "sh", "-c", "kill -9 -1; kill 1")
	n.Until("the next container has it", testcluster.Patience, func() bool {
		out, code := n.ExecCode("p", "cat", "/data/f")
		return code == 0 && strings.TrimSpace(out) == "x"
	})
	// The kubelet's name of it.
	id := fmt.Sprintf("csi-%x", sha256.Sum256([]byte(n.Get("pod/p", ".metadata.uid")+"v")))
	file := filepath.Join(c.NodeRoot(t), "var/lib/h8s-volumes/local/inline", id, "disk.raw")
	if st, err := os.Stat(file); err != nil || st.Size() != 200<<20 {
		t.Errorf("its file: %v, %v", st, err)
	}
	stop(n, "p")
	n.Until("the file is gone", testcluster.Patience, func() bool {
		_, err := os.Stat(file)
		return errors.Is(err, fs.ErrNotExist)
	})
	for _, x := range []struct{ name, attributes, says string }{
		{"unknown", "{medium: memory}", `"medium"`}, {"odd", "{size: much}", `"much"`}, {"large", "{size: 100Gi}", "16Gi"},
	} {
		apply(t, n, pod{Name: x.name, Volume: "csi: {driver: block.hypernetes.io, volumeAttributes: " + x.attributes + "}"}.String())
		said(t, n, x.name, "FailedMount", x.says)
	}
}

// TestLimits: a claim's VolumeAttributesClass bounds what its Pod writes, from the start and
// from when it is changed.
func TestLimits(t *testing.T) {
	t.Parallel()
	n := testcluster.Up(t).Namespace(t)
	slow, fast, odd := n.Name+"-slow", n.Name+"-fast", n.Name+"-odd"
	for name, parameters := range map[string]string{slow: "writeBytesPerSecond: 1Mi", fast: "writeBytesPerSecond: 10Gi, readIOPS: '100000'", odd: "iops: '1'"} {
		apply(t, n, fmt.Sprintf("apiVersion: storage.k8s.io/v1\nkind: VolumeAttributesClass\nmetadata: {name: %s}\ndriverName: block.hypernetes.io\nparameters: {%s}\n", name, parameters))
		defer n.Cluster.Kubectl(t, "delete", "volumeattributesclass", name, "--wait=false")
	}
	start(t, n, all{claim{Name: "data", Attributes: slow}, pod{Name: "one", Claim: "data"}}, "one")
	write := func(pod string) time.Duration {
		began := time.Now()
		n.Shell(pod, "dd if=/dev/zero of=/data/f bs=256k count=64 conv=fsync 2>/dev/null")
		return time.Since(began)
	}
	change := func(to string) {
		n.Kubectl("patch", "pvc", "data", "-p", fmt.Sprintf(`{"spec":{"volumeAttributesClassName":%q}}`, to))
		if to != odd {
			n.Wait("pvc/data", "jsonpath={.status.currentVolumeAttributesClassName}="+to)
		}
	}
	first := write("one")
	change(fast)
	free := write("one")
	change(slow)
	again := write("one")
	stop(n, "one")
	change(fast)
	start(t, n, pod{Name: "two", Claim: "data"}, "two")
	next := write("two")
	t.Logf("bounded %v and %v, free %v and %v", first, again, free, next)
	if min(first, again) < 2*max(free, next) {
		t.Errorf("bounded, writing takes %v and %v; free, %v and %v", first, again, free, next)
	}
	change(odd)
	said(t, n, "data", "VolumeModifyFailed", `iops "1"`)
}

// TestStatefulSet: each replica has its own volume, and finds it again.
func TestStatefulSet(t *testing.T) {
	t.Parallel()
	n := testcluster.Up(t).Namespace(t)
	apply(t, n, `
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: s}
spec:
  replicas: 2
  serviceName: s
  podManagementPolicy: Parallel
  selector: {matchLabels: {app: s}}
  template:
    metadata: {labels: {app: s}}
    spec:
      terminationGracePeriodSeconds: 2
      containers:
      - name: c
        image: h8s.local/testbox:1
        command: [sh, -c, "hostname >> /data/who; exec sleep 100000"]
        volumeMounts: [{name: v, mountPath: /data}]
  volumeClaimTemplates:
  - metadata: {name: v}
    spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 64Mi}}}
`)
	n.Kubectl("rollout", "status", "statefulset/s", "--timeout="+testcluster.Patience.String())
	n.Kubectl("rollout", "restart", "statefulset/s")
	n.Kubectl("rollout", "status", "statefulset/s", "--timeout="+testcluster.Patience.String())
	for _, p := range []string{"s-0", "s-1"} {
		want(t, "who wrote to the volume of "+p, n.Shell(p, "sort -u /data/who; wc -l < /data/who"), p+"\n2")
	}
}

// TestStatistics: the kubelet tells how full a volume is, as its VM says.
func TestStatistics(t *testing.T) {
	t.Parallel()
	n := testcluster.Up(t).Namespace(t)
	start(t, n, all{claim{Name: "data", Size: "128Mi"}, pod{Name: "p", Claim: "data"}}, "p")
	n.Shell("p", "dd if=/dev/zero of=/data/f bs=1M count=40 2>/dev/null; sync")
	n.Until("the kubelet knows of the 40 MiB", testcluster.Patience, func() bool {
		out, err := n.Try("get", "--raw", "/api/v1/nodes/"+n.Node+"/proxy/metrics")
		if err != nil {
			return false
		}
		for line := range strings.Lines(out) {
			var used float64
			if strings.HasPrefix(line, "kubelet_volume_stats_used_bytes{") && strings.Contains(line, n.Name) {
				_, _ = fmt.Sscan(line[strings.LastIndex(line, " ")+1:], &used)
				return used > 40e6 && used < 60e6
			}
		}
		return false
	})
}

// TestHealth: a volume whose file is gone is an event of its Pod, and a metric of the kubelet.
func TestHealth(t *testing.T) {
	t.Parallel()
	c := testcluster.Up(t)
	n := c.Namespace(t)
	start(t, n, all{claim{Name: "data"}, pod{Name: "p", Claim: "data"}}, "p")
	volume := n.Get("pvc/data", ".spec.volumeName")
	handle := c.Kubectl(t, "get", "persistentvolume", volume, "-o", "jsonpath={.spec.csi.volumeHandle}")
	file := filepath.Join(c.NodeRoot(t), "var/lib/h8s-volumes/local/volumes", handle, "disk.raw")
	if err := os.Rename(file, file+".away"); err != nil {
		t.Fatal(err)
	}
	defer os.Rename(file+".away", file)
	said(t, n, "p", "VolumeConditionAbnormal", "gone from the node")
	n.Until("the kubelet's metric says so", testcluster.Patience, func() bool {
		out, err := n.Try("get", "--raw", "/api/v1/nodes/"+n.Node+"/proxy/metrics")
		if err != nil {
			return false
		}
		for line := range strings.Lines(out) {
			if strings.HasPrefix(line, "kubelet_volume_stats_health_status_abnormal{") && strings.Contains(line, n.Name) {
				return strings.HasSuffix(strings.TrimSpace(line), " 1")
			}
		}
		return false
	})
	want(t, "what a Pod of such a volume still does", n.Shell("p", "echo x > /data/f; sync; cat /data/f"), "x")
}

// TestBadInput: what cannot be is told, by name and with what to do.
func TestBadInput(t *testing.T) {
	t.Parallel()
	n := testcluster.Up(t).Namespace(t)
	t.Run("Huge", func(t *testing.T) {
		apply(t, n, all{claim{Name: "huge", Size: "900Ti"}, pod{Name: "huge", Claim: "huge"}}.String())
		said(t, n, "huge", "FailedScheduling", "enough free storage")
	})
	t.Run("Shared", func(t *testing.T) {
		apply(t, n, all{claim{Name: "shared", Access: "ReadWriteMany"}, pod{Name: "shared-pod", Claim: "shared"}}.String())
		said(t, n, "shared", "ProvisioningFailed", "MULTI_NODE")
	})
	t.Run("Parameters", func(t *testing.T) {
		class := n.Name + "-odd"
		defer n.Cluster.Kubectl(t, "delete", "storageclass", class)
		apply(t, n, fmt.Sprintf("apiVersion: storage.k8s.io/v1\nkind: StorageClass\nmetadata: {name: %s}\nprovisioner: block.hypernetes.io\nparameters: {type: fast}\n", class))
		apply(t, n, claim{Name: "odd", Class: class}.String())
		said(t, n, "odd", "ProvisioningFailed", `"type"`)
	})
	t.Run("NoSuchClaim", func(t *testing.T) {
		apply(t, n, pod{Name: "lost", Claim: "nonesuch"}.String())
		said(t, n, "lost", "FailedScheduling", `persistentvolumeclaim "nonesuch" not found`)
	})
	t.Run("SmallerCopy", func(t *testing.T) {
		start(t, n, all{claim{Name: "big", Size: "100Mi"}, pod{Name: "big", Claim: "big"}}, "big")
		stop(n, "big")
		apply(t, n, all{claim{Name: "small", Size: "50Mi", SourceKind: "PersistentVolumeClaim", Source: "big"}, pod{Name: "small-pod", Claim: "small"}}.String())
		said(t, n, "small", "ProvisioningFailed")
	})
}
