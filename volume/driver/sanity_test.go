package driver_test

import (
	"testing"

	"github.com/hypernetes/hypernetes/volume/backend/backendtest"
	"github.com/hypernetes/hypernetes/volume/driver/drivertest"
)

// TestSanity runs csi-sanity over both kinds of backends: one whose volumes are attached,
// and one whose volumes are files of the node.
func TestSanity(t *testing.T) {
	mutable := map[string]string{backendtest.Mutable: "100"}
	drivertest.Sanity(t,
		drivertest.Subject{Name: "attached", Volumes: backendtest.Attached{Keeper: &backendtest.Keeper{}}, Mutable: mutable},
		drivertest.Subject{Name: "near", Driver: "near.hypernetes.io", Volumes: backendtest.Near{Keeper: &backendtest.Keeper{Dir: t.TempDir()}},
			Topology: map[string]string{"topology.test/node": "node-1"}, Mutable: mutable},
	)
}
