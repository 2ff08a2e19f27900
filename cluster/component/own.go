package component

import (
	"cmp"
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
	if o := in.Settings.OpenStack; o != nil {
		c.Args = append(c.Args,
			"--openstack-cloud-config="+o.CloudConfig,
			"--openstack-cloud="+o.Cloud,
			"--keystone-cloud="+o.KeystoneCloud,
			"--keystone-webhook-address="+keystoneAddress,
			"--keystone-webhook-cert="+in.pki("webhook.crt"),
			"--keystone-webhook-key="+in.pki("webhook.key"),
			"--keystone-webhook-client-ca="+in.pki("front-proxy-ca.crt"),
			"--keystone-roles="+o.KeystoneRoles,
			"--keystone-tenants="+o.KeystoneTenants,
			"--default-provider="+cmp.Or(o.Networks, settings.Builtin),
			"--openstack-external-network="+o.External,
			"--openstack-profile="+cmp.Or(o.Profile, "full"),
			"--octavia-provider="+o.Octavia,
		)
	}
	return c
}

var keystoneAddress = fmt.Sprintf("127.0.0.1:%d", settings.KeystonePort)

// keystoneWebhook tells the API server whom to ask about tokens it does not know. It shows
// the certificate that only it has: what a token is worth is nobody else's to ask.
func keystoneWebhook(in Input) string {
	return render(doc{
		"apiVersion": "v1", "kind": "Config", "current-context": "keystone",
		"clusters": []doc{{"name": "keystone", "cluster": doc{
			"server": "https://" + keystoneAddress + "/authenticate", "certificate-authority": in.pki("ca.crt"),
		}}},
		"users": []doc{{"name": "kube-apiserver", "user": doc{
			"client-certificate": in.pki("front-proxy.crt"), "client-key": in.pki("front-proxy.key"),
		}}},
		"contexts": []doc{{"name": "keystone", "context": doc{"cluster": "keystone", "user": "kube-apiserver"}}},
	})
}

// fabricMTU is what a packet between nodes may hold.
const fabricMTU = 1500

// reserved lists what a tenant's Network must not overlap: addresses that mean something
// to the node wherever they are seen.
func reserved(s settings.Node) []string {
	out := append([]string{settings.ServiceCIDR, settings.ServiceCIDR6, settings.PodCIDR}, s.Reserved...)
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
