package v1alpha1

import (
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// FinalizerLocal keeps a LocalVolume or LocalSnapshot until its node has removed the file.
const FinalizerLocal = "hypernetes.io/local-volume"

// LocalVolume is a volume that is a file of one node. The CSI controller writes its spec,
// the CSI plugin of its node makes the file and writes its status.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:scope=Cluster,shortName=lv,categories=h8s
// +kubebuilder:subresource:status
// +kubebuilder:selectablefield:JSONPath=`.spec.node`
// +kubebuilder:printcolumn:name="Node",type=string,JSONPath=`.spec.node`
// +kubebuilder:printcolumn:name="Size",type=integer,JSONPath=`.status.sizeBytes`
// +kubebuilder:printcolumn:name="Phase",type=string,JSONPath=`.status.phase`
// +kubebuilder:printcolumn:name="Claim",type=string,JSONPath=`.spec.claim`
// +kubebuilder:printcolumn:name="Message",type=string,JSONPath=`.status.message`,priority=1
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type LocalVolume struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   LocalVolumeSpec   `json:"spec"`
	Status LocalVolumeStatus `json:"status,omitempty"`
}

// LocalVolumeSpec is what was asked for.
//
// +kubebuilder:validation:XValidation:rule="self.node == oldSelf.node",message="node is immutable: the file is there"
// +kubebuilder:validation:XValidation:rule="has(self.source) == has(oldSelf.source) && (!has(self.source) || self.source == oldSelf.source)",message="source is immutable"
// +kubebuilder:validation:XValidation:rule="self.sizeBytes >= oldSelf.sizeBytes",message="sizeBytes: a volume does not shrink"
type LocalVolumeSpec struct {
	// Name is what the volume was asked for by; the same name is the same volume.
	// +kubebuilder:validation:MaxLength=256
	Name string `json:"name"`
	// Node whose file it is.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	Node string `json:"node"`
	// +kubebuilder:validation:Minimum=1
	SizeBytes int64 `json:"sizeBytes"`
	// Source it begins as a copy of.
	Source *LocalSource `json:"source,omitempty"`
	// Claim is the PersistentVolumeClaim, namespace/name, it was made for.
	// +kubebuilder:validation:MaxLength=512
	Claim string `json:"claim,omitempty"`
	// Throttle bounds what a VM does to it; nil for nothing.
	Throttle *LocalThrottle `json:"throttle,omitempty"`
}

// LocalThrottle bounds I/O a second; 0 is no bound. All and reads or writes exclude each
// other.
type LocalThrottle struct {
	// +kubebuilder:validation:Minimum=0
	IOPS int64 `json:"iops,omitempty"`
	// +kubebuilder:validation:Minimum=0
	ReadIOPS int64 `json:"readIOPS,omitempty"`
	// +kubebuilder:validation:Minimum=0
	WriteIOPS int64 `json:"writeIOPS,omitempty"`
	// +kubebuilder:validation:Minimum=0
	BytesPerSecond int64 `json:"bytesPerSecond,omitempty"`
	// +kubebuilder:validation:Minimum=0
	ReadBytesPerSecond int64 `json:"readBytesPerSecond,omitempty"`
	// +kubebuilder:validation:Minimum=0
	WriteBytesPerSecond int64 `json:"writeBytesPerSecond,omitempty"`
}

// LocalSource is a volume or a snapshot, by its ID.
//
// +kubebuilder:validation:XValidation:rule="has(self.volume) != has(self.snapshot)",message="give volume or snapshot"
type LocalSource struct {
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=128
	Volume string `json:"volume,omitempty"`
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=128
	Snapshot string `json:"snapshot,omitempty"`
}

// Phases of a LocalVolume and of a LocalSnapshot.
const (
	// LocalPending, also if empty: its node has yet to make it.
	LocalPending = "Pending"
	LocalReady   = "Ready"
	// LocalFailed: it cannot be made, and status says why.
	LocalFailed = "Failed"
)

// Reasons of a failure.
const (
	LocalNoSpace = "NoSpace"
	LocalInUse   = "InUse"
	LocalInvalid = "Invalid"
)

// LocalVolumeStatus is what the node made of it.
type LocalVolumeStatus struct {
	// Phase: Pending, Ready, Failed.
	// +kubebuilder:validation:Enum="";Pending;Ready;Failed
	Phase string `json:"phase,omitempty"`
	// SizeBytes is how large the file is.
	SizeBytes int64 `json:"sizeBytes,omitempty"`
	// ObservedBytes is the spec.sizeBytes that message and reason are about.
	ObservedBytes int64 `json:"observedBytes,omitempty"`
	// ObservedGeneration is the spec whose throttle is in effect.
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// Reason, if something failed: NoSpace, InUse, Invalid.
	Reason  string `json:"reason,omitempty"`
	Message string `json:"message,omitempty"`
}

