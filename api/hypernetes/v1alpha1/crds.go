package v1alpha1

import "embed"

// CRDs holds the CustomResourceDefinitions of the objects here, crds/*.yaml, as
// controller-gen writes them (scripts/generate.sh).
//
//go:embed crds/*.yaml
var CRDs embed.FS
