package volume

import (
	"path"
	"strings"
	"testing"
)

const testPod = "/var/lib/kubelet/pods/0a1b"

func TestClassify(t *testing.T) {
	const cri = "/var/lib/containerd/io.containerd.grpc.v1.cri/sandboxes/abc1"
	for _, c := range []struct {
		src, dst string
		want     source
	}{
		{testPod + "/volumes/kubernetes.io~configmap/cm", "/cm", source{kind: kindFiles, plugin: "kubernetes.io~configmap", volume: "cm"}},
		{testPod + "/volumes/kubernetes.io~projected/kube-api-access-x7", "/x", source{kind: kindFiles, plugin: "kubernetes.io~projected", volume: "kube-api-access-x7"}},
		{testPod + "/volumes/kubernetes.io~empty-dir/tmp", "/tmp", source{kind: kindEmptyDir, plugin: emptyDirPlugin, volume: "tmp"}},
		{testPod + "/volumes/kubernetes.io~csi/pvc-1/mount", "/data", source{kind: kindUnknown}},
		{testPod + "/volumes/kubernetes.io~configmap/cm/..data", "/cm", source{kind: kindUnknown}},
		{testPod + "/etc-hosts", "/etc/hosts", source{kind: kindHosts}},
		{testPod + "/containers/app/1f2e3d4c", "/dev/termination-log", source{kind: kindTermination, container: "app", id: "1f2e3d4c"}},
		{testPod + "/volume-subpaths/data/app/0", "/d", source{kind: kindSubPath, volume: "data", container: "app", id: "0"}},
		{testPod + "/volume-subpaths/data/../../etc-hosts", "/d", source{}},
		{testPod, "/pod", source{}},
		{testPod + "x/etc-hosts", "/etc/hosts", source{}},
		{"/var/lib/kubelet/pods/other/etc-hosts", "/etc/hosts", source{}},
		{"/etc", "/host", source{}},
		{"relative", "/host", source{}},
		{cri + "/hostname", "/etc/hostname", source{kind: kindCRIFile, volume: "hostname"}},
		{cri + "/hostname", "/etc/shadow", source{}},
		{cri + "/shm", "/dev/shm", source{kind: kindShm}},
		{"/dev/shm", "/dev/shm", source{kind: kindShm}},
		{"/dev/sda", "/dev/sda", source{}},
	} {
		got := classify(testPod, c.src, c.dst)
		got.rel = ""
		if got != c.want {
			t.Errorf("classify(%q, %q) = %+v, want %+v", c.src, c.dst, got, c.want)
		}
	}
}

func TestGuestName(t *testing.T) {
	long := strings.Repeat("a", 63)
	name := guestName("sub", long, long, "0")
	if len(name) > maxName || name == guestName("sub", long, long, "1") {
		t.Errorf("name %q", name)
	}
	if got := guestName("vol", "cm"); got != "vol.cm" {
		t.Errorf("name %q", got)
	}
	// A dot joins because no container's or volume's name of a Pod has one.
	if guestName("sub", "a", "b-0") == guestName("sub", "a-b", "0") {
		t.Error("names collide")
	}
}

func FuzzClassify(f *testing.F) {
	f.Add("volumes/kubernetes.io~secret/s", "/s")
	f.Add("volume-subpaths/a/b/0", "/s")
	f.Add("volumes/kubernetes.io~empty-dir/..", "/s")
	f.Fuzz(func(t *testing.T, rel, dst string) {
		for _, src := range []string{rel, testPod + "/" + rel} {
			s := classify(testPod, src, dst)
			if s.kind == kindForeign || s.kind == kindShm || s.kind == kindCRIFile {
				continue
			}
			if path.Join(testPod, s.rel) != src || strings.Contains(s.rel, "..") && s.kind != kindUnknown && path.Clean(s.rel) != s.rel {
				t.Errorf("%q escapes: %+v", src, s)
			}
			if n := guestName("x", s.volume, s.container, s.id); len(n) > maxName || strings.ContainsAny(n, "/\x00") {
				t.Errorf("%q gives name %q", src, n)
			}
		}
	})
}
