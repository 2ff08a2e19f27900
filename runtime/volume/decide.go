package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
	"github.com/hypernetes/hypernetes/mountinfo"
)

// virtual are mount types without a source on the host; they are made in the guest.
var virtual = map[string]bool{
	"proc": true, "sysfs": true, "tmpfs": true, "mqueue": true, "devpts": true,
	"cgroup": true, "cgroup2": true, "devtmpfs": true,
}

// planner is one Plan call.
type planner struct {
	pod Pod
	dir string // the Pod's kubelet directory, without symbolic links
	// mounts is read at the first need.
	mounts []mountinfo.Mount
}

func (p Pod) plan(ctx context.Context, mounts []specs.Mount) (*Plan, error) {
	dir, err := p.dir()
	if err != nil {
		return nil, err
	}
	pl := &planner{pod: p, dir: dir}
	out := &Plan{Mounts: slices.Clone(mounts)}
	for i, m := range mounts {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if !isBind(m) {
			if !virtual[m.Type] {
				return nil, fmt.Errorf("mount %s has type %q, which a Pod in a VM cannot have: %w", m.Destination, m.Type, errdefs.ErrInvalidArgument)
			}
			continue
		}
		d, err := pl.decide(ctx, m)
		if err != nil {
			return nil, fmt.Errorf("mount %s: %w", m.Destination, err)
		}
		d.Mount = m
		out.Mounts[i].Source = d.GuestSource
		out.Decisions = append(out.Decisions, *d)
	}
	return out, nil
}

// dir is the Pod's directory. containerd resolves symbolic links in mount sources, so
// the kubelet's root must be resolved to recognise them.
func (p Pod) dir() (string, error) {
	if !path.IsAbs(p.KubeletRoot) {
		return "", fmt.Errorf("kubelet root %q is not absolute: %w", p.KubeletRoot, errdefs.ErrInvalidArgument)
	}
	if !safeName.MatchString(strings.ToLower(p.UID)) {
		return "", fmt.Errorf("pod UID %.64q is not a name: %w", p.UID, errdefs.ErrInvalidArgument)
	}
	root, err := filepath.EvalSymlinks(p.KubeletRoot)
	if errors.Is(err, os.ErrNotExist) {
		// A Pod without volumes needs no kubelet (crictl); any source is foreign then.
		root = path.Clean(p.KubeletRoot)
	} else if err != nil {
		return "", fmt.Errorf("resolve kubelet root: %w", err)
	}
	return path.Join(root, "pods", p.UID), nil
}

