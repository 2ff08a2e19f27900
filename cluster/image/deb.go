package image

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"sort"
	"strings"

	"github.com/containerd/errdefs"
)

// deb is one package file of a closure.
type deb struct {
	name, version, arch string
	file                string
}

// archive is a private view of Debian's archive: the machine's package lists
// and keys, an empty set of installed packages (so that a closure is
// complete whatever the machine has), and a download cache of its own.
type archive struct {
	dir string // cache directory
}

// simulated is one "Inst name (version origin [arch])" line of apt-get -s.
var simulated = regexp.MustCompile(`^Inst (\S+) (?:\[\S+\] )?\((\S+) .*\[(\S+)\]\)`)

// closure downloads the named packages with everything they depend on and
// returns them sorted by name.
func (a *archive) closure(ctx context.Context, packages []string) ([]deb, error) {
	if err := a.prepare(); err != nil {
		return nil, err
	}
	out, err := a.apt(ctx, append([]string{"-s", "install"}, packages...)...)
	if err != nil {
		return nil, err
	}
	debs := parseSimulation(out, a.packages())
	if len(debs) == 0 {
		return nil, fmt.Errorf("packages %s: apt-get found nothing to install: %w", strings.Join(packages, " "), errdefs.ErrNotFound)
	}
	if !allPresent(debs) {
		if _, err := a.apt(ctx, append([]string{"--download-only", "install"}, packages...)...); err != nil {
			return nil, err
		}
	}
	if !allPresent(debs) {
		return nil, fmt.Errorf("packages %s: apt-get downloaded other files than it planned; remove %s and try again: %w",
			strings.Join(packages, " "), a.packages(), errdefs.ErrDataLoss)
	}
	return debs, nil
}

func (a *archive) packages() string { return filepath.Join(a.dir, "debs") }
func (a *archive) status() string   { return filepath.Join(a.dir, "dpkg-status") }

func (a *archive) prepare() error {
	for _, tool := range []string{"apt-get", "dpkg-deb"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("%s not found: images are made of Debian packages, build them on Debian or Ubuntu and use `h8s image load`: %w", tool, errdefs.ErrUnavailable)
		}
	}
	if err := os.MkdirAll(filepath.Join(a.packages(), "partial"), 0o755); err != nil {
		return fmt.Errorf("package cache: %w", err)
	}
	f, err := os.OpenFile(a.status(), os.O_CREATE|os.O_RDONLY, 0o644)
	if err != nil {
		return fmt.Errorf("package cache: %w", err)
	}
	return f.Close()
}

// apt runs apt-get against the private state. The sandbox user is switched
// off because the cache need not be readable by apt's own account.
func (a *archive) apt(ctx context.Context, args ...string) ([]byte, error) {
	opts := []string{
		"-qq", "-y", "--no-install-recommends",
		"-o", "Dir::State::status=" + a.status(),
		"-o", "Dir::Cache::archives=" + a.packages(),
		"-o", "APT::Sandbox::User=",
		"-o", "Debug::NoLocking=1",
	}
	cmd := exec.CommandContext(ctx, "apt-get", append(opts, args...)...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("apt-get %s: %w: %s (if packages are unknown or gone, run `apt-get update`)",
			strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return out, nil
}

func parseSimulation(out []byte, dir string) []deb {
	var debs []deb
	for line := range strings.Lines(string(out)) {
		m := simulated.FindStringSubmatch(strings.TrimSpace(line))
		if m == nil {
			continue
		}
		name, _, _ := strings.Cut(m[1], ":")
		file := fmt.Sprintf("%s_%s_%s.deb", name, strings.ReplaceAll(m[2], ":", "%3a"), m[3])
		debs = append(debs, deb{name: name, version: m[2], arch: m[3], file: filepath.Join(dir, file)})
	}
	sort.Slice(debs, func(i, j int) bool { return debs[i].name < debs[j].name })
	return debs
}

func allPresent(debs []deb) bool {
	for _, d := range debs {
		if _, err := os.Stat(d.file); err != nil {
			return false
		}
	}
	return true
}

// unpack adds the package's files to t.
func (d deb) unpack(ctx context.Context, t *tree) (err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cmd := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", d.file)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("unpack %s: %w", d.file, err)
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("unpack %s: %w", d.file, err)
	}
	readErr := t.readTar(bufio.NewReaderSize(out, 1<<16), false)
	if readErr == nil {
		// tar readers stop at the end marker; the padding behind it would
		// otherwise end dpkg-deb with a broken pipe.
		_, readErr = io.Copy(io.Discard, out)
	} else {
		cancel()
	}
	if err := errors.Join(readErr, cmd.Wait()); err != nil {
		return fmt.Errorf("unpack %s: %w: %s", d.file, err, strings.TrimSpace(stderr.String()))
	}
	return nil
}

// control returns the package's control paragraph with the status line that
// dpkg adds when it has installed a package.
func (d deb) control(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "dpkg-deb", "--field", d.file).Output()
	if err != nil {
		return "", fmt.Errorf("read control of %s: %w", d.file, err)
	}
	first, rest, _ := strings.Cut(string(out), "\n")
	return first + "\nStatus: install ok installed\n" + strings.TrimRight(rest, "\n") + "\n\n", nil
}
