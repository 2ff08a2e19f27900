package component

import (
	"encoding/json"
	"fmt"

	"sigs.k8s.io/yaml"

	"github.com/hypernetes/hypernetes/cluster/settings"
)

// doc is a configuration document in the making.
type doc = map[string]any

// render turns a document into YAML. Documents here are literals of plain types,
// so marshalling cannot fail.
func render(d doc) string {
	b, err := yaml.Marshal(d)
	if err != nil {
		panic(err)
	}
	return string(b)
}

func kubelet(in Input) Component {
	config := in.Node.Config("kubelet.yaml")
	c := in.kubernetes("kubelet",
		"--config="+config,
		"--kubeconfig="+in.Node.InnerKubeconfig("kubelet"),
		"--hostname-override="+in.Node.Name,
		"--node-ip="+in.Settings.NodeIP,
		"--v=1",
	)
	if in.Settings.IsAgent() {
		c.Args = append(c.Args, "--bootstrap-kubeconfig="+in.Node.BootstrapKubeconfig())
	}
	c.After = []string{"containerd", "kube-apiserver"}
	c.Files[config] = render(kubeletConfiguration(in))
	return c
}

func kubeletConfiguration(in Input) doc {
	d := doc{
		"apiVersion": "kubelet.config.k8s.io/v1beta1",
		"kind":       "KubeletConfiguration",
		"authentication": doc{
			"anonymous": doc{"enabled": false},
			"webhook":   doc{"enabled": true, "cacheTTL": "10s"},
			"x509":      doc{"clientCAFile": in.pki("ca.crt")},
		},
		"authorization":            doc{"mode": "Webhook"},
		"tlsCertFile":              in.pki("kubelet-server.crt"),
		"tlsPrivateKeyFile":        in.pki("kubelet-server.key"),
		"tlsMinVersion":            "VersionTLS12",
		"containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
		"cgroupDriver":             "cgroupfs",
		"cgroupRoot":               in.Node.Cgroup(),
		// One path in every hierarchy for the kubelet and for the runtime; without it
		// version 1 hosts report "cpu and memory cgroup hierarchy not unified".
		"kubeletCgroups":         in.Node.Cgroup() + "/system/kubelet",
		"clusterDNS":             []string{settings.DNSServiceIP},
		"clusterDomain":          settings.ClusterDomain,
		"resolvConf":             "/etc/resolv.conf",
		"volumePluginDir":        "/var/lib/kubelet/volumeplugins",
		"makeIPTablesUtilChains": false,
		"failSwapOn":             false,
		"serializeImagePulls":    false,
		"maxPods":                250,
		"podPidsLimit":           16384,
		// A kubelet that was Ready before a stop says how it is at once, when the network is
		// not ready yet, and then not again for ten seconds, the default. It reports only
		// what has changed.
		"nodeStatusUpdateFrequency": "3s",
		"nodeStatusReportFrequency": "5m",
		"registerNode":              true,
		"rotateCertificates":        false,
		"readOnlyPort":              0,
		"healthzBindAddress":        "127.0.0.1",
		"healthzPort":               10248,
		"enableDebuggingHandlers":   true,
		"protectKernelDefaults":     false,
		"containerLogMaxSize":       "10Mi",
		"containerLogMaxFiles":      3,
		// The disk is the host's: the kubelet must not evict Pods because a laptop
		// is 85 % full.
		"evictionHard": doc{
			"memory.available": "100Mi", "nodefs.available": "2%", "nodefs.inodesFree": "1%", "imagefs.available": "2%",
		},
		"imageGCHighThresholdPercent": 98,
		"imageGCLowThresholdPercent":  95,
		"systemReserved":              doc{"memory": "768Mi", "cpu": "100m"},
		// A volume that fails is an event of the Pod that has it.
		"featureGates": doc{"CSIVolumeHealth": true},
		// Virtual machines on a busy host without hardware acceleration may take long.
		"runtimeRequestTimeout": "4m",
	}
	if in.Settings.IsAgent() {
		// It asks for its certificates itself, and for new ones before they expire.
		delete(d, "tlsCertFile")
		delete(d, "tlsPrivateKeyFile")
		d["rotateCertificates"], d["serverTLSBootstrap"] = true, true
	}
	if in.CgroupV1 {
		d["failCgroupV1"] = false
	}
	return d
}

