package bench

import (
	"os"
	"path/filepath"
	"runtime"
)

// outDir is the directory of built programs.
func outDir() string {
	if dir := os.Getenv("H8S_OUT"); dir != "" {
		return dir
	}
	_, file, _, _ := runtime.Caller(0)
	return filepath.Join(filepath.Dir(file), "..", "..", "out")
}
