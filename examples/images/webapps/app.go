package main

import (
	"archive/zip"
	"io/fs"
	"os"
)

// open returns the files of the application at path: the directory itself or
// the archive path.war. done releases it.
func open(path string) (files fs.FS, done func(), err error) {
	if st, err := os.Stat(path); err == nil && st.IsDir() {
		root, err := os.OpenRoot(path)
		if err != nil {
			return nil, nil, err
		}
		return root.FS(), func() { _ = root.Close() }, nil
	}
	z, err := zip.OpenReader(path + ".war")
	if err != nil {
		return nil, nil, err
	}
	return z, func() { _ = z.Close() }, nil
}
