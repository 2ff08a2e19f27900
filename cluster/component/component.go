// Package component owns how each upstream program is started: its arguments,
// environment and configuration files, rendered from settings. It is pure: nothing
// here touches a file or a process, so that golden tests cover all of it.
package component

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/hypernetes/hypernetes/cluster/layout"
	"github.com/hypernetes/hypernetes/cluster/settings"
)

// Input is everything a component's configuration depends on.
type Input struct {
	Artifacts layout.Artifacts
	Node      layout.Node
	Settings  settings.Node
	// CgroupV1 says that the host has cgroup version 1 hierarchies.
	CgroupV1 bool
	// Proxy is the URL of the gateway's HTTP proxy inside the node, for image pulls.
	Proxy string
	// Path is the PATH of every component.
	Path string
	// Slirp is the path of slirp4netns, and AnchorPID the process whose network it is
	// to serve; both only for egress.
	Slirp     string
	AnchorPID int
}

// Component is one program: how it is called and the files it needs.
type Component struct {
	Name  string
	Path  string
	Args  []string
	Env   []string
	After []string
	// AfterObjects says that it needs the bootstrap objects too: its resources' definitions
	// and its rights.
	AfterObjects bool
	// AfterJoin says that it needs a certificate which an agent has once it has joined.
	AfterJoin bool
	// Files maps absolute paths to contents, all mode 0600.
	Files map[string]string
	// OnHost says that it runs in the machine's namespaces, not in the node's.
	OnHost bool
	// StopSeconds is the patience between SIGTERM and SIGKILL.
	StopSeconds int
}

// All returns the node's components in start order.
func All(in Input) []Component {
	all := []Component{registry(in), containerd(in)}
	switch {
	case in.Settings.RuntimeOnly:
	case in.Settings.IsAgent():
		all = append(all, kubelet(in), kubestack(in), kubeProxy(in), csiNode(in))
		for i := range all {
			// The control plane is another node's; what it needs of it is waited for
			// otherwise (AfterJoin).
			all[i].After = slices.DeleteFunc(all[i].After, func(name string) bool { return name == "kube-apiserver" })
			all[i].AfterObjects = false
			all[i].AfterJoin = all[i].Name == Kubestack || all[i].Name == "kube-proxy" || all[i].Name == CSINode
		}
	default:
		all = []Component{
			etcd(in), registry(in), containerd(in), apiserver(in), controllerManager(in), scheduler(in),
			controller(in), kubestack(in), kubeProxy(in), kubelet(in), csiNode(in), metricsServer(in),
		}
		all = append(all, storage(in)...)
	}
	if in.Settings.Egress {
		all = append(all, egress(in))
	}
	return all
}

// Registry is the component that serves the images that came along.
const Registry = "image-registry"

func registry(in Input) Component {
	return Component{
		Name: Registry, Path: in.Artifacts.Bin("h8s"), StopSeconds: 3,
		Args:  []string{"h8s", "image", "serve", "--listen", in.Settings.RegistryAddress(), "--dir", in.Artifacts.ImagesDir()},
		Env:   []string{"PATH=" + in.Path, "HOME=/root"},
		Files: map[string]string{in.Node.StatePath("etc", "certs.d", "_default", "hosts.toml"): registryHosts(in)},
	}
}

// registryHosts tells containerd to ask the node's own registry for any image first.
// Without a "server" the registry an image names is asked next.
func registryHosts(in Input) string {
	return fmt.Sprintf("[host.\"http://%s\"]\n  capabilities = [\"pull\", \"resolve\"]\n", in.Settings.RegistryAddress())
}

// egress connects the node to the machine's network as an ordinary program would be:
// by sockets, without a link or a rule on the machine.
func egress(in Input) Component {
	return Component{
		Name: "slirp4netns", Path: in.Slirp, OnHost: true, StopSeconds: 3, Files: map[string]string{},
		Args: []string{
			"slirp4netns", "--configure", "--mtu=1500", "--disable-host-loopback",
			"--netns-type=path", fmt.Sprintf("/proc/%d/ns/net", in.AnchorPID), settings.EgressLink,
		},
		Env: []string{"PATH=" + in.Path},
	}
}

