// Package sandbox is one Pod: its VM from boot to end, its containers and their
// processes as containerd knows them.
//
// It owns the state machine, the tables every answer and event is made of, and the order
// in which host resources are taken and given back. Nothing a guest says becomes part of
// an event but numbers checked here. It must not know ttrpc services, nor how VMs, taps,
// disks or volumes work.
package sandbox
