// Package backend is what the CSI driver asks of whoever keeps the data.
//
// It owns the questions and their errors; package local (files of nodes) and package
// cinder (OpenStack) answer them. It must not know CSI's messages or Kubernetes.
package backend

import (
	"context"

	"github.com/hypernetes/hypernetes/volume/record"
)

// Volume is one as its keeper knows it.
type Volume struct {
	// ID is the handle, 1 to 128 bytes, never given to another volume again.
	ID string
	// Name is what it was created by, "" if that is not known.
	Name      string
	SizeBytes int64
	// Snapshot or Parent is the ID of what it was made from, "" for none.
	Snapshot, Parent string
	// Topology are the segments from which it is reachable; nil is everywhere.
	Topology map[string]string
	// Node is where it is attached, "" if it is not or nobody knows; Others are further
	// nodes of one that is shared.
	Node   string
	Others []string
	// Degraded is why it may be unhealthy, "" if nothing is known against it.
	Degraded string
}

// Create describes a volume to be made.
type Create struct {
	// Name makes the call idempotent.
	Name string
	// MinBytes > 0; MaxBytes 0 is no bound.
	MinBytes, MaxBytes int64
	// Snapshot or Parent is the ID of what it begins as a copy of.
	Snapshot, Parent string
	// Parameters are the StorageClass's that the driver does not know itself, Mutable
	// the VolumeAttributesClass's.
	Parameters, Mutable map[string]string
	// Topologies are where it should be reachable from, the preferred first; nil anywhere.
	Topologies []map[string]string
	// Namespace and Claim for whom it is, "" if that is not known.
	Namespace, Claim string
	// MultiAttach: several nodes will have it at a time.
	MultiAttach bool
}

// Volumes makes and keeps volumes. Its methods may be called concurrently and, like all
// here, again after a crash at any point.
//
// Errors: errdefs.ErrNotFound, errdefs.ErrAlreadyExists (the name, with other
// properties), errdefs.ErrInvalidArgument, errdefs.ErrOutOfRange (sizes),
// errdefs.ErrResourceExhausted (space, quota), errdefs.ErrFailedPrecondition (in use),
// errdefs.ErrUnavailable (the provider does not answer).
type Volumes interface {
	Create(ctx context.Context, c Create) (Volume, error)
	// Delete of a volume that is gone succeeds.
	Delete(ctx context.Context, id string) error
	Get(ctx context.Context, id string) (Volume, error)
	// List in a fixed order; after is the ID of the last one seen.
	List(ctx context.Context, after string, limit int) ([]Volume, error)
	// Expand makes it at least so large and returns its size.
	Expand(ctx context.Context, id string, bytes int64) (int64, error)
}

// Capacity tells how much can still be made with a StorageClass's parameters at a place,
// and of how large a volume.
type Capacity interface {
	Capacity(ctx context.Context, parameters, topology map[string]string) (available, largest int64, err error)
}

// Snapshot is one as its keeper knows it.
type Snapshot struct {
	ID, Name, Volume string
	SizeBytes        int64
	// CreatedAt in Unix seconds.
	CreatedAt int64
	// Ready to be restored from.
	Ready bool
}

// Snapshots makes and keeps copies of volumes at a moment. Errors are those of Volumes.
type Snapshots interface {
	CreateSnapshot(ctx context.Context, name, volume string, parameters map[string]string) (Snapshot, error)
	DeleteSnapshot(ctx context.Context, id string) error
	GetSnapshot(ctx context.Context, id string) (Snapshot, error)
	// ListSnapshots in a fixed order; volume "" is those of every volume.
	ListSnapshots(ctx context.Context, volume, after string, limit int) ([]Snapshot, error)
}

// Attach asks for a volume to be made reachable from a node.
type Attach struct {
	Volume, Node string
	ReadOnly     bool
	// Shared: other nodes may have it too.
	Shared bool
}

// Connection is how a node reaches a volume. It goes to that node sealed.
type Connection struct {
	Attachment string            `json:"attachment,omitempty"`
	SizeBytes  int64             `json:"sizeBytes"`
	ReadOnly   bool              `json:"readOnly,omitempty"`
	Format     string            `json:"format,omitempty"`
	Source     record.Source     `json:"source"`
	Throttle   *record.Throttle  `json:"throttle,omitempty"`
	Secrets    map[string][]byte `json:"secrets,omitempty"`
	// Owner is the project whose volume it is: a Pod of another one's is refused.
	Owner string `json:"owner,omitempty"`
	// OperatorOwned: Owner is the operator's own project, whose volumes are for namespaces of
	// no tenant.
	OperatorOwned bool `json:"operatorOwned,omitempty"`
	// Shared: several VMs may write at a time.
	Shared bool `json:"shared,omitempty"`
}

// Attachments makes volumes reachable from nodes. Errors are those of Volumes;
// errdefs.ErrFailedPrecondition names the node that has the volume.
type Attachments interface {
	Attach(ctx context.Context, a Attach) (Connection, error)
	// Detach returns when the node cannot write any more, fencing it if it must; node ""
	// is every node.
	Detach(ctx context.Context, volume, node string) error
}

// Files is a keeper whose volumes are files of the node that asks: nobody attaches.
type Files interface {
	Connect(ctx context.Context, volume string) (Connection, error)
}

// Inline is a volume that a Pod has of its own (volumes[].csi).
type Inline struct {
	ID string
	// Owner is the kubelet's directory of the volume: one without it is nobody's.
	Owner string
}

// Inlines are files of the node that asks, each there as long as a Pod has it. Errors are
// those of Volumes.
type Inlines interface {
	// CreateInline makes an empty one, or connects the one that is there.
	CreateInline(ctx context.Context, v Inline, bytes int64) (Connection, error)
	// DeleteInline of a volume that is gone succeeds.
	DeleteInline(ctx context.Context, id string) error
	ListInline() ([]Inline, error)
}

// Limits are told of a volume that this node has, and puts into effect that it has others;
// nil is none. A volume that it does not have is no error.
//
// Errors: errdefs.ErrUnavailable, errdefs.ErrAborted: to be told again.
type Limits func(ctx context.Context, volume string, t *record.Throttle) error

// Limited are files whose limits change while the node has them.
type Limited interface {
	// Tell says who is to be told. It comes before any other call.
	Tell(Limits)
}

// Mutable volumes change their class (VolumeAttributesClass).
type Mutable interface {
	Modify(ctx context.Context, id string, parameters map[string]string) error
}
