// Package record is the contract on disk between the node's volume plugin and the
// shim: which volumes a Pod's VM gets, what each disk is, and the lease that says that a
// VM has it.
//
// The plugin writes, the shim reads. Everything is below one directory (Root) in
// memory, mode 0700 of root: it is gone after a reboot, as VMs are, and the kubelet then
// publishes anew. A record that cannot be read to the last byte is an error, never "no
// volume": a Pod that starts on an empty directory instead of its volume loses data.
//
//	<root>/volumes/<key>/staged.json      Staged: what the disk is
//	<root>/secrets/<key>/<name>           0400: keys and passwords, never in a record, in memory
//	<root>/volumes/<key>/lease            flock: exclusive by a writer's VM, shared by readers'
//	<root>/volumes/<key>/pods/<uid>.json  Publication: where and how the Pod has it
//	<root>/volumes/<key>/pods/<uid>.lease flock: exclusive by that Pod's VM
//	<root>/pods/<uid>                     address of the Pod's shim, for statistics and growing
//
// key is Key(driver, volume): neither a tenant's nor a provider's text becomes a path.
//
// It owns names, formats, atomic writing and leases. It must not know CSI, Kubernetes,
// providers or VMMs; the shim imports it, so it imports next to nothing.
package record

// Version of the records. A reader refuses any other.
const Version = 1

// Root is where records are on a node.
const Root = "/run/h8s-volumes"

// PlaceholderSource and a volume's key are the source of the tmpfs mounted where the
// kubelet expects the volume.
const PlaceholderSource = "h8s-vol:"

// Modes of a Publication.
const (
	Filesystem = "filesystem"
	Block      = "block"
)

// Staged says what a volume's disk is. It holds no secret.
type Staged struct {
	Version int `json:"version"`
	// Driver is the CSI driver's name, Volume its handle (1 to 128 bytes).
	Driver string `json:"driver"`
	Volume string `json:"volume"`
	// Attachment is the provider's name of this attachment, "" if it has none.
	Attachment string `json:"attachment,omitempty"`
	// Serial of the disk in the guest: [a-zA-Z0-9_-]{1,20}, of this node's volumes this
	// one's only. See Serial.
	Serial string `json:"serial"`
	// SizeBytes as the provider says, for checks; 0 if it is not known.
	SizeBytes int64 `json:"sizeBytes,omitempty"`
	// ReadOnly: no VM of this node may write.
	ReadOnly bool `json:"readOnly,omitempty"`
	// Shared: several VMs may write at a time (raw block of a multi-attach volume).
	Shared bool `json:"shared,omitempty"`
	// Format says whether an empty disk may be formatted: see the constants.
	Format string `json:"format,omitempty"`
	Source Source `json:"source"`
	// Limits of I/O; nil for none.
	Throttle *Throttle `json:"throttle,omitempty"`
}

// What Staged.Format says. In every case the guest formats nothing but a disk that
// it has read and found empty, and never one that is read-only.
const (
	// FormatNever: it has content (a snapshot's, an image's), or nobody knows.
	FormatNever = ""
	// FormatBlank: if it is blank.
	FormatBlank = "blank"
)

// Source is where the bytes are. Exactly one field is set.
type Source struct {
	File *File `json:"file,omitempty"`
	RBD  *RBD  `json:"rbd,omitempty"`
	// ISCSI is a LUN of an iSCSI target.
	ISCSI *ISCSI `json:"iscsi,omitempty"`
}

// File is a raw image or a block device of the node.
type File struct {
	// Path is absolute and clean; the last element is not followed if it is a symbolic link.
	Path string `json:"path"`
}

// RBD is an image of a Ceph cluster. The cephx key is the secret SecretKey, base64 as
// in a keyring.
type RBD struct {
	Pool  string `json:"pool"`
	Image string `json:"image"`
	// Monitors are host:port, IPv6 hosts in brackets.
	Monitors []string `json:"monitors"`
	// User without "client."; "" is a cluster without cephx.
	User string `json:"user,omitempty"`
}

// ISCSI is a LUN. The CHAP password is the secret SecretPassword.
type ISCSI struct {
	Portal    string `json:"portal"`
	Target    string `json:"target"`
	LUN       int    `json:"lun"`
	Initiator string `json:"initiator,omitempty"`
	User      string `json:"user,omitempty"`
}

// Names of secrets.
const (
	SecretKey      = "key"
	SecretPassword = "password"
)

// Throttle bounds I/O; 0 is no bound.
type Throttle struct {
	IOPS      int64 `json:"iops,omitempty"`
	ReadIOPS  int64 `json:"readIOPS,omitempty"`
	WriteIOPS int64 `json:"writeIOPS,omitempty"`
	// Bytes per second.
	BPS      int64 `json:"bps,omitempty"`
	ReadBPS  int64 `json:"readBPS,omitempty"`
	WriteBPS int64 `json:"writeBPS,omitempty"`
}

// Publication says that a Pod has a staged volume, and how.
type Publication struct {
	Version int    `json:"version"`
	PodUID  string `json:"podUID"`
	// Target is the path the kubelet gives to containers; a placeholder is there.
	Target string `json:"target"`
	// Device identifies the placeholder: st_dev of the tmpfs mounted at Target, or, of
	// mode Block, st_rdev of the loop device there.
	Device uint64 `json:"device"`
	Mode   string `json:"mode"`
	// FSType is "ext4" or "xfs", of mode Filesystem.
	FSType string `json:"fsType,omitempty"`
	// Options of the mount, for the guest: each one was checked against a list.
	Options  []string `json:"options,omitempty"`
	ReadOnly bool     `json:"readOnly,omitempty"`
	// FSGroup is the group the volume's files belong to; nil to leave them.
	FSGroup *uint32 `json:"fsGroup,omitempty"`
	// FSGroupAlways has the guest walk the whole volume even if its root is right.
	FSGroupAlways bool `json:"fsGroupAlways,omitempty"`
}

// Attachment is one volume of a Pod.
type Attachment struct {
	Key         string
	Staged      Staged
	Publication Publication
}
