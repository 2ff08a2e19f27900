package command

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
)

// local is the driver of files of nodes.
func local() *Backend {
	return &Backend{
		Driver: DriverLocal,
		Controller: func(context.Context, ControllerEnv) (ControllerParts, error) {
			return ControllerParts{}, fmt.Errorf("driver %s is not in this build: %w", DriverLocal, errdefs.ErrNotImplemented)
		},
		Node: func(context.Context, NodeEnv) (NodeParts, error) {
			return NodeParts{}, fmt.Errorf("driver %s is not in this build: %w", DriverLocal, errdefs.ErrNotImplemented)
		},
	}
}
