package admission

import (
	"context"
	"errors"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
)

const seedVolume = "daa7b4e6-1792-462d-ad47-78e900fed429"

func TestRewriteVolumes(t *testing.T) {
	flex := func(driver string, options map[string]string) *corev1.Pod {
		return &corev1.Pod{Spec: corev1.PodSpec{Volumes: []corev1.Volume{
			{Name: "other", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}},
			{Name: "data", VolumeSource: corev1.VolumeSource{FlexVolume: &corev1.FlexVolumeSource{Driver: driver, FSType: "ext4", ReadOnly: true, Options: options}}},
		}}}
	}
	// As in the seed.
	p := flex(flexDriver, map[string]string{"cinderConfig": "/etc/kubernetes/cinder.conf", "volumeID": seedVolume})
	expect(t, rewriteVolumes(p))
	got := p.Spec.Volumes[1]
	if got.FlexVolume != nil || got.Cinder == nil || *got.Cinder != (corev1.CinderVolumeSource{VolumeID: seedVolume, FSType: "ext4", ReadOnly: true}) || got.Name != "data" || p.Spec.Volumes[0].EmptyDir == nil {
		t.Errorf("%+v", p.Spec.Volumes)
	}
	expect(t, rewriteVolumes(p)) // again
	other := flex("other/driver", nil)
	expect(t, rewriteVolumes(other))
	if other.Spec.Volumes[1].FlexVolume == nil {
		t.Error("another driver's volume was rewritten")
	}
	for at, options := range map[string]map[string]string{
		"volumeID": nil, `options[pool]`: {"volumeID": seedVolume, "pool": "x"}, `"../x"`: {"volumeID": "../x"},
	} {
		expect(t, rewriteVolumes(flex(flexDriver, options)), "spec.volumes[1].flexVolume", at)
	}
	p = flex(flexDriver, map[string]string{"volumeID": seedVolume})
	p.Spec.Volumes[1].FlexVolume.SecretRef = &corev1.LocalObjectReference{Name: "key"}
	expect(t, rewriteVolumes(p), "secretRef: key")
}

func TestCheckVolumes(t *testing.T) {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{clientgoscheme.AddToScheme, v1alpha1.AddToScheme} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	bare := blue()
	bare.Name, bare.Spec.Keystone = "bare", nil
	namespace := func(name, tenant string) client.Object {
		return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{v1alpha1.LabelTenant: tenant}}}
	}
	c := fake.NewClientBuilder().WithScheme(scheme).WithObjects(blue(), bare, namespace("web", "blue"), namespace("poor", "bare")).Build()
	const others = "11111111-1792-462d-ad47-78e900fed429"
	asked := 0
	cloud := func(_ context.Context, volume, project string) (own, known bool, err error) {
		asked++
		switch volume {
		case seedVolume:
			return project == blue().Spec.Keystone.ProjectID, true, nil
		case others:
			return false, true, nil
		case "22222222-1792-462d-ad47-78e900fed429":
			return false, false, nil
		}
		return false, false, errors.New("no answer")
	}
	hyper, runc := "hyper", "runc"
	for name, x := range map[string]struct {
		namespace, volume string
		class             *string
		none              bool
		says              []string
		warning           string
	}{
		"own":             {namespace: "web", volume: seedVolume, class: &hyper},
		"another's":       {namespace: "web", volume: others, class: &hyper, says: []string{"spec.volumes[0].cinder.volumeID: " + others, "tenant blue"}},
		"none":            {namespace: "web", volume: "22222222-1792-462d-ad47-78e900fed429", warning: "no such volume"},
		"no answer":       {namespace: "web", volume: "33333333-1792-462d-ad47-78e900fed429"},
		"no ID":           {namespace: "web", volume: "my-volume", says: []string{`"my-volume"`}},
		"no machine":      {namespace: "web", volume: seedVolume, class: &runc, says: []string{"RuntimeClass runc", "use RuntimeClass hyper"}},
		"no project":      {namespace: "poor", volume: seedVolume, says: []string{"tenant bare has no OpenStack project", "spec.keystone.projectID"}},
		"no cloud":        {namespace: "web", volume: seedVolume, none: true, warning: "no OpenStack"},
		"nothing to ask":  {namespace: "web"},
		"tenant has gone": {namespace: "gone", volume: seedVolume},
	} {
		t.Run(name, func(t *testing.T) {
			h := &decider{read: reader{cached: c, live: c}, Options: Options{VolumeOf: cloud}}
			if x.none {
				h.VolumeOf = nil
			}
			pod := &corev1.Pod{Spec: corev1.PodSpec{RuntimeClassName: x.class}}
			if x.volume != "" {
				pod.Spec.Volumes = []corev1.Volume{{Name: "data", VolumeSource: corev1.VolumeSource{Cinder: &corev1.CinderVolumeSource{VolumeID: x.volume}}}}
			}
			warnings, err := h.checkVolumes(t.Context(), x.namespace, pod)
			expect(t, err, x.says...)
			if got := strings.Join(warnings, ""); (x.warning == "") != (got == "") || !strings.Contains(got, x.warning) {
				t.Errorf("warnings %q, want %q", got, x.warning)
			}
		})
	}
}
