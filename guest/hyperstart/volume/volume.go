// Package volume keeps the sandbox's volumes: empty directories on scratch or in
// memory, file trees, and what is on disks (package block).
//
// It owns names, guest paths, usage and which disk is whose. It must not know what
// mounts them, nor how a disk becomes a file system.
package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"sort"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
	"github.com/hypernetes/hypernetes/guest/hyperstart/block"
	"github.com/hypernetes/hypernetes/guest/hyperstart/files"
	"github.com/hypernetes/hypernetes/guest/hyperstart/storage"
)

// maxVolumes bounds the volumes of a sandbox.
const maxVolumes = 4096

var validName = regexp.MustCompile(`^[a-zA-Z0-9._-]{1,128}$`)

// Set is the volumes of the sandbox. It may be used concurrently.
type Set struct {
	dir     string
	scratch func() (*storage.Scratch, error)
	host    block.Host
	// life ends with Close; mounting are the disks being mounted.
	life     context.Context
	end      context.CancelFunc
	mounting sync.WaitGroup

	mu      sync.Mutex
	volumes map[string]*entry
	disks   map[string]use // by serial
}

type entry struct {
	mu    sync.Mutex
	path  string
	tree  *files.Tree    // file trees
	space *storage.Space // empty directories on disk
	disk  *disk          // block volumes
	ready bool
}

// New keeps volumes below dir; scratch gives the scratch space once it is mounted, host
// is what disks are mounted with.
func New(dir string, scratch func() (*storage.Scratch, error), host block.Host) *Set {
	s := &Set{dir: dir, scratch: scratch, host: host, volumes: map[string]*entry{}, disks: map[string]use{}}
	s.life, s.end = context.WithCancel(context.Background())
	return s
}

