package block

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"
)

const (
	headBytes = 16 << 20
	tailBytes = 1 << 20
	// spotBytes are read at each place where a backup may be; samples are spread evenly.
	spotBytes = 64 << 10
	samples   = 128
	chunk     = 256 << 10
	page      = 4096
)

type extent struct{ from, to int64 }

// places are what is read of a disk to call it blank: its head (partition tables, all
// first superblocks, LUKS and LVM headers), its end (GPT's, mdraid's, ZFS' copies), the
// places of ext's backup superblocks, and samples that are also where xfs' allocation
// groups begin.
func places(size int64) []extent {
	var out []extent
	add := func(from, n int64) {
		if from = max(from, 0); from < size {
			out = append(out, extent{from, min(from+n, size)})
		}
	}
	add(0, headBytes)
	add(size-tailBytes, tailBytes)
	for _, block := range []int64{1 << 10, 2 << 10, 4 << 10, 16 << 10, 64 << 10} {
		group := block * 8 * block
		add(group, spotBytes)
		for _, base := range []int64{3, 5, 7} {
			for n := base; n < size/group+1; n *= base {
				add(n*group, spotBytes)
			}
		}
		// sparse_super2 keeps one in the last group.
		if last := (size - 1) / group * group; last > 0 {
			add(last, spotBytes)
		}
	}
	for i := range int64(samples) {
		add(size/samples*i/page*page, spotBytes)
	}
	for i := range int64(4) { // exactly quarters, not rounded eight times
		add(size/page*i/4*page, spotBytes)
	}
	return out
}

// blank returns nil if the disk's places have been read completely and are zero.
func blank(ctx context.Context, f *os.File) error {
	size, err := sizeOf(f)
	if err != nil {
		return err
	}
	if size == 0 {
		return fmt.Errorf("has no bytes: %w", errdefs.ErrFailedPrecondition)
	}
	buf, zero := make([]byte, chunk), make([]byte, chunk)
	for _, e := range places(size) {
		for at := e.from; at < e.to; {
			if err := ctx.Err(); err != nil {
				return err
			}
			n := min(chunk, e.to-at)
			if err := readAt(f, buf[:n], at); err != nil {
				return fmt.Errorf("cannot be read, so whether it is blank is not known: %w", err)
			}
			if !bytes.Equal(buf[:n], zero[:n]) {
				at += n - int64(len(bytes.TrimLeft(buf[:n], "\x00")))
				return fmt.Errorf("holds data (at byte %d) and no file system that is known, and is left as it is; remedy: an empty volume: %w", at, errdefs.ErrFailedPrecondition)
			}
			at += n
		}
	}
	return nil
}

// readAt reads all of p, at once or not at all: less is an error.
func readAt(r io.ReaderAt, p []byte, at int64) error {
	n, err := r.ReadAt(p, at)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read %d bytes at %d: %w: %w", len(p), at, errdefs.ErrUnavailable, err)
}
