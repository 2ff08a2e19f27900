package openstack

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack"
	"github.com/gophercloud/gophercloud/v2/openstack/blockstorage/v3/volumes"

	"github.com/hypernetes/hypernetes/test/e2e/testcloud"
	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// storage is a project's Cinder, as a member of it sees it.
type storage struct {
	t *testing.T
	*gophercloud.ServiceClient
}

func cinder(t *testing.T, p *testcloud.Project) *storage {
	t.Helper()
	provider, err := p.User("member").Provider(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	client, err := openstack.NewBlockStorageV3(provider, gophercloud.EndpointOpts{})
	if err != nil {
		t.Skipf("this OpenStack has no Cinder (H8S_OS_VOLUME=none): %v", err)
	}
	if nova, err := openstack.NewComputeV2(provider, gophercloud.EndpointOpts{}); err == nil {
		t.Errorf("this OpenStack has a Nova at %s: nothing here would show that none is needed", nova.Endpoint)
	}
	return &storage{t, client}
}

// volume makes one by hand, as the talks did.
func (s *storage) volume() string {
	s.t.Helper()
	v, err := volumes.Create(s.t.Context(), s.ServiceClient, volumes.CreateOpts{Size: 1, Name: "by hand"}, nil).Extract()
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), testcloud.Patience)
		defer cancel()
		for volumes.Delete(ctx, s.ServiceClient, v.ID, nil).Err != nil && ctx.Err() == nil {
			if _, err := volumes.Get(ctx, s.ServiceClient, v.ID).Extract(); gophercloud.ResponseCodeIs(err, 404) {
				return
			}
			time.Sleep(time.Second)
		}
	})
	s.is(v.ID, "available")
	return v.ID
}

func (s *storage) is(id, status string) {
	s.t.Helper()
	testcloud.Until(s.t, "volume "+id+" is "+status, func() error {
		v, err := volumes.Get(s.t.Context(), s.ServiceClient, id).Extract()
		if err == nil && v.Status != status {
			err = fmt.Errorf("it is %s", v.Status)
		}
		return err
	})
}

// all are the project's volumes.
func (s *storage) all() []volumes.Volume {
	s.t.Helper()
	pages, err := volumes.List(s.ServiceClient, volumes.ListOpts{}).AllPages(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	list, err := volumes.ExtractVolumes(pages)
	if err != nil {
		s.t.Fatal(err)
	}
	return list
}

// example is a manifest of examples/cinder about a volume, in a namespace.
func example(t *testing.T, name, id, namespace string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "..", "..", "examples", "cinder", name))
	if err != nil {
		t.Fatal(err)
	}
	return strings.NewReplacer(
		"651b2a7b-683e-47e1-bdd6-e3c62e8f91c0", id, "daa7b4e6-1792-462d-ad47-78e900fed429", id,
		"namespace: web", "namespace: "+namespace, "  name: by-hand\n", "  name: by-hand-"+namespace+"\n", "volumeName: by-hand", "volumeName: by-hand-"+namespace,
		"name: by-hand}", "name: by-hand-"+namespace+"}",
	).Replace(string(b))
}

