package backendtest

import (
	"testing"

	"github.com/hypernetes/hypernetes/volume/backend"
)

func TestFakes(t *testing.T) {
	for name, v := range map[string]backend.Volumes{
		"attached": Attached{&Keeper{}},
		"near":     Near{&Keeper{Dir: t.TempDir()}},
	} {
		t.Run(name, func(t *testing.T) {
			Run(t, Subject{Volumes: v, Nodes: []string{"node-1", "node-2"}, Mutable: map[string]string{Mutable: "100"}})
		})
	}
}
