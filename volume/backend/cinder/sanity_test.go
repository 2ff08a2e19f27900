package cinder

import (
	"maps"
	"os"
	"slices"
	"testing"

	"github.com/hypernetes/hypernetes/volume/driver/drivertest"
)

// TestSanity runs csi-sanity over the stand-in, for each kind of connection that no file is
// needed for, and over a real Cinder if there is one.
func TestSanity(t *testing.T) {
	drivertest.NeedRoot(t)
	rbd, iscsi := fake(t), fake(t)
	iscsi.fake.Kind = "iscsi"
	subjects := []drivertest.Subject{
		{Name: "rbd", Volumes: rbd, Mutable: map[string]string{paramType: rbd.typ}},
		{Name: "iscsi", Volumes: iscsi, Mutable: map[string]string{paramType: iscsi.typ}},
	}
	if os.Getenv("H8S_OPENSTACK") != "" {
		w := live(t)
		subjects = append(subjects, drivertest.Subject{Name: "real", Volumes: w, Roots: slices.Collect(maps.Values(w.o.Exports))})
	}
	drivertest.Sanity(t, subjects...)
}
