// Package disk turns what containerd calls a root file system into disks of a VM:
// read-only EROFS layer files and a writable scratch disk per Pod.
//
// It owns the reading of snapshotter mounts, the checks a layer file must pass, and
// the copy of the scratch template. It must not know how a disk is plugged, what is
// in it, nor containers. It never mounts anything and never guesses a format.
package disk
