package volume

import (
	"errors"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/mountinfo"
)

const golden = `22 27 0:21 / /proc rw,nosuid shared:13 - proc proc rw
30 22 254:1 / / rw,relatime shared:1 - ext4 /dev/vda rw
40 30 254:1 /var/lib/h8s/n\040one/kubelet /var/lib/kubelet rw,relatime shared:1 - ext4 /dev/vda rw
50 40 0:60 / /var/lib/kubelet/pods/u/volumes/kubernetes.io~empty-dir/mem rw,relatime shared:5 - tmpfs tmpfs rw,size=65536k,noswap
51 40 254:1 /var/lib/h8s/n\040one/kubelet/pods/u/volumes/kubernetes.io~empty-dir/disk/a/b\134c /var/lib/kubelet/pods/u/volume-subpaths/disk/app/0 rw - ext4 /dev/vda rw
52 40 0:60 /deep /var/lib/kubelet/pods/u/volume-subpaths/mem/app/1 rw - tmpfs tmpfs rw,size=65536k
53 40 254:1 /var/lib/h8s/n\040one/kubelet/pods/u/volumes/kubernetes.io~empty-dir/disk/x//deleted /var/lib/kubelet/pods/u/volume-subpaths/disk/app/2 rw - ext4 /dev/vda rw
54 40 254:1 /etc /var/lib/kubelet/pods/u/volume-subpaths/disk/app/3 rw - ext4 /dev/vda rw
55 40 0:61 /deep /var/lib/kubelet/pods/u/volume-subpaths/disk/app/4 rw - tmpfs tmpfs rw
56 40 0:99 /old /var/lib/kubelet/pods/u/volume-subpaths/disk/app/5 rw - tmpfs tmpfs rw
57 56 254:1 /var/lib/h8s/n\040one/kubelet/pods/u/volumes/kubernetes.io~empty-dir/disk /var/lib/kubelet/pods/u/volume-subpaths/disk/app/5 rw - ext4 /dev/vda rw
58 40 254:1 /var/lib/h8s/n\040one/kubelet/pods/u/volumes/kubernetes.io~empty-dir/disk2 /var/lib/kubelet/pods/u/volume-subpaths/disk/app/6 rw - ext4 /dev/vda rw
short line
59 40 254:1
`

func TestSubPath(t *testing.T) {
	const pod = "/var/lib/kubelet/pods/u"
	mounts := mountinfo.Parse(golden)
	if len(mounts) != 12 {
		t.Errorf("parsed %d mounts", len(mounts))
	}
	for _, c := range []struct {
		bind, volume, want string
		err                error
	}{
		{"disk/app/0", "disk", `a/b\c`, nil},
		{"mem/app/1", "mem", "deep", nil},
		{"disk/app/2", "disk", "", errdefs.ErrNotFound},        // removed on the host
		{"disk/app/3", "disk", "", errdefs.ErrInvalidArgument}, // somewhere else
		{"disk/app/4", "disk", "", errdefs.ErrInvalidArgument}, // another device
		{"disk/app/5", "disk", "", nil},                        // the topmost of two counts
		{"disk/app/6", "disk", "", errdefs.ErrInvalidArgument}, // a name's prefix is no parent
		{"disk/app/9", "disk", "", errdefs.ErrNotFound},
	} {
		got, err := subPath(mounts, pod+"/volume-subpaths/"+c.bind, pod+"/volumes/kubernetes.io~empty-dir/"+c.volume)
		if got != c.want || !errors.Is(err, c.err) {
			t.Errorf("%s: %q, %v; want %q, %v", c.bind, got, err, c.want, c.err)
		}
	}
}

func TestTmpfsSize(t *testing.T) {
	for super, want := range map[string]uint64{
		"rw,size=65536k,noswap": 64 << 20, "rw,size=3m": 3 << 20, "size=2G": 2 << 30, "rw,size=4096": 4096,
		"rw": 0, "size=": 0, "size=50%": 0, "size=99999999999999999999k": 0, "size=18446744073709551615k": 0,
	} {
		if got := tmpfsSize(super); got != want {
			t.Errorf("%s: %d, want %d", super, got, want)
		}
	}
}

func FuzzSubPath(f *testing.F) {
	f.Add(golden, "/var/lib/kubelet/pods/u/volume-subpaths/disk/app/0", "/var/lib/kubelet/pods/u/volumes/kubernetes.io~empty-dir/disk")
	f.Fuzz(func(t *testing.T, text string, bind, dir string) {
		mounts := mountinfo.Parse(text)
		for _, m := range mounts {
			_ = tmpfsSize(m.Options)
		}
		_, _ = subPath(mounts, bind, dir)
	})
}
