package command

import (
	"context"

	"github.com/spf13/pflag"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/hypernetes/hypernetes/volume/backend"
)

// Names of the CSI drivers.
const (
	// DriverLocal keeps volumes in files of nodes.
	DriverLocal = "block.hypernetes.io"
	// DriverCinder is the name that Kubernetes translates inline cinder volumes to.
	DriverCinder = "cinder.csi.openstack.org"
)

// Backend is one driver as the commands make it. A backend's file has a function that
// returns one, whose closures share the values of its flags, and a line in Backends.
type Backend struct {
	// Driver is the CSI driver's name.
	Driver string
	// ControllerFlags and NodeFlags add what only this backend needs; nil for nothing. The
	// node's command serves all drivers, so its flags begin with the backend's name.
	ControllerFlags, NodeFlags func(*pflag.FlagSet)
	// Controller makes the keeper of volumes. What else it implements of package backend
	// decides what the driver says it can do.
	Controller func(ctx context.Context, e ControllerEnv) (ControllerParts, error)
	// Node makes the node's side.
	Node func(ctx context.Context, e NodeEnv) (NodeParts, error)
}

// ControllerEnv is what a backend's controller may use.
type ControllerEnv struct {
	// REST and Client reach the API server; Client does not cache and knows the core types
	// and this project's.
	REST   *rest.Config
	Client client.WithWatch
}

// ControllerParts is what a backend's controller consists of.
type ControllerParts struct {
	Volumes backend.Volumes
	// MultiNode: a volume may be attached to several nodes.
	MultiNode bool
	// PublishedNodes: what is listed always says which node has a volume, so that the
	// attacher may compare that with what it knows.
	PublishedNodes bool
	// TopologyKeys are those that the driver's nodes have; nil if volumes are reachable
	// from everywhere.
	TopologyKeys []string
	// Run works beside the driver until ctx ends; nil for nothing. Its error ends the
	// process.
	Run func(ctx context.Context) error
}

// NodeEnv is what a backend's node side may use.
type NodeEnv struct {
	REST   *rest.Config
	Client client.WithWatch
	// Node is the node's name; StateDir outlives a reboot, RunDir holds the records.
	Node, StateDir, RunDir string
}

// NodeParts is what a backend's node side consists of.
type NodeParts struct {
	// Files connects volumes that nobody attaches. A driver without it gets its connections
	// from the controller, sealed.
	Files backend.Files
	// Roots are directories that files and devices of attached volumes may be in.
	Roots []string
	// Topology are the node's segments.
	Topology map[string]string
	// Tenants: a Pod may only use volumes of the project of its namespace's tenant.
	Tenants bool
	// Run works beside the driver until ctx ends; nil for nothing. Its error ends the
	// process.
	Run func(ctx context.Context) error
}

// Backends are the drivers of this build.
func Backends() []*Backend {
	return []*Backend{localBackend(), cinder()}
}
