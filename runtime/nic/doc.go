// Package nic joins a Pod's network namespace, as a CNI plugin left it, to a VM:
// every configured link gets a tap that mirrors it in both directions, and its
// addresses, routes and neighbours become a description for the guest. It also
// carries port-forwarding, which dials localhost inside the namespace, to the guest.
//
// It owns what it makes in the namespace: taps, ingress qdiscs and nftables tables
// named h8s-*. It must not know which CNI plugin was there, how a VM starts, nor
// Kubernetes; it never touches a namespace other than the one it is given.
package nic
