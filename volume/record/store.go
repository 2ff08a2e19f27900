package record

import (
	"crypto/sha256"
	"encoding/base32"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/atomicfile"
)

const (
	// maxSecret bounds a secret, maxShim a shim's address, in bytes.
	maxSecret = 4 << 10
	maxShim   = 256
	// maxVolumes bounds how many volumes of a node are looked at for a Pod.
	maxVolumes = 10000
)

// ValidPod tells whether a Pod with this UID can have volumes.
func ValidPod(uid string) bool { return checkPod(uid) == nil }

// Key names a volume's directory: the same for the same volume, of another one's never.
func Key(driver, volume string) string { return hex.EncodeToString(digest(driver, volume)[:16]) }

// Serial is the disk's in the guest. It begins with "v": a VM has other disks too.
func Serial(driver, volume string) string {
	return "v" + strings.ToLower(base32.HexEncoding.EncodeToString(digest(driver, volume)[:15]))[:19]
}

func digest(driver, volume string) []byte {
	sum := sha256.Sum256([]byte(driver + "\x00" + volume))
	return sum[:]
}

// Key of the volume.
func (s Staged) Key() string { return Key(s.Driver, s.Volume) }

// ReadOnly tells whether the Pod must not write.
func (a Attachment) ReadOnly() bool { return a.Staged.ReadOnly || a.Publication.ReadOnly }

// Exclusive tells whether the Pod's VM must be the volume's only one on this node: it
// writes, and no cluster file system is known that makes of two writers more than ruin.
func (a Attachment) Exclusive() bool {
	return !a.ReadOnly() && !(a.Staged.Shared && a.Publication.Mode == Block)
}

// Store is the records of a node. Every change is atomic and can be repeated; changes of
// several processes wait for one another, readers never do.
type Store struct {
	// Root is the directory; "" is the constant Root.
	Root string
}

func (s Store) root() string {
	if s.Root == "" {
		return Root
	}
	return s.Root
}

func (s Store) volumes() string           { return filepath.Join(s.root(), "volumes") }
func (s Store) volume(key string) string  { return filepath.Join(s.volumes(), key) }
func (s Store) staged(key string) string  { return filepath.Join(s.volume(key), "staged.json") }
func (s Store) lease(key string) string   { return filepath.Join(s.volume(key), "lease") }
func (s Store) secrets(key string) string { return filepath.Join(s.root(), "secrets", key) }
func (s Store) pods(key string) string    { return filepath.Join(s.volume(key), "pods") }
func (s Store) shim(uid string) string    { return filepath.Join(s.root(), "pods", uid) }
func (s Store) publication(key, uid string) string {
	return filepath.Join(s.pods(key), uid+".json")
}
func (s Store) podLease(key, uid string) string { return filepath.Join(s.pods(key), uid+".lease") }

// Stage writes what a volume's disk is, with its secrets. Again with the same it does
// nothing; its size and limits may be changed at any time, anything else only while no
// VM has the volume.
//
// Errors: errdefs.ErrInvalidArgument, errdefs.ErrFailedPrecondition.
func (s Store) Stage(st Staged, secrets map[string][]byte) error {
	st.Version = Version
	b, err := encode(&st)
	if err != nil {
		return err
	}
	for name, value := range secrets {
		if !secretName.MatchString(name) || len(value) == 0 || len(value) > maxSecret {
			return invalid("volume "+st.Volume, "secret", name, fmt.Sprintf("a name of a-z, 0-9 and -, and 1 to %d bytes", maxSecret))
		}
	}
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	key := st.Key()
	if err := os.MkdirAll(s.pods(key), 0o700); err != nil {
		return fmt.Errorf("stage volume %s: %w", st.Volume, err)
	}
	if err := touch(s.lease(key)); err != nil {
		return fmt.Errorf("stage volume %s: %w", st.Volume, err)
	}
	// What cannot be read any more is replaced like what is another disk.
	if old, err := s.Staged(key); err != nil && !errdefs.IsNotFound(err) || err == nil && !sameDisk(old, st) {
		f, err := s.Lease(key, true)
		if errdefs.IsUnavailable(err) {
			return fmt.Errorf("volume %s is staged as another disk, and %w: %w", st.Volume, err, errdefs.ErrFailedPrecondition)
		} else if err != nil {
			return err
		}
		defer f.Close()
	}
	if err := s.putSecrets(key, secrets); err != nil {
		return fmt.Errorf("stage volume %s: %w", st.Volume, err)
	}
	if err := atomicfile.Write(s.staged(key), b, 0o600); err != nil {
		return fmt.Errorf("stage volume %s: %w", st.Volume, err)
	}
	return nil
}

