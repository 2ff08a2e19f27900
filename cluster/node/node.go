package node

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/atomicfile"
	"github.com/hypernetes/hypernetes/cluster/cgroup"
	"github.com/hypernetes/hypernetes/cluster/layout"
	"github.com/hypernetes/hypernetes/cluster/settings"
	"github.com/hypernetes/hypernetes/proc"
)

// Node is a running node's world. Its methods are safe for concurrent use.
type Node struct {
	Layout   layout.Node
	Settings settings.Node
	cgroups  *cgroup.Host
	anchor   proc.ID
}

// anchorName is the anchor's record and cgroup leaf.
const anchorName = "anchor"

// Open returns the node's world if its anchor is alive, else errdefs.ErrNotFound is
// reported as fs.ErrNotExist.
func Open(l layout.Node, s settings.Node, cg *cgroup.Host) (*Node, error) {
	b, err := os.ReadFile(l.Record(anchorName))
	if err != nil {
		return nil, err
	}
	var id proc.ID
	if err := json.Unmarshal(b, &id); err != nil {
		return nil, fmt.Errorf("%s: %w", l.Record(anchorName), err)
	}
	if !id.Alive() {
		return nil, fmt.Errorf("anchor of node %s is gone: %w", l.Name, fs.ErrNotExist)
	}
	return &Node{Layout: l, Settings: s, cgroups: cg, anchor: id}, nil
}

// Create makes the node's directories, cgroups and namespaces. Nameservers are for
// the node's resolv.conf.
func Create(ctx context.Context, l layout.Node, s settings.Node, cg *cgroup.Host, nameservers []string) (*Node, error) {
	if err := makeDirs(l); err != nil {
		return nil, err
	}
	id, err := machineID(l.StatePath("machine-id"))
	if err != nil {
		return nil, err
	}
	n := &Node{Layout: l, Settings: s, cgroups: cg}
	if err := n.startAnchor(ctx, AnchorConfig{Node: l, Settings: s, MachineID: id, Nameservers: nameservers}); err != nil {
		return nil, fmt.Errorf("node %s: %w", l.Name, err)
	}
	return n, nil
}

func makeDirs(l layout.Node) error {
	for _, dir := range []string{layout.StateRoot, layout.RunRoot} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	dirs := []string{l.RunPath(stage), l.RunPath("components"), l.StatePath("config"), l.StatePath("kubeconfigs"), l.StatePath("pki")}
	for _, b := range Binds(l) {
		dirs = append(dirs, b.Source)
	}
	for _, dir := range dirs {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	// The users of virtual machines reach their disks through State, and need no key.
	for dir, mode := range map[string]fs.FileMode{l.State: 0o711, l.StatePath("pki"): 0o700, l.StatePath("kubeconfigs"): 0o700, l.StatePath("config"): 0o700} {
		if err := os.Chmod(dir, mode); err != nil {
			return err
		}
	}
	return nil
}

// machineID returns the node's own machine id, made once.
func machineID(path string) (string, error) {
	b, err := os.ReadFile(path)
	if err == nil {
		return strings.TrimSpace(string(b)), nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	var raw [16]byte
	if _, err := rand.Read(raw[:]); err != nil {
		return "", err
	}
	id := hex.EncodeToString(raw[:])
	return id, atomicfile.Write(path, []byte(id+"\n"), 0o444)
}

func (n *Node) startAnchor(ctx context.Context, cfg AnchorConfig) error {
	in, err := json.Marshal(cfg)
	if err != nil {
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	logFile, err := OpenLog(n.Layout.Log(anchorName))
	if err != nil {
		return err
	}
	defer logFile.Close()
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(exe, anchorName)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(in), logFile, logFile
	cmd.ExtraFiles = []*os.File{w}
	cmd.Dir = "/"
	flags := uintptr(unix.CLONE_NEWNS)
	if !n.Settings.HostNetwork {
		flags |= unix.CLONE_NEWNET | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags, Setsid: true}
	err = n.startIn(cmd, anchorName, nil)
	_ = w.Close()
	if err != nil {
		return fmt.Errorf("start anchor: %w", err)
	}
	// The anchor outlives us; if it dies while we live, reap it.
	go func() { _ = cmd.Wait() }()
	answer, err := readAnswer(ctx, r)
	if err == nil && answer != "ok" {
		err = errors.New(answer)
	}
	if err == nil {
		n.anchor, err = proc.Find(cmd.Process.Pid)
	}
	if err != nil {
		_ = cmd.Process.Kill()
		return err
	}
	return WriteRecord(n.Layout.Record(anchorName), n.anchor)
}

func readAnswer(ctx context.Context, r *os.File) (string, error) {
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(30 * time.Second)
	}
	if err := r.SetReadDeadline(deadline); err != nil {
		return "", err
	}
	b, err := io.ReadAll(io.LimitReader(r, 64<<10))
	if err != nil {
		return "", fmt.Errorf("anchor does not answer: %w", err)
	}
	if len(b) == 0 {
		return "", errors.New("anchor died while setting up; see its log")
	}
	return string(b), nil
}

// WriteRecord writes v as JSON atomically.
func WriteRecord(path string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return atomicfile.Write(path, b, 0o600)
}

// AnchorPID is the process whose namespaces are the node's.
func (n *Node) AnchorPID() int { return n.anchor.PID }

// Alive reports whether the namespaces still exist.
func (n *Node) Alive() bool { return n.anchor.Alive() }

// Cgroup is the cgroup of a component.
func (n *Node) Cgroup(component string) string {
	return n.Layout.Cgroup() + "/system/" + component
}

// Start starts cmd inside the node, in the component's own cgroup, as leader of a
// new session.
func (n *Node) Start(cmd *exec.Cmd, component string) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setsid = true
	return n.startIn(cmd, component, []namespace{ipcNS, utsNS, netNS, mountNS})
}

// OnHost starts processes in the machine's namespaces but in the node's cgroups.
type OnHost struct{ Node *Node }

// Start starts cmd as leader of a new session.
func (o OnHost) Start(cmd *exec.Cmd, component string) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setsid = true
	return o.Node.startIn(cmd, component, nil)
}

