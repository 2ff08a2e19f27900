// Package crds holds the CustomResourceDefinitions alone, for those who only install
// them: package v1alpha1 brings Kubernetes' own types along.
package crds

import "embed"

// FS holds *.yaml, one definition each.
//
//go:embed *.yaml
var FS embed.FS
