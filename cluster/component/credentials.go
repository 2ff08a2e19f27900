package component

import (
	"fmt"
	"hash/fnv"

	"github.com/hypernetes/hypernetes/cluster/pki"
	"github.com/hypernetes/hypernetes/cluster/settings"
)

// Authorities of a node's cluster. The front proxy and etcd have their own so that
// a client certificate of the cluster is worth nothing to them.
func Authorities() []string { return []string{"ca", "front-proxy-ca", "etcd-ca"} }

// SigningKeys are bare key pairs.
func SigningKeys() []string { return []string{"service-account"} }

// User is a client identity that gets a kubeconfig.
type User struct{ Name, CN, Group string }

// Users of the node's own components.
func Users(in Input) []User {
	return []User{
		{"controller-manager", "system:kube-controller-manager", ""},
		{"scheduler", "system:kube-scheduler", ""},
		{"proxy", "system:kube-proxy", ""},
		{"kubelet", "system:node:" + in.Node.Name, "system:nodes"},
		{"metrics-server", "system:h8s:metrics-server", ""},
		{Controller, "h8s:controller", "h8s:controllers"},
		{Kubestack, "h8s:kubestack:" + in.Node.Name, "h8s:kubestacks"},
		{CSINode, "h8s:csi-node:" + in.Node.Name, "h8s:csi-nodes"},
		{CSIController, "h8s:csi-controller", "h8s:csi-controllers"},
		{CSISidecars, "h8s:csi-sidecars", "h8s:csi-sidecars"},
		{"admin", "h8s:admin", "system:masters"},
	}
}

// Leaves lists every certificate of the node.
func Leaves(in Input) []pki.Leaf {
	ip, name := in.Settings.NodeIP, in.Node.Name
	apiHosts := []string{
		"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc." + settings.ClusterDomain,
		"localhost", name, "127.0.0.1", ip, settings.ServiceIP,
	}
	leaves := []pki.Leaf{
		{File: "apiserver", CA: "ca", CN: "kube-apiserver", Use: pki.Server, Hosts: apiHosts},
		{File: "apiserver-kubelet", CA: "ca", CN: "kube-apiserver-kubelet-client", Use: pki.Client},
		{File: "front-proxy", CA: "front-proxy-ca", CN: "front-proxy", Use: pki.Client},
		{File: "etcd-server", CA: "etcd-ca", CN: "etcd", Use: pki.Client | pki.Server, Hosts: []string{"localhost", "127.0.0.1"}},
		{File: "etcd-client", CA: "etcd-ca", CN: "kube-apiserver-etcd-client", Use: pki.Client},
		{File: "kubelet-server", CA: "ca", CN: "system:node:" + name, Groups: []string{"system:nodes"}, Use: pki.Server, Hosts: []string{name, ip, "127.0.0.1"}},
		{File: "webhook", CA: "ca", CN: "h8s-webhook", Use: pki.Server, Hosts: []string{"127.0.0.1", "localhost"}},
		{File: "metrics-server-tls", CA: "ca", CN: "metrics-server", Use: pki.Server, Hosts: []string{MetricsHost, ip}},
	}
	for _, u := range Users(in) {
		l := pki.Leaf{File: u.Name, CA: "ca", CN: u.CN, Use: pki.Client}
		if u.Group != "" {
			l.Groups = []string{u.Group}
		}
		leaves = append(leaves, l)
	}
	return leaves
}

// MetricsHost is the name by which the API server verifies metrics-server.
const MetricsHost = "metrics-server.kube-system.svc"

// HyperConfig renders the VM runtime's configuration, read by the shim.
func HyperConfig(in Input) string {
	a := in.Artifacts
	return fmt.Sprintf(`# Written by h8s at every start.
kernel = %q
initrd = %q
scratch = %q
machine = "q35"
accelerator = "auto"
default_memory_mib = 256
default_vcpus = 1
kubelet_root = "/var/lib/kubelet"
state_dir = "/run/h8s-shim"
scratch_dir = "/var/lib/h8s-shim"
uid_base = %d
`, a.Share("vmlinux"), a.Share("initramfs.img"), a.Share("scratch.ext4"), uidBase(in.Node.Name))
}

// Users of virtual machines: each node has 65536 of its own, so that the machines of
// two nodes cannot signal or trace each other.
const (
	firstUID     = 1879048192
	uidsPerNode  = 65536
	uidRanges    = 4096
	standardNode = "h8s"
)

// uidBase spreads nodes over the ranges by name; the standard node has the first.
func uidBase(name string) int {
	if name == standardNode {
		return firstUID
	}
	h := fnv.New32a()
	_, _ = h.Write([]byte(name)) // cannot fail
	return firstUID + (1+int(h.Sum32()%(uidRanges-1)))*uidsPerNode
}