func (s *Set) entry(name string, create bool) (*entry, error) {
	if !validName.MatchString(name) || name == "." || name == ".." {
		return nil, fmt.Errorf("volume name %.80q: must match %s: %w", name, validName, errdefs.ErrInvalidArgument)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.volumes[name]
	if e == nil && create {
		if len(s.volumes) >= maxVolumes {
			return nil, fmt.Errorf("more than %d volumes: %w", maxVolumes, errdefs.ErrResourceExhausted)
		}
		e = &entry{path: filepath.Join(s.dir, name)}
		s.volumes[name] = e
	}
	if e == nil {
		return nil, fmt.Errorf("volume %s: %w", name, errdefs.ErrNotFound)
	}
	return e, nil
}

// Ensure makes volumes; one that exists is left as it is, but for the directories a
// container's subPath needs. Disks are mounted side by side.
func (s *Set) Ensure(ctx context.Context, volumes ...*hyperstart.Volume) error {
	for _, v := range volumes {
		if v.GetBlock() != nil {
			if err := s.Begin(v); err != nil {
				return err
			}
		}
	}
	for _, v := range volumes {
		if err := s.ensure(ctx, v); err != nil {
			return err
		}
	}
	return nil
}

func (s *Set) ensure(ctx context.Context, v *hyperstart.Volume) error {
	e, err := s.entry(v.GetName(), true)
	if err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if b := v.GetBlock(); b != nil {
		if err := s.ensureBlock(ctx, e, v); err != nil {
			return fmt.Errorf("volume %s: %w", v.GetName(), err)
		}
		return ensureDirectories(e, v)
	}
	if e.disk != nil {
		return fmt.Errorf("volume %s is a disk: %w", v.GetName(), errdefs.ErrFailedPrecondition)
	}
	if e.ready {
		return ensureDirectories(e, v)
	}
	switch k := v.GetKind().(type) {
	case *hyperstart.Volume_EmptyDir:
		err = s.emptyDir(e, v.GetName(), k.EmptyDir)
	case *hyperstart.Volume_Files:
		if len(k.Files.GetFiles()) == 0 {
			// Only announced: PutFiles brings the content, whatever comes first.
			e.tree = files.New(e.path)
			err = e.tree.Reserve(k.Files)
		} else {
			err = put(e, k.Files, false)
		}
	default:
		err = fmt.Errorf("kind is missing: %w", errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return fmt.Errorf("volume %s: %w", v.GetName(), err)
	}
	e.ready = true
	return ensureDirectories(e, v)
}

// ensureBlock waits for a block volume. e is locked, but not while it waits.
func (s *Set) ensureBlock(ctx context.Context, e *entry, v *hyperstart.Volume) error {
	d, err := s.begin(e, v.GetName(), v.GetBlock())
	if err != nil {
		return err
	}
	e.mu.Unlock()
	err = d.await(ctx)
	e.mu.Lock()
	e.ready = e.ready || err == nil
	return err
}

// Put replaces a volume's file tree, making the volume if need be.
func (s *Set) Put(name string, tree *hyperstart.FileTree, more bool) error {
	e, err := s.entry(name, true)
	if err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if (e.ready || e.disk != nil) && e.tree == nil {
		return fmt.Errorf("volume %s is no file tree: %w", name, errdefs.ErrFailedPrecondition)
	}
	if err := put(e, tree, more); err != nil {
		return fmt.Errorf("volume %s: %w", name, err)
	}
	e.ready = e.ready || !more
	return nil
}

func put(e *entry, tree *hyperstart.FileTree, more bool) error {
	if e.tree == nil {
		e.tree = files.New(e.path)
	}
	return e.tree.Put(tree, more)
}

// ReadTail reads the end of a file of a file tree.
func (s *Set) ReadTail(name, path string, limit uint32) ([]byte, uint64, error) {
	e, err := s.entry(name, false)
	if err != nil {
		return nil, 0, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.tree == nil {
		return nil, 0, fmt.Errorf("volume %s is no file tree: %w", name, errdefs.ErrFailedPrecondition)
	}
	return e.tree.ReadTail(path, limit)
}

func (s *Set) emptyDir(e *entry, name string, d *hyperstart.EmptyDir) error {
	if d == nil {
		d = &hyperstart.EmptyDir{}
	}
	if d.Memory {
		if err := mountMemory(e.path, d.SizeLimit); err != nil {
			return err
		}
		return own(e.path, d)
	}
	scratch, err := s.scratch()
	if err != nil {
		return err
	}
	sp, err := scratch.Make(filepath.Join("volumes", name), 0o777, d.SizeLimit)
	if err != nil {
		return err
	}
	// A bind mount and no link: containers mount the guest path.
	if err := os.Mkdir(e.path, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make mount point: %w", err)
	}
	if err := unix.Mount(sp.Path, e.path, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind scratch space: %w", err)
	}
	e.space = sp
	return own(e.path, d)
}

func mountMemory(path string, limit uint64) error {
	if err := os.Mkdir(path, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make mount point: %w", err)
	}
	data := "mode=0777"
	if limit > 0 {
		data += fmt.Sprintf(",size=%d", limit)
	}
	if err := unix.Mount("tmpfs", path, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, data); err != nil {
		return fmt.Errorf("mount tmpfs: %w", err)
	}
	return nil
}

func own(path string, d *hyperstart.EmptyDir) error {
	if err := os.Chown(path, int(d.Uid), int(d.Gid)); err != nil {
		return fmt.Errorf("own volume: %w", err)
	}
	mode := d.Mode & 0o7777
	if mode == 0 {
		mode = 0o777
	}
	// unix.Chmod takes the set-gid bit an fsGroup puts there as it is.
	if err := unix.Chmod(path, mode); err != nil {
		return fmt.Errorf("set mode of volume: %w", err)
	}
	return nil
}

// Usage tells what each empty directory uses, ordered by name. One that cannot be
// measured is left out.
func (s *Set) Usage() []*hyperstart.VolumeUsage {
	s.mu.Lock()
	all := make(map[string]*entry, len(s.volumes))
	for n, e := range s.volumes {
		all[n] = e
	}
	// Not even looked at: a disk that hangs may have its volume locked.
	for _, u := range s.disks {
		delete(all, u.volume)
	}
	s.mu.Unlock()
	var out []*hyperstart.VolumeUsage
	for name, e := range all {
		if u, ok := e.usage(); ok {
			out = append(out, &hyperstart.VolumeUsage{
				Name: name, UsedBytes: u.Bytes, CapacityBytes: u.Capacity, UsedInodes: u.Inodes,
			})
		}
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Name < out[j].Name })
	return out
}

func (e *entry) usage() (storage.Usage, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case !e.ready || e.tree != nil:
		return storage.Usage{}, false
	case e.space != nil:
		u, err := e.space.Usage()
		return u, err == nil
	}
	var st unix.Statfs_t
	if err := unix.Statfs(e.path, &st); err != nil {
		return storage.Usage{}, false
	}
	size := uint64(st.Bsize)
	return storage.Usage{
		Bytes: (st.Blocks - st.Bfree) * size, Capacity: st.Blocks * size, Inodes: st.Files - st.Ffree,
	}, true
}
