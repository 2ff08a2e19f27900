// Package storage is how a VM gets volumes that are no files of the node: one
// qemu-storage-daemon a Pod opens them over the node's network and serves them to the
// Pod's VMM, which has neither network nor keys, over NBD on sockets of their own.
//
// It owns the daemon's configuration, confinement and life. It must not know Pods,
// containers or who keeps the volumes.
package storage

import (
	"os"

	"github.com/hypernetes/hypernetes/volume/record"
)

// Volume is one to be served.
type Volume struct {
	// Serial is its disk's, and names it here.
	Serial   string
	Source   record.Source
	ReadOnly bool
	// Secrets by the names of package record.
	Secrets map[string][]byte
}

// Config describes a daemon.
type Config struct {
	// ID is the VM's.
	ID string
	// Dir is an existing directory of the shim's for a socket.
	Dir     string
	Volumes []Volume
	// UID is the user and group it runs as; 0 keeps the shim's (tests only).
	UID int
	// Cgroups it enters before it executes; Hold it keeps open: see vmm.Config.
	Cgroups []string
	Hold    []*os.File
}