// kubernetes builds a component of the multi-call Kubernetes binary, which goes by
// the name it is called by.
func (in Input) kubernetes(name string, flags ...string) Component {
	return Component{
		Name: name, Path: in.Artifacts.Bin("kubernetes"), Args: append([]string{name}, flags...),
		Env: []string{"PATH=" + in.Path, "HOME=/root"}, Files: map[string]string{}, StopSeconds: 10,
	}
}

func (in Input) pki(name string) string { return in.Node.PKI(name) }

func etcd(in Input) Component {
	c := in.kubernetes("etcd",
		"--name="+in.Node.Name,
		"--data-dir="+in.Node.StatePath("etcd"),
		"--listen-client-urls=https://127.0.0.1:2379",
		"--advertise-client-urls=https://127.0.0.1:2379",
		"--listen-peer-urls=https://127.0.0.1:2380",
		"--initial-advertise-peer-urls=https://127.0.0.1:2380",
		"--initial-cluster="+in.Node.Name+"=https://127.0.0.1:2380",
		"--client-cert-auth=true",
		"--trusted-ca-file="+in.pki("etcd-ca.crt"),
		"--cert-file="+in.pki("etcd-server.crt"),
		"--key-file="+in.pki("etcd-server.key"),
		"--peer-client-cert-auth=true",
		"--peer-trusted-ca-file="+in.pki("etcd-ca.crt"),
		"--peer-cert-file="+in.pki("etcd-server.crt"),
		"--peer-key-file="+in.pki("etcd-server.key"),
		"--auto-compaction-mode=periodic",
		"--auto-compaction-retention=5m",
		"--quota-backend-bytes=2147483648",
		"--log-level=warn",
	)
	c.StopSeconds = 15
	return c
}

func apiserver(in Input) Component {
	audit, encryption := in.Node.Config("audit-policy.yaml"), in.pki("encryption.yaml")
	c := in.kubernetes("kube-apiserver",
		"--advertise-address="+in.Settings.NodeIP,
		"--bind-address=0.0.0.0",
		fmt.Sprintf("--secure-port=%d", settings.APIPort),
		"--etcd-servers=https://127.0.0.1:2379",
		"--etcd-cafile="+in.pki("etcd-ca.crt"),
		"--etcd-certfile="+in.pki("etcd-client.crt"),
		"--etcd-keyfile="+in.pki("etcd-client.key"),
		"--tls-cert-file="+in.pki("apiserver.crt"),
		"--tls-private-key-file="+in.pki("apiserver.key"),
		"--client-ca-file="+in.pki("ca.crt"),
		"--authorization-mode=Node,RBAC",
		// A Service's externalIPs would take anybody's traffic (CVE-2020-8554), also where no tenant is.
		"--enable-admission-plugins=NodeRestriction,DenyServiceExternalIPs",
		"--enable-bootstrap-token-auth=true",
		// Of Pods on a node that is lost; five minutes, the default, are long for a Pod
		// that boots in seconds.
		"--default-not-ready-toleration-seconds=60",
		"--default-unreachable-toleration-seconds=60",
		"--anonymous-auth=true",
		"--service-cluster-ip-range="+settings.ServiceCIDRs,
		"--service-account-issuer=https://kubernetes.default.svc."+settings.ClusterDomain,
		"--service-account-key-file="+in.pki("service-account.pub"),
		"--service-account-signing-key-file="+in.pki("service-account.key"),
		"--kubelet-certificate-authority="+in.pki("ca.crt"),
		"--kubelet-client-certificate="+in.pki("apiserver-kubelet.crt"),
		"--kubelet-client-key="+in.pki("apiserver-kubelet.key"),
		// The default resolves the node's host name first, which nobody serves.
		"--kubelet-preferred-address-types=InternalIP",
		"--requestheader-client-ca-file="+in.pki("front-proxy-ca.crt"),
		"--requestheader-allowed-names=front-proxy",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-",
		"--requestheader-group-headers=X-Remote-Group",
		"--requestheader-username-headers=X-Remote-User",
		"--proxy-client-cert-file="+in.pki("front-proxy.crt"),
		"--proxy-client-key-file="+in.pki("front-proxy.key"),
		"--encryption-provider-config="+encryption,
		"--audit-policy-file="+audit,
		"--audit-log-path="+in.Node.StatePath("log", "audit.log"),
		"--audit-log-maxage=7",
		"--audit-log-maxbackup=4",
		"--audit-log-maxsize=50",
		"--profiling=false",
		"--allow-privileged=true",
		"--v=1",
	)
	c.Env = append(c.Env, "GOGC=50")
	c.After = []string{"etcd"}
	c.Files[audit] = auditPolicy
	if in.Settings.OpenStack != nil {
		config := in.Node.Config("keystone-webhook.yaml")
		c.Files[config] = keystoneWebhook(in)
		c.Args = append(c.Args, "--authentication-token-webhook-config-file="+config,
			"--authentication-token-webhook-version=v1",
			// On top of what the webhook remembers itself: a token that is revoked stops within
			// two minutes in all. The default alone is that long.
			"--authentication-token-webhook-cache-ttl=10s")
	}
	// It would wait for watches of clients that live on, such as DNS in a Pod that is
	// kept; what is stored is safe in etcd either way.
	c.StopSeconds = 5
	return c
}

