// Package volumes tests persistent volumes as users have them: a claim, a Pod, and data
// that is there the next time. The volumes are files of the node (StorageClass local),
// which is what a cluster has without anything configured.
package volumes
