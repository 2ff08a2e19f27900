package guesttest

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/ttrpc"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
	"github.com/hypernetes/hypernetes/guest/channel"
	"github.com/hypernetes/hypernetes/guest/image"
	"github.com/hypernetes/hypernetes/guest/image/closure"
	"github.com/hypernetes/hypernetes/test/artifacts"
)

// need skips the test, saying why, unless the files are there.
func need(t *testing.T, files ...string) {
	t.Helper()
	for _, f := range files {
		if _, err := os.Stat(f); err != nil {
			t.Skipf("skipped: %v (run `make guest`, install the Debian packages)", err)
		}
	}
}

// vm is a running guest.
type vm struct {
	t       *testing.T
	cmd     *exec.Cmd
	qmp     *qmp
	host    *channel.Host
	rpc     *ttrpc.Client
	sbxC    hyperstart.SandboxClient
	ctrs    hyperstart.ContainersService
	exited  chan struct{}
	console *lockedBuffer
	port    string
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// build makes the initramfs of the image with the init of this source tree: the
// kernel unpacks concatenated archives, the later file wins.
func build(t *testing.T) (kernel, initrd, cmdline string) {
	t.Helper()
	share := filepath.Join(artifacts.Dir(), "share")
	kernel = filepath.Join(share, "vmlinux")
	base := filepath.Join(share, "initramfs.img")
	need(t, kernel, base, filepath.Join(share, "kernel.json"), "/usr/bin/qemu-system-x86_64", "/usr/bin/mkfs.erofs", "/usr/bin/busybox")
	dir := t.TempDir()
	init := filepath.Join(dir, "init")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", init, "github.com/hypernetes/hypernetes/cmd/hyperstart")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build hyperstart: %v\n%s", err, out)
	}
	old, err := os.ReadFile(base)
	check(t, err)
	body, err := os.ReadFile(init)
	check(t, err)
	out := bytes.NewBuffer(old)
	for out.Len()%512 != 0 {
		out.WriteByte(0)
	}
	c := image.NewCPIO(out)
	check(t, c.File("/init", 0o755, int64(len(body)), bytes.NewReader(body)))
	check(t, c.Close())
	initrd = filepath.Join(dir, "initramfs.img")
	check(t, os.WriteFile(initrd, out.Bytes(), 0o600))
	var k struct{ Cmdline string }
	b, err := os.ReadFile(filepath.Join(share, "kernel.json"))
	check(t, err)
	check(t, json.Unmarshal(b, &k))
	return kernel, initrd, k.Cmdline
}

type disk struct {
	serial, path string
	readOnly     bool
	// badSector is one that cannot be read; 0 for none.
	badSector int64
}

// node is the disk's block node for QEMU's command line.
func (d disk) node() string {
	if d.badSector == 0 {
		return "file.driver=file,file.filename=" + d.path
	}
	return fmt.Sprintf("file.driver=blkdebug,file.inject-error.0.event=none,file.inject-error.0.iotype=read,file.inject-error.0.errno=5,"+
		"file.inject-error.0.sector=%d,file.image.driver=file,file.image.filename=%s", d.badSector, d.path)
}

func boot(t *testing.T, disks ...disk) *vm {
	t.Helper()
	kernel, initrd, extra := build(t)
	dir := t.TempDir()
	sock, port := filepath.Join(dir, "qmp"), filepath.Join(dir, "channel")
	args := []string{
		"-M", "q35,sata=off,smbus=off,usb=off,hpet=off,vmport=off", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", "256",
		"-nodefaults", "-no-user-config", "-nographic", "-no-reboot", "-serial", "stdio",
		"-kernel", kernel, "-initrd", initrd,
		"-append", "console=ttyS0 quiet panic=-1 reboot=t no_timer_check " + extra,
		"-device", "virtio-serial-pci,max_ports=2", "-chardev", "socket,id=ch0,path=" + port + ",server=on,wait=off",
		"-device", "virtserialport,chardev=ch0,name=" + channel.PortName,
		"-device", "virtio-scsi-pci,id=scsi0", "-device", "virtio-rng-pci",
		"-qmp", "unix:" + sock + ",server=on,wait=off",
	}
	for i, d := range disks {
		args = append(args, "-blockdev", fmt.Sprintf("driver=raw,node-name=d%d,read-only=%s,discard=unmap,%s", i, onOff(d.readOnly), d.node()),
			"-device", fmt.Sprintf("scsi-hd,bus=scsi0.0,drive=d%d,serial=%s", i, d.serial))
	}
	v := &vm{t: t, port: port, exited: make(chan struct{}), console: &lockedBuffer{}}
	v.cmd = exec.Command("/usr/bin/qemu-system-x86_64", args...)
	v.cmd.Stdout, v.cmd.Stderr = v.console, v.console
	check(t, v.cmd.Start())
	go func() {
		_ = v.cmd.Wait()
		close(v.exited)
	}()
	t.Cleanup(v.close)
	v.connect()
	v.qmp = dialQMP(t, sock)
	return v
}

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}

func (v *vm) close() {
	if v.host != nil {
		v.host.Close()
	}
	_ = v.cmd.Process.Kill()
	<-v.exited
	if v.t.Failed() {
		v.t.Logf("console:\n%s", v.console)
	}
}

