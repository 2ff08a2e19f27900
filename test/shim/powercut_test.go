package shim

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/test/ledger"
	"github.com/hypernetes/hypernetes/test/writelog"
	"github.com/hypernetes/hypernetes/volume/record"
)

// recorder is a disk whose writes are recorded: a loop device on a file that QEMU's storage
// daemon serves through FUSE, with its driver blklogwrites between that and the image. To
// the shim it is a disk like any other. The device is there because it asks for one thing
// after the other: the daemon of QEMU 7.2 takes a request's data for another's when there
// are several.
type recorder struct {
	t                  *testing.T
	device             string
	served, image, log string
	daemon             *exec.Cmd
	ended              chan struct{}
}

const fuseMagic = 0x65735546

func newRecorder(t *testing.T, dir string) *recorder {
	t.Helper()
	for _, p := range []string{"qemu-storage-daemon", "losetup", "e2fsck", "debugfs"} {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("skipped: %v: install the Debian packages qemu-system-common and e2fsprogs", err)
		}
	}
	r := &recorder{t: t, served: filepath.Join(dir, "recorded"), image: filepath.Join(dir, "image"), log: filepath.Join(dir, "log")}
	for _, f := range []string{r.served, r.image, r.log} {
		check(t, os.WriteFile(f, nil, 0o600))
	}
	check(t, os.Truncate(r.image, diskBytes))
	// Without discard=unmap the daemon answers that it has punched a hole, and has not.
	r.daemon = exec.Command("qemu-storage-daemon",
		"--blockdev", "driver=file,node-name=image,discard=unmap,filename="+r.image, "--blockdev", "driver=file,node-name=log,filename="+r.log,
		"--blockdev", "driver=blklogwrites,node-name=disk,discard=unmap,file=image,log=log,log-super-update-interval=1",
		"--export", "fuse,id=disk,node-name=disk,writable=on,allow-other=on,mountpoint="+r.served)
	var said bytes.Buffer
	r.daemon.Stdout, r.daemon.Stderr = &said, &said
	check(t, r.daemon.Start())
	r.ended = make(chan struct{})
	go func() {
		defer close(r.ended)
		_ = r.daemon.Wait()
	}()
	t.Cleanup(r.stop)
	for !r.serves() {
		select {
		case <-r.ended:
			t.Skipf("skipped: qemu-storage-daemon serves no files here: %s", said.String())
		case <-time.After(20 * time.Millisecond):
		}
	}
	// Nothing is read ahead, for the same reason.
	var st unix.Stat_t
	check(t, unix.Stat(r.served, &st))
	check(t, os.WriteFile(fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", unix.Major(st.Dev), unix.Minor(st.Dev)), []byte("0"), 0))
	out, err := exec.Command("losetup", "--find", "--show", "--direct-io=off", r.served).CombinedOutput()
	if err != nil {
		t.Skipf("skipped: no loop device: %v: %s", err, out)
	}
	r.device = strings.TrimSpace(string(out))
	return r
}

func (r *recorder) serves() bool {
	var st unix.Statfs_t
	return unix.Statfs(r.served, &st) == nil && st.Type == fuseMagic
}

// stop ends recording; all that was written is in the log then.
func (r *recorder) stop() {
	if r.device != "" {
		if out, err := exec.Command("losetup", "--detach", r.device).CombinedOutput(); err != nil {
			r.t.Errorf("%v: %s", err, out)
		}
		r.device = ""
	}
	_ = r.daemon.Process.Signal(unix.SIGTERM)
	select {
	case <-r.ended:
	case <-time.After(20 * time.Second):
		r.t.Error("qemu-storage-daemon does not end")
		_ = r.daemon.Process.Kill()
		<-r.ended
	}
	_ = unix.Unmount(r.served, unix.MNT_DETACH) // it mostly has
}

// length of the log, behind all that was answered.
func (r *recorder) length() int64 {
	r.t.Helper()
	st, err := os.Stat(r.log)
	check(r.t, err)
	return st.Size()
}

// read is the log, and the disk it says there is must be the one there is.
func (r *recorder) read() *writelog.Log {
	r.t.Helper()
	f, err := os.Open(r.log)
	check(r.t, err)
	r.t.Cleanup(func() { _ = f.Close() })
	l, err := writelog.Read(f, r.length(), diskBytes)
	check(r.t, err)
	all := filepath.Join(filepath.Dir(r.log), "all")
	save(r.t, replay(r.t, l, 0, len(l.Entries), nil), all)
	if out, err := exec.Command("cmp", all, r.image).CombinedOutput(); err != nil {
		r.t.Fatalf("the log makes another disk than the one that was written: %s", out)
	}
	return l
}

func replay(t *testing.T, l *writelog.Log, from, to int, keep func(int, int64) bool) writelog.Disk {
	t.Helper()
	d := writelog.Disk{}
	check(t, d.Apply(l, from, to, keep))
	return d
}

func save(t *testing.T, d writelog.Disk, path string) {
	t.Helper()
	check(t, d.Save(path, diskBytes))
}

// kept is what a writer said: how many records are durable, when the log had a length.
type kept struct {
	records int
	length  int64
}

// write runs a Pod's container that keeps a ledger, and another program that writes and
// waits for nothing, until so many records are durable; then the VM is gone.
func (r *recorder) write(n *node, s *shim, records int) []kept {
	r.t.Helper()
	pid := s.up()
	lines := s.lines("writer", `mkdir -p /data/ledger; i=0
while i=$((i+1)); do mkdir -p /data/n$((i%7)); echo $i >/data/n$((i%7))/f$i; /usr/bin/busybox rm -rf /data/n$(((i+3)%7)); done &
exec testbox ledger -interval 1ms /data/ledger`, n.mounted)
	var said []kept
	for line := range lines {
		var k kept
		if _, err := fmt.Sscanf(line, "kept %d", &k.records); err == nil {
			k.length = r.length()
			said = append(said, k)
		}
		if k.records >= records {
			break
		}
	}
	if len(said) == 0 {
		r.t.Fatal("the writer wrote nothing")
	}
	check(r.t, unix.Kill(pid, unix.SIGKILL))
	_, err := s.sandbox.WaitSandbox(s.ctx(), &sandboxapi.WaitSandboxRequest{SandboxID: s.id})
	check(r.t, err)
	return said
}

// promised is how many records must be there when the power goes after each entry of a log
// with which all before is durable, by entry. What a writer was told came of what was
// durable by then.
func promised(t *testing.T, l *writelog.Log, said []kept) map[int]int {
	t.Helper()
	out, most, next := map[int]int{}, 0, 0
	cuts := slices.Collect(l.Cuts())
	for i, cut := range cuts {
		for next < len(said) && (i+1 == len(cuts) || said[next].length < l.Entries[cuts[i+1]].End) {
			if i == 0 && said[next].length < l.Entries[cut].End {
				t.Fatalf("the writer was told that record %d is durable, and nothing was", said[next].records)
			}
			most = said[next].records
			next++
		}
		out[cut] = most
	}
	return out
}

// survives checks a disk as it was when the power went: its file system is whole once its
// journal is replayed, and has the records.
func survives(image string, records int) error {
	check := func(name string, args ...string) error {
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
		}
		return nil
	}
	if err := errors.Join(check("e2fsck", "-p", "-E", "journal_only", image), check("e2fsck", "-p", image), check("e2fsck", "-fn", image)); err != nil {
		return err
	}
	dir := image + ".files"
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	// debugfs has no exit code for what fails; the ledger is then not there.
	if err := check("debugfs", "-R", "rdump /ledger "+dir, image); err != nil {
		return err
	}
	s, err := ledger.Read(filepath.Join(dir, "ledger"))
	if err == nil && s.Records < records {
		err = fmt.Errorf("%d records are there, and %d were acknowledged", s.Records, records)
	}
	return err
}

