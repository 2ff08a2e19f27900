// Package command is the command h8s-csi: it puts the CSI driver's services, the backends
// and the API server together and serves them.
//
// It owns flags, sockets, registration with the kubelet, health and metrics. What the
// services do is package driver's, what a backend does is its own; both are told apart
// nowhere but in the list Backends.
package command
