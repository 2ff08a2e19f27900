package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/cluster/layout"
)

// step is one change of the node's mount namespace.
type step struct {
	op     string // tmpfs, overlay, sysfs, rbind, move, bind, mkdir
	source string
	target string
}

// stage is a scratch tmpfs below the node's run directory; only the node sees it.
const stage = "stage"

// mountPlan lists the steps that give a node the standard paths (/var/lib/kubelet,
// /run/containerd, ...) backed by its own directories.
//
// Most of those paths do not exist on the host, and the host's file system must not
// be touched to make them: /etc, /opt, /var/lib and /var/log get an overlay whose
// upper layer is a tmpfs, /run a tmpfs of its own. Sources of binds are opened before
// the first step because the overlays hide them.
func mountPlan(n layout.Node) []step {
	st := n.RunPath(stage)
	plan := []step{
		{op: "tmpfs", target: st},
		{op: "rbind", source: "/sys/fs/cgroup", target: st + "/cgroup"},
		// A fresh sysfs, because sysfs shows the links of the network namespace it was
		// mounted in; the cgroup tree below it would be hidden, so it moves along.
		{op: "sysfs", target: "/sys"},
		{op: "move", source: st + "/cgroup", target: "/sys/fs/cgroup"},
	}
	for _, dir := range []string{"/etc", "/opt", "/var/lib", "/var/log"} {
		plan = append(plan, step{op: "overlay", source: st + dir, target: dir})
	}
	plan = append(plan, step{op: "tmpfs", target: "/run"})
	for _, dir := range []string{"/run/netns", "/run/lock", "/var/lib/cni"} {
		plan = append(plan, step{op: "mkdir", target: dir})
	}
	for _, b := range Binds(n) {
		plan = append(plan, step{op: "bind", source: b.Source, target: b.Target})
	}
	return plan
}

// Bind is a directory of the node's and where it is seen inside the node.
type Bind struct{ Source, Target string }

// Binds lists the node's directories. The two roots come first: everything else
// lies below them, and status sockets and logs keep one path inside and outside.
func Binds(n layout.Node) []Bind {
	return []Bind{
		{n.State, n.State},
		{n.Run, n.Run},
		{n.StatePath("kubelet"), "/var/lib/kubelet"},
		{n.StatePath("containerd"), "/var/lib/containerd"},
		{n.StatePath("etc"), "/etc/h8s"},
		{n.StatePath("cni", "net.d"), "/etc/cni/net.d"},
		{n.StatePath("cni", "bin"), "/opt/cni/bin"},
		{n.StatePath("log", "pods"), "/var/log/pods"},
		{n.StatePath("log", "containers"), "/var/log/containers"},
		{n.RunPath("containerd"), "/run/containerd"},
		{n.RunPath("shim"), "/run/h8s-shim"},
		{n.RunPath("kubestack"), "/run/kubestack"},
		{n.StatePath("scratch"), "/var/lib/h8s-shim"},
		{n.StatePath("volumes"), "/var/lib/h8s-volumes"},
		{n.RunPath("volumes"), "/run/h8s-volumes"},
		{n.RunPath("csi"), "/run/h8s-csi"},
	}
}

// mount carries the plan out in the calling process's mount namespace, which must
// be a private copy.
func mount(plan []step) error {
	// Private first: a fresh namespace still receives and sends events of shared mounts.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	sources := map[string]int{}
	defer func() {
		for _, fd := range sources {
			_ = unix.Close(fd)
		}
	}()
	for _, s := range plan {
		if s.op != "bind" {
			continue
		}
		fd, err := unix.Open(s.source, unix.O_PATH|unix.O_CLOEXEC|unix.O_DIRECTORY, 0)
		if err != nil {
			return fmt.Errorf("open %s: %w", s.source, err)
		}
		sources[s.source] = fd
	}
	for _, s := range plan {
		if err := s.do(sources); err != nil {
			return fmt.Errorf("%s on %s: %w", s.op, s.target, err)
		}
	}
	// Shared inside the node: the kubelet, CSI drivers and CNI rely on propagation
	// between the node's own processes.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("make mounts shared: %w", err)
	}
	return nil
}

func (s step) do(sources map[string]int) error {
	switch s.op {
	case "mkdir":
		return os.MkdirAll(s.target, 0o755)
	case "tmpfs":
		return unix.Mount("tmpfs", s.target, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755,size=256m")
	case "sysfs":
		return unix.Mount("sysfs", s.target, "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
	case "rbind":
		if err := os.MkdirAll(s.target, 0o755); err != nil {
			return err
		}
		return unix.Mount(s.source, s.target, "", unix.MS_BIND|unix.MS_REC, "")
	case "move":
		return unix.Mount(s.source, s.target, "", unix.MS_MOVE, "")
	case "bind":
		if err := os.MkdirAll(s.target, 0o755); err != nil {
			return err
		}
		return unix.Mount(fmt.Sprintf("/proc/self/fd/%d", sources[s.source]), s.target, "", unix.MS_BIND, "")
	case "overlay":
		return s.overlay()
	}
	return fmt.Errorf("unknown step %q", s.op)
}

func (s step) overlay() error {
	upper, work := filepath.Join(s.source, "upper"), filepath.Join(s.source, "work")
	for _, dir := range []string{upper, work} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if _, err := os.Stat(s.target); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: the host has no %s (create the empty directory)", err, s.target)
	}
	return unix.Mount("h8s", s.target, "overlay", 0, fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", s.target, upper, work))
}
