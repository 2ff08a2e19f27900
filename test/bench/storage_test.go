package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hypernetes/hypernetes/runtime/vmm/qemu"
	"github.com/hypernetes/hypernetes/test/artifacts"
	"github.com/hypernetes/hypernetes/test/ceph"
	"github.com/hypernetes/hypernetes/volume/record"
)

// diskMiB is the size of every disk that is measured, all of which has been written.
const diskMiB = 64

// BenchmarkStorage measures a Pod's volumes beside a bare guest's disk and the host's file:
// see the package comment. Each round does every load once at every place.
func BenchmarkStorage(b *testing.B) {
	d := newDepot(b)
	rounds := number("H8S_BENCH_ROUNDS", 5)
	m := samples{}
	at, load := time.Now(), loadAverage()
	for b.Loop() {
		clear(m)
		for round := range rounds + 1 {
			for _, l := range loads {
				for _, p := range d.places {
					d.measure(m, p, l, round > 0) // the first time pays for what is lazily made
				}
			}
		}
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(m.ratio("seq-write ops local", "seq-write ops bare").median(), "local/bare-1MiB-write")
	b.ReportMetric(m.ratio("rand-read-16 ops local", "rand-read-16 ops bare").median(), "local/bare-4KiB-read")
	b.ReportMetric(m.ratio("fsync p50 local", "fsync p50 bare").median(), "local/bare-fsync")
	text, err := json.MarshalIndent(m, "", "  ")
	d.must(err)
	dir := filepath.Join(artifacts.Dir(), "bench")
	d.must(writeFile(filepath.Join(dir, "storage.json"), append(text, '\n')))
	report := m.storageReport(fmt.Sprintf("%s, load at the start %s", machine(b.Context()), load), at)
	d.must(writeFile(filepath.Join(dir, "storage.md"), []byte(report)))
	b.Logf("%s", report)
}

// depot is where disks are measured.
type depot struct {
	b      *testing.B
	dir    string // on a file system that can do without its cache
	places []place
}

// place is somewhere a load can be put on a disk. Its answer is testbox's.
type place struct {
	name string
	// output runs testbox's io with arguments before the file.
	output func(ctx context.Context, l workload) ([]byte, error)
}

func (d *depot) must(err error) {
	d.b.Helper()
	if err != nil {
		d.b.Fatal(err)
	}
}

func newDepot(b *testing.B) *depot {
	b.Helper()
	if os.Getuid() != 0 {
		b.Skip("starting a node needs root")
	}
	out := artifacts.Dir()
	host, err := qemu.Probe(b.Context(), "", "")
	if err != nil {
		b.Skipf("no QEMU: %v", err)
	}
	ks, err := kernels(out)
	if err != nil {
		b.Skipf("no guest kernel: %v", err)
	}
	d := &depot{b: b}
	d.dir, err = os.MkdirTemp("/var/tmp", "h8s-bench-")
	d.must(err)
	b.Cleanup(func() { _ = os.RemoveAll(d.dir) })
	box, initrd := filepath.Join(d.dir, "testbox"), filepath.Join(d.dir, "initrd")
	if text, err := exec.Command("go", "build", "-o", box, "github.com/hypernetes/hypernetes/test/images/testbox").CombinedOutput(); err != nil {
		b.Fatalf("build testbox: %v\n%s", err, text)
	}
	d.must(writeGuestInitrd(initrd, box))
	rt := node(b, out)

	file := d.disk("host")
	d.places = append(d.places, place{"host", func(ctx context.Context, l workload) ([]byte, error) {
		return exec.CommandContext(ctx, box, append([]string{"io"}, append(l.args, file)...)...).Output()
	}})
	if ks[0].Variant == "hyper" {
		d.guest("bare", "/dev/vda", host, ks[0], initrd, nil,
			"-blockdev", "driver=raw,node-name=disk,cache.direct=on,file.driver=file,file.aio=io_uring,file.cache.direct=on,file.filename="+d.disk("bare"),
			"-device", "virtio-blk-pci,drive=disk,disable-legacy=on")
		d.served(host, ks[0], initrd)
	} else {
		b.Logf("no bare guests: Debian's kernel has drivers of disks as modules only: run `make kernel`")
	}
	local := d.pod(rt, "local", record.Source{File: &record.File{Path: d.disk("local")}}, nil)
	d.ceph(rt, local)
	return d
}

// disk makes a file that is full of something.
func (d *depot) disk(name string) string {
	d.b.Helper()
	path := filepath.Join(d.dir, name+".raw")
	random, err := os.Open("/dev/urandom")
	d.must(err)
	defer random.Close()
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	d.must(err)
	defer f.Close()
	for range diskMiB {
		block := make([]byte, 1<<20)
		_, err := random.Read(block)
		d.must(err)
		_, err = f.Write(block)
		d.must(err)
	}
	d.must(f.Sync())
	return path
}

// guest boots a bare guest with a disk.
func (d *depot) guest(name, device string, host qemu.Host, k kernel, initrd string, files []*os.File, devices ...string) {
	d.b.Helper()
	ctx, cancel := context.WithTimeout(d.b.Context(), time.Minute)
	defer cancel()
	g, err := startGuest(ctx, host, k, initrd, files, devices...)
	d.must(err)
	d.b.Cleanup(func() {
		if err := g.stop(); err != nil {
			d.b.Error(err)
		}
	})
	d.places = append(d.places, place{name, func(ctx context.Context, l workload) ([]byte, error) {
		return g.output(ctx, append(l.args, device)...)
	}})
}

// served has bare guests whose disks are files of a storage daemon's: the way of networked
// volumes without what is at its end, as QEMU has it by itself, as package storage sets it
// up, and the one it could go instead.
func (d *depot) served(host qemu.Host, k kernel, initrd string) {
	d.b.Helper()
	if _, err := exec.LookPath("qemu-storage-daemon"); err != nil {
		d.b.Logf("no bare guests with served disks: %v", err)
		return
	}
	nbd := func(name string) *os.File {
		conn := d.daemon(name, "--nbd-server", "addr.type=unix,addr.path="+d.socket(name), "--export", "nbd,id=disk,node-name=disk,name=disk,writable=on")
		defer conn.Close()
		f, err := conn.File()
		d.must(err)
		return f
	}
	overNBD := []string{
		"-blockdev", "driver=raw,node-name=disk,file.driver=nbd,file.server.type=fd,file.server.str=3,file.export=disk",
		"-device", "virtio-scsi-pci,id=scsi,disable-legacy=on", "-device", "scsi-hd,bus=scsi.0,drive=disk",
	}
	plain, tuned := nbd("nbd"), nbd("tuned")
	defer plain.Close()
	defer tuned.Close()
	d.must(unix.SetsockoptInt(int(tuned.Fd()), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 512<<10))
	d.guest("nbd", "/dev/sda", host, k, initrd, []*os.File{plain}, overNBD...)
	d.guest("tuned", "/dev/sda", host, k, initrd, []*os.File{tuned}, overNBD...)
	_ = d.daemon("vhost", "--export", "vhost-user-blk,id=disk,node-name=disk,addr.type=unix,addr.path="+d.socket("vhost")+",writable=on").Close()
	d.guest("vhost", "/dev/vda", host, k, initrd, nil,
		"-object", fmt.Sprintf("memory-backend-memfd,id=ram,size=%dM,share=on", guestMiB), "-machine", "memory-backend=ram",
		"-chardev", "socket,id=disk,path="+d.socket("vhost"), "-device", "vhost-user-blk-pci,chardev=disk,disable-legacy=on")
}

func (d *depot) socket(name string) string { return filepath.Join(d.dir, name) }

// daemon starts a storage daemon with a disk and returns the first connection to it.
func (d *depot) daemon(name string, export ...string) *net.UnixConn {
	d.b.Helper()
	cmd := exec.Command("qemu-storage-daemon", append([]string{
		"--blockdev", "driver=file,node-name=disk,cache.direct=on,aio=io_uring,filename=" + d.disk(name),
	}, export...)...)
	if name == "tuned" {
		cmd.Env = append(os.Environ(), "MALLOC_ARENA_MAX=1", "MALLOC_MMAP_THRESHOLD_=8388608", "MALLOC_TRIM_THRESHOLD_=16777216")
	}
	cmd.Stderr = os.Stderr
	d.must(cmd.Start())
	d.b.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	for try := 0; ; try++ {
		conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: d.socket(name)})
		if err == nil {
			return conn
		}
		if try == 100 {
			d.b.Fatalf("storage daemon: %v", err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// pod starts a Pod with a volume as a raw device, by the records that the node's volume
// plugin would write.
func (d *depot) pod(rt *runtimeService, name string, source record.Source, secrets map[string][]byte) pod {
	d.b.Helper()
	store := record.Store{Root: rt.node.RunPath("volumes")}
	staged := record.Staged{
		Version: record.Version, Driver: "bench", Volume: name, Serial: record.Serial("bench", name), SizeBytes: diskMiB << 20, Source: source,
	}
	// What the kubelet would have there: the shim gives the disk for this device.
	const loop, minor = 7, 250
	number := unix.Mkdev(loop, minor+uint32(len(d.places)))
	placeholder := filepath.Join(d.dir, name+".placeholder")
	uid := "volume-" + name
	d.must(errors.Join(unix.Mknod(placeholder, unix.S_IFBLK|0o600, int(number)), store.Stage(staged, secrets)))
	d.must(store.Publish(staged.Key(), record.Publication{Version: record.Version, PodUID: uid, Target: placeholder, Device: number, Mode: record.Block}))
	ctx, cancel := context.WithTimeout(d.b.Context(), 3*time.Minute)
	defer cancel()
	p, err := rt.runWith(ctx, "hyper", uid, testbox, []*cri.Device{{HostPath: placeholder, ContainerPath: "/dev/disk", Permissions: "rw"}}, "sh", "-c", "echo started; exec sleep 3600")
	d.b.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := errors.Join(rt.remove(ctx, p), store.Unpublish(staged.Key(), uid), store.Unstage(staged.Key())); err != nil {
			d.b.Error(err)
		}
	})
	d.must(err)
	d.places = append(d.places, place{name, func(ctx context.Context, l workload) ([]byte, error) {
		return rt.output(ctx, p, append([]string{"/testbox", "io"}, append(l.args, "/dev/disk")...)...)
	}})
	return p
}

// ceph has a Pod with an image of a cluster in the node's namespace, which is that of other's
// shim, and Ceph's own tool on another image.
func (d *depot) ceph(rt *runtimeService, other pod) {
	d.b.Helper()
	if err := ceph.Missing(); err != nil {
		d.b.Logf("no Pod with a volume of Ceph: %v", err)
		return
	}
	procs, err := processesOf(other.ID)
	d.must(err)
	c := ceph.StartIn(d.b, fmt.Sprintf("/proc/%d/ns/net", procs[0].PID))
	for _, name := range []string{"volume", "alone"} {
		d.disk("to-" + name)
		c.RBD("import", filepath.Join(d.dir, "to-"+name+".raw"), "volumes/"+name)
	}
	d.places = append(d.places, place{"rbd", func(_ context.Context, l workload) ([]byte, error) {
		if l.rbd == nil {
			return nil, nil
		}
		return rbdBench(c.RBD(append(append([]string{"bench", "--rbd-cache=false"}, l.rbd...), "volumes/alone")...))
	}})
	d.pod(rt, "ceph", record.Source{RBD: &record.RBD{Pool: "volumes", Image: "volume", Monitors: []string{c.Monitor}, User: "cinder"}},
		map[string][]byte{record.SecretKey: []byte(c.Key())})
}

// measure puts a load on a place and keeps what came of it, unless it is not to count.
func (d *depot) measure(m samples, p place, l workload, counts bool) {
	d.b.Helper()
	ctx, cancel := context.WithTimeout(d.b.Context(), time.Minute)
	defer cancel()
	out, err := p.output(ctx, l)
	if err != nil {
		d.b.Fatalf("%s at %s: %v", strings.Join(l.args, " "), p.name, err)
	}
	if len(out) == 0 || !counts {
		return
	}
	d.must(m.addLoad(l.name, p.name, out))
}
