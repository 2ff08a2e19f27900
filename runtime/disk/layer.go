package disk

import "os"

// Layer is an open EROFS file.
type Layer struct {
	Path string
	// Serial names the file (its device and inode, not its path) for as long as it
	// exists: the same layer has the same serial in every container. At most 20
	// characters of [a-z0-9].
	Serial string
	// File is open read-only.
	File *os.File
	// Size in bytes.
	Size int64
}

// OpenLayer opens path, which must be a regular file (not a symbolic link) that
// holds an EROFS file system no larger than the file.
//
// Errors: errdefs.ErrNotFound, errdefs.ErrInvalidArgument (not a regular file),
// errdefs.ErrDataLoss (not EROFS, truncated or damaged; the remedy is in the text).
func OpenLayer(path string) (*Layer, error) { return openLayer(path) }

// Close closes the file.
func (l *Layer) Close() error { return l.File.Close() }
