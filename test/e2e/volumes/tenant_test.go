package volumes

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// TestTenant: a tenant's member has volumes and snapshots, and of what is behind them
// sees and writes nothing.
func TestTenant(t *testing.T) {
	t.Parallel()
	c := testcluster.Up(t)
	tn := c.Tenant(t)
	n := tn.Namespace("web", "default")
	member := tn.Kubeconfig("member", "member")
	as := func(manifest string, args ...string) (string, error) {
		if manifest != "" {
			path := filepath.Join(t.TempDir(), "manifest.yaml")
			if err := os.WriteFile(path, []byte(manifest), 0o600); err != nil {
				t.Fatal(err)
			}
			args = append(args, "-f", path)
		}
		return c.As(member, append([]string{"-n", n.Name}, args...)...)
	}
	may := func(manifest string, args ...string) string {
		t.Helper()
		out, err := as(manifest, args...)
		if err != nil {
			t.Fatalf("member: kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
		}
		return out
	}
	may(all{claim{Name: "data"}, pod{Name: "one", Claim: "data"}}.String(), "create")
	n.Ready("one")
	may("", "exec", "one", "--", "sh", "-c", "echo mine > /data/f; sync")
	may("", "delete", "pod", "one")
	may(fmt.Sprintf(snapshot, "then", "data"), "create")
	n.Wait("volumesnapshot/then", "jsonpath={.status.readyToUse}=true")
	may(all{claim{Name: "back", SourceKind: "VolumeSnapshot", Source: "then"}, pod{Name: "two", Claim: "back"}}.String(), "create")
	n.Ready("two")
	want(t, "what was restored", strings.TrimSpace(may("", "exec", "two", "--", "cat", "/data/f")), "mine")
	may("", "get", "storageclasses,volumesnapshotclasses")

	volume := n.Get("pvc/data", ".spec.volumeName")
	for _, args := range [][]string{
		{"get", "localvolumes"}, {"get", "localvolume", volume}, {"delete", "localvolume", volume}, {"get", "localstores"}, {"get", "persistentvolumes"},
		{"delete", "persistentvolume", volume}, {"get", "volumesnapshotcontents"}, {"delete", "storageclass", "local"}, {"get", "csinodes"}, {"get", "volumeattachments"},
	} {
		if out, err := as("", args...); err == nil || !strings.Contains(out, "orbidden") {
			t.Errorf("member: kubectl %s: %v, want a refusal\n%s", strings.Join(args, " "), err, out)
		}
	}
	// Somebody else's volume by its handle.
	handle := c.Kubectl(t, "get", "persistentvolume", volume, "-o", "jsonpath={.spec.csi.volumeHandle}")
	for what, manifest := range map[string]string{
		"a PersistentVolume": fmt.Sprintf("apiVersion: v1\nkind: PersistentVolume\nmetadata: {name: x-%s}\nspec:\n  accessModes: [ReadWriteOnce]\n  capacity: {storage: 128Mi}\n  csi: {driver: block.hypernetes.io, volumeHandle: %s}\n", n.Name, handle),
		"a LocalVolume":      fmt.Sprintf("apiVersion: hypernetes.io/v1alpha1\nkind: LocalVolume\nmetadata: {name: x-%s}\nspec: {name: x, node: %s, sizeBytes: 1048576}\n", n.Name, c.Node),
		"a node's disk":      pod{Name: "host", Volume: "hostPath: {path: /var/lib/h8s-volumes}"}.String(),
	} {
		if out, err := as(manifest, "create"); err == nil || !strings.Contains(out, "orbidden") {
			t.Errorf("member makes %s: %v, want a refusal\n%s", what, err, out)
		}
	}
	may(pod{Name: "inline", Volume: fmt.Sprintf("csi: {driver: block.hypernetes.io, volumeAttributes: {handle: %s}}", handle)}.String(), "create")
	said(t, n, "inline", "FailedMount", `"handle"`)
	if out, err := as(pod{Name: "other", Volume: "csi: {driver: cinder.csi.openstack.org}"}.String(), "create"); err == nil || !strings.Contains(out, "the only driver a tenant names") {
		t.Errorf("member's Pod has a volume of another driver: %v\n%s", err, out)
	}
	// A volume of the Pod's own is a tenant's to have.
	may(pod{Name: "own", Volume: "csi: {driver: block.hypernetes.io, volumeAttributes: {size: 64Mi}}"}.String(), "create")
	n.Ready("own")
	may("", "exec", "own", "--", "sh", "-c", "echo x > /data/f")
}
