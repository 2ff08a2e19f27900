// Command mkfs.erofs stands before the real one on containerd's PATH and adds the
// tar mode (--tar=f, erofs-utils 1.7) to older ones such as Debian 12's 1.5.
//
// containerd's EROFS differ turns itself off without that mode. The walking differ
// that would take its place unpacks a layer on top of its parents, mounted on the
// host: a tenant's file system read by the host's kernel. Here each layer is
// unpacked alone, into plain files, and then packed by the real program.
package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/containerd/containerd/v2/pkg/archive"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "mkfs.erofs:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	real, err := findReal()
	if err != nil {
		return err
	}
	native := exec.CommandContext(ctx, real, args...)
	native.Stdin, native.Stdout, native.Stderr = stdin, stdout, stderr

	// erofs-utils 1.5 prints its help on stderr and exits with 1.
	help, _ := exec.CommandContext(ctx, real, "--help").CombinedOutput()
	if bytes.Contains(help, []byte("--tar=")) {
		return native.Run()
	}
	plan, err := parse(args)
	if err != nil {
		return err
	}
	switch {
	case plan.help:
		_, err := fmt.Fprintf(stdout, "%s\n --tar=f               unpack a tar from standard input (added by Hypernetes)\n", help)
		return err
	case !plan.tar:
		return native.Run()
	}
	return convert(ctx, real, plan, stdin, stderr)
}

// plan is a command line taken apart.
type plan struct {
	help, tar bool
	// options go to the real program as they are.
	options []string
	output  string
}

// parse understands the command lines containerd's erofsutils package makes. Options
// with a value apart (-U UUID) keep it because they are passed on in order.
func parse(args []string) (plan, error) {
	var p plan
	for _, a := range args {
		switch {
		case a == "--help" || a == "-h":
			p.help = true
		case a == "--tar=f" || a == "--tar":
			p.tar = true
		case strings.HasPrefix(a, "--tar="):
			return p, fmt.Errorf("%s is not supported with erofs-utils older than 1.7: unset enable_tar_index in containerd's configuration", a)
		case a == "--aufs":
			// Whiteouts are converted while unpacking.
		case a == "-b4096":
			// erofs-utils 1.5 knows no other block size and no such option.
		default:
			p.options = append(p.options, a)
		}
	}
	if p.tar {
		if len(p.options) == 0 {
			return p, fmt.Errorf("no output file named")
		}
		p.output = p.options[len(p.options)-1]
		p.options = p.options[:len(p.options)-1]
	}
	return p, nil
}

func convert(ctx context.Context, real string, p plan, tar io.Reader, stderr io.Writer) error {
	// Beside the output: the same file system, and removed with the snapshot if this
	// process is killed.
	dir, err := os.MkdirTemp(filepath.Dir(p.output), ".unpack-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	if _, err := archive.Apply(ctx, dir, tar, archive.WithConvertWhiteout(archive.OverlayConvertWhiteout)); err != nil {
		return fmt.Errorf("unpack layer: %w", err)
	}
	cmd := exec.CommandContext(ctx, real, append(p.options, p.output, dir)...)
	// The real program's progress goes to stderr only when it fails: the caller takes
	// any output for part of an error.
	out, err := cmd.CombinedOutput()
	if err == nil {
		return nil
	}
	if name := tooLong(dir); name != "" {
		return fmt.Errorf("%s takes file names of at most %d bytes, the layer has %.40q...", real, maxName, name)
	}
	_, _ = io.WriteString(stderr, complaints(out))
	return fmt.Errorf("%s: %w", real, err)
}

// complaints are the errors in what the real program printed; the rest is its progress,
// with the names of files of whoever made the image.
func complaints(out []byte) string {
	var errs strings.Builder
	for line := range strings.Lines(string(out)) {
		if i := strings.Index(line, "<E> "); i >= 0 {
			errs.WriteString(line[i:])
		}
	}
	return errs.String()
}

// maxName is the longest file name for erofs-utils 1.5, which fails on longer ones as if
// a file were missing.
const maxName = 254

// tooLong returns a file name below dir that the real program cannot take, or "".
func tooLong(dir string) (name string) {
	_ = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err == nil && len(d.Name()) > maxName {
			name = d.Name()
			return fs.SkipAll
		}
		return nil
	})
	return name
}

// findReal finds the next mkfs.erofs on PATH that is not this program.
func findReal() (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	for _, dir := range filepath.SplitList(os.Getenv("PATH")) {
		path := filepath.Join(dir, "mkfs.erofs")
		if resolved, err := filepath.EvalSymlinks(path); err == nil && resolved != self {
			return path, nil
		}
	}
	return "", fmt.Errorf("the real mkfs.erofs is not on PATH: install the Debian package erofs-utils")
}
