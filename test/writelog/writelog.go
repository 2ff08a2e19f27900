// Package writelog reads a log of what was written to a disk, in the format of Linux's
// dm-log-writes, which QEMU's driver blklogwrites writes, and makes of it what the disk may
// have had when the power went. It must only be used by tests.
//
// It must not know what is on the disk.
package writelog

import (
	"encoding/binary"
	"fmt"
	"io"
	"iter"
	"os"
)

const (
	magic   = 0x6a736677736872 // "rhswfsj"
	version = 1
	// superSize and headerSize are what is used of the log's first sector, and of each
	// entry's.
	superSize  = 28
	headerSize = 32
)

// Flags of an Entry.
const (
	flagFlush = 1 << iota
	flagFUA
	flagDiscard
	flagMark
)

// Entry is one request.
type Entry struct {
	// Flush: what was written before is durable. Force: this one is, too.
	Flush, Force bool
	// Offset and Length are the place on the disk. Discard: it is zero from now on.
	Offset, Length int64
	Discard        bool
	// Data is where in the log is what was written, End where the entry ends.
	Data, End int64
}

// Durable says whether what was written before the entry stays when the power goes.
func (e Entry) Durable() bool { return e.Flush || e.Force }

// Log is a log of a disk.
type Log struct {
	Entries []Entry
	r       io.ReaderAt
}

// Read reads a log of a disk of a size; what is written is left where it is.
func Read(r io.ReaderAt, size, disk int64) (*Log, error) {
	var super [superSize]byte
	if _, err := r.ReadAt(super[:], 0); err != nil {
		return nil, fmt.Errorf("the log's first sector: %w", err)
	}
	le := binary.LittleEndian
	if m, v := le.Uint64(super[:]), le.Uint64(super[8:]); m != magic || v != version {
		return nil, fmt.Errorf("magic %#x, version %d: no log of writes", m, v)
	}
	count, sector := le.Uint64(super[16:]), int64(le.Uint32(super[24:]))
	if sector < 512 || sector > 1<<16 || sector&(sector-1) != 0 {
		return nil, fmt.Errorf("sectors of %d bytes", sector)
	}
	if count > uint64(size/sector) {
		return nil, fmt.Errorf("%d entries in %d bytes", count, size)
	}
	l := &Log{r: r}
	at := sector
	for i := range count {
		e, err := entry(r, at, size, disk, sector)
		if err != nil {
			return nil, fmt.Errorf("entry %d, at %d: %w", i, at, err)
		}
		l.Entries = append(l.Entries, e)
		at = e.End
	}
	return l, nil
}

func entry(r io.ReaderAt, at, size, disk, sector int64) (Entry, error) {
	var e Entry
	if size-at < sector {
		return e, io.ErrUnexpectedEOF
	}
	var b [headerSize]byte
	if _, err := r.ReadAt(b[:], at); err != nil {
		return e, err
	}
	le := binary.LittleEndian
	first, n, flags := le.Uint64(b[:]), le.Uint64(b[8:]), le.Uint64(b[16:])
	if flags&^(1<<5-1) != 0 { // the last is dm-log-writes' for metadata, which says nothing
		return e, fmt.Errorf("flags %#x", flags)
	}
	sectors := uint64(disk / sector)
	if first > sectors || n > sectors-first {
		return e, fmt.Errorf("sectors %d and %d more on a disk of %d", first, n, sectors)
	}
	e = Entry{
		Flush: flags&flagFlush != 0, Force: flags&flagFUA != 0, Discard: flags&flagDiscard != 0,
		Offset: int64(first) * sector, Length: int64(n) * sector, Data: at + sector, End: at + sector,
	}
	if flags&flagMark != 0 {
		e.Length = 0
	}
	if !e.Discard {
		e.End += e.Length
	}
	if e.End > size {
		return e, io.ErrUnexpectedEOF
	}
	return e, nil
}

// Cuts are the entries with which all that was written before is durable, by index.
func (l *Log) Cuts() iter.Seq[int] {
	return func(yield func(int) bool) {
		for i, e := range l.Entries {
			if e.Durable() && !yield(i) {
				return
			}
		}
	}
}

// Content is what an entry wrote.
func (l *Log) Content(i int) ([]byte, error) {
	e := l.Entries[i]
	if e.Discard || e.Length == 0 {
		return make([]byte, e.Length), nil
	}
	b := make([]byte, e.Length)
	if _, err := l.r.ReadAt(b, e.Data); err != nil {
		return nil, fmt.Errorf("entry %d: %w", i, err)
	}
	return b, nil
}

// page is what a disk writes wholly or not at all.
const page = 4096

// Disk is what a disk had at some point, as far as it was written: its pages by number.
type Disk map[int64][]byte

// Apply does to the disk what entries, by index, did. Of what keep does not want it does
// nothing; nil keeps all. It is asked about each page of each entry.
func (d Disk) Apply(l *Log, from, to int, keep func(entry int, page int64) bool) error {
	for i := from; i < to; i++ {
		b, err := l.Content(i)
		if err != nil {
			return err
		}
		for at := l.Entries[i].Offset; len(b) > 0; {
			n := min(int64(len(b)), page-at%page)
			if keep == nil || keep(i, at/page) {
				d.write(at, b[:n])
			}
			at, b = at+n, b[n:]
		}
	}
	return nil
}

// write changes a page. It makes another one: a Clone has this one, too.
func (d Disk) write(at int64, b []byte) {
	p := make([]byte, page)
	copy(p, d[at/page])
	copy(p[at%page:], b)
	d[at/page] = p
}

// Clone is another disk with the same content.
func (d Disk) Clone() Disk {
	out := make(Disk, len(d))
	for n, p := range d {
		out[n] = p
	}
	return out
}

// Save writes the disk to a file.
func (d Disk) Save(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		return err
	}
	for n, p := range d {
		if _, err := f.WriteAt(p[:min(page, size-n*page)], n*page); err != nil {
			return err
		}
	}
	return f.Close()
}
