package component

import (
	"fmt"
	"strings"

	"github.com/hypernetes/hypernetes/cluster/settings"
)

// Our own components of Kubernetes, and the names of their identities.
const (
	Controller = "h8s-controller"
	Kubestack  = "kubestack"
)

// own builds one of our own components.
func (in Input) own(name string, flags ...string) Component {
	return Component{
		Name: name, Path: in.Artifacts.Bin(name), Args: append([]string{name}, flags...),
		Env: []string{"PATH=" + in.Path, "HOME=/root"}, Files: map[string]string{}, StopSeconds: 10,
		After: []string{"kube-apiserver"}, AfterObjects: true,
	}
}

// controller is the cluster's controllers of tenants and their Networks, with the
// admission webhook that only this node's API server calls.
func controller(in Input) Component {
	c := in.own(Controller,
		"--kubeconfig="+in.Node.InnerKubeconfig(Controller),
		"--service-cidrs="+settings.ServiceCIDRs,
		"--reserved-cidrs="+strings.Join(reserved(in.Settings), ","),
		"--cluster-domain="+settings.ClusterDomain,
		fmt.Sprintf("--webhook-address=127.0.0.1:%d", settings.WebhookPort),
		"--webhook-cert="+in.pki("webhook.crt"),
		"--webhook-key="+in.pki("webhook.key"),
		"--webhook-ca="+in.pki("ca.crt"),
		fmt.Sprintf("--health-address=127.0.0.1:%d", settings.ControllerHealthPort),
		// There is one; a lease of one that was killed would only hold up the next.
		"--leader-elect=false",
		fmt.Sprintf("--fabric-mtu=%d", fabricMTU),
	)
	return c
}

// fabricMTU is what a packet between nodes may hold.
const fabricMTU = 1500

// reserved lists what a tenant's Network must not overlap: addresses that mean something
// to the node wherever they are seen.
func reserved(s settings.Node) []string {
	out := []string{settings.ServiceCIDR, settings.ServiceCIDR6, settings.PodCIDR}
	if s.HostNetwork {
		return append(out, s.NodeIP+"/32")
	}
	return append(out, settings.NodeCIDR)
}

// kubestack is the node's part of tenants' Networks: it plugs Pods in.
func kubestack(in Input) Component {
	return in.own(Kubestack,
		"--kubeconfig="+in.Node.InnerKubeconfig(Kubestack),
		"--node="+in.Node.Name,
		"--node-ip="+in.Settings.NodeIP,
		"--cluster-domain="+settings.ClusterDomain,
		"--dns-address="+settings.DNSServiceIP,
		"--service-cidrs="+settings.ServiceCIDRs,
		fmt.Sprintf("--vxlan-port=%d", settings.VXLANPort),
		"--run-dir=/run/kubestack",
		"--api-servers="+strings.TrimPrefix(in.Settings.APIServer(), "https://"),
		"--resolv-conf=/etc/resolv.conf",
		fmt.Sprintf("--health-address=127.0.0.1:%d", settings.KubestackHealthPort),
	)
}
