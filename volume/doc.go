// Package volume is the room of persistent volumes: disks that are attached to a Pod's
// VM and never mounted on a node.
//
// On the control plane: backend, who keeps the data (backend/local, files of nodes;
// backend/cinder, OpenStack), and driver, CSI over any of them. On a node: driver again,
// with record, the contract on disk with the shim, and placeholder, what stands where the
// kubelet wants a volume. Between the two: sealed, what only one node can read. Whom they
// ask: machine, the VMs; owner and usage, the API server. What runs them: endpoint, their
// sockets, and command, h8s-csi.
//
// It must not know CNI, Networks or how VMs start.
package volume
