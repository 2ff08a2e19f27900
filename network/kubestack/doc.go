// Package kubestack is the node daemon. It owns what this node knows of tenant networks:
// which are present here, the state each of them should be in, the attachments of this
// node's Pods on disk, and the sockets of the CNI plugin and the shim. Packages edge,
// service, policy and dns carry the state out. It must not know how VMs start, and holds
// no provider's credential.
//
// A Network is present while a Pod of this node is on it, or an external address is
// announced here for it, or the API server needs one of its Services here. Only then are
// its objects watched.
package kubestack
