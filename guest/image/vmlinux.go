package image

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"io"
	"os/exec"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
)

// maxKernel bounds a decompressed kernel, in bytes.
const maxKernel = 512 << 20

// ExtractVmlinux returns the uncompressed ELF kernel inside a bzImage. QEMU starts it
// through PVH, which saves the guest the decompression.
func ExtractVmlinux(bzImage []byte) ([]byte, error) {
	payload, err := bzPayload(bzImage)
	if err != nil {
		return nil, err
	}
	out, err := decompress(payload)
	if err != nil {
		return nil, fmt.Errorf("kernel payload: %w", err)
	}
	return out, nil
}

// bzPayload cuts the compressed kernel out of a bzImage by the fields of its setup
// header (Documentation/x86/boot.rst, protocol 2.08 or later).
func bzPayload(b []byte) ([]byte, error) {
	if len(b) < 0x250 || string(b[0x202:0x206]) != "HdrS" {
		return nil, fmt.Errorf("not a bzImage: %w", errdefs.ErrInvalidArgument)
	}
	setup := int64(b[0x1f1])
	if setup == 0 {
		setup = 4
	}
	off := (setup+1)*512 + int64(binary.LittleEndian.Uint32(b[0x248:]))
	n := int64(binary.LittleEndian.Uint32(b[0x24c:]))
	if n < 8 || off > int64(len(b)) || n > int64(len(b))-off {
		return nil, fmt.Errorf("bzImage payload at %d of %d bytes is outside the file: %w", off, n, errdefs.ErrInvalidArgument)
	}
	return b[off : off+n], nil
}

func decompress(b []byte) ([]byte, error) {
	switch {
	case bytes.HasPrefix(b, []byte(elf.ELFMAG)):
		return b, nil
	case bytes.HasPrefix(b, []byte{0x02, 0x21, 0x4c, 0x18}):
		return lz4Legacy(b[4:])
	case bytes.HasPrefix(b, []byte{0x1f, 0x8b}):
		r, err := gzip.NewReader(bytes.NewReader(b))
		if err != nil {
			return nil, err
		}
		r.Multistream(false) // the size of the kernel follows the stream
		return io.ReadAll(io.LimitReader(r, maxKernel))
	case bytes.HasPrefix(b, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		r, err := zstd.NewReader(nil, zstd.WithDecoderMaxMemory(maxKernel))
		if err != nil {
			return nil, err
		}
		defer r.Close()
		return r.DecodeAll(b[:len(b)-4], nil)
	case bytes.HasPrefix(b, []byte{0xfd, '7', 'z', 'X', 'Z', 0}):
		cmd := exec.Command("xz", "-dc", "--single-stream")
		cmd.Stdin = bytes.NewReader(b)
		out, err := cmd.Output()
		if err != nil {
			return nil, fmt.Errorf("xz (Debian package xz-utils): %w", err)
		}
		return out, nil
	}
	return nil, fmt.Errorf("compression with magic %x: %w (lz4, gzip, zstd and xz are known)", b[:min(4, len(b))], errdefs.ErrNotImplemented)
}

// lz4Legacy decodes the "legacy" LZ4 stream the kernel's build uses: blocks of at most
// 8 MiB, each behind its compressed size; the kernel's build appends the total size.
func lz4Legacy(b []byte) ([]byte, error) {
	const block = 8 << 20
	var out []byte
	for len(b) > 4 {
		n := int64(binary.LittleEndian.Uint32(b))
		b = b[4:]
		if n == 0 || n > int64(len(b)) {
			return nil, fmt.Errorf("lz4 block of %d bytes with %d left: %w", n, len(b), errdefs.ErrInvalidArgument)
		}
		if len(out) > maxKernel-block {
			return nil, fmt.Errorf("lz4: over %d bytes: %w", maxKernel, errdefs.ErrInvalidArgument)
		}
		var err error
		if out, err = lz4Block(out, b[:n], block); err != nil {
			return nil, err
		}
		b = b[n:]
	}
	return out, nil
}

// lz4Block appends the decoded block to out. Matches never reach before the block.
func lz4Block(out, src []byte, limit int) ([]byte, error) {
	bad := fmt.Errorf("lz4: corrupt block: %w", errdefs.ErrInvalidArgument)
	start := len(out)
	length := func(n int) (int, bool) {
		if n != 15 {
			return n, true
		}
		for len(src) > 0 && n <= limit {
			c := src[0]
			src = src[1:]
			n += int(c)
			if c != 255 {
				return n, true
			}
		}
		return 0, false
	}
	for len(src) > 0 {
		token := src[0]
		src = src[1:]
		lit, ok := length(int(token >> 4))
		if !ok || lit > len(src) || len(out)-start+lit > limit {
			return nil, bad
		}
		out = append(out, src[:lit]...)
		src = src[lit:]
		if len(src) == 0 {
			return out, nil // the last sequence has literals only
		}
		if len(src) < 2 {
			return nil, bad
		}
		offset := int(binary.LittleEndian.Uint16(src))
		src = src[2:]
		n, ok := length(int(token & 15))
		n += 4
		if !ok || offset == 0 || offset > len(out)-start || len(out)-start+n > limit {
			return nil, bad
		}
		for from := len(out) - offset; n > 0; {
			k := min(n, len(out)-from)
			out = append(out, out[from:from+k]...)
			from, n = from+k, n-k
		}
	}
	return nil, bad
}

// HasPVH reports whether vmlinux carries the Xen note with the PVH entry point, without
// which QEMU cannot start an uncompressed kernel.
func HasPVH(vmlinux []byte) (bool, error) {
	f, err := elf.NewFile(bytes.NewReader(vmlinux))
	if err != nil {
		return false, fmt.Errorf("kernel: %w", err)
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_NOTE || p.Filesz > 1<<20 {
			continue
		}
		b := make([]byte, p.Filesz)
		if _, err := p.ReadAt(b, 0); err != nil {
			return false, fmt.Errorf("kernel notes: %w", err)
		}
		if notesHavePVH(b) {
			return true, nil
		}
	}
	return false, nil
}

func notesHavePVH(b []byte) bool {
	const phys32Entry = 18 // XEN_ELFNOTE_PHYS32_ENTRY
	for len(b) >= 12 {
		name, desc := uint64(binary.LittleEndian.Uint32(b)), uint64(binary.LittleEndian.Uint32(b[4:]))
		kind := binary.LittleEndian.Uint32(b[8:])
		b = b[12:]
		if (name+3)&^3+(desc+3)&^3 > uint64(len(b)) {
			return false
		}
		if kind == phys32Entry && name == 4 && string(b[:4]) == "Xen\x00" {
			return true
		}
		b = b[(name+3)&^3+(desc+3)&^3:]
	}
	return false
}
