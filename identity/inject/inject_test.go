package inject

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
)

const good = `containers:
- name: logging-agent
  image: gcr.io/google_containers/fluentd:1.30
  volumeMounts:
  - name: varlog
    mountPath: /var/log
volumes:
- name: varlog
  emptyDir: {}
`

var want = Fragment{
	Containers: []corev1.Container{{
		Name: "logging-agent", Image: "gcr.io/google_containers/fluentd:1.30",
		VolumeMounts: []corev1.VolumeMount{{Name: "varlog", MountPath: "/var/log"}},
	}},
	Volumes: []corev1.Volume{{Name: "varlog", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}}},
}

func TestParse(t *testing.T) {
	tests := []struct {
		name, config, err string
	}{
		{name: "lists", config: good},
		{name: "one container", config: `
name: logging-agent
image: gcr.io/google_containers/fluentd:1.30
volumeMounts:
- {name: varlog, mountPath: /var/log}
volumes:
- name: varlog
  emptyDir: {}
`},
		{name: "no indentation at all", config: strings.ReplaceAll(good, "  ", "")},
		{name: "indentation of print", config: `
  containers:
    - name: logging-agent
        image: gcr.io/google_containers/fluentd:1.30
      volumeMounts:
       - name: varlog
      mountPath: /var/log
 volumes:
   - name: varlog
  emptyDir: {}
`},
		{name: "unknown field", config: strings.Replace(good, "image:", "img:", 1), err: `img`},
		{name: "no image", config: "containers:\n- name: a\n", err: "containers[0].image"},
		{name: "bad name", config: "containers:\n- name: A_b\n  image: x\n", err: `containers[0].name: "A_b"`},
		{name: "twice", config: "containers:\n- name: a\n  image: x\n- name: a\n  image: x\n", err: "given twice"},
		{name: "empty", config: "", err: "none given"},
		{name: "a list", config: "- a\n- b\n", err: "config: "},
		{name: "not YAML", config: "{{{{", err: "config: "},
		{name: "a tab", config: "containers:\n\t- name: a\n\t  foo: x\n", err: "config: "},
		{name: "too long", config: strings.Repeat("#", maxConfig+1), err: "at most 65536"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f, err := Parse(tt.config)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) || !errdefs.IsInvalidArgument(err) {
					t.Fatalf("error %v, want one that says %q", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(want, f); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestApply(t *testing.T) {
	own := corev1.PodSpec{
		Containers: []corev1.Container{{Name: "hello", Image: "hello:1"}},
		Volumes:    []corev1.Volume{{Name: "varlog", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{}}}},
	}
	spec := *own.DeepCopy()
	if err := Apply(&spec, want); err != nil {
		t.Fatal(err)
	}
	if len(spec.Containers) != 2 || spec.Containers[1].Name != "logging-agent" {
		t.Errorf("containers %v", spec.Containers)
	}
	if len(spec.Volumes) != 1 || spec.Volumes[0].ConfigMap == nil {
		t.Errorf("the Pod's own volume was not kept: %v", spec.Volumes)
	}
	once := *spec.DeepCopy()
	if err := Apply(&spec, want); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(once, spec); d != "" {
		t.Errorf("a second application changed the Pod: %s", d)
	}

	broken := Fragment{Containers: []corev1.Container{{Name: "a", Image: "b", VolumeMounts: []corev1.VolumeMount{{Name: "nowhere", MountPath: "/x"}}}}}
	spec = *own.DeepCopy()
	if err := Apply(&spec, broken); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), `"nowhere"`) {
		t.Errorf("error %v", err)
	}
	if d := cmp.Diff(own, spec); d != "" {
		t.Errorf("a failed application changed the Pod: %s", d)
	}
}

func TestNames(t *testing.T) {
	got := Names(map[string]string{
		AnnotationPrefix + "b": "true", AnnotationPrefix + "a": "true", AnnotationPrefix + "off": "false",
		AnnotationPrefix + "../x": "true", "other": "true",
	})
	if d := cmp.Diff([]string{"a", "b"}, got); d != "" {
		t.Error(d)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(good)
	f.Add(strings.ReplaceAll(good, "  ", ""))
	f.Add("volumes:\n- name: x\n")
	f.Fuzz(func(t *testing.T, config string) {
		fragment, err := Parse(config)
		if err != nil {
			return
		}
		spec := corev1.PodSpec{}
		if Apply(&spec, fragment) == nil && len(spec.Containers)+len(spec.InitContainers) == 0 {
			t.Error("accepted and nothing injected")
		}
	})
}