func isBind(m specs.Mount) bool {
	return m.Type == "bind" || m.Type == "rbind" ||
		(m.Type == "" || m.Type == "none") && (slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind"))
}

func (p *planner) decide(ctx context.Context, m specs.Mount) (*Decision, error) {
	src := path.Clean(m.Source)
	s := classify(p.dir, src, path.Clean(m.Destination))
	switch s.kind {
	case kindShm:
		return &Decision{GuestSource: "/dev/shm"}, nil
	case kindFiles:
		tree, err := packVersioned(src)
		if err != nil {
			return nil, err
		}
		d := files(guestName("vol", s.volume), src, tree)
		d.Live = true
		return d, nil
	case kindEmptyDir:
		return p.emptyDir(src, s.volume, "")
	case kindHosts:
		return p.plain(p.dir, s.rel, "etc-hosts")
	case kindCRIFile:
		return p.plain(path.Dir(src), path.Base(src), guestName("cri", s.volume))
	case kindTermination:
		d, err := p.plain(p.dir, s.rel, guestName("term", s.container, s.id))
		if err == nil {
			d.ReadBack = src
		}
		return d, err
	case kindSubPath:
		return p.subPath(ctx, m, src, s)
	case kindUnknown:
		return p.resolve(ctx, m, src, s)
	default:
		return nil, foreign(src)
	}
}

// subPath finds the volume by its directory: the path has only its name, and the
// names of a Pod's volumes are unique among all plugins.
func (p *planner) subPath(ctx context.Context, m specs.Mount, src string, s source) (*Decision, error) {
	if dir := path.Join(p.dir, "volumes", emptyDirPlugin, s.volume); isDir(dir) {
		if err := p.readMounts(); err != nil {
			return nil, err
		}
		sub, err := subPath(p.mounts, src, dir)
		if err != nil {
			return nil, err
		}
		return p.emptyDir(dir, s.volume, sub)
	}
	for plugin := range atomicPlugins {
		if !isDir(path.Join(p.dir, "volumes", plugin, s.volume)) {
			continue
		}
		// The kubelet does not update these. The content's hash is in the name, so that
		// a restarted container gets today's content and not that of its predecessor.
		d, err := p.plain(p.dir, s.rel, "")
		if err != nil {
			return nil, err
		}
		d.rename(guestName("sub", s.volume, s.container, s.id, contentHash(d.Parts)))
		return d, nil
	}
	return p.resolve(ctx, m, src, s)
}

func (p *planner) resolve(ctx context.Context, m specs.Mount, src string, s source) (*Decision, error) {
	m.Source = src
	for _, r := range p.pod.Resolvers {
		d, err := r.Resolve(ctx, p.pod, m)
		if d != nil || err != nil {
			return d, err
		}
	}
	what := s.plugin
	if what == "" {
		what, _, _ = strings.Cut(strings.TrimPrefix(s.rel, "volumes/"), "/")
	}
	return nil, fmt.Errorf("source %s is a volume of kind %q, which Pods in a VM cannot have: use emptyDir, configMap, secret, projected or downwardAPI; "+
		"operators may run the Pod with runtimeClassName: runc: %w", src, what, errdefs.ErrInvalidArgument)
}

func (p *planner) plain(base, rel, name string) (*Decision, error) {
	tree, err := packPlain(base, rel)
	if err != nil {
		return nil, err
	}
	return files(name, path.Join(base, rel), tree), nil
}

func (p *planner) emptyDir(dir, volume, sub string) (*Decision, error) {
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return nil, gone(dir, err)
	}
	if err := p.readMounts(); err != nil {
		return nil, err
	}
	e := &hyperstart.EmptyDir{Mode: st.Mode & 0o7777, Uid: st.Uid, Gid: st.Gid}
	// Only a mount of its own tells: the kubelet's root may itself be on a tmpfs.
	if m, ok := mountinfo.At(p.mounts, dir); ok {
		switch m.Type {
		case "tmpfs":
			e.Memory, e.SizeLimit = true, tmpfsSize(m.Options)
		case "hugetlbfs":
			return nil, fmt.Errorf("emptyDir %s is of huge pages, which Pods in a VM cannot have: use medium Memory: %w", volume, errdefs.ErrInvalidArgument)
		}
	}
	if sub != "" {
		e.Directories = []string{sub}
	}
	name := guestName("vol", volume)
	return &Decision{
		GuestSource: path.Join(GuestRoot, name, sub),
		Volume:      &hyperstart.Volume{Name: name, Kind: &hyperstart.Volume_EmptyDir{EmptyDir: e}},
		HostPath:    dir,
	}, nil
}

func (p *planner) readMounts() error {
	if p.mounts != nil {
		return nil
	}
	mounts, err := mountinfo.Read("self")
	if err != nil {
		return fmt.Errorf("read mounts: %w", err)
	}
	p.mounts = mounts
	return nil
}

func files(name, hostPath string, tree *hyperstart.FileTree) *Decision {
	d := &Decision{HostPath: hostPath, Parts: split(tree)}
	d.rename(name)
	return d
}

func (d *Decision) rename(name string) {
	first := d.Parts[0]
	empty := &hyperstart.FileTree{Version: first.Version, DirMode: first.DirMode, Uid: first.Uid, Gid: first.Gid}
	d.GuestSource = path.Join(GuestRoot, name)
	d.Volume = &hyperstart.Volume{Name: name, Kind: &hyperstart.Volume_Files{Files: empty}}
}

func contentHash(parts []*hyperstart.FileTree) string {
	var b []byte
	for _, p := range parts {
		for _, f := range p.Files {
			b = fmt.Appendf(b, "%q %o %d %d %q\n", f.Path, f.Mode, f.Uid, f.Gid, f.Data)
		}
	}
	return hash(b)
}

func isDir(p string) bool {
	st, err := os.Lstat(p)
	return err == nil && st.IsDir()
}

// foreign refuses a path of the host's. Whether it is a device or a socket is said
// because such a Pod needs more than a volume to be rewritten.
func foreign(src string) error {
	what := "hostPath volumes are"
	if st, err := os.Stat(src); src == "/dev" || strings.HasPrefix(src, "/dev/") || err == nil && st.Mode()&(os.ModeDevice|os.ModeSocket|os.ModeNamedPipe) != 0 {
		what = "devices and sockets of the host are"
	}
	return fmt.Errorf("source %s: %s not available to Pods in a VM: use emptyDir, configMap, or a PersistentVolumeClaim; "+
		"operators may run the Pod with runtimeClassName: runc: %w", src, what, errdefs.ErrInvalidArgument)
}
