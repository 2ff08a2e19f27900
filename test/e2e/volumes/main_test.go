package volumes

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"text/template"

	"github.com/hypernetes/hypernetes/test/e2e/testcloud"
	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

func TestMain(m *testing.M) { testcluster.Main(m, testcloud.Down) }

// want fails the test if what is not as it should be.
func want[T comparable](t testing.TB, what string, got, wanted T) {
	t.Helper()
	if got != wanted {
		t.Errorf("%s: got %v, want %v", what, got, wanted)
	}
}

// apply applies a manifest.
func apply(t testing.TB, n *testcluster.Namespace, manifest string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "manifest.yaml")
	if err := os.WriteFile(path, []byte(manifest), 0o600); err != nil {
		t.Fatal(err)
	}
	n.Apply(path)
}

// claim is a PersistentVolumeClaim. Fields that are empty are left out.
type claim struct {
	Name, Size, Class, Mode, Access, SourceKind, Source string
	// Attributes is a VolumeAttributesClass.
	Attributes string
}

var claimTemplate = template.Must(template.New("claim").Parse(`
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: {{ .Name }}}
spec:
  accessModes: [{{ or .Access "ReadWriteOnce" }}]
  resources: {requests: {storage: {{ or .Size "128Mi" }}}}
  {{ with .Class }}storageClassName: {{ . }}{{ end }}
  {{ with .Attributes }}volumeAttributesClassName: {{ . }}{{ end }}
  {{ with .Mode }}volumeMode: {{ . }}{{ end }}
  {{ if eq .SourceKind "VolumeSnapshot" }}dataSource: {apiGroup: snapshot.storage.k8s.io, kind: VolumeSnapshot, name: {{ .Source }}}{{ end }}
  {{ if eq .SourceKind "PersistentVolumeClaim" }}dataSource: {kind: PersistentVolumeClaim, name: {{ .Source }}}{{ end }}
---
`))

// pod is a Pod of one container, c, that sleeps, unless it says otherwise.
type pod struct {
	Name, Claim string
	// Command instead of sleeping; the Pod is not restarted then.
	Command string
	// Mount is the container's mount without its name and path, such as "readOnly: true".
	Mount string
	// Security is the Pod's securityContext.
	Security string
	// Block gives the volume as /dev/vol instead of at /data.
	Block bool
	// More are further containers.
	More string
	// Volume instead of the claim.
	Volume string
}

var podTemplate = template.Must(template.New("pod").Parse(`
apiVersion: v1
kind: Pod
metadata: {name: {{ .Name }}}
spec:
  terminationGracePeriodSeconds: 2
  restartPolicy: {{ if .Command }}Never{{ else }}Always{{ end }}
  {{ with .Security }}securityContext: {{ . }}{{ end }}
  containers:
  - name: c
    image: h8s.local/testbox:1
    command: [sh, -c, {{ printf "%q" (or .Command "exec sleep 100000") }}]
    {{ if .Block }}volumeDevices: [{name: v, devicePath: /dev/vol}]
    {{ else }}volumeMounts: [{name: v, mountPath: /data{{ with .Mount }}, {{ . }}{{ end }}}]{{ end }}
  {{ .More }}
  volumes: [{name: v, {{ or .Volume (printf "persistentVolumeClaim: {claimName: %s}" .Claim) }}}]
---
`))

func (c claim) String() string { return render(claimTemplate, c) }
func (p pod) String() string   { return render(podTemplate, p) }

func render(t *template.Template, v any) string {
	var b bytes.Buffer
	if err := t.Execute(&b, v); err != nil {
		panic(err) // a bug in this test
	}
	return b.String()
}

// start applies objects and waits until the named Pods are ready.
func start(t testing.TB, n *testcluster.Namespace, objects fmt.Stringer, pods ...string) {
	t.Helper()
	apply(t, n, objects.String())
	n.Ready(pods...)
}

// all is several objects.
type all []fmt.Stringer

func (a all) String() string {
	var b strings.Builder
	for _, o := range a {
		b.WriteString(o.String())
	}
	return b.String()
}

// stop deletes Pods and waits until they are gone.
func stop(n *testcluster.Namespace, pods ...string) {
	n.Kubectl(append([]string{"delete", "pod", "--wait=true"}, pods...)...)
}

// said waits for an event about an object that has all of the words, and fails the test
// with what there was.
func said(t testing.TB, n *testcluster.Namespace, object string, words ...string) {
	t.Helper()
	var last string
	n.Until(fmt.Sprintf("an event about %s with %q", object, words), testcluster.Patience, func() bool {
		last = n.Kubectl("get", "events", "--field-selector", "involvedObject.name="+object, "-o", `jsonpath={range .items[*]}{.reason}: {.message}{"\n"}{end}`)
		for line := range strings.Lines(last) {
			missing := false
			for _, w := range words {
				missing = missing || !strings.Contains(line, w)
			}
			if !missing {
				t.Logf("%s: %s", object, strings.TrimSpace(line))
				return true
			}
		}
		return false
	})
}
