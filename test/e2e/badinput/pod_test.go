package badinput

import (
	"encoding/json"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

const (
	busybox = "h8s.local/busybox:1"
	// told is how long it may take until a Pod's events say what is wrong.
	told = 90 * time.Second
	// cleaned is how long it may take until a deleted Pod has left nothing.
	cleaned = 120 * time.Second
)

// pod is the manifest of a Pod with one container that would run for an hour.
func pod(name, image string, change func(spec, container map[string]any)) map[string]any {
	container := map[string]any{"name": "main", "image": image, "imagePullPolicy": "IfNotPresent", "command": []string{"sleep", "3600"}}
	spec := map[string]any{"terminationGracePeriodSeconds": 1, "containers": []any{container}}
	if change != nil {
		change(spec, container)
	}
	return map[string]any{
		"apiVersion": "v1", "kind": "Pod", "metadata": map[string]any{"name": name}, "spec": spec,
	}
}

// apply creates an object.
func apply(t *testing.T, n *testcluster.Namespace, object map[string]any) {
	t.Helper()
	b, err := json.Marshal(object)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "manifest.json")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	n.Apply(path)
}

// event waits until an event of a Pod matches pattern and returns it.
func event(t *testing.T, n *testcluster.Namespace, pod, pattern string) string {
	t.Helper()
	re := regexp.MustCompile(pattern)
	var found, last string
	t.Cleanup(func() {
		if found == "" {
			t.Logf("events of pod %s, of which none matches %q:\n%s", pod, pattern, last)
		}
	})
	n.Until("an event of pod "+pod+" that matches "+pattern, told, func() bool {
		out, err := n.Try("get", "events", "--field-selector=involvedObject.name="+pod, "-o", `jsonpath={range .items[*]}{.reason}: {.message}{"\n"}{end}`)
		if err != nil {
			return false
		}
		last = out
		for line := range strings.Lines(out) {
			if re.MatchString(line) {
				found = strings.TrimSpace(line)
			}
		}
		return found != ""
	})
	t.Logf("pod %s: %s", pod, found)
	return found
}

// quiet takes stock of a node that has no Pods but its own, all of them running.
func quiet(t *testing.T, c *testcluster.Cluster) testcluster.Inventory {
	t.Helper()
	c.Kubectl(t, "-n", "kube-system", "wait", "deployment", "--all", "--for=condition=Available", "--timeout=4m")
	return c.Inventory(t)
}

// without deletes all Pods and checks that nothing of them is left.
func without(t *testing.T, n *testcluster.Namespace, before testcluster.Inventory) {
	t.Helper()
	n.Kubectl("delete", "pod", "--all", "--wait", "--timeout=2m")
	n.NothingLeft(t, before, cleaned)
}

func limit(memory string) func(spec, container map[string]any) {
	return func(_, container map[string]any) {
		container["resources"] = map[string]any{
			"limits": map[string]any{"memory": memory}, "requests": map[string]any{"memory": "1Mi"},
		}
	}
}

// TestPods: what is wrong with a Pod is said in an event, with what to do about it,
// and a Pod that cannot start leaves nothing.
func TestPods(t *testing.T) {
	c := testcluster.Up(t)
	before := quiet(t, c)
	n := c.Namespace(t)
	for _, tc := range []struct {
		name, image string
		change      func(spec, container map[string]any)
		want        string
	}{
		{"unknown-image", "h8s.local/nonesuch:1", nil, `^Failed: Failed to pull image "h8s.local/nonesuch:1": .*`},
		{"much-memory", busybox, limit("4Ti"), `^FailedCreatePodSandBox: .*memory.*(host|machine|node).*(lower|less|at most)`},
		{"host-path", busybox, func(spec, container map[string]any) {
			spec["volumes"] = []any{map[string]any{"name": "etc", "hostPath": map[string]any{"path": "/etc"}}}
			container["volumeMounts"] = []any{map[string]any{"name": "etc", "mountPath": "/host"}}
		}, `^Failed: .*(hostPath|host path|host directory).*(emptyDir|runc|RuntimeClass|use)`},
		{"no-such-command", busybox, func(_, container map[string]any) { container["command"] = []string{"/nonesuch"} },
			`^Failed: .*/nonesuch.*(no such file|not found)`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := n.For(t)
			apply(t, n, pod(tc.name, tc.image, tc.change))
			event(t, n, tc.name, tc.want)
			n.Kubectl("delete", "pod", tc.name, "--wait=false")
		})
	}
	t.Run("little-memory", func(t *testing.T) { littleMemory(t, n.For(t)) })
	without(t, n, before)
}

