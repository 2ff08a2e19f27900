package usage

import (
	"maps"
	"testing"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	"github.com/hypernetes/hypernetes/volume/backend/cinder"
)

const driver = "cinder.csi.openstack.org"

func api(t *testing.T, objects ...client.Object) API {
	scheme := runtime.NewScheme()
	if err := clientgoscheme.AddToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	return API{fake.NewClientBuilder().WithScheme(scheme).WithObjects(objects...).Build(), driver}
}

func node(name string, taint string, volumes ...string) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}
	for _, v := range volumes {
		n.Status.VolumesInUse = append(n.Status.VolumesInUse, corev1.UniqueVolumeName(v))
	}
	if taint != "" {
		n.Spec.Taints = []corev1.Taint{{Key: taint}}
	}
	n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeHostName, Address: name}, {Type: corev1.NodeInternalIP, Address: "10.0.0.1"}}
	return n
}

func attachment(name, node, off string, source storagev1.VolumeAttachmentSource) *storagev1.VolumeAttachment {
	va := &storagev1.VolumeAttachment{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: storagev1.VolumeAttachmentSpec{Attacher: driver, NodeName: node, Source: source}}
	if off != "" {
		va.Annotations = map[string]string{AnnotationOff: off}
	}
	return va
}

func csi(driver, handle string) corev1.PersistentVolumeSource {
	return corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{Driver: driver, VolumeHandle: handle}}
}

func inline(handle string) storagev1.VolumeAttachmentSource {
	return storagev1.VolumeAttachmentSource{InlineVolumeSpec: &corev1.PersistentVolumeSpec{PersistentVolumeSource: csi(driver, handle)}}
}

func of(pv string) storagev1.VolumeAttachmentSource {
	return storagev1.VolumeAttachmentSource{PersistentVolumeName: &pv}
}

func TestUse(t *testing.T) {
	const mine = "kubernetes.io/csi/" + driver + "^v"
	a := api(t, node("idle", "", "kubernetes.io/csi/other^v", mine+"2"), node("busy", "", mine), node("off", corev1.TaintNodeOutOfService, mine), node("idle-off", corev1.TaintNodeOutOfService),
		attachment("a", "gone-off", "true", inline("v")), attachment("b", "gone", "false", inline("v")), attachment("c", "gone", "true", inline("w")),
		attachment("d", "busy-off", "true", of("pv")), node("busy-off", "", mine),
		&corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: "pv"}, Spec: corev1.PersistentVolumeSpec{PersistentVolumeSource: csi(driver, "v")}})
	for name, want := range map[string]cinder.Use{
		"idle": cinder.Released, "busy": cinder.InUse, "off": cinder.Off, "idle-off": cinder.Released, "gone-off": cinder.Off, "gone": cinder.InUse, "busy-off": cinder.Off,
	} {
		if got, err := a.Use(t.Context(), "v", name); err != nil || got != want {
			t.Errorf("%s: %v, want %v: %v", name, got, want, err)
		}
	}
	for name, want := range map[string]string{"idle": "10.0.0.1", "gone": ""} {
		if got, err := a.Address(t.Context(), name); err != nil || got != want {
			t.Errorf("%s: %q, want %q: %v", name, got, want, err)
		}
	}
}

func TestWanted(t *testing.T) {
	other := attachment("other", "n", "", of("nowhere"))
	other.Spec.Attacher = "other"
	pv := func(name string, source corev1.PersistentVolumeSource) *corev1.PersistentVolume {
		return &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.PersistentVolumeSpec{PersistentVolumeSource: source}}
	}
	objects := []client.Object{
		other, attachment("a", "n1", "", inline("inline")), attachment("b", "n2", "", of("csi")), attachment("c", "n3", "", of("old")),
		pv("csi", csi(driver, "claimed")), pv("old", corev1.PersistentVolumeSource{Cinder: &corev1.CinderPersistentVolumeSource{VolumeID: "translated"}}),
	}
	got, err := api(t, objects...).Wanted(t.Context())
	want := map[cinder.Pair]bool{{Volume: "inline", Node: "n1"}: true, {Volume: "claimed", Node: "n2"}: true, {Volume: "translated", Node: "n3"}: true}
	if err != nil || !maps.Equal(got, want) {
		t.Errorf("%v %v", got, err)
	}
	for _, source := range []storagev1.VolumeAttachmentSource{of("lost"), of("elsewhere"), {}} {
		more := append(objects, attachment("x", "n", "", source), pv("elsewhere", csi("another", "v")))
		if _, err := api(t, more...).Wanted(t.Context()); !errdefs.IsUnavailable(err) {
			t.Errorf("%+v: %v", source, err)
		}
	}
}
