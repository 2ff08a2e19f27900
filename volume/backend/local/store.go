package local

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/atomicfile"
	"github.com/hypernetes/hypernetes/volume/record"
)

// Names below a Store's directory.
const (
	volumesDir   = "volumes"
	snapshotsDir = "snapshots"
	inlineDir    = "inline"
	diskFile     = "disk.raw"
	metaFile     = "meta.json"
	tmpPrefix    = ".tmp-"
)

// reservePercent of a file system is left to the node: above the share at which the
// kubelet begins to evict Pods (nodefs.available, 2 %).
const reservePercent = 3

// validID is what becomes a directory's name.
var validID = regexp.MustCompile(`^[a-z0-9]([-a-z0-9.]{0,126}[a-z0-9])?$`)

func checkID(id string) error {
	if !validID.MatchString(id) || strings.Contains(id, "..") {
		return fmt.Errorf("ID %.140q: want 1 to 128 of a-z, 0-9, - and .: %w", id, errdefs.ErrInvalidArgument)
	}
	return nil
}

// meta is what cannot be seen of a file.
type meta struct {
	Version int `json:"version"`
	// Blank: nobody but its user has ever written to it.
	Blank bool `json:"blank,omitempty"`
	// Owner of a Pod's own volume: a directory.
	Owner string `json:"owner,omitempty"`
	// Throttle is what bounds a VM that has it.
	Throttle *record.Throttle `json:"throttle,omitempty"`
}

// Disk is a file of a Store.
type Disk struct {
	Path      string
	SizeBytes int64
	// AllocatedBytes is how much of it is there.
	AllocatedBytes int64
	// Blank says that it began empty.
	Blank bool
	// Owner of a Pod's own volume.
	Owner string
	// Throttle is what bounds a VM that has it; nil for nothing.
	Throttle *record.Throttle
}

// Store is the files of one node. Its methods may be called concurrently, but not two
// that change the same volume or snapshot.
type Store struct {
	dir string
	// space serialises decisions about room, pending is what files in the making will take.
	space   sync.Mutex
	pending int64

	reflinkOnce sync.Once
	reflink     bool
}

// OpenStore opens the store in dir, makes it if it is not there, and removes what was not
// completed.
func OpenStore(dir string) (*Store, error) {
	s := &Store{dir: dir}
	for _, kind := range []string{volumesDir, snapshotsDir, inlineDir} {
		if err := os.MkdirAll(filepath.Join(dir, kind), 0o700); err != nil {
			return nil, fmt.Errorf("local volumes: %w", err)
		}
		entries, err := os.ReadDir(filepath.Join(dir, kind))
		if err != nil {
			return nil, fmt.Errorf("local volumes: %w", err)
		}
		for _, e := range entries {
			if strings.HasPrefix(e.Name(), tmpPrefix) {
				if err := os.RemoveAll(filepath.Join(dir, kind, e.Name())); err != nil {
					return nil, fmt.Errorf("local volumes: %w", err)
				}
			}
		}
	}
	return s, nil
}

// Volume is one that is there. Errors: errdefs.ErrNotFound, errdefs.ErrInvalidArgument.
func (s *Store) Volume(id string) (Disk, error) { return s.disk(volumesDir, id) }

// Snapshot is one that is there. Errors as Volume's.
func (s *Store) Snapshot(id string) (Disk, error) { return s.disk(snapshotsDir, id) }

// Inline is a Pod's own volume. Errors as Volume's.
func (s *Store) Inline(id string) (Disk, error) { return s.disk(inlineDir, id) }

