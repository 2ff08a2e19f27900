package command

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/spf13/pflag"
)

// cinder is the driver of OpenStack's volumes.
func cinder() *Backend {
	var roots []string
	return &Backend{
		Driver: DriverCinder,
		NodeFlags: func(f *pflag.FlagSet) {
			f.StringSliceVar(&roots, "file-root", nil, "directories of this node that Cinder's files may be in")
		},
		Controller: func(context.Context, ControllerEnv) (ControllerParts, error) {
			return ControllerParts{}, fmt.Errorf("driver %s is not in this build: %w", DriverCinder, errdefs.ErrNotImplemented)
		},
		Node: func(context.Context, NodeEnv) (NodeParts, error) {
			return NodeParts{Roots: roots, Tenants: true}, nil
		},
	}
}
