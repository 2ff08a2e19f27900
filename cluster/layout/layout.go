// Package layout owns where things are: the artefacts h8s was built with, and the
// files of one node. It computes paths and looks nothing up but the executable; it
// must not know what the files contain.
package layout

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"

	"github.com/containerd/errdefs"
)

// Roots under which every node keeps its own directory.
const (
	StateRoot = "/var/lib/h8s"
	RunRoot   = "/run/h8s"
)

var nodeName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$`)

// Artifacts is the tree the build fills: bin, cni, share and images.
type Artifacts struct{ Root string }

// FindArtifacts returns the tree that holds this executable, or $H8S_OUT if set.
func FindArtifacts() (Artifacts, error) {
	if root := os.Getenv("H8S_OUT"); root != "" {
		abs, err := filepath.Abs(root)
		return Artifacts{abs}, err
	}
	exe, err := os.Executable()
	if err != nil {
		return Artifacts{}, fmt.Errorf("own executable: %w", err)
	}
	if exe, err = filepath.EvalSymlinks(exe); err != nil {
		return Artifacts{}, fmt.Errorf("own executable: %w", err)
	}
	return Artifacts{filepath.Dir(filepath.Dir(exe))}, nil
}

// Bin is the path of a program.
func (a Artifacts) Bin(name string) string { return filepath.Join(a.Root, "bin", name) }

// BinDir holds the programs; containerd looks for shims here.
func (a Artifacts) BinDir() string { return filepath.Join(a.Root, "bin") }

// CNIDir holds the upstream CNI plugins.
func (a Artifacts) CNIDir() string { return filepath.Join(a.Root, "cni") }

// Share is the path of a guest artefact (kernel, initramfs, scratch template).
func (a Artifacts) Share(name string) string { return filepath.Join(a.Root, "share", name) }

// ImagesDir holds image archives that are imported when a node starts.
func (a Artifacts) ImagesDir() string { return filepath.Join(a.Root, "images") }

// Node is the set of paths that belong to one node. State is on a real file
// system and survives a reboot, Run does not.
type Node struct {
	Name  string
	State string
	Run   string
}

// NewNode returns the paths of the node called name, a DNS label of at most 32
// characters because it becomes a host name, a cgroup and a directory.
func NewNode(name string) (Node, error) {
	if !nodeName.MatchString(name) {
		return Node{}, fmt.Errorf("node name %q: use 1 to 32 of a-z, 0-9 and -, beginning and ending with a letter or digit: %w", name, errdefs.ErrInvalidArgument)
	}
	return Node{Name: name, State: filepath.Join(StateRoot, name), Run: filepath.Join(RunRoot, name)}, nil
}

func (n Node) StatePath(elem ...string) string {
	return filepath.Join(append([]string{n.State}, elem...)...)
}

func (n Node) RunPath(elem ...string) string {
	return filepath.Join(append([]string{n.Run}, elem...)...)
}

// PKI holds certificates and keys, mode 0700.
func (n Node) PKI(name string) string { return n.StatePath("pki", name) }

// Kubeconfig is the administrator's kubeconfig as used on the host.
func (n Node) Kubeconfig() string { return n.StatePath("kubeconfig") }

// InnerKubeconfig is a component's kubeconfig, valid inside the node.
func (n Node) InnerKubeconfig(user string) string {
	return n.StatePath("kubeconfigs", user+".kubeconfig")
}

// BootstrapKubeconfig is what an agent's kubelet asks for its first certificate with; it
// is gone once that is there.
func (n Node) BootstrapKubeconfig() string { return n.InnerKubeconfig("bootstrap") }

// KubeletClient is the certificate, with its key, of an agent's kubelet, which the
// kubelet renews.
func (n Node) KubeletClient() string {
	return n.StatePath("kubelet", "pki", "kubelet-client-current.pem")
}

// Config is the rendered configuration file of a component.
func (n Node) Config(name string) string { return n.StatePath("config", name) }

// Log is the log file of a component.
func (n Node) Log(component string) string { return n.StatePath("log", component+".log") }

// StatusSocket is where `h8s supervise` answers.
func (n Node) StatusSocket() string { return n.RunPath("h8s.sock") }

// ContainerdSocket is containerd's socket as the host sees it; inside the node the
// same directory is /run/containerd.
func (n Node) ContainerdSocket() string { return n.RunPath("containerd", "containerd.sock") }

// Record is the pid record of a component.
func (n Node) Record(component string) string {
	return n.RunPath("components", component+".json")
}

// Cgroup is the node's subtree in every cgroup hierarchy, relative to its root.
func (n Node) Cgroup() string { return "/h8s/" + n.Name }