func controllerManager(in Input) Component {
	kubeconfig := in.Node.InnerKubeconfig("controller-manager")
	c := in.kubernetes("kube-controller-manager",
		"--kubeconfig="+kubeconfig,
		"--authentication-kubeconfig="+kubeconfig,
		"--authorization-kubeconfig="+kubeconfig,
		"--bind-address=127.0.0.1",
		"--leader-elect=false",
		"--use-service-account-credentials=true",
		"--controllers=*,bootstrap-signer-controller,token-cleaner-controller",
		// A node that is not heard of may still write to its volumes: only who says that it is
		// out of service (the taint) has them detached.
		"--disable-force-detach-on-timeout=true",
		"--allocate-node-cidrs=true",
		"--cluster-cidr="+settings.PodCIDR,
		"--node-cidr-mask-size=24",
		"--service-cluster-ip-range="+settings.ServiceCIDRs,
		"--cluster-signing-cert-file="+in.pki("ca.crt"),
		"--cluster-signing-key-file="+in.pki("ca.key"),
		"--root-ca-file="+in.pki("ca.crt"),
		"--service-account-private-key-file="+in.pki("service-account.key"),
		// At the default of 20 per second, creating a service account per controller
		// holds back the default one, and with it every Pod, for about four seconds.
		"--kube-api-qps=200",
		"--kube-api-burst=400",
		"--profiling=false",
		"--v=1",
	)
	c.After = []string{"kube-apiserver"}
	return c
}

func scheduler(in Input) Component {
	kubeconfig := in.Node.InnerKubeconfig("scheduler")
	c := in.kubernetes("kube-scheduler",
		"--kubeconfig="+kubeconfig,
		"--authentication-kubeconfig="+kubeconfig,
		"--authorization-kubeconfig="+kubeconfig,
		"--bind-address=127.0.0.1",
		"--leader-elect=false",
		"--profiling=false",
		"--v=1",
	)
	c.After = []string{"kube-apiserver"}
	return c
}

func metricsServer(in Input) Component {
	kubeconfig := in.Node.InnerKubeconfig("metrics-server")
	c := in.kubernetes("metrics-server",
		"--kubeconfig="+kubeconfig,
		"--authentication-kubeconfig="+kubeconfig,
		"--authorization-kubeconfig="+kubeconfig,
		"--bind-address="+in.Settings.NodeIP,
		fmt.Sprintf("--secure-port=%d", MetricsPort),
		"--tls-cert-file="+in.pki("metrics-server-tls.crt"),
		"--tls-private-key-file="+in.pki("metrics-server-tls.key"),
		"--kubelet-certificate-authority="+in.pki("ca.crt"),
		"--kubelet-preferred-address-types=InternalIP",
		"--metric-resolution=15s",
	)
	c.After = []string{"kube-apiserver"}
	c.AfterObjects = true // it ends where it may not read what it asks for
	return c
}

// MetricsPort is the port of metrics-server on the node.
const MetricsPort = 4443

// noProxy lists what containerd must reach without the gateway's proxy.
func noProxy(in Input) string {
	return strings.Join([]string{"127.0.0.0/8", "localhost", in.Settings.NodeIP, settings.PodCIDR, settings.ServiceCIDR, settings.ServiceCIDR6, ".svc", "." + settings.ClusterDomain}, ",")
}

// SearchPath is the PATH of components: our own programs before the host's, and
// before both the replacements for host programs that cannot do what we need.
func SearchPath(a layout.Artifacts) string {
	return filepath.Join(a.Root, "libexec") + ":" + a.BinDir() + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
}
