// Package driver is the Container Storage Interface (CSI 1.13) over package backend: the
// identity, controller and node services of one driver.
//
// The controller's services hand over to a backend and say that they can do what it
// implements. The node's mount nothing: they write records (package record) of what a
// Pod's VM shall have and put placeholders where the kubelet wants a volume. Their order
// of steps is such that a crash between any two leaves either nothing, or something that
// the same call, or its opposite, completes.
//
// It owns requests and their checks, the rules who may have a volume, and the mapping of
// errors to codes. It must not know what keeps volumes, how VMs run, or Kubernetes beyond
// the names its sidecars and the kubelet put into requests.
package driver
