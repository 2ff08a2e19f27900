package disk

import (
	"context"
	"os"
)

// NewScratch copies the ext4 image template sparsely into an unnamed file of the
// directory dir, makes it size bytes long (the template's own length if that is
// greater) and returns it open for writing. Nobody can open it by name, and its
// space is given back when the last descriptor is closed, however the process ends.
//
// Errors: errdefs.ErrNotFound (template or dir), errdefs.ErrResourceExhausted (no
// space), errdefs.ErrInvalidArgument (template is no regular file).
func NewScratch(ctx context.Context, dir, template string, size int64) (*os.File, error) {
	return newScratch(ctx, dir, template, size)
}
