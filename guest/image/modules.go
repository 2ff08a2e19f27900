package image

import (
	"bufio"
	"bytes"
	"debug/elf"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"

	"github.com/containerd/errdefs"
)

// Module is a kernel module file.
type Module struct {
	// Name in the kernel's spelling: underscores, no suffix.
	Name string
	// Path relative to the kernel's module directory.
	Path string
	// Depends are the names of modules to load before this one.
	Depends []string
}

// ScanModules reads the modules below dir (/lib/modules/<release>) from their own
// .modinfo sections, so no depmod is needed, and the names of those built in.
func ScanModules(dir string) (map[string]Module, map[string]bool, error) {
	mods := map[string]Module{}
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Ext(p) != ".ko" {
			return err
		}
		rel, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		m := Module{Name: moduleName(p), Path: rel}
		if m.Depends, err = moduleDepends(p); err != nil {
			return fmt.Errorf("module %s: %w", rel, err)
		}
		mods[m.Name] = m
		return nil
	})
	if err != nil {
		return nil, nil, err
	}
	builtin := map[string]bool{}
	b, err := os.ReadFile(filepath.Join(dir, "modules.builtin"))
	if err != nil {
		return nil, nil, err
	}
	for line := range strings.Lines(string(b)) {
		if line = strings.TrimSpace(line); line != "" {
			builtin[moduleName(line)] = true
		}
	}
	return mods, builtin, nil
}

func moduleName(p string) string {
	return strings.ReplaceAll(strings.TrimSuffix(filepath.Base(p), ".ko"), "-", "_")
}

func moduleDepends(p string) ([]string, error) {
	f, err := elf.Open(p)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	s := f.Section(".modinfo")
	if s == nil {
		return nil, fmt.Errorf("no .modinfo section: %w", errdefs.ErrInvalidArgument)
	}
	b, err := s.Data()
	if err != nil {
		return nil, err
	}
	return parseDepends(b), nil
}

// parseDepends finds depends=a,b in a .modinfo section (NUL-separated key=value).
func parseDepends(b []byte) []string {
	for _, kv := range bytes.Split(b, []byte{0}) {
		if v, ok := bytes.CutPrefix(kv, []byte("depends=")); ok {
			return strings.FieldsFunc(strings.ReplaceAll(string(v), "-", "_"), func(r rune) bool { return r == ',' })
		}
	}
	return nil
}

// LoadOrder returns the wanted modules and what they depend on, dependencies first,
// each once; modules that are built in are left out. A wanted module that is neither
// is an error unless its name ends in "?".
func LoadOrder(mods map[string]Module, builtin map[string]bool, wanted []string) ([]Module, error) {
	o := loadOrder{mods: mods, builtin: builtin, state: map[string]int{}}
	for _, w := range wanted {
		name, optional := strings.CutSuffix(w, "?")
		if _, ok := mods[name]; !ok && optional {
			continue
		}
		if err := o.visit(name); err != nil {
			return nil, err
		}
	}
	return o.order, nil
}

type loadOrder struct {
	mods    map[string]Module
	builtin map[string]bool
	state   map[string]int // 1 being visited, 2 done
	order   []Module
}

func (o *loadOrder) visit(name string) error {
	if o.builtin[name] || o.state[name] == 2 {
		return nil
	}
	m, ok := o.mods[name]
	if !ok {
		return fmt.Errorf("kernel module %s: %w, neither as a file nor built in", name, errdefs.ErrNotFound)
	}
	if o.state[name] == 1 {
		return fmt.Errorf("kernel module %s depends on itself: %w", name, errdefs.ErrInvalidArgument)
	}
	o.state[name] = 1
	deps := append([]string(nil), m.Depends...)
	sort.Strings(deps)
	for _, d := range deps {
		if err := o.visit(d); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	o.state[name] = 2
	o.order = append(o.order, m)
	return nil
}

// ReadModuleList reads names, one a line, # starting a comment.
func ReadModuleList(text string) []string {
	var names []string
	for s := bufio.NewScanner(strings.NewReader(text)); s.Scan(); {
		line, _, _ := strings.Cut(s.Text(), "#")
		names = append(names, strings.Fields(line)...)
	}
	return names
}
