// Package artifacts says where the tests of every room find what the build has made.
// It must not know what is in there.
package artifacts

import (
	"os"
	"path/filepath"
)

// Dir is $H8S_OUT, or the directory "out" of the checkout the test runs in. Whether
// anything is there is for the caller to see, and to skip with that reason.
func Dir() string {
	if dir := os.Getenv("H8S_OUT"); dir != "" {
		return dir
	}
	// Tests run in their package's directory. The source's own path is no help: builds
	// with -trimpath do not have it.
	for dir, err := os.Getwd(); err == nil; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil || dir == "/" {
			return filepath.Join(dir, "out")
		}
	}
	return "out"
}