// sameDisk tells whether a VM that has a need not know about b.
func sameDisk(a, b Staged) bool {
	a.SizeBytes, a.Throttle = b.SizeBytes, b.Throttle
	return reflect.DeepEqual(a, b)
}

// putSecrets leaves these secrets and no others.
func (s Store) putSecrets(key string, secrets map[string][]byte) error {
	if err := os.MkdirAll(s.secrets(key), 0o700); err != nil {
		return err
	}
	entries, err := os.ReadDir(s.secrets(key))
	if err != nil {
		return err
	}
	for _, e := range entries {
		if _, ok := secrets[e.Name()]; !ok {
			if err := os.RemoveAll(filepath.Join(s.secrets(key), e.Name())); err != nil {
				return err
			}
		}
	}
	for name, value := range secrets {
		if err := atomicfile.Write(filepath.Join(s.secrets(key), name), value, 0o400); err != nil {
			return err
		}
	}
	return nil
}

// Staged reads what a volume's disk is.
//
// Errors: errdefs.ErrNotFound if it is not staged, errdefs.ErrDataLoss for a record that
// is not one.
func (s Store) Staged(key string) (Staged, error) {
	if err := checkKey(key); err != nil {
		return Staged{}, err
	}
	b, err := read(s.staged(key), maxRecord)
	if err != nil {
		return Staged{}, fmt.Errorf("volume %s is not staged: %w", key, err)
	}
	st, err := decode[Staged](b)
	if err == nil && st.Key() != key {
		err = fmt.Errorf("is of the volume %q of %q: %w", st.Volume, st.Driver, errdefs.ErrDataLoss)
	}
	if err != nil {
		return Staged{}, fmt.Errorf("record of volume %s: %w", key, err)
	}
	return st, nil
}

// Secret reads a secret of a staged volume.
//
// Errors: errdefs.ErrNotFound.
func (s Store) Secret(key, name string) ([]byte, error) {
	if err := checkKey(key); err != nil {
		return nil, err
	}
	if !secretName.MatchString(name) {
		return nil, invalid("volume "+key, "secret", name, "a name of a-z, 0-9 and -")
	}
	b, err := read(filepath.Join(s.secrets(key), name), maxSecret)
	if err != nil {
		return nil, fmt.Errorf("secret %s of volume %s: %w", name, key, err)
	}
	return b, nil
}