// connect opens the channel, as often as it was closed.
func (v *vm) connect() {
	v.t.Helper()
	var err error
	v.host, err = channel.NewHost(dialUnix(v.t, v.port))
	check(v.t, err)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	conn, err := v.host.Open(ctx, &hyperstart.StreamHeader{Kind: &hyperstart.StreamHeader_Rpc{Rpc: true}})
	if err != nil {
		v.t.Fatalf("open rpc stream: %v", err)
	}
	v.rpc = ttrpc.NewClient(conn)
	v.sbxC = hyperstart.NewSandboxClient(v.rpc)
	v.ctrs = hyperstart.NewContainersClient(v.rpc)
}

// stdio opens a process's stream.
func (v *vm) stdio(container, exec string, fd uint32) net.Conn {
	v.t.Helper()
	conn, err := v.host.Open(v.ctx(), &hyperstart.StreamHeader{Kind: &hyperstart.StreamHeader_Stdio{
		Stdio: &hyperstart.Stdio{ContainerId: container, ExecId: exec, Fd: fd}}})
	if err != nil {
		v.t.Fatalf("open stdio: %v", err)
	}
	v.t.Cleanup(func() { conn.Close() })
	return conn
}

func (v *vm) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	v.t.Cleanup(cancel)
	return ctx
}

// dialUnix connects to a socket QEMU is about to make.
func dialUnix(t *testing.T, path string) net.Conn {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		conn, err := net.Dial("unix", path)
		if err == nil {
			return conn
		}
		if time.Now().After(end) {
			t.Fatalf("QEMU's socket: %v", err)
		}
	}
}

// qmp is the least of QEMU's monitor protocol.
type qmp struct {
	conn net.Conn
	dec  *json.Decoder
}

func dialQMP(t *testing.T, path string) *qmp {
	t.Helper()
	conn := dialUnix(t, path)
	t.Cleanup(func() { conn.Close() })
	q := &qmp{conn: conn, dec: json.NewDecoder(conn)}
	var greeting any
	check(t, q.dec.Decode(&greeting))
	check(t, q.run("qmp_capabilities", nil))
	return q
}

func (q *qmp) run(command string, arguments any) error {
	m := map[string]any{"execute": command}
	if arguments != nil {
		m["arguments"] = arguments
	}
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if _, err := q.conn.Write(b); err != nil {
		return err
	}
	for {
		var r struct {
			Return json.RawMessage
			Error  *struct{ Desc string }
			Event  string
		}
		if err := q.dec.Decode(&r); err != nil {
			return err
		}
		switch {
		case r.Error != nil:
			return fmt.Errorf("%s: %s", command, r.Error.Desc)
		case r.Event == "":
			return nil
		}
	}
}

// plug adds a disk to the running guest.
func (v *vm) plug(d disk) {
	v.t.Helper()
	check(v.t, v.qmp.run("blockdev-add", map[string]any{"driver": "raw", "node-name": d.serial, "read-only": d.readOnly,
		"file": map[string]any{"driver": "file", "filename": d.path}}))
	check(v.t, v.qmp.run("device_add", map[string]any{"driver": "scsi-hd", "bus": "scsi0.0", "drive": d.serial, "serial": d.serial, "id": d.serial}))
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// layer makes an EROFS image of busybox and its libraries.
func layer(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	root := filepath.Join(dir, "root")
	libs, err := closure.Of("", "/usr/bin/busybox")
	check(t, err)
	for _, f := range append(libs, "/usr/bin/busybox") {
		b, err := os.ReadFile(f)
		check(t, err)
		to := filepath.Join(root, f)
		check(t, os.MkdirAll(filepath.Dir(to), 0o755))
		check(t, os.WriteFile(to, b, 0o755))
	}
	for _, d := range []string{"bin", "etc", "proc", "sys", "dev", "tmp"} {
		check(t, os.MkdirAll(filepath.Join(root, d), 0o755))
	}
	for _, a := range strings.Fields("sh cat echo ln ls sleep id stty tr wc dd df stat mkdir mknod touch chmod sync blockdev mount kill head tail nc ps env hostname true grep") {
		check(t, os.Symlink("/usr/bin/busybox", filepath.Join(root, "bin", a)))
	}
	check(t, os.WriteFile(filepath.Join(root, "etc/passwd"), []byte("root:x:0:0:root:/:/bin/sh\n"), 0o644))
	img := filepath.Join(dir, "layer.erofs")
	if out, err := exec.Command("mkfs.erofs", "--quiet", img, root).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.erofs: %v\n%s", err, out)
	}
	return img
}

func scratch(t *testing.T) string {
	t.Helper()
	from := filepath.Join(artifacts.Dir(), "share/scratch.ext4")
	need(t, from)
	to := filepath.Join(t.TempDir(), "scratch.ext4")
	if out, err := exec.Command("cp", "--sparse=always", from, to).CombinedOutput(); err != nil {
		t.Fatalf("copy scratch: %v\n%s", err, out)
	}
	return to
}

func readAll(t *testing.T, r io.Reader) string {
	t.Helper()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatalf("read stream: %v", err)
	}
	return string(b)
}
