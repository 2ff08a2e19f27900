package controller

import (
	"cmp"
	"context"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/pflag"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/metrics"

	"github.com/hypernetes/hypernetes/identity/binding"
	"github.com/hypernetes/hypernetes/identity/keystone"
	"github.com/hypernetes/hypernetes/identity/keystone/login"
	"github.com/hypernetes/hypernetes/identity/keystone/projects"
	"github.com/hypernetes/hypernetes/identity/tenant"
)

// OpenStack is the cloud that the cluster belongs to, if any.
type OpenStack struct {
	// CloudConfig is a clouds.yaml, Cloud which of its clouds.
	CloudConfig, Cloud string
	// Keystone says how its users are let in.
	Keystone struct {
		// Address of the webhook that the API server asks; none if empty.
		Address, Cert, Key, ClientCA string
		Roles, Tenants               string
		// Cloud is the cloud of the file whose user asks; the other if empty. The one that makes
		// Networks need not be in any project of its own.
		Cloud string
		// Wrap replaces the way to Keystone, Remember is how long its answers are good, Every how
		// often it is asked for projects. There are no flags for them.
		Wrap            func(http.RoundTripper) http.RoundTripper
		Remember, Every time.Duration
	}
}

func (o *OpenStack) flags(f *pflag.FlagSet) {
	f.StringVar(&o.CloudConfig, "openstack-cloud-config", "", "clouds.yaml with the cluster's credentials at OpenStack, readable by its owner only; empty for no OpenStack")
	f.StringVar(&o.Cloud, "openstack-cloud", "", "which cloud of it")
	k := &o.Keystone
	f.StringVar(&k.Cloud, "keystone-cloud", "", "which cloud of it asks Keystone, if another than --openstack-cloud")
	f.StringVar(&k.Address, "keystone-webhook-address", "", "where the API server finds the webhook that knows Keystone's tokens; empty for none")
	f.StringVar(&k.Cert, "keystone-webhook-cert", "", "file with that webhook's certificate")
	f.StringVar(&k.Key, "keystone-webhook-key", "", "file with its key")
	f.StringVar(&k.ClientCA, "keystone-webhook-client-ca", "", "file with the certificate of who signed those that may ask it; anybody may if empty")
	f.StringVar(&k.Roles, "keystone-roles", "", "which of Keystone's roles, by name or ID, stand for which of a tenant's: member=manager,…; reader, member and manager for themselves if empty")
	f.StringVar(&k.Tenants, "keystone-tenants", "", "projects that Tenants are made for: tag=NAME or domain=ID; none if empty")
}

func (o *OpenStack) check() error {
	k := o.Keystone
	wrong := func(flag, format string, args ...any) error {
		return fmt.Errorf("--%s: %s: %w", flag, fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
	}
	if (o.CloudConfig == "") != (o.Cloud == "") {
		return wrong("openstack-cloud-config, --openstack-cloud", "want both or neither, have %q and %q", o.CloudConfig, o.Cloud)
	}
	if k.Address != "" {
		if o.CloudConfig == "" {
			return wrong("keystone-webhook-address", "%s: needs --openstack-cloud-config and --openstack-cloud", k.Address)
		}
		if _, _, err := net.SplitHostPort(k.Address); err != nil {
			return wrong("keystone-webhook-address", "%q: want host:port", k.Address)
		}
		if k.Cert == "" || k.Key == "" {
			return wrong("keystone-webhook-cert, --keystone-webhook-key", "want files")
		}
	}
	if _, err := keystone.ParseRoles(k.Roles); err != nil {
		return fmt.Errorf("--keystone-roles: %w", err)
	}
	if _, err := projects.ParseRule(k.Tenants); err != nil {
		return fmt.Errorf("--keystone-tenants: %w", err)
	}
	return nil
}

// credentials reads them anew each time.
func (o *OpenStack) credentials() (login.Credentials, error) {
	st, err := os.Stat(o.CloudConfig)
	if err != nil {
		return login.Credentials{}, fmt.Errorf("--openstack-cloud-config: %w", err)
	}
	if mode := st.Mode().Perm(); mode&0o077 != 0 {
		return login.Credentials{}, fmt.Errorf("--openstack-cloud-config: %s has mode %#o and holds a secret: chmod 600 it: %w", o.CloudConfig, uint32(mode&fs.ModePerm), errdefs.ErrInvalidArgument)
	}
	return login.FromFile(o.CloudConfig, cmp.Or(o.Keystone.Cloud, o.Cloud))
}

// identity adds Keystone's part to a manager: the webhook, which every replica serves, and
// what watches projects, which the leader runs. Keystone need not answer for that.
func (o *OpenStack) identity(m ctrl.Manager) (tenant.Projects, error) {
	if o.CloudConfig == "" {
		return nil, nil
	}
	if _, err := o.credentials(); err != nil {
		return nil, err
	}
	rule, err := projects.ParseRule(o.Keystone.Tenants)
	if err != nil {
		return nil, err
	}
	roles, err := keystone.ParseRoles(o.Keystone.Roles)
	if err != nil {
		return nil, err
	}
	service := keystone.NewService(o.credentials, o.Keystone.Wrap)
	watcher := projects.New(service, m.GetClient(), rule)
	if o.Keystone.Every > 0 {
		watcher.Every = o.Keystone.Every
	}
	if err := m.Add(watcher); err != nil {
		return nil, err
	}
	if o.Keystone.Address == "" {
		return watcher, nil
	}
	reviewer, err := keystone.NewReviewer(service, owners{m.GetClient()}, roles, keystone.NewMetrics(metrics.Registry))
	if err != nil {
		return nil, err
	}
	if o.Keystone.Remember > 0 {
		reviewer.Remember = o.Keystone.Remember
	}
	server, err := keystone.NewServer(reviewer, keystone.ServerOptions{
		Address: o.Keystone.Address, CertFile: o.Keystone.Cert, KeyFile: o.Keystone.Key, ClientCAFile: o.Keystone.ClientCA,
	})
	if err != nil {
		return nil, fmt.Errorf("webhook: %w", err)
	}
	return watcher, m.Add(server)
}

// owners tells whose a project is, from the manager's cache.
type owners struct{ client.Reader }

var _ keystone.Tenants = owners{}

// TenantOf implements keystone.Tenants.
func (o owners) TenantOf(ctx context.Context, id string) (string, error) {
	t, err := binding.Project(ctx, o.Reader, id)
	if err != nil {
		return "", err
	}
	return t.Name, nil
}
