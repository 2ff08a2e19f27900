// Package atomicfile owns replacing a file so that a reader, also one after a crash of
// the machine, finds the old content or the new, never a part. It must not know what
// the files mean.
package atomicfile

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
)

// Suffix ends the name of what is being written: no file to read.
const Suffix = ".tmp"

// Write replaces the file at path, in an existing directory, with content and the
// permission bits of mode. Content and name are on disk when it returns. A file that is
// so already is left alone: starts are repeated far more often than their files change.
//
// Concurrent calls for one path must be serialized by the caller; what a killed call
// left behind (path + Suffix) the next one replaces.
func Write(path string, content []byte, mode fs.FileMode) error {
	if same(path, content, mode) {
		return nil
	}
	tmp := path + Suffix
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err // not written through: its mode, or a link in its place, would stay
	}
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err == nil {
		err = f.Chmod(mode) // whatever the umask
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		_ = os.Remove(tmp)
		return err
	}
	return syncDir(filepath.Dir(path))
}

func same(path string, content []byte, mode fs.FileMode) bool {
	st, err := os.Lstat(path)
	if err != nil || st.Mode() != mode || st.Size() != int64(len(content)) {
		return false
	}
	have, err := os.ReadFile(path)
	return err == nil && bytes.Equal(have, content)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
