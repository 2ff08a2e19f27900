package volume

import (
	"context"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
	"github.com/hypernetes/hypernetes/mountinfo"
	"github.com/hypernetes/hypernetes/volume/record"
)

const (
	csiDir     = "volumes/kubernetes.io~csi/"
	subPathDir = "volume-subpaths/"
	loopMajor  = 7 // Documentation/admin-guide/devices.txt
)

// Attached are the Pod's volumes that are disks of its VM. What the kubelet gives
// containers of them are placeholders; one whose volume is not known is an error, so that
// nobody writes to a placeholder what belongs on a volume.
type Attached []record.Attachment

var _ Resolver = Attached(nil)

// Resolve implements Resolver.
//
// Errors: errdefs.ErrFailedPrecondition for a placeholder that is gone or of no volume.
func (a Attached) Resolve(_ context.Context, pod Pod, m specs.Mount) (*Decision, error) {
	dir, err := pod.dir()
	if err != nil {
		return nil, err
	}
	rel, _ := strings.CutPrefix(m.Source, dir+"/")
	whole := strings.HasPrefix(rel, csiDir)
	if !whole && !strings.HasPrefix(rel, subPathDir) {
		return nil, nil
	}
	mounts, err := mountinfo.Read("self")
	if err != nil {
		return nil, fmt.Errorf("read mounts: %w", err)
	}
	return a.resolve(mounts, m.Source, whole)
}

func (a Attached) resolve(mounts []mountinfo.Mount, src string, whole bool) (*Decision, error) {
	lost := func(format string, args ...any) error {
		return fmt.Errorf("source %s: %s; it is published again when the pod is made anew: %w", src, fmt.Sprintf(format, args...), errdefs.ErrFailedPrecondition)
	}
	on, ok := mountinfo.At(mounts, src)
	if !ok && whole {
		// containerd makes an empty directory of a source that is missing.
		return nil, lost("nothing is mounted where the volume's placeholder was")
	}
	key, ours := strings.CutPrefix(on.Source, record.PlaceholderSource)
	if !ok || !ours || on.Type != "tmpfs" {
		return nil, nil
	}
	i := slices.IndexFunc(a, func(at record.Attachment) bool { return at.Key == key && at.Publication.Mode == record.Filesystem })
	if i < 0 {
		return nil, lost("the pod's vm does not have the volume %.40s", key)
	}
	if dev, ok := on.Number(); !ok || dev != a[i].Publication.Device {
		return nil, lost("placeholder of volume %s has device %s, not the one that was published", key, on.Device)
	}
	if strings.HasSuffix(on.Root, deletedMark) {
		return nil, lost("the subPath's directory has been removed")
	}
	sub := strings.TrimPrefix(on.Root, "/")
	if whole && sub != "" || sub != "" && path.Clean(on.Root) != on.Root {
		return nil, lost("it shows %q of its placeholder", on.Root)
	}
	v := Guest(a[i])
	if sub != "" {
		v.GetBlock().Directories = []string{sub}
	}
	return &Decision{GuestSource: path.Join(GuestRoot, v.Name, sub), Volume: v, HostPath: src}, nil
}

// Guest is an attached volume with a file system as the guest mounts it.
func Guest(a record.Attachment) *hyperstart.Volume {
	return &hyperstart.Volume{
		Name: guestName("disk", a.Key),
		Kind: &hyperstart.Volume_Block{Block: &hyperstart.BlockVolume{
			Serial: a.Staged.Serial, FsType: a.Publication.FSType, Options: slices.Clone(a.Publication.Options),
			ReadOnly: a.ReadOnly(), MayFormat: a.Staged.Format == record.FormatBlank && !a.ReadOnly(),
			FsGroup: a.Publication.FSGroup, FsGroupAlways: a.Publication.FSGroupAlways,
		}},
	}
}

// Volumes are those with a file system, as the guest mounts them.
func (a Attached) Volumes() []*hyperstart.Volume {
	var out []*hyperstart.Volume
	for _, at := range a {
		if at.Publication.Mode == record.Filesystem {
			out = append(out, Guest(at))
		}
	}
	return out
}

// Devices finds the raw devices among a container's.
//
// Errors: errdefs.ErrFailedPrecondition for a placeholder of no volume.
func (a Attached) Devices(spec *specs.Spec) ([]*hyperstart.BlockDevice, error) {
	if spec.Linux == nil {
		return nil, nil
	}
	var out []*hyperstart.BlockDevice
	for _, d := range spec.Linux.Devices {
		if d.Type != "b" || d.Major < 0 || d.Minor < 0 {
			continue
		}
		number := unix.Mkdev(uint32(d.Major), uint32(d.Minor))
		i := slices.IndexFunc(a, func(at record.Attachment) bool {
			return at.Publication.Mode == record.Block && at.Publication.Device == number
		})
		switch {
		case i >= 0:
			out = append(out, &hyperstart.BlockDevice{Path: path.Clean(d.Path), Serial: a[i].Staged.Serial, ReadOnly: a[i].ReadOnly() || readable(spec, d)})
		case d.Major == loopMajor && !strings.HasPrefix(d.Path, "/dev/loop"):
			// Not the node's own under its own name, as privileged containers get them.
			return nil, fmt.Errorf("device %s is loop device %d of the node, and of no volume that the pod's vm has; it is published again when the pod is made anew: %w",
				d.Path, d.Minor, errdefs.ErrFailedPrecondition)
		}
	}
	return out, nil
}

// readable tells whether the kubelet let the container only read the device: the rule for
// exactly that one, which the CRI plugin makes, has no "w".
func readable(spec *specs.Spec, d specs.LinuxDevice) bool {
	return spec.Linux.Resources != nil && slices.ContainsFunc(spec.Linux.Resources.Devices, func(r specs.LinuxDeviceCgroup) bool {
		return r.Allow && r.Type == d.Type && r.Major != nil && *r.Major == d.Major && r.Minor != nil && *r.Minor == d.Minor && !strings.Contains(r.Access, "w")
	})
}
