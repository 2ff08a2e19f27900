// Package ledger is a writer that can be held to its word: it writes numbered records with
// checksums to a directory, has each made durable before it says so, and tells afterwards
// what is there. It must only be used by tests.
//
// Records are appended to files of a few each, so that files and directories are made all
// the time, and how many there are is written over and over into one file.
package ledger

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

const (
	perFile = 32
	// slot is what of the file head is written at a time, one of two in turn.
	slot     = 4096
	headName = "head"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Ledger is one that is written.
type Ledger struct {
	dir        string
	id         string
	next       int
	file, head *os.File
}

// State is what a directory has.
type State struct {
	// ID is the first writer's, "" if nothing was written.
	ID string
	// Records that are there, from the first on.
	Records int
	// rest is where the last file ends, after its last whole record.
	rest int64
}

// Read looks at all of a ledger. A last record that is not whole is none: nobody was told
// of it. Anything else that is damaged or missing is an error.
func Read(dir string) (State, error) {
	var s State
	for n := 0; ; n++ {
		b, err := os.ReadFile(filepath.Join(dir, name(n*perFile)))
		if errors.Is(err, fs.ErrNotExist) {
			break
		} else if err != nil {
			return s, err
		}
		if s.Records != n*perFile {
			return s, fmt.Errorf("record %d is damaged, and %s is there", s.Records, name(n*perFile))
		}
		s.rest = s.records(b)
	}
	head, err := readHead(dir)
	switch {
	case err != nil:
		return s, err
	case head > s.Records:
		return s, fmt.Errorf("%d records are there, and %s says %d", s.Records, headName, head)
	}
	return s, nil
}

// records reads those of a file that are whole and returns where they end.
func (s *State) records(b []byte) int64 {
	end := 0
	for len(b) > end {
		n := bytes.IndexByte(b[end:], '\n')
		if n < 0 {
			break
		}
		id, number, ok := parse(b[end:end+n], length)
		if !ok || number != s.Records || s.ID != "" && id != s.ID {
			break
		}
		s.ID = id
		s.Records++
		end += n + 1
	}
	return int64(end)
}

func readHead(dir string) (int, error) {
	b, err := os.ReadFile(filepath.Join(dir, headName))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	most := 0
	for i := 0; i < len(b); i += slot {
		line, _, _ := bytes.Cut(b[i:min(i+slot, len(b))], []byte{'\n'})
		if _, n, ok := parse(line, func(int) int { return headLength }); ok {
			most = max(most, n)
		}
	}
	return most, nil
}

// name is that of the file that begins with a record.
func name(record int) string { return fmt.Sprintf("%08d", record) }

// length is how often a record repeats its number.
func length(number int) int { return (number*797)%750 + 1 }

// headLength is the same in the head, where it must fit a slot.
const headLength = 100

// line is a record: sum, writer, number, and the number repeated.
func line(id string, number, length int) string {
	fill := strings.Repeat(fmt.Sprintf("%d.", number), length)
	body := fmt.Sprintf("%s %d %s", id, number, fill)
	return fmt.Sprintf("%08x %s", crc32.Checksum([]byte(body), castagnoli), body)
}

func parse(b []byte, length func(int) int) (id string, number int, ok bool) {
	if _, err := fmt.Sscanf(string(b[:min(len(b), 64)]), "%8x %32s %d ", new(uint32), &id, &number); err != nil || number < 0 {
		return "", 0, false
	}
	return id, number, string(b) == line(id, number, length(number))
}

// Open goes on with a ledger, after it has read all of it, or begins one. What it found is
// returned also with an error.
func Open(dir string) (*Ledger, State, error) {
	s, err := Read(dir)
	if err != nil {
		return nil, s, err
	}
	l := &Ledger{dir: dir, id: s.ID, next: s.Records}
	if l.id == "" {
		var raw [8]byte
		_, _ = rand.Read(raw[:])
		l.id = hex.EncodeToString(raw[:])
	}
	if l.head, err = os.OpenFile(filepath.Join(dir, headName), os.O_CREATE|os.O_WRONLY, 0o600); err != nil {
		return nil, s, err
	}
	if s.Records%perFile != 0 || s.rest == 0 {
		err = l.open(s.Records/perFile*perFile, s.rest)
	}
	return l, s, errors.Join(err, l.syncDir())
}

// open begins or goes on with a file, behind what is whole in it.
func (l *Ledger) open(record int, at int64) (err error) {
	if l.file, err = os.OpenFile(filepath.Join(l.dir, name(record)), os.O_CREATE|os.O_WRONLY, 0o600); err != nil {
		return err
	}
	_, err = l.file.Seek(at, io.SeekStart)
	return errors.Join(err, l.file.Truncate(at))
}

func (l *Ledger) syncDir() error {
	d, err := os.Open(l.dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Append writes a record and returns how many there are, once all of them are durable.
func (l *Ledger) Append() (int, error) {
	if l.file == nil || l.next%perFile == 0 {
		if l.file != nil {
			if err := l.file.Close(); err != nil {
				return 0, err
			}
		}
		if err := errors.Join(l.open(l.next, 0), l.syncDir()); err != nil {
			return 0, err
		}
	}
	if _, err := io.WriteString(l.file, line(l.id, l.next, length(l.next))+"\n"); err != nil {
		return 0, err
	}
	if err := l.file.Sync(); err != nil {
		return 0, err
	}
	l.next++
	b := make([]byte, slot)
	copy(b, line(l.id, l.next, headLength)+"\n")
	if _, err := l.head.WriteAt(b, int64(l.next%2)*slot); err != nil {
		return 0, err
	}
	return l.next, l.head.Sync()
}

// Close ends writing.
func (l *Ledger) Close() error {
	errs := []error{l.head.Close()}
	if l.file != nil {
		errs = append(errs, l.file.Close())
	}
	return errors.Join(errs...)
}
