package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	volumeapi "github.com/hypernetes/hypernetes/api/volume/v1"
	"github.com/hypernetes/hypernetes/proc"
	shimrecord "github.com/hypernetes/hypernetes/runtime/record"
	"github.com/hypernetes/hypernetes/runtime/storage"
	"github.com/hypernetes/hypernetes/runtime/vmm"
	"github.com/hypernetes/hypernetes/runtime/volume"
	"github.com/hypernetes/hypernetes/volume/record"
)

// blockVolumes is the guest's feature without which a Pod with volumes does not start.
const blockVolumes = "block-volumes"

// Storage serves volumes that are no files of the node.
type Storage interface {
	// Connect returns a new connection to a volume; the caller closes it.
	Connect(ctx context.Context, serial string) (*vmm.NBD, error)
	// Size is what a volume is served with.
	Size(serial string) (int64, error)
	// Grow serves the volume with the size it has now to whoever connects from now on;
	// Settle says that the VMM uses the newest connection.
	Grow(ctx context.Context, serial string) (int64, error)
	Settle(ctx context.Context, serial string) error
	// PID is the server's process, Done closed when it has ended.
	PID() int
	Done() <-chan struct{}
	// Close ends it and waits for its end.
	Close() error
}

// held is what is open only until the VMM has inherited it.
type held []*os.File

func (h held) close() {
	for _, f := range h {
		_ = f.Close()
	}
}

func (s *Sandbox) records() record.Store { return record.Store{Root: s.opt.Config.VolumeRoot} }

func (s *Sandbox) shimAddress() string { return "unix://" + s.opt.Socket }

// findVolumes reads which volumes the Pod has: the kubelet has had them published before
// it asks for a sandbox. A UID that no record can have is of no Pod of the kubelet's.
func (s *Sandbox) findVolumes() error {
	if !record.ValidPod(s.pod.UID) {
		return nil
	}
	found, err := s.records().ForPod(s.pod.UID)
	if err != nil {
		return fmt.Errorf("volumes of the pod: %w", err)
	}
	s.volumes = found
	if len(found) == 0 {
		return nil
	}
	return s.records().SetShim(s.pod.UID, s.shimAddress())
}

// attachVolumes takes the leases and opens the disks. What it returns is closed when the
// VMM has it, or will never have it.
func (s *Sandbox) attachVolumes(ctx context.Context, c *vmm.Config) (open held, err error) {
	defer func() {
		if err != nil {
			open.close()
		}
	}()
	served := storage.Config{ID: c.ID, Cgroups: c.Cgroups}
	var disks []vmm.Disk
	for _, a := range s.volumes {
		lease, err := s.records().Take(a)
		if err != nil {
			return open, err
		}
		open = append(open, lease...)
		c.Hold = append(c.Hold, lease...)
		d := vmm.Disk{
			Serial: a.Staged.Serial, ReadOnly: a.ReadOnly(), Discard: !a.ReadOnly(), Persistent: true,
			Shared: a.Staged.Shared, Throttle: throttle(a.Staged.Throttle),
		}
		if a.Staged.Source.File == nil {
			v, err := s.served(a)
			if err != nil {
				return open, err
			}
			served.Volumes, served.Hold = append(served.Volumes, v), append(served.Hold, lease...)
		} else if d.File, err = openVolume(a); err != nil {
			return open, fmt.Errorf("volume %s: %w", a.Staged.Volume, err)
		} else {
			open = append(open, d.File)
		}
		disks = append(disks, d)
	}
	if len(served.Volumes) > 0 {
		if err := s.serve(ctx, served); err != nil {
			return open, err
		}
	}
	for i, d := range disks {
		if d.File == nil {
			if disks[i].NBD, err = s.storage.Connect(ctx, d.Serial); err != nil {
				return open, fmt.Errorf("connect volume %s: %w", s.volumes[i].Staged.Volume, err)
			}
			open = append(open, disks[i].NBD.Conn)
		}
	}
	c.Disks = append(c.Disks, disks...)
	return open, nil
}

