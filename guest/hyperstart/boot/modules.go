package boot

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// ModuleOrder lists the kernel modules to load, one path (absolute, or relative to the
// list's directory) a line, dependencies first; "#" starts a comment. A kernel with everything built in
// has no such file.
const ModuleOrder = "/lib/modules/h8s.order"

// Modules loads the modules order lists. One that does not load (a device this machine
// has not, an option this kernel refuses) does not keep the rest from loading; the
// errors come back joined.
func Modules(order string) error {
	list, err := os.ReadFile(order)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read module list: %w", err)
	}
	var errs []error
	for _, name := range moduleNames(list) {
		if !filepath.IsAbs(name) {
			name = filepath.Join(filepath.Dir(order), name)
		}
		if err := loadModule(name); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func moduleNames(list []byte) []string {
	var names []string
	for s := bufio.NewScanner(bytes.NewReader(list)); s.Scan(); {
		line, _, _ := strings.Cut(s.Text(), "#")
		if line = strings.TrimSpace(line); line != "" {
			names = append(names, line)
		}
	}
	return names
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("load module: %w", err)
	}
	defer f.Close()
	err = unix.FinitModule(int(f.Fd()), "", 0)
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load module %s: %w", path, err)
	}
	return nil
}