// TestPowerCut has a Pod write to its volume, and looks at what there was on the disk
// whenever it had said that something is durable: all that the Pod was told is there, and
// the file system is whole, whatever became of what was still to be written.
func TestPowerCut(t *testing.T) {
	if testing.Short() {
		t.Skip("skipped: -short: it replays a disk's writes a hundred times")
	}
	n := newNode(t)
	r := newRecorder(t, n.dir)
	st := n.fs.Staged
	st.Source = record.Source{File: &record.File{Path: r.device}}
	check(t, n.store.Stage(st, nil))
	box := testbox(t)
	said := r.write(n, n.start(box), 60)
	r.stop()
	l := r.read()
	must := promised(t, l, said)
	var before, after []int
	for cut := range l.Cuts() {
		if must[cut] == 0 {
			before = append(before, cut)
		} else {
			after = append(after, cut)
		}
	}
	last := said[len(said)-1].records
	t.Logf("%d requests, durable after %d of them, of which %d came before the first record; %d records", len(l.Entries), len(must), len(before), last)
	if len(after) < last || len(before) == 0 {
		t.Fatalf("what was said of %d records was made durable only %d times", last, len(after))
	}
	seed := uint64(time.Now().UnixNano())
	random := rand.New(rand.NewPCG(seed, 0))
	t.Logf("seed %d", seed)
	image := filepath.Join(n.dir, "cut")
	// torn is the disk after an entry, with some pages of what came before it was durable.
	torn := func(cut int) writelog.Disk {
		d := replay(t, l, 0, cut+1, nil)
		next := cut + 1
		for next < len(l.Entries) && !l.Entries[next].Durable() {
			next++
		}
		check(t, d.Apply(l, cut+1, next, func(int, int64) bool { return random.IntN(2) == 0 }))
		return d
	}
	sample := slices.Clone(after)
	random.Shuffle(len(sample), func(i, j int) { sample[i], sample[j] = sample[j], sample[i] })
	sample = sample[:min(len(sample), 40)]
	for _, cut := range append(sample, after[len(after)-1]) {
		for name, d := range map[string]writelog.Disk{"just then": replay(t, l, 0, cut+1, nil), "later": torn(cut)} {
			save(t, d, image)
			if err := survives(image, must[cut]); err != nil {
				t.Errorf("power cut after request %d, %s: %v", cut, name, err)
			}
		}
	}

	// This would be seen: a disk that loses a page that it said is durable. Of the pages
	// that have the number, the one with the record is missed, and not the head, which was
	// written again since.
	final, missed := after[len(after)-1], 0
	for i := range l.Entries[:final] {
		b, err := l.Content(i)
		check(t, err)
		at := bytes.Index(b, fmt.Appendf(nil, " %d %d.%d.", last-2, last-2, last-2))
		if at < 0 {
			continue
		}
		gone := (l.Entries[i].Offset + int64(at)) / 4096
		save(t, replay(t, l, 0, final+1, func(entry int, page int64) bool { return entry < i || page != gone }), image)
		if err := survives(image, must[final]); err != nil {
			missed++
			t.Logf("without page %d of request %d: %v", gone, i, err)
		}
	}
	if missed == 0 {
		t.Error("nobody misses a page that was durable")
	}

	// The Pod's next VM has the disk, and goes on: also with one of which a format was cut.
	for _, cut := range []int{before[random.IntN(len(before))], after[random.IntN(len(after))]} {
		t.Run(fmt.Sprintf("vm after request %d", cut), func(t *testing.T) {
			n := *n
			n.t = t
			save(t, torn(cut), image)
			st.Source.File.Path = image
			check(t, n.store.Stage(st, nil))
			s := n.start(box)
			s.up()
			code, out := s.sh("reader", "mkdir -p /data/ledger; testbox ledger -read /data/ledger && echo more >/data/more", n.mounted).end()
			var has int
			_, _ = fmt.Sscanf(out, "has %d", &has)
			if code != 0 || has < must[cut] {
				t.Errorf("exit code %d, output %q, want %d records", code, out, must[cut])
			}
			_, err := s.sandbox.StopSandbox(s.ctx(), &sandboxapi.StopSandboxRequest{SandboxID: s.id})
			check(t, err)
		})
	}
}
