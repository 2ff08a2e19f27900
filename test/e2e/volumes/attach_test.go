package volumes

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/hypernetes/hypernetes/test/artifacts"
	"github.com/hypernetes/hypernetes/test/e2e/testcloud"
	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// BenchmarkAttach is how long a volume takes from its claim to the first byte in a Pod, and
// back, step by step; and what none, one and eight volumes cost a Pod's start. The volumes
// are local ones, or Cinder's if $H8S_E2E_PROVIDER is cinder, on two nodes then.
//
// Times between objects are a watch's, of steps on the node the kubelet's own metrics, and
// the first byte's is in the container's log. The first round is not counted.
//
//	scripts/e2e.sh -run '^$' -bench Attach -benchtime 5x ./test/e2e/volumes
//	H8S_E2E_PROVIDER=cinder H8S_OPENSTACK=/var/tmp/h8s-openstack scripts/e2e.sh -run '^$' -bench Attach -benchtime 5x ./test/e2e/volumes
func BenchmarkAttach(b *testing.B) {
	a := newAttaching(b)
	a.boots(false)
	a.life(false)
	for b.Loop() {
		a.life(true)
		a.boots(true)
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(median(a.took[firstByte]), "s/claim-to-byte")
	b.ReportMetric(median(a.took[nextByte]), "s/delete-to-byte")
	report := a.report(time.Now())
	path := filepath.Join(artifacts.Dir(), "bench", "attach-"+a.class+".md")
	err := os.MkdirAll(filepath.Dir(path), 0o755)
	if err == nil {
		err = os.WriteFile(path, []byte(report), 0o644)
	}
	if err != nil {
		b.Fatal(err)
	}
	b.Logf("%s", report)
}

// manyVolumes are as many as a Pod of this benchmark has at most.
const manyVolumes = 8

// Steps, in the order of the report.
const (
	bound      = "claim seen → bound (scheduler, provisioner, driver)"
	attached   = "bound → VolumeAttachment attached (attacher, driver)"
	stage      = "… stage on the node (CSI call)"
	publish    = "… publish on the node (CSI call)"
	sandbox    = "… `RunPodSandbox` with the volume's disk"
	firstByte  = "claim seen → first byte written and synced"
	gone       = "Pod deleted → gone"
	detached   = "Pod deleted → VolumeAttachment gone"
	nextByte   = "Pod deleted → the next Pod's first byte"
	nextOnNode = "… of it `RunPodSandbox`"
)

func steps() []string {
	all := []string{bound, attached, stage, publish, sandbox, firstByte, gone, detached, nextByte, nextOnNode}
	for _, n := range []int{0, 1, manyVolumes} {
		all = append(all, bootStep(n), readyStep(n))
	}
	return all
}

func bootStep(volumes int) string {
	return fmt.Sprintf("Pod with used volumes, %d of them: `RunPodSandbox`", volumes)
}

func readyStep(volumes int) string {
	return fmt.Sprintf("… such a Pod, %d: seen → first byte", volumes)
}

// attaching is the benchmark's world.
type attaching struct {
	b       *testing.B
	n       *testcluster.Namespace
	class   string
	nodes   []string
	attach  bool // whether there are VolumeAttachments
	claims  *testcluster.Session
	pods    *testcluster.Session
	objects *testcluster.Session // VolumeAttachments
	rounds  int
	took    map[string][]float64
}

func newAttaching(b *testing.B) *attaching {
	b.Helper()
	a := &attaching{b: b, class: "local", took: map[string][]float64{}}
	if os.Getenv("H8S_E2E_PROVIDER") == "cinder" {
		c := testcloud.Up(b, 2)
		tn := c.TenantOf(b, c.Project(b), "--cidr", "192.168.9.0/24")
		tn.Network("own", "10.20.0.0/24")
		a.n, a.class, a.nodes, a.attach = tn.Namespace("n", "own"), "cinder", c.Nodes, true
	} else {
		c := testcluster.Up(b)
		a.n, a.nodes = c.Namespace(b), []string{c.Node}
	}
	a.claims = a.n.Start("get", "pvc", "--watch", "-o", `jsonpath={.metadata.name} is {.status.phase};{"\n"}`)
	a.pods = a.n.Start("get", "pods", "--watch", "-o", `jsonpath={.metadata.name} is {.status.phase};{"\n"}`)
	if a.attach {
		a.objects = a.n.Start("get", "volumeattachments", "--watch", "-o", `jsonpath={.spec.source.persistentVolumeName} is {.status.attached};{"\n"}`)
	}
	var claims strings.Builder
	for i := range manyVolumes {
		claims.WriteString(claim{Name: fmt.Sprint("many-", i), Size: "1Gi", Class: a.class}.String())
	}
	apply(b, a.n, claims.String())
	return a
}

// seen returns when a watch first says something.
func seen(s *testcluster.Session, text string) time.Time {
	s.Expect(`(?m)^` + regexp.QuoteMeta(text))
	return time.Now()
}

func (a *attaching) add(counts bool, step string, d float64) {
	if counts {
		a.took[step] = append(a.took[step], d)
	}
}

// writer is a Pod that writes to its claims, or to its own disk if it has none, and says so.
func (a *attaching) writer(name, node string, claims ...string) string {
	var mounts, volumes strings.Builder
	script := ""
	for i, c := range claims {
		fmt.Fprintf(&mounts, "{name: v%d, mountPath: /data/%d}, ", i, i)
		fmt.Fprintf(&volumes, "{name: v%d, persistentVolumeClaim: {claimName: %s}}, ", i, c)
		script += fmt.Sprintf("/testbox write /data/%d/f 4096 >/dev/null && ", i)
	}
	return fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  terminationGracePeriodSeconds: 1
  nodeSelector: {kubernetes.io/hostname: %q}
  containers:
  - {name: main, image: "h8s.local/testbox:1", command: [sh, -c, %q], volumeMounts: [%s]}
  volumes: [%s]
---
`, name, node, script+"echo written; exec sleep 100000", &mounts, &volumes)
}

// written waits until a Pod has, and returns when that was in its log.
func (a *attaching) written(pod string) time.Time {
	a.b.Helper()
	seen(a.pods, pod+" is Running;")
	var at time.Time
	a.n.Until("a line from "+pod, testcluster.Patience, func() bool {
		out, _ := a.n.Try("logs", pod, "--timestamps")
		stamp, line, _ := strings.Cut(strings.TrimSpace(out), " ")
		var err error
		at, err = time.Parse(time.RFC3339Nano, stamp)
		return err == nil && line == "written"
	})
	return at
}

// life is a claim's: made with a Pod, and used by a second one, on another node if there is
// one.
func (a *attaching) life(counts bool) {
	a.b.Helper()
	add := func(step string, d time.Duration) { a.add(counts, step, d.Seconds()) }
	first, second := a.nodes[0], a.nodes[len(a.nodes)-1]
	data, one, two := fmt.Sprint("data-", a.rounds), fmt.Sprint("one-", a.rounds), fmt.Sprint("two-", a.rounds)
	a.rounds++
	before := a.kubelet(first)
	apply(a.b, a.n, claim{Name: data, Size: "1Gi", Class: a.class}.String()+a.writer(one, first, data))
	made := seen(a.claims, data+" is ")
	ready := seen(a.claims, data+" is Bound;")
	add(bound, ready.Sub(made))
	attachment := ""
	if a.attach {
		volume := a.n.Get("pvc/"+data, ".spec.volumeName")
		add(attached, seen(a.objects, volume+" is true;").Sub(ready))
		attachment = strings.TrimSpace(a.n.Kubectl("get", "volumeattachments", "-o",
			fmt.Sprintf(`jsonpath={.items[?(@.spec.source.persistentVolumeName==%q)].metadata.name}`, volume)))
	}
	add(firstByte, a.written(one).Sub(made))
	after := a.kubelet(first)
	for step, metric := range map[string]string{stage: "NodeStageVolume", publish: "NodePublishVolume", sandbox: sandboxMetric} {
		a.add(counts, step, after.since(before, metric))
	}

	podEnds := a.n.Start("wait", "--for=delete", "pod/"+one, "--timeout=180s")
	var attachmentEnds *testcluster.Session
	if attachment != "" {
		attachmentEnds = a.n.Start("wait", "--for=delete", "volumeattachment/"+attachment, "--timeout=180s")
	}
	before = a.kubelet(second) // which takes longer than those need to begin
	deleted := time.Now()
	a.n.Kubectl("delete", "pod", one, "--wait=false")
	apply(a.b, a.n, a.writer(two, second, data))
	podEnds.Exit()
	add(gone, time.Since(deleted))
	if attachmentEnds != nil {
		attachmentEnds.Exit()
		add(detached, time.Since(deleted))
	}
	add(nextByte, a.written(two).Sub(deleted))
	a.add(counts, nextOnNode, a.kubelet(second).since(before, sandboxMetric))
	a.n.Kubectl("delete", "pod/"+two, "pvc/"+data, "--timeout=180s")
}

// boots starts Pods with none, one and many volumes that have been used before, in turns.
func (a *attaching) boots(counts bool) {
	a.b.Helper()
	for _, volumes := range []int{manyVolumes, 1, 0} { // many first: it binds them
		var claims []string
		for i := range volumes {
			claims = append(claims, fmt.Sprint("many-", i))
		}
		name := fmt.Sprintf("boot-%d-%d", volumes, a.rounds)
		before := a.kubelet(a.nodes[0])
		apply(a.b, a.n, a.writer(name, a.nodes[0], claims...))
		made := seen(a.pods, name+" is ")
		a.add(counts, readyStep(volumes), a.written(name).Sub(made).Seconds())
		a.add(counts, bootStep(volumes), a.kubelet(a.nodes[0]).since(before, sandboxMetric))
		stop(a.n, name)
	}
	a.rounds++
}

// sandboxMetric is of the kubelet's metrics, as are the names of CSI calls.
const sandboxMetric = "kubelet_run_podsandbox_duration_seconds"

// kubeletFigures are sums and counts of durations by CSI call or metric.
type kubeletFigures map[string][2]float64

var kubeletLine = regexp.MustCompile(`(?m)^(?:(kubelet_run_podsandbox_duration_seconds)|csi_operations_seconds)_(sum|count)(\{[^}]*\})? (\S+)$`)
var csiMethod = regexp.MustCompile(`method_name="/csi\.v1\.Node/(\w+)"`)

// kubelet asks a node's for its metrics.
func (a *attaching) kubelet(node string) kubeletFigures {
	a.b.Helper()
	return parseKubelet(a.n.Cluster.Kubectl(a.b, "get", "--raw", "/api/v1/nodes/"+node+"/proxy/metrics"))
}

func parseKubelet(text string) kubeletFigures {
	out := kubeletFigures{}
	for _, m := range kubeletLine.FindAllStringSubmatch(text, -1) {
		name := m[1]
		if call := csiMethod.FindStringSubmatch(m[3]); name == "" && call != nil && strings.Contains(m[3], `grpc_status_code="OK"`) {
			name = call[1]
		}
		v, err := strconv.ParseFloat(m[4], 64)
		if name == "" || err != nil {
			continue
		}
		f := out[name]
		if m[2] == "sum" {
			f[0] += v
		} else {
			f[1] += v
		}
		out[name] = f
	}
	return out
}

// since is how long it took per call since then; NaN without any.
func (f kubeletFigures) since(before kubeletFigures, name string) float64 {
	return (f[name][0] - before[name][0]) / (f[name][1] - before[name][1])
}

func median(s []float64) float64 {
	if len(s) == 0 {
		return math.NaN()
	}
	return slices.Sorted(slices.Values(s))[len(s)/2]
}

// report is a table in Markdown.
func (a *attaching) report(at time.Time) string {
	var out strings.Builder
	fmt.Fprintf(&out, "Class `%s`, %d nodes, %s.\n\n| step | seconds: p50 (most) | of |\n|---|---|---|\n", a.class, len(a.nodes), at.UTC().Format("2006-01-02 15:04 MST"))
	for _, step := range steps() {
		all := slices.DeleteFunc(slices.Clone(a.took[step]), math.IsNaN)
		if len(all) > 0 {
			fmt.Fprintf(&out, "| %s | %.2f (%.2f) | %d |\n", step, median(all), slices.Max(all), len(all))
		}
	}
	return out.String()
}

func TestAttachReport(t *testing.T) {
	const metrics = `# TYPE csi_operations_seconds histogram
csi_operations_seconds_bucket{driver_name="d",grpc_status_code="OK",method_name="/csi.v1.Node/NodeStageVolume",migrated="false",le="0.1"} 1
csi_operations_seconds_sum{driver_name="d",grpc_status_code="OK",method_name="/csi.v1.Node/NodeStageVolume",migrated="false"} %v
csi_operations_seconds_count{driver_name="d",grpc_status_code="OK",method_name="/csi.v1.Node/NodeStageVolume",migrated="false"} %d
csi_operations_seconds_sum{driver_name="d",grpc_status_code="Internal",method_name="/csi.v1.Node/NodeStageVolume",migrated="false"} 100
kubelet_run_podsandbox_duration_seconds_sum{runtime_handler=""} 1.5
kubelet_run_podsandbox_duration_seconds_count{runtime_handler=""} 1
`
	before, after := parseKubelet(fmt.Sprintf(metrics, 0.5, 1)), parseKubelet(fmt.Sprintf(metrics, 1.25, 3))
	want(t, "a stage", after.since(before, "NodeStageVolume"), 0.375)
	if v := after.since(before, sandboxMetric); !math.IsNaN(v) {
		t.Errorf("a sandbox that did not start took %v", v)
	}
	want(t, "the first sandbox", after.since(nil, sandboxMetric), 1.5)
	a := attaching{class: "local", nodes: []string{"n"}, took: map[string][]float64{stage: {3, 1, 2}, publish: {math.NaN()}, bootStep(8): {4}}}
	want(t, "report", a.report(time.Unix(0, 0)), "Class `local`, 1 nodes, 1970-01-01 00:00 UTC.\n\n| step | seconds: p50 (most) | of |\n|---|---|---|\n"+
		"| "+stage+" | 2.00 (3.00) | 3 |\n| "+bootStep(8)+" | 4.00 (4.00) | 1 |\n")
}