// serve starts the storage daemon. It is in the record before the VM is, and the VM goes
// with it: there is nothing a guest could do with disks that only fail.
func (s *Sandbox) serve(ctx context.Context, c storage.Config) error {
	uid, release, err := s.opt.Host.User(s.opt.ID + "-storage")
	if err != nil {
		return err
	}
	s.storageUID = release
	c.UID = uid
	if c.Dir, err = shimrecord.Dir(s.opt.Config.StateDir, s.opt.Namespace, s.opt.ID); err != nil {
		return err
	}
	daemon, err := s.opt.Host.Storage(ctx, c)
	if err != nil {
		return fmt.Errorf("volumes of the pod: %w", err)
	}
	s.storage = daemon
	if s.record.Storage, err = proc.Find(s.storage.PID()); err == nil {
		err = s.save()
	}
	if err != nil {
		return fmt.Errorf("storage daemon: %w", err)
	}
	return nil
}

// watchStorage ends the VM with its storage daemon.
func (s *Sandbox) watchStorage() {
	defer s.wg.Done()
	select {
	case <-s.storage.Done():
		s.kill("storage daemon of the pod's volumes has ended")
	case <-s.vm.Done():
	}
}

// served is a volume for the storage daemon, with its secrets.
func (s *Sandbox) served(a record.Attachment) (storage.Volume, error) {
	v := storage.Volume{Serial: a.Staged.Serial, Source: a.Staged.Source, ReadOnly: a.ReadOnly(), Secrets: map[string][]byte{}}
	for _, name := range []string{record.SecretKey, record.SecretPassword} {
		b, err := s.records().Secret(a.Key, name)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return v, err
		}
		v.Secrets[name] = b
	}
	return v, nil
}

// placeholders are the Pod's volumes with where containers are given them now: the plugin
// may have had to make a placeholder anew since the VM started.
func (s *Sandbox) placeholders() (volume.Attached, error) {
	out := slices.Clone(s.volumes)
	for i, a := range out {
		p, err := s.records().Publication(a.Key, a.Publication.PodUID)
		if errdefs.IsNotFound(err) {
			continue // the Pod is going
		}
		if err != nil {
			return nil, err
		}
		out[i].Publication.Device = p.Device
	}
	return out, nil
}

func throttle(t *record.Throttle) *vmm.Throttle {
	if t == nil {
		return nil
	}
	return &vmm.Throttle{
		IOPS: t.IOPS, ReadIOPS: t.ReadIOPS, WriteIOPS: t.WriteIOPS,
		Bytes: t.BPS, ReadBytes: t.ReadBPS, WriteBytes: t.WriteBPS,
	}
}

