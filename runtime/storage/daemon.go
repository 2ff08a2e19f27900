package storage

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/guest/image/closure"
	"github.com/hypernetes/hypernetes/runtime/launch"
	"github.com/hypernetes/hypernetes/runtime/vmm"
	"github.com/hypernetes/hypernetes/runtime/vmm/qemu/qmp"
)

const (
	// openTimeout bounds opening one volume: its keeper may not answer.
	openTimeout = 15 * time.Second
	// quitTimeout bounds how long it may take to close what it has open, and
	// endTimeout how long a killed daemon may take to be gone.
	quitTimeout = 10 * time.Second
	endTimeout  = 5 * time.Second
	// modules is where Debian's QEMU has the drivers of networked storage.
	modules = "/usr/lib/x86_64-linux-gnu/qemu"
	// sendBuffer has room for a request of a MiB: with the kernel's default the VMM waits
	// for the daemon several times in one.
	sendBuffer = 512 << 10 // the kernel doubles it
	// maxStderr bounds what is remembered of the daemon's complaints, in bytes.
	maxStderr = 4 << 10
)

// Daemon is a running qemu-storage-daemon.
type Daemon struct {
	process *launch.Process
	qmp     *qmp.Client
	dir     *os.File // of the socket; named by descriptor, as paths may be too long for one
	volumes map[string]*volume
	done    chan struct{}
	stderr  chan string

	mu sync.Mutex // held while volumes are opened
}

// volume is a served one.
type volume struct {
	Volume
	index int
	// round is the newest open's, size what it has; before are older opens, one of which
	// the VMM uses as long as it has not said that it uses the newest.
	round  int
	before []int
	size   int64
}

// Start starts a daemon that serves the volumes of c. A volume that cannot be opened in
// time is an error that says why.
func Start(ctx context.Context, c Config) (_ *Daemon, err error) {
	o, err := order(c)
	if err != nil {
		return nil, err
	}
	d := &Daemon{volumes: map[string]*volume{}, done: make(chan struct{}), stderr: make(chan string, 1)}
	if d.dir, err = os.Open(c.Dir); err != nil {
		return nil, fmt.Errorf("storage daemon: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.kill()) // it may wait for somebody who does not answer
		}
	}()
	control, err := d.launch(o, c.Hold)
	if err != nil {
		return nil, fmt.Errorf("storage daemon: %w", err)
	}
	if d.qmp, err = qmp.Open(ctx, control, func(qmp.Event) {}); err != nil {
		return nil, fmt.Errorf("storage daemon: %w%s", err, d.complaint())
	}
	for i, v := range c.Volumes {
		if err := d.serve(ctx, i, v); err != nil {
			return nil, err
		}
	}
	return d, nil
}

// launch starts the process and returns the connection to control it.
func (d *Daemon) launch(o launch.Order, hold []*os.File) (*net.UnixConn, error) {
	l, err := d.listen()
	if err != nil {
		return nil, err
	}
	defer l.Close()
	ours, theirs, err := pair()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	if d.process, err = launch.Start(o, append([]*os.File{l, theirs}, hold...)); err != nil {
		_ = ours.Close()
		return nil, err
	}
	go d.wait()
	return ours, nil
}

// order is what the daemon is and sees.
func order(c Config) (launch.Order, error) {
	binary, err := exec.LookPath("qemu-storage-daemon")
	if err != nil {
		return launch.Order{}, fmt.Errorf("qemu-storage-daemon: %w: %w; remedy: install the Debian package qemu-system-common", err, errdefs.ErrNotFound)
	}
	if binary, err = filepath.EvalSymlinks(binary); err != nil {
		return launch.Order{}, fmt.Errorf("qemu-storage-daemon: %w", err)
	}
	programs := []string{binary}
	for _, m := range drivers(c.Volumes) {
		if _, err := os.Stat(m); err != nil {
			return launch.Order{}, fmt.Errorf("driver %s: %w: %w; remedy: install the Debian package qemu-block-extra", m, err, errdefs.ErrNotFound)
		}
		programs = append(programs, m)
	}
	libraries, err := closure.Of("", programs...)
	if err != nil {
		return launch.Order{}, fmt.Errorf("qemu-storage-daemon: %w", err)
	}
	o := launch.Order{
		Binary: binary, UID: c.UID, GID: c.UID, Cgroups: c.Cgroups, Network: true, Filter: true,
		Files: map[string][]byte{confPath: []byte(conf)},
		Binds: []launch.Bind{{From: "/dev/null", To: "/dev/null"}},
		// By default every buffer of a MiB comes from the kernel, zeroed page by page, and
		// goes back to it after the request.
		Env: []string{"MALLOC_MMAP_THRESHOLD_=8388608", "MALLOC_TRIM_THRESHOLD_=16777216"},
		Args: []string{
			// For people who look at processes.
			"--object", "secret,id=h8s-" + c.ID + ",data=",
			"--chardev", fmt.Sprintf("socket,id=qmp,fd=%d", launch.FirstFD+1), "--monitor", "chardev=qmp",
			"--nbd-server", fmt.Sprintf("addr.type=fd,addr.str=%d,max-connections=0", launch.FirstFD),
		},
	}
	for _, f := range append(programs, libraries...) {
		o.Binds = append(o.Binds, launch.Bind{From: f, To: f})
	}
	for _, v := range c.Volumes {
		if v.Source.File != nil { // of tests
			o.Binds = append(o.Binds, launch.Bind{From: v.Source.File.Path, To: v.Source.File.Path, Writable: !v.ReadOnly})
		}
	}
	return o, nil
}

