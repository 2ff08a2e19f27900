package command

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/spf13/pflag"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/hypernetes/hypernetes/network/openstack"
	cinderbackend "github.com/hypernetes/hypernetes/volume/backend/cinder"
	"github.com/hypernetes/hypernetes/volume/owner"
	"github.com/hypernetes/hypernetes/volume/usage"
)

// cinder is the driver of OpenStack's volumes.
func cinder() *Backend {
	var file, cloud, profile, config string
	var roots []string
	storage := func(f *pflag.FlagSet) {
		f.StringVar(&config, "cinder-config", "", "YAML file that says of Cinder's storage what Cinder does not: NFS exports, Ceph's keyrings (docs/storage.md); none if empty")
	}
	return &Backend{
		Driver: DriverCinder,
		ControllerFlags: func(f *pflag.FlagSet) {
			f.StringVar(&file, "openstack-cloud-config", "", "clouds.yaml with the cluster's credentials at OpenStack, readable by its owner only; for "+DriverCinder)
			f.StringVar(&cloud, "openstack-cloud", "", "which cloud of it")
			f.StringVar(&profile, "openstack-profile", openstack.Full, "full: the credential has the role admin; least: it has a role in each tenant's project, see docs/storage.md")
			storage(f)
		},
		NodeFlags: func(f *pflag.FlagSet) {
			storage(f)
			f.StringSliceVar(&roots, "file-root", nil, "directories of this node that Cinder's files may be in, besides those of --cinder-config")
		},
		Controller: func(ctx context.Context, e ControllerEnv) (ControllerParts, error) {
			if file == "" || cloud == "" {
				return ControllerParts{}, fmt.Errorf("--openstack-cloud-config, --openstack-cloud: driver %s wants both, has %q and %q: %w", DriverCinder, file, cloud, errdefs.ErrInvalidArgument)
			}
			c, err := cinderbackend.ReadConfig(config)
			if err != nil {
				return ControllerParts{}, fmt.Errorf("--cinder-config: %w", err)
			}
			o := cinderbackend.Options{
				Cloud:    openstack.Options{File: file, Name: cloud, Profile: profile},
				Projects: owner.API{Reader: e.Client},
				Nodes:    usage.API{Reader: e.Client, Driver: DriverCinder},
			}
			if err := c.Apply(&o); err != nil {
				return ControllerParts{}, fmt.Errorf("--cinder-config: %w", err)
			}
			ns := &corev1.Namespace{}
			if err := e.Client.Get(ctx, client.ObjectKey{Name: "kube-system"}, ns); err != nil {
				return ControllerParts{}, fmt.Errorf("namespace kube-system, whose UID is the cluster's: %w", err)
			}
			o.Cluster = string(ns.UID)
			b, err := cinderbackend.New(o)
			if err != nil {
				return ControllerParts{}, err
			}
			return ControllerParts{Volumes: b, MultiNode: true, PublishedNodes: true, Run: b.Run}, nil
		},
		Node: func(context.Context, NodeEnv) (NodeParts, error) {
			c, err := cinderbackend.ReadConfig(config)
			if err != nil {
				return NodeParts{}, fmt.Errorf("--cinder-config: %w", err)
			}
			return NodeParts{Roots: append(c.Roots(), roots...), Tenants: true}, nil
		},
	}
}