// Unstage forgets a volume; it succeeds if there is none.
//
// Errors: errdefs.ErrUnavailable while a VM has it, errdefs.ErrFailedPrecondition while
// it is published.
func (s Store) Unstage(key string) error {
	if err := checkKey(key); err != nil {
		return err
	}
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := os.Lstat(s.volume(key)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	uids, err := s.published(key)
	if err != nil {
		return err
	}
	if len(uids) > 0 {
		return fmt.Errorf("volume %s is published to pod %s: %w", key, strings.Join(uids, ", "), errdefs.ErrFailedPrecondition)
	}
	f, err := s.Lease(key, true)
	switch {
	case errdefs.IsNotFound(err): // half made, or half removed
	case err != nil:
		return err
	default:
		defer f.Close()
	}
	// The record goes first: what is left after a crash is no volume.
	if err := remove(s.staged(key)); err != nil {
		return fmt.Errorf("unstage volume %s: %w", key, err)
	}
	for _, dir := range []string{s.secrets(key), s.volume(key)} {
		if err := os.RemoveAll(dir); err != nil {
			return fmt.Errorf("unstage volume %s: %w", key, err)
		}
	}
	return nil
}

// Publish writes that a Pod has a staged volume; again it replaces the publication. While
// the Pod's VM has the volume only the placeholder may be another one.
//
// Errors: errdefs.ErrNotFound if it is not staged, errdefs.ErrInvalidArgument,
// errdefs.ErrFailedPrecondition.
func (s Store) Publish(key string, p Publication) error {
	p.Version = Version
	b, err := encode(&p)
	if err != nil {
		return err
	}
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := s.Staged(key); err != nil {
		return err
	}
	if err := touch(s.podLease(key, p.PodUID)); err != nil {
		return fmt.Errorf("publish volume %s: %w", key, err)
	}
	old, err := s.Publication(key, p.PodUID)
	if err == nil && reflect.DeepEqual(old, p) {
		return nil
	}
	if err == nil || !errdefs.IsNotFound(err) {
		f, err := s.PodLease(key, p.PodUID)
		if errdefs.IsUnavailable(err) && samePlace(old, p) {
			return s.replacePublication(key, p.PodUID, b)
		} else if errdefs.IsUnavailable(err) {
			return fmt.Errorf("volume %s is published in another way, and %w: %w", key, err, errdefs.ErrFailedPrecondition)
		} else if err != nil {
			return err
		}
		defer f.Close()
	}
	return s.replacePublication(key, p.PodUID, b)
}

// samePlace tells whether a VM that has a need not know about b.
func samePlace(a, b Publication) bool {
	a.Target, a.Device = b.Target, b.Device
	return reflect.DeepEqual(a, b)
}

func (s Store) replacePublication(key, podUID string, b []byte) error {
	if err := atomicfile.Write(s.publication(key, podUID), b, 0o600); err != nil {
		return fmt.Errorf("publish volume %s: %w", key, err)
	}
	return nil
}

// Publication reads how a Pod has a volume.
//
// Errors: errdefs.ErrNotFound, errdefs.ErrDataLoss.
func (s Store) Publication(key, podUID string) (Publication, error) {
	if err := errors.Join(checkKey(key), checkPod(podUID)); err != nil {
		return Publication{}, err
	}
	b, err := read(s.publication(key, podUID), maxRecord)
	if err != nil {
		return Publication{}, fmt.Errorf("volume %s is not published to pod %s: %w", key, podUID, err)
	}
	p, err := decode[Publication](b)
	if err == nil && p.PodUID != podUID {
		err = fmt.Errorf("is of pod %s: %w", p.PodUID, errdefs.ErrDataLoss)
	}
	if err != nil {
		return Publication{}, fmt.Errorf("publication of volume %s to pod %s: %w", key, podUID, err)
	}
	return p, nil
}

// Publications reads how every Pod of the node that has a volume has it; of one that is
// not there, none.
func (s Store) Publications(key string) ([]Publication, error) {
	uids, err := s.published(key)
	if err != nil {
		return nil, err
	}
	var out []Publication
	for _, uid := range uids {
		p, err := s.Publication(key, uid)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	return out, nil
}

// published returns the UIDs of Pods with a publication, in order.
func (s Store) published(key string) ([]string, error) {
	if err := checkKey(key); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(s.pods(key))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("publications of volume %s: %w", key, err)
	}
	var out []string
	for _, e := range entries {
		if uid, ok := strings.CutSuffix(e.Name(), ".json"); ok {
			out = append(out, uid)
		}
	}
	return out, nil
}

// Unpublish forgets that a Pod has a volume, and with its last one where its shim was; it
// succeeds if that is so already.
//
// Errors: errdefs.ErrUnavailable while the Pod's VM has it.
func (s Store) Unpublish(key, podUID string) error {
	if err := errors.Join(checkKey(key), checkPod(podUID)); err != nil {
		return err
	}
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	f, err := s.PodLease(key, podUID)
	switch {
	case errdefs.IsNotFound(err):
	case err != nil:
		return err
	default:
		defer f.Close()
	}
	for _, path := range []string{s.publication(key, podUID), s.podLease(key, podUID)} {
		if err := remove(path); err != nil {
			return fmt.Errorf("unpublish volume %s: %w", key, err)
		}
	}
	// A shim that was killed leaves its address.
	if left, err := filepath.Glob(filepath.Join(s.volumes(), "*", "pods", podUID+".json")); err != nil || len(left) > 0 {
		return err
	}
	if err := remove(s.shim(podUID)); err != nil {
		return fmt.Errorf("unpublish volume %s: %w", key, err)
	}
	return nil
}

// ForPod returns the volumes of a Pod, in the order of their keys.
//
// Errors: errdefs.ErrDataLoss for a record that is not one, or a publication of a volume
// that is not staged.
func (s Store) ForPod(podUID string) ([]Attachment, error) {
	if err := checkPod(podUID); err != nil {
		return nil, err
	}
	keys, err := s.Keys()
	if err != nil {
		return nil, err
	}
	var out []Attachment
	for _, key := range keys {
		p, err := s.Publication(key, podUID)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		st, err := s.Staged(key)
		if errdefs.IsNotFound(err) {
			return nil, fmt.Errorf("volume %s is published to pod %s but not staged: %w", key, podUID, errdefs.ErrDataLoss)
		}
		if err != nil {
			return nil, err
		}
		out = append(out, Attachment{Key: key, Staged: st, Publication: p})
	}
	return out, nil
}

// Keys returns the volumes there are, also what is left of half made ones.
func (s Store) Keys() ([]string, error) {
	entries, err := os.ReadDir(s.volumes())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("volumes of the node: %w", err)
	}
	if len(entries) > maxVolumes {
		return nil, fmt.Errorf("%s has %d volumes, over %d: %w", s.volumes(), len(entries), maxVolumes, errdefs.ErrResourceExhausted)
	}
	var out []string
	for _, e := range entries {
		if checkKey(e.Name()) != nil {
			return nil, fmt.Errorf("%s has %q, which is no volume: %w", s.volumes(), e.Name(), errdefs.ErrDataLoss)
		}
		out = append(out, e.Name())
	}
	slices.Sort(out)
	return out, nil
}