// openVolume opens a file or device, past the page cache if the file system can.
func openVolume(a record.Attachment) (*os.File, error) {
	path, flags := a.Staged.Source.File.Path, unix.O_RDWR
	if a.ReadOnly() {
		flags = unix.O_RDONLY
	}
	flags |= unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC | unix.O_NOCTTY
	fd, err := unix.Open(path, flags|unix.O_DIRECT, 0)
	if errors.Is(err, unix.EINVAL) {
		fd, err = unix.Open(path, flags, 0)
	}
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil, fmt.Errorf("%s: %w", path, errdefs.ErrNotFound)
	case err != nil:
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	size, err := diskSize(f)
	if err == nil && size < a.Staged.SizeBytes {
		err = fmt.Errorf("%s has %d bytes, the volume should have %d: %w", path, size, a.Staged.SizeBytes, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

// sector is what a disk's size is a multiple of.
const sector = 512

// diskSize is a regular file's or block device's.
func diskSize(f *os.File) (int64, error) {
	st, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if !st.Mode().IsRegular() && st.Mode()&(os.ModeDevice|os.ModeCharDevice) != os.ModeDevice {
		return 0, fmt.Errorf("%s is a %s, not an image or a block device: %w", f.Name(), st.Mode().Type(), errdefs.ErrInvalidArgument)
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err == nil && (size <= 0 || size%sector != 0) {
		err = fmt.Errorf("%s has %d bytes, which no disk has: %w", f.Name(), size, errdefs.ErrDataLoss)
	}
	return size, err
}

// giveBackVolumes is after the VM's end.
func (s *Sandbox) giveBackVolumes() error {
	var errs []error
	if s.storage != nil {
		errs = append(errs, s.storage.Close())
	}
	if s.storageUID != nil {
		s.storageUID()
	}
	if len(s.volumes) > 0 {
		errs = append(errs, s.records().RemoveShim(s.pod.UID, s.shimAddress()))
	}
	return errors.Join(errs...)
}

// statsTime bounds asking a guest about a volume: the kubelet asks about one after the
// other.
const statsTime = 2 * time.Second

// attachment finds a volume of a Pod whose VM runs.
//
// Errors: errdefs.ErrNotFound.
func (s *Sandbox) attachment(key string) (record.Attachment, error) {
	select {
	case <-s.booted: // nothing is changed any more
	default:
		return record.Attachment{}, fmt.Errorf("the pod's vm is not up yet: %w", errdefs.ErrUnavailable)
	}
	i := slices.IndexFunc(s.volumes, func(a record.Attachment) bool { return a.Key == key })
	if i < 0 {
		return record.Attachment{}, fmt.Errorf("volume %.40q is not the pod's: %w", key, errdefs.ErrNotFound)
	}
	return s.volumes[i], nil
}

// volumeSize is a file's now, or what a served volume is served with.
func (s *Sandbox) volumeSize(a record.Attachment) (int64, error) {
	if a.Staged.Source.File == nil {
		return s.storage.Size(a.Staged.Serial)
	}
	fd, err := unix.Open(a.Staged.Source.File.Path, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
	if err != nil {
		return 0, &os.PathError{Op: "open", Path: a.Staged.Source.File.Path, Err: err}
	}
	f := os.NewFile(uintptr(fd), a.Staged.Source.File.Path)
	defer f.Close()
	return diskSize(f)
}

// backing is a volume's size now, and what is missing of its file, "" for nothing.
func (s *Sandbox) backing(a record.Attachment) (size int64, lost string, err error) {
	size, err = s.volumeSize(a)
	switch {
	case a.Staged.Source.File == nil:
	case errors.Is(err, fs.ErrNotExist):
		return a.Staged.SizeBytes, "its file is gone from the node: what is on it is lost when the Pod ends", nil
	case err == nil && size < a.Staged.SizeBytes:
		lost = fmt.Sprintf("its file was cut from %d to %d bytes", a.Staged.SizeBytes, size)
	}
	return size, lost, err
}

// VolumeStats measures what is on a volume. What the guest says is bounded by the disk.
//
// Errors: errdefs.ErrNotFound, errdefs.ErrUnavailable if there is no answer now.
func (s *Sandbox) VolumeStats(ctx context.Context, key string) (*volumeapi.StatsResponse, error) {
	at, err := s.attachment(key)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, statsTime)
	defer cancel()
	a, err := s.client(ctx)
	if err != nil {
		return nil, late(ctx, fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable))
	}
	// The disk as the guest has it is not larger than what there is.
	size, lost, err := s.backing(at)
	if err != nil {
		return nil, err
	}
	said, err := a.VolumeStats(ctx, at.Staged.Serial)
	if err != nil {
		return nil, late(ctx, err)
	}
	out := &volumeapi.StatsResponse{DeviceBytes: uint64(size)}
	out.Abnormal, out.Health = health(lost, s.vm.Faults(at.Staged.Serial), said.Abnormal)
	if at.Publication.Mode == record.Block {
		return out, nil
	}
	const leastInode = 128 // bytes on the disk
	out.TotalBytes, out.UsedBytes, out.AvailableBytes = bound(out.DeviceBytes, said.TotalBytes, said.UsedBytes, said.AvailableBytes)
	out.TotalInodes, out.UsedInodes, out.AvailableInodes = bound(out.DeviceBytes/leastInode, said.TotalInodes, said.UsedInodes, said.AvailableInodes)
	return out, nil
}

// health puts together what is known against a volume: of the host's own knowledge first.
func health(lost string, faults int, said string) (string, volumeapi.Health) {
	text, kind := said, volumeapi.Health_HEALTHY
	if said != "" {
		kind = volumeapi.Health_GUEST_REPORTS_ERRORS
	}
	known := lost
	switch {
	case lost != "":
		kind = volumeapi.Health_BACKING_LOST
	case faults > 0:
		known, kind = fmt.Sprintf("%d reads or writes have failed", faults), volumeapi.Health_DISK_ERRORS
	}
	switch {
	case known != "" && said != "":
		text = known + "; in the VM: " + said
	case known != "":
		text = known
	}
	return text, kind
}

func bound(most, total, used, available uint64) (uint64, uint64, uint64) {
	total = min(total, most)
	used = min(used, total)
	return total, used, min(available, total-used)
}

// late gives an error of a call whose time is over the class of what is to be tried again.
func late(ctx context.Context, err error) error {
	if ctx.Err() == nil {
		return err
	}
	// Not wrapped: a deadline of its own would pass for the caller's.
	return fmt.Errorf("no answer in time: %v: %w", err, errdefs.ErrUnavailable)
}

// growTime bounds growing: the guest's file system may be large.
const growTime = time.Minute

// GrowVolume has the guest use all that a volume has, which is least bytes or more, and
// returns how much that is.
//
// Errors: errdefs.ErrNotFound, errdefs.ErrUnavailable, errdefs.ErrFailedPrecondition if
// the volume has not grown.
func (s *Sandbox) GrowVolume(ctx context.Context, key string, least uint64) (int64, error) {
	at, err := s.attachment(key)
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, growTime)
	defer cancel()
	a, err := s.client(ctx)
	if err != nil {
		return 0, fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	s.growing.Lock()
	defer s.growing.Unlock()
	size, err := s.volumeSize(at)
	if err != nil || at.ReadOnly() {
		return size, err // who writes it grows it; this VM sees that when it starts anew
	}
	served := at.Staged.Source.File == nil
	if served {
		if size, err = s.storage.Grow(ctx, at.Staged.Serial); err != nil {
			return 0, late(ctx, err)
		}
	}
	if uint64(size) < least {
		return 0, fmt.Errorf("volume %s has %d bytes, not %d: it has to grow first: %w", at.Staged.Volume, size, least, errdefs.ErrFailedPrecondition)
	}
	var nbd *vmm.NBD
	if served {
		if nbd, err = s.storage.Connect(ctx, at.Staged.Serial); err != nil {
			return 0, late(ctx, err)
		}
		defer nbd.Conn.Close()
	}
	if err := s.vm.GrowDisk(ctx, at.Staged.Serial, size, nbd); err != nil {
		return 0, late(ctx, err)
	}
	if served {
		if err := s.storage.Settle(ctx, at.Staged.Serial); err != nil {
			return 0, late(ctx, err)
		}
	}
	if err := a.GrowVolume(ctx, at.Staged.Serial, uint64(size)); err != nil {
		return 0, late(ctx, err)
	}
	log.G(s.ctx).WithField("pod", s.record.Pod).WithField("volume", at.Staged.Volume).WithField("bytes", size).Info("volume has grown")
	return size, nil
}

// throttleTime bounds changing limits.
const throttleTime = 10 * time.Second

// ThrottleVolume bounds a volume's I/O as its record says now.
//
// Errors: errdefs.ErrNotFound, errdefs.ErrUnavailable.
func (s *Sandbox) ThrottleVolume(ctx context.Context, key string) error {
	at, err := s.attachment(key)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, throttleTime)
	defer cancel()
	// Whoever comes last has read last.
	s.throttling.Lock()
	defer s.throttling.Unlock()
	now, err := s.records().Staged(key)
	if err != nil {
		return err
	}
	limits := vmm.Throttle{}
	if t := throttle(now.Throttle); t != nil {
		limits = *t
	}
	if err := s.vm.ThrottleDisk(ctx, at.Staged.Serial, limits); err != nil {
		return late(ctx, err)
	}
	return nil
}

// checkFeatures refuses a guest that would leave volumes out.
func (s *Sandbox) checkFeatures() error {
	if len(s.volumes) == 0 || slices.Contains(s.agent.Hello.Features, blockVolumes) {
		return nil
	}
	return fmt.Errorf("the guest image does not know volumes (feature %s): %w; remedy: build it anew (make guest)", blockVolumes, errdefs.ErrFailedPrecondition)
}
