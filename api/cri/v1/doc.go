// Package cri is the part of the Kubernetes CRI's messages that the shim reads, on the
// wire the same as the CRI's own. It must not grow services.
package cri
