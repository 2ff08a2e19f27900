package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
	"github.com/hypernetes/hypernetes/guest/hyperstart/block"
)

const (
	// growTimeout bounds the wait for a disk's new size.
	growTimeout = 20 * time.Second
	// lookTimeout bounds the search for a disk that should be there.
	lookTimeout = time.Second
)

// disk is a block volume's. Checking and mounting it takes as long as it takes, and a
// disk may hang for ever: so it is done beside the calls, which wait as long as they can
// and find it again when they are repeated.
type disk struct {
	serial   string
	readOnly bool
	// restrictions are for every mount of it.
	restrictions []string
	// done is closed when mounted or failed with err.
	done    chan struct{}
	mounted *block.Mounted
	err     error

	grow sync.Mutex
}

// await waits until the disk is mounted.
func (d *disk) await(ctx context.Context) error {
	select {
	case <-d.done:
		return d.err
	case <-ctx.Done():
		return fmt.Errorf("disk %s is still being checked and mounted: %w: %w", d.serial, errdefs.ErrUnavailable, ctx.Err())
	}
}

func (d *disk) failed() bool {
	select {
	case <-d.done:
		return d.err != nil
	default:
		return false
	}
}

// Begin starts to mount a block volume and does not wait; Ensure does and has its error.
func (s *Set) Begin(v *hyperstart.Volume) error {
	if v.GetBlock() == nil {
		return fmt.Errorf("volume %.80q is no block volume: %w", v.GetName(), errdefs.ErrInvalidArgument)
	}
	e, err := s.entry(v.GetName(), true)
	if err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if _, err := s.begin(e, v.GetName(), v.GetBlock()); err != nil {
		return fmt.Errorf("volume %s: %w", v.GetName(), err)
	}
	return nil
}

// begin returns the volume's disk, being mounted or mounted. e is locked.
func (s *Set) begin(e *entry, name string, b *hyperstart.BlockVolume) (*disk, error) {
	switch {
	case e.disk == nil && e.ready:
		return nil, fmt.Errorf("is no block volume: %w", errdefs.ErrFailedPrecondition)
	case e.disk != nil && !e.disk.failed():
		if e.disk.serial != b.Serial || e.disk.readOnly != b.ReadOnly {
			return nil, fmt.Errorf("is disk %s (read-only: %v) already: %w", e.disk.serial, e.disk.readOnly, errdefs.ErrFailedPrecondition)
		}
		return e.disk, nil
	}
	spec := block.Spec{
		Serial: b.Serial, Type: b.FsType, Options: b.Options, ReadOnly: b.ReadOnly, MayFormat: b.MayFormat,
		Group: b.FsGroup, GroupAlways: b.FsGroupAlways,
	}
	if err := spec.Check(); err != nil {
		return nil, err
	}
	d := &disk{serial: b.Serial, readOnly: b.ReadOnly, restrictions: spec.Restrictions(), done: make(chan struct{})}
	if err := s.claim(d, name); err != nil {
		return nil, err
	}
	e.disk = d
	go func() { // Close waits for it
		defer s.mounting.Done()
		defer close(d.done)
		d.mounted, d.err = s.mount(spec, e.path)
	}()
	return d, nil
}

func (s *Set) mount(spec block.Spec, at string) (*block.Mounted, error) {
	if err := os.Mkdir(at, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("make mount point: %w", err)
	}
	return block.Mount(s.life, s.host, spec, at)
}