func kubeProxy(in Input) Component {
	config := in.Node.Config("kube-proxy.yaml")
	c := in.kubernetes("kube-proxy", "--config="+config, "--v=1")
	c.After = []string{"kube-apiserver"}
	c.Files[config] = render(doc{
		"apiVersion":         "kubeproxy.config.k8s.io/v1alpha1",
		"kind":               "KubeProxyConfiguration",
		"mode":               "nftables",
		"clientConnection":   doc{"kubeconfig": in.Node.InnerKubeconfig("proxy")},
		"clusterCIDR":        settings.PodCIDR,
		"hostnameOverride":   in.Node.Name,
		"bindAddress":        in.Settings.NodeIP,
		"healthzBindAddress": "127.0.0.1:10256",
		"metricsBindAddress": "127.0.0.1:10249",
		// nf_conntrack_max belongs to the initial network namespace only.
		"conntrack": doc{"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
	})
	return c
}

// CNIConfig is the network of Pods. The node's own plugin asks kubestack where a Pod
// belongs and leaves those of no tenant's Network to its delegates. A node without
// Kubernetes has only these.
func CNIConfig(s settings.Node) string {
	plugins := delegates(s)
	version := "1.0.0"
	if !s.RuntimeOnly {
		version = "1.1.0" // STATUS and GC
		plugins = []doc{{
			"type": "hypernetes", "capabilities": doc{"portMappings": true}, "delegates": plugins,
		}}
	}
	b, err := json.MarshalIndent(doc{"cniVersion": version, "name": "h8s", "plugins": plugins}, "", "  ")
	if err != nil {
		panic(err) // a literal of plain types
	}
	return string(b) + "\n"
}

// delegates are the plugins of the default network: routed, without a bridge. Each Pod
// gets a veth whose host end the node routes its address to. A node on the machine's own
// network lets Pods out under its address; an isolated one has its own rule for its
// egress. Where there is Kubernetes, the node's range of addresses is not known before
// it has joined, and kubestack tells it.
func delegates(s settings.Node) []doc {
	ipam := doc{"type": "host-local", "routes": []doc{{"dst": "0.0.0.0/0"}}}
	if s.RuntimeOnly {
		ipam["ranges"] = [][]doc{{{"subnet": settings.NodePodCIDR}}}
	}
	return []doc{
		{"type": "ptp", "ipMasq": s.HostNetwork, "ipMasqBackend": "nftables", "mtu": 1500, "ipam": ipam},
		{"type": "portmap", "capabilities": doc{"portMappings": true}, "snat": true, "backend": "nftables"},
	}
}

func containerd(in Input) Component {
	config := in.Node.Config("containerd.toml")
	c := Component{
		Name: "containerd", Path: in.Artifacts.Bin("containerd"), Args: []string{"containerd", "--config", config},
		Env:   []string{"PATH=" + in.Path, "HOME=/root"},
		Files: map[string]string{config: containerdConfig(in)}, StopSeconds: 10,
	}
	if in.Proxy != "" {
		for _, name := range []string{"HTTP_PROXY", "HTTPS_PROXY"} {
			c.Env = append(c.Env, name+"="+in.Proxy)
		}
		c.Env = append(c.Env, "NO_PROXY="+noProxy(in))
	}
	return c
}

// containerdConfig is containerd's config.toml. Only what differs from the defaults
// of 2.4 is said.
func containerdConfig(in Input) string {
	return fmt.Sprintf(containerdTemplate, in.Artifacts.CNIDir())
}

const containerdTemplate = `version = 4
root = '/var/lib/containerd'
state = '/run/containerd'
# Scores below our own need CAP_SYS_RESOURCE, which a container or a build machine lacks.
oom_score = 0
imports = []

disabled_plugins = [
  'io.containerd.snapshotter.v1.blockfile',
  'io.containerd.snapshotter.v1.native',
  'io.containerd.tracing.processor.v1.otlp',
  'io.containerd.internal.v1.tracing',
]

[plugins.'io.containerd.server.v1.grpc']
  address = '/run/containerd/containerd.sock'

[plugins.'io.containerd.cri.v1.images']
  # Layers are EROFS files that virtual machines attach read-only.
  snapshotter = 'erofs'
  use_local_image_pull = false

  [plugins.'io.containerd.cri.v1.images'.pinned_images]
    sandbox = 'h8s.local/pause:1'

  [plugins.'io.containerd.cri.v1.images'.registry]
    config_path = '/etc/h8s/certs.d'

[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  enable_unprivileged_ports = true
  enable_unprivileged_icmp = true

  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = ['/opt/cni/bin', '%s']
    conf_dir = '/etc/cni/net.d'

  [plugins.'io.containerd.cri.v1.runtime'.containerd]
    default_runtime_name = 'hyper'

    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.hyper]
      runtime_type = 'io.containerd.hyper.v2'
      sandboxer = 'shim'
      disable_pause_image_pull = true
      privileged_without_host_devices = true
      pod_annotations = ['hypernetes.io/*']
      snapshotter = 'erofs'

      [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.hyper.options]
        ConfigPath = '/etc/h8s/hyper.toml'

    # Ordinary containers of the node's own kernel, for operators.
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
      runtime_type = 'io.containerd.runc.v2'
      sandboxer = 'podsandbox'

      [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
        SystemdCgroup = false

[plugins.'io.containerd.service.v1.diff-service']
  # The walking differ would mount a layer's parents on the host (libexec/mkfs.erofs).
  default = ['erofs', 'walking']

[plugins.'io.containerd.transfer.v1.local']
  config_path = '/etc/h8s/certs.d'

  [[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
    platform = 'linux'
    snapshotter = 'erofs'
    differ = 'erofs'
`