func apply(t *testing.T, n *testcluster.Namespace, manifests string) error {
	t.Helper()
	file := filepath.Join(t.TempDir(), "manifests.yaml")
	if err := os.WriteFile(file, []byte(manifests), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := n.Try("apply", "-f", file)
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// namespace makes a tenant of a project with a namespace in a Network that needs no Neutron.
func namespace(t *testing.T, c *testcloud.Cloud, p *testcloud.Project) *testcluster.Namespace {
	t.Helper()
	tn := c.TenantOf(t, p)
	tn.Apply(fmt.Sprintf("apiVersion: hypernetes.io/v1alpha1\nkind: Network\nmetadata: {name: plain, namespace: %s}\nspec:\n  provider: builtin\n  subnets:\n    s: {cidr: 10.77.0.0/24}\n", tn.Home()))
	tn.Kubectl(t, "-n", tn.Home(), "wait", "network/plain", "--for=jsonpath={.status.phase}=Active", "--timeout=5m")
	return tn.Namespace("vol", "plain")
}

// TestVolumes: the seeds' Pods with volumes of Cinder, and claims, as tenants use them.
func TestVolumes(t *testing.T) {
	c := testcloud.Up(t, 2)
	blueProject, redProject := c.Project(t), c.Project(t)
	s := cinder(t, blueProject)
	id := s.volume()
	blue, red := namespace(t, c, blueProject), namespace(t, c, redProject)

	// Inline, as in the talks.
	if err := apply(t, blue, example(t, "nginx.yaml", id, blue.Name)); err != nil {
		t.Fatal(err)
	}
	blue.Ready("nginx")
	s.is(id, "in-use")
	if got := blue.Shell("nginx", "grep ' /var/lib/nginx ' /proc/mounts"); !strings.Contains(got, " ext4 ") {
		t.Errorf("mounted in the Pod: %q", got)
	}
	blue.Shell("nginx", "echo first > /var/lib/nginx/f; sync")
	for _, m := range c.NodeMounts(t) {
		if strings.Contains(m.Target, "kubernetes.io~csi") && m.Type != "tmpfs" {
			t.Errorf("mounted on the node: %+v", m)
		}
	}
	// What anybody may read who may list VolumeAttachments.
	if got := c.Kubectl(t, "get", "volumeattachments", "-o", "jsonpath={.items[*].status.attachmentMetadata}"); !strings.Contains(got, `"sealed"`) || strings.Contains(got, "volume-"+id) {
		t.Errorf("attachments tell %s", got)
	}

	noKey(t, c)

	// Another tenant names it.
	if err := apply(t, red, example(t, "nginx.yaml", id, red.Name)); err == nil || !strings.Contains(err.Error(), "is no volume of project") {
		t.Errorf("another tenant's volume, inline: %v", err)
	}

	blue.Kubectl("delete", "pod", "nginx", "--wait")
	s.is(id, "available")

	// And by a PersistentVolume that the operator bound to the wrong namespace.
	bad := example(t, "reference.yaml", id, red.Name) + "---\n" + user("thief", "by-hand-"+red.Name)
	if err := apply(t, red, bad); err != nil {
		t.Fatal(err)
	}
	red.Until("the node refuses another tenant's volume", testcloud.Patience, func() bool {
		return strings.Contains(red.Kubectl("get", "events", "--field-selector=involvedObject.name=thief", "-o", "jsonpath={.items[*].message}"), "is not of project")
	})
	red.Kubectl("delete", "pod/thief", "pvc/by-hand-"+red.Name, "--wait")
	c.Kubectl(t, "delete", "pv", "by-hand-"+red.Name)
	s.is(id, "available")

	// The older spelling; what was written is there.
	if err := apply(t, blue, example(t, "flexvolume.yaml", id, blue.Name)); err != nil {
		t.Fatal(err)
	}
	blue.Ready("nginx-flex")
	if got := blue.Exec("nginx-flex", "cat", "/var/lib/nginx/f"); strings.TrimSpace(got) != "first" {
		t.Errorf("the volume has %q", got)
	}
	blue.Kubectl("delete", "pod", "nginx-flex", "--wait")
	s.is(id, "available")

	// By reference, and from the other node.
	if err := apply(t, blue, example(t, "reference.yaml", id, blue.Name)+"---\n"+user("reader", "by-hand-"+blue.Name)); err != nil {
		t.Fatal(err)
	}
	blue.Ready("reader")
	if got := blue.Exec("reader", "cat", "/data/f"); strings.TrimSpace(got) != "first" {
		t.Errorf("the volume has %q", got)
	}
	blue.Kubectl("delete", "pod/reader", "pvc/by-hand-"+blue.Name, "--wait")
	c.Kubectl(t, "delete", "pv", "by-hand-"+blue.Name)
	s.is(id, "available")

	// A claim: a volume of the project's, which goes with it.
	if err := apply(t, blue, example(t, "claim.yaml", id, blue.Name)); err != nil {
		t.Fatal(err)
	}
	blue.Ready("keeper")
	var made *volumes.Volume
	for _, v := range s.all() {
		if v.ID != id {
			made = &v
		}
	}
	if made == nil || made.Metadata["h8s-namespace"] != blue.Name || made.Metadata["h8s-claim"] != "data" || made.Status != "in-use" {
		t.Fatalf("the claim's volume is %+v", made)
	}
	// Somebody forces the detach while the Pod runs: the node did not let go. (Of Ceph's it
	// would be shut out: see TestCeph of volume/backend/cinder.)
	if s.shared(made.ID) {
		attachment := c.Kubectl(t, "get", "volumeattachments", "-o", "jsonpath={.items[0].metadata.name}")
		c.Kubectl(t, "delete", "volumeattachment", attachment, "--wait=false")
		testcloud.Until(t, "the detach is refused", func() error {
			if said := c.Kubectl(t, "get", "volumeattachment", attachment, "-o", "jsonpath={.status.detachError.message}"); !strings.Contains(said, "out-of-service") {
				return fmt.Errorf("it says %q", said)
			}
			return nil
		})
		blue.Shell("keeper", "echo still >> /data/starts; sync")
	}
	blue.Kubectl("delete", "pod/keeper", "--wait")
	s.is(made.ID, "available")

	// A copy of a moment, larger.
	if err := apply(t, blue, copies); err != nil {
		t.Fatal(err)
	}
	blue.Ready("copy")
	if got := blue.Shell("copy", "wc -l < /data/starts; df -m /data | tail -n 1 | awk '{print $2}'"); !strings.HasPrefix(got, "1") && !strings.HasPrefix(got, "2") {
		t.Errorf("the copy has %q", got)
	} else if fields := strings.Fields(got); len(fields) != 2 || len(fields[1]) < 4 {
		t.Errorf("the copy is as large as its original, in MiB: %q", got)
	}
	blue.Kubectl("delete", "pod/copy", "pvc/copy", "--wait")
	blue.Kubectl("delete", "volumesnapshot/moment", "--wait")
	blue.Kubectl("delete", "pvc/data", "--wait")
	testcloud.Until(t, "the claim's volume is gone", func() error {
		if n := len(s.all()); n != 1 {
			return fmt.Errorf("%d volumes", n)
		}
		return nil
	})
}

// copies are a snapshot of the claim data, a claim of it that is larger, and a Pod for that.
const copies = `apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshot
metadata: {name: moment}
spec: {volumeSnapshotClassName: cinder, source: {persistentVolumeClaimName: data}}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: copy}
spec:
  storageClassName: cinder
  accessModes: [ReadWriteOnce]
  dataSource: {apiGroup: snapshot.storage.k8s.io, kind: VolumeSnapshot, name: moment}
  resources: {requests: {storage: 2Gi}}
---
apiVersion: v1
kind: Pod
metadata: {name: copy}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: main, image: "h8s.local/busybox:1", command: [sleep, infinity], volumeMounts: [{name: v, mountPath: /data}]}
  volumes: [{name: v, persistentVolumeClaim: {claimName: copy}}]
`

// shared says whether a volume is a file on a share, which nobody can be shut out of.
func (s *storage) shared(id string) bool {
	v, err := volumes.Get(s.t.Context(), s.ServiceClient, id).Extract()
	return err == nil && v.VolumeType == "file"
}

// user is a Pod that has a claim at /data.
func user(name, claim string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: main, image: "h8s.local/busybox:1", command: [sleep, infinity], volumeMounts: [{name: v, mountPath: /data}]}
  volumes: [{name: v, persistentVolumeClaim: {claimName: %s}}]
`, name, claim)
}
