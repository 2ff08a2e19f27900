package controller

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/pflag"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/claim"
	network "github.com/hypernetes/hypernetes/network/controller"
	"github.com/hypernetes/hypernetes/network/loadbalancer/octavia"
	"github.com/hypernetes/hypernetes/network/openstack"
	"github.com/hypernetes/hypernetes/network/provider"
	"github.com/hypernetes/hypernetes/network/provider/builtin"
	"github.com/hypernetes/hypernetes/network/provider/neutron"
	"github.com/hypernetes/hypernetes/network/subnet"
)

// Networks says who carries Networks.
type Networks struct {
	// Default provider of those that name none.
	Default string
	// External network of the cloud, Profile of the credential there.
	External, Profile string
	// Octavia is the provider of its load balancers.
	Octavia string
	// Transport replaces the way to the cloud. There is no flag for it, nor for Resync and
	// Poll, which are those of package network/controller.
	Transport    *http.Transport
	Resync, Poll time.Duration
}

func (o *Networks) flags(f *pflag.FlagSet) {
	f.StringVar(&o.Default, "default-provider", provider.Builtin, "who carries Networks that name nobody: builtin or neutron, which needs --openstack-cloud-config")
	f.StringVar(&o.External, "openstack-external-network", "", "name or ID of the cloud's network that routers lead to and floating IPs are of; the only one if empty")
	f.StringVar(&o.Octavia, "octavia-provider", "", "provider of Octavia that load balancers are made with; its default if empty")
	f.StringVar(&o.Profile, "openstack-profile", openstack.Full, "full: the credential has the role admin; least: it has a role in each tenant's project, see docs/openstack.md")
}

func (o *Networks) check(cloud OpenStack) error {
	switch o.Default {
	case "", provider.Builtin:
	case provider.Neutron:
		if cloud.CloudConfig == "" {
			return fmt.Errorf("--default-provider: %s: needs --openstack-cloud-config and --openstack-cloud: %w", o.Default, errdefs.ErrInvalidArgument)
		}
	default:
		return fmt.Errorf("--default-provider: %q: want %s or %s: %w", o.Default, provider.Builtin, provider.Neutron, errdefs.ErrInvalidArgument)
	}
	if !slices.Contains([]string{"", openstack.Full, openstack.Least}, o.Profile) {
		return fmt.Errorf("--openstack-profile: %q: want %s or %s: %w", o.Profile, openstack.Full, openstack.Least, errdefs.ErrInvalidArgument)
	}
	return nil
}

// names of the providers there are, the default first.
func (o *Networks) names(cloud OpenStack) []string {
	switch {
	case cloud.CloudConfig == "":
		return []string{provider.Builtin}
	case o.Default == provider.Neutron:
		return []string{provider.Neutron, provider.Builtin}
	}
	return []string{provider.Builtin, provider.Neutron}
}

// providers makes them, and what balances load in their Networks. The cloud need not answer for that.
func (o *Networks) providers(ctx context.Context, m ctrl.Manager, claims claim.Store, limits subnet.Limits, cloud OpenStack) ([]network.Provider, error) {
	own := builtin.New(claims, limits)
	if cloud.CloudConfig == "" {
		return []network.Provider{own}, nil
	}
	c, err := openstack.New(openstack.Options{File: cloud.CloudConfig, Name: cloud.Cloud, Profile: o.Profile, Transport: o.Transport})
	if err != nil {
		return nil, err
	}
	uid, err := clusterUID(ctx, m.GetAPIReader())
	if err != nil {
		return nil, err
	}
	projects := projectOf(m.GetClient())
	theirs := neutron.New(neutron.Options{Cloud: c, Cluster: uid, Projects: projects, External: o.External, Limits: limits})
	all := []network.Provider{own, theirs}
	if o.Default == provider.Neutron {
		all = []network.Provider{theirs, own}
	}
	return all, octavia.Setup(m, octavia.Options{
		Cloud: c, Addresses: theirs, Unclassed: network.NewCloud(m, network.Options{Providers: all, Claims: claims}),
		Cluster: uid, Projects: projects, Provider: o.Octavia, Resync: o.Resync, Poll: o.Poll,
	})
}

// projectOf finds a tenant's project.
func projectOf(c client.Reader) func(context.Context, string) (string, error) {
	return func(ctx context.Context, tenant string) (string, error) {
		t := &v1alpha1.Tenant{}
		if err := c.Get(ctx, client.ObjectKey{Name: tenant}, t); apierrors.IsNotFound(err) || err == nil && t.Spec.Keystone == nil {
			return "", fmt.Errorf("tenant %s has no project: %w", tenant, errdefs.ErrNotFound)
		} else if err != nil {
			return "", err
		}
		return t.Spec.Keystone.ProjectID, nil
	}
}

// clusterUID tells this cluster from others: the UID of kube-system, which lasts as long
// as the cluster does. The API server makes that namespace soon after it starts.
func clusterUID(ctx context.Context, c client.Reader) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		ns := &corev1.Namespace{}
		err := c.Get(ctx, client.ObjectKey{Name: metav1.NamespaceSystem}, ns)
		if err == nil {
			return string(ns.UID), nil
		}
		select {
		case <-ctx.Done():
			return "", fmt.Errorf("the cluster's identity: %w", err)
		case <-time.After(500 * time.Millisecond):
		}
	}
}