// littleMemory: a limit below what a VM needs still starts one, as the limit is the
// container's; who exceeds it is killed and told so, and nobody else in the Pod.
func littleMemory(t *testing.T, n *testcluster.Namespace) {
	apply(t, n, pod("greedy", busybox, func(spec, container map[string]any) {
		spec["restartPolicy"] = "Never"
		limit("8Mi")(spec, container)
		modest := maps.Clone(container)
		modest["name"] = "modest"
		container["command"] = []string{"sh", "-c", "x=$(head -c 40000000 /dev/zero | tr '\\0' x); echo survived"}
		spec["containers"] = []any{container, modest}
	}))
	end := n.Ended("greedy", "main")
	if end.Reason != "OOMKilled" || end.ExitCode != 137 {
		t.Errorf("a container over its memory limit ended with %+v, want OOMKilled and 137", end)
	}
	if other := n.Pod("greedy").Container("modest"); other.State.Running == nil || other.RestartCount != 0 {
		t.Errorf("the Pod's other container: %+v, want it running", other)
	}
}

// TestCorruptLayer damages the layers of images of its own in the node's store, as a
// failing disk does. Superblocks are read by containerd already; what it overlooks the
// shim finds, before the guest's kernel has to.
func TestCorruptLayer(t *testing.T) {
	c := testcluster.Up(t)
	before := quiet(t, c)
	n := c.Namespace(t)
	for _, tc := range []struct {
		name   string
		damage func(file string) error
		want   string
	}{
		{"overwritten", overwrite, `^Failed: .*invalid super block: invalid magic number`},
		{"truncated", func(file string) error { return os.Truncate(file, 8192) }, `^Failed: .*layer .*is cut off at 8192: remove the image.*pull it again`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := n.For(t)
			tag, layers := ownImage(t, c, tc.name)
			for _, layer := range layers {
				if err := tc.damage(layer); err != nil {
					t.Fatal(err)
				}
			}
			apply(t, n, pod(tc.name, tag, nil))
			event(t, n, tc.name, tc.want)
			n.Kubectl("delete", "pod", tc.name, "--wait", "--timeout=2m")
		})
	}
	without(t, n, before)
}

func overwrite(file string) error {
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(make([]byte, 4096), 0)
	return errors.Join(err, f.Close())
}

// TestCorruptArchive: an archive whose blob is not what its name says is refused.
func TestCorruptArchive(t *testing.T) {
	c := testcluster.Up(t)
	tag := "h8s.local/badarchive:1"
	archive := uniqueArchive(t, tag)
	b, err := os.ReadFile(archive)
	if err != nil {
		t.Fatal(err)
	}
	// The middle of the file is in its only layer.
	copy(b[len(b)/2:], "this was not in the layer")
	if err := os.WriteFile(archive, b, 0o600); err != nil {
		t.Fatal(err)
	}
	r := run(t, nil, "h8s", "image", "load", "--name", c.Node, archive)
	refused(t, r, 1, `digest|checksum|mismatch|damaged`)
	t.Logf("h8s image load: %s", r.stderr)
	if list := run(t, nil, "h8s", "image", "list", "--name", c.Node); strings.Contains(list.stdout, tag) {
		t.Errorf("the refused image is listed:\n%s", list.stdout)
	}
}