// Sweep removes what crashes have left: half written files, volumes that are not staged
// and that no VM has, and the addresses of shims whose Pod has no volume. Call it when
// the plugin starts.
func (s Store) Sweep() error {
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	var errs []error
	for _, pattern := range []string{"volumes/*/*", "volumes/*/pods/*", "secrets/*/*", "pods/*"} {
		// The pattern is well formed, and below Root are our names only.
		left, _ := filepath.Glob(filepath.Join(s.root(), pattern+atomicfile.Suffix))
		for _, path := range left {
			errs = append(errs, remove(path))
		}
	}
	keys, err := s.Keys()
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	pods := map[string]bool{}
	for _, key := range keys {
		uids, err := s.published(key)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for _, uid := range uids {
			pods[uid] = true
		}
		if _, err := os.Lstat(s.staged(key)); !errors.Is(err, fs.ErrNotExist) || len(uids) > 0 {
			continue
		}
		f, err := s.Lease(key, true)
		if err != nil && !errdefs.IsNotFound(err) {
			continue // a VM has it: its Unstage comes, and comes again
		}
		errs = append(errs, os.RemoveAll(s.volume(key)))
		if f != nil {
			_ = f.Close()
		}
	}
	shims, err := os.ReadDir(filepath.Join(s.root(), "pods"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	for _, e := range shims {
		if !pods[e.Name()] {
			errs = append(errs, remove(filepath.Join(s.root(), "pods", e.Name())))
		}
	}
	return errors.Join(errs...)
}

// SetShim writes where a Pod's shim listens.
func (s Store) SetShim(podUID, address string) error {
	if err := checkPod(podUID); err != nil {
		return err
	}
	if err := checkAddress(address); err != nil {
		return err
	}
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if err := os.MkdirAll(filepath.Dir(s.shim(podUID)), 0o700); err != nil {
		return fmt.Errorf("address of pod %s: %w", podUID, err)
	}
	if err := atomicfile.Write(s.shim(podUID), []byte(address), 0o600); err != nil {
		return fmt.Errorf("address of pod %s: %w", podUID, err)
	}
	return nil
}

// Shim returns where a Pod's shim listens. That is what was written: nobody may listen.
//
// Errors: errdefs.ErrNotFound.
func (s Store) Shim(podUID string) (string, error) {
	if err := checkPod(podUID); err != nil {
		return "", err
	}
	b, err := read(s.shim(podUID), maxShim)
	if err != nil {
		return "", fmt.Errorf("shim of pod %s: %w", podUID, err)
	}
	if err := checkAddress(string(b)); err != nil {
		return "", err
	}
	return string(b), nil
}

// RemoveShim removes the address if it is this one: another sandbox of the same Pod may
// have put its own there.
func (s Store) RemoveShim(podUID, address string) error {
	if err := checkPod(podUID); err != nil {
		return err
	}
	if _, err := os.Lstat(s.shim(podUID)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if b, err := read(s.shim(podUID), maxShim); err == nil && string(b) != address {
		return nil
	}
	return remove(s.shim(podUID))
}

func checkAddress(address string) error {
	path, ok := strings.CutPrefix(address, "unix://")
	if !ok || len(address) > maxShim || !filepath.IsAbs(path) || filepath.Clean(path) != path || strings.ContainsAny(path, "\x00\n") {
		return invalid("shim", "address", address, fmt.Sprintf("unix:// and an absolute path, at most %d bytes", maxShim))
	}
	return nil
}

// lock serialises changes of all processes.
func (s Store) lock() (unlock func(), err error) {
	if err := os.MkdirAll(s.volumes(), 0o700); err != nil {
		return nil, fmt.Errorf("volume records: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(s.root(), "lock"), os.O_CREATE|os.O_RDONLY|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("volume records: %w", err)
	}
	if err := flock(f, unix.LOCK_EX); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("volume records: lock: %w", err)
	}
	return func() { _ = f.Close() }, nil
}

// touch makes a file to lock and keeps one that is there: a VM may have it locked.
func touch(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	return f.Close()
}

func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// read reads a file of at most limit bytes.
func read(path string, limit int) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errdefs.ErrNotFound
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, int64(limit)+1))
	if err != nil {
		return nil, err
	}
	if len(b) > limit {
		return nil, fmt.Errorf("has over %d bytes: %w", limit, errdefs.ErrDataLoss)
	}
	return b, nil
}