func (s *Store) disk(kind, id string) (Disk, error) {
	if err := checkID(id); err != nil {
		return Disk{}, err
	}
	d := Disk{Path: filepath.Join(s.dir, kind, id, diskFile)}
	var st unix.Stat_t
	if err := unix.Lstat(d.Path, &st); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return Disk{}, fmt.Errorf("%s %s: this node has no such file: %w", strings.TrimSuffix(kind, "s"), id, errdefs.ErrNotFound)
		}
		return Disk{}, fmt.Errorf("%s: %w", d.Path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return Disk{}, fmt.Errorf("%s is not a regular file: %w", d.Path, errdefs.ErrDataLoss)
	}
	m, err := s.meta(kind, id)
	if err != nil {
		return Disk{}, err
	}
	d.SizeBytes, d.AllocatedBytes, d.Blank, d.Owner, d.Throttle = st.Size, st.Blocks*512, m.Blank, m.Owner, m.Throttle
	return d, nil
}

func (s *Store) meta(kind, id string) (m meta, err error) {
	path := filepath.Join(s.dir, kind, id, metaFile)
	b, err := os.ReadFile(path)
	if err != nil {
		return m, err
	}
	if err := json.Unmarshal(b, &m); err != nil || m.Version != 1 {
		return m, fmt.Errorf("%s: version %d, %v: %w", path, m.Version, err, errdefs.ErrDataLoss)
	}
	return m, nil
}

// CreateVolume makes an empty one. Errors: errdefs.ErrResourceExhausted.
func (s *Store) CreateVolume(id string, bytes int64) error {
	return s.create(volumesDir, id, nil, bytes, meta{Version: 1, Blank: true})
}

// CreateInline makes an empty one of a Pod's own.
func (s *Store) CreateInline(id, owner string, bytes int64) error {
	return s.create(inlineDir, id, nil, bytes, meta{Version: 1, Blank: true, Owner: owner})
}

// CopyVolume makes one that begins as a copy of a disk.
func (s *Store) CopyVolume(id string, from Disk, bytes int64) error {
	return s.create(volumesDir, id, &from, max(bytes, from.SizeBytes), meta{Version: 1, Blank: from.Blank && from.AllocatedBytes == 0})
}

// CopySnapshot makes a snapshot of a disk.
func (s *Store) CopySnapshot(id string, from Disk) error {
	return s.create(snapshotsDir, id, &from, from.SizeBytes, meta{Version: 1, Blank: from.Blank && from.AllocatedBytes == 0})
}

// create makes a file in a directory of its own, and that appear at once.
func (s *Store) create(kind, id string, from *Disk, bytes int64, m meta) (err error) {
	if err := checkID(id); err != nil {
		return err
	}
	need := bytes
	if kind == snapshotsDir && from != nil {
		need = from.AllocatedBytes // nobody will write to it
	}
	release, err := s.claim(need)
	if err != nil {
		return err
	}
	defer release()
	tmp := filepath.Join(s.dir, kind, tmpPrefix+id)
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	if err := os.Mkdir(tmp, 0o700); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.RemoveAll(tmp)
			err = classify(err)
		}
	}()
	f, err := os.OpenFile(filepath.Join(tmp, diskFile), os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	if from != nil {
		err = copyFile(f, from.Path)
	}
	if err == nil {
		err = f.Truncate(bytes)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := writeMeta(tmp, m); err != nil {
		return err
	}
	if err := os.Rename(tmp, filepath.Join(s.dir, kind, id)); err != nil {
		return err
	}
	return syncDir(filepath.Join(s.dir, kind))
}

func writeMeta(dir string, m meta) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return atomicfile.Write(filepath.Join(dir, metaFile), b, 0o600)
}

// LimitVolume says what bounds a volume's next VM; nil is nothing.
func (s *Store) LimitVolume(id string, t *record.Throttle) error {
	if err := checkID(id); err != nil {
		return err
	}
	m, err := s.meta(volumesDir, id)
	if err != nil || reflect.DeepEqual(m.Throttle, t) {
		return err
	}
	m.Throttle = t
	return classify(writeMeta(filepath.Join(s.dir, volumesDir, id), m))
}

// classify gives what a full disk says its class.
func classify(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.EFBIG) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrResourceExhausted)
	}
	return err
}

