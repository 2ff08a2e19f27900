package disk

import (
	"github.com/containerd/containerd/api/types"
)

// RootFS is a container's root file system as the erofs snapshotter describes it.
type RootFS struct {
	// Layers are EROFS files, lowest first, absolute and clean; at least one.
	Layers []string
	// Writable is whether the container may write (into the Pod's scratch disk).
	Writable bool
	// SizeLimit of the writable layer in bytes as the snapshotter was told (block
	// mode); 0 is no limit of its own.
	SizeLimit int64
}

// ParseRootFS reads the mounts of a task's create request. It touches no file.
//
// Errors: errdefs.ErrInvalidArgument, naming the mount and, where another
// snapshotter made it, the remedy.
func ParseRootFS(mounts []*types.Mount) (RootFS, error) { return parse(mounts) }
