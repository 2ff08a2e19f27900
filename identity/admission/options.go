package admission

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"

	"github.com/hypernetes/hypernetes/network/subnet"
)

// Options of Setup.
type Options struct {
	// WebhookAddress is where the webhook listens and where the API server finds it.
	WebhookAddress string
	// CertFile and KeyFile are its certificate, read again when they change; CAFile is who
	// signed it.
	CertFile, KeyFile, CAFile string
	// ServiceCIDRs and ReservedCIDRs are ranges no tenant's Network may have.
	ServiceCIDRs, ReservedCIDRs []netip.Prefix
	// ClusterDomain ends the names of Services.
	ClusterDomain string
	// FabricMTU bounds a Network's; 0 leaves it to the controller.
	FabricMTU int32
	// Providers of Networks, the default first; builtin only if empty.
	Providers []string

	// VolumeOf tells whether a volume of Cinder's is a project's; known is false if there is
	// none of that ID that could be. Nil if the cluster belongs to no OpenStack.
	VolumeOf func(ctx context.Context, volume, project string) (own, known bool, err error)

	// rewrite is probe.Rewrite but for tests.
	rewrite func(*corev1.Pod) error
}

func (o Options) limits() subnet.Limits {
	return subnet.Limits{Services: o.ServiceCIDRs, Reserved: o.ReservedCIDRs, FabricMTU: o.FabricMTU, DefaultProvider: o.providers()[0]}
}

func (o Options) providers() []string {
	if len(o.Providers) == 0 {
		return []string{"builtin"}
	}
	return o.Providers
}

// read checks o and reads the certificate of who signed the webhook's.
func (o Options) read() (host string, port int, ca []byte, err error) {
	host, service, err := net.SplitHostPort(o.WebhookAddress)
	if err == nil {
		port, err = strconv.Atoi(service)
	}
	if err != nil || host == "" || port < 1 || port > 65535 {
		return "", 0, nil, fmt.Errorf("webhook address %q: want host:port, for example 127.0.0.1:9643: %w", o.WebhookAddress, errdefs.ErrInvalidArgument)
	}
	for _, file := range []string{o.CertFile, o.KeyFile} {
		if _, err := os.Stat(file); err != nil {
			return "", 0, nil, fmt.Errorf("webhook certificate: %w", err)
		}
	}
	ca, err = os.ReadFile(o.CAFile)
	if err != nil {
		return "", 0, nil, fmt.Errorf("webhook CA: %w", err)
	}
	return host, port, ca, nil
}