// Strays lists the processes in the component's cgroup with exactly these arguments.
func (n *Node) Strays(component string, args []string) []proc.ID {
	want := strings.Join(args, "\x00") + "\x00"
	var out []proc.ID
	for _, pid := range n.cgroups.Pids(n.Cgroup(component)) {
		id, err := proc.Find(pid)
		if err != nil {
			continue // it ended meanwhile
		}
		if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err == nil && string(b) == want {
			out = append(out, id)
		}
	}
	return out
}

// Strays is that of the node: the cgroup is the same.
func (o OnHost) Strays(component string, args []string) []proc.ID {
	return o.Node.Strays(component, args)
}

// HasLink reports whether the node has a network interface called name.
func (n *Node) HasLink(name string) bool {
	err := onOwnThread(func() error {
		if err := n.enter([]namespace{netNS}); err != nil {
			return err
		}
		_, err := netlink.LinkByName(name)
		return err
	})
	return err == nil
}

func (n *Node) startIn(cmd *exec.Cmd, component string, enter []namespace) error {
	group := n.Cgroup(component)
	if err := n.cgroups.Create(group); err != nil {
		return err
	}
	v2, err := n.cgroups.OpenV2(group)
	if err != nil {
		return err
	}
	if v2 != nil {
		defer v2.Close()
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(v2.Fd())
	}
	return onOwnThread(func() error {
		if err := n.cgroups.AttachThread(group); err != nil {
			return err
		}
		if err := n.enter(enter); err != nil {
			return err
		}
		return cmd.Start()
	})
}

// Dial connects to an address inside the node; it has the signature of
// net.Dialer.DialContext. The host part must be an IP address.
func (n *Node) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	var conn net.Conn
	err := onOwnThread(func() (err error) {
		if err := n.enter([]namespace{netNS}); err != nil {
			return err
		}
		conn, err = (&net.Dialer{}).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// Listen listens inside the node's network namespace.
func (n *Node) Listen(network, address string) (net.Listener, error) {
	var l net.Listener
	err := onOwnThread(func() (err error) {
		if err := n.enter([]namespace{netNS}); err != nil {
			return err
		}
		l, err = net.Listen(network, address)
		return err
	})
	return l, err
}

// Kill ends the anchor and with it, once no other process is left, the namespaces.
func (n *Node) Kill() error {
	err := n.anchor.Signal(unix.SIGKILL)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	return err
}

type namespace struct {
	name string
	flag int
}

var (
	ipcNS   = namespace{"ipc", unix.CLONE_NEWIPC}
	utsNS   = namespace{"uts", unix.CLONE_NEWUTS}
	netNS   = namespace{"net", unix.CLONE_NEWNET}
	mountNS = namespace{"mnt", unix.CLONE_NEWNS}
)

// enter moves the calling thread into the anchor's namespaces.
func (n *Node) enter(spaces []namespace) error {
	fds := make([]int, 0, len(spaces))
	defer func() {
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
	}()
	for _, ns := range spaces {
		fd, err := unix.Open(fmt.Sprintf("/proc/%d/ns/%s", n.anchor.PID, ns.name), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("%s namespace of node %s: %w", ns.name, n.Layout.Name, err)
		}
		fds = append(fds, fd)
	}
	if len(spaces) > 0 && !n.anchor.Alive() {
		return fmt.Errorf("node %s is gone: %w", n.Layout.Name, fs.ErrNotExist)
	}
	for i, ns := range spaces {
		if ns == mountNS {
			// A mount namespace cannot be entered while file system state is shared
			// with other threads.
			if err := unix.Unshare(unix.CLONE_FS); err != nil {
				return fmt.Errorf("unshare: %w", err)
			}
		}
		if err := unix.Setns(fds[i], ns.flag); err != nil {
			return fmt.Errorf("enter %s namespace: %w", ns.name, err)
		}
	}
	return nil
}

// onOwnThread runs f on a thread that is thrown away afterwards, because f changes
// the thread's namespaces or cgroup. The process's first thread is spared: it cannot
// be thrown away, and /proc/self shows its namespaces.
func onOwnThread(f func() error) error {
	errc := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			errc <- onOwnThread(f) // this one stays locked, so the next is another thread
			runtime.UnlockOSThread()
			return
		}
		errc <- f()
	}()
	return <-errc
}