// drivers are the modules the volumes need.
func drivers(volumes []Volume) []string {
	var rbd, iscsi bool
	for _, v := range volumes {
		rbd, iscsi = rbd || v.Source.RBD != nil, iscsi || v.Source.ISCSI != nil
	}
	var out []string
	if rbd {
		out = append(out, filepath.Join(modules, "block-rbd.so"))
	}
	if iscsi {
		out = append(out, filepath.Join(modules, "block-iscsi.so"))
	}
	return out
}

// socket is the NBD server's path.
func (d *Daemon) socket() string { return fmt.Sprintf("/proc/self/fd/%d/nbd", d.dir.Fd()) }

// listen makes the socket the daemon accepts on. Its directory is root's alone.
func (d *Daemon) listen() (*os.File, error) {
	if err := os.Remove(d.socket()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: d.socket()})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	defer l.Close()
	return l.File()
}

func pair() (ours *net.UnixConn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	theirs = os.NewFile(uintptr(fds[1]), "qmp")
	f := os.NewFile(uintptr(fds[0]), "qmp")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		_ = theirs.Close()
		return nil, nil, err
	}
	return c.(*net.UnixConn), theirs, nil
}

// wait reaps the daemon and remembers what it said.
func (d *Daemon) wait() {
	said, _ := io.ReadAll(io.LimitReader(d.process.Stderr, maxStderr))
	_, _ = io.Copy(io.Discard, d.process.Stderr)
	<-d.process.Exited
	_ = d.process.Stderr.Close()
	d.stderr <- strings.TrimSpace(string(said))
	close(d.done)
}

// complaint ends the daemon and returns what it said.
func (d *Daemon) complaint() string {
	_ = d.process.Kill()
	select {
	case said := <-d.stderr:
		if said != "" {
			return ": " + said
		}
	case <-time.After(endTimeout):
	}
	return ""
}

// serve opens a volume and exports it.
func (d *Daemon) serve(ctx context.Context, index int, v Volume) error {
	add, err := secret(v)
	if err != nil {
		return err
	}
	if add != nil {
		if _, err := d.qmp.Execute(ctx, "object-add", add); err != nil {
			return fmt.Errorf("volume %s: secret: %w", v.Serial, err)
		}
	}
	s := &volume{Volume: v, index: index}
	d.volumes[v.Serial] = s
	return d.open(ctx, s)
}

// open opens a volume anew and exports it under another name.
func (d *Daemon) open(ctx context.Context, v *volume) error {
	bounded, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	round := v.round + 1
	n, err := node(bounded, net.DefaultResolver, v.Volume, round)
	if err != nil {
		return fmt.Errorf("volume %s: %w", v.Serial, err)
	}
	if _, err := d.qmp.Execute(bounded, "blockdev-add", n); err != nil {
		if bounded.Err() != nil && ctx.Err() == nil {
			return fmt.Errorf("volume %s: %s does not answer for %v: %w", v.Serial, keeper(v.Volume), openTimeout, errdefs.ErrUnavailable)
		}
		return fmt.Errorf("volume %s: open at %s: %w (can this node reach it, and are image and key right?): %w", v.Serial, keeper(v.Volume), err, errdefs.ErrUnavailable)
	}
	size, err := d.nodeSize(bounded, nodeID(v.Serial, round))
	if err == nil {
		_, err = d.qmp.Execute(bounded, "block-export-add", map[string]any{
			"type": "nbd", "id": exportID(v.Serial, round), "node-name": nodeID(v.Serial, round),
			"name": exportName(v.index, round), "writable": !v.ReadOnly,
		})
	}
	if err != nil {
		return errors.Join(fmt.Errorf("volume %s: %w", v.Serial, err), d.forget(context.WithoutCancel(ctx), v, round))
	}
	if v.round > 0 {
		v.before = append(v.before, v.round)
	}
	v.round, v.size = round, size
	return nil
}

func keeper(v Volume) string {
	switch {
	case v.Source.RBD != nil:
		return "ceph monitors " + strings.Join(v.Source.RBD.Monitors, ", ")
	case v.Source.ISCSI != nil:
		return "iscsi portal " + v.Source.ISCSI.Portal
	}
	return "a file"
}

