package kubestack

import (
	"bufio"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/spf13/pflag"
)

// Options are the daemon's flags.
type Options struct {
	Kubeconfig    string
	Node          string
	NodeIP        netip.Addr
	ClusterDomain string
	// DNS are where resolvers listen, at most one address of each family.
	DNS          []netip.Addr
	ServiceCIDRs []netip.Prefix
	VXLANPort    uint16
	RunDir       string
	APIServers   []netip.AddrPort
	ResolvConf   string
	Health       string
	Version      bool
}

// Parse reads flags; pflag.ErrHelp is among its errors.
func Parse(args []string) (Options, error) {
	var o Options
	var nodeIP string
	var dns, services, servers []string
	f := pflag.NewFlagSet("kubestack", pflag.ContinueOnError)
	f.StringVar(&o.Kubeconfig, "kubeconfig", "", "how to reach the API server")
	f.StringVar(&o.Node, "node", "", "name of this node")
	f.StringVar(&nodeIP, "node-ip", "", "this node's address on the fabric")
	f.StringVar(&o.ClusterDomain, "cluster-domain", "cluster.local", "domain of the cluster")
	f.StringSliceVar(&dns, "dns-address", []string{"10.96.0.10"}, "where the resolver of each Network listens, one address of each family")
	f.StringSliceVar(&services, "service-cidrs", []string{"10.96.0.0/12"}, "ranges of ClusterIPs")
	f.Uint16Var(&o.VXLANPort, "vxlan-port", 8473, "UDP port of the overlay")
	f.StringVar(&o.RunDir, "run-dir", "/run/kubestack", "sockets, edge namespaces and attachments")
	f.StringSliceVar(&servers, "api-servers", nil, "addresses of API servers, IP:port")
	f.StringVar(&o.ResolvConf, "resolv-conf", "/etc/resolv.conf", "name servers of the node")
	f.StringVar(&o.Health, "health-address", "127.0.0.1:9645", "where /healthz, /readyz and /metrics are served; none if empty")
	f.BoolVar(&o.Version, "version", false, "print the version")
	if err := f.Parse(args); err != nil || o.Version {
		return o, err
	}
	var errs []error
	bad := func(flag, value string, err error) {
		errs = append(errs, fmt.Errorf("--%s %q: %w: %w", flag, value, err, errdefs.ErrInvalidArgument))
	}
	var err error
	if o.Node == "" {
		bad("node", "", errors.New("name this node"))
	}
	if o.NodeIP, err = netip.ParseAddr(nodeIP); err != nil {
		bad("node-ip", nodeIP, err)
	}
	for _, s := range dns {
		a, err := netip.ParseAddr(s)
		if err != nil {
			bad("dns-address", s, err)
		}
		o.DNS = append(o.DNS, a)
	}
	for _, s := range services {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			bad("service-cidrs", s, err)
		}
		o.ServiceCIDRs = append(o.ServiceCIDRs, p)
	}
	for _, s := range servers {
		a, err := netip.ParseAddrPort(s)
		if err != nil {
			bad("api-servers", s, err)
		}
		o.APIServers = append(o.APIServers, a)
	}
	return o, errors.Join(errs...)
}

// resolver is where the resolver of a Network listens for a family: as told, or the tenth
// address of the Service range, as is the custom.
func (o Options) resolver(v4 bool) (netip.Addr, bool) {
	for _, a := range o.DNS {
		if a.Is4() == v4 {
			return a, true
		}
	}
	for _, p := range o.ServiceCIDRs {
		if p.Addr().Is4() == v4 {
			a := p.Masked().Addr()
			for range 10 {
				a = a.Next()
			}
			return a, p.Contains(a)
		}
	}
	return netip.Addr{}, false
}

// nameservers reads resolv.conf; a node without one has no upstream.
func nameservers(path string) []netip.AddrPort {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	var out []netip.AddrPort
	for s := bufio.NewScanner(f); s.Scan() && len(out) < 3; {
		if fields := strings.Fields(s.Text()); len(fields) > 1 && fields[0] == "nameserver" {
			if a, err := netip.ParseAddr(fields[1]); err == nil {
				out = append(out, netip.AddrPortFrom(a, 53))
			}
		}
	}
	return out
}
