package record

import (
	"bytes"
	"errors"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/atomicfile"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// memory is a directory where records are on a node too: in memory.
func memory(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "h8s-record-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func group(g uint32) *uint32 { return &g }

func stagedFile() Staged {
	return Staged{
		Version: Version, Driver: "block.hypernetes.io", Volume: "vol-1", Serial: Serial("block.hypernetes.io", "vol-1"),
		SizeBytes: 1 << 30, Format: FormatBlank, Source: Source{File: &File{Path: "/var/lib/h8s-volumes/local/vol-1/disk.raw"}},
		Throttle: &Throttle{IOPS: 500, ReadBPS: 1 << 20},
	}
}

func stagedRBD() Staged {
	const driver, volume = "cinder.csi.openstack.org", "0f7ad2a5-6c6f-4b8c-9d0a-1f0e7c5f2a11"
	return Staged{
		Version: Version, Driver: driver, Volume: volume, Attachment: "a1", Serial: Serial(driver, volume), Shared: true,
		Source: Source{RBD: &RBD{Pool: "volumes", Image: "volume-" + volume, Monitors: []string{"127.0.0.1:6789", "[::1]:3300"}, User: "cinder"}},
	}
}

func stagedISCSI() Staged {
	return Staged{
		Version: Version, Driver: "cinder.csi.openstack.org", Volume: "v3", Serial: "v3", ReadOnly: true,
		Source: Source{ISCSI: &ISCSI{Portal: "10.0.0.1:3260", Target: "iqn.2010-10.org.openstack:volume-3", LUN: 1, Initiator: "iqn.2026-11.io.hypernetes:n1", User: "chap"}},
	}
}

func published(uid string) Publication {
	return Publication{
		Version: Version, PodUID: uid, Target: "/var/lib/kubelet/pods/" + uid + "/volumes/kubernetes.io~csi/pvc/mount", Device: 46,
		Mode: Filesystem, FSType: "ext4", Options: []string{"noatime", "commit=30"}, FSGroup: group(2000),
	}
}

func raw(uid string) Publication {
	return Publication{Version: Version, PodUID: uid, Target: "/var/lib/kubelet/x/" + uid, Device: 0x700, Mode: Block, ReadOnly: true}
}

// TestGolden: the format does not change without its version.
func TestGolden(t *testing.T) {
	check := func(name string, b []byte, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join("testdata", name)
		if *update {
			if err := os.WriteFile(path, b, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil || !bytes.Equal(b, want) {
			t.Errorf("%s: %v, is\n%s", name, err, b)
		}
	}
	for name, s := range map[string]Staged{"staged-file.json": stagedFile(), "staged-rbd.json": stagedRBD(), "staged-iscsi.json": stagedISCSI()} {
		b, err := encode(&s)
		check(name, b, err)
		if again, err := decode[Staged](b); err != nil || !reflect.DeepEqual(again, s) {
			t.Errorf("%s: %v, %+v", name, err, again)
		}
	}
	for name, p := range map[string]Publication{"published-filesystem.json": published("pod-1"), "published-block.json": raw("pod-2")} {
		b, err := encode(&p)
		check(name, b, err)
		if again, err := decode[Publication](b); err != nil || !reflect.DeepEqual(again, p) {
			t.Errorf("%s: %v, %+v", name, err, again)
		}
	}
	if k := Key("d", "v"); k != "92c71a12adc1d406aa77866a10dd69a6" {
		t.Errorf("key %s", k)
	}
	if Key("a", "bc") == Key("ab", "c") || Serial("a", "b") == Serial("a", "c") || !serialPattern.MatchString(Serial("a", "b")) {
		t.Error("keys and serials do not tell volumes apart")
	}
}

// TestDecodeIsStrict: every byte of a record matters.
func TestDecodeIsStrict(t *testing.T) {
	s := stagedFile()
	good, err := encode(&s)
	if err != nil {
		t.Fatal(err)
	}
	for name, edit := range map[string]func(string) string{
		"empty":         func(string) string { return "" },
		"cut":           func(b string) string { return b[:len(b)-3] },
		"trailing":      func(b string) string { return b + "{}" },
		"newline":       func(b string) string { return b + "\n" },
		"unknown field": func(b string) string { return strings.Replace(b, "{", "{\n  \"more\": 1,", 1) },
		"twice":         func(b string) string { return strings.Replace(b, "{", "{\n  \"version\": 1,", 1) },
		"version":       func(b string) string { return strings.Replace(b, `"version": 1`, `"version": 2`, 1) },
		"no version":    func(b string) string { return strings.Replace(b, "\n  \"version\": 1,", "", 1) },
		"no serial":     func(b string) string { return strings.Replace(b, `"serial"`, `"attachment"`, 1) },
		"letters":       func(b string) string { return strings.Replace(b, `"driver"`, `"Driver"`, 1) },
		"type":          func(b string) string { return strings.Replace(b, `"vol-1"`, `7`, 1) },
		"relative path": func(b string) string { return strings.Replace(b, `"/var`, `"var`, 1) },
		"null":          func(string) string { return "null\n" },
	} {
		b := edit(string(good))
		if b == string(good) {
			t.Errorf("%s: the test changes nothing", name)
		}
		if _, err := decode[Staged]([]byte(b)); !errdefs.IsDataLoss(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestRefused(t *testing.T) {
	s := Store{Root: memory(t)}
	for name, edit := range map[string]func(*Staged){
		"no source":   func(v *Staged) { v.Source = Source{} },
		"two sources": func(v *Staged) { v.Source.RBD = stagedRBD().Source.RBD },
		"dots":        func(v *Staged) { v.Source.File = &File{Path: "/a/../b"} },
		"nul":         func(v *Staged) { v.Source.File = &File{Path: "/a\x00"} },
		"pool":        func(v *Staged) { v.Source = stagedRBD().Source; v.Source.RBD.Pool = "a/b" },
		"user":        func(v *Staged) { v.Source = stagedRBD().Source; v.Source.RBD.User = "a,b" },
		"no monitors": func(v *Staged) { v.Source = stagedRBD().Source; v.Source.RBD.Monitors = nil },
		"monitor":     func(v *Staged) { v.Source = stagedRBD().Source; v.Source.RBD.Monitors = []string{"h"} },
		"port":        func(v *Staged) { v.Source = stagedRBD().Source; v.Source.RBD.Monitors = []string{"h:70000"} },
		"target":      func(v *Staged) { v.Source = stagedISCSI().Source; v.Source.ISCSI.Target = "x" },
		"lun":         func(v *Staged) { v.Source = stagedISCSI().Source; v.Source.ISCSI.LUN = -1 },
		"serial":      func(v *Staged) { v.Serial = "a b" },
		"size":        func(v *Staged) { v.SizeBytes = -1 },
		"volume":      func(v *Staged) { v.Volume = strings.Repeat("a", 129) },
		"control":     func(v *Staged) { v.Volume = "a\nb" },
		"format":      func(v *Staged) { v.Format = "always" },
		"throttle":    func(v *Staged) { v.Throttle = &Throttle{IOPS: 1, ReadIOPS: 1} },
	} {
		v := stagedFile()
		edit(&v)
		if err := s.Stage(v, nil); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := s.Stage(stagedFile(), map[string][]byte{"../key": []byte("x")}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("secret's name: %v", err)
	}
	if err := s.Stage(stagedFile(), nil); err != nil {
		t.Fatal(err)
	}
	key := stagedFile().Key()
	for name, edit := range map[string]func(*Publication){
		"pod":     func(p *Publication) { p.PodUID = "../x" },
		"target":  func(p *Publication) { p.Target = "x" },
		"device":  func(p *Publication) { p.Device = 0 },
		"mode":    func(p *Publication) { p.Mode = "" },
		"fs":      func(p *Publication) { p.FSType = "btrfs" },
		"option":  func(p *Publication) { p.Options = []string{"a b"} },
		"options": func(p *Publication) { p.Options = make([]string, maxOptions+1) },
		"raw fs":  func(p *Publication) { p.Mode = Block },
	} {
		p := published("pod-1")
		edit(&p)
		if err := s.Publish(key, p); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, key := range []string{"", "..", "../../etc", strings.Repeat("A", 32)} {
		if _, err := s.Staged(key); !errdefs.IsInvalidArgument(err) {
			t.Errorf("key %q: %v", key, err)
		}
	}
}

// TestLife is a volume's from staging to unstaging, every step done twice.
func TestLife(t *testing.T) {
	s := Store{Root: memory(t)}
	st, key := stagedFile(), stagedFile().Key()
	if a, err := s.ForPod("pod-1"); err != nil || a != nil {
		t.Fatalf("before: %v %v", a, err)
	}
	if err := s.Publish(key, published("pod-1")); !errdefs.IsNotFound(err) {
		t.Fatalf("publish before stage: %v", err)
	}
	for range 2 {
		if err := s.Stage(st, map[string][]byte{SecretKey: []byte("k"), "old": []byte("o")}); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Stage(st, map[string][]byte{SecretKey: []byte("k2")}); err != nil {
		t.Fatal(err)
	}
	if b, err := s.Secret(key, SecretKey); err != nil || string(b) != "k2" {
		t.Errorf("secret %q, %v", b, err)
	}
	if _, err := s.Secret(key, "old"); !errdefs.IsNotFound(err) {
		t.Errorf("a secret stays: %v", err)
	}
	if fi, err := os.Stat(filepath.Join(s.secrets(key), SecretKey)); err != nil || fi.Mode().Perm() != 0o400 {
		t.Errorf("secret is %v, %v", fi.Mode(), err)
	}
	for range 2 {
		if err := s.Publish(key, published("pod-1")); err != nil {
			t.Fatal(err)
		}
	}
	a, err := s.ForPod("pod-1")
	if err != nil || len(a) != 1 || a[0].Key != key || !reflect.DeepEqual(a[0].Staged, st) || !reflect.DeepEqual(a[0].Publication, published("pod-1")) {
		t.Fatalf("for pod: %+v, %v", a, err)
	}
	if a, err := s.ForPod("pod-2"); err != nil || a != nil {
		t.Errorf("another pod: %v %v", a, err)
	}
	if err := s.Unstage(key); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("unstage while published: %v", err)
	}
	held, err := s.Take(a[0])
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Take(a[0]); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "pod pod-1 still") {
		t.Errorf("taken twice: %v", err)
	}
	if err := s.Unpublish(key, "pod-1"); !errdefs.IsUnavailable(err) {
		t.Errorf("unpublish under a VM: %v", err)
	}
	st.SizeBytes *= 2
	if err := s.Stage(st, nil); err != nil {
		t.Errorf("a new size under a VM: %v", err)
	}
	other := st
	other.Source = Source{File: &File{Path: "/other"}}
	if err := s.Stage(other, nil); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("another disk under a VM: %v", err)
	}
	ro := published("pod-1")
	ro.ReadOnly = true
	if err := s.Publish(key, ro); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("another publication under a VM: %v", err)
	}
	moved := published("pod-1")
	moved.Device++
	if err := s.Publish(key, moved); err != nil {
		t.Errorf("another placeholder under a VM: %v", err)
	}
	if p, err := s.Publication(key, "pod-1"); err != nil || p.Device != moved.Device {
		t.Errorf("%+v %v", p, err)
	}
	for _, f := range held {
		_ = f.Close()
	}
	if err := s.SetShim("pod-1", "unix:///run/killed"); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := s.Unpublish(key, "pod-1"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Shim("pod-1"); !errdefs.IsNotFound(err) {
		t.Errorf("a killed shim's address is left: %v", err)
	}
	for range 2 {
		if err := s.Unstage(key); err != nil {
			t.Fatal(err)
		}
	}
	if keys, err := s.Keys(); err != nil || len(keys) != 0 {
		t.Errorf("left: %v %v", keys, err)
	}
}

// TestShares: readers and raw devices of a shared volume go together, a writer of a file
// system with nobody; one of several may leave while the others stay.
func TestShares(t *testing.T) {
	s := Store{Root: memory(t)}
	st, key := stagedRBD(), stagedRBD().Key()
	if err := s.Stage(st, nil); err != nil {
		t.Fatal(err)
	}
	writable := raw("pod-2")
	writable.ReadOnly = false
	reader := published("pod-3")
	reader.ReadOnly = true
	attach := func(p Publication) Attachment {
		t.Helper()
		if err := s.Publish(key, p); err != nil {
			t.Fatal(err)
		}
		return Attachment{Key: key, Staged: st, Publication: p}
	}
	take := func(a Attachment) []*os.File {
		t.Helper()
		f, err := s.Take(a)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	one, two := take(attach(writable)), take(attach(reader))
	if _, err := s.Take(attach(published("pod-4"))); !errdefs.IsUnavailable(err) {
		t.Errorf("a writer beside others: %v", err)
	}
	for _, f := range one {
		_ = f.Close()
	}
	if err := s.Unpublish(key, "pod-2"); err != nil {
		t.Errorf("one of two leaves: %v", err)
	}
	if err := s.Unpublish(key, "pod-3"); !errdefs.IsUnavailable(err) {
		t.Errorf("the other has left: %v", err)
	}
	for _, f := range two {
		_ = f.Close()
	}
	if err := errors.Join(s.Unpublish(key, "pod-3"), s.Unpublish(key, "pod-4"), s.Unstage(key)); err != nil {
		t.Error(err)
	}
}

// TestLeaseOutlivesItsTaker: the lease is the inheriting process's until it is killed.
func TestLeaseOutlivesItsTaker(t *testing.T) {
	s := Store{Root: memory(t)}
	st := stagedFile()
	if err := errors.Join(s.Stage(st, nil), s.Publish(st.Key(), published("pod-1"))); err != nil {
		t.Fatal(err)
	}
	files, err := s.Take(Attachment{Key: st.Key(), Staged: st, Publication: published("pod-1")})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sleep", "1000")
	cmd.ExtraFiles = files
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		_ = f.Close()
	}
	if err := s.Unpublish(st.Key(), "pod-1"); !errdefs.IsUnavailable(err) {
		t.Errorf("the process has it: %v", err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if err := errors.Join(s.Unpublish(st.Key(), "pod-1"), s.Unstage(st.Key())); err != nil {
		t.Errorf("the process is gone: %v", err)
	}
}

// TestLeaseOfARemovedVolume is none, whoever comes late.
func TestLeaseOfARemovedVolume(t *testing.T) {
	s := Store{Root: memory(t)}
	st := stagedFile()
	if err := s.Stage(st, nil); err != nil {
		t.Fatal(err)
	}
	path := s.lease(st.Key())
	f, err := take(path, unix.LOCK_EX)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Remove(path), touch(path)); err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	if err := os.RemoveAll(s.volume(st.Key())); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Lease(st.Key(), true); !errdefs.IsNotFound(err) {
		t.Errorf("lease: %v", err)
	}
}

// TestDamaged: what cannot be read is an error, never no volume.
func TestDamaged(t *testing.T) {
	damage := map[string]func(s Store, key string) error{
		"staged cut":      func(s Store, key string) error { return os.Truncate(s.staged(key), 10) },
		"staged gone":     func(s Store, key string) error { return os.Remove(s.staged(key)) },
		"staged huge":     func(s Store, key string) error { return os.Truncate(s.staged(key), 1<<20) },
		"publication cut": func(s Store, key string) error { return os.Truncate(s.publication(key, "pod-1"), 0) },
		"another pod's": func(s Store, key string) error {
			p := published("pod-9")
			b, err := encode(&p)
			return errors.Join(err, os.WriteFile(s.publication(key, "pod-1"), b, 0o600))
		},
		"another volume's": func(s Store, key string) error {
			o := stagedRBD()
			b, err := encode(&o)
			return errors.Join(err, os.WriteFile(s.staged(key), b, 0o600))
		},
		"directory": func(s Store, _ string) error { return os.Mkdir(filepath.Join(s.volumes(), "x"), 0o700) },
		"link": func(s Store, key string) error {
			return errors.Join(os.Rename(s.staged(key), s.staged(key)+"2"), os.Symlink("staged.json2", s.staged(key)))
		},
	}
	for name, do := range damage {
		s, st := Store{Root: memory(t)}, stagedFile()
		if err := errors.Join(s.Stage(st, nil), s.Publish(st.Key(), published("pod-1")), do(s, st.Key())); err != nil {
			t.Fatal(err)
		}
		if a, err := s.ForPod("pod-1"); err == nil {
			t.Errorf("%s: %+v", name, a)
		}
	}
}

// TestCrash: whatever of the files a crash leaves, the same step again makes it whole,
// and until then a Pod has the volume or an error.
func TestCrash(t *testing.T) {
	full := memory(t)
	s, st := Store{Root: full}, stagedFile()
	key := st.Key()
	if err := errors.Join(s.Stage(st, map[string][]byte{SecretKey: []byte("k")}), s.Publish(key, published("pod-1"))); err != nil {
		t.Fatal(err)
	}
	var files []string
	err := filepath.WalkDir(full, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			rel, _ := filepath.Rel(full, path)
			files = append(files, rel)
		}
		return err
	})
	if err != nil || len(files) != 6 {
		t.Fatalf("%v, %v", files, err)
	}
	for mask := range 1 << len(files) {
		root := memory(t)
		for i, rel := range files {
			path, name := filepath.Join(root, rel), rel
			if mask&(1<<i) == 0 {
				name = rel + atomicfile.Suffix // being written
				path += atomicfile.Suffix
			}
			if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
				t.Fatal(err)
			}
			b, _ := os.ReadFile(filepath.Join(full, rel))
			if strings.HasSuffix(name, atomicfile.Suffix) {
				b = b[:len(b)/2]
			}
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		s := Store{Root: root}
		a, err := s.ForPod("pod-1")
		_, published := os.Stat(s.publication(key, "pod-1"))
		if _, staged := os.Stat(s.staged(key)); published == nil && staged != nil && err == nil || published == nil && staged == nil && len(a) != 1 {
			t.Fatalf("mask %b: %+v %v", mask, a, err)
		}
		if mask%2 == 0 {
			if err := s.Sweep(); err != nil {
				t.Fatalf("mask %b: sweep: %v", mask, err)
			}
		}
		if err := errors.Join(s.Stage(st, map[string][]byte{SecretKey: []byte("k")}), s.Publish(key, testPublication)); err != nil {
			t.Fatalf("mask %b: %v", mask, err)
		}
		if a, err := s.ForPod("pod-1"); err != nil || len(a) != 1 {
			t.Fatalf("mask %b: again: %+v %v", mask, a, err)
		}
		if err := errors.Join(s.Unpublish(key, "pod-1"), s.Unstage(key), s.Sweep()); err != nil {
			t.Fatalf("mask %b: remove: %v", mask, err)
		}
		left, _ := filepath.Glob(filepath.Join(root, "volumes", "*"))
		if len(left) > 0 {
			t.Fatalf("mask %b: left %v", mask, left)
		}
	}
}

var testPublication = published("pod-1")

func TestShim(t *testing.T) {
	s := Store{Root: memory(t)}
	if _, err := s.Shim("pod-1"); !errdefs.IsNotFound(err) {
		t.Errorf("no shim: %v", err)
	}
	for _, address := range []string{"", "tcp://1.2.3.4:5", "unix://x", "unix:///a/../b", "unix:///" + strings.Repeat("a", 300)} {
		if err := s.SetShim("pod-1", address); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", address, err)
		}
	}
	if err := errors.Join(s.SetShim("pod-1", "unix:///run/a"), s.SetShim("pod-1", "unix:///run/b"), s.RemoveShim("pod-1", "unix:///run/a")); err != nil {
		t.Fatal(err)
	}
	if a, err := s.Shim("pod-1"); err != nil || a != "unix:///run/b" {
		t.Errorf("%s, %v", a, err)
	}
	if err := errors.Join(s.RemoveShim("pod-1", "unix:///run/b"), s.RemoveShim("pod-1", "unix:///run/b"), s.SetShim("gone", "unix:///run/c"), s.Sweep()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Shim("gone"); !errdefs.IsNotFound(err) {
		t.Errorf("swept: %v", err)
	}
}

// TestConcurrent: readers see a whole record or none while others change it.
func TestConcurrent(t *testing.T) {
	s, st := Store{Root: memory(t)}, stagedFile()
	key := st.Key()
	var writers, readers sync.WaitGroup
	stop := make(chan struct{})
	for i := range 4 {
		readers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := s.Staged(key); err != nil && !errdefs.IsNotFound(err) {
					t.Errorf("read: %v", err)
					return
				}
			}
		})
		writers.Go(func() {
			st := st
			for n := range 50 {
				st.SizeBytes = int64(i*1000 + n + 1)
				uid := "pod-" + string(rune('a'+i))
				err := s.Stage(st, nil)
				if err == nil {
					err = s.Publish(key, published(uid))
				}
				if err == nil || errdefs.IsNotFound(err) {
					err = s.Unpublish(key, uid)
				}
				if err == nil {
					err = s.Unstage(key)
				}
				if err != nil && !errdefs.IsFailedPrecondition(err) && !errdefs.IsUnavailable(err) {
					t.Errorf("write: %v", err)
				}
			}
		})
	}
	writers.Wait()
	close(stop)
	readers.Wait()
	for _, uid := range []string{"pod-a", "pod-b", "pod-c", "pod-d"} {
		if err := s.Unpublish(key, uid); err != nil {
			t.Error(err)
		}
	}
	if err := s.Unstage(key); err != nil {
		t.Error(err)
	}
}

func FuzzDecode(f *testing.F) {
	for _, name := range []string{"staged-file.json", "staged-rbd.json", "staged-iscsi.json", "published-filesystem.json", "published-block.json"} {
		b, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := decode[Staged](b); err == nil {
			if again, err := encode(&s); err != nil || !slices.Equal(again, b) {
				t.Errorf("%v: %s", err, again)
			}
		}
		if p, err := decode[Publication](b); err == nil {
			if again, err := encode(&p); err != nil || !slices.Equal(again, b) {
				t.Errorf("%v: %s", err, again)
			}
		}
	})
}