// nodeSize asks for the size of what was opened.
func (d *Daemon) nodeSize(ctx context.Context, node string) (int64, error) {
	b, err := d.qmp.Execute(ctx, "query-named-block-nodes", map[string]any{"flat": true})
	if err != nil {
		return 0, err
	}
	var nodes []struct {
		Name  string `json:"node-name"`
		Image struct {
			Size int64 `json:"virtual-size"`
		} `json:"image"`
	}
	if err := json.Unmarshal(b, &nodes); err != nil {
		return 0, fmt.Errorf("block nodes: %w: %w", err, errdefs.ErrInternal)
	}
	for _, n := range nodes {
		if n.Name == node && n.Image.Size > 0 {
			return n.Image.Size, nil
		}
	}
	return 0, fmt.Errorf("block node %s has no size: %w", node, errdefs.ErrInternal)
}

// forget closes an open of a volume, connected or not.
func (d *Daemon) forget(ctx context.Context, v *volume, round int) error {
	ctx, cancel := context.WithTimeout(ctx, endTimeout)
	defer cancel()
	var failed *qmp.Error
	if _, err := d.qmp.Execute(ctx, "block-export-del", map[string]any{"id": exportID(v.Serial, round), "mode": "hard"}); err != nil && !errors.As(err, &failed) {
		return err
	}
	// The export is gone shortly after.
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		_, err := d.qmp.Execute(ctx, "blockdev-del", map[string]any{"node-name": nodeID(v.Serial, round)})
		if !errors.As(err, &failed) || strings.HasPrefix(failed.Desc, "Failed to find node") {
			return err
		}
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return errors.Join(err, ctx.Err())
		}
	}
}

// Connect returns a new connection to a volume; the caller closes it.
//
// Errors: errdefs.ErrNotFound.
func (d *Daemon) Connect(ctx context.Context, serial string) (*vmm.NBD, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	v := d.volumes[serial]
	if v == nil {
		return nil, fmt.Errorf("volume %s is not served: %w", serial, errdefs.ErrNotFound)
	}
	var dialer net.Dialer
	c, err := dialer.DialContext(ctx, "unix", d.socket())
	if err != nil {
		return nil, fmt.Errorf("connect to the storage daemon: %w", err)
	}
	defer c.Close()
	if raw, err := c.(*net.UnixConn).SyscallConn(); err == nil { // without it is slower
		_ = raw.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sendBuffer) })
	}
	f, err := c.(*net.UnixConn).File()
	if err != nil {
		return nil, fmt.Errorf("connect to the storage daemon: %w", err)
	}
	return &vmm.NBD{Conn: f, Export: exportName(v.index, v.round)}, nil
}

// Size is what a volume is served with.
//
// Errors: errdefs.ErrNotFound.
func (d *Daemon) Size(serial string) (int64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	v := d.volumes[serial]
	if v == nil {
		return 0, fmt.Errorf("volume %s is not served: %w", serial, errdefs.ErrNotFound)
	}
	return v.size, nil
}

// maxBefore bounds how many opens of a volume there are beside the newest.
const maxBefore = 8

// Grow serves a volume with the size it has now, to whoever connects from now on; what is
// connected stays as it is until Settle.
func (d *Daemon) Grow(ctx context.Context, serial string) (int64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	v := d.volumes[serial]
	if v == nil {
		return 0, fmt.Errorf("volume %s is not served: %w", serial, errdefs.ErrNotFound)
	}
	if len(v.before) >= maxBefore {
		return 0, fmt.Errorf("volume %s: growing has failed %d times; remedy: restart the pod: %w", serial, maxBefore, errdefs.ErrResourceExhausted)
	}
	if err := d.open(ctx, v); err != nil {
		return 0, err
	}
	return v.size, nil
}

// Settle says that nobody uses a volume but through the newest connection.
func (d *Daemon) Settle(ctx context.Context, serial string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	v := d.volumes[serial]
	if v == nil {
		return fmt.Errorf("volume %s is not served: %w", serial, errdefs.ErrNotFound)
	}
	for len(v.before) > 0 {
		if err := d.forget(ctx, v, v.before[0]); err != nil {
			return fmt.Errorf("volume %s: %w", serial, err)
		}
		v.before = v.before[1:]
	}
	return nil
}

// PID is the daemon's process.
func (d *Daemon) PID() int { return d.process.Pid }

// Done is closed when the daemon has ended.
func (d *Daemon) Done() <-chan struct{} { return d.done }

// Close ends the daemon and waits for its end. It is idempotent.
func (d *Daemon) Close() error {
	// Who lets go of an image spares the next one the wait until Ceph takes it for dead.
	ctx, cancel := context.WithTimeout(context.Background(), quitTimeout)
	defer cancel()
	if _, err := d.qmp.Execute(ctx, "quit", nil); err == nil {
		select {
		case <-d.done:
		case <-ctx.Done():
		}
	}
	return d.kill()
}

func (d *Daemon) kill() error {
	defer d.dir.Close()
	if d.process == nil {
		return nil
	}
	if err := d.process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("storage daemon: %w", err)
	}
	select {
	case <-d.done:
	case <-time.After(endTimeout):
		return fmt.Errorf("storage daemon %d does not end: %w", d.process.Pid, errdefs.ErrAborted)
	}
	if d.qmp != nil {
		d.qmp.Close()
	}
	_ = os.Remove(d.socket())
	return nil
}