// Restrictions are the options every mount of a volume must have.
func (s *Set) Restrictions(name string) []string {
	e, err := s.entry(name, false)
	if err != nil {
		return nil
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.disk == nil {
		return nil
	}
	return e.disk.restrictions
}

// claim makes a disk a volume's; what counts is the latest attempt.
func (s *Set) claim(d *disk, name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.life.Err() != nil {
		return fmt.Errorf("sandbox is shutting down: %w", errdefs.ErrFailedPrecondition)
	}
	if u, ok := s.disks[d.serial]; ok && u.volume != name {
		return fmt.Errorf("disk %s is already %s: %w", d.serial, u, errdefs.ErrFailedPrecondition)
	}
	s.disks[d.serial] = use{volume: name, disk: d}
	s.mounting.Add(1)
	return nil
}

// use is what a disk is used for: a volume, or as it is.
type use struct {
	volume string
	disk   *disk
	device string
}

func (u use) String() string {
	if u.disk == nil {
		return "used as a raw device"
	}
	return "volume " + u.volume
}

// Device waits for a disk that containers use as it is and returns its device node.
func (s *Set) Device(ctx context.Context, serial string) (string, error) {
	free := func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		if u, ok := s.disks[serial]; ok && u.disk != nil {
			return fmt.Errorf("disk %s is already %s, and cannot be a raw device as well: %w", serial, u, errdefs.ErrFailedPrecondition)
		}
		return nil
	}
	if err := free(); err != nil {
		return "", err
	}
	dev, err := s.host.Find(ctx, serial)
	if err != nil {
		return "", err
	}
	if err := free(); err != nil {
		return "", err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.disks[serial] = use{device: dev}
	return dev, nil
}

// used returns what the disk is used for, once it is mounted.
func (s *Set) used(ctx context.Context, serial string) (use, error) {
	s.mu.Lock()
	u, ok := s.disks[serial]
	s.mu.Unlock()
	if !ok {
		// One no container has asked for yet.
		ctx, cancel := context.WithTimeout(ctx, lookTimeout)
		defer cancel()
		dev, err := s.host.Find(ctx, serial)
		return use{device: dev}, err
	}
	if u.disk != nil {
		if err := u.disk.await(ctx); err != nil {
			return use{}, err
		}
		u.device = u.disk.mounted.Device()
	}
	return u, nil
}

// DiskStats measures what is on a disk.
func (s *Set) DiskStats(ctx context.Context, serial string) (*hyperstart.VolumeStatsResponse, error) {
	u, err := s.used(ctx, serial)
	if err != nil {
		return nil, err
	}
	if u.disk == nil {
		n, err := block.Size(u.device)
		return &hyperstart.VolumeStatsResponse{DeviceBytes: uint64(n)}, err
	}
	st, err := u.disk.mounted.Stats()
	if err != nil {
		return nil, err
	}
	return &hyperstart.VolumeStatsResponse{
		DeviceBytes: st.Device, TotalBytes: st.Total, UsedBytes: st.Used, AvailableBytes: st.Available,
		TotalInodes: st.Inodes, UsedInodes: st.InodesUsed, AvailableInodes: st.InodesAvailable, Abnormal: st.Abnormal,
	}, nil
}

// Grow waits until the disk is that large and makes its file system so.
func (s *Set) Grow(ctx context.Context, serial string, bytes uint64) (*hyperstart.GrowVolumeResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, growTimeout)
	defer cancel()
	u, err := s.used(ctx, serial)
	if err != nil {
		return nil, err
	}
	size, err := block.AwaitSize(ctx, u.device, bytes)
	if err != nil {
		return nil, fmt.Errorf("disk %s: %w", serial, err)
	}
	if u.disk == nil {
		return &hyperstart.GrowVolumeResponse{DeviceBytes: uint64(size)}, nil
	}
	u.disk.grow.Lock()
	defer u.disk.grow.Unlock()
	if size, err = u.disk.mounted.Grow(); err != nil {
		return nil, err
	}
	st, err := u.disk.mounted.Stats()
	return &hyperstart.GrowVolumeResponse{DeviceBytes: uint64(size), TotalBytes: st.Total}, err
}

// Close writes back and unmounts every disk; nothing can be mounted afterwards. What
// hangs is left behind when ctx ends.
func (s *Set) Close(ctx context.Context) error {
	s.end()
	s.mu.Lock()
	var all []*disk
	for _, u := range s.disks {
		if u.disk != nil {
			all = append(all, u.disk)
		}
	}
	s.mu.Unlock()
	if len(all) == 0 {
		return nil
	}
	closed := make(chan error, len(all))
	for _, d := range all {
		go func() { // at most one call into a kernel that may never return
			<-d.done
			if d.err != nil {
				closed <- nil
				return
			}
			closed <- d.mounted.Close(ctx)
		}()
	}
	var errs []error
	for range all {
		select {
		case err := <-closed:
			errs = append(errs, err)
		case <-ctx.Done():
			return errors.Join(append(errs, fmt.Errorf("unmount volumes: a disk does not answer: %w", ctx.Err()))...)
		}
	}
	s.mounting.Wait()
	return errors.Join(errs...)
}