// LocalVolumeList is a list of LocalVolumes.
//
// +kubebuilder:object:root=true
type LocalVolumeList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []LocalVolume `json:"items"`
}

// LocalSnapshot is a copy of a LocalVolume at a moment, a file of the same node.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:scope=Cluster,shortName=ls,categories=h8s
// +kubebuilder:subresource:status
// +kubebuilder:selectablefield:JSONPath=`.spec.node`
// +kubebuilder:printcolumn:name="Node",type=string,JSONPath=`.spec.node`
// +kubebuilder:printcolumn:name="Volume",type=string,JSONPath=`.spec.volume`
// +kubebuilder:printcolumn:name="Size",type=integer,JSONPath=`.status.sizeBytes`
// +kubebuilder:printcolumn:name="Phase",type=string,JSONPath=`.status.phase`
// +kubebuilder:printcolumn:name="Message",type=string,JSONPath=`.status.message`,priority=1
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type LocalSnapshot struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   LocalSnapshotSpec   `json:"spec"`
	Status LocalSnapshotStatus `json:"status,omitempty"`
}

// LocalSnapshotSpec is what was asked for.
//
// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="a snapshot's spec is immutable"
type LocalSnapshotSpec struct {
	// Name is what the snapshot was asked for by.
	// +kubebuilder:validation:MaxLength=256
	Name string `json:"name"`
	// Node of the volume.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	Node string `json:"node"`
	// Volume is the volume's ID.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=128
	Volume string `json:"volume"`
}

// LocalSnapshotStatus is what the node made of it.
type LocalSnapshotStatus struct {
	// Phase: Pending, Ready, Failed.
	// +kubebuilder:validation:Enum="";Pending;Ready;Failed
	Phase string `json:"phase,omitempty"`
	// SizeBytes is what a volume restored from it needs.
	SizeBytes int64 `json:"sizeBytes,omitempty"`
	// CreatedAt is the moment it is of.
	CreatedAt *metav1.Time `json:"createdAt,omitempty"`
	// Reason, if it failed: NoSpace, InUse, Invalid.
	Reason  string `json:"reason,omitempty"`
	Message string `json:"message,omitempty"`
}

// LocalSnapshotList is a list of LocalSnapshots.
//
// +kubebuilder:object:root=true
type LocalSnapshotList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []LocalSnapshot `json:"items"`
}

// LocalStore is what a node has for LocalVolumes. Its name is the node's, and its CSI
// plugin makes it and writes its status; the spec is the operator's.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:scope=Cluster,categories=h8s
// +kubebuilder:subresource:status
// +kubebuilder:printcolumn:name="Available",type=integer,JSONPath=`.status.availableBytes`
// +kubebuilder:printcolumn:name="Total",type=integer,JSONPath=`.status.totalBytes`
// +kubebuilder:printcolumn:name="Reflink",type=boolean,JSONPath=`.status.reflink`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type LocalStore struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   LocalStoreSpec   `json:"spec,omitempty"`
	Status LocalStoreStatus `json:"status,omitempty"`
}

// DefaultInlineMax is LocalStoreSpec.InlineMax where the operator says nothing.
const DefaultInlineMax = "16Gi"

// LocalStoreSpec is what the operator allows on a node.
type LocalStoreSpec struct {
	// InlineMax is the size of the largest volume that a Pod there has of its own
	// (volumes[].csi): 16Gi if it is not set, none if 0.
	InlineMax *resource.Quantity `json:"inlineMax,omitempty"`
}

// LocalStoreStatus is what the node found.
type LocalStoreStatus struct {
	// TotalBytes of the file system.
	TotalBytes int64 `json:"totalBytes,omitempty"`
	// AvailableBytes is the largest volume that can still be made: what is free, less what
	// the volumes there may yet fill and a reserve.
	AvailableBytes int64 `json:"availableBytes,omitempty"`
	// Reflink says that the file system copies files at a moment, at no cost: volumes in use
	// can be copied.
	Reflink bool `json:"reflink,omitempty"`
	// Volumes and Snapshots is how many there are.
	Volumes   int32 `json:"volumes,omitempty"`
	Snapshots int32 `json:"snapshots,omitempty"`
	// RefreshedAt is when the node last looked.
	RefreshedAt *metav1.Time `json:"refreshedAt,omitempty"`
}

// LocalStoreList is a list of LocalStores.
//
// +kubebuilder:object:root=true
type LocalStoreList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []LocalStore `json:"items"`
}
