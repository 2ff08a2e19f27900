package controller

import (
	"context"

	"github.com/hypernetes/hypernetes/network/openstack"
	"github.com/hypernetes/hypernetes/volume/backend/cinder"
)

// volumeOf tells admission whose volumes of Cinder's are; nil if the cluster belongs to no
// OpenStack. The cloud need not answer, nor have Cinder.
func (o Options) volumeOf() (func(ctx context.Context, volume, project string) (own, known bool, err error), error) {
	if o.OpenStack.CloudConfig == "" {
		return nil, nil
	}
	cloud, err := openstack.New(openstack.Options{File: o.OpenStack.CloudConfig, Name: o.OpenStack.Cloud, Profile: o.Networks.Profile, Transport: o.Networks.Transport})
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, volume, project string) (bool, bool, error) {
		return cinder.Belongs(ctx, cloud, volume, project)
	}, nil
}
