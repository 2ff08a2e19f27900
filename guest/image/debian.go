package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// command runs a program and returns its output; an error has the last line of what it
// said on stderr.
func command(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8")
	out, err := cmd.Output()
	if errors.Is(err, exec.ErrNotFound) {
		return nil, fmt.Errorf("%s: %w: this needs a Debian system with apt and dpkg", name, errdefs.ErrNotFound)
	}
	if err != nil {
		lines := strings.Split(strings.TrimSpace(stderr.String()), "\n")
		return nil, fmt.Errorf("%s: %w: %s", name, err, lines[len(lines)-1])
	}
	return out, nil
}

// pkg is a Debian package at a version.
type pkg struct{ name, version string }

func (p pkg) String() string { return p.name + " " + p.version }

// Debian's names and versions are made of these characters only (policy 5.6), so they
// are safe in a file name; the epoch's colon is what apt writes as %3a.
var packagePattern = regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]+$`)
var versionPattern = regexp.MustCompile(`^[0-9][A-Za-z0-9.+~:-]*$`)

// offer is what apt would install under a name.
type offer struct {
	Package, Version, Depends string
}

// offers remembers apt's answers, half a second each, until its lists change.
type offers struct {
	Lists time.Time
	Named map[string]offer
}

const aptLists = "/var/lib/apt/lists" // renewed by `apt-get update`

// candidate asks apt which version of a package it would install, and its dependencies.
func (b *builder) candidate(ctx context.Context, name string) (pkg, string, error) {
	file := filepath.Join(b.Cache, "offers.json")
	known := offers{Named: map[string]offer{}}
	st, err := os.Stat(aptLists)
	if err != nil {
		return pkg{}, "", fmt.Errorf("package %s: %w: this needs a Debian system with apt", name, err)
	}
	if data, err := os.ReadFile(file); err != nil || json.Unmarshal(data, &known) != nil || !known.Lists.Equal(st.ModTime()) {
		known = offers{Lists: st.ModTime(), Named: map[string]offer{}}
	}
	o, ok := known.Named[name]
	if !ok {
		if o, err = ask(ctx, name); err != nil {
			return pkg{}, "", err
		}
		known.Named[name] = o
		data, err := json.Marshal(known)
		if err != nil {
			return pkg{}, "", err
		}
		if err := writeFile(file, data, 0o644); err != nil {
			return pkg{}, "", err
		}
	}
	p := pkg{o.Package, o.Version}
	if !packagePattern.MatchString(p.name) || !versionPattern.MatchString(p.version) {
		return pkg{}, "", fmt.Errorf("package %s: apt-cache shows %q: %w", name, p, errdefs.ErrInvalidArgument)
	}
	return p, o.Depends, nil
}

func ask(ctx context.Context, name string) (offer, error) {
	out, err := command(ctx, "", "apt-cache", "show", "--no-all-versions", name)
	if err != nil {
		return offer{}, fmt.Errorf("package %s: %w (does `apt-get update` help?)", name, err)
	}
	f := controlFields(string(out))
	return offer{f["Package"], f["Version"], f["Depends"]}, nil
}

// controlFields reads the first paragraph of a Debian control file, first lines only.
func controlFields(text string) map[string]string {
	fields := map[string]string{}
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		if line == "" {
			break
		}
		if k, v, ok := strings.Cut(line, ":"); ok && !strings.HasPrefix(line, " ") {
			fields[k] = strings.TrimSpace(v)
		}
	}
	return fields
}

// firstDependency returns the name of the first dependency with the prefix.
func firstDependency(depends, prefix string) string {
	for _, d := range strings.Split(depends, ",") {
		name, _, _ := strings.Cut(strings.TrimSpace(d), " ")
		if strings.HasPrefix(name, prefix) {
			return name
		}
	}
	return ""
}

// unpack downloads p into dir/debs unless it is there and unpacks it into a new
// directory, which the caller removes. Nothing is installed.
func unpack(ctx context.Context, dir string, p pkg) (string, error) {
	debs := filepath.Join(dir, "debs")
	if err := os.MkdirAll(debs, 0o755); err != nil {
		return "", err
	}
	pattern := filepath.Join(debs, p.name+"_"+strings.ReplaceAll(p.version, ":", "%3a")+"_*.deb")
	found, err := filepath.Glob(pattern)
	if err != nil {
		return "", err
	}
	if len(found) == 0 {
		// Unsandboxed: apt's own user cannot write below a root's home directory.
		if _, err := command(ctx, debs, "apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", p.name+"="+p.version); err != nil {
			return "", fmt.Errorf("download %s: %w", p, err)
		}
		if found, err = filepath.Glob(pattern); err != nil || len(found) == 0 {
			return "", fmt.Errorf("download %s: no %s afterwards: %w", p, pattern, errdefs.ErrNotFound)
		}
	}
	tmp, err := os.MkdirTemp(dir, ".unpack-")
	if err != nil {
		return "", err
	}
	if _, err := command(ctx, "", "dpkg-deb", "-x", found[0], tmp); err != nil {
		_ = os.Remove(found[0]) // a torn download would fail for ever
		return "", errors.Join(fmt.Errorf("unpack %s: %w", p, err), os.RemoveAll(tmp))
	}
	return tmp, nil
}

// writeFile replaces path atomically.
func writeFile(path string, data []byte, perm fs.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".new-")
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Chmod(perm), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
}
