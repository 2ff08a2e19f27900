// Package local keeps volumes in files of nodes: one raw, sparse file a volume, below a
// directory of the node that has it.
//
// Keeper answers the CSI controller by writing LocalVolumes and LocalSnapshots and waiting
// for what their nodes make of them. Node, in the CSI plugin of each node, makes the files
// (Store) and says so in the objects' status. Files are made in a directory that is renamed
// into place when it is complete and synced, so that what is there is whole; a file that
// is gone is never made anew.
//
// Nobody gets more room than there is: a volume is made, or grown, only if all volumes of
// the node could be full at once. A volume that a VM uses is copied only where the file
// system copies at a moment (reflinks: XFS, Btrfs); elsewhere its Pod must stop first.
//
// It must not know CSI or VMs; of these it sees leases only (package record).
package local