// GrowVolume makes a volume at least so large, and returns its size.
func (s *Store) GrowVolume(id string, bytes int64) (int64, error) {
	d, err := s.Volume(id)
	if err != nil || d.SizeBytes >= bytes {
		return d.SizeBytes, err
	}
	release, err := s.claim(bytes - d.SizeBytes)
	if err != nil {
		return d.SizeBytes, err
	}
	defer release()
	f, err := os.OpenFile(d.Path, os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return d.SizeBytes, err
	}
	if err = f.Truncate(bytes); err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return d.SizeBytes, classify(err)
	}
	return bytes, nil
}

// DeleteVolume removes one; it succeeds if there is none.
func (s *Store) DeleteVolume(id string) error { return s.remove(volumesDir, id) }

// DeleteSnapshot removes one; it succeeds if there is none.
func (s *Store) DeleteSnapshot(id string) error { return s.remove(snapshotsDir, id) }

// DeleteInline removes one; it succeeds if there is none.
func (s *Store) DeleteInline(id string) error { return s.remove(inlineDir, id) }

func (s *Store) remove(kind, id string) error {
	if err := checkID(id); err != nil {
		return err
	}
	dir, gone := filepath.Join(s.dir, kind, id), filepath.Join(s.dir, kind, tmpPrefix+id)
	if err := os.RemoveAll(gone); err != nil {
		return err
	}
	if err := os.Rename(dir, gone); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	return errors.Join(syncDir(filepath.Join(s.dir, kind)), os.RemoveAll(gone))
}

// IDs of the volumes that are there.
func (s *Store) IDs() ([]string, error) { return s.ids(volumesDir) }

func (s *Store) ids(kind string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(s.dir, kind))
	if err != nil {
		return nil, err
	}
	var out []string
	for _, e := range entries {
		if checkID(e.Name()) == nil {
			out = append(out, e.Name())
		}
	}
	return out, nil
}

// Room is what a store has.
type Room struct {
	TotalBytes, AvailableBytes int64
	Volumes, Snapshots         int
	Reflink                    bool
}

// Room tells how much there is, and for how large a volume it suffices.
func (s *Store) Room() (Room, error) {
	s.space.Lock()
	defer s.space.Unlock()
	return s.room()
}

func (s *Store) room() (Room, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(s.dir, &st); err != nil {
		return Room{}, fmt.Errorf("local volumes: %s: %w", s.dir, err)
	}
	ids, err := s.ids(volumesDir)
	if err != nil {
		return Room{}, err
	}
	inline, err := s.ids(inlineDir)
	if err != nil {
		return Room{}, err
	}
	snapshots, err := s.ids(snapshotsDir)
	if err != nil {
		return Room{}, err
	}
	unwritten := s.pending
	for kind, all := range map[string][]string{volumesDir: ids, inlineDir: inline} {
		for _, id := range all {
			if d, err := s.disk(kind, id); err == nil {
				unwritten += max(0, d.SizeBytes-d.AllocatedBytes)
			}
		}
	}
	r := Room{
		TotalBytes: int64(st.Blocks) * st.Bsize, Volumes: len(ids) + len(inline), Snapshots: len(snapshots), Reflink: s.Reflink(),
	}
	r.AvailableBytes = max(0, int64(st.Bavail)*st.Bsize-r.TotalBytes/100*reservePercent-unwritten)
	return r, nil
}

// claim sets room aside until release, when what takes it is there, or is not.
func (s *Store) claim(bytes int64) (release func(), err error) {
	s.space.Lock()
	defer s.space.Unlock()
	r, err := s.room()
	if err != nil {
		return nil, err
	}
	if bytes > r.AvailableBytes {
		return nil, fmt.Errorf("want %d bytes, but %d are left on this node for volumes (all of its volumes could be full at once, and %d %% of the file system of %s stay free): %w",
			bytes, r.AvailableBytes, reservePercent, s.dir, errdefs.ErrResourceExhausted)
	}
	s.pending += bytes
	return func() {
		s.space.Lock()
		s.pending -= bytes
		s.space.Unlock()
	}, nil
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
