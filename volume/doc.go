// Package volume is the room of persistent volumes: disks that are attached to a Pod's
// VM and never mounted on a node.
//
// Its packages: record, the contract on disk between the node's plugin and the shim;
// sealed, what only one node can read; backend, who keeps the data (local files,
// Cinder); driver, the CSI services over them. It must not know CNI, Networks or how
// VMs start.
package volume
