// Package hyperctl owns the command line that runs Pods in their own virtual
// machines without Kubernetes: one Pod per `run`, spoken over the Container
// Runtime Interface to the containerd of a node.
//
// It must not know how the runtime makes a VM, and not how a node is built:
// it asks `h8s up --runtime-only` for one.
package hyperctl
