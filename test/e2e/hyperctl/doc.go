// Package hyperctl runs the hyperctl program against a node of its own, which hyperctl
// starts by itself and which is reset at the end: Pods in VMs without Kubernetes.
package hyperctl
