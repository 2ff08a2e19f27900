package command

import (
	"context"

	"github.com/hypernetes/hypernetes/volume/backend/local"
	"github.com/hypernetes/hypernetes/volume/record"
)

// localBackend is the driver of files of nodes.
func localBackend() *Backend {
	return &Backend{
		Driver: DriverLocal,
		Controller: func(_ context.Context, e ControllerEnv) (ControllerParts, error) {
			return ControllerParts{Volumes: local.NewKeeper(e.Client), TopologyKeys: []string{local.TopologyKey}}, nil
		},
		Node: func(_ context.Context, e NodeEnv) (NodeParts, error) {
			n, err := local.NewNode(local.NodeOptions{
				Name: e.Node, Driver: DriverLocal, Dir: local.Dir(e.StateDir), Records: record.Store{Root: e.RunDir}, REST: e.REST, Client: e.Client,
			})
			if err != nil {
				return NodeParts{}, err
			}
			return NodeParts{Files: n, Topology: map[string]string{local.TopologyKey: e.Node}, Run: n.Run}, nil
		},
	}
}
