package volume

import (
	"context"

	"github.com/opencontainers/runtime-spec/specs-go"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
)

// GuestRoot is where volumes are in the guest.
const GuestRoot = "/run/h8s/volumes"

// Pod is whose mounts are planned.
type Pod struct {
	// KubeletRoot is the kubelet's root directory, usually /var/lib/kubelet.
	KubeletRoot string
	// UID of the Pod as the kubelet names its directory (a static Pod's is a hash).
	UID string
	// Resolvers are asked, in order, about bind mounts of kinds this package does
	// not know (persistent volumes).
	Resolvers []Resolver
}

// Resolver knows one more kind of volume.
type Resolver interface {
	// Resolve returns nil, nil for a mount that is not its business; the source is
	// absolute, clean and below the Pod's kubelet directory.
	Resolve(ctx context.Context, pod Pod, m specs.Mount) (*Decision, error)
}

// Plan is what a container's mounts become.
type Plan struct {
	// Mounts replace the OCI spec's, in the same order: sources are guest paths.
	Mounts []specs.Mount
	// Decisions are one for each mount that was a bind of the host's.
	Decisions []Decision
}

// Decision is what one bind mount becomes.
type Decision struct {
	// Mount as containerd gave it.
	Mount specs.Mount
	// GuestSource is the mount's source in the guest: GuestRoot/<volume>[/<subpath>],
	// or another path of the guest for what every sandbox has (/dev/shm).
	GuestSource string
	// Volume is the guest volume needed; nil for what every sandbox has. Several
	// mounts, also of several containers, may name one volume. A file tree here has
	// no files yet: Parts has them.
	Volume *hyperstart.Volume
	// Parts are the file tree in messages of at most MaxPart bytes, the last one
	// completing it; none for other kinds.
	Parts []*hyperstart.FileTree
	// Live is whether HostPath changes in place and wants a Watcher.
	Live bool
	// HostPath is the volume's directory (or file) on the host.
	HostPath string
	// ReadBack is the host file that gets the guest's content when the container
	// ends (termination messages); "" for none. See WriteBack.
	ReadBack string
}

// Plan classifies and packs the mounts of a container's OCI spec. It reads files but
// changes nothing. It may be called concurrently.
//
// Errors: errdefs.ErrInvalidArgument for mounts a VM cannot have, naming destination,
// source and remedy; errdefs.ErrResourceExhausted for trees over the bounds;
// errdefs.ErrNotFound for sources that are gone.
func (p Pod) Plan(ctx context.Context, mounts []specs.Mount) (*Plan, error) {
	return p.plan(ctx, mounts)
}

// Requests returns volumes for a CreateRequest and the PutFiles requests to send
// before it, in order; each volume is in one of them, once. Trees that fit a message
// together are inline, so that the usual container costs no extra round trip.
func (p *Plan) Requests() (volumes []*hyperstart.Volume, puts []*hyperstart.PutFilesRequest) {
	return requests(p.Decisions)
}
