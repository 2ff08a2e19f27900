package bench

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"

	"github.com/hypernetes/hypernetes/guest/image"
	"github.com/hypernetes/hypernetes/runtime/vmm/qemu"
)

// bareGuest is QEMU started plainly, with our kernel, testbox as its init, and disks.
type bareGuest struct {
	mu     sync.Mutex
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	lines  chan string
	stderr bytes.Buffer
}

// startGuest boots one. devices are further arguments of QEMU, which finds files from
// descriptor 3 on.
func startGuest(ctx context.Context, host qemu.Host, k kernel, initrd string, files []*os.File, devices ...string) (*bareGuest, error) {
	k.cmdline += " -- io -"
	g := &bareGuest{cmd: exec.Command(host.Binary, append(floorArgs(k, host.TSCKHz, initrd, guestMiB), devices...)...), lines: make(chan string)}
	g.cmd.ExtraFiles, g.cmd.Stderr = files, &g.stderr
	var err error
	if g.stdin, err = g.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	stdout, err := g.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := g.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(g.lines)
		for s := bufio.NewScanner(stdout); s.Scan(); {
			g.lines <- strings.TrimSpace(s.Text())
		}
	}()
	if _, err := g.answer(ctx); err != nil { // that it is there
		return nil, errors.Join(err, g.stop())
	}
	return g, nil
}

// output is what testbox's io prints for args.
func (g *bareGuest) output(ctx context.Context, args ...string) ([]byte, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if _, err := fmt.Fprintln(g.stdin, strings.Join(args, " ")); err != nil {
		return nil, err
	}
	return g.answer(ctx)
}

// answer is the next line of JSON; the console also echoes and has the kernel's words.
func (g *bareGuest) answer(ctx context.Context) ([]byte, error) {
	for {
		select {
		case line, ok := <-g.lines:
			switch {
			case !ok:
				return nil, fmt.Errorf("the bare guest has ended: %s", strings.TrimSpace(g.stderr.String()))
			case strings.HasPrefix(line, `{"error"`):
				return nil, fmt.Errorf("bare guest: %s", line)
			case strings.HasPrefix(line, "{"):
				return []byte(line), nil
			}
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// stop ends it and waits for that.
func (g *bareGuest) stop() error {
	_ = g.stdin.Close()
	if err := g.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	for range g.lines {
	}
	_ = g.cmd.Wait() // it was killed
	return nil
}

// writeGuestInitrd makes the initramfs of bare guests.
func writeGuestInitrd(path, testbox string) error {
	program, err := os.ReadFile(testbox)
	if err != nil {
		return err
	}
	var b bytes.Buffer
	archive := image.NewCPIO(&b)
	if err := errors.Join(archive.Directory("dev", 0o755), archive.File("init", 0o755, int64(len(program)), bytes.NewReader(program)), archive.Close()); err != nil {
		return err
	}
	return os.WriteFile(path, b.Bytes(), 0o600)
}
